"""The recipes that ship: splits and settings of the paper, ablations, and plans over stores that have the splits."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_store import make_store, plain_rows

from pipeline import preprocess
from pipeline.data.composing import plan_lengths, sequence_ids
from pipeline.data.sampling import Schedule, check_world_size, make_schedule, plan_step
from pipeline.data.store import TokenStore, open_store, require_match
from pipeline.datatypes import BatchPlan
from pipeline.settings import Settings, load_settings

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

# Splits as the paper lists them, by task type.
RETRIEVAL = {"eli5", "hotpotqa", "fever", "msmarco_passage", "msmarco_document", "nq", "squad", "triviaqa", "quora"}
TWO_SIDES = [
    f"{site}_{side}" for site in ("arxiv", "biorxiv", "medrxiv", "reddit", "stackexchange") for side in ("s2s", "p2p")
]
PUBLIC = {
    "normal": RETRIEVAL | {"miracl", "mr_tydi", "dureader", "t2ranking"},
    "only_1neg": {"nli"},
}
FULL = {
    "normal": RETRIEVAL | {"arguana", "fiqa", "scidocs_rr", "stackoverflow_dup_questions"},
    "only_1neg": {"nli"},
    "symmetric_class": {
        "amazon_reviews",
        "amazon_counterfactual",
        "banking77",
        "emotion",
        "tweet_sentiment_extraction",
        "mtop_intent",
        "imdb",
        "toxic_conversations",
    },
    "symmetric_clustering": {*TWO_SIDES, "twenty_newsgroups"},
    "symmetric_sts": {"sts12", "sts22", "sts_benchmark"},
}

# Per type as the paper has it: batch, group, in-batch negatives, passages wrapped like a query.
RULES = {
    "normal": (512, 8, True, False),
    "only_1neg": (512, 2, True, False),
    "symmetric_class": (256, 8, False, False),
    "symmetric_clustering": (256, 8, False, True),
    "symmetric_sts": (256, 8, False, True),
}

# Task definitions of the paper's table 7 and the released evaluation code. The other splits have none there.
KNOWN_INSTRUCTIONS = {
    "hotpotqa": "Given a multi-hop question, retrieve documents that can help answer the question.",
    "fever": "Given a claim, retrieve documents that support or refute the claim.",
    "miracl": "Given a question, retrieve Wikipedia passages that answer the question.",
    "msmarco_passage": "Given a web search query, retrieve relevant passages that answer the query.",
    "nq": "Given a question, retrieve Wikipedia passages that answer the question.",
    "quora": "Given a question, retrieve questions that are semantically equivalent to the given question.",
    "dureader": "Given a Chinese search query, retrieve web passages that answer the question.",
    "t2ranking": "Given a Chinese search query, retrieve web passages that answer the question.",
    "arguana": "Given a claim, find documents that refute the claim.",
    "fiqa": "Given a financial question, retrieve user replies that best answer the question.",
    "scidocs_rr": "Given a title of a scientific paper, retrieve the titles of other relevant papers.",
    "stackoverflow_dup_questions": "Retrieve duplicate questions from StackOverflow forum.",
    "amazon_reviews": "Classify the given Amazon review into its appropriate rating category.",
    "amazon_counterfactual": "Classify a given Amazon customer review text as either counterfactual or "
    "not-counterfactual.",
    "banking77": "Given a online banking query, find the corresponding intents.",
    "emotion": "Classify the emotion expressed in the given Twitter message into one of the six emotions: anger, fear, "
    "joy, love, sadness, and surprise.",
    "tweet_sentiment_extraction": "Classify the sentiment of a given tweet as either positive, negative, or neutral.",
    "mtop_intent": "Classify the intent of the given utterance in task-oriented conversation.",
    "imdb": "Classify the sentiment expressed in the given movie review text from the IMDB dataset.",
    "toxic_conversations": "Classify the given comments as either toxic or not toxic.",
    "arxiv_s2s": "Identify the main and secondary category of Arxiv papers based on the titles.",
    "arxiv_p2p": "Identify the main and secondary category of Arxiv papers based on the titles and abstracts.",
    "biorxiv_s2s": "Identify the main category of Biorxiv papers based on the titles.",
    "biorxiv_p2p": "Identify the main category of Biorxiv papers based on the titles and abstracts.",
    "medrxiv_s2s": "Identify the main category of Medrxiv papers based on the titles.",
    "medrxiv_p2p": "Identify the main category of Medrxiv papers based on the titles and abstracts.",
    "reddit_s2s": "Identify the topic or theme of Reddit posts based on the titles.",
    "reddit_p2p": "Identify the topic or theme of Reddit posts based on the titles and posts.",
    "stackexchange_s2s": "Identify the topic or theme of StackExchange posts based on the titles.",
    "stackexchange_p2p": "Identify the topic or theme of StackExchange posts based on the given paragraphs.",
    "twenty_newsgroups": "Identify the topic or theme of the given news articles.",
    "sts12": "Retrieve semantically similar text.",
    "sts22": "Retrieve semantically similar text.",
    "sts_benchmark": "Retrieve semantically similar text.",
}

# What each recipe changes of the base; data.datasets of the full recipe is checked by itself.
CHANGES: dict[str, dict[str, Any]] = {
    "bge_en_icl_full": {},
    "bge_en_icl_public_released": {
        "model.lora.rank": 32,
        "model.lora.alpha": 64,
        "model.lora.dropout": 0.1,
        "batch.queries": 128,
        "batch.fill_groups": True,
        "optim.warmup_steps": 100,
    },
    "ablation_no_icl": {"batch.examples.mode": "none"},
    "ablation_fixed_examples": {"batch.examples.mode": "fixed", "batch.examples.max_examples": 3},
    "ablation_bidirectional_last": {"model.attention": "bidirectional"},
    "ablation_bidirectional_mean": {"model.attention": "bidirectional", "model.pooling": "mean"},
    "ablation_causal_mean": {"model.pooling": "mean", "batch.examples.mode": "none"},
    "ablation_passage_prompt": {"preprocess.template": "bge_en_icl_passage_prompt"},
    "ablation_filler": {"batch.examples.mode": "filler"},
    "reranker_gemma2": {
        "model.kind": "reranker",
        "model.name": "google/gemma-2-9b",
        "batch.queries": 128,
        "batch.symmetric_queries": 128,
        "batch.group_size": 16,
        "batch.examples.mode": "none",
        "loss.distillation_weight": 0.0,
    },
}
OWN_STORE = {"bge_en_icl_full", "ablation_passage_prompt", "reranker_gemma2"}
OWN_DATA = {"bge_en_icl_full", "reranker_gemma2"}


def load(name: str, *overrides: str) -> Settings:
    return load_settings(FOLDER / f"{name}.yaml", overrides)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}


# --- what the recipes say ---


def test_the_list_of_recipes() -> None:
    assert {path.stem for path in RECIPES} == {"bge_en_icl_public", *CHANGES}
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in RECIPES if f"| `{path.name}` |" not in readme] == []


@pytest.mark.parametrize(("name", "splits"), [("bge_en_icl_public", PUBLIC), ("bge_en_icl_full", FULL)])
def test_every_split_of_the_paper_is_named_with_its_rules(name: str, splits: dict[str, set[str]]) -> None:
    datasets = load(name).data.datasets
    assert {t: {d.name for d in datasets if d.type == t} for t in splits} == splits
    assert len(datasets) == sum(len(names) for names in splits.values())
    for d in datasets:
        _, group_size, in_batch, _ = RULES[d.type]
        assert (d.group_size, d.in_batch_negatives) == (group_size, in_batch), d.name


@pytest.mark.parametrize("name", ["bge_en_icl_public", "bge_en_icl_full"])
def test_every_entry_states_all_its_fields(name: str) -> None:
    tree = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    wanted = {"name", "path", "type", "instruction", "in_batch_negatives", "group_size"}
    assert [entry for entry in tree["data"]["datasets"] if set(entry) != wanted or None in entry.values()] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_files_lie_below_the_data_root(path: Path) -> None:
    data = load_settings(path).data
    for dataset in data.datasets:
        assert not Path(dataset.path).is_absolute() and ".." not in Path(dataset.path).parts
    assert len({dataset.path for dataset in data.datasets}) == len(data.datasets)


@pytest.mark.parametrize("name", ["bge_en_icl_public", "bge_en_icl_full"])
def test_instructions_are_known_or_marked(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    marked = set(re.findall(r"# unverified: instruction\n +- \{name: (\w+)", text))
    datasets = load(name).data.datasets
    assert {d.name: d.instruction for d in datasets if d.name not in marked} == {
        d.name: KNOWN_INSTRUCTIONS[d.name] for d in datasets if d.name in KNOWN_INSTRUCTIONS
    }
    assert all(d.instruction.endswith(".") for d in datasets)


def test_settings_of_the_paper() -> None:
    settings = flat(asdict(load("bge_en_icl_public")))
    wanted = {
        "model.name": "mistralai/Mistral-7B-v0.1",
        "model.attention": "causal",
        "model.pooling": "last",
        "model.dtype": "bf16",
        "model.activation_checkpointing": True,
        "model.lora.rank": 64,
        "model.lora.alpha": 32,
        "model.lora.dropout": 0.0,
        "preprocess.template": "bge_en_icl",
        "preprocess.max_query_tokens": 512,
        "preprocess.max_passage_tokens": 512,
        "preprocess.max_example_query_tokens": 256,
        "preprocess.max_example_passage_tokens": 256,
        "preprocess.max_prompt_tokens": 2048,
        "batch.queries": 512,
        "batch.symmetric_queries": 256,
        "batch.group_size": 8,
        "batch.examples.mode": "in_batch",
        "batch.examples.max_examples": 5,
        "loss.temperature": 0.02,
        "loss.distillation_weight": 1.0,
        "optim.lr": 1e-4,
        "optim.epochs": 1.0,
        "run.deepspeed": str(FOLDER.parent / "ds_configs/zero3.json"),
    }
    assert {key: settings[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_changes_only_what_it_is_about(name: str) -> None:
    base, recipe = flat(asdict(load("bge_en_icl_public"))), flat(asdict(load(name)))
    changes = {key: value for key, value in recipe.items() if base[key] != value}
    assert changes.pop("run.output_dir").endswith(f"/{name}")
    stores = changes.pop("data.store", None)
    assert (stores is not None) == (name in OWN_STORE)
    own_data = {changes.pop(key, None) is not None for key in ("data.root", "data.datasets")}
    assert own_data == {name in OWN_DATA}
    assert changes == CHANGES[name]


def test_the_reranker_has_the_papers_settings() -> None:
    settings = load("reranker_gemma2")
    assert (settings.model.lora.rank, settings.model.lora.alpha, settings.optim.lr) == (64, 32, 1e-4)
    assert settings.preprocess.max_pair_tokens == 512
    assert {d.relation for d in settings.data.datasets} == {"", "p-p", "arguana"}
    assert {"arguana", "hotpotqa", "fever"} <= {d.name for d in settings.data.datasets}


def test_output_folders_are_distinct() -> None:
    assert len({load_settings(path).run.output_dir for path in RECIPES}) == len(RECIPES)


# --- extends ---


def write(path: Path, **tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(
        tmp_path / "base" / "base.yaml",
        model={"name": "./model", "lora": {"rank": 8, "alpha": 4}},
        preprocess={"bucket_edges": [16, 32]},
        data={"root": "rows", "store": "store", "datasets": [{"name": "a", "path": "a.jsonl", "group_size": 3}]},
        run={"output_dir": "out", "deepspeed": "zero1.json"},
    )


def test_an_extending_recipe_is_merged_over_its_base(tmp_path: Path, base: Path) -> None:
    recipe = write(
        tmp_path / "other" / "recipe.yaml",
        extends="../base/base.yaml",
        model={"lora": {"rank": 16}},
        preprocess={"bucket_edges": [64]},
        data={"store": "mine", "datasets": [{"name": "b", "path": "b.jsonl"}]},
    )
    settings, plain = load_settings(recipe, ["optim.lr=2e-5"]), load_settings(base)
    assert (settings.model.lora.rank, settings.model.lora.alpha) == (16, 4), "mappings are merged"
    assert settings.preprocess.bucket_edges == (64,), "lists are replaced"
    assert [(d.name, d.group_size) for d in settings.data.datasets] == [("b", None)]
    # Paths of each file are relative to that file, whichever names them.
    assert settings.data.root == plain.data.root == str(tmp_path / "base/rows")
    assert settings.data.store == str(tmp_path / "other/mine")
    assert settings.model.name == str(tmp_path / "base/model")
    assert settings.optim.lr == 2e-5, "overrides come last"


def test_an_extending_recipe_without_changes_equals_its_base(tmp_path: Path, base: Path) -> None:
    assert load_settings(write(tmp_path / "recipe.yaml", extends="base/base.yaml")) == load_settings(base)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"extends": "nowhere.yaml"}, "extends='nowhere.yaml', but there is no file"),
        ({"extends": "recipe.yaml"}, "extends='recipe.yaml', which extends a recipe itself"),
        ({"extends": 3}, "extends=3 must be the file name"),
        ({"extends": None}, "extends=None must be the file name"),
        ({"extends": ["base/base.yaml"]}, "must be the file name"),
        ({"extends": "base/base.yaml", "optimm": {}}, "recipe.yaml: unknown setting 'optimm'"),
        ({"extends": "bad.yaml"}, "bad.yaml: unknown setting 'oops'"),
        ({"run": {"extends": "base/base.yaml"}}, "unknown setting 'run.extends'"),
    ],
)
def test_faults_of_extends(tmp_path: Path, base: Path, tree: dict[str, Any], message: str) -> None:
    write(tmp_path / "bad.yaml", oops=1)
    recipe = write(tmp_path / "recipe.yaml", **tree)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_settings(recipe)


def test_extends_is_no_override(base: Path) -> None:
    with pytest.raises(ValueError, match="unknown setting 'extends'"):
        load_settings(base, ["extends=base.yaml"])


# --- plans over stores that have the splits ---

ROWS = 20
SHORT_ROW = 3  # of every split: has two negatives only
QUERIES, SYMMETRIC = 8, 4


def raw_rows(name: str, task_type: str) -> list[dict[str, Any]]:
    """Rows of a split: nine negatives (but one short row), teacher scores for retrieval, a category for clustering."""
    rows = []
    for i in range(ROWS):
        row: dict[str, Any] = {"query": f"{name}: what is known of case {i}?" + " more" * (i % 7), "type": task_type}
        row["pos"] = [f"{name}: all that is known of case {i}." + " And more." * (i % 5)]
        row["neg"] = [f"{name}: of case {i} nothing but part {j}" for j in range(2 if i == SHORT_ROW else 9)]
        if task_type == "symmetric_class":
            row["pos"] = [f"label {i % 4} of {name}"]
        if task_type == "symmetric_clustering":
            row["category"] = f"{name}.{i % 4}"
        if task_type == "normal":
            row |= {"pos_scores": [98.0], "neg_scores": [80.0 - j for j in range(len(row["neg"]))]}
        rows.append(row)
    return rows


Planned = tuple[TokenStore, Settings, Schedule, list[BatchPlan]]


@pytest.fixture(scope="module")
def planned(mistral_tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Planned]:
    """Preprocesses small raw files of a recipe's splits with its settings and plans one epoch, once a recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    done: dict[str, Planned] = {}

    def plan(name: str) -> Planned:
        if name in done:
            return done[name]
        shipped = load(name)
        root, store_path = folder / Path(shipped.data.root).name, folder / Path(shipped.data.store).name
        overrides = [f"data.root={root}", f"data.store={store_path}", f"preprocess.tokenizer={mistral_tokenizer_dir}"]
        overrides += [f"batch.queries={QUERIES}", f"batch.symmetric_queries={SYMMETRIC}"]
        if not store_path.exists():  # several recipes share the base's
            root.mkdir(exist_ok=True)
            for dataset in shipped.data.datasets:
                lines = [json.dumps(row) + "\n" for row in raw_rows(dataset.name, dataset.type)]
                (root / dataset.path).write_text("".join(lines), encoding="utf-8")
            config = str(FOLDER / f"{name}.yaml")
            assert preprocess.main(["--config", config, "--processes", "1", *overrides]) == 0
        settings, store = load(name, *overrides), open_store(store_path)
        require_match(store, settings, store.manifest.fingerprint)
        schedule = make_schedule(store, settings)
        plans = [plan_step(store, schedule, step) for step in range(schedule.steps_per_epoch)]
        done[name] = (store, settings, schedule, plans)
        return done[name]

    return plan


