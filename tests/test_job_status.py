"""`bge-icl status`: folders as runs leave them, half-written and damaged ones, and folders that are being written."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from launching import REPOSITORY, environment, require_success
from tiny_run import make_tiny_run

from pipeline.cluster.job_states import QueuedJob, ask_slurm, read_scontrol, read_squeue
from pipeline.cluster.rank_logs import Places, first_errors, logs_of, merged_lines, new_lines, rest_of
from pipeline.cluster.run_folder import (
    Attempt,
    Checkpoint,
    Progress,
    holds_embedder,
    is_trained,
    read_attempts,
    read_progress,
    submitted_jobs,
)
from pipeline.cluster.status import describe, find_state, read_status, spoken
from pipeline.job_status import follow, main


def step_line(step: int, **changes: Any) -> str:
    values = {"step": step, "total_steps": 100, "epoch": 0, "dataset": "nq", "loss": 2.0, "seconds": 4.0}
    values |= {"chunks": 2, "queries_per_second": 128.0, "tokens_per_second": 50_000.0}
    return json.dumps(values | changes) + "\n"


def make_attempt(run: Path, name: str, started: float = 0.0, **files: str) -> Path:
    """An attempt's folder; keywords are its files."""
    folder = run / "attempts" / name
    folder.mkdir(parents=True)
    for file, text in ({"before": "0\n", "nodes": "node1\nnode2\n"} | files).items():
        (folder / file.replace("rank_", "rank-").replace("_txt", ".txt").replace("_log", ".log")).write_text(text)
    moment = started or time.time()
    os.utime(folder / "before", (moment, moment))
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, on a machine without SLURM."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    return folder


def status_of(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([str(run), *arguments]) == 0
    return capsys.readouterr().out


# What a run's files tell.


def test_progress_is_of_the_last_steps(run: Path) -> None:
    lines = [step_line(0, seconds=300.0, loss=9.0)] + [step_line(step, loss=float(step)) for step in range(1, 30)]
    (run / "metrics.jsonl").write_text("".join(lines) + step_line(30)[:40])
    progress = read_progress(run / "metrics.jsonl")
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.counted, progress.damaged_lines) == (30, 100, 20, 0)
    assert (progress.loss, progress.mean_loss) == (29.0, sum(range(10, 30)) / 20)
    assert (progress.step_seconds, progress.seconds_left) == (4.0, 280.0)
    text = describe(read_status(run))
    assert "30 of 100 (30.0%)" in text and "4.00 s a step, 128.0 queries/s, 50,000 tokens/s" in text
    assert "4m40s of steps, until about" in text


def test_damaged_lines_are_counted_and_said(run: Path) -> None:
    bad = ["{\n", "[]\n", "null\n", '{"step": "7"}\n', "\xff\n", "\n", '{"step": 1, "total_steps": 2}\n']
    (run / "metrics.jsonl").write_text(step_line(0, loss=None) + "".join(bad), encoding="latin-1")
    progress = read_progress(run / "metrics.jsonl")
    assert progress is not None and (progress.step, progress.loss, progress.mean_loss) == (1, None, None)
    assert progress.damaged_lines == len(bad)
    text = describe(read_status(run))
    assert f"{len(bad)} lines of metrics.jsonl cannot be read" in text and "loss       not finite, nq" in text


@pytest.mark.parametrize("text", ["", "\n", '{"step": 0', "garbage"])
def test_no_step_is_done_yet(run: Path, text: str) -> None:
    (run / "metrics.jsonl").write_text(text)
    assert read_progress(run / "metrics.jsonl") is None
    assert "none done yet" in describe(read_status(run))


def test_a_long_log_is_read_from_its_end(run: Path) -> None:
    (run / "metrics.jsonl").write_text("".join(step_line(step, total_steps=9999) for step in range(5000)))
    progress = read_progress(run / "metrics.jsonl")
    assert progress is not None and (progress.step, progress.damaged_lines) == (5000, 0)


