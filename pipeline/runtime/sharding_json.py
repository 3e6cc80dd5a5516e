"""Reading run.deepspeed, without importing deepspeed.

The JSON owns sharding, offload and communication; the recipe owns batch, precision, optimizer and clipping. A JSON
that sets what the recipe owns is an error.
"""

import difflib
import json
from pathlib import Path
from typing import Any

RECIPE_OWNED = {
    "train_batch_size": "batch.queries",
    "train_micro_batch_size_per_gpu": "batch.queries and run.chunk_tokens",
    "gradient_accumulation_steps": "run.chunk_tokens",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.clip_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "activation_checkpointing": "model.activation_checkpointing",
    "steps_per_print": "the step line",
    "zero_allow_untested_optimizer": "the optimizer is always torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer is always torch's AdamW",
}
# What is left to the JSON. A key that is none of DeepSpeed's would be passed over in silence.
KNOWN = (
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "aio",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
)


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """The JSON's contents; ValueError if it is missing, malformed or sets what the recipe owns."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"run.deepspeed={path}: no such file; ds_configs/ has one for each ZeRO stage")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"run.deepspeed={path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"run.deepspeed={path} must hold a JSON object, not {type(config).__name__}")
    for key in config:
        if key in RECIPE_OWNED:
            raise ValueError(
                f"{path} sets {key!r}, which the recipe owns ({RECIPE_OWNED[key]}); remove it from the JSON"
            )
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, 1)
            raise ValueError(
                f"run.deepspeed={path}: {key!r} is not one of {', '.join(KNOWN)}"
                f"{f'; did you mean {near[0]}?' if near else ''}"
            )
    _require_shapes(path, config)
    return config


def _require_shapes(path: Path, config: dict[str, Any]) -> None:
    """ValueError for values that could not even be looked at; DeepSpeed checks the rest of zero_optimization."""
    for key in ("wall_clock_breakdown", "memory_breakdown", "dump_state"):
        if not isinstance(config.get(key, False), bool):
            raise ValueError(f"run.deepspeed={path}: {key}={config[key]!r} must be true or false")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"run.deepspeed={path}: zero_optimization={zero!r} must be an object")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"run.deepspeed={path}: zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old in zero:
            raise ValueError(f'run.deepspeed={path}: {old} is an old key; write {new}: {{"device": "cpu"}}')
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key) or {}, dict):
            raise ValueError(f'run.deepspeed={path}: zero_optimization.{key} must be an object, {{"device": "cpu"}}')
    if stage < 3 and (zero.get("offload_param") or {}).get("device", "none") != "none":
        raise ValueError(f"run.deepspeed={path}: offload_param needs stage 3, not {stage}; remove it")


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def require_exact(path: str | Path, keep_graphs: int) -> None:
    """ValueError for what would train on wrong gradients without a word: several live graphs under ZeRO-3 (off by
    70 %), and an offloaded optimizer under ZeRO 1 or 2, where a step that is not taken stays in the next one's gradient
    (both measured, DeepSpeed 0.19).
    """
    config = read_deepspeed_json(path)
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    if stage < 3 and (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise ValueError(
            f"run.deepspeed={path} offloads the optimizer under ZeRO-{stage}, where a step that is not finite would "
            "stay in the gradient of the next one; take ds_configs/zero3_offload.json, or remove offload_optimizer"
        )
    if stage == 3 and keep_graphs > 1:
        raise ValueError(
            f"run.keep_graphs={keep_graphs} and ZeRO-3 ({path}) exclude each other: several live graphs give wrong "
            "gradients there; set run.keep_graphs=1, or a JSON of stage 0, 1 or 2 as run.deepspeed"
        )