@pytest.mark.parametrize("name", ["bge_en_icl_public", "bge_en_icl_full", "bge_en_icl_public_released"])
def test_plans_follow_the_rules_of_each_type(planned: Callable[[str], Planned], name: str) -> None:
    store, settings, _, plans = planned(name)
    assert {plan.dataset for plan in plans} == set(range(len(settings.data.datasets))), "each split has its steps"
    for plan in plans:
        table = store.datasets[plan.dataset]
        _, group_size, in_batch, wrapped = RULES[table.task_type]
        symmetric = table.task_type.startswith("symmetric")
        assert plan.task_type == table.task_type
        assert plan.num_queries == (SYMMETRIC if symmetric else QUERIES)
        assert plan.in_batch_negatives == in_batch
        short = (table.source_line_N[plan.row_B] == SHORT_ROW + 1) & (group_size > 3)
        counts = np.diff(plan.group_offsets)
        if settings.batch.fill_groups:
            assert (counts == group_size).all()
            assert plan.num_candidates_repeated == 5 * short.sum()
        else:
            assert counts.tolist() == np.where(short, 3, group_size).tolist()
            assert plan.num_candidates_repeated == 0
        assert np.isnan(plan.teacher_score_C).all() == (table.task_type != "normal")
        assert ((plan.passage_instruction_P >= 0) == wrapped).all()
        assert np.diff(plan.example_offsets).max() <= 5


