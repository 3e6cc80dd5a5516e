"""`bge-icl submit`: its checks, its job texts, what it writes, what it hands to SLURM.

sbatch, sinfo, squeue and scontrol are stand-ins that answer as a cluster of four nodes would; tests/test_slurm.py has a
real one. Job texts and the plan are compared with those in tests/job_texts/; RECORD=1 writes them anew.
"""

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import REPOSITORY, environment
from test_evaluation import write_task
from tiny_run import make_tiny_reranker_run

from pipeline import submit_job
from pipeline.cluster import checks, folder_checks, snapshot
from pipeline.cluster.job_text import body_of, make_jobs
from pipeline.cluster.options import STAGES, Options, choose_stages
from pipeline.cluster.wording import format_time, parse_time
from pipeline.data.building import build_store
from pipeline.evaluate_embedder import LOCAL_EXAMPLES
from pipeline.files import file_sha256, take_lock
from pipeline.runtime.checkpoint import TrainState, save_checkpoint
from pipeline.settings import dump_settings, load_settings

RECORDED = Path(__file__).parent / "job_texts"
STAND_INS = {
    "sbatch": """
        if [ "$1" = --test-only ]; then
          cat >"$SLURM_DESK/tested"; env | grep ^SBATCH_ >"$SLURM_DESK/tested_env"
          if [ -e "$SLURM_DESK/refuse" ]; then cat "$SLURM_DESK/refuse" >&2; exit 1; fi
          echo "sbatch: Job 99 to start at 2030-01-01T00:00:00 using 64 processors on nodes node[1-2]" >&2; exit 0
        fi
        id=$((100 + $(wc -l <"$SLURM_DESK/submitted")))
        if [ -e "$SLURM_DESK/full_after" ] && [ $id -gt "$(cat "$SLURM_DESK/full_after")" ]; then
          echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1
        fi
        echo "$@" >>"$SLURM_DESK/submitted"; echo "$id;testbed" """,
    "sinfo": """
        away=$(cat "$SLURM_DESK/away" 2>/dev/null || echo idle)
        printf "main*|1-00:00:00|3|64|$away\\nmain*|1-00:00:00|1|16|mixed\\nlong|infinite|8|64|idle\\n" """,
    "squeue": """
        if [ -s "$SLURM_DESK/queue" ]; then cat "$SLURM_DESK/queue"; exit 0; fi
        echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 """,
    "scontrol": """
        if [ "$1 $2" = "show hostnames" ]; then echo node1; exit 0; fi
        exit 1 """,
    "scancel": """
        echo "$@" >>"$SLURM_DESK/cancelled" """,
    # Says what it was given, and ends training well.
    "srun": """
        if [ "$1" = --help ]; then echo "--mpi"; exit 0; fi
        printf '%s\\0' "$PWD" "$PYTHONPATH" "$@" >"$SLURM_DESK/srun.$(ls "$SLURM_DESK" | grep -c srun)"
        case "$*" in
          *check_nodes.py*) echo "  all is well after 1.0 s" >"$BGE_ICL_ATTEMPT/preflight.txt" ;;
          *train.py*) echo "0 5 done" >"$BGE_ICL_ATTEMPT/end" ;;
        esac """,
}
ON_CPUS = ["--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "60"]


@dataclass(frozen=True)
class Desk:
    """A login node: recipe of a tiny run with a finished store, a run folder of the test's own, SLURM's stand-ins."""

    recipe: Path
    run: Path
    slurm: Path  # what the stand-ins read and write
    submit: Callable[..., tuple[int, str, str]]  # flags -> (exit code, stdout, stderr)


@pytest.fixture(scope="module")
def recipe(tiny_training: Path) -> Path:
    """A tiny run, preprocessed; shared by all tests, so read only."""
    settings = load_settings(tiny_training)
    if not Path(settings.data.store).exists():
        build_store(settings)
    return tiny_training


@pytest.fixture
def desk(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    tools, slurm, run = tmp_path / "bin", tmp_path / "slurm", tmp_path / "run"
    put_tools(tools)
    slurm.mkdir()
    (slurm / "submitted").touch()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_DESK", str(slurm))
    for name in [name for name in os.environ if name.startswith("SBATCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100000")  # where lines break depends on the length of temporary paths

    def submit(*flags: str | Path, config: Path = recipe) -> tuple[int, str, str]:
        capsys.readouterr()
        arguments = ["--config", str(config), *map(str, flags)]
        if not any(str(flag).startswith("run.output_dir") for flag in flags):
            arguments.append(f"run.output_dir={run}")
        code = submit_job.main(arguments)
        return code, *capsys.readouterr()

    return Desk(recipe, run, slurm, submit)


def put_tools(folder: Path) -> None:
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text("#!/usr/bin/env bash\n" + "\n".join(line.strip() for line in text.splitlines()))
        (folder / name).chmod(0o755)


def refused(desk: Desk, *flags: str | Path) -> str:
    """The one line that a refused submission ends with; nothing may have been queued or written to jobs/."""
    code, _, errors = desk.submit(*flags)
    assert code == 2
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert not (desk.slurm / "submitted").read_text() and not list(desk.run.glob("jobs/*"))
    return line


# Job texts and plan, as recorded.


def compare(name: str, text: str) -> None:
    """With the recorded text; RECORD=1 records it."""
    path = RECORDED / name
    if os.environ.get("RECORD") == "1":
        path.write_text(text, encoding="utf-8")
    recorded = path.read_text(encoding="utf-8")
    changes = "\n".join(difflib.unified_diff(recorded.splitlines(), text.splitlines(), name, "now", lineterm=""))
    assert text == recorded, f"{changes}\nif it is meant so: RECORD=1 python -m pytest tests/test_submit_job.py"


@pytest.fixture(scope="module")
def full_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What bge_en_icl_full.yaml needs on the login node: a row of each dataset, Mistral-7B's config, a task."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "mistral").mkdir()
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000}
    config |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8}
    (folder / "mistral" / "config.json").write_text(json.dumps(config))
    (folder / "mistral" / "model.safetensors").touch()
    (folder / "rows").mkdir()
    for dataset in load_settings(REPOSITORY / "recipes/bge_en_icl_full.yaml").data.datasets:
        (folder / "rows" / dataset.path).write_text(json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}) + "\n")
    write_three_examples(write_task(folder / "words"))
    return folder


