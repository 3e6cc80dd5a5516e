"""Reading run.deepspeed, without importing deepspeed.

The JSON owns sharding, offload and communication; the recipe owns batch, precision, optimizer and clipping. A JSON
that sets what the recipe owns is an error.
"""

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
}


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
    for key in RECIPE_OWNED:
        if key in config:
            raise ValueError(
                f"{path} sets {key!r}, which the recipe owns ({RECIPE_OWNED[key]}); remove it from the JSON"
            )
    return config


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def require_exact(path: str | Path, keep_graphs: int) -> None:
    """ValueError for what would train on wrong gradients without a word: several live graphs under ZeRO-3 (off by
    70 %), and an offloaded optimizer under ZeRO 1 or 2, where a step that is not taken stays in the next one's gradient
    (both measured, DeepSpeed 0.19).
    """
    config = read_deepspeed_json(path)
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    if stage in (1, 2) and (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise ValueError(
            f"run.deepspeed={path} offloads the optimizer under ZeRO-{stage}, where a step that is not finite would "
            "stay in the gradient of the next one; take ds_configs/zero3_offload.json, or remove offload_optimizer"
        )
    if stage == 3 and keep_graphs > 1:
        raise ValueError(
            f"run.keep_graphs={keep_graphs} and ZeRO-3 ({path}) exclude each other: several live graphs give wrong "
            "gradients there; set run.keep_graphs=1, or a JSON of stage 0, 1 or 2 as run.deepspeed"
        )
