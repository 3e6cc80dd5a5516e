"""Export a trained embedder: `python pipeline/export_model.py --run RUN --out DIR`.

DIR gets adapter/ (PEFT), merged/ (one whole model), sentence-transformers/ and README.md, a model card. Before DIR has
its name, a gate embeds fixed texts in many scripts through every form and compares them with the run's own model; where
one differs, nothing is left that looks finished.
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
from pipeline.inference.description import read_description
from pipeline.inference.exporting import prompts_of, write_merged, write_sentence_transformers
from pipeline.inference.gate import ADAPTER, MERGED, SENTENCE_TRANSFORMERS, run_gate
from pipeline.settings import ModelSettings

log = logging.getLogger("export")


def export(run: Path, out: Path, shots: int) -> None:
    """Write `out`; ValueError where the gate fails or something is there already."""
    model = run / "model" if (run / "model").is_dir() else run
    if out.exists():
        raise ValueError(f"--out {out} exists; name a new folder, or remove it")
    description = read_description(model)

    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(model, partial / ADAPTER)
    log.info("merging into whole weights")
    write_merged(model, partial / MERGED)
    if reason := why_no_sentence_transformers(description.model):
        log.warning("no %s/: %s", SENTENCE_TRANSFORMERS, reason)
    else:
        examples = json.loads((model / "examples.json").read_text(encoding="utf-8"))
        if not description.tasks:
            log.warning("%s names no tasks (it is of an older version): no prompts are written", model)
        prompts = prompts_of(description.template, description.tasks, examples, shots)
        write_sentence_transformers(partial / MERGED, partial / SENTENCE_TRANSFORMERS, prompts)

    checks = run_gate(model, partial)
    for check in checks:
        log.info("%-36s %.6f (at least %g) %s", check.name, check.value, check.least, "" if check.holds else "FAILS")
    if failed := [check for check in checks if not check.holds]:
        shutil.rmtree(partial)
        worst = "; ".join(f"{c.name}: {c.value:.6f}, at least {c.least:g}" for c in failed)
        raise ValueError(f"the export of {model} differs from the trained model ({worst}); nothing was written")
    (partial / "README.md").write_text(model_card(run, partial, checks), encoding="utf-8")
    partial.rename(out)
    log.info("exported to %s", out)


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
        epilog="example:\n  python pipeline/export_model.py --run runs/quickstart --out runs/quickstart/export",
    )
    parser.add_argument("--run", type=Path, required=True, help="a run folder, or its model/ or best_model/")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--shots", type=int, default=3, help="examples in the few-shot prompts that are written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        if arguments.shots < 0:
            raise ValueError(f"--shots {arguments.shots} must be 0 or more")
        export(arguments.run, arguments.out, arguments.shots)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