def write_three_examples(task: Path) -> Path:
    lines = (task / "examples.jsonl").read_text().splitlines()
    (task / "examples.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    return task


@pytest.fixture
def full_dry_run(desk: Desk, full_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The output of a dry run of the paper's recipe on 4 nodes x 8 GPUs, placeholders for what differs by machine."""
    monkeypatch.setattr(folder_checks, "LOCAL_FOLDERS", ())
    monkeypatch.setattr(submit_job, "read_commit", lambda: ("0123456789abcdef", ""))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(REPOSITORY)
    overrides = [f"model.name={full_inputs}/mistral", f"data.root={full_inputs}/rows"]
    overrides += [f"data.store={full_inputs}/store", f"run.output_dir={full_inputs}/runs/full"]
    lengths = ["--query-tokens", "600", "--passage-tokens", "180", "--steps", "7000"]
    hardware = ["--nodes", "4", "--gpus-per-node", "h100:8", "--partition", "long", "--account", "team"]
    code, out, errors = desk.submit(
        "--dry-run", *hardware, "--time", "24:00:00", "--task", full_inputs / "words", *lengths, *overrides,
        config=Path("recipes/bge_en_icl_full.yaml"),
    )  # fmt: skip
    assert (code, errors) == (0, "")
    out = out.replace(str(full_inputs), "/shared").replace(str(REPOSITORY), "/checkout")
    out = re.sub(r"\d{8}-\d{6}-0123456", "20300101-000000-0123456", out)
    return re.sub(r"[\d,.]+ GB free", "999.9 GB free", out)


def test_the_plan_of_4_nodes_with_8_gpus(full_dry_run: str) -> None:
    assert "4 nodes x 8 GPUs = 32 ranks; batch.queries=512 is 16 a rank; batch.symmetric_queries=256 is 8 a rank" in (
        " ".join(full_dry_run.split())
    )
    # Lines are broken by width, and paths had another one: compare words.
    plan = full_dry_run.split("====")[0]
    compare("plan_4x8.txt", "\n".join(" ".join(line) for line in sentences(plan)) + "\n")


def sentences(plan: str) -> list[list[str]]:
    """The words of each entry, whatever line they stand on."""
    found: list[list[str]] = []
    for line in plan.splitlines():
        if line.startswith(" " * 20) and found:
            found[-1] += line.split()
        else:
            found.append(line.split())
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_job_text_of_4_nodes_with_8_gpus(full_dry_run: str, stage: str) -> None:
    text = full_dry_run.split(f"/{stage}.sh\n")[1].split("\n\n====")[0].split("\ndry run:")[0]
    assert text.startswith("#!/usr/bin/env bash\n")
    compare(f"{stage}_4x8.sh", text + "\n")


@pytest.fixture(scope="module")
def reranker_inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of reranker_gemma2.yaml: a row of each dataset, the shape of Gemma 2 9B, folders of the test's own."""
    folder = tmp_path_factory.mktemp("reranker")
    (folder / "gemma").mkdir()
    config = {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000}
    (folder / "gemma" / "config.json").write_text(json.dumps(config))
    (folder / "gemma" / "model.safetensors").touch()
    (folder / "rows").mkdir()
    for dataset in load_settings(REPOSITORY / "recipes/reranker_gemma2.yaml").data.datasets:
        (folder / "rows" / dataset.path).write_text(json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}) + "\n")
    overrides = [f"model.name={folder}/gemma", f"data.root={folder}/rows", f"data.store={folder}/store"]
    return [*overrides, f"run.output_dir={folder}/runs/reranker"]


def test_a_rerankers_chain_trains_by_its_own_entry_and_evaluates_nothing(
    desk: Desk, reranker_inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_job, "read_commit", lambda: ("0123456789abcdef", ""))
    monkeypatch.chdir(REPOSITORY)
    recipe, hardware = Path("recipes/reranker_gemma2.yaml"), ["--nodes", "1", "--gpus-per-node", "8"]
    lengths = ["--query-tokens", "20", "--passage-tokens", "200", "--steps", "7000"]
    flags = [*hardware, "--time", "24:00:00", *lengths, *reranker_inputs]
    code, out, errors = desk.submit("--dry-run", *flags, config=recipe)
    assert (code, errors) == (0, "")
    folder = reranker_inputs[0].removeprefix("model.name=").removesuffix("/gemma")
    out = out.replace(folder, "/shared").replace(str(REPOSITORY), "/checkout")
    out = re.sub(r"\d{8}-\d{6}-0123456", "20300101-000000-0123456", out)
    assert "preprocess (8 tasks, 04:00:00) -> train (1 node x 8 GPUs, 24:00:00 a start)\n" in out
    assert "nothing is evaluated afterwards: bge-icl rerank scores a reranker" in out
    assert "128 queries, 2,048 pairs, 475,136 tokens, 4 chunks a rank" in " ".join(out.split())
    preprocess, train = (
        out.split(f"/{stage}.sh\n")[1].split("\n\n====")[0].split("\ndry run:")[0] for stage in ("preprocess", "train")
    )
    assert "BGE_ICL_ENTRY=" not in preprocess
    assert "\nexport BGE_ICL_ENTRY=pipeline/train_reranker.py\n" in train
    compare("train_reranker_1x8.sh", train + "\n")
    for asked, flag in ((["--task", "/nowhere"], "--task"), (["--stages", "train,evaluate"], "--stages")):
        code, _, errors = desk.submit("--dry-run", *flags, *asked, config=recipe)
        assert code == 2 and errors.startswith(f"error: {flag} asks for an evaluation, which a chain has none of")
        assert errors.count("\n") == 1 and "bge-icl rerank" in errors


