"""Scores of pairs, at a depth and width chosen with every call (arXiv 2409.15700v1, appendix D).

N pairs.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipeline.data.pairs import ComposedPair, compose_pair, tokenize_pair_pieces
from pipeline.datatypes import PackedChunk
from pipeline.inference.embedder import CHUNK_TOKENS
from pipeline.inference.loading import find_model
from pipeline.inference.passes import encode_sequences
from pipeline.inference.prompting import check_texts, log_changes
from pipeline.inference.reduction import Reduction, choose_reduction, read_setting
from pipeline.inference.reranker_files import load_reranker_weights, read_reranker
from pipeline.model.flop import pair_flop

Pair = tuple[str, str]  # (query, passage)


class LightweightReranker:
    """A reranker that was trained here, or the published one, ready to score.

    >>> reranker = LightweightReranker("BAAI/bge-reranker-v2.5-gemma2-lightweight")
    >>> reranker.score([("who wrote it?", "He did.")], exit_layer=25, compress_layers=(8,), compress_ratio=2)
    """

    def __init__(self, path: str | Path, chunk_tokens: int | None = None, show_progress: bool = True) -> None:
        """Load a reranker onto the GPU, or the CPU where there is none.

        Args:
            path: a run, the folder of a reranker, or the published model as a folder or by its name on the hub.
            chunk_tokens: token budget of one forward pass; None: by device.

        Raises:
            ValueError: no reranker is there, it is an embedder, or its files are damaged or do not belong together.
        """
        folder = find_model(path)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.description, self.tokenizer = read_reranker(folder)
        self.model = load_reranker_weights(folder, self.description, self.device)
        context = self.model.context
        if context is not None and context < self.description.max_pair_tokens:
            raise ValueError(
                f"{folder}: max_pair_tokens={self.description.max_pair_tokens}, but its decoder reads {context} tokens "
                "(max_position_embeddings); restore what training wrote"
            )
        self.chunk_tokens = chunk_tokens or CHUNK_TOKENS[self.device.type]
        self.show_progress = show_progress

    def score(
        self,
        pairs: Sequence[Pair],
        exit_layer: int | None = None,
        compress_layers: Sequence[int] | None = None,
        compress_ratio: int = 1,
        relation: str = "q-p",
    ) -> np.ndarray:
        """How well each passage answers its query: float32 [N], logits of "Yes", in the order of `pairs`.

        A pair that is too long for the model loses the end of its passage, and a query beyond 3/4 of the limit its own;
        the log counts both.

        Args:
            pairs: (query, passage).
            exit_layer: score after so many layers; None: after all.
            compress_layers: layers behind which each `compress_ratio` neighbouring passage tokens become one; None:
                those that the model is meant for. Layers at or above the exit change nothing.
            relation: what is asked of a pair: "q-p" whether the passage answers the query, "q-q" whether two queries
                are the same, "p-p" whether two passages are, "arguana" whether the second argument opposes the first.

        Raises:
            ValueError: not a list of pairs of texts, an unknown relation, or a depth or width that the model has not.
        """
        own = self.description.compress_layers
        reduction = choose_reduction(self.model.exits, own, exit_layer, compress_layers, compress_ratio)
        return self.score_composed(self.compose(pairs, relation), reduction)

    def score_composed(self, composed: Sequence[ComposedPair], reduction: Reduction) -> np.ndarray:
        """As `score`, of what `compose` made, at what `read_setting` gave: for pairs that are scored repeatedly."""
        if not composed:
            return np.zeros(0, dtype=np.float32)
        depth, merges, ratio = reduction
        passage_N2 = np.array([(pair.start, pair.stop) for pair in composed])

        def forward(chunk: PackedChunk) -> torch.Tensor:
            spans_S2 = passage_N2[chunk.sequence_S]
            route = self.model.plan(chunk.cu_seqlens, spans_S2, (depth,), merges, ratio)
            scores: torch.Tensor = self.model(
                torch.from_numpy(chunk.input_ids_T).to(self.device), route.to(self.device)
            )
            return scores

        bar = tqdm(total=len(composed), desc="score pairs", disable=not self.show_progress, leave=False)
        with bar, torch.no_grad():
            ids = [pair.ids for pair in composed]
            return encode_sequences(ids, forward, self.chunk_tokens, done=bar.update)[:, 0]

    def read_setting(self, text: str) -> Reduction:
        """Depth and width by a text: `full`, `light`, or as `exit=18,layers=6+12,ratio=2` (reduction.py).

        Raises:
            ValueError: it is not of that form, or asks what the model has not.
        """
        return read_setting(text, self.model.exits, self.description.compress_layers)

    def count_flop(self, composed: Sequence[ComposedPair], reduction: Reduction) -> float:
        """Arithmetic of scoring these pairs, by formula (pipeline/model/flop.py); arguments as of `score_composed`."""
        if not composed:
            return 0.0
        shape = self.model.shape
        parts_N3 = np.array([(pair.start, pair.stop - pair.start, len(pair.ids) - pair.stop) for pair in composed])
        distinct, counts = np.unique(parts_N3, axis=0, return_counts=True)
        flops = [pair_flop(shape, (q, p, rest), *reduction) for q, p, rest in distinct.tolist()]
        return float(np.dot(flops, counts))

    def compose(self, pairs: Sequence[Pair], relation: str = "q-p") -> list[ComposedPair]:
        """Token ids of all pairs; a query or passage that stands in several is tokenized once. Cut as by `score`."""
        prompt = self.description.template.prompt(relation)
        pt, limit = self.tokenizer, self.description.max_pair_tokens
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):  # a generator would be empty at the second look
            raise ValueError(f"pairs is a {type(pairs).__name__}; give a list of (query, passage)")
        for i, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"pairs[{i}]={pair!r:.80} must be a query and a passage")
        pieces: list[dict[str, list[int]]] = []
        for kind, texts in (("query", [pair[0] for pair in pairs]), ("passage", [pair[1] for pair in pairs])):
            clean = check_texts(texts, "queries" if kind == "query" else "passages")
            distinct = list(dict.fromkeys(clean))
            of_clean = dict(zip(distinct, tokenize_pair_pieces(pt, distinct, kind), strict=True))
            pieces.append({text: of_clean[own] for text, own in zip(texts, clean, strict=True)})
        prompt_ids = tokenize_pair_pieces(pt, [prompt], "prompt")[0]
        composed = [compose_pair(pt, pieces[0][q], pieces[1][p], prompt_ids, limit) for q, p in pairs]
        what = {
            f"are longer than {limit} tokens: their passages were cut": sum(p.passage_was_cut for p in composed),
            f"have queries beyond 3/4 of {limit} tokens, which were cut": sum(p.query_was_cut for p in composed),
        }
        log_changes(+Counter(what), len(composed), "pairs")
        return composed
