"""Whole runs through the deepspeed launcher: resume, bad input, what a run folder holds."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import REPOSITORY, launch, require_success, run_python
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import TYPES

from pipeline.data.composing import Limits, plan_lengths
from pipeline.data.sampling import make_schedule, plan_step
from pipeline.data.shown import count_shown
from pipeline.data.store import open_store, read_manifest
from pipeline.evaluation.during import is_best, is_scored, record_scores
from pipeline.inference.description import read_description
from pipeline.inference.embedder import load_base_embedder, load_embedder
from pipeline.inference.gate import GATE_FILE, gate_embeddings
from pipeline.model.base import fingerprint_base
from pipeline.model.encoder import choose_trained, load_encoder, trainable_parameters
from pipeline.model.flop import Work, executed_flop
from pipeline.model.shapes import read_shape
from pipeline.preprocess import main as preprocess
from pipeline.runtime.checkpoint import TrainState, find_checkpoint, require_same_run, save_checkpoint
from pipeline.runtime.runlog import require_tracker
from pipeline.runtime.sharding_json import read_deepspeed_json, require_exact
from pipeline.runtime.watch import NOT_FINITE, STOPPED
from pipeline.settings import LoraSettings, OptimSettings, load_settings
from pipeline.training.run import require_base
from pipeline.training.steps import learning_rate

TRAIN = REPOSITORY / "pipeline" / "train.py"
FAULTY = Path(__file__).parent / "faulty_rank.py"
# Two ranks, ZeRO-3, several chunks a step, dropout: what makes exact resume hard.
COMMON = ["model.lora.dropout=0.1", "optim.max_steps=6", "run.save_every=3", "run.chunk_tokens=300"]
COMMON += ["loss.filter_margin=0.05", "loss.mask_shown=true", "loss.matryoshka_dims=[16]"]


@pytest.fixture(scope="module")
def recipe(tiny_training):
    assert preprocess(["--config", str(tiny_training), "--processes", "1"]) == 0
    return tiny_training


def train(recipe, out, *overrides, world_size=2, config=None):
    arguments = ["--config", str(config or recipe), *COMMON, f"run.output_dir={out}", *overrides]
    return launch(TRAIN, arguments, world_size)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = train(recipe, out, "run.profile_steps=[1]", "run.tracker=tensorboard")
    require_success(result)
    return out, result.stdout


def cut_back(source, target):
    """The run as a kill after step 4 leaves it: newest checkpoint of step 3, metrics beyond it."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-000006")
    shutil.rmtree(target / "model")
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:4]) + '{"step": 4, "los')
    return target


def test_run_folder_holds_everything(whole_run):
    out, stdout = whole_run
    for name in ("settings.yaml", "metrics.jsonl", "loss.png", "checkpoints/step-000003", "checkpoints/step-000006"):
        assert (out / name).exists(), name
    for name in ("adapter_model.safetensors", "adapter_config.json", "markers.safetensors", "embedder.json"):
        assert (out / "model" / name).exists(), name
    assert len(losses(out)) == 6 and stdout.count("| loss ") == 6
    metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["chunks"] >= 2 and metrics["passes"] == 2 * metrics["chunks"] - 1 and metrics["tokens"] > 0
    description = read_description(out / "model")
    assert description.matryoshka_dims == (16,)
    assert description.tasks == {name: f"Do {name}." for name in TYPES}
    adapter = load_file(out / "model" / "adapter_model.safetensors")
    assert all(value.norm() > 0 for name, value in adapter.items() if "lora_B" in name)
    # What the engine gave on two ranks under ZeRO-3 is what the saved model gives.
    gate_ND = np.load(out / "model" / GATE_FILE)
    np.testing.assert_allclose(gate_embeddings(load_embedder(out, show_progress=False)), gate_ND, atol=1e-5)