def test_recorded_texts_are_what_bash_reads() -> None:
    for path in RECORDED.glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)


# Arithmetic.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "3"], "3 nodes x 1 task = 3 ranks do not divide batch.symmetric_queries=8: with 1 rank a node, "),
        (["--nodes", "2-4"], "3 nodes x 1 task = 3 ranks do not divide"),
        (["--nodes", "1", "--tasks-per-node", "8"], "do not divide batch.queries=12: 4 ranks would do"),
        (["--nodes", "4-2"], "--nodes '4-2' must be a number, or a range"),
        (["--nodes", "0"], "--nodes '0' must be"),
    ],
)
def test_ranks_must_divide_the_batch(desk: Desk, flags: list[str], words: str) -> None:
    assert words in refused(desk, *ON_CPUS, *flags)


def test_the_nearest_numbers_of_nodes_are_named(desk: Desk) -> None:
    assert "2 and 4 nodes would do" in refused(desk, "--nodes", "3", *ON_CPUS)


def test_without_a_store_the_recipe_says_which_batches_there_are(desk: Desk, tmp_path: Path) -> None:
    store = f"data.store={tmp_path}/none"
    line = refused(desk, "--nodes", "3", *ON_CPUS, store)
    assert "batch.symmetric_queries=8" in line and "batch.queries=12" not in line


def test_every_number_of_a_range_is_checked_and_asked_for(desk: Desk) -> None:
    code, out, errors = desk.submit("--dry-run", "--nodes", "1-2", *ON_CPUS)
    assert code == 0, errors
    assert "1 node x 1 task = 1 rank; batch.queries=12 is 12 a rank" in out
    assert "2 nodes x 1 task = 2 ranks; batch.queries=12 is 6 a rank" in out
    assert "#SBATCH --nodes=1-2\n#SBATCH --ntasks-per-node=1\n" in out


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("1-02:03", 93780), ("1-00:00:01", 86401)],
)
def test_times_are_slurms(text: str, seconds: float) -> None:
    assert parse_time("--time", text) == seconds
    assert parse_time("--time", format_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "1h", "0", "00:00:00", "-5", "1:2:3:4", "24:00:00 "])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--time"):
        parse_time("--time", text)


def test_stages_are_those_that_there_is_something_to_do_for() -> None:
    assert choose_stages(None, has_store=False, num_tasks=1) == STAGES
    assert choose_stages(None, has_store=True, num_tasks=0) == ("train",)
    assert choose_stages("evaluate,train", has_store=False, num_tasks=1) == ("train", "evaluate")


