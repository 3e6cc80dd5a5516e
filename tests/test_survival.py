"""Runs that are stopped, killed or broken: what they say, how they end, and that they go on to the same weights."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import REPOSITORY, launch, launch_ranks, require_success
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.preprocess import main as preprocess
from pipeline.runtime.checkpoint import find_checkpoint
from pipeline.runtime.guards import is_spike, require_alike, too_late
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.watch import LOST, NOT_FINITE, STOPPED, is_lost_peer
from pipeline.settings import load_settings

TRAIN = REPOSITORY / "pipeline" / "train.py"
FAULTY = Path(__file__).parent / "faulty_rank.py"
# Several chunks a step and dropout: what makes exact resume hard.
COMMON = ["model.lora.dropout=0.1", "optim.max_steps=6", "run.save_every=3", "run.chunk_tokens=300"]


@pytest.fixture(scope="module")
def recipe(tiny_training):
    assert preprocess(["--config", str(tiny_training), "--processes", "1"]) == 0
    return tiny_training


def run(recipe, out, *overrides, fault="", monkeypatch=None):
    arguments = ["--config", str(recipe), *COMMON, f"run.output_dir={out}", *overrides]
    if not fault:
        return launch(TRAIN, arguments, 2)
    monkeypatch.setenv("FAULT", fault)
    return launch(FAULTY, arguments, 2)


def read_metrics(out, name):
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


def errors(result):
    return [line for line in result.stderr.splitlines() if "error: " in line]


def said(attempt):
    """What a run told the script of its job."""
    return {path.name: path.read_text() for path in attempt.iterdir()}


def test_stopped_and_killed_runs_end_with_the_weights_of_an_undisturbed_one(recipe, tmp_path, monkeypatch):
    require_success(run(recipe, tmp_path / "whole"))
    out = tmp_path / "out"

    monkeypatch.setenv("BGE_ICL_ATTEMPT", str(tmp_path / "1"))
    stopped = run(recipe, out, fault="signal 1 2 SIGUSR1", monkeypatch=monkeypatch)
    assert stopped.returncode == STOPPED and "Traceback" not in stopped.stderr, stopped.stderr[-3000:]
    assert "stopped by SIGUSR1 on rank 1; 2 of 6 steps are done and saved" in stopped.stdout
    assert said(tmp_path / "1") == {"ready": "0\n", "end": "75 2 SIGUSR1 on rank 1\n"}
    assert find_checkpoint(out / "checkpoints").name == "step-000002"

    monkeypatch.setenv("BGE_ICL_ATTEMPT", str(tmp_path / "2"))
    killed = run(recipe, out, fault="kill_saving 0 3", monkeypatch=monkeypatch)
    assert killed.returncode not in (0, STOPPED)
    assert said(tmp_path / "2") == {"ready": "2\n"}, "who is killed says nothing"
    lost = "rank 1 lost another rank at saving after 3 steps; the first rank does not answer"
    assert any(lost in line for line in errors(killed)), killed.stderr[-3000:]
    assert find_checkpoint(out / "checkpoints").name == "step-000002"
    assert (out / "checkpoints" / ".partial-step-000003").is_dir(), "killed while writing"

    require_success(run(recipe, out))
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-000003", "step-000006"]
    for name in ("weights.safetensors", "moments.safetensors"):
        truth = load_file(tmp_path / "whole" / "checkpoints" / "step-000006" / name)
        found = load_file(out / "checkpoints" / "step-000006" / name)
        assert truth.keys() == found.keys() and len(truth) > 10
        for key, value in truth.items():
            assert torch.equal(found[key], value), key
    assert read_metrics(out, "loss") == read_metrics(tmp_path / "whole", "loss")


def test_a_rank_that_stands_still_ends_the_run_and_is_named(recipe, tmp_path, monkeypatch):
    result = run(recipe, tmp_path, fault="stall 1 2", monkeypatch=monkeypatch)
    assert result.returncode == LOST
    assert "rank 0 has stood at step 2, forward pass 1 over" in result.stderr
    assert "the others wait for rank 1, last seen at step 1, forward pass 5 over" in result.stderr
    assert "in run_faulty_step" in result.stderr, "the stack of the rank that stands still"


def test_nan_in_one_ranks_weights_names_the_rank_and_moves_no_weight(recipe, tmp_path, monkeypatch):
    stage1 = f"run.deepspeed={recipe.parent / 'zero1.json'}"
    result = run(recipe, tmp_path, stage1, fault="nan 1 2", monkeypatch=monkeypatch)
    assert result.returncode == NOT_FINITE
    assert result.stdout.count("not finite: the embeddings of rank 1; no rank takes this step") == 2
    assert any("not finite: the embeddings of rank 1; 3 steps in a row" in line for line in errors(result))
    assert read_metrics(tmp_path, "skipped") == [False, False, True, True]
    assert find_checkpoint(tmp_path / "checkpoints").name == "step-000003"


def test_a_rank_started_with_another_recipe_is_named(recipe, tmp_path, monkeypatch):
    result = run(recipe, tmp_path / "out", fault="odd 1 0 batch.queries=24", monkeypatch=monkeypatch)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "rank 1 on" in errors(result)[0]
    assert "setting batch.queries 24 where the other ranks have 12; start every rank with the same" in errors(result)[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_rank_killed_inside_a_step_is_noticed_by_the_others(stage, recipe, tmp_path, monkeypatch):
    """Without a launcher, which would answer for the run."""
    monkeypatch.setenv("FAULT", "kill 1 2")
    sharding = f"run.deepspeed={recipe.parent / f'zero{stage}.json'}"
    arguments = ["--config", str(recipe), *COMMON, f"run.output_dir={tmp_path / 'out'}", sharding]
    first, second = launch_ranks(FAULTY, arguments, 2)
    _, said = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (LOST, -signal.SIGKILL), said[-3000:]
    assert "error: rank 0 lost another rank at step 2, forward pass" in said and "Traceback" not in said
    seen = ("the others wait for rank 1, last seen at step 2, forward pass", "no rank is behind the others")
    assert any(words in said for words in seen), "which of the two is a matter of moments"


def test_a_first_rank_that_answers_nothing_ends_the_others(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "freeze 0 2")
    arguments = ["--config", str(recipe), *COMMON, f"run.output_dir={tmp_path / 'out'}"]
    first, second = launch_ranks(FAULTY, arguments, 2)
    try:
        _, said = second.communicate(timeout=120)
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == LOST
    assert "error: rank 1 has stood at step 2, forward pass 1 over" in said
    assert "the first rank does not answer: it has ended or stands still" in said


def test_a_rank_that_fails_alone_between_two_passes_ends_the_run_with_its_traceback(recipe, tmp_path, monkeypatch):
    """Under ZeRO-3 the others wait for it inside a collective call."""
    result = run(recipe, tmp_path / "out", fault="raise 1 2", monkeypatch=monkeypatch)
    assert result.returncode not in (0, STOPPED)
    assert "RuntimeError: this rank alone failed" in result.stderr and "in encode_faulty" in result.stderr
    assert len(read_metrics(tmp_path / "out", "step")) == 2


def test_a_rank_that_finds_another_store_or_tokenizer_is_named(recipe, tmp_path, monkeypatch):
    settings = load_settings(recipe)
    store = tmp_path / "store"
    shorter = [f"data.store={store}", "preprocess.max_passage_tokens=50"]
    assert preprocess(["--config", str(recipe), "--processes", "1", *shorter]) == 0
    result = run(recipe, tmp_path / "out", fault=f"store 1 0 {store}", monkeypatch=monkeypatch)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "rank 1 on" in errors(result)[0] and "token store" in errors(result)[0]

    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer_name)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    fault = f"tokenizer 1 0 {tmp_path / 'tokenizer'}"
    result = run(recipe, tmp_path / "out", fault=fault, monkeypatch=monkeypatch)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "rank 1 on" in errors(result)[0] and "tokenizer" in errors(result)[0]
    assert "token store" not in errors(result)[0]


def test_a_full_disk_leaves_the_last_checkpoint_usable(recipe, tmp_path, monkeypatch):
    result = run(recipe, tmp_path, fault="full 0 6", monkeypatch=monkeypatch)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    error = errors(result)[0]
    assert "checkpoints/step-000006 cannot be written (" in error and "File too large" in error
    assert f"the last complete one is {tmp_path / 'checkpoints' / 'step-000003'}; the same command goes on" in error
    assert find_checkpoint(tmp_path / "checkpoints").name == "step-000003"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"], "room for the next try"


def alike_worker(rank, port, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    ranks = Ranks(rank, 3, rank, torch.device("cpu"))
    said = []
    for facts in ({"store": "a"}, {"store": "b" if rank == 1 else "a"}, {"code": "x", "plan": str(rank // 2)}):
        try:
            require_alike(facts, ranks)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def test_the_odd_rank_of_three_is_named_on_all_ranks(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(alike_worker, (port, tmp_path), nprocs=3)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert said[0] == said[1] == said[2]
    assert said[0][0] == ""
    assert said[0][1].startswith("rank 1 on ") and ": store b where the other ranks have a; start" in said[0][1]
    assert said[0][2].startswith("rank 2 on ") and ": plan 1 where the other ranks have 0; start" in said[0][2]


def test_what_counts_as_a_lost_rank():
    ranks = Ranks(0, 2, 0, torch.device("cpu"))
    lost = ("[gloo] Connection closed by peer [127.0.0.1]", "NCCL error: remote process exited or there was a network")
    assert all(is_lost_peer(RuntimeError(text), ranks) for text in lost)
    own = ("CUDA out of memory", "NCCL error: Cuda failure 'out of memory'", "CUDA error: the launch timed out")
    assert not any(is_lost_peer(RuntimeError(text), ranks) for text in own)
    assert not is_lost_peer(torch.distributed.DistBackendError("NCCL error: unhandled cuda error"), ranks)
    assert is_lost_peer(torch.distributed.DistNetworkError("the store does not answer"), ranks)
    assert not is_lost_peer(RuntimeError(lost[0]), Ranks(0, 1, 0, torch.device("cpu"))), "nobody else is there"


def test_time_left_in_the_job_is_known(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert not too_late([100.0], 10.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert not too_late([], 0.0) and not too_late([10.0, 20.0], 5.0)
    assert "the job ends in" in too_late([10.0, 50.0], 5.0)


def test_a_spike_is_measured_against_the_datasets_own_last_losses():
    losses: list[float] = []
    assert not any(is_spike(losses, loss) for loss in (9.0, *[1.0] * 12))
    assert is_spike(losses, 3.5) and not is_spike(losses, 2.5)
    assert not is_spike(losses, float("nan")) and len(losses) <= 20


LEAVING = """
import atexit, logging, sys, threading
from pipeline.runtime.watch import leave
if sys.argv[1] == "mpi":
    sys.modules["mpi4py.MPI"] = None
atexit.register(lambda: print("closed"))
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("whole")
try:
    leave(7)
finally:
    print("the usual way")
"""


@pytest.mark.parametrize(("how", "shown"), [("", "whole\nclosed\n"), ("mpi", "whole\nthe usual way\nclosed\n")])
def test_a_process_leaves_with_its_code_and_with_all_that_was_to_be_done(how, shown):
    found = subprocess.run([sys.executable, "-c", LEAVING, how], capture_output=True, text=True, cwd=REPOSITORY)
    assert (found.returncode, found.stdout) == (7, shown), found.stderr
