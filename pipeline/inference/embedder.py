"""Text to embeddings, zero-shot and few-shot, with the prompts, limits and packing of training.

S sequences, T packed tokens, N texts, D width.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.data.composing import ExampleIds, Ids, Limits, compose_passage, compose_query, compose_start
from pipeline.data.packing import pack_chunk
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer, tokenize_pieces
from pipeline.datatypes import PackedChunk
from pipeline.inference.description import read_description
from pipeline.model.encoder import load_adapter, load_encoder, load_markers, require_rows, why_no_prefix
from pipeline.model.prefix import Prefix
from pipeline.prompts import get_template
from pipeline.settings import ModelSettings, Settings

log = logging.getLogger(__name__)

Example = tuple[str, str]  # (query, response)

# Tokens of one forward pass. On a CPU, larger ones leave the caches: at 8192 tokens the quickstart's model is 5 times
# slower than at 1024.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 16384}
KEPT_PREFIXES = 4  # one of 760 tokens takes 100 MB in Mistral-7B


@dataclass(frozen=True)
class FewShotEmbedder:
    """An encoder with its tokenizer, template and limits; made by `load_embedder` or `load_base_embedder`."""

    encoder: Any  # Encoder, or the engine around one
    tokenizer: PromptTokenizer
    limits: Limits
    device: torch.device
    chunk_tokens: int  # token budget of one forward pass
    show_progress: bool = True
    # (this rank, how many): ranks that share the encoding. Each must make the same calls, and each gets all embeddings.
    place: tuple[int, int] = (0, 1)
    dim: int | None = None  # embeddings are cut to this width and made unit vectors again; None: the full width
    before_pass: Callable[[], None] = lambda: None  # called before every forward pass, on all ranks as often
    # Of the last tasks. Weights must stay as they are meanwhile; init=False: a replaced encoder begins with none.
    prefixes: dict[bytes, Prefix] = field(default_factory=dict, init=False, repr=False)

    def encode_queries(
        self, texts: Sequence[str], instruction: str, examples: Sequence[Example] = (), share_prefix: bool = True
    ) -> np.ndarray:
        """Embed queries behind an instruction and in-context examples of the same task.

        Args:
            texts: N queries.
            instruction: what the task asks for; "" leaves it out.
            examples: (query, response), leftmost first; those that do not fit are dropped from the left and counted.
            share_prefix: encode what all prompts begin with (the examples) once, not once a query; the same embeddings
                but for rounding. Models that cannot do it say so in the log and encode whole prompts.

        Returns:
            float32 [N, D], L2-normalised, in the order of `texts`.
        """
        instruct, shots = self._tokenize_shots(instruction, examples)
        composed = self._compose(texts, instruct, shots)
        prompts = [ids for ids, _ in composed]
        if not (prompts and examples and share_prefix):
            return self._encode(prompts, "queries")
        if reason := why_no_prefix(self.encoder, max(map(len, prompts))):
            log.info("every prompt is encoded whole: %s", reason)
            return self._encode(prompts, "queries")
        embeddings_ND = np.empty((len(prompts), self.dim or self.encoder.width), dtype=np.float32)
        # Long queries drop examples, so their prompts begin otherwise.
        for dropped in sorted({dropped for _, dropped in composed}):
            group = [i for i, (_, d) in enumerate(composed) if d == dropped]
            prefix = self._encode_prefix(compose_start(self.tokenizer.tokens, self.limits, instruct, shots[dropped:]))
            embeddings_ND[group] = self._encode([prompts[i][prefix.length :] for i in group], "queries", prefix)
        return embeddings_ND

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Embed passages: float32 [N, D], L2-normalised, in the order of `texts`."""
        tokens, limit = self.tokenizer.tokens, self.limits.max_passage_tokens
        pieces = tokenize_pieces(self.tokenizer, texts, "passage")
        around = len(tokens.bos) + len(tokens.eos)
        _log_cut("passages", [len(piece) + around for piece in pieces], limit)
        return self._encode([compose_passage(tokens, self.limits, piece) for piece in pieces], "passages")

    def compose_queries(
        self, texts: Sequence[str], instruction: str, examples: Sequence[Example] = ()
    ) -> list[np.ndarray]:
        """Token ids of each query's whole prompt, int64; what was cut or dropped is counted in the log."""
        return [ids for ids, _ in self._compose(texts, *self._tokenize_shots(instruction, examples))]

    def _tokenize_shots(self, instruction: str, examples: Sequence[Example]) -> tuple[Ids, list[ExampleIds]]:
        """Pieces of the instruction and of each example; what is longer than its limit is counted in the log."""
        pt, limits = self.tokenizer, self.limits
        instruct = tokenize_pieces(pt, [instruction], "instruct")[0] if instruction else []
        queries = tokenize_pieces(pt, [query for query, _ in examples], "query")
        responses = tokenize_pieces(pt, [response for _, response in examples], "response")
        _log_cut("example queries", [len(instruct) + len(q) for q in queries], limits.max_example_query_tokens)
        _log_cut("example responses", [len(r) for r in responses], limits.max_example_passage_tokens)
        return instruct, [(instruct, query, response) for query, response in zip(queries, responses, strict=True)]

    def _compose(
        self, texts: Sequence[str], instruct: Ids, shots: Sequence[ExampleIds]
    ) -> list[tuple[np.ndarray, int]]:
        """(ids, examples dropped) of each prompt."""
        pt, limits, tokens = self.tokenizer, self.limits, self.tokenizer.tokens
        pieces = tokenize_pieces(pt, texts, "query")
        around = len(tokens.bos) + len(instruct) + len(tokens.query_end) + len(tokens.eos)
        _log_cut("queries", [len(piece) + around for piece in pieces], limits.max_query_tokens)
        composed = [compose_query(tokens, limits, instruct, piece, shots) for piece in pieces]
        num_short = sum(dropped > 0 for _, dropped in composed)
        if num_short:
            log.info("%d of %d prompts hold fewer than the %d examples (limit)", num_short, len(pieces), len(shots))
        return composed

    def render(self, ids: np.ndarray) -> str:
        """A prompt's ids as the text that the model sees, markers and EOS included."""
        return str(self.tokenizer.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    @torch.no_grad()
    def _encode_prefix(self, ids: np.ndarray) -> Prefix:
        """Keys and values of what several prompts begin with; those of the last few tasks are kept."""
        key = ids.tobytes()
        if key not in self.prefixes:
            while len(self.prefixes) >= KEPT_PREFIXES:
                del self.prefixes[next(iter(self.prefixes))]  # the oldest
            prefix = Prefix(len(ids))
            self._forward(pack_chunk(np.zeros(1, dtype=np.int64), [ids]), prefix)
            self.prefixes[key] = prefix
        return self.prefixes[key]

    def _forward(self, chunk: PackedChunk, prefix: Prefix | None) -> torch.Tensor:
        """embeddings_SD of a chunk, whose sequences stand behind the prefix once that is full."""
        self.before_pass()
        start = prefix.length if prefix is not None and prefix.is_full else 0
        embeddings_SD: torch.Tensor = self.encoder(
            torch.from_numpy(chunk.input_ids_T).to(self.device),
            torch.from_numpy(chunk.position_ids_T + start).to(self.device),
            torch.from_numpy(chunk.cu_seqlens).to(self.device),
            chunk.max_seqlen,
            prefix,
        )
        return embeddings_SD

    @torch.no_grad()
    def _encode(self, ids: Sequence[np.ndarray], what: str, prefix: Prefix | None = None) -> np.ndarray:
        """Encode composed sequences longest first, so that a chunk holds like lengths and memory peaks at once."""
        if not ids:
            return np.zeros((0, self.dim or self.encoder.width), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda s: (-len(ids[s]), s))
        chunks = _chunks(order, [len(i) for i in ids], self.chunk_tokens)
        rank, num_ranks = self.place
        # Equally many passes a rank, which ZeRO-3 needs: the last round repeats chunks where there are too few.
        mine = [min(first + rank, len(chunks) - 1) for first in range(0, len(chunks), num_ranks)]
        found: dict[int, np.ndarray] = {}
        with tqdm(total=len(ids), desc=f"encode {what}", disable=not self.show_progress, leave=False) as bar:
            for number in mine:
                sequence_S = chunks[number]
                chunk = pack_chunk(np.array(sequence_S), [ids[s] for s in sequence_S])
                embeddings_SD = self._forward(chunk, prefix)
                if self.dim is not None:
                    embeddings_SD = torch.nn.functional.normalize(embeddings_SD[:, : self.dim], dim=1)
                found[number] = embeddings_SD.float().cpu().numpy()
                bar.update(len(sequence_S))
        if num_ranks > 1:
            everyone: list[Any] = [None] * num_ranks
            torch.distributed.all_gather_object(everyone, found)
            found = {number: rows for part in everyone for number, rows in part.items()}
        sorted_ND = np.concatenate([found[number] for number in range(len(chunks))])
        embeddings_ND = np.empty_like(sorted_ND)
        embeddings_ND[order] = sorted_ND
        return embeddings_ND


def load_embedder(
    path: str | Path, chunk_tokens: int | None = None, show_progress: bool = True, dim: int | None = None
) -> FewShotEmbedder:
    """A trained embedder from a run folder or from its model/ folder.

    Args:
        dim: a width of loss.matryoshka_dims, to which embeddings are cut (arXiv 2205.13147).

    Raises:
        ValueError: the folder holds no trained embedder, or this width was not trained.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / "model").is_dir():
        folder = folder / "model"
    description = read_description(folder)
    if dim is not None and dim not in description.matryoshka_dims:
        trained = ", ".join(map(str, description.matryoshka_dims)) or "the full width alone"
        raise ValueError(f"dim={dim} was not trained in {folder} (loss.matryoshka_dims: {trained}); take one that was")
    # The saved tokenizer holds the markers already; which of them have trained rows is known from the saved tokens.
    tokenizer = load_tokenizer(str(folder), description.template)
    if description.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder}: the tokenizer files have fingerprint {tokenizer.fingerprint[:12]}, the model was trained with "
            f"{description.fingerprint[:12]}; restore the files that training wrote"
        )
    tokenizer = dataclasses.replace(tokenizer, tokens=description.tokens)
    embedder = _build(description.model, tokenizer, description.limits, chunk_tokens, show_progress)
    load_markers(embedder.encoder, folder)
    if description.model.trained == "lora":
        load_adapter(embedder.encoder, folder)
    embedder.encoder.to(embedder.device).eval()
    return dataclasses.replace(embedder, dim=dim)


def load_base_embedder(
    settings: Settings, chunk_tokens: int | None = None, show_progress: bool = True
) -> FewShotEmbedder:
    """The untrained base model of a recipe, with the recipe's template and limits."""
    tokenizer = load_tokenizer(settings.tokenizer_name, get_template(settings.preprocess.template))
    limits = Limits.from_settings(settings.preprocess)
    embedder = _build(settings.model, tokenizer, limits, chunk_tokens, show_progress)
    require_rows(embedder.encoder, tokenizer.largest_id)
    return embedder


def _build(
    model: ModelSettings, tokenizer: PromptTokenizer, limits: Limits, chunk_tokens: int | None, show_progress: bool
) -> FewShotEmbedder:
    longest = max(limits.max_prompt_tokens, limits.max_passage_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_TOKENS[device.type], longest)
    if chunk_tokens < longest:
        raise ValueError(f"a chunk of {chunk_tokens} tokens cannot hold the model's longest sequence, {longest} tokens")
    encoder = load_encoder(model, tokenizer.tokens.marker_ids, tokenizer.tokens.marker_subtokens, device.type)
    encoder.to(device).eval()
    return FewShotEmbedder(encoder, tokenizer, limits, device, chunk_tokens, show_progress)


def _chunks(order: Sequence[int], lengths: Sequence[int], chunk_tokens: int) -> list[list[int]]:
    """Consecutive sequences of `order` in chunks of at most `chunk_tokens` tokens."""
    chunks: list[list[int]] = [[]]
    room = chunk_tokens
    for s in order:
        if lengths[s] > room:
            chunks.append([])
            room = chunk_tokens
        chunks[-1].append(s)
        room -= lengths[s]
    return chunks


def _log_cut(what: str, lengths: Sequence[int], limit: int) -> None:
    num_cut = sum(length > limit for length in lengths)
    if num_cut:
        log.info("%d of %d %s are longer than %d tokens and were cut", num_cut, len(lengths), what, limit)
