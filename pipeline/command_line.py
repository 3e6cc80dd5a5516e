"""The console command `bge-icl`: one subcommand per entry file, loaded only when it is called."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "preprocess": ("pipeline.preprocess", "tokenize raw rows and store them in length buckets"),
    "report": ("pipeline.report_data", "write one HTML page about a token store"),
    "mine": ("pipeline.mine_negatives", "mine hard negatives and nearest rows for a recipe's datasets"),
    "reserve": ("pipeline.reserve_rows", "set rows aside as evaluation set and in-context examples"),
    "decontaminate": ("pipeline.decontaminate", "drop rows whose texts stand in an evaluation set"),
    "score": ("pipeline.score_rows", "let a teacher score rows, for distillation"),
    "plan": ("pipeline.plan_run", "show what a training run will do, without running it"),
    "fetch": ("pipeline.fetch_files", "bring a recipe's model, tokenizer and data from the hub into one folder"),
    "submit": ("pipeline.submit_job", "check a recipe for a SLURM cluster, and submit preprocess -> train -> evaluate"),
    "status": ("pipeline.job_status", "show where a run stands: step, rate, ETA, restarts, checkpoint, logs"),
    "preflight": ("pipeline.check_nodes", "check the nodes of a job (under srun)"),
    "train": ("pipeline.train", "train an embedder (several ranks: deepspeed pipeline/train.py)"),
    "reranker": ("pipeline.train_reranker", "train a lightweight reranker (several ranks: as train)"),
    "export": ("pipeline.export_model", "write a trained model for others to load: checked, with a model card"),
    "encode": ("pipeline.encode_corpus", "embed a corpus of any size into one file"),
    "evaluate": ("pipeline.evaluate_embedder", "score a model zero-shot and few-shot"),
    "rerank": ("pipeline.evaluate_reranker", "rerank what a retriever found, and score both"),
    "study": ("pipeline.study_examples", "measure what in-context examples do: number, content, labels, choice"),
}


def usage() -> str:
    """The list of subcommands as text."""
    lines = [f"  {name:<13} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bge-icl COMMAND [options]",
            "",
            "Train and evaluate few-shot text embedders (arXiv 2409.15700).",
            "",
            "commands:",
            *lines,
            "",
            "bge-icl COMMAND --help tells more; each command is also a file, e.g. python pipeline/preprocess.py",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments after the subcommand to its entry; returns the entry's exit code, 2 for an unknown one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; known commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"bge-icl {name}"  # what the entry's own --help shows as its name
    return int(importlib.import_module(COMMANDS[name][0]).main(rest))


if __name__ == "__main__":
    raise SystemExit(main())