@pytest.mark.parametrize("name", ["bge_en_icl_public", "bge_en_icl_full"])
def test_queries_carry_their_instruction_and_what_their_type_shows(
    planned: Callable[[str], Planned], name: str
) -> None:
    store, settings, _, plans = planned(name)
    instructions = {d.name: d.instruction for d in settings.data.datasets}
    shown = dict.fromkeys(instructions, 0)
    for plan in plans:
        table = store.datasets[plan.dataset]
        used = {*plan.instruction_B.tolist(), *plan.example_instruction_E.tolist()}
        assert {store.instructions[i] for i in used} == {instructions[table.name]}
        of_row = {i: table.pos_text[table.pos_offsets[i]] for i in plan.example_row_E.tolist()}
        if table.task_type == "symmetric_clustering":
            of_row = {i: table.category_text_N[i] for i in of_row}
        wanted = [of_row[row] for row in plan.example_row_E.tolist()]
        assert plan.example_response_E.tolist() == wanted
        shown[table.name] += len(wanted)
    assert min(shown.values()) > 0, "every split shows examples"


@pytest.mark.parametrize("name", ["bge_en_icl_full", "ablation_passage_prompt"])
def test_sequences_of_a_step_of_each_split(planned: Callable[[str], Planned], name: str) -> None:
    store, _, schedule, plans = planned(name)
    tokens = store.manifest.tokens
    instruct, _, response = tokens.marker_ids
    assert len(tokens.bos) == 1 and len(tokens.marker_ids) == 3
    assert (len(tokens.passage_tail) > 0) == (name == "ablation_passage_prompt")
    tail = [*tokens.passage_tail, *tokens.eos]
    for plan in {plan.dataset: plan for plan in plans}.values():
        length_S = plan_lengths(store, schedule.limits, plan)
        ids = [sequence_ids(store, schedule.limits, plan, s).tolist() for s in range(plan.num_sequences)]
        assert [len(x) for x in ids] == length_S.tolist()
        assert all(x[0] == tokens.bos[0] and x[-1] == tokens.eos[0] for x in ids)
        for b, count in enumerate(np.diff(plan.example_offsets).tolist()):
            assert ids[b].count(response) == ids[b].count(instruct) == count + 1
        for passage in ids[plan.num_queries :]:
            assert passage.count(instruct) == RULES[plan.task_type][3]
            assert RULES[plan.task_type][3] or passage[-len(tail) :] == tail