def test_arithmetic_profile_and_tracker_of_a_run(recipe, whole_run):
    out, _ = whole_run
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    settings = load_settings(recipe)
    store = open_store(settings.data.store)
    plan = plan_step(store, make_schedule(store, settings), 0)
    length_S = plan_lengths(store, Limits.from_settings(settings.preprocess), plan).astype(float)
    work = Work(length_S.sum(), (length_S**2).sum(), len(length_S))
    first, profiled = metrics[:2]
    assert profiled["tflops"] is None, "the profiler takes time of its own"
    share = first["passes"] / first["chunks"]
    flop = executed_flop(read_shape(settings.model, 0), work, causal=True, forwards=share, recomputed=False)
    assert first["tflops"] * first["seconds"] * 2 == pytest.approx(flop / 1e12)
    assert first["hfu"] is None and first["mfu"] is None, "no peak is known of a CPU"

    assert sorted(path.name for path in (out / "profile").iterdir()) == ["step-000001.json.gz", "step-000001.txt"]
    assert "aten::mm" in (out / "profile" / "step-000001.txt").read_text()

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([m["loss"] for m in metrics], rel=1e-6)
    waited = [event.value for event in events.Scalars("seconds_of/data")]
    assert waited == pytest.approx([m["seconds_of"]["data"] for m in metrics], rel=1e-6)


def test_masked_negatives_are_counted(recipe, whole_run):
    out, stdout = whole_run
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    settings = load_settings(recipe)
    store = open_store(settings.data.store)
    schedule = make_schedule(store, settings)
    shown = [count_shown(plan_step(store, schedule, step)) for step in range(6)]
    assert [m["negatives_shown"] for m in metrics] == shown and sum(shown) > 0
    filtered = [m["negatives_filtered"] for m in metrics]
    assert any(filtered) and stdout.count(" filtered |") == sum(n > 0 for n in filtered)


def test_resume_on_the_same_ranks_is_bit_for_bit(recipe, whole_run, tmp_path):
    out = cut_back(whole_run[0], tmp_path / "cut")
    result = train(recipe, out)
    require_success(result)
    assert "step-000003: 3 steps are done" in result.stdout
    assert losses(out) == losses(whole_run[0])
    for name in ("weights.safetensors", "moments.safetensors"):
        resumed = load_file(out / "checkpoints" / "step-000006" / name)
        truth = load_file(whole_run[0] / "checkpoints" / "step-000006" / name)
        assert resumed.keys() == truth.keys() and len(truth) > 10
        for key, value in truth.items():
            assert torch.equal(resumed[key], value), key


