"""Dealing and packing: every sequence exactly once, equal chunk counts, budget kept, whatever the lengths."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.packing import deal, pack_chunk

BUDGET = 100


def check_deal(lengths: list[int], world_size: int) -> list[list[np.ndarray]]:
    length_S = np.array(lengths, dtype=np.int64)
    ranks = deal(length_S, world_size, BUDGET)
    assert len(ranks) == world_size
    assert len({len(chunks) for chunks in ranks}) == 1, "unequal chunk counts hang ZeRO-3"
    chunks = [chunk for rank in ranks for chunk in rank]
    assert all(length_S[chunk].sum() <= BUDGET for chunk in chunks)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(lengths)))
    assert all(chunk.dtype == np.int64 for chunk in chunks)
    return ranks


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, BUDGET), max_size=80), st.integers(1, 9))
@example([51] * 7, 2)  # no two fit together: the start count from the total is too small
@example([100] * 5, 4)
@example([100, 1], 1)
@example([7], 8)
@example([], 3)
def test_deal_any_lengths(lengths: list[int], world_size: int) -> None:
    check_deal(lengths, world_size)


def test_fewer_sequences_than_ranks_leaves_empty_chunks() -> None:
    ranks = check_deal([5, 9], 4)
    assert [len(chunks) for chunks in ranks] == [1, 1, 1, 1]
    assert sum(len(chunks[0]) == 0 for chunks in ranks) == 2


def test_two_that_do_not_fit_together_need_a_chunk_each() -> None:
    assert len(check_deal([51] * 4, 2)[0]) == 2
    assert len(check_deal([50] * 4, 2)[0]) == 1


def test_chunk_count_is_near_the_least_possible_and_ranks_are_even() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 4000)
    for world_size in (1, 2, 3, 8):
        ranks = check_deal(lengths.tolist(), world_size)
        least = -(-int(lengths.sum()) // (world_size * BUDGET))
        assert least <= len(ranks[0]) <= least * 1.03 + 1
        totals = [sum(int(lengths[chunk].sum()) for chunk in chunks) for chunks in ranks]
        assert max(totals) - min(totals) <= 30


def test_chunks_are_dealt_so_that_ranks_are_even() -> None:
    ranks = check_deal([100, 90, 20, 10], 2)
    assert [[c.tolist() for c in chunks] for chunks in ranks] == [[[0], [3]], [[1], [2]]]


def test_deal_is_deterministic_and_ties_go_by_number() -> None:
    first, second = deal(np.full(6, 10), 2, 40), deal(np.full(6, 10), 2, 40)
    assert [[c.tolist() for c in r] for r in first] == [[c.tolist() for c in r] for r in second]
    assert [[c.tolist() for c in r] for r in first] == [[[0, 2, 4]], [[1, 3, 5]]]


def test_a_sequence_above_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 101 tokens.*run.chunk_tokens=100"):
        deal(np.array([3, 101]), 2, BUDGET)
    with pytest.raises(ValueError, match="world size 0"):
        deal(np.array([3]), 0, BUDGET)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_packed_chunk_gives_every_sequence_back(sequences: list[list[int]]) -> None:
    numbers = np.arange(len(sequences))[::-1] + 4
    chunk = pack_chunk(numbers, [np.array(s, dtype=np.int32) for s in sequences])
    assert chunk.num_tokens == sum(map(len, sequences)) == len(chunk.input_ids_T) == len(chunk.position_ids_T)
    assert chunk.max_seqlen == max(map(len, sequences))
    assert chunk.sequence_S.tolist() == numbers.tolist()
    assert chunk.cu_seqlens.dtype == np.int32 and chunk.input_ids_T.dtype == chunk.position_ids_T.dtype == np.int64
    for i, sequence in enumerate(sequences):
        part = slice(chunk.cu_seqlens[i], chunk.cu_seqlens[i + 1])
        assert chunk.input_ids_T[part].tolist() == sequence
        assert chunk.position_ids_T[part].tolist() == list(range(len(sequence)))


def test_an_empty_chunk_holds_one_dummy_token() -> None:
    chunk = pack_chunk(np.array([], dtype=np.int64), [])
    assert chunk.input_ids_T.tolist() == [0] and chunk.position_ids_T.tolist() == [0]
    assert chunk.cu_seqlens.tolist() == [0, 1] and chunk.sequence_S.tolist() == [-1] and chunk.max_seqlen == 1
    assert chunk.num_tokens == 0
