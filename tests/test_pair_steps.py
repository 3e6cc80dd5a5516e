"""Pairs of a plan: texts and order against the whole pair tokenised, chunks against the pairs, dummies, counts."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.data.packing import deal
from pipeline.data.pair_steps import RELATIONS, choose_relations, compose_pairs, pack_pairs
from pipeline.data.pairs import load_pair_tokenizer
from pipeline.data.sampling import make_schedule, plan_step
from pipeline.data.store import open_store
from pipeline.datatypes import TASK_TYPES
from pipeline.model.merging import plan_route
from pipeline.prompts import BGE_RERANKER, render_pair
from pipeline.settings import ExampleSettings, load_settings


@pytest.fixture(scope="module")
def plans(tiny_store):
    """(store, tokenizer, first plan of each task type), groups of up to four."""
    recipe, folder = tiny_store
    settings = load_settings(recipe)
    batch = dataclasses.replace(settings.batch, group_size=4, examples=ExampleSettings(mode="none"))
    store, found = open_store(folder), {}
    schedule = make_schedule(store, dataclasses.replace(settings, batch=batch))
    for step in range(schedule.steps_per_epoch):
        plan = plan_step(store, schedule, step)
        found.setdefault(plan.task_type, plan)
    return store, load_pair_tokenizer(settings.tokenizer_name, BGE_RERANKER), found


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_pairs_are_the_groups_in_order(task_type, plans):
    """Every query with every candidate of its own, the positive first: the ids of the rendered text."""
    store, pt, found = plans
    plan, relation = found[task_type], RELATIONS[task_type]
    pairs = iter(compose_pairs(store, pt, plan, relation, 10_000))
    for b in range(plan.num_queries):
        for c in range(plan.group_offsets[b], plan.group_offsets[b + 1]):
            texts = store.text(plan.query_text_B[b]), store.text(plan.passage_text_P[plan.candidate_C[c]])
            whole = pt.encoder.tokenizer.encode(render_pair(BGE_RERANKER, *texts, BGE_RERANKER.prompt(relation))).ids
            pair = next(pairs)
            assert pair.ids.tolist() == [*pt.bos, *whole]
            shown = pt.tokenizer.decode(pair.ids[pair.start : pair.stop])
            assert shown.strip() == f"B: {texts[1]}"
    assert next(pairs, None) is None


def test_every_task_type_has_a_question_and_an_unknown_one_is_refused(plans):
    assert set(RELATIONS) == set(TASK_TYPES) and set(RELATIONS.values()) <= dict(BGE_RERANKER.prompts).keys()
    store, pt, found = plans
    with pytest.raises(ValueError, match="relation='x-y' is unknown"):
        compose_pairs(store, pt, found["normal"], "x-y", 100)


def test_a_datasets_question_is_its_entrys_else_its_types(tiny_store):
    recipe, folder = tiny_store
    settings, store = load_settings(recipe), open_store(folder)
    by_type = {table.name: RELATIONS[table.task_type] for table in store.datasets}
    assert choose_relations(store, settings) == by_type and len(set(by_type.values())) > 1
    first, *others = settings.data.datasets
    for entries, wanted in (
        ((dataclasses.replace(first, relation="q-q"), *others), "q-q"),
        (others, by_type[first.name]),
    ):
        changed = dataclasses.replace(settings, data=dataclasses.replace(settings.data, datasets=tuple(entries)))
        assert choose_relations(store, changed) == by_type | {first.name: wanted}


@pytest.mark.parametrize("world_size", [1, 3])
def test_chunks_hold_every_pair_once_within_the_budget(world_size, plans):
    store, pt, found = plans
    limit, budget = 64, 300
    pairs = compose_pairs(store, pt, found["normal"], "q-p", limit)
    assert any(pair.passage_was_cut for pair in pairs) and max(len(pair.ids) for pair in pairs) == limit
    dealt = deal(np.array([len(pair.ids) for pair in pairs]), world_size, budget)
    assert len({len(chunks) for chunks in dealt}) == 1 and len(dealt[0]) > 1
    seen = []
    for sequence_S in (s for chunks in dealt for s in chunks):
        chunk = pack_pairs(sequence_S, pairs)
        assert chunk.num_tokens <= budget
        for i, s in enumerate(chunk.sequence_S.tolist()):
            begin, end = chunk.cu_seqlens[i : i + 2]
            assert chunk.input_ids_T[begin:end].tolist() == pairs[s].ids.tolist()
            assert chunk.passage_S2[i].tolist() == [pairs[s].start, pairs[s].stop]
            seen.append(s)
    assert sorted(seen) == list(range(len(pairs)))


def test_the_dummy_is_a_pair_without_passage():
    chunk = pack_pairs(np.zeros(0, dtype=np.int64), [])
    assert chunk.num_tokens == 0 and chunk.sequence_S.tolist() == [-1]
    route = plan_route(chunk.cu_seqlens, chunk.passage_S2, (1, 2), (1,), 8)
    assert [level.num_tokens for level in route.levels] == [1, 1]
    assert torch.equal(route.levels[1].member_UR[0], torch.zeros(1, dtype=torch.int64))
