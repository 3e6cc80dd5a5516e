"""Export a trained embedder or reranker: `python pipeline/export_model.py --run RUN --out DIR`.

DIR gets adapter/ (PEFT), merged/ (one whole model), of an embedder sentence-transformers/, and README.md, a model card.
Before DIR has its name, a gate puts fixed texts in many scripts through every form: embeddings, or scores of pairs at
every exit, are compared with the trained model's; where one differs, nothing is left that looks finished.
"""

import argparse
import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.inference.card import model_card
from pipeline.inference.description import DESCRIPTION_FILE, RERANKER_FILE, read_description
from pipeline.inference.exporting import (
    prompts_of,
    write_merged,
    write_merged_reranker,
    write_sentence_transformers,
)
from pipeline.inference.gate import ADAPTER, MERGED, SENTENCE_TRANSFORMERS, Check, run_gate
from pipeline.inference.reranker_card import reranker_card
from pipeline.inference.reranker_gate import run_reranker_gate
from pipeline.settings import ModelSettings

log = logging.getLogger("export")


def export(run: Path, out: Path, shots: int | None) -> None:
    """Write `out`; ValueError where the gate fails or something is there already."""
    model = find_trained(run)
    if out.exists():
        raise ValueError(f"--out {out} exists; name a new folder, or remove it")
    is_reranker = (model / RERANKER_FILE).is_file()
    if is_reranker and shots is not None:
        raise ValueError(f"--shots {shots} is for prompts of embedders, and {run} is a reranker; leave it out")

    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shutil.copytree(model, partial / ADAPTER)
        log.info("merging into whole weights")
        if is_reranker:
            write_merged_reranker(model, partial / MERGED)
            log.warning("no %s/: its cross-encoders read no packed pairs and merge no tokens", SENTENCE_TRANSFORMERS)
            checks = run_reranker_gate(model, partial)
        else:
            write_embedder(model, partial, 3 if shots is None else shots)
            checks = run_gate(model, partial)
        require_alike(model, checks)
        card = reranker_card(run, partial, checks) if is_reranker else model_card(run, partial, checks)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("exported to %s", out)


def find_trained(run: Path) -> Path:
    """The folder with what was trained: a run's model/, or `run` itself; ValueError where there is none."""
    if not run.is_dir():
        raise ValueError(f"--run {run}: no such folder")
    model = run / "model" if (run / "model").is_dir() else run
    if not any((model / name).is_file() for name in (DESCRIPTION_FILE, RERANKER_FILE)):
        if (run / "settings.yaml").is_file():
            raise ValueError(f"{run} has no model/ yet: its training is not finished; start it again, it goes on")
        raise ValueError(f"{model} is not a trained embedder or reranker: no {DESCRIPTION_FILE}, no {RERANKER_FILE}")
    return model


def require_alike(model: Path, checks: Sequence[Check]) -> None:
    """Say what the gate found; ValueError where a form differs."""
    for check in checks:
        log.info("%-45s %.6f (at least %g) %s", check.name, check.value, check.least, "" if check.holds else "FAILS")
    if failed := [check for check in checks if not check.holds]:
        worst = "; ".join(f"{c.name}: {c.value:.6f}, at least {c.least:g}" for c in failed)
        raise ValueError(f"the export of {model} differs from the trained model ({worst}); nothing was written")


def write_embedder(model: Path, partial: Path, shots: int) -> None:
    """merged/, and sentence-transformers/ where it can be had."""
    description = read_description(model)
    write_merged(model, partial / MERGED)
    if reason := why_no_sentence_transformers(description.model):
        log.warning("no %s/: %s", SENTENCE_TRANSFORMERS, reason)
        return
    examples = json.loads((model / "examples.json").read_text(encoding="utf-8"))
    if not description.tasks:
        log.warning("%s names no tasks (it is of an older version): no prompts are written", model)
    prompts = prompts_of(description.template, description.tasks, examples, shots)
    write_sentence_transformers(partial / MERGED, partial / SENTENCE_TRANSFORMERS, prompts)


def why_no_sentence_transformers(model: ModelSettings) -> str:
    """Why that form is left out; "" where it is written."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed"
    if model.attention != "causal" or model.pooling != "last":
        return f"it is written for causal attention and last-token pooling, not {model.attention} and {model.pooling}"
    return ""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python pipeline/export_model.py --run runs/quickstart --out runs/quickstart/export\n"
        "  python pipeline/export_model.py --run runs/quickstart_reranker --out exported_reranker",
    )
    parser.add_argument("--run", type=Path, required=True, help="a run folder, or its model/ or best_model/")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--shots", type=int, help="examples in the few-shot prompts of an embedder (3)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        if arguments.shots is not None and arguments.shots < 0:
            raise ValueError(f"--shots {arguments.shots} must be 0 or more")
        export(arguments.run, arguments.out, arguments.shots)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
