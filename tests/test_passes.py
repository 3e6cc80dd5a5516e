"""Chunks of forward passes: their budget, and what happens where memory runs out."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_embedder import EXAMPLES, INSTRUCTION, QUERIES, base, base_embedder  # noqa: F401

from pipeline.datatypes import PackedChunk
from pipeline.inference.embedder import FewShotEmbedder
from pipeline.inference.passes import encode_sequences, make_chunks

CPU_WORDS = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"


class SmallMemory(torch.nn.Module):
    """An encoder on a device that holds `most` tokens of a pass."""

    def __init__(self, encoder: Any, most: int, error: Exception) -> None:
        super().__init__()
        self.encoder, self.most, self.error = encoder, most, error
        self.passes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("encoder"), name) if name != "encoder" else super().__getattr__(name)

    def forward(self, input_ids_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.passes.append(len(input_ids_T))
        if len(input_ids_T) > self.most:
            raise self.error
        return self.encoder(input_ids_T, *rest)


def with_memory(embedder: FewShotEmbedder, most: int, error: Exception) -> FewShotEmbedder:
    return dataclasses.replace(embedder, encoder=SmallMemory(embedder.encoder, most, error))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_WORDS)], ids=["gpu", "cpu"]
)
def test_a_chunk_that_does_not_fit_is_halved_and_counted(
    base: Path,  # noqa: F811
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wide = base_embedder(base, chunk_tokens=4000)
    small = with_memory(wide, 150, error)
    for shots in ([], EXAMPLES):
        caplog.clear()
        small.encoder.passes.clear()
        got_ND = small.encode_queries(QUERIES * 3, INSTRUCTION, shots)
        np.testing.assert_allclose(got_ND, wide.encode_queries(QUERIES * 3, INSTRUCTION, shots), atol=1e-6)
        failed = sum(tokens > 150 for tokens in small.encoder.passes)
        assert (
            failed > 1 and f"memory ran out {failed} times; the chunks were halved (chunk_tokens=4000)" in caplog.text
        )
    caplog.clear()
    with_memory(wide, 4000, error).encode_queries(QUERIES, INSTRUCTION)
    assert caplog.text == ""


def test_a_sequence_that_does_not_fit_is_named_by_its_tokens(base: Path) -> None:  # noqa: F811
    embedder = base_embedder(base)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    longest = max(len(ids) for ids in embedder.compose_queries(QUERIES, INSTRUCTION))
    with pytest.raises(ValueError, match=f"a sequence of {longest} tokens does not fit in memory"):
        with_memory(embedder, longest - 1, error).encode_queries(QUERIES, INSTRUCTION)
    prompts = embedder.compose_queries(QUERIES, INSTRUCTION, EXAMPLES)
    embedder.encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    length = next(iter(embedder.prefixes.values())).length
    with pytest.raises(ValueError, match=f"a sequence of {length} tokens does not fit"):
        with_memory(embedder, length - 1, error).encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    small = with_memory(embedder, 1, error)
    small.prefixes.update(embedder.prefixes)
    rest = max(map(len, prompts)) - length
    with pytest.raises(ValueError, match=f"a sequence of {rest} tokens behind a prefix of {length} does not fit"):
        small.encode_queries(QUERIES, INSTRUCTION, EXAMPLES)


def test_other_errors_pass_through(base: Path) -> None:  # noqa: F811
    embedder = with_memory(base_embedder(base), 10, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        embedder.encode_queries(QUERIES, INSTRUCTION)
    assert len(embedder.encoder.passes) == 1


def test_embeddings_that_are_not_finite_are_counted() -> None:
    def forward(chunk: PackedChunk) -> torch.Tensor:
        return torch.tensor([[float("nan") if length == 3 else 1.0] for length in np.diff(chunk.cu_seqlens)])

    ids = [np.arange(length) for length in (3, 2, 3)]
    with pytest.raises(ValueError, match="2 of 3 embeddings are not finite: the model's weights are damaged"):
        encode_sequences(ids, forward, 100)


def test_ranks_do_not_halve() -> None:
    """They would make unequal numbers of passes, and wait for each other forever."""

    def forward(chunk: PackedChunk) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        encode_sequences([np.arange(3)] * 4, forward, 12, place=(0, 2))


@pytest.mark.parametrize(
    "lengths, chunks",
    [
        ([5, 5, 4, 1], [[0, 1], [2, 3]]),
        ([11, 10, 3], [[0], [1], [2]]),
        ([12, 30, 12], [[0], [1], [2]]),
        ([10], [[0]]),
        ([1] * 12, [list(range(10)), [10, 11]]),
        ([], []),
    ],
)
def test_chunks_by_hand(lengths: list[int], chunks: list[list[int]]) -> None:
    assert make_chunks(range(len(lengths)), lengths, 10) == chunks


def test_the_default_logger_is_silent_without_halving(base: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    caplog.set_level(logging.INFO, logger="pipeline.inference")
    base_embedder(base).encode_passages(["river"])
    assert [record for record in caplog.records if record.name.startswith("pipeline.inference")] == []