# Bad input.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--partition", "gpu"], "--partition 'gpu' does not exist; known: main, long"),
        (["--time", "2-00"], "--time 2-00 is above the limit of partition main, 1-00:00:00"),
        (["--nodes", "5"], "--nodes 5: partition main has 4"),
        (["--cpus-per-task", "65"], "65 cores, and the largest node of partition main has 64"),
        (["--time", "soon"], "--time 'soon' is no time"),
        (["--tasks-per-node", "0"], "--tasks-per-node 0 must be above 0"),
        (["--gpus-per-node", "2"], "--tasks-per-node 1: with --gpus-per-node 2 there is one rank a GPU"),
        (["--gpus-per-node", "many"], "--gpus-per-node 'many' must be a number"),
        (["--lead", "3600"], "--lead 3600 s is as long as --time 01:00:00"),
        (["--sbatch", "nodes=9"], "--sbatch 'nodes=9': submit sets --nodes itself; use --nodes"),
        (["--sbatch=-t 5"], "submit sets --time itself"),
        (["--sbatch", "comment=a\n#SBATCH --nodes=9"], "holds a control character"),
        (["--stages", "trian"], "--stages trian: 'trian' is unknown"),
        (["--stages", "evaluate"], "there is nothing to evaluate on; name folders with --task"),
        (["--stages", "evaluate", "--task", "/nowhere"], "run holds no trained model, so there is nothing to evaluate"),
        (["--task", "/nowhere"], "--task /nowhere: no folder with task.json"),
        (["--container=--container-image=x"], "this srun has no --container-image"),
        (["run.deepspeed=/nowhere.json"], "run.deepspeed=/nowhere.json: no such file"),
        (["run.keep_graphs=2"], "run.keep_graphs=2 and ZeRO-3"),
        (["preprocess.max_passage_tokens=50"], "preprocess.max_passage_tokens: store 60, recipe 50"),
        (["data.store=/no", "--stages", "train"], "data.store=/no does not exist, and preprocess is not among"),
        (["data.store=/nowhere/store", "data.root=/nowhere"], "no such file; check data.root"),
        (["model.name=/nowhere"], "model.name=/nowhere holds no config.json"),
        (["run.output_dir=/tmp/a%j"], "SLURM reads a % in the name of a log"),
        (["run.output_dir=/dev/null"], "run.output_dir=/dev/null is a file; name a folder"),
        (["optim.lr=fast"], "optim.lr='fast'"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_anything_is_queued(desk: Desk, flags: list[str], words: str) -> None:
    assert words in refused(desk, "--nodes", "2", *ON_CPUS, *flags)


@pytest.mark.parametrize(
    ("flag", "words", "path"),
    [
        ("--wrap", "apptainer exec --nv bge.sif", "bge.sif"),
        ("--wrap", "apptainer exec --nv images/sandbox", "images/sandbox"),
        ("--wrap", "apptainer exec --bind /data:/data,../x:/y /images/bge.sif", "../x"),
        ("--container", "--container-image=bge.sqsh --container-mounts=/data:/data", "bge.sqsh"),
        ("--container", "--container-image=./not_there.sqsh", "./not_there.sqsh"),
        ("--evaluate-options", "--num-examples 2 --examples-root images/sandbox", "images/sandbox"),
    ],
)
def test_relative_paths_would_be_looked_for_elsewhere(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, words: str, path: str
) -> None:
    (tmp_path / "here/images/sandbox").mkdir(parents=True)
    for name in ("bge.sif", "bge.sqsh"):
        (tmp_path / "here" / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    line = refused(desk, "--nodes", "2", *ON_CPUS, f"{flag}={words}")
    assert f"{flag} {words!r}: {path} is relative to this folder" in line
    assert line.endswith(f"; write {os.path.normpath(tmp_path / 'here' / path)}")


def test_what_is_no_relative_path_is_left_alone(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env").touch()
    (tmp_path / "bge.sif").touch()
    monkeypatch.chdir(tmp_path)
    for words in (f"env X=a/b apptainer exec --bind /data:/data --pwd $PWD {tmp_path}/bge.sif", "docker://x/y:1"):
        code, _, errors = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, f"--wrap={words}")
        assert code == 0, errors


def test_a_task_with_fewer_examples_than_evaluation_takes(desk: Desk, tmp_path: Path) -> None:
    assert checks.TASK_EXAMPLES == LOCAL_EXAMPLES
    flags = ["--nodes", "2", *ON_CPUS, "--task", write_task(tmp_path / "words")]
    assert "has 2 in examples.jsonl, and few_shot takes 3: give --evaluate-options='--num-examples 2'" in refused(
        desk, *flags
    )
    code, out, errors = desk.submit("--dry-run", *flags, "--evaluate-options=--num-examples 2")
    assert code == 0, errors
    train, evaluate = out.split("\n==== ")[1:]
    assert "export BGE_ICL_EVALUATE='--num-examples 2'\n" in evaluate and "BGE_ICL_EVALUATE" not in train
    assert desk.submit("--dry-run", *flags, "--evaluate-options=--modes zero_shot")[0] == 0


def test_a_task_that_lacks_a_file(desk: Desk, tmp_path: Path) -> None:
    task = write_three_examples(write_task(tmp_path / "words"))
    (task / "corpus.jsonl").unlink()
    assert "is not a retrieval task: corpus.jsonl is missing" in refused(desk, "--nodes", "2", *ON_CPUS, "--task", task)


def test_all_that_is_wrong_is_said_at_once(desk: Desk) -> None:
    line = refused(desk, "--nodes", "3", *ON_CPUS, "--partition", "gpu")
    assert line.startswith("error: 2 things are wrong: (1) 3 nodes x 1 task = 3 ranks do not divide")
    assert "(2) --partition 'gpu' does not exist" in line


def test_what_sbatch_says_of_a_wrong_account_is_passed_on(desk: Desk) -> None:
    (desk.slurm / "refuse").write_text("sbatch: error: Invalid account or account/partition combination specified\n")
    line = refused(desk, "--nodes", "2", *ON_CPUS, "--account", "nobody")
    assert (
        "sbatch --test-only refuses the train job (--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --time=60 "
        "--account=nobody): Invalid account or account/partition combination specified" in line
    )
    assert "#SBATCH --account=nobody\n" in (desk.slurm / "tested").read_text()


def test_a_job_that_waits_for_drained_nodes_is_taken(desk: Desk) -> None:
    (desk.slurm / "refuse").write_text("allocation failure: Requested node configuration is not available\n")
    assert "refuses the train job (--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --time=60): allocation" in refused(
        desk, "--nodes", "2", *ON_CPUS
    )
    (desk.slurm / "away").write_text("drained*")
    code, out, errors = desk.submit("--nodes", "2", *ON_CPUS)
    assert code == 0, errors
    assert "note         train       sbatch --test-only: not now, with 3 nodes of the partition drained or down" in out


def test_without_slurm_only_a_dry_run_works(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare").mkdir()
    for tool in ("git", "env", "bash"):
        (tmp_path / "bare" / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tmp_path / "bare"))
    assert "sbatch is not on the PATH: submit from a login node" in refused(desk, "--nodes", "2", *ON_CPUS)
    code, out, _ = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS)
    assert code == 0
    assert "not checked  slurm" in out and "sbatch is not on the PATH" in out and "#SBATCH --nodes=2\n" in out


def test_a_run_folder_that_a_process_writes_to(desk: Desk) -> None:
    desk.run.mkdir()
    lock = take_lock(desk.run / "lock")
    assert lock is not None
    with lock:
        line = refused(desk, "--nodes", "2", *ON_CPUS)
    assert f"a running process writes to run.output_dir={desk.run}" in line


@pytest.mark.parametrize("place", ["jobs", "attempts"])
def test_a_run_folder_of_a_job_that_waits(desk: Desk, place: str) -> None:
    if place == "jobs":
        (desk.run / "jobs/20300101-000000-0000000").mkdir(parents=True)
        (desk.run / "jobs/20300101-000000-0000000/submitted.json").write_text('{"jobs": {"train": "4711"}}')
    else:
        (desk.run / "attempts/4711.0").mkdir(parents=True)  # by hand, with sbatch
    (desk.slurm / "queue").write_text("4711|run-train|PENDING|0:00|1:00:00|2|(Priority)\n")
    code, _, errors = desk.submit("--nodes", "2", *ON_CPUS)
    assert code == 2 and f"run.output_dir={desk.run} is in use by job 4711 (pending)" in errors
    (desk.slurm / "queue").write_text("4711|run-train|FAILED|0:00|1:00:00|2|\n")
    assert desk.submit("--dry-run", "--nodes", "2", *ON_CPUS)[0] == 0


def save_one(desk: Desk, step: int, *overrides: str, **more_inputs: str) -> None:
    """A checkpoint as training writes it, with one small tensor."""
    settings = load_settings(desk.recipe, [f"run.output_dir={desk.run}", *overrides])
    tensors = {name: torch.zeros(2) for name in ("weight", "exp_avg", "exp_avg_sq")}
    # As a run saves it; of the base model a login node knows nothing.
    inputs = {"data.store": file_sha256(Path(settings.data.store) / "manifest.json"), "model.name": "0" * 64}
    inputs |= more_inputs
    save_checkpoint(desk.run / "checkpoints", TrainState(step=step, updates=step), {"a": tensors}, settings, inputs, 2)
    (desk.run / "settings.yaml").write_text(dump_settings(settings))


def test_a_reranker_goes_on_by_the_pairs_of_its_store(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "reranker").mkdir()
    recipe = make_tiny_reranker_run(tmp_path / "reranker")
    build_store(load_settings(recipe))
    save_one(replace(desk, recipe=recipe), 4, **{"pair template": "bge_reranker-0"})
    flags = ["--dry-run", "--nodes", "1", "--gpus-per-node", "2", "--time", "60"]
    code, out, errors = desk.submit(*flags, config=recipe)
    assert code == 0, errors
    assert "training goes on after step 4" in out and "16 of 26 steps of the store, their pairs tokenized" in out
    code, _, errors = desk.submit(*flags, "model.kind=embedder", config=recipe)
    assert code == 2 and "was saved with model.kind='reranker', now 'embedder'" in errors


def test_a_run_folder_of_another_recipe(desk: Desk) -> None:
    save_one(desk, 4)
    line = refused(desk, "--nodes", "2", *ON_CPUS, "optim.lr=2e-3")
    assert "step-000004 was saved with optim.lr=0.001, now 0.002; undo that, or use another run.output_dir" in line
    shutil.rmtree(desk.run / "checkpoints")
    (desk.run / "model").mkdir()
    (desk.run / "model/embedder.json").touch()
    line = refused(desk, "--nodes", "2", *ON_CPUS, "optim.lr=2e-3")
    assert f"run.output_dir={desk.run} belongs to another recipe" in line and "optim.lr=0.001, this one 0.002" in line
    # What does not change the result may change.
    harmless = ["run.save_every=7", f"run.deepspeed={desk.recipe.parent}/zero1.json"]
    assert desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, *harmless)[0] == 0


