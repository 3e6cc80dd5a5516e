"""This project's training steps on a peer's task, measured: plan, pack, both passes, optimizer; one process.

python benchmarks/peer_ours.py OUT RECIPE STEPS [key.sub=value ...]
"""

import contextlib
import sys

from metering import moment, reset_peak, write_record

from pipeline.data.composing import Limits
from pipeline.data.sampling import plan_step
from pipeline.runtime.engine import start_distributed, stop_distributed, take_step
from pipeline.runtime.ranks import read_ranks
from pipeline.runtime.step import prepare_step, run_step
from pipeline.runtime.watch import start_watch
from pipeline.settings import load_settings
from pipeline.training.run import set_up
from pipeline.training.steps import learning_rate

PACKAGES = ("deepspeed", "torch", "transformers", "peft")


def main(out: str, recipe: str, steps: int, overrides: list[str]) -> None:
    settings = load_settings(recipe, [*overrides, f"optim.max_steps={steps}"])
    ranks = read_ranks()
    start_distributed(ranks)
    run = set_up(settings, ranks, start_watch(ranks, settings.run.max_stall_seconds), contextlib.ExitStack())
    limits = Limits.from_settings(settings.preprocess)
    losses: list[float] = []
    tokens: list[tuple[int, int]] = []
    start_mib = reset_peak()
    moments = [moment()]
    for step in range(steps):
        plan = plan_step(run.store, run.schedule, step)
        inputs = prepare_step(run.store, limits, plan, ranks, settings.run.chunk_tokens, settings.loss.mask_shown)
        result = run_step(run.engine, inputs, settings, ranks, run.watch)
        take_step(run.engine, learning_rate(settings.optim, step, steps))
        losses.append(result.loss)
        tokens.append((inputs.num_tokens, sum(len(chunk.input_ids_T) for chunk in inputs.chunks)))
        moments.append(moment())
    write_record(out, start_mib, moments, losses, tokens, PACKAGES)
    stop_distributed()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
