"""`bge-icl fetch` against a hub on this machine, in processes of their own: the hub's address is read at import."""

import contextlib
import errno
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fake_hub import Files, Hub, Repository, commit_of, repository, running_hub
from launching import REPOSITORY, environment, require_success, run_python
from tiny_run import TYPES, make_tiny_run

from pipeline.cluster.fetching import choose_files, list_wanted, localize
from pipeline.cluster.hub import HubFile, explained, size_text
from pipeline.settings import load_settings

MODEL, DATA = "owner/tiny", "owner/pairs"
README = """---
configs:
- config_name: other
  data_files: other/*.parquet
- config_name: triplet
  data_files:
  - {split: train, path: triplet/train-*.parquet}
  - {split: test, path: triplet/test.parquet}
---
# Pairs
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with model and data on this machine."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model_files(tiny: Path) -> Files:
    """The tiny model's files, with the same weights in other forms beside them."""
    files = {path.name: path.read_bytes() for path in sorted((tiny.parent / "model").iterdir())}
    weights = files["model.safetensors"]
    copies = ("consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "model.fp16.safetensors")
    return files | {name: b"other form " + weights[:1000] for name in copies} | {"README.md": b"# Tiny"}


@pytest.fixture(scope="module")
def data_files(tiny: Path) -> Files:
    """A data set of two configurations; that of the test has its rows in two Parquet files."""
    lines = (tiny.parent / "data/normal.jsonl").read_text().splitlines()
    rows = [{key: row.get(key) for key in ("query", "pos", "neg")} for row in map(json.loads, lines)]
    files = {"README.md": README.encode()}
    parts = {"train-00000-of-00002": rows[:10], "train-00001-of-00002": rows[10:], "test": rows[:2]}
    tables = {f"triplet/{name}": some for name, some in parts.items()} | {"other/a": rows[3:4]}
    for name, some in tables.items():
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(some), buffer)
        files[f"{name}.parquet"] = buffer.getvalue()
    return files