def test_a_start_that_left_nothing_binds_nobody(desk: Desk) -> None:
    save_one(desk, 4)
    shutil.rmtree(desk.run / "checkpoints")
    flags = ["--dry-run", "--nodes", "2", *ON_CPUS]
    assert "other settings" not in desk.submit(*flags)[1]
    changes = ["optim.lr=2e-3", "run.seed=7", "loss.temperature=0.5", "optim.weight_decay=0.5", "run.save_every=7"]
    code, out, errors = desk.submit(*flags, *changes[:1])
    assert code == 0, errors
    (note,) = [line for line in out.splitlines() if "other settings" in line]
    what = "was started with other settings (optim.lr: 0.001 -> 0.002) and has no checkpoint: training begins anew"
    assert note == f"  note         run folder  {what}"
    (note,) = [line for line in desk.submit(*flags, *changes)[1].splitlines() if "other settings" in line]
    assert " and 1 more) and has no checkpoint" in note and "save_every" not in note
    # A checkpoint that is damaged is one: training says what it makes of it.
    (desk.run / "checkpoints/step-000004").mkdir(parents=True)
    assert "belongs to another recipe" in refused(desk, "--nodes", "2", *ON_CPUS, "optim.lr=2e-3")


def test_a_run_folder_of_another_store(desk: Desk) -> None:
    save_one(desk, 4)
    state = desk.run / "checkpoints/step-000004/state.json"
    record = json.loads(state.read_text())
    state.write_text(json.dumps(record | {"inputs": {"data.store": "0" * 64}}))
    assert "was trained on another data.store" in refused(desk, "--nodes", "2", *ON_CPUS)


def test_where_a_run_goes_on_is_said(desk: Desk) -> None:
    assert "training starts at step 0" in desk.submit("--dry-run", "--nodes", "2", *ON_CPUS)[1]
    save_one(desk, 4)
    out = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, "optim.max_steps=9")[2]
    assert "optim.max_steps" in out, "another number of steps is another learning rate"
    out = " ".join(desk.submit("--dry-run", "--nodes", "2", *ON_CPUS)[1].split())
    assert f"training goes on after step 4: {desk.run}/checkpoints/step-000004" in out