def write_task(folder, rows):
    """The rows' queries over the rows' positives; the first three rows are the examples."""
    (folder / "qrels").mkdir(parents=True)
    header = {"name": "tiny", "type": "retrieval", "instruction": "Do normal.", "metric": "ndcg_at_10"}
    (folder / "task.json").write_text(json.dumps(header))
    examples = [{"query": row["query"], "response": row["pos"][0]} for row in rows[:3]]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows[3:])]
    passages = dict.fromkeys(text for row in rows for text in row["pos"])
    corpus = [{"_id": f"p{i}", "title": "", "text": text} for i, text in enumerate(passages)]
    for name, lines in (("examples", examples), ("queries", queries), ("corpus", corpus)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    places = {text: f"p{i}" for i, text in enumerate(passages)}
    judged = "".join(f"q{i}\t{places[row['pos'][0]]}\t1\n" for i, row in enumerate(rows[3:]))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def test_evaluation_on_all_ranks_scores_as_the_saved_model_and_leaves_training_alone(
    recipe, whole_run, tmp_path, monkeypatch
):
    rows = [json.loads(line) for line in (recipe.parent / "data" / "normal.jsonl").read_text().splitlines()]
    task, out = write_task(tmp_path / "task", rows), tmp_path / "out"
    require_success(train(recipe, out, f"evaluation.tasks=[{task}]", "evaluation.every=4", "run.keep_last=9"))
    assert losses(out) == losses(whole_run[0])
    lines = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6] and lines[0]["best"]
    assert (out / "best_model" / "adapter_model.safetensors").is_file()
    scored = run_python(REPOSITORY / "pipeline/evaluate_embedder.py", ["--run", str(out), "--task", str(task)])
    require_success(scored)
    found = {s["mode"]: s["value"] for s in json.loads((out / "scores.json").read_text())}
    assert found.keys() == {"zero_shot", "few_shot"}
    for mode, value in found.items():
        assert lines[-1]["scores"][f"tiny/{mode}"] == pytest.approx(value, abs=1e-6)

    # Asked to stop in the middle of an evaluation: what is done is saved, and the evaluation made up.
    monkeypatch.setenv("FAULT", "evaluating 1 4")
    options = [f"run.output_dir={tmp_path / 'asked'}", f"evaluation.tasks=[{task}]", "evaluation.every=4"]
    asked = launch(FAULTY, ["--config", str(recipe), *COMMON, *options], 2)
    assert asked.returncode == STOPPED and "4 of 6 steps are done and saved" in asked.stdout
    assert not (tmp_path / "asked" / "evaluation.jsonl").exists()
    require_success(train(recipe, tmp_path / "asked", *options[1:]))
    assert (tmp_path / "asked" / "evaluation.jsonl").read_text() == (out / "evaluation.jsonl").read_text()

    # Killed after the last checkpoint, before its evaluation was through.
    log, cut = out / "evaluation.jsonl", tmp_path / "cut"
    whole_log = log.read_text()
    shutil.copytree(out, cut)
    (cut / "evaluation.jsonl").write_text(whole_log.splitlines(keepends=True)[0])
    require_success(train(recipe, cut, f"evaluation.tasks=[{task}]", "evaluation.every=4", "run.keep_last=9"))
    assert (cut / "evaluation.jsonl").read_text() == whole_log


def test_scores_of_steps_done_again_give_way_and_only_a_better_mean_is_the_best(tmp_path):
    scores = [(2, 0.5), (4, 0.7), (6, 0.6), (4, 0.55), (6, 0.8)]
    best = []
    for step, few in scores:
        named = {"t/zero_shot": 0.0, "t/few_shot": few}
        best.append(is_best(tmp_path, step, named))
        record_scores(tmp_path, step, named, best[-1])
    assert best == [True, True, False, True, True]
    assert is_scored(tmp_path, 4) and not is_scored(tmp_path, 5)
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["mean"]) for line in lines] == [(2, 0.5), (4, 0.55), (6, 0.8)]


def test_full_fine_tuning_resumes_and_leaves_a_model_of_its_own(recipe, tmp_path):
    full = ["model.trained=full", "optim.max_steps=4", "run.save_every=2", "run.keep_last=3"]
    require_success(train(recipe, tmp_path / "whole", *full))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    require_success(train(recipe, tmp_path / "cut", *full))
    last = "checkpoints/step-000004/weights.safetensors"
    weights = load_file(tmp_path / "whole" / last)
    resumed = load_file(tmp_path / "cut" / last)
    assert weights.keys() == resumed.keys() and not any("lora" in name for name in weights)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())

    settings = load_settings(recipe)
    embedder = load_embedder(tmp_path / "whole", show_progress=False)
    trained = dict(embedder.encoder.named_parameters()) | dict(embedder.encoder.named_buffers())
    start = dict(load_base_embedder(settings, show_progress=False).encoder.named_parameters())
    for name, value in weights.items():
        moved = name.replace("embed_tokens.base.weight", "embed_tokens.weight")
        assert torch.equal(trained.get(name, trained.get(moved)), value), name
        assert name not in start or not torch.equal(start[name], value), f"{name} did not move"
    assert np.isfinite(embedder.encode_queries(["river stone"], "Do normal.")).all()


