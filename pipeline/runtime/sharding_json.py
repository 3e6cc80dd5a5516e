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


def require_keepable(path: str | Path, keep_graphs: int) -> None:
    """ValueError for several live graphs under ZeRO-3, whose gradients would be wrong by 70 % without a word."""
    if zero_stage(read_deepspeed_json(path)) == 3 and keep_graphs > 1:
        raise ValueError(
            f"run.keep_graphs={keep_graphs} and ZeRO-3 ({path}) exclude each other: several live graphs give wrong "
            "gradients there; set run.keep_graphs=1, or a JSON of stage 0, 1 or 2 as run.deepspeed"
        )