def test_attempts_in_the_order_of_their_starts(run: Path) -> None:
    make_attempt(run, "900.0", 1000.0, verdict="requeued: SIGUSR1 on rank 0; 4 steps are saved\n", end="75 4 stop\n")
    make_attempt(run, "900.1", 2000.0, before="4\n", end="2 - data.store: damaged\n", verdict="failed: half a li")
    make_attempt(run, "7.0", 3000.0, before="", env_txt="SLURM_JOB_NAME=x-preprocess\n", nodes="")
    make_attempt(run, "8_1.0", 4000.0, preflight_txt="check of the nodes for evaluate: 1 tasks on 1 nodes\n")
    (run / "attempts/900.1.tmp").mkdir()
    (run / "attempts/x-train-900.log").write_text("")
    first, second, third, fourth = read_attempts(run)
    assert [a.name for a in (first, second, third, fourth)] == ["900.0", "900.1", "7.0", "8_1.0"]
    assert (first.code, first.steps, first.reason, first.before, first.nodes) == (75, 4, "stop", 0, ("node1", "node2"))
    assert not first.is_final and first.verdict.startswith("requeued")
    assert (second.code, second.steps, second.verdict, second.before) == (2, None, "", 4), "half a verdict is none yet"
    assert (third.stage, third.before, third.nodes) == ("preprocess", None, ())
    assert (fourth.stage, fourth.job) == ("evaluate", "8_1")
    text = describe(read_status(run))
    assert "attempts   4; restarts of training: 1" in text
    assert "on 2 node(s), steps 0 to 4: requeued: SIGUSR1 on rank 0" in text
    assert "steps 4: exit code 2: data.store: damaged" in text


