"""The only place that imports deepspeed: recipe + JSON -> engine, and a backward pass that reduces once a step.

The JSON owns sharding, offload and communication; the recipe owns batch, precision, optimizer and clipping
(sharding_json.py).
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline.model.encoder import trainable_parameters
from pipeline.runtime.extensions import remove_stale_locks
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.sharding_json import read_deepspeed_json, zero_stage
from pipeline.runtime.watch import StopRequested, Watch, end_alone
from pipeline.settings import OptimSettings

# DeepSpeed reads this when it is imported; without it, it looks for a GPU and warns on machines that have none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)


def start_distributed(ranks: Ranks, max_stall_seconds: float = 1800.0) -> None:
    """Join the process group that the launcher described in the environment.

    A collective call may last a while longer than a rank may stand still: the watchdog, which names ranks, comes first.
    """
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    for lock in remove_stale_locks():
        log.warning("removed %s, which a compilation that was killed has left: this run would have waited for it", lock)
    backend, patience = "nccl" if ranks.device.type == "cuda" else "gloo", timedelta(seconds=max_stall_seconds + 120)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=patience)
    _unlink_shared_memory(ranks)


def _unlink_shared_memory(ranks: Ranks) -> None:
    """DeepSpeed's CPU collectives create 66 MiB of shared memory a rank and never remove it. Unlinked once every rank
    has it open, it goes with the processes, however they end.
    """
    torch.distributed.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{ranks.rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def stop_distributed() -> None:
    """Leave the process group together: a rank that ends while another still talks may be aborted by gloo's threads."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _refused(path: str | Path, error: ValidationError) -> ValueError:
    faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return ValueError(f"run.deepspeed={path} is refused by DeepSpeed: {faults}")


