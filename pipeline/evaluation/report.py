"""scores.json (a list of scores) and report.md (what a person reads about a run)."""

import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.evaluation.table import Score, markdown_table
from pipeline.files import take_lock, write_text
from pipeline.settings import LossSettings, Settings

log = logging.getLogger(__name__)
PACKAGES = ("bge-icl-train", "torch", "transformers", "deepspeed", "peft", "mteb", "numpy")


def read_scores(path: Path) -> list[Score]:
    """The scores of a file, none where there is no file; ValueError if it is not a list of scores."""
    if not path.is_file():
        return []
    try:
        return [Score(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a list of scores ({error}); remove it to begin anew") from error


def add_scores(path: Path, new: Sequence[Score]) -> list[Score]:
    """Add scores to a file; an entry for the same model, mode, task and metric is replaced. Returns all of them.

    Entries that have the label of a model, but are another model's (it was trained again, say), are taken out.
    """
    names, models = {score.name for score in new}, {score.model: score.fingerprint for score in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path.with_name(f".{path.name}.lock"), wait=True)
    assert lock is not None
    with lock:
        old = [score for score in read_scores(path) if score.name not in names]
        # Files from before fingerprints have none: whose they are is not known.
        kept = [
            score for score in old if models.get(score.model, "") in ("", score.fingerprint) or not score.fingerprint
        ]
        if len(kept) < len(old):
            labels = ", ".join(sorted({score.model for score in old} & models.keys()))
            log.warning(
                "%d older scores labelled %s are another model's and were taken out of %s; --label tells models apart",
                len(old) - len(kept),
                labels,
                path,
            )
        scores = [*kept, *new]
        write_text(path, json.dumps([asdict(score) for score in scores], indent=1) + "\n")
    return scores


def write_report(
    run_folder: Path, settings: Settings | None, scores: Sequence[Score], notes: Sequence[str] = ()
) -> Path:
    """Write `run_folder`/report.md: scores side by side, settings if there is a recipe, versions; returns its path."""
    lines = [f"# {run_folder.name}", "", "## Scores", "", *markdown_table(scores), ""]
    lines += [f"- {note}" for note in notes]
    if settings is not None:
        lines += ["", "## Settings", "", *_markdown_settings(settings), ""]
    if (run_folder / "settings.yaml").is_file():
        lines += ["All of them: [settings.yaml](settings.yaml).", ""]
    if (run_folder / "loss.png").is_file():
        lines += ["## Training", "", "![loss](loss.png)", ""]
    lines += ["## Versions", "", ", ".join([f"Python {platform.python_version()}", *_versions()]), ""]
    path = run_folder / "report.md"
    write_text(path, "\n".join(lines))
    return path


def _markdown_settings(settings: Settings) -> list[str]:
    model, batch, optim, pre = settings.model, settings.batch, settings.optim, settings.preprocess
    depth = f", first {model.num_layers} layers" if model.num_layers else ""
    length = f"{optim.max_steps} steps" if optim.max_steps else f"{optim.epochs:g} epochs"
    rows = {
        "base model": f"{Path(model.name).name}{depth}, {model.dtype}, {model.attention}, {model.pooling} pooling",
        "LoRA": f"rank {model.lora.rank}, alpha {model.lora.alpha}, dropout {model.lora.dropout:g}",
        "template": pre.template,
        "limits (tokens)": f"query {pre.max_query_tokens}, passage {pre.max_passage_tokens}, example "
        f"{pre.max_example_query_tokens} + {pre.max_example_passage_tokens}, prompt {pre.max_prompt_tokens}",
        "datasets": ", ".join(dataset.name for dataset in settings.data.datasets),
        "batch": f"{batch.queries} queries ({batch.symmetric_queries} symmetric), groups of {batch.group_size}, "
        f"examples {batch.examples.mode} 0 to {batch.examples.max_examples}",
        "loss": _describe_loss(settings.loss),
        "optimizer": f"AdamW, {length}, learning rate {optim.lr:g} ({optim.schedule}), seed {settings.run.seed}",
        "DeepSpeed": f"{Path(settings.run.deepspeed).name}, chunks of {settings.run.chunk_tokens} tokens",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _describe_loss(loss: LossSettings) -> str:
    """The temperature, and every setting that is not the default."""
    parts = [f"temperature {loss.temperature:g}"]
    for f in fields(loss):
        value = getattr(loss, f.name)
        if f.name != "temperature" and value != f.default:
            parts.append(f"{f.name} {list(value) if isinstance(value, tuple) else value}")
    return ", ".join(parts)


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return found
