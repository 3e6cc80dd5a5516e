"""The plan printer: every number that it shows is the plan's, and user errors are one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_store import make_settings, make_store, plain_rows

from pipeline import plan_run, preprocess
from pipeline.data.composing import plan_lengths, sequence_ids
from pipeline.data.sampling import make_schedule, plan_step
from pipeline.data.store import open_store
from pipeline.data.tokenizing import load_tokenizer
from pipeline.datatypes import BatchPlan
from pipeline.planning.step_report import query_report, render_prompt
from pipeline.prompts import get_template
from pipeline.settings import load_settings


def scored_store() -> Any:
    rows = [row | {"pos_scores": [0.75], "neg_scores": [0.5, 0.25]} for row in plain_rows(30, 2)]
    clusters = [row | {"category": f"c{i % 3}"} for i, row in enumerate(plain_rows(6, 2, "k"))]
    return make_store({"qa": ("normal", rows), "topics": ("symmetric_clustering", clusters)})


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Arguments of the entry refer to this recipe; store and settings are those of the tests."""
    store = scored_store()
    settings = make_settings(store)

    def load(path: str, overrides: Any) -> Any:
        assert path == "recipe.yaml"
        return replace(settings, run=replace(settings.run, chunk_tokens=int(overrides[0]))) if overrides else settings

    monkeypatch.setattr(plan_run, "load_settings", load)
    monkeypatch.setattr(plan_run, "open_store", lambda path, verify: store)
    monkeypatch.setattr(plan_run, "require_match", lambda store, settings, fingerprint: None)
    return "recipe.yaml"


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert plan_run.main(["--config", "recipe.yaml", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_schedule_table(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys)
    assert " ".join(lines[0].split()) == "dataset type rows batch group in-batch buckets batches/pass steps/epoch"
    assert lines[1].split() == ["qa", "normal", "30", "8", "4", "yes", "1", "4", "4"]
    assert lines[2].split() == ["topics", "symmetric_clustering", "6", "4", "4", "no", "1", "2", "2"]
    assert lines[3] == "6 steps an epoch; examples: in_batch, up to 5 a query"


def slow_count_shown(plan: BatchPlan) -> int:
    """One candidate of another row at a time."""
    groups = [plan.passage_text_P[part] for part in np.split(plan.candidate_C, plan.group_offsets[1:-1])]
    shown = np.split(plan.example_response_E, plan.example_offsets[1:-1])
    return sum(
        text in shown[b].tolist() and text != groups[b][0]
        for b in range(plan.num_queries)
        for other in range(plan.num_queries)
        for text in groups[other].tolist()
        if other != b and plan.in_batch_negatives
    )


def test_step_shows_the_numbers_of_its_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = scored_store()
    schedule = make_schedule(store, make_settings(store))
    for step in range(6):
        plan = plan_step(store, schedule, step)
        lines = output(capsys, "--step", str(step), "--world-size", "2", "150")
        shown = {line[:20].strip(): line[21:] for line in lines[5:]}
        assert shown["dataset"].split()[0] == store.datasets[plan.dataset].name
        assert shown["source lines"] == ", ".join(str(row + 1) for row in plan.row_B)
        assert f"(mean {len(plan.example_row_E) / plan.num_queries:.2f})" in shown["examples per query"]
        assert shown["candidates"].startswith(f"{len(plan.candidate_C)}, 3 to 3 a row")
        assert shown["passages to encode"].startswith(f"{plan.num_passages} (")
        assert int(shown["shown in-batch"].split()[0]) == slow_count_shown(plan)
        total = int(shown["tokens"].split()[0])
        assert shown["tokens"].endswith("padding 0")
        ranks = [shown[f"rank {rank}"] for rank in range(2)]
        assert sum(int(line.split()[0]) for line in ranks) == total
        chunks = [[int(part.split()[0]) for part in line.split(": ")[1].split(", ")] for line in ranks]
        assert {len(c) for c in chunks} == {int(shown["chunks"].split()[0])}
        assert max(max(c) for c in chunks) <= 150 and sum(map(sum, chunks)) == total


def test_query_shows_prompt_and_scored_candidates(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = scored_store()
    schedule = make_schedule(store, make_settings(store))
    step, b, plan = next(
        (step, b, plan)
        for step in range(6)
        for plan in [plan_step(store, schedule, step)]
        for b in range(plan.num_queries)
        if plan.dataset == 0 and plan.example_offsets[b + 1] - plan.example_offsets[b] == 2
    )
    lines = output(capsys, "--step", str(step), "--query", str(b))
    first = int(plan.example_offsets[b])
    e1, e2, own = (f"d-%s{r}{' w' * (r % 9)}" for r in (*plan.example_row_E[first : first + 2], plan.row_B[b]))
    expected = []
    for pair in (e1, e2):
        expected += ["<instruct>find", f"<query>{pair % 'q'}", f"<response>{pair % 'p'}", ""]
    expected += ["<instruct>find", f"<query>{own % 'q'}", "<response>"]
    assert [line[4:] for line in lines if line.startswith("  | ")] == expected
    assert any(line.startswith(f"query                {b}: source line {plan.row_B[b] + 1} of qa") for line in lines)
    candidates = [line.split(maxsplit=2) for line in lines if line.startswith(("  positive", "  negative"))]
    assert candidates[0] == ["positive", "0.75", own % "p"]
    scores = {text.split()[0].rsplit("-", 1)[1]: float(score) for _, score, text in candidates[1:]}
    assert scores == {"0": 0.5, "1": 0.25}


def test_filler_is_shown_as_a_note() -> None:
    store = scored_store()
    schedule = make_schedule(store, make_settings(store, mode="filler"))
    plan = plan_step(store, schedule, 0)
    b = int((plan.example_offsets[1:] - plan.example_offsets[:-1]).argmax())
    text = query_report(store, schedule, plan, b, get_template("bge_en_icl"))
    assert "examples as blank lines of the same length]" in text and text.count("<query>") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "-1"], "--step -1 must be at least 0"),
        (["--query", "1"], "--query 1 needs --step"),
        (["--step", "0", "--query", "99"], "--query 99 is not in step 0: it has queries 0 to"),
        (["--step", "0", "--world-size", "3"], "'qa': batch.queries=8 is not divisible by the world size 3"),
        (["--step", "0", "20"], "run.chunk_tokens=20"),
    ],
)
def test_user_errors_are_one_line(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert plan_run.main(["--config", recipe, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_missing_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_run.main(["--config", "no/such.yaml"]) == 2
    assert capsys.readouterr().err == "error: --config no/such.yaml: no such file\n"


def test_plans_of_a_real_store(tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """From raw files to printed prompts: what is printed is, tokenised, what would be encoded."""
    recipe = str(tiny_recipe(rows=24))
    assert preprocess.main(["--config", recipe]) == 0
    settings = load_settings(recipe)
    store = open_store(settings.data.store)
    schedule = make_schedule(store, settings)
    template = get_template(settings.preprocess.template)
    pt = load_tokenizer(settings.tokenizer_name, template)
    num_compared = num_cut = 0
    for step in range(schedule.steps_per_epoch):
        plan = plan_step(store, schedule, step)
        lengths = plan_lengths(store, schedule.limits, plan)
        for s in range(plan.num_sequences):
            ids = sequence_ids(store, schedule.limits, plan, s).tolist()
            assert len(ids) == lengths[s] and ids[-1:] == list(pt.tokens.eos)
        for b in range(plan.num_queries):
            prompt = render_prompt(store, plan, b, template)
            whole = [*pt.tokens.bos, *pt.tokenizer(prompt, add_special_tokens=False)["input_ids"], *pt.tokens.eos]
            if len(whole) == lengths[b]:
                assert sequence_ids(store, schedule.limits, plan, b).tolist() == whole
                num_compared += 1
            else:
                assert len(whole) > lengths[b], "only cutting may change a length"
                num_cut += 1
    assert num_compared > 50 and num_cut > 0
    capsys.readouterr()
    assert plan_run.main(["--config", recipe, "--step", "2", "--query", "0", "--world-size", "2"]) == 0
    assert f"{store.datasets[plan_step(store, schedule, 2).dataset].name} (" in capsys.readouterr().out
    assert plan_run.main(["--config", recipe, "preprocess.max_query_tokens=60"]) == 2
    assert "preprocess.max_query_tokens: store 64, recipe 60" in capsys.readouterr().err