@pytest.fixture
def hub(model_files: Files, data_files: Files) -> Iterator[Hub]:
    newer = dict(model_files) | {"README.md": b"# Tiny, once more"}
    repositories = {
        ("models", MODEL): repository(main=model_files, v2=newer),
        ("datasets", DATA): repository(main=data_files),
    }
    with running_hub(repositories) as running:
        yield running


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    """The recipe with names of the hub for the model and one of its datasets."""
    tree = yaml.safe_load(tiny.read_text())
    tree["model"]["name"] = MODEL
    tree["data"] |= {"root": str(tiny.parent / "data"), "store": str(tmp_path / "store")}
    entry = {"path": f"hf://{DATA}", "config": "triplet", "split": "train", "instruction": "Do it."}
    tree["data"]["datasets"] = [entry | {"name": "pairs"}, {"name": "local", "path": "only_1neg.jsonl"}]
    tree["run"] |= {"output_dir": str(tmp_path / "run"), "deepspeed": str(tiny.parent / "zero3.json")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def variables(hub: str, home: Path) -> dict[str, str]:
    """The environment of a login node that has this hub and an empty home."""
    dropped = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "HTTP_PROXY", "http_proxy")
    kept = {name: value for name, value in environment().items() if name not in dropped}
    return kept | {"HF_ENDPOINT": hub, "HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def fetch(hub: str, recipe: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`fetch_files.py --config recipe --to <beside it>/fetched ...`."""
    to = recipe.parent / "fetched"
    command = [sys.executable, "pipeline/fetch_files.py", "--config", str(recipe), "--to", str(to), *arguments]
    given = variables(hub, recipe.parent / "home") | more
    return subprocess.run(command, cwd=REPOSITORY, env=given, capture_output=True, text=True, timeout=300)


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The error line of a command that names a user's fault."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def test_everything_comes_once_and_serves_offline(
    hub: Hub, recipe: Path, model_files: Files, data_files: Files
) -> None:
    # The rows that hf:// itself gives, read from the hub.
    direct = recipe.parent / "direct"
    done = subprocess.run(
        [sys.executable, "pipeline/preprocess.py", "--config", str(recipe), f"data.store={direct}"]
        + [f"model.name={Path(load_settings(recipe).run.deepspeed).parent / 'model'}"],
        cwd=REPOSITORY,
        env=variables(hub.url, recipe.parent / "home2"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    require_success(done)

    hub.requests.clear()
    first = fetch(hub.url, recipe)
    require_success(first)
    root = recipe.parent / "fetched"
    settings = load_settings(root / "recipe.yaml")
    model = Path(settings.model.name)
    assert model == root / f"models/{MODEL}@{commit_of(model_files)[:12]}"
    assert (model / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    others = {"consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "model.fp16.safetensors"}
    wanted = set(model_files) - others
    assert {path.name for path in model.iterdir()} - {".cache"} == wanted
    assert not [line for line in hub.requests if any(line.endswith(name) for name in others)]
    assert "left out" in first.stdout and all(name in first.stdout for name in others)
    assert "other/a.parquet" not in "".join(hub.requests), "files of another configuration"

    record = json.loads((root / "fetched.json").read_text())
    assert set(record) == {f"model {MODEL}", f"data {DATA} triplet train"}
    assert record[f"model {MODEL}"]["commit"] == commit_of(model_files)
    fetched = record[f"model {MODEL}"]["hub_files"]
    assert set(fetched) == wanted and set(fetched["config.json"]) == {"bytes"}
    assert len(fetched["model.safetensors"]["sha256"]) == 64
    assert record[f"data {DATA} triplet train"]["rows"] == 24
    assert not (root / ".cache").exists() and not (recipe.parent / "home/.cache/huggingface/hub").exists()
    local, untouched = settings.data.datasets
    assert Path(local.path).parent == root / "datasets" / DATA and (local.config, local.split) == ("", "")
    assert (
        untouched == load_settings(recipe).data.datasets[1] and "1 with local files, left as they are" in first.stdout
    )

    # Once more: no request, nothing fetched; also without a network.
    hub.requests.clear()
    second = fetch(hub.url, recipe)
    require_success(second)
    assert not hub.requests and "nothing was fetched" in second.stdout
    assert "nothing was fetched" in fetch("http://127.0.0.1:9", recipe).stdout

    # The store made from it, without a network: the rows of the hub, in their order.
    require_success(run_python("pipeline/preprocess.py", ["--config", str(root / "recipe.yaml")]))
    made = Path(settings.data.store)
    names = sorted(path.name for path in direct.iterdir() if path.suffix in (".arrow", ".safetensors"))
    assert len(names) >= 3
    assert all((made / name).read_bytes() == (direct / name).read_bytes() for name in names)


def test_what_is_missing_comes_again(hub: Hub, recipe: Path) -> None:
    require_success(fetch(hub.url, recipe, "--only", "model"))
    model = Path(load_settings(recipe.parent / "fetched/recipe.yaml").model.name)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-7])  # the library alone would take it for whole
    (model / "config.json").unlink()
    hub.requests.clear()
    again = fetch(hub.url, recipe, "--only", "model")
    require_success(again)
    assert "fetched and checked" in again.stdout and (model / "model.safetensors").read_bytes() == whole
    sent = [line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert sorted(sent) == ["config.json", "model.safetensors"]


def test_a_call_that_was_cut_off_goes_on(hub: Hub, recipe: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    files = {"config.json": b"{}", names[0]: b"short", names[1]: bytes(range(256)) * 100_000}
    hub.repositories["models", "owner/big"] = repository(main=files | {"model.safetensors.index.json": index})
    hub.stall_after = 22_000_000
    root = recipe.parent / "fetched"
    arguments = ["--config", str(recipe), "--to", str(root), "--only", "model", "model.name=owner/big"]
    process = subprocess.Popen(
        [sys.executable, "pipeline/fetch_files.py", *arguments],
        cwd=REPOSITORY,
        env=variables(hub.url, recipe.parent / "home"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert hub.stalled.wait(60)
        wait = threading.Event()
        while len(list(root.rglob("*.metadata"))) < 3:  # three files are there, and noted
            assert not wait.wait(0.05) and process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert list(root.rglob("*.incomplete"))
    hub.stall_after = None
    hub.resume.set()
    hub.requests.clear()
    require_success(fetch(hub.url, recipe, "--only", "model", "model.name=owner/big"))
    sent = [line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert sent == [names[1]], "what came whole is not fetched again"
    model = Path(load_settings(root / "recipe.yaml").model.name)
    assert all((model / name).read_bytes() == data for name, data in files.items())
    assert not list(root.rglob("*.incomplete")), "parts of files would pile up"


def test_revisions(hub: Hub, recipe: Path, model_files: Files) -> None:
    newer = commit_of(dict(model_files) | {"README.md": b"# Tiny, once more"})
    result = fetch(hub.url, recipe, "--only", "model", "--revision", f"{MODEL}=v2")
    require_success(result)
    root = recipe.parent / "fetched"
    assert load_settings(root / "recipe.yaml").model.name.endswith(newer[:12])
    assert "data.datasets 'pairs': owner/pairs is not here (--only): recipe.yaml keeps the name" in result.stdout
    by_commit = fetch(hub.url, recipe, "--only", "model", "--revision", f"{MODEL}={newer}")
    require_success(by_commit)
    assert load_settings(root / "recipe.yaml").model.name.endswith(newer[:12])
    # Another one stands beside it.
    older = fetch(hub.url, recipe, "--only", "model")
    require_success(older)
    assert "other settings stood there before" in older.stdout
    assert load_settings(root / "recipe.yaml").model.name.endswith(commit_of(model_files)[:12])
    assert len(list((root / "models/owner").iterdir())) == 2


def test_a_tokenizer_of_its_own_and_a_streamed_dataset(hub: Hub, recipe: Path, data_files: Files) -> None:
    hub.repositories["models", "owner/words"] = hub.repositories["models", MODEL]
    tree = yaml.safe_load(recipe.read_text())
    tree["preprocess"]["tokenizer"] = "owner/words"
    tree["data"]["datasets"] = [
        {"name": "pairs", "path": f"hf://{DATA}@{commit_of(data_files)}", "config": "triplet", "split": "train"}
        | {"streaming": True}
    ]
    recipe.write_text(yaml.safe_dump(tree))
    result = fetch(hub.url, recipe, "--only", "tokenizer,data")
    require_success(result)
    settings = load_settings(recipe.parent / "fetched/recipe.yaml")
    tokenizer = Path(settings.preprocess.tokenizer)
    assert (tokenizer / "tokenizer.json").is_file() and not list(tokenizer.glob("*.safetensors"))
    assert settings.model.name == MODEL, "not asked for"
    assert not settings.data.datasets[0].streaming and "streaming=false for pairs" in result.stdout


def test_faults_of_the_hub_are_named(hub: Hub, recipe: Path, model_files: Files) -> None:
    where = [str(recipe.parent / "fetched")]
    cases = {
        "unknown": ["model.name=owner/none"],
        "revision": ["--revision", f"{MODEL}=v9"],
        "elsewhere": ["--revision", "owner/none=v9"],
        "gated": ["model.name=owner/gated"],
        "large": ["model.name=owner/large"],
        "damaged": ["model.name=owner/damaged"],
        "weightless": ["model.name=owner/weightless"],
    }
    hub.repositories["models", "owner/gated"] = repository(gated=True, main=model_files)
    hub.repositories["models", "owner/large"] = repository(main=model_files)
    hub.repositories["models", "owner/large"].sizes["model.safetensors"] = 10**16
    hub.repositories["models", "owner/damaged"] = Repository(
        repository(main=model_files).revisions, damaged={"model.safetensors"}
    )
    hub.repositories["models", "owner/weightless"] = repository(main={"config.json": b"{}", "model.gguf": b"x"})
    errors = {name: one_error(fetch(hub.url, recipe, "--only", "model", *more)) for name, more in cases.items()}
    assert "model.name=owner/none: there is none of this name at" in errors["unknown"]
    assert "model.name=owner/tiny has no revision 'v9'" in errors["revision"]
    assert "--revision owner/none=v9: of the hub, the recipe names owner/tiny, owner/pairs" in errors["elsewhere"]
    assert "model.name=owner/gated is gated" in errors["gated"] and "`hf auth login`" in errors["gated"]
    assert "10000.0 TB are to come, and the disk of" in errors["large"] and where[0] in errors["large"]
    assert "model.safetensors came damaged" in errors["damaged"] and "run the same command again" in errors["damaged"]
    assert "has no weights that transformers loads" in errors["weightless"]
    assert not list(Path(where[0]).rglob("owner/damaged*/model.safetensors"))


def test_faults_of_data_and_network_are_named(hub: Hub, recipe: Path, tiny: Path) -> None:
    local = f"model.name={tiny.parent / 'model'}"

    def entry(**changes: str) -> str:
        base = {"name": "pairs", "path": f"hf://{DATA}", "config": "triplet", "split": "train"}
        return f"data.datasets={json.dumps([base | changes])}"

    split = one_error(fetch(hub.url, recipe, local, entry(split="dev")))
    assert "data.datasets 'pairs'=owner/pairs" in split and "dev" in split
    config = one_error(fetch(hub.url, recipe, local, entry(config="pair")))
    assert "data.datasets 'pairs'=owner/pairs" in config and "triplet" in config
    missing = one_error(fetch(hub.url, recipe, local, entry(path="hf://owner/none")))
    assert "there is none of this name" in missing
    nowhere = one_error(fetch("http://127.0.0.1:9", recipe, "--only", "model"))
    assert "http://127.0.0.1:9 cannot be reached" in nowhere and "login node" in nowhere
    offline = one_error(fetch(hub.url, recipe, "--only", "model", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in offline and "unset HF_HUB_OFFLINE" in offline
    gone = one_error(fetch(hub.url, recipe, "model.name=/nowhere/model"))
    assert "model.name=/nowhere/model: no such folder" in gone
    files = one_error(fetch(hub.url, recipe, local, 'data.datasets=[{"name": "a", "path": "a.jsonl"}]'))
    assert "1 of 1 local paths are not there, first 'a'" in files and "--only model,tokenizer" in files


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "model,weights"], "'weights' is not one of model, tokenizer, data"),
        (["--revision", "owner/tiny"], "--revision 'owner/tiny' must be NAME=REVISION"),
        (["--revision", "=main"], "must be NAME=REVISION"),
        (["optim.speed=1"], "unknown setting 'optim.speed'"),
    ],
)
def test_wrong_arguments(recipe: Path, arguments: list[str], reason: str) -> None:
    assert reason in one_error(fetch("http://127.0.0.1:9", recipe, *arguments))
    assert not (recipe.parent / "fetched").exists()


def test_a_recipe_without_names_of_the_hub_needs_no_network(tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    tree = yaml.safe_load(tiny.read_text())
    tree["model"]["name"] = str(tiny.parent / "model")
    tree["data"]["root"] = str(tiny.parent / "data")
    recipe.write_text(yaml.safe_dump(tree))
    result = fetch("http://127.0.0.1:9", recipe)
    require_success(result)
    assert "model.name: a folder, left as it is" in result.stdout
    assert f"data.datasets: {len(TYPES)} with local files, left as they are" in result.stdout
    assert load_settings(tmp_path / "fetched/recipe.yaml") == load_settings(recipe)
    (tmp_path / "file").write_text("")
    taken = one_error(fetch("http://127.0.0.1:9", recipe, "--to", str(tmp_path / "file")))
    assert "is a file; name a folder" in taken


def test_a_second_call_at_the_same_time_is_refused(tiny: Path, tmp_path: Path) -> None:
    from pipeline.files import locked

    (tmp_path / "recipe.yaml").write_text(tiny.read_text().replace("./model", str(tiny.parent / "model")))
    with locked(tmp_path / "fetched/.lock", "held"):
        result = fetch("http://127.0.0.1:9", tmp_path / "recipe.yaml")
    assert "another call fetches into this folder" in one_error(result)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full = r"model.name=x: the disk is full \(No space left.*: .*/blob\); make room"
    with pytest.raises(ValueError, match=full), explained("model.name=x", "", tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "blob"))
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error
    with pytest.raises(KeyError), explained("model.name=x", "", tmp_path):
        raise KeyError("a fault of the code stays one")


def listing(*names: str) -> dict[str, Any]:
    return {name: HubFile(name, 1, "", "") for name in names}


def test_files_that_are_chosen() -> None:
    sharded = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
    mistral = listing("config.json", "tokenizer.model", "consolidated.safetensors", "pytorch_model-00001-of-00002.bin")
    both = mistral | listing(*sharded)
    assert {f.name for f in choose_files(both, True)} == {"config.json", "tokenizer.model", *sharded}
    assert {f.name for f in choose_files(mistral, True)} == {
        *("config.json", "tokenizer.model", "pytorch_model-00001-of-00002.bin")
    }
    rest = listing("1_Pooling/config.json", "onnx/config.json", "chat_template.jinja", "LICENSE", "x.png", "model.gguf")
    assert {f.name for f in choose_files(rest, False)} == {"1_Pooling/config.json", "chat_template.jinja", "LICENSE"}
    assert not [f for f in choose_files(both, False) if f.name.endswith(".safetensors")]


def test_one_name_for_model_and_tokenizer(recipe: Path) -> None:
    settings = load_settings(recipe, [f"preprocess.tokenizer={MODEL}"])
    wanted = list_wanted(settings, {MODEL: "v2"})
    assert [(some.part, some.key) for some in wanted] == [
        ("model", f"model {MODEL}@v2"),
        ("data", f"data {DATA} triplet train"),
    ]
    local = localize(settings, {wanted[0].key: "/x/tiny"}, {MODEL: "v2"})
    assert (local.model.name, local.preprocess.tokenizer) == ("/x/tiny", "/x/tiny")
    assert local.data == settings.data


def test_sizes_are_readable() -> None:
    assert [size_text(n) for n in (0, 999, 1500, 14.5e9, 3e12)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "14.5 GB",
        "3.0 TB",
    ]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.fetch_files import main

    with contextlib.suppress(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "hf auth login" in text and "--only" in text and "recipe.yaml" in text