def test_the_newest_complete_checkpoint(run: Path) -> None:
    for name in ("step-000008", "step-000010", ".partial-step-000012", "step-1x", "step-9"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints/step-000010/state.json").write_text("{}")
    os.utime(run / "checkpoints/step-000010/state.json", (1000, 1000))
    (run / "metrics.jsonl").write_text(step_line(13))
    status = read_status(run)
    assert status.checkpoint == Checkpoint("step-000010", 10, 1000.0)
    assert "step-000010, 4 steps ago" in describe(status)


def test_scores_are_shown_once_they_are_whole(run: Path) -> None:
    scores = [
        {"model": "after", "mode": mode, "task": task, "metric": "ndcg", "value": value}
        for mode, task, value in (("few_shot", "a", 0.5), ("few_shot", "b", 0.7), ("zero_shot", "a", 0.4))
    ]
    (run / "scores.json").write_text(json.dumps(scores)[:-9])
    assert read_status(run).scores == {}
    (run / "scores.json").write_text(json.dumps(scores))
    text = describe(read_status(run))
    assert "means over 2 task(s): after few_shot 0.6000, after zero_shot 0.4000" in text


def test_submitted_jobs(run: Path) -> None:
    for name, text in (("1-a", '{"jobs": {"train": "12", "evaluate": 13}}'), ("2-b", '{"jobs": '), ("3-c", "[]")):
        (run / "jobs" / name).mkdir(parents=True)
        (run / "jobs" / name / "submitted.json").write_text(text)
    (run / "jobs/4-dry").mkdir()
    assert submitted_jobs(run) == ["12", "13"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["/nowhere/run"], "/nowhere/run: no such folder"),
        (["."], "is not a run's folder"),
        ([], "name a run's folder"),
        (["--where"], "--where and --config RECIPE belong together"),
        (["--config", "x.yaml"], "--where and --config RECIPE belong together"),
        (["--where", "--config", "x.yaml"], "--config x.yaml: no such file"),
        (["--where", "--config", "x.yaml", "--json"], "leave out --logs, --follow, --json"),
        (["run", "a=b"], "'a=b' goes with --where"),
        (["run", "--json", "--logs"], "--json is the status"),
        (["run", "--attempt", "1.0"], "--attempt 1.0 goes with --logs"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1


def test_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = REPOSITORY / "examples/quickstart/recipe.yaml"
    assert main(["--where", "--config", str(recipe)]) == 0
    assert capsys.readouterr().out == f"{REPOSITORY}/runs/quickstart\n"
    changes = ["optim.lr=1e-3", f"run.output_dir={tmp_path}/a b"]
    assert main(["--where", "--config", str(recipe), *changes]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a b\n"


def test_it_starts_at_once() -> None:
    """Without the libraries that take seconds; `--where` needs numpy."""
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'deepspeed', 'mpi4py'} & set(sys.modules)"
    code = f"import sys, pipeline.job_status; assert not {heavy} | ({{'numpy', 'yaml'}} & set(sys.modules))"
    code += "; pipeline.job_status.main(['--where', '--config', 'examples/quickstart/recipe.yaml'])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert not {heavy}"], cwd=REPOSITORY, env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


# Whether a run goes on.


def progress_at(step: int) -> Progress:
    return Progress(step, 100, 0, "nq", 1.0, 1.0, 30.0, 1.0, 1.0, 20, 1.0, 0)


def attempt_with(verdict: str) -> Attempt:
    return Attempt("5.0", "train", 0.0, (), 1, 0, None, None, "", verdict)


@pytest.mark.parametrize(
    ("step", "verdict", "states", "silent", "has_model", "expected"),
    [
        (50, "", ["COMPLETED", "RUNNING"], 9000.0, False, "running"),
        (50, "requeued: x", ["PENDING"], 5.0, False, "waiting"),
        (50, "failed: x", ["FAILED"], 5.0, False, "ended"),
        (100, "done: 100 steps", ["COMPLETED"], 5.0, True, "done"),
        (100, "done: 100 steps", ["COMPLETED", "RUNNING"], 5.0, True, "running"),  # its evaluation
        (50, "", ["COMPLETED"], 5.0, False, "ended"),  # killed with its script
        (50, "", ["PREEMPTED"], 5.0, False, "ended"),  # and not requeued: it would be PENDING
        (50, "", ["REVOKED"], 5.0, False, "waiting"),  # another cluster of a federation has it
        (50, "", ["gone"], 5.0, False, "running"),  # another cluster's job
        (50, "", [], 9000.0, False, "silent"),
        (50, "", [], 250.0, False, "running"),
        (50, "", [], 599.0, False, "running"),
        (50, "requeued: x", [], 30.0, False, "running"),
        (50, "stopped: x", [], 30.0, False, "ended"),
        (0, "", [], None, False, "not started"),
        (0, "", ["CANCELLED"], None, False, "ended"),
    ],
)
def test_the_state_in_a_word(
    step: int, verdict: str, states: list[str], silent: float | None, has_model: bool, expected: str
) -> None:
    jobs = [QueuedJob(str(i), "x", state, "") for i, state in enumerate(states)]
    attempts = [attempt_with(verdict)] if silent is not None else []
    assert find_state(progress_at(step) if step else None, attempts, jobs, silent, has_model) == expected


def test_a_trained_run_whose_evaluation_failed_is_not_done() -> None:
    def attempt(name: str, stage: str, verdict: str) -> Attempt:
        return Attempt(name, stage, 0.0, (), 1, 0, None, None, "", verdict)

    trained = attempt("5.0", "train", "done: 4 steps")
    failed, done = attempt("6_0.0", "evaluate", "failed: see"), attempt("6_1.0", "evaluate", "done")
    again = attempt("6_0.1", "evaluate", "done")
    for attempts, expected in (((trained, failed, done), "ended"), ((trained, failed, done, again), "done")):
        assert find_state(progress_at(100), attempts, [], 1.0, True) == expected


@pytest.mark.parametrize("name", ["embedder.json", "reranker.json"])
def test_a_finished_model_of_either_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    assert not is_trained(tmp_path)
    (tmp_path / "model" / name).touch()
    assert is_trained(tmp_path) and holds_embedder(tmp_path) == (name == "embedder.json")


# Two lines of SLURM 22.05, as it writes them.
SQUEUE = """\
412|run-train|RUNNING|5:02:11|1-00:00:00|2|node[1-2]
413_0|run-evaluate|PENDING|0:00|4:00:00|1|(Dependency)
413_1|run-evaluate|PENDING|0:00|4:00:00|1|(Dependency)
"""
SCONTROL = (
    "JobId=411 JobName=run-preprocess UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=1 Nice=0 Account=(null) "
    "QOS=(null) JobState=COMPLETED Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 RunTime=00:00:07 StartTime=2026-01-01T10:00:00 EndTime=2026-01-01T10:00:07 Comment=a JobState=x \n"
)


def test_jobs_as_slurm_tells_them() -> None:
    train, first, second = read_squeue(SQUEUE)
    assert train == QueuedJob("412", "run-train", "RUNNING", "for 5:02:11 of 1-00:00:00 on 2 nodes: node[1-2]")
    assert first.id == "413_0" and first.detail == "Dependency, 1 nodes, time limit 4:00:00" and second.id == "413_1"
    ended = read_scontrol(SCONTROL)
    assert ended == (QueuedJob("411", "run-preprocess", "COMPLETED", "exit code 0:0, ended 2026-01-01 10:00:07"),)
    assert read_scontrol("JobId=9 ArrayJobId=8 ArrayTaskId=3 JobName=e JobState=FAILED\n")[0].id == "8_3"


def write_command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_is_asked_where_it_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_attempt(run, "412.0", rank_0_log="10:00:00 I step\n")
    (run / "metrics.jsonl").write_text(step_line(3))
    assert ask_slurm(["411", "412"]) == ((), "no squeue on the PATH")
    assert "no squeue on the PATH: judged by its files" in status_of(run, capsys)
    write_command(tmp_path / "bin", "squeue", f"case \"$*\" in *--jobs=412*) printf '%s' '{SQUEUE}' ;; esac")
    write_command(tmp_path / "bin", "scontrol", f"[ \"$4\" = 411 ] && printf '%s' '{SCONTROL}'")
    jobs, fault = ask_slurm(["412", "413_0", "411", "410"])
    assert fault == "" and [job.id for job in jobs] == ["410", "411", "412", "413_0", "413_1"]
    assert [job.state for job in jobs[:3]] == ["gone", "COMPLETED", "RUNNING"]
    text = status_of(run, capsys)
    assert "state      running, last written 0s ago\n" in text and "for 5:02:11 of 1-00:00:00 on 2 nodes" in text
    write_command(
        tmp_path / "bin", "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    assert ask_slurm(["412"])[1] == "squeue: slurm_load_jobs error: Unable to contact slurm controller"
    write_command(tmp_path / "bin", "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert [job.state for job in ask_slurm(["412"])[0]] == ["gone"]


def test_scontrol_is_asked_for_the_newest_ended_jobs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, asked = tmp_path / "bin", tmp_path / "asked"
    monkeypatch.setenv("PATH", str(tools))
    write_command(tools, "squeue", f"printf '%s' '{SQUEUE}'")
    write_command(tools, "scontrol", f'echo "$4" >>{asked}; echo "JobId=$4 JobName=x JobState=COMPLETED"')
    jobs, _ = ask_slurm([*map(str, range(401, 412)), "412", "413"])
    assert asked.read_text().split() == ["409", "410", "411"]
    states = {job.id: job.state for job in jobs}
    assert {states[str(job)] for job in range(401, 409)} == {"gone"}
    assert [states[job] for job in ("409", "411", "412", "413_0")] == ["COMPLETED", "COMPLETED", "RUNNING", "PENDING"]


def test_json_has_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_attempt(run, "1.0")
    make_attempt(run, "1.1", time.time() + 1)
    (run / "metrics.jsonl").write_text(step_line(3))
    found = json.loads(status_of(run, capsys, "--json"))
    assert (found["state"], found["progress"]["step"], found["restarts"]) == ("running", 4, 1)
    assert [attempt["name"] for attempt in found["attempts"]] == ["1.0", "1.1"] and found["checkpoint"] is None


def test_durations_are_readable() -> None:
    assert [spoken(s) for s in (0, 59.6, 200, 3900, 183600)] == ["0s", "1m00s", "3m20s", "1h05m", "2d03h"]


# Logs.


def write_log(folder: Path, rank: int, clock: str, text: str) -> Path:
    """A rank's log, last written at this time of the second of January 2026."""
    path = folder / f"rank-{rank}.log"
    path.write_text(text)
    moment = time.mktime(time.strptime(f"2026-01-02 {clock}", "%Y-%m-%d %H:%M:%S"))
    os.utime(path, (moment, moment))
    return path


def test_logs_of_all_ranks_by_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_attempt(run, "1.0", verdict="requeued: rank 1 lost\n")
    write_log(
        folder, 0, "00:00:09", "loading\n23:59:58 I step 1\n00:00:01 I step 2\n00:00:05 I step 3\nRuntimeError: x\n"
    )
    trace = "[rank 1] 00:00:02 W slow\nTraceback\n  at\nValueError: boom\n"
    write_log(folder, 1, "00:00:07", trace)
    write_log(folder, 10, "00:00:03", "error: rank 10 lost another rank\rerror: again")
    write_log(folder, 2, "23:00:00", "")
    lines = status_of(run, capsys, "--logs").splitlines()
    assert lines[:10] == [
        "[rank 0] loading",
        "[rank 0] 23:59:58 I step 1",
        "[rank 0] 00:00:01 I step 2",
        "[rank 1] 00:00:02 W slow",
        "[rank 10] error: again",
        "[rank 0] 00:00:05 I step 3",
        "[rank 1] Traceback",
        "[rank 1]   at",
        "[rank 1] ValueError: boom",
        "[rank 0] RuntimeError: x",
    ]
    assert lines[10:] == [
        "--- attempt 1.0, 4 logs: requeued: rank 1 lost; first errors:",
        "rank-0.log:5: RuntimeError: x",
        "rank-1.log:4: ValueError: boom",
        "rank-10.log:1: error: again",
    ]


def test_logs_of_another_attempt_and_of_stages_without_ranks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_attempt(run, "1.0", 1000.0, env_txt="SLURM_JOB_NAME=run-preprocess\n")
    (run / "attempts/run-preprocess-1.log").write_text("rows\n")
    make_attempt(run, "2_1.0", 2000.0, preflight_txt="check of the nodes for evaluate: 1 tasks on 1 nodes\n")
    (run / "attempts/run-evaluate-2-1.log").write_text("scores\n")
    (run / "attempts/run-evaluate-2-11.log").write_text("others\n")
    make_attempt(run, "3.0", 3000.0)  # waits for its nodes' check: no log yet
    assert status_of(run, capsys, "--logs").startswith("[job 2_1] scores\n--- attempt 2_1.0, 1 logs: no end yet\n")
    assert status_of(run, capsys, "--logs", "--attempt", "1.0").startswith("[job 1] rows\n")
    assert main([str(run), "--logs", "--attempt", "3.0"]) == 2
    assert "--attempt 3.0: no such attempt with logs; there are: 1.0, 2_1.0" in capsys.readouterr().err
    assert main([str(run.parent / "run"), "--logs", "--attempt", "9.9"]) == 2


def test_a_run_without_logs_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text(step_line(3))
    assert main([str(run), "--logs"]) == 2
    assert "has no logs" in capsys.readouterr().err


def test_the_end_of_a_long_log(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.rank_logs.MAX_LOG_BYTES", 100)
    folder = make_attempt(run, "1.0", rank_0_log="".join(f"line {i:05d}\n" for i in range(100)))
    logs = logs_of(run, read_attempts(run)[0])
    lines = list(merged_lines(logs))
    assert lines[0] == f"[rank 0] (1,001 bytes before this: {folder}/rank-0.log)" and lines[1] == "[rank 0] line 00091"
    assert len(lines) == 10 and first_errors(logs) == []


def test_lines_that_are_new(run: Path) -> None:
    folder = make_attempt(run, "1.0", rank_0_log="".join(f"{i}\n" for i in range(12)) + "ha")
    attempt = read_attempts(run)[0]
    lines, places = new_lines(logs_of(run, attempt), Places())
    assert lines[0].startswith("[rank 0] (more before this") and lines[1:] == [f"[rank 0] {i}" for i in range(2, 12)]
    with (folder / "rank-0.log").open("a") as log:
        log.write("lf\n")
    (folder / "rank-1.log").write_text("[rank 1] 10:00:00 W new\n")
    lines, places = new_lines(logs_of(run, attempt), places)
    assert lines == ["[rank 0] half", "[rank 1] 10:00:00 W new"]
    assert new_lines(logs_of(run, attempt), places)[0] == []
    (folder / "rank-1.log").write_text("anew\nhal")
    lines, places = new_lines(logs_of(run, attempt), places)
    assert lines == ["[rank 1] (rank-1.log was begun anew)", "[rank 1] anew"] and rest_of(places) == ["[rank 1] hal"]


def start(run: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own, on a machine without SLURM."""
    return subprocess.Popen(
        [sys.executable, "-u", "pipeline/job_status.py", str(run), *arguments],
        cwd=REPOSITORY,
        env=environment() | {"PATH": str(run.parent / "bin")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    """The lines up to the one that has `wanted`; fails where the output ends before, or after 30 s."""
    timer = threading.Timer(30, process.kill)
    timer.start()
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if wanted in line:
                return lines
    finally:
        timer.cancel()
    raise AssertionError(f"no {wanted!r} in {lines}")


def test_following_a_run_to_its_end(run: Path) -> None:
    first = make_attempt(run, "1.0", time.time() - 60, rank_0_log="one\n")
    process = start(run, "--follow")
    try:
        assert read_until(process, "one") == ["--- attempt 1.0 (train)", "[rank 0] one"]
        with (first / "rank-0.log").open("a") as log:
            log.write("two\nthr")
        read_until(process, "[rank 0] two")
        (first / "verdict").write_text("requeued: SIGUSR1\n")
        second = make_attempt(run, "1.1", rank_0_log="three\n")
        assert read_until(process, "[rank 0] three") == ["[rank 0] thr", "--- attempt 1.1 (train)", "[rank 0] three"]
        (second / "rank-3.log").write_text("error: last wo")
        (second / "verdict").write_text("failed: last words\n")
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 0 and errors == ""
        lines = output.splitlines()
        assert lines[0] == "[rank 3] error: last wo" and "state      ended: train: failed: last words" in lines
    finally:
        process.kill()
        process.communicate()


def test_following_waits_for_jobs_in_the_queue(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.job_status.ASK_SECONDS", 0.05)
    monkeypatch.setattr("pipeline.job_status.POLL_SECONDS", 0.01)
    (run / "jobs/1-a").mkdir(parents=True)
    (run / "jobs/1-a/submitted.json").write_text('{"jobs": {"train": "5"}}')
    queue = tmp_path / "queue"
    queue.write_text("5|run-train|PENDING|0:00|1:00:00|2|(Priority)\n")
    write_command(tmp_path / "bin", "squeue", f'while read -r line; do echo "$line"; done <{queue}')
    follower = threading.Thread(target=follow, args=(run,), daemon=True)
    lines: list[str] = []
    # Not by capsys: what a thread prints while it is emptied is lost.
    monkeypatch.setattr("pipeline.job_status.print_all", lambda some: lines.extend("\n".join(some).splitlines()))

    def until(line: str) -> None:
        end = time.monotonic() + 30
        while line not in lines:
            assert follower.is_alive() and time.monotonic() < end, lines
            time.sleep(0.01)

    follower.start()
    until("--- waiting: 5 PENDING: Priority, 2 nodes, time limit 1:00:00")
    folder = make_attempt(run, "5.0", rank_0_log="one\n")
    queue.write_text("5|run-train|RUNNING|0:01|1:00:00|2|node[1-2]\n")
    until("[rank 0] one")
    queue.write_text("5|run-train|PENDING|0:00|1:00:00|2|(BeginTime)\n")
    (folder / "verdict").write_text("requeued: SIGUSR1 on rank 0\n")
    until("--- waiting: 5 PENDING: BeginTime, 2 nodes, time limit 1:00:00")
    queue.write_text("")  # cancelled while it waits, and forgotten
    os.utime(run / "checkpoints", (1, 1))
    for path in (*folder.iterdir(), folder):
        os.utime(path, (1, 1))
    follower.join(30)
    assert not follower.is_alive()
    assert lines[:4] == [
        "--- waiting: 5 PENDING: Priority, 2 nodes, time limit 1:00:00",
        "--- attempt 5.0 (train)",
        "[rank 0] one",
        "--- waiting: 5 PENDING: BeginTime, 2 nodes, time limit 1:00:00",
    ]
    assert "it has ended without a word, or stands still" in lines[6]


def test_following_a_run_that_ended_without_a_word(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.job_status.IDLE_SECONDS", 0.05)
    monkeypatch.setattr("pipeline.job_status.POLL_SECONDS", 0.01)
    folder = make_attempt(run, "5.0", 1000.0, rank_0_log="one\nhalf a li")
    for path in (*folder.iterdir(), folder, run / "checkpoints"):
        os.utime(path, (1000, 1000))
    follow(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["--- attempt 5.0 (train)", "[rank 0] one", "[rank 0] half a li", "---"]


def test_leaving_is_quiet(run: Path) -> None:
    make_attempt(run, "1.0", rank_0_log="one\n" * 200_000)
    process = start(run, "--follow")
    read_until(process, "[rank 0] one")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 130
    for arguments in (["--logs"], ["--follow"]):
        process = start(run, *arguments)
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        with (run / "attempts/1.0/rank-0.log").open("a") as log:
            log.write("more\n")  # a follower sees only now that nobody reads
        errors = process.stderr.read()
        assert process.wait(timeout=30) == 141 and errors == ""
        process.stderr.close()


# Folders that are being written, and a real one.


def test_a_folder_that_is_being_written(run: Path) -> None:
    """Files appear, grow by halves of lines, are replaced and vanish, as a run, its restarts and its cleaning do it."""
    stop = threading.Event()
    steps: list[int] = []
    statuses: list[str] = []

    def write() -> None:
        while not stop.is_set():
            step = len(steps)
            line = step_line(step % 50)
            with (run / "metrics.jsonl").open("a") as file:
                file.write(line[:30])
                file.flush()
                file.write(line[30:])
            name = f"{step % 3 + 1}.{step}"
            folder = make_attempt(run, name, rank_0_log="a\nhalf")
            (folder / "verdict").write_text("")
            (folder / "verdict").write_text("done: 1 steps\n")
            checkpoint = run / "checkpoints" / f"step-{step:06d}"
            checkpoint.mkdir()
            (run / "scores.json").write_text("[")
            if step > 3:
                (run / "checkpoints" / f"step-{step - 3:06d}").rmdir()
                old = run / "attempts" / f"{(step - 3) % 3 + 1}.{step - 3}"
                for path in old.iterdir():
                    path.unlink()
                old.rmdir()
            if step % 20 == 0:
                (run / "metrics.jsonl.tmp").write_text(step_line(0))
                os.replace(run / "metrics.jsonl.tmp", run / "metrics.jsonl")
            steps.append(step)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        places = Places()
        while len(statuses) < 150 or len(steps) < 200:
            status = read_status(run)
            statuses.append(status.state)
            describe(status)
            assert status.progress is None or status.progress.damaged_lines == 0
            for attempt in status.attempts[-1:]:
                list(merged_lines(logs_of(run, attempt)))
                places = new_lines(logs_of(run, attempt), places)[1]
    finally:
        stop.set()
        writer.join()


def test_the_folder_of_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_tiny_run(tmp_path)
    attempt = tmp_path / "run/attempts/77.0"
    attempt.mkdir(parents=True)
    (attempt / "before").write_text("0\n")
    paths = f"{REPOSITORY}:{REPOSITORY}/kernels"
    for script, more in (("preprocess", []), ("train", ["run.deepspeed=zero0.json", "optim.max_steps=3"])):
        with (attempt / "rank-0.log").open("w") as log:
            done = subprocess.run(
                [sys.executable, f"{REPOSITORY}/pipeline/{script}.py", "--config", str(recipe), *more],
                cwd=tmp_path,
                env=environment() | {"BGE_ICL_ATTEMPT": str(attempt), "PYTHONPATH": paths},
                stdout=log,
                stderr=subprocess.PIPE,
                text=True,
            )
        require_success(done)
    (attempt / "verdict").write_text("done: 3 steps\n")
    status = read_status(tmp_path / "run")
    assert status.state == "done" and status.has_model and status.restarts == 0
    assert status.progress is not None and (status.progress.step, status.progress.total_steps) == (3, 3)
    assert status.progress.step_seconds > 0 and status.progress.tokens_per_second > 0
    assert status.checkpoint is not None and status.checkpoint.step == 3
    assert (status.attempts[0].code, status.attempts[0].steps, status.attempts[0].reason) == (0, 3, "done")
    assert main([str(tmp_path / "run"), "--logs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[rank 0] ") for line in lines[:-1])
    assert sum("step 3/3" in line for line in lines) == 1
    assert lines[-1] == "--- attempt 77.0, 1 logs: done: 3 steps"