def test_a_disk_without_room_for_the_checkpoints(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    save_one(desk, 4)
    size = sum(file.stat().st_size for file in (desk.run / "checkpoints/step-000004").iterdir())
    need = 3 * size + size // 3  # four are there at a time, one of them is already, and the model
    flags = ["--nodes", "2", *ON_CPUS, "run.keep_last=3"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    assert desk.submit("--dry-run", *flags)[0] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    line = refused(desk, *flags)
    assert "GB free, and 3 more checkpoints of" in line and line.endswith("; free some")


# Time, signal and memory.


def measured(desk: Desk, seconds: float, ranks: int = 2, steps: int = 20) -> None:
    """A run folder with an attempt that did so many steps of so many seconds."""
    attempt = desk.run / "attempts/7.0"
    attempt.mkdir(parents=True)
    (attempt / "before").write_text("0\n")
    for rank in range(ranks):
        (attempt / f"rank-{rank}.log").touch()
    rows = [{"step": i, "total_steps": 40, "seconds": seconds if i > 1 else 99.0, "chunks": 2} for i in range(steps)]
    (desk.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = load_settings(desk.recipe, [f"run.output_dir={desk.run}"])
    (desk.run / "settings.yaml").write_text(dump_settings(settings))


def plan_line(desk: Desk, name: str, *flags: str) -> str:
    """One line of a dry run's checks."""
    code, out, errors = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, *flags)
    assert code == 0, errors
    words = out.split("\n====")[0].splitlines()
    start = next(i for i, line in enumerate(words) if line[15:].startswith(name))
    more = next((i for i, line in enumerate(words[start + 1 :]) if not line.startswith(" " * 20)), 0)
    return " ".join(" ".join(words[start : start + 1 + more]).split())


def test_measured_steps_are_taken_where_there_are_some(desk: Desk) -> None:
    measured(desk, 2.0)
    line = plan_line(desk, "time", "run.save_every=10", "optim.max_steps=null")
    assert "a step 2.00 s (median of 18 steps of attempt 7.0)" in line and "no requeue expected" in line
    assert "1.0 s a chunk" in plan_line(desk, "signal", "run.save_every=10")
    with (desk.run / "metrics.jsonl").open("a") as file:  # a damaged line is no step
        file.write('{"step": "20", "total_steps": 40, "seconds": 9, "chunks": 2}\n[]\n{\n')
    assert plan_line(desk, "time", "run.save_every=10", "optim.max_steps=null") == line


def test_requeues_are_counted(desk: Desk) -> None:
    measured(desk, 300.0)
    line = plan_line(desk, "time", "run.save_every=2", "--time", "30", "--lead", "300")
    # All steps of the store's schedule, 300 s each, in starts of 1500 s.
    assert re.search("13 steps left: 01:05:0. in all, 00:30:00 a start: 2 requeues expected", line)


@pytest.mark.parametrize("ranks", [1, 4])
def test_steps_of_another_number_of_ranks_are_not_taken(desk: Desk, ranks: int) -> None:
    measured(desk, 2.0, ranks=ranks)
    assert plan_line(desk, "time").startswith("not checked time seconds of a step are not known: the formulas")


def test_a_time_limit_below_one_checkpoint_interval(desk: Desk) -> None:
    measured(desk, 60.0)
    line = refused(desk, "--nodes", "2", *ON_CPUS, "--time", "15", "run.save_every=11")
    assert "--time 00:15:00, less 300 s for stopping, is shorter than one checkpoint interval" in line
    assert "run.save_every=11 steps of 60.0 s" in line and "or run.save_every=9" in line
    assert desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, "--time", "15", "run.save_every=9")[0] == 0


def test_a_signal_too_late_for_a_chunk_and_a_checkpoint(desk: Desk) -> None:
    measured(desk, 60.0)
    line = refused(desk, "--nodes", "2", *ON_CPUS, "--lead", "60", "run.save_every=1")
    assert "the signal comes 60 s before the time limit, and stopping takes 61 s (30.0 s a chunk" in line
    assert "--lead 122" in line
    slow = refused(desk, "--nodes", "2", *ON_CPUS, "--lead", "61", "--storage-mb-per-s", "0.01", "run.save_every=1")
    assert "s a checkpoint" in slow


def test_the_lead_grows_with_what_stopping_takes(desk: Desk) -> None:
    assert "#SBATCH --signal=B:USR1@300\n" in desk.submit("--dry-run", "--nodes", "2", *ON_CPUS)[1]
    assert "#SBATCH --signal=B:USR1@30\n" in desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, "--time", "1")[1]
    measured(desk, 600.0)
    out = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, "--time", "120", "run.save_every=1")[1]
    assert "#SBATCH --signal=B:USR1@662\n" in out  # twice (300 s a chunk, a bit for saving, 30 s)


def test_a_model_that_does_not_fit(desk: Desk) -> None:
    flags = ["--nodes", "1", "--gpus-per-node", "1", "--time", "60"]
    fits = [*flags, "--gpu-memory", "80"]
    code, out, errors = desk.submit("--dry-run", *fits)
    assert code == 0, errors
    assert "GiB of 72.0 usable on a GPU" in out
    assert "the run does not fit: " in refused(desk, *flags, "--gpu-memory", "0.01")


# Job texts.


def odd_jobs(run: Path, **changes: object) -> dict[str, str]:
    """Job texts of a run in an odd folder, by stage."""
    options = Options(
        nodes=(2, 2), gpus_per_node=0, gpu_type="", tasks_per_node=1, cpus_per_task=1,
        time={stage: "60" for stage in STAGES}, places={}, partitions={}, container="", wrap="", extra=(),
        exclude_bad_nodes=False, max_stuck=3, lead=None, preprocess_tasks=2, evaluate_options="",
        storage_mb_per_s=200.0,
    )  # fmt: skip
    options = replace(options, **changes)  # type: ignore[arg-type]
    bodies = snapshot.read_bodies(STAGES)
    jobs = make_jobs(
        STAGES, bodies, options, run, run / "jobs/x", [str(run / "task")], 300, "a recipe\nexit 1", "embedder"
    )
    return {job.stage: job.text for job in jobs}


def read_like_sbatch(line: str) -> str:
    """One option of a #SBATCH line, by the rules of sbatch (src/sbatch/opt.c, _get_argument)."""
    out, quote, escaped = "", "", False
    for character in line:
        if escaped:
            out, escaped = out + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            quote, out = ("", out) if character == quote else (quote, out + character)
        elif character in " #":
            break
        elif character in "\"'":
            quote = character
        else:
            out += character
    return out


ODD = "odd 'run' \"x\" $HOME `id` é #1"


def test_odd_characters_in_sbatch_lines(tmp_path: Path) -> None:
    text = odd_jobs(tmp_path / ODD, places={"constraint": "a|b&(c d)"}, extra=("--comment=it's #1",))["train"]
    lines = [read_like_sbatch(line) for line in re.findall(r"^#SBATCH (.*)$", text, flags=re.MULTILINE)]
    assert f"--chdir={tmp_path / ODD}/jobs/x/code" in lines
    assert f"--output={tmp_path}/{ODD}/attempts/odd__run___x___HOME__id__é__1-train-%j.log" in lines
    assert "--constraint=a|b&(c d)" in lines and "--comment=it's #1" in lines
    assert not re.search(r"^exit 1", text, flags=re.MULTILINE), "the recipe's name stands in a comment"


