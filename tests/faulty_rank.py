"""pipeline/train.py with a fault in one rank, told by the variable FAULT: `KIND RANK STEP [argument]`.

signal 1 2 SIGUSR1   rank 1 sends itself the signal in step 2, between two chunks
evaluating 1 4       rank 1 sends itself SIGUSR1 in the evaluation after 4 steps
stall 1 2            rank 1 sleeps at the beginning of step 2
freeze 0 2           rank 0 stops as a whole there (SIGSTOP): not even its threads answer
kill 1 2             rank 1 is killed in step 2, between two chunks
nan 1 2              rank 1's trained weights are NaN from step 2 on
raise 1 2            rank 1 fails in step 2 where chunks are encoded for the second time
odd 1 0 batch.x=3    rank 1 is started with another setting
store 1 0 FOLDER     rank 1 finds another store where the recipe says there is one
tokenizer 1 0 FOLDER rank 1 finds another tokenizer
kill_saving 0 3      rank 0 is killed while it writes the checkpoint of step 3
full 0 6             rank 0 finds the disk full when it writes the checkpoint of step 6
"""

import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

from pipeline import train
from pipeline.runtime import checkpoint, step
from pipeline.training import evaluating, run, steps

kind, rank, at, *rest = os.environ["FAULT"].split()
here = os.environ.get("RANK", "0") == rank
encode_chunk, save_checkpoint, sync = step.encode_chunk, checkpoint.save_checkpoint, checkpoint.sync
pass_boundary, run_step, num_encoded, num_chunks, current = evaluating.pass_boundary, run.run_step, 0, 0, -1
open_store, verify_shards, file_sha256, load_tokenizer = (
    run.open_store,
    run.verify_shards,
    run.file_sha256,
    run.load_tokenizer,
)


def run_faulty_step(engine, inputs, settings, ranks, watch):
    global current, num_encoded, num_chunks
    current, num_encoded, num_chunks = inputs.plan.step, 0, inputs.num_chunks
    if kind in ("stall", "freeze") and current == int(at):
        watch.max_stall_seconds = 4  # on all ranks: their start may take longer than a test should wait
        if here and kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif here:
            time.sleep(600)
    if kind == "nan" and here and current == int(at):
        for p in engine.parameters():
            if p.requires_grad:
                p.data.fill_(math.nan)
    return run_step(engine, inputs, settings, ranks, watch)


def encode_faulty(*arguments):
    global num_encoded
    num_encoded += 1
    if kind == "signal" and current == int(at) and num_encoded == 2:
        os.kill(os.getpid(), getattr(signal, rest[0]))
    if kind == "kill" and current == int(at) and num_encoded == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise" and current == int(at) and num_encoded == num_chunks + 1:
        raise RuntimeError("this rank alone failed")
    return encode_chunk(*arguments)


def pass_faulty(watch, place):
    if kind == "evaluating" and place == f"an evaluation after {at} steps":
        watch.asked = "SIGUSR1 on this rank"
    return pass_boundary(watch, place)


def save_faulty(folder, state, *arguments):
    if state.step == int(at):
        if kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        if kind == "kill_saving":
            checkpoint.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    return save_checkpoint(folder, state, *arguments)


if __name__ == "__main__":
    run.run_step = run_faulty_step
    if here:
        step.encode_chunk, steps.save_checkpoint = encode_faulty, save_faulty
        evaluating.pass_boundary = pass_faulty
        if kind == "odd":
            sys.argv += rest
        if kind == "store":
            run.open_store = lambda path, **options: open_store(rest[0], **options)
            run.verify_shards = lambda path, *place: verify_shards(rest[0], *place)
            run.file_sha256 = lambda path: file_sha256(Path(rest[0]) / path.name)
        if kind == "tokenizer":
            run.load_tokenizer = lambda name, template: load_tokenizer(rest[0], template)
    raise SystemExit(train.main())