def test_ablations_see_the_rows_of_the_base(planned: Callable[[str], Planned]) -> None:
    """Same store, same rows, candidates and order: a comparison shows the ablation and nothing else."""
    store, settings, _, plans = planned("bge_en_icl_public")
    for name in sorted(set(CHANGES) - OWN_STORE - {"bge_en_icl_public_released"}):
        batch = replace(settings.batch, examples=load(name).batch.examples)
        schedule = make_schedule(store, replace(settings, batch=batch))
        for step in range(0, len(plans), 5):
            plan, counts = plan_step(store, schedule, step), np.diff(plans[step].example_offsets)
            assert plan.dataset == plans[step].dataset
            assert plan.row_B.tolist() == plans[step].row_B.tolist()
            assert plan.passage_text_P.tolist() == plans[step].passage_text_P.tolist()
            mode, shown = batch.examples.mode, np.diff(plan.example_offsets)
            if mode == "fixed":  # a row that is an example itself shows the other two
                assert set(shown.tolist()) <= {2, 3}
            else:
                assert shown.tolist() == (0 * counts if mode == "none" else counts).tolist()
            assert plan.filler == (mode == "filler")


# --- the shipped batch sizes ---

# Rows of some splits; the others have five. Batches of a pass, rows of each batch, rows seen twice in the last one.
SIZES = {
    "fever": (1300, 3, 512, 236),
    "nq": (513, 2, 512, 511),
    "nli": (512, 1, 512, 0),
    "quora": (100, 1, 100, 0),
    "emotion": (600, 3, 256, 168),
    "arxiv_p2p": (256, 1, 256, 0),
    "sts22": (257, 2, 256, 255),
}


