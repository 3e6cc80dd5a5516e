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
from pipeline.inference.embedder import load_embedder
from pipeline.inference.exporting import prompts_of, write_merged, write_sentence_transformers
from pipeline.inference.gate import ADAPTER, MERGED, SENTENCE_TRANSFORMERS, run_gate

log = logging.getLogger("export")


def export(run: Path, out: Path, shots: int) -> None:
    """Write `out`; ValueError where the gate fails or something is there already."""
    model = run / "model" if (run / "model").is_dir() else run
    if out.exists():
        raise ValueError(f"--out {out} exists; name a new folder, or remove it")
    embedder = load_embedder(model, show_progress=False)
    examples = json.loads((model / "examples.json").read_text(encoding="utf-8"))
    prompts, end = prompts_of(embedder, examples, shots)

    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(model, partial / ADAPTER)
    log.info("merging into whole weights")
    write_merged(model, partial / MERGED)
    if importlib.util.find_spec("sentence_transformers") is None:
        log.warning("no %s/: sentence-transformers is not installed", SENTENCE_TRANSFORMERS)
    else:
        write_sentence_transformers(partial / MERGED, partial / SENTENCE_TRANSFORMERS, prompts)

    checks = run_gate(model, partial, end)
    for check in checks:
        log.info("%-36s %.6f (at least %g) %s", check.name, check.value, check.least, "" if check.holds else "FAILS")
    if failed := [check for check in checks if not check.holds]:
        shutil.rmtree(partial)
        worst = "; ".join(f"{c.name}: {c.value:.6f}, at least {c.least:g}" for c in failed)
        raise ValueError(f"the export of {model} differs from the trained model ({worst}); nothing was written")
    (partial / "README.md").write_text(model_card(run, partial, checks, end), encoding="utf-8")
    partial.rename(out)
    log.info("exported to %s", out)


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
