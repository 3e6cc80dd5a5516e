"""Recipes, overrides and their errors."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.settings import Settings, dump_settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")])

BASE = {
    "model": {"name": "./model"},
    "data": {"root": "rows", "store": "store", "datasets": [{"name": "a", "path": "a.jsonl"}]},
    "run": {"output_dir": "out", "deepspeed": "zero1.json"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(BASE))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    settings = load_settings(path)
    assert settings.data.datasets
    assert Path(settings.run.deepspeed).is_file(), "run.deepspeed must name a file of ds_configs/"


def test_there_is_a_recipe() -> None:
    assert ROOT / "examples/quickstart/recipe.yaml" in RECIPES


def test_paths_are_relative_to_the_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(recipe)
    assert settings.data.root == str(recipe.parent / "rows")
    assert settings.model.name == str(recipe.parent / "model")
    assert settings.data.datasets[0].path == "a.jsonl"


def test_paths_of_overrides_are_relative_to_the_working_directory(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(recipe, ["data.root=elsewhere"])
    assert settings.data.root == str(tmp_path / "elsewhere")
    assert settings.data.store == str(recipe.parent / "store")


def test_a_hub_name_stays_a_name(recipe: Path) -> None:
    settings = load_settings(recipe, ["model.name=mistralai/Mistral-7B-v0.1"])
    assert settings.model.name == "mistralai/Mistral-7B-v0.1"
    assert settings.tokenizer_name == "mistralai/Mistral-7B-v0.1"
    assert load_settings(recipe, ["preprocess.tokenizer=org/other"]).tokenizer_name == "org/other"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=1e-3", 1e-3),  # YAML 1.1 reads this as a text
        ("optim.lr=1.0e-3", 1e-3),
        ("optim.lr=1", 1.0),
        ("optim.max_steps=7", 7),
        ("optim.max_steps=null", None),
        ("preprocess.bucket_edges=[8, 16]", (8, 16)),
        ("batch.examples.mode=none", "none"),
        ("batch.use_buckets=false", False),
    ],
)
def test_overrides(recipe: Path, override: str, expected: object) -> None:
    value: object = load_settings(recipe, [override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_the_last_override_wins(recipe: Path) -> None:
    assert load_settings(recipe, ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_overrides_keep_their_neighbours(recipe: Path) -> None:
    settings = load_settings(recipe, ["model.lora.rank=8"])
    assert (settings.model.lora.rank, settings.model.lora.alpha) == (8, Settings().model.lora.alpha)
    assert settings.model.name.endswith("model")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rate=1"], "unknown setting 'optim.learning_rate'"),
        (["batch.querys=1"], "did you mean batch.queries?"),
        (["model.lora.rnak=1"], "did you mean model.lora.rank?"),
        (["data.datasets=[{name: a, path: b, tpye: normal}]"], "did you mean data.datasets[0].type?"),
        (["optim.lr=fast"], "optim.lr='fast' must be of type float"),
        (["batch.queries=1.5"], "batch.queries=1.5 must be of type int"),
        (["batch.queries=true"], "batch.queries=True must be of type int"),
        (["batch.use_buckets=1"], "batch.use_buckets=1 must be of type bool"),
        (["model.lora=3"], "model.lora must be a mapping"),
        (["data.datasets=3"], "data.datasets=3 must be a list"),
        (["preprocess.bucket_edges=[16, 8]"], "must be rising"),
        (["model.dtype=fp8"], "model.dtype='fp8' must be one of bf16, fp32"),
        (["run.seed"], "has no '='"),
        (["run.seed=[1"], "not valid YAML"),
        (["optim.lr=2024-13-45"], "not valid YAML"),
        (["preprocess.template=bge"], "preprocess.template='bge' is unknown; known templates: bge_en_icl"),
        (["run.chunk_tokens=2047"], "run.chunk_tokens=2047 cannot hold one sequence"),
        (
            ["batch.examples.max_examples=0", "preprocess.max_prompt_tokens=64", "run.chunk_tokens=511"],
            "run.chunk_tokens=511 cannot hold one sequence",
        ),
        (["run.seed=-1"], "run.seed=-1 must be 0 or more"),
        (["model.lora.alpha=0"], "model.lora.alpha=0 must be above 0"),
        (["preprocess.max_prompt_tokens=512"], "leaves no room for an example"),
        (["run.output_dir="], "run.output_dir"),
        (["model.name=''"], "model.name is not set"),
        (["batch.queries=0"], "batch.queries=0 must be above 0"),
        (["loss.temperature=0"], "loss.temperature=0.0 must be above 0"),
        (["loss.teacher_temperature=0"], "loss.teacher_temperature=0.0 must be above 0"),
        (["loss.filter_margin=1.5"], "loss.filter_margin=1.5 must lie in -1..1"),
        (["loss.filter_margin=.nan"], "loss.filter_margin=nan must lie in -1..1"),
        (["loss.filter_ratio=0"], "loss.filter_ratio=0.0 must lie in 0..2"),
        (["loss.filter_ratio=2"], "loss.filter_ratio=2.0 must lie in 0..2"),
        (
            ["loss.filter_margin=0.1", "loss.filter_ratio=0.95"],
            "loss.filter_margin=0.1 and loss.filter_ratio=0.95 say the same thing in two ways; set one to null",
        ),
        (["loss.mask_shown=true", "batch.examples.mode=none"], "mode=none with max_examples=5 shows no passage"),
        (["loss.mask_shown=true", "batch.examples.mode=filler"], "mode=filler with max_examples=5 shows no passage"),
        (["loss.mask_shown=true", "batch.examples.max_examples=0"], "with max_examples=0 shows no passage"),
        (["loss.matryoshka_dims=[64, 64]"], "loss.matryoshka_dims=[64, 64] must be rising, distinct and above 0"),
        (["loss.matryoshka_dims=[0, 64]"], "loss.matryoshka_dims=[0, 64] must be rising, distinct and above 0"),
        (["loss.matryoshka_weights=[1]"], "loss.matryoshka_weights=[1.0] must hold one weight for each"),
        (
            ["loss.matryoshka_dims=[64]", "loss.matryoshka_weights=[0]"],
            "loss.matryoshka_weights=[0.0] must be above 0",
        ),
        (["model.num_layers=0"], "model.num_layers=0 must be above 0"),
        (["optim.max_steps=-1"], "optim.max_steps=-1 must be above 0"),
        (["model.lora.dropout=1"], "model.lora.dropout=1.0 must lie in 0..1"),
        (["batch.examples.max_examples=-1"], "batch.examples.max_examples=-1 must be 0 or more"),
        (["optim.lr=nan"], "optim.lr=nan must be above 0 and finite"),
        (["optim.lr=.inf"], "optim.lr=inf must be above 0 and finite"),
        (["optim.warmup_steps=-1"], "optim.warmup_steps=-1 must be 0 or more"),
        (["data.datasets=[{name: a}]"], "data.datasets[0] needs a name and a path"),
        (["data.datasets=[{name: a, path: b}, {name: a, path: c}]"], "the name 'a' stands twice"),
        (["data.datasets=[{name: a, path: b, type: qa}]"], "data.datasets[0].type='qa' must be one of normal"),
        (["data.datasets=[{name: a, path: b, group_size: 0}]"], "group_size=0 must be at least 1"),
    ],
)
def test_faults_name_setting_and_remedy(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_settings(recipe, overrides)


def test_no_examples_needs_no_room_for_them(recipe: Path) -> None:
    settings = load_settings(recipe, ["preprocess.max_prompt_tokens=512", "batch.examples.mode=none"])
    assert settings.preprocess.max_prompt_tokens == 512


def test_the_smallest_chunk_that_holds_a_prompt(recipe: Path) -> None:
    assert load_settings(recipe, ["run.chunk_tokens=2048"]).run.chunk_tokens == 2048


RERANKER = ["model.kind=reranker", "batch.examples.mode=none"]


def test_a_chunk_of_a_reranker_need_hold_a_pair_only(recipe: Path) -> None:
    assert load_settings(recipe, [*RERANKER, "run.chunk_tokens=512"]).run.chunk_tokens == 512


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.chunk_tokens=511", "run.chunk_tokens=511 cannot hold one pair of preprocess.max_pair_tokens=512"),
        ("batch.examples.mode=in_batch", "batch.examples.mode=in_batch: a reranker reads pairs"),
        ("evaluation={every: 5, tasks: [a]}", "evaluation.every=5: tasks are scored with embedders"),
        ("model.trained=full", "model.trained=full, model.adapter='': a reranker is trained by fresh adapters"),
        ("model.adapter=/a", "model.trained=lora, model.adapter='/a': a reranker is trained by fresh adapters"),
        ("loss.distillation=m3_kd", "loss.distillation=m3_kd is for embedders"),
        ("loss.filter_margin=0.1", "loss.filter_margin is for embedders"),
        ("loss.filter_ratio=0.9", "loss.filter_ratio is for embedders"),
        ("loss.mask_shown=true", "loss.mask_shown is for embedders"),
        ("loss.matryoshka_dims=[8]", "loss.matryoshka_dims is for embedders"),
    ],
)
def test_what_a_reranker_would_not_do_is_refused(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_settings(recipe, [*RERANKER, override])


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: [", "just words"])
def test_a_recipe_that_is_not_a_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mapping|valid YAML"):
        load_settings(path)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_settings(tmp_path / "none.yaml")


def test_matryoshka_weights_are_1_unless_named(recipe: Path, tmp_path: Path) -> None:
    settings = load_settings(recipe, ["loss.matryoshka_dims=[64, 256]"])
    assert settings.loss.matryoshka == ((64, 1.0), (256, 1.0))
    settings = load_settings(recipe, ["loss.matryoshka_dims=[64, 256]", "loss.matryoshka_weights=[2, 0.5]"])
    assert settings.loss.matryoshka == ((64, 2.0), (256, 0.5))
    (tmp_path / "again.yaml").write_text(dump_settings(settings))
    assert load_settings(tmp_path / "again.yaml") == settings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_options_of_the_loss_are_off(path: Path) -> None:
    loss = load_settings(path).loss
    assert not (loss.filters_negatives or loss.mask_shown or loss.matryoshka) and loss.teacher_temperature == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_dump_and_load_give_an_equal_tree(path: Path, tmp_path: Path) -> None:
    settings = load_settings(path, ["optim.lr=3e-5", "preprocess.bucket_edges=[64, 128]"])
    copy = tmp_path / "settings.yaml"
    copy.write_text(dump_settings(settings))
    assert load_settings(copy) == settings


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim: {lr: 1.0e-4}\nrun: {seed: 1}\noptim: {lr: 2.0e-4}\n")
    with pytest.raises(ValueError, match="recipe.yaml is not valid YAML: 'optim' stands twice"):
        load_settings(recipe)


def test_columns_come_back_from_a_dump(recipe: Path, tmp_path: Path) -> None:
    entry = "{name: a, path: a.jsonl, columns: {query: q, neg: [n_1, 'n_*'], type: null}}"
    settings = load_settings(recipe, [f"data.datasets=[{entry}]"])
    columns = settings.data.datasets[0].columns
    assert (columns.query, columns.pos, columns.neg, columns.type) == (("q",), (), ("n_1", "n_*"), None)
    (tmp_path / "again.yaml").write_text(dump_settings(settings))
    assert load_settings(tmp_path / "again.yaml") == settings