def test_a_run_goes_on_from_an_adapter(recipe, whole_run, tmp_path):
    folder = whole_run[0] / "model"
    settings = load_settings(recipe, [f"model.adapter={folder}"])
    tokens = read_manifest(Path(settings.data.store)).tokens

    def build(model):
        encoder = load_encoder(model, tokens.marker_ids, tokens.marker_subtokens)
        choose_trained(encoder, model)
        return {name: p.detach() for name, p in trainable_parameters(encoder).items()}

    state = load_file(whole_run[0] / "checkpoints" / "step-000006" / "weights.safetensors")
    found = build(settings.model)
    assert found.keys() == state.keys() and any("marker_rows" in name for name in state)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    wrong = dataclasses.replace(settings.model, lora=LoraSettings(rank=8, alpha=8))
    with pytest.raises(ValueError, match="has rank 4; set model.lora.rank=4, not 8"):
        build(wrong)
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        build(dataclasses.replace(settings.model, adapter=str(tmp_path)))
    with pytest.raises(ValueError, match="model.adapter=.* needs model.trained=lora"):
        load_settings(recipe, [f"model.adapter={folder}", "model.trained=full"])
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    kept = {name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if "q_proj" in name}
    save_file(kept, other / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapts other modules than q_proj"):
        build(dataclasses.replace(settings.model, adapter=str(other)))
    wider = {name: torch.cat([value, value], dim=1) for name, value in kept.items()}
    save_file(wider, other / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        build(dataclasses.replace(settings.model, adapter=str(other)))


def test_resume_on_other_ranks_and_stage_is_close(recipe, tmp_path):
    """Dropout draws go by rank and chunk, and a filter may turn on rounding: so this is asked of a run without them."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    smooth = ["model.lora.dropout=0.0", "loss.filter_margin=null"]
    require_success(train(recipe, whole, *smooth))
    cut_back(whole, cut)
    stage1 = f"run.deepspeed={recipe.parent / 'zero1.json'}"
    require_success(train(recipe, cut, *smooth, stage1, world_size=1))
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    truth = load_file(whole / "checkpoints" / "step-000006" / "weights.safetensors")
    resumed = load_file(cut / "checkpoints" / "step-000006" / "weights.safetensors")
    for key, value in truth.items():
        assert (resumed[key] - value).norm() <= 1e-4 * value.norm(), key


def test_damaged_newest_checkpoint_is_named_and_the_one_before_taken(recipe, whole_run, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(whole_run[0], out)
    weights = out / "checkpoints" / "step-000006" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = train(recipe, out)
    require_success(result)
    assert "step-000006 is damaged" in result.stdout and "step-000003: 3 steps are done" in result.stdout
    assert losses(out) == losses(whole_run[0])


def test_without_a_whole_checkpoint_nothing_starts_over(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "step-000003-backup").mkdir(parents=True)
    assert find_checkpoint(folder) is None, "not a name that save_checkpoint gives"
    (folder / "step-000003").mkdir()
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged; restore one, or remove the folder"):
        find_checkpoint(folder)


def test_what_only_another_rank_sees_is_told(recipe, tmp_path):
    """Each rank reads its share of the store: here only the second one meets the damage."""
    store = tmp_path / "store"
    shutil.copytree(load_settings(recipe).data.store, store)
    shard = store / read_manifest(store).files[1].name
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = train(recipe, tmp_path / "out", f"data.store={store}")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert f"error: rank 1: token store {store}: {shard.name} has sha256" in result.stderr


def one_error(result):
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode != 0 and len(errors) == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=0.5", "was saved with optim.lr="),
        ("run.keep_graphs=2", "run.keep_graphs=2 and ZeRO-3"),
        ("evaluation.every=2", "evaluation.every=2 and evaluation.tasks=[] belong together"),
        ("evaluation={every: 2, tasks: [./nowhere]}", "nowhere: no such folder"),
        ("run.chunk_tokens=10", "run.chunk_tokens=10 cannot hold one sequence"),
        ("preprocess.bucket_edges=[7]", "was made with other settings"),
        ("preprocess.max_query_tokens=40", "was made with other settings"),
    ],
)
def test_bad_input_is_one_clear_message(recipe, whole_run, tmp_path, override, message):
    out = tmp_path / "bad"
    shutil.copytree(whole_run[0], out)
    before = {path: path.stat().st_size for path in out.rglob("*")}
    result = run_python(TRAIN, ["--config", str(recipe), *COMMON, f"run.output_dir={out}", override])
    assert message in one_error(result)
    assert {path: path.stat().st_size for path in out.rglob("*")} == before


def test_bad_input_under_the_launcher_is_said_once(recipe, tmp_path):
    error = one_error(train(recipe, tmp_path / "out", "batch.queries=7"))
    assert "batch.queries=7 is not divisible by the world size 2" in error
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_the_batch_and_a_remedy(recipe, tmp_path):
    result = run_python(TRAIN, ["--config", str(recipe), *COMMON, f"run.output_dir={tmp_path}", "optim.lr=1.0e+36"])
    error = one_error(result)
    assert result.returncode == NOT_FINITE and "loss is nan at step 3 (dataset " in error and "lower optim.lr" in error
    taken = [json.loads(line)["skipped"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert taken == [False, True, True], "the third bad step in a row ends the run"


def test_a_changed_base_model_or_state_is_noticed(whole_run, recipe, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(load_settings(recipe).model.name, base)
    before = fingerprint_base(str(base))
    checkpoint = whole_run[0] / "checkpoints" / "step-000006"
    settings = load_settings(whole_run[0] / "settings.yaml")
    saved = json.loads((checkpoint / "state.json").read_text())["inputs"]
    assert saved["model.name"] == before
    weights = load_file(base / "model.safetensors")
    weights["layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    now = fingerprint_base(str(base))
    require_same_run(checkpoint, settings, saved)
    with pytest.raises(ValueError, match=r"trained on another model.name \(contents \w+, now \w+\); restore"):
        require_same_run(checkpoint, settings, saved | {"model.name": now})

    folder = tmp_path / "checkpoints"
    shutil.copytree(whole_run[0] / "checkpoints", folder)
    state = folder / "step-000006" / "state.json"
    state.write_text(state.read_text().replace('"step": 6', '"step": 1'))
    assert find_checkpoint(folder) == folder / "step-000003"
    state.write_text("[]")
    assert find_checkpoint(folder) == folder / "step-000003"
    record = json.loads((checkpoint / "state.json").read_text())
    del record["sha256"]["this"]
    state.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="step-000006 was saved by another version of this code; go on with that one"):
        find_checkpoint(folder)


def test_damaged_or_foreign_models_are_named(whole_run, recipe, tmp_path):
    settings = load_settings(recipe)
    with pytest.raises(ValueError, match="is the model/ folder of a run, not a base model; .* model.adapter="):
        require_base(str(whole_run[0] / "model"))
    require_base(settings.model.name)
    for name, words in (
        ("adapter_model.safetensors", "is damaged"),
        ("markers.safetensors", "is damaged"),
        ("adapter_config.json", "is damaged"),
    ):
        adapter = tmp_path / name
        shutil.copytree(whole_run[0] / "model", adapter)
        data = (adapter / name).read_bytes()
        (adapter / name).write_bytes(data[: len(data) // 2])
        tokens = read_manifest(Path(settings.data.store)).tokens
        encoder = load_encoder(settings.model, tokens.marker_ids, tokens.marker_subtokens)
        model = dataclasses.replace(settings.model, adapter=str(adapter))
        with pytest.raises(ValueError, match=f"{adapter / name} {words}"):
            choose_trained(encoder, model)
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
            choose_trained(load_encoder(settings.model, tokens.marker_ids, tokens.marker_subtokens), model)
    base = tmp_path / "base"
    shutil.copytree(settings.model.name, base)
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="model.name=.* cannot be loaded: "):
        load_encoder(dataclasses.replace(settings.model, name=str(base)), (), ())


@pytest.mark.parametrize(
    "config, words",
    [
        ({"zero_optimisation": {"stage": 3}}, "'zero_optimisation' is not one of .*; did you mean zero_optimization"),
        ({"zero_optimization": []}, "zero_optimization=.* must be an object"),
        ({"zero_optimization": {"stage": None}}, "stage=None must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "three"}}, "stage='three' must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}, "offload_optimizer must be an object"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload is an old key; write offload_optim"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown='yes' must be true or false"),
        ({"zero_force_ds_cpu_optimizer": False}, "the recipe owns"),
    ],
)
def test_what_deepspeed_would_pass_over_or_stumble_on_is_refused(config, words, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        read_deepspeed_json(path)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_offload_that_keeps_skipped_steps_is_refused(stage, tmp_path):
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}))
    with pytest.raises(ValueError, match=f"offloads the optimizer under ZeRO-{stage}.*zero3_offload.json, or remove"):
        require_exact(config, 1)
    config.write_text(json.dumps({"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "none"}}}))
    require_exact(config, 4)


def test_deepspeed_json_may_not_set_what_the_recipe_owns(tmp_path):
    clash = tmp_path / "clash.json"
    clash.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}))
    with pytest.raises(ValueError, match="sets 'gradient_clipping', which the recipe owns .optim.clip_norm"):
        read_deepspeed_json(clash)
    with pytest.raises(ValueError, match="no such file"):
        read_deepspeed_json(tmp_path / "nothing.json")
    for content, message in ((b"[]", "must hold a JSON object, not list"), (b"\xff", "not valid JSON")):
        clash.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_deepspeed_json(clash)
    for config in sorted((REPOSITORY / "ds_configs").glob("*.json")):
        assert "zero_optimization" in read_deepspeed_json(config)


def test_what_deepspeed_refuses_is_one_clear_message(recipe, tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_sizes": 7}}))
    out = [f"run.deepspeed={wrong}", f"run.output_dir={tmp_path / 'out'}"]
    error = one_error(run_python(TRAIN, ["--config", str(recipe), *COMMON, *out]))
    assert f"run.deepspeed={wrong} is refused by DeepSpeed: reduce_bucket_sizes: Extra inputs are not" in error


def test_other_data_is_refused_on_resume(recipe, whole_run, tmp_path):
    out, store = tmp_path / "out", tmp_path / "store"
    shutil.copytree(whole_run[0], out)
    changed = tmp_path / "data"
    shutil.copytree(recipe.parent / "data", changed)
    lines = (changed / "normal.jsonl").read_text().splitlines(keepends=True)
    (changed / "normal.jsonl").write_text("".join(lines[:-1]))
    where = [f"data.root={changed}", f"data.store={store}"]
    assert preprocess(["--config", str(recipe), *where]) == 0
    result = run_python(TRAIN, ["--config", str(recipe), *COMMON, f"run.output_dir={out}", *where])
    assert "was trained on another data.store (contents " in one_error(result)


def test_absent_tracker_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run.tracker=wandb is not installed"):
        require_tracker("wandb")
    require_tracker("none")


def test_pruning_never_removes_the_newest_and_drops_damaged_later_ones(recipe, tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-000100", "step-000200"):
        (folder / name).mkdir(parents=True)
    trainable = {"w": {"weight": torch.zeros(2), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}
    settings = load_settings(recipe)
    save_checkpoint(folder, TrainState(step=150), trainable, settings, {}, keep_last=1)
    assert [path.name for path in folder.iterdir()] == ["step-000150"]
    assert find_checkpoint(folder) == folder / "step-000150"


def test_learning_rate_warms_up_and_decays():
    linear = OptimSettings(lr=1.0, warmup_steps=4)
    assert [learning_rate(linear, step, 10) for step in (0, 3, 4, 7, 9)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 1 / 6])
    cosine = OptimSettings(lr=1.0, schedule="cosine")
    assert [learning_rate(cosine, step, 4) for step in (0, 2)] == pytest.approx([1.0, 0.5])