@pytest.mark.parametrize("name", ["bge_en_icl_public", "bge_en_icl_full"])
def test_schedule_at_the_shipped_batch_sizes(name: str) -> None:
    settings = load(name)
    sizes = {d.name: SIZES.get(d.name, (5, 1, 5, 0)) for d in settings.data.datasets}
    rows = {}
    for d in settings.data.datasets:
        rows[d.name] = plain_rows(sizes[d.name][0], 8, d.name)
        if d.type == "symmetric_clustering":
            rows[d.name] = [row | {"category": f"c{i % 9}"} for i, row in enumerate(rows[d.name])]
    store = make_store({d.name: (d.type, rows[d.name]) for d in settings.data.datasets})
    schedule = make_schedule(store, settings)
    for world_size in (1, 8, 64, 256):
        check_world_size(schedule, world_size)
    for d, dataset in zip(settings.data.datasets, schedule.datasets, strict=True):
        num_rows, num_batches, num_queries, _ = sizes[d.name]
        assert dataset.layout.batch_size == RULES[d.type][0]
        assert (dataset.layout.num_rows, dataset.layout.num_batches) == (num_rows, num_batches)
        assert (dataset.num_queries, dataset.steps_per_epoch) == (num_queries, num_batches)
    assert schedule.steps_per_epoch == sum(size[1] for size in sizes.values())
    seen: dict[str, list[BatchPlan]] = {d: [] for d in sizes}
    for step in range(schedule.steps_per_epoch):
        plan = plan_step(store, schedule, step)
        seen[schedule.datasets[plan.dataset].name].append(plan)
    for d, plans in seen.items():
        num_rows, num_batches, num_queries, num_revisited = sizes[d]
        assert [plan.num_queries for plan in plans] == [num_queries] * num_batches
        assert sorted(plan.num_rows_revisited for plan in plans)[-1] == num_revisited
        assert sum(plan.num_rows_revisited for plan in plans) == num_revisited
        assert len({row for plan in plans for row in plan.row_B.tolist()}) == num_rows