def _complete_config(path: str | Path, optim: OptimSettings, dtype: str) -> dict[str, Any]:
    """The JSON with what the recipe owns."""
    return read_deepspeed_json(path) | {
        # Sequences are dealt to ranks by tokens, so DeepSpeed's idea of a batch is only a placeholder.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_norm,
        "bf16": {"enabled": dtype == "bf16"},
        "steps_per_print": 2**31,
        # The optimizer is torch's AdamW with offload, too: adapters are small.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@contextlib.contextmanager
def sharded_loading(path: str | Path, optim: OptimSettings, dtype: str) -> Iterator[None]:
    """Inside, transformers loads a model straight into ZeRO-3's shards: the first rank alone reads the files (mapped,
    weight by weight), and no rank holds the model as a whole. Other stages load as ever.
    """
    config = _complete_config(path, optim, dtype)
    if zero_stage(config) < 3:
        yield
        return
    told = HfDeepSpeedConfig(config)  # transformers keeps a weak reference only
    try:
        yield
    except ValidationError as error:
        raise _refused(path, error) from error
    finally:
        unset_hf_deepspeed_config()
        del told


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are whole on every rank."""
    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        yield


def build_engine(
    encoder: nn.Module, optim: OptimSettings, dtype: str, deepspeed_json: str | Path, ranks: Ranks
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine around the encoder with AdamW on what trains. The schedule's lr is set at every step."""
    config = _complete_config(deepspeed_json, optim, dtype)
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    assert trainable, "nothing to train: add_lora comes before build_engine"
    if dtype == "bf16":  # PEFT makes adapters in fp32, and DeepSpeed wants one type where weights came sharded
        for p in trainable:
            p.data = p.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(trainable, lr=optim.lr, weight_decay=optim.weight_decay)
    try:
        engine, *_ = deepspeed.initialize(model=encoder, model_parameters=trainable, optimizer=optimizer, config=config)
    except ValidationError as error:
        raise _refused(deepspeed_json, error) from error
    for buffer in encoder.buffers():  # DeepSpeed moves those of a model that came sharded as little as its weights
        buffer.data = buffer.data.to(ranks.device)
    if engine.zero_optimization_stage() == 0 and dtype == "bf16":
        # DeepSpeed's wrapper has taken a step on zero gradients by now: undo it, or Adam would count one step too many.
        for p in trainable:
            _master(engine, p).data.copy_(p.data)
        _torch_optimizer(engine).state.clear()
    return engine


Backward = Callable[[Tensor, Tensor, bool], None]


@contextlib.contextmanager
def one_reduction(engine: deepspeed.DeepSpeedEngine, ranks: Ranks, watch: Watch | None = None) -> Iterator[Backward]:
    """Gives `backward(embeddings_SD, gradient_SD, last)`; gradients are reduced over the ranks once, at the end.

    ZeRO 1-3 take a gradient for a non-scalar output. ZeRO 0 refuses that, so it gets the scalar whose gradient is the
    same, and reduces on the last chunk. bf16 gradients of many chunks are summed in fp32 (ZeRO 1-3) and rounded once.
    """
    if engine.zero_optimization_stage() == 0:
        yield functools.partial(_backward_zero0, engine)
        return
    backward: Backward = _backward_plain
    if engine.bfloat16_enabled():
        sums: dict[nn.Parameter, Tensor] = {}
        backward = functools.partial(
            _backward_fp32_sums, [p for p in engine.module.parameters() if p.requires_grad], sums
        )
    with engine.coalesce_grad_reduction():
        try:
            yield backward
        except StopRequested:
            raise  # on every rank at once
        except BaseException as error:
            if ranks.world_size == 1:
                raise
            # Leaving would reduce gradients with ranks that still compute, or are gone.
            end_alone(error, ranks, watch)


def _backward_plain(embeddings_SD: Tensor, gradient_SD: Tensor, last: bool) -> None:
    embeddings_SD.backward(gradient_SD)


def _backward_zero0(engine: deepspeed.DeepSpeedEngine, embeddings_SD: Tensor, gradient_SD: Tensor, last: bool) -> None:
    with contextlib.nullcontext() if last else engine.no_sync():
        engine.backward((embeddings_SD * gradient_SD).sum())


def _backward_fp32_sums(
    parameters: list[nn.Parameter],
    sums: dict[nn.Parameter, Tensor],
    embeddings_SD: Tensor,
    gradient_SD: Tensor,
    last: bool,
) -> None:
    embeddings_SD.backward(gradient_SD)
    if last and not sums:
        return
    for p in parameters:
        assert p.grad is not None, "every chunk reaches every trainable parameter"
        sums[p] = sums[p].add_(p.grad) if p in sums else p.grad.float()
        if last:
            # In place: under ZeRO-3 the parameter itself is a stub by now, and a new gradient would not fit its shape.
            p.grad.copy_(sums[p])
        else:
            p.grad = None


def take_step(engine: deepspeed.DeepSpeedEngine, lr: float) -> float:
    """One optimizer step at this learning rate; returns the global gradient norm before clipping."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    norm = None
    if engine.zero_optimization_stage() == 0:
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return float(norm if norm is not None else engine.get_global_grad_norm())


def discard_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Forget the gradient of this step: weights, moments and step count stay as they are."""
    engine.optimizer.zero_grad()
    engine.zero_grad()


def read_state(engine: deepspeed.DeepSpeedEngine, moments: bool = True) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint needs, whole and on CPU: name -> {"weight": fp32 master, "exp_avg": ..., "exp_avg_sq": ...};
    without `moments` the weights alone.

    Every rank must call this: under ZeRO the pieces come from all of them. All but the first get nothing back.
    """
    state: dict[str, dict[str, Tensor]] = {}
    keys = MOMENTS if moments else ()
    for name, p in trainable_parameters(engine.module).items():
        if engine.zero_optimization_stage() == 0:
            master = _master(engine, p)
            parts = {"weight": master.data} | {key: _torch_optimizer(engine).state[master][key] for key in keys}
        else:
            parts = {"weight": safe_get_full_fp32_param(p)}
            parts |= {key: safe_get_full_optimizer_state(p, key) for key in keys}
        if torch.distributed.get_rank() > 0:
            continue
        # A copy: safetensors refuses tensors that share memory, and ZeRO 1-2 give views of one flat buffer.
        state[name] = {key: value.detach().float().cpu().clone().reshape(_shape(p)) for key, value in parts.items()}
    return state


def write_state(
    engine: deepspeed.DeepSpeedEngine, state: dict[str, dict[str, Tensor]], num_steps: int, ranks: Ranks
) -> None:
    """Set weights, moments and step count, the same on every rank; the inverse of `read_state`.

    The optimizer's state must exist (take one step with any gradient first). DeepSpeed's setters reach the fp32
    master only: the copy that the forward pass reads is written here too, or the next step would use old weights.
    """
    stage = engine.zero_optimization_stage()
    for name, p in trainable_parameters(engine.module).items():
        parts = {key: value.to(ranks.device) for key, value in state[name].items()}
        if stage == 0:
            master = _master(engine, p)
            master.data.copy_(parts["weight"])
            for key in MOMENTS:
                _torch_optimizer(engine).state[master][key].copy_(parts[key])
        elif stage < 3:
            safe_set_full_fp32_param(p, parts["weight"])
            for key in MOMENTS:
                safe_set_full_optimizer_state(p, parts[key], key)
        else:
            # The `full` setters fail where the size is not divisible by the ranks; the local ones take a padded slice.
            safe_set_local_fp32_param(p, _local_slice(parts["weight"], ranks))
            for key in MOMENTS:
                safe_set_local_optimizer_state(p, _local_slice(parts[key], ranks), key)
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=stage == 3):
            if stage < 3 or ranks.is_first:
                p.data.copy_(parts["weight"])
    for slot in _torch_optimizer(engine).state.values():
        slot["step"] = torch.full_like(torch.as_tensor(slot["step"]), float(num_steps))


def _shape(p: nn.Parameter) -> torch.Size:
    return getattr(p, "ds_shape", p.shape)


def _torch_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _master(engine: deepspeed.DeepSpeedEngine, p: nn.Parameter) -> nn.Parameter:
    """ZeRO 0: the parameter itself in fp32; in bf16 the fp32 copy that DeepSpeed's wrapper keeps in the same order."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return p
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return next(m for low, high in pairs for q, m in zip(low, high, strict=True) if q is p)


def _local_slice(full: Tensor, ranks: Ranks) -> Tensor:
    """This rank's piece of the flat value, zero-padded to a multiple of the ranks: ZeRO-3's layout."""
    flat = full.flatten()
    per_rank = -(-flat.numel() // ranks.world_size)
    padded = flat.new_zeros(per_rank * ranks.world_size)
    padded[: flat.numel()] = flat
    return padded[ranks.rank * per_rank : (ranks.rank + 1) * per_rank].clone()