def test_a_submitted_job_runs_the_copy_whatever_becomes_of_the_checkout(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, run = tmp_path / "checkout", tmp_path / ODD
    for name in snapshot.CODE:
        source = REPOSITORY / name
        shutil.copytree(source, checkout / name) if source.is_dir() else shutil.copy2(source, checkout / name)
    monkeypatch.setattr(snapshot, "ROOT", checkout)
    for file in ("recipe.yaml", "zero3.json"):
        shutil.copy2(desk.recipe.parent / file, checkout / file)
    data = desk.recipe.parent
    overrides = [f"model.name={data}/model", f"data.root={data}/data", f"data.store={data}/store"]
    overrides += [f"run.output_dir={json.dumps(str(run))}", "optim.max_steps=5"]
    config = checkout / "recipe.yaml"
    before = load_settings(config, overrides)
    code, out, errors = desk.submit("--nodes", "2", *ON_CPUS, "--wrap", "env X=1", *overrides, config=config)
    assert code == 0, errors
    (folder,) = run.glob("jobs/*-unknown")
    assert (folder / "commit.txt").read_text() == "unknown\n"
    for name in ("slurm/protocol.sh", "slurm/env.sh", "slurm/train.sbatch", "recipe.yaml", "zero3.json"):
        (checkout / name).write_text("exit 9\n")
    shutil.rmtree(checkout / "pipeline")

    resolved = load_settings(folder / "recipe.yaml")
    assert resolved.run.deepspeed == str(folder / "deepspeed.json")
    assert replace(resolved, run=replace(resolved.run, deepspeed=before.run.deepspeed)) == before
    assert json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    assert not list(folder.rglob("__pycache__"))

    # As sbatch starts it: in the folder that --chdir names, with the variables of a job.
    chdir = re.search(r"^#SBATCH (--chdir=.*)$", (folder / "train.sh").read_text(), flags=re.MULTILINE)
    assert chdir is not None
    job = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", folder / "train.sh"],
        cwd=read_like_sbatch(chdir[1]).removeprefix("--chdir="),
        env=os.environ | job | {"RANK": "3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "attempts/5.0/verdict").read_text() == "done: 5 steps\n"
    calls = [path.read_text().split("\0") for path in sorted(desk.slurm.glob("srun.*"))]
    (training,) = [call for call in calls if "pipeline/train.py" in call]
    assert training[0] == str(folder / "code") and training[1].split(":")[0] == str(folder / "code")
    start = training.index("env")  # of --wrap
    assert training[start:-1] == ["env", "X=1", "python", "pipeline/train.py", "--config", str(folder / "recipe.yaml")]
    loaded = subprocess.run(
        [sys.executable, "-c", "import pipeline.settings; print(pipeline.settings.__file__)"],
        cwd=tmp_path, env=environment() | {"PYTHONPATH": training[1]}, capture_output=True, text=True,
    )  # fmt: skip
    assert loaded.stdout.strip() == str(folder / "code/pipeline/settings.py")


def test_the_body_begins_where_the_comments_end() -> None:
    assert body_of("#!/bin/bash\n# a\n#SBATCH --x\n\nset -u\n# b\n#SBATCH --y\n") == "set -u\n# b\n#SBATCH --y\n"
    for stage, text in snapshot.read_bodies(STAGES).items():
        assert "#SBATCH" in text and "#SBATCH" not in body_of(text), stage


def test_variables_of_the_job(desk: Desk) -> None:
    flags = ["--exclude-bad-nodes", "--max-stuck", "5", "--container=--mpi --x='a b'", "--sbatch", "mail-type=FAIL"]
    code, out, errors = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, *flags)
    assert code == 0, errors
    for line in (
        f"export BGE_ICL_RUN={desk.run}",
        "export BGE_ICL_EXCLUDE=1",
        "export BGE_ICL_MAX_STUCK=5",
        "export BGE_ICL_CONTAINER='--mpi --x='\"'\"'a b'\"'\"''",
        "export DS_ACCELERATOR=cpu",
        "#SBATCH --mail-type=FAIL",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --kill-on-invalid-dep=yes",
    ):
        assert f"\n{line}\n" in out
    assert "BGE_ICL_WRAP" not in out.split("\nset -uo")[0]


def places_of(text: str) -> list[str]:
    """Where a job text wants to run."""
    names = "partition|account|qos|constraint|exclude|gpus-per-node"
    return re.findall(rf"^#SBATCH --((?:{names})=.*)$", text, flags=re.MULTILINE)


def test_a_stage_in_a_partition_of_its_own(desk: Desk, tmp_path: Path) -> None:
    task = write_three_examples(write_task(tmp_path / "words"))
    of_training = ["partition=main", "account=team", "qos=fast", "constraint=fat", "exclude=node9"]
    flags = ["--nodes", "2", "--gpus-per-node", "h100:1", "--time", "60", "--task", task]
    flags += [f"data.store={tmp_path}/store", *(f"--{place}" for place in of_training)]
    for own in ([], ["preprocess"], ["preprocess", "evaluate"]):
        code, out, errors = desk.submit("--dry-run", *flags, *(f"--{stage}-partition=long" for stage in own))
        assert code == 0, errors
        gpus = {"preprocess": [], "train": ["gpus-per-node=h100:1"]}
        gpus["evaluate"] = ["gpus-per-node=1"] if "evaluate" in own else ["gpus-per-node=h100:1"]
        for stage, text in zip(STAGES, out.split("\n==== ")[1:], strict=True):
            places = ["partition=long", "account=team"] if stage in own else of_training
            assert places_of(text) == [*gpus[stage], *places], stage
        assert out.count("ok           partition ") == 1 + len(own)
    assert "long for preprocess: 8 nodes" in out and "main for train: 4 nodes" in out


def test_each_stage_must_fit_its_own_partition(desk: Desk, tmp_path: Path) -> None:
    flags = ["--nodes", "2", *ON_CPUS, f"data.store={tmp_path}/store", "--preprocess-time", "2-00"]
    too_long = "--preprocess-time 2-00 is above the limit of partition main, 1-00:00:00"
    assert too_long in refused(desk, *flags)
    assert desk.submit("--dry-run", *flags, "--preprocess-partition", "long")[0] == 0
    assert too_long in refused(desk, *flags, "--partition", "long", "--preprocess-partition", "main")
    line = refused(desk, *flags, "--preprocess-partition", "cpu")
    assert "--preprocess-partition 'cpu' does not exist; known: main, long" in line
    # How many nodes there are is asked of the partition of training alone.
    many = ["--nodes", "8", *ON_CPUS, f"data.store={tmp_path}/store", "batch.queries=8", "batch.symmetric_queries=8"]
    assert desk.submit("--dry-run", *many, "--partition", "long", "--preprocess-partition", "main")[0] == 0
    line = refused(desk, *many, "--partition", "main", "--preprocess-partition", "long")
    assert "--nodes 8: partition main has 4" in line


def test_sbatch_variables_are_flags_by_default_and_nothing_else(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCOUNT", "team"), ("PARTITION", "long"), ("TIMELIMIT", "1")):
        monkeypatch.setenv(f"SBATCH_{name}", value)
    code, out, errors = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, "--partition", "main")
    assert code == 0, errors
    assert "#SBATCH --account=team\n" in out and "#SBATCH --partition=main\n" in out
    assert "SBATCH_TIMELIMIT of the environment: not used" in out
    assert (desk.slurm / "tested_env").read_text() == ""


# Dry run and submission.


def tree(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def test_a_dry_run_writes_nothing(desk: Desk, tmp_path: Path) -> None:
    before = tree(desk.recipe.parent), tree(REPOSITORY / "slurm")
    code, out, errors = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS)
    assert code == 0, errors
    assert out.endswith("dry run: nothing was written or submitted\n")
    assert "no preprocess stage is needed" in out and "nothing is evaluated afterwards" in out
    assert not desk.run.exists()
    assert before == (tree(desk.recipe.parent), tree(REPOSITORY / "slurm"))
    # What is wrong is shown beside the text, and the exit code says so.
    code, out, errors = desk.submit("--dry-run", "--nodes", "3", *ON_CPUS)
    assert code == 2 and "do not divide" in errors and "#SBATCH --nodes=3\n" in out and not desk.run.exists()
    # A run folder that is there stays as it is.
    measured(desk, 2.0)
    before_run = tree(desk.run)
    assert desk.submit("--dry-run", "--nodes", "2", *ON_CPUS, "run.save_every=10")[0] == 0
    assert tree(desk.run) == before_run


def test_a_chain_is_submitted(desk: Desk, tmp_path: Path) -> None:
    task, store = write_three_examples(write_task(tmp_path / "words")), tmp_path / "store"
    code, out, errors = desk.submit("--nodes", "2", *ON_CPUS, "--task", task, f"data.store={store}")
    assert code == 0, errors
    (folder,) = desk.run.glob("jobs/2*")
    record = json.loads((folder / "submitted.json").read_text())
    assert record["jobs"] == {"preprocess": "100", "train": "101", "evaluate": "102"}
    assert record["options"]["nodes"] == [2, 2] and record["lead"] == 300
    assert (desk.slurm / "submitted").read_text().splitlines() == [
        f"--parsable {folder}/preprocess.sh",
        f"--parsable --dependency=afterok:100 {folder}/train.sh",
        f"--parsable --dependency=afterok:101 {folder}/evaluate.sh",
    ]
    assert record["sbatch"]["train"] == ["sbatch", "--parsable", "--dependency=afterok:100", f"{folder}/train.sh"]
    assert (desk.run / "attempts").is_dir(), "without it a job fails without any log"
    log = f"{desk.run}/attempts/run-preprocess-100.log"
    assert record["logs"]["preprocess"] == log
    for text in (
        f"bge-icl status {desk.run} --follow",
        f"tail -F {log}",
        "squeue -j 100,101,102",
        "scancel 100 101 102",
    ):
        assert text in out
    assert f"job 102  log {desk.run}/attempts/run-evaluate-102-*.log" in out
    assert f"set -- {desk.run} {task}\n" in (folder / "evaluate.sh").read_text()
    assert "#SBATCH --array=0-0\n" in (folder / "evaluate.sh").read_text()


def test_jobs_before_one_that_is_refused_are_taken_back(desk: Desk, tmp_path: Path) -> None:
    (desk.slurm / "full_after").write_text("101")
    task = write_three_examples(write_task(tmp_path / "words"))
    flags = ["--nodes", "2", *ON_CPUS, "--task", task, f"data.store={tmp_path}/store"]
    code, _, errors = desk.submit(*flags)
    assert code == 2
    assert "evaluate.sh failed: Batch job submission failed: Job violates accounting/QOS policy" in errors
    assert "of the jobs before it: 100 101 taken back" in errors
    assert (desk.slurm / "cancelled").read_text() == "100 101\n"


def test_what_changed_since_the_last_submission_is_shown(desk: Desk) -> None:
    assert desk.submit("--nodes", "2", *ON_CPUS)[0] == 0
    _, out, _ = desk.submit("--dry-run", "--nodes", "2", *ON_CPUS)
    assert "differs from the text that was submitted last" not in out
    _, out, _ = desk.submit("--dry-run", "--nodes", "1", *ON_CPUS)
    changes = out.split("differs from the text that was submitted last")[1]
    changed = [line for line in changes.splitlines() if re.match(r"[+-][^+-]", line)]
    assert changed == ["-#SBATCH --nodes=2", "+#SBATCH --nodes=1"]


def test_a_login_node_is_not_kept_waiting() -> None:
    check = "import sys, pipeline.submit_job; print({'torch', 'transformers', 'scipy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
