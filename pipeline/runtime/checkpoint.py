"""One consolidated folder a checkpoint: no pickle, independent of world size and ZeRO stage.

checkpoints/step-000012/
    weights.safetensors   trainable weights, fp32 masters
    moments.safetensors   both Adam moments, `<name>/exp_avg` and `<name>/exp_avg_sq`
    settings.yaml         the run's settings
    state.json            TrainState, fingerprints of what the run reads (store, base weights), sha256 of all of it
A folder is written under a temporary name, synced and renamed: one with the final name is complete. Dropout and plans
are functions of (seed, step), so there is no random state to save.
"""

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.files import file_sha256, sync
from pipeline.runtime.engine import MOMENTS
from pipeline.settings import Settings, dump_settings, flatten, load_settings

log = logging.getLogger(__name__)

FILES = ("weights.safetensors", "moments.safetensors", "settings.yaml")
# A resumed run may differ from the saved one in these settings only: they do not change what is learned.
MAY_CHANGE = (
    "run.output_dir",
    "run.deepspeed",
    "run.chunk_tokens",
    "run.keep_graphs",
    "run.save_every",
    "run.keep_last",
    "run.max_stall_seconds",
    "run.tracker",
    "run.profile_steps",
    "evaluation.tasks",
    "evaluation.every",
    "evaluation.num_examples",
    "data.root",
    "data.store",
    "model.attention_kernel",
    "model.embed_kernels",
    "model.activation_checkpointing",
)


class OtherVersion(Exception):
    """A whole checkpoint whose form is not this code's."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: `step` steps are done, so the next one is number `step`. `updates` of them moved the weights;
    the others had a loss or gradient that is not finite.
    """

    step: int = 0
    updates: int = 0
    seed: int = 0
    tokens_seen: int = 0
    queries_seen: int = 0


def save_checkpoint(
    folder: Path,
    state: TrainState,
    trainable: dict[str, dict[str, Tensor]],
    settings: Settings,
    inputs: dict[str, str],
    keep_last: int,
) -> Path:
    """Write `folder`/step-XXXXXX atomically (first rank only) and remove all but the newest `keep_last`.

    Args:
        inputs: setting that names something the run reads -> fingerprint of that.

    Raises:
        OSError: it cannot be written; the checkpoints that were there are as they were.
    """
    final = folder / f"step-{state.step:06d}"
    partial = folder / f".partial-{final.name}"
    for leftover in folder.glob(".partial-*"):  # of a run that was killed while saving
        shutil.rmtree(leftover)
    try:
        _write(partial, state, trainable, settings, inputs)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        newest = max(_checkpoints(folder), key=_step_of, default=None)
        kept = f"the last complete one is {newest}" if newest else "there is none before it"
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"checkpoint {final} cannot be written ({reason}); {kept}; the same command goes on") from error
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(folder)
    # Beyond this step there can only be checkpoints that were found damaged: the run went on from before them.
    found = {_step_of(path): path for path in _checkpoints(folder)}
    kept_steps = sorted(step for step in found if step <= state.step)[-keep_last:]
    for step, path in found.items():
        if step not in kept_steps:
            shutil.rmtree(path)
    return final


def _write(
    partial: Path,
    state: TrainState,
    trainable: dict[str, dict[str, Tensor]],
    settings: Settings,
    inputs: dict[str, str],
) -> None:
    partial.mkdir(parents=True)
    save_file({name: parts["weight"] for name, parts in trainable.items()}, partial / FILES[0])
    moments = {f"{name}/{key}": parts[key] for name, parts in trainable.items() for key in MOMENTS}
    save_file(moments, partial / FILES[1])
    (partial / FILES[2]).write_text(dump_settings(settings), encoding="utf-8")
    record: dict[str, Any] = {"state": dataclasses.asdict(state), "inputs": inputs}
    record["sha256"] = {name: file_sha256(partial / name) for name in FILES} | {"this": _digest(record)}
    (partial / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        sync(path)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; a damaged one is named in a warning and the one before it is taken.

    Raises:
        ValueError: there are checkpoints and none is whole. Starting over would delete them, so that is not guessed.
        OSError: one cannot be read just now, which says nothing about what is in it.
    """
    candidates = sorted(_checkpoints(folder), key=_step_of, reverse=True)
    for candidate in candidates:
        try:
            record = json.loads((candidate / "state.json").read_text(encoding="utf-8"))
            broken = [name for name in FILES if file_sha256(candidate / name) != record["sha256"][name]]
            if not broken and "this" not in record["sha256"]:
                raise OtherVersion
            if record["sha256"]["this"] != _digest(record):
                broken.append("state.json")
        except OtherVersion:
            raise ValueError(
                f"{candidate} was saved by another version of this code; go on with that one, or use another "
                "run.output_dir to start a new run"
            ) from None
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            broken = [f"state.json ({error})"]
        if not broken:
            return candidate
        log.warning("checkpoint %s is damaged (%s); trying the one before", candidate, ", ".join(broken))
    if candidates:
        raise ValueError(f"every checkpoint in {folder} is damaged; restore one, or remove the folder to start over")
    return None


def require_same_run(checkpoint: Path, settings: Settings, inputs: dict[str, str]) -> None:
    """ValueError if a checkpoint belongs to other data, another base model or other settings.

    Args:
        inputs: as of `save_checkpoint`; what is not named is not compared.
    """
    record = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    remedy = "use another run.output_dir to start a new run"
    for name, now in inputs.items():
        before = record["inputs"].get(name, "nothing")
        if before != now:
            raise ValueError(
                f"{checkpoint} was trained on another {name} (contents {before[:12]}, now {now[:12]}); restore what "
                f"was there, or {remedy}"
            )
    saved = flatten(load_settings(checkpoint / "settings.yaml"))
    if "pair template" in record["inputs"]:  # settings from before they had a kind say nothing of it
        saved["model.kind"] = "reranker"
    # Dropout draws go by chunk: with dropout another budget is another run.
    has_dropout = settings.model.trained == "lora" and settings.model.lora.dropout > 0
    may_change = set(MAY_CHANGE) - ({"run.chunk_tokens"} if has_dropout else set())
    for key, value in flatten(settings).items():
        if key not in may_change and saved.get(key) != value:
            raise ValueError(
                f"{checkpoint} was saved with {key}={saved.get(key)!r}, now {value!r}; undo that, or {remedy}"
            )
    if record["state"].keys() != {f.name for f in dataclasses.fields(TrainState)}:
        raise ValueError(f"{checkpoint} was saved by another version of this code; go on with that one, or {remedy}")


def load_checkpoint(checkpoint: Path) -> tuple[TrainState, dict[str, dict[str, Tensor]]]:
    """State, weights and moments of a checkpoint."""
    record = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    weights, moments = load_file(checkpoint / FILES[0]), load_file(checkpoint / FILES[1])
    trainable = {
        name: {"weight": weight} | {key: moments[f"{name}/{key}"] for key in MOMENTS}
        for name, weight in weights.items()
    }
    return TrainState(**record["state"]), trainable


def _digest(record: dict[str, Any]) -> str:
    """Of state.json itself, its checksums aside."""
    text = json.dumps({name: record[name] for name in ("state", "inputs")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named as `save_checkpoint` names them, no others."""
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
