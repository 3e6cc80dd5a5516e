"""The gate of a reranker's export: fixed pairs through every form, at every exit, compared with the trained engine.

W widths (every token; every merge of the description at once), N pairs with each relation, E exits.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.data.pairs import PairTokenizer, compose_pair, tokenize_pair_pieces
from pipeline.datatypes import PackedChunk
from pipeline.inference.gate import ADAPTER, GATE_FILE, MERGED, Check, adapter_norm
from pipeline.inference.passes import encode_sequences
from pipeline.inference.reranker import LightweightReranker
from pipeline.inference.reranker_files import RerankerDescription, read_reranker
from pipeline.model.merging import Route
from pipeline.model.reranker import Reranker

log = logging.getLogger(__name__)

Score = Callable[[torch.Tensor, Route], torch.Tensor]  # input_ids_T, route -> scores_SE

# Answers, near misses and strangers, so that scores spread; scripts, lengths, and characters tokenizers trip over.
GATE_PAIRS = (
    ("What is the capital of France?", "Paris is the capital and largest city of France."),
    ("What is the capital of France?", "France is famous for its wine and its cheese, and so is Italy."),
    ("What is the capital of France?", "def add(a, b):\n    return a + b  # tabs\tand spaces"),
    ("Wie heisst der hoechste Berg der Alpen?", "Der Mont Blanc ist mit 4806 Metern der hoechste Berg der Alpen."),
    ("Wie heisst der hoechste Berg der Alpen?", "Die Elbe entspringt im Riesengebirge."),
    ("植物如何制造有机物？", "光合作用是植物利用光能把二氧化碳和水转化为有机物的过程。"),
    ("植物如何制造有机物？", "Фотосинтез происходит в хлоропластах."),
    ("ما هو تركيب الماء؟", "يتكون الماء من ذرتي هيدروجين وذرة أكسجين."),
    ("who wrote Faust", "An emoji 🙂, a ligature ﬁ, and a combining accent e\u0301."),
    ("who wrote Faust", "Faust is a tragic play in two parts by Johann Wolfgang von Goethe. " + "It is long. " * 30),
    ("how do I add two numbers in Python", "def add(a, b):\n    return a + b  # tabs\tand spaces"),
    ("a", "b"),
)
RATIO = 2  # tokens to one behind each of the layers that merge
# Agreement asked for, by the type that was trained in: 1.4 % of the scores' standard deviation as error, or 17 %. With
# bf16, rounding alone took 0.012 of 14 layers of SmolLM2-135M briefly trained and then merged (another 0.005 of the
# same adapter in two types); two neighbouring heads exchanged took 0.07, one altered question of four 0.28.
LEAST = {"fp32": 0.9998, "bf16": 0.97}


def gate_scores(
    reranker: Reranker,
    score: Score,
    pt: PairTokenizer,
    description: RerankerDescription,
    device: torch.device,
    chunk_tokens: int,
    place: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Scores of the gate's pairs, all exits in each pass: float32 [W, N, E].

    Args:
        score: `reranker`, or the engine around it, on all ranks together.
        chunk_tokens, place: as of `encode_sequences`.
    """
    pieces = []
    for half, kind in enumerate(("query", "passage")):
        pieces.append(tokenize_pair_pieces(pt, [pair[half] for pair in GATE_PAIRS], kind))
    prompts = tokenize_pair_pieces(pt, [prompt for _, prompt in pt.template.prompts], "prompt")
    limit = description.max_pair_tokens
    pairs = [compose_pair(pt, q, p, prompt, limit) for prompt in prompts for q, p in zip(*pieces, strict=True)]
    passage_N2 = np.array([(pair.start, pair.stop) for pair in pairs])

    def forward(chunk: PackedChunk, layers: tuple[int, ...], ratio: int) -> torch.Tensor:
        route = reranker.plan(chunk.cu_seqlens, passage_N2[chunk.sequence_S], None, layers, ratio)
        return score(torch.from_numpy(chunk.input_ids_T).to(device), route.to(device))

    found, ids = [], [pair.ids for pair in pairs]
    layers = description.compress_layers
    for width in [((), 1), (layers, RATIO)] if layers else [((), 1)]:
        with torch.no_grad():
            narrowed = partial(forward, layers=width[0], ratio=width[1])
            found.append(encode_sequences(ids, narrowed, chunk_tokens, place))
    return np.stack(found)


def agreement(truth_WNE: np.ndarray, found_WNE: np.ndarray) -> np.ndarray:
    """Share of the variance over pairs that is left unharmed, 1 - error^2 / variance: float [W, E].

    Taken for each exit and width by itself. Against the spread, because what a reranker is for lies in differences
    between scores, which can be small beside the scores; never above the squared correlation, and below it where scores
    are shifted or stretched, which thresholds and sums with other scores would feel.
    """
    error_WE = ((found_WNE - truth_WNE) ** 2).sum(1, dtype=np.float64)
    variance_WE = ((truth_WNE - truth_WNE.mean(1, keepdims=True)) ** 2).sum(1, dtype=np.float64)
    return 1 - error_WE / np.maximum(variance_WE, np.finfo(np.float32).tiny)


def run_reranker_gate(model: Path, out: Path) -> list[Check]:
    """Compare what was exported with the engine at the end of training, form by form, at every exit.

    Raises:
        ValueError: a form cannot be loaded, or the engine's scores are of other pairs or exits.
    """
    trained, _ = read_reranker(model)
    found = {}
    alike = True
    for name in (ADAPTER, MERGED):
        own = LightweightReranker(out / name, show_progress=False)
        found[name] = gate_scores(own.model, own.model, own.tokenizer, trained, own.device, own.chunk_tokens)
        alike &= replace(own.description, model=trained.model, base_fingerprint=trained.base_fingerprint) == trained
        del own  # two of them would fill a device
    engine = model / GATE_FILE
    if engine.is_file():
        truth_WNE = np.load(engine)
    else:
        log.warning("%s is missing: what was trained is compared as it was saved, not with the engine", engine)
        truth_WNE = found[ADAPTER]
    checks = [Check("norm of the adapter's B matrices", adapter_norm(model), 1e-6)]
    for name, found_WNE in found.items():
        if found_WNE.shape != truth_WNE.shape:
            raise ValueError(
                f"{engine} holds scores of other pairs or exits ({truth_WNE.shape}, not {found_WNE.shape}), of another "
                "version perhaps; remove it to compare with what was saved"
            )
        checks += _checks(name, agreement(truth_WNE, found_WNE), trained)
    checks.append(Check("template, tokenizer, limit and exits", float(alike), 1.0))
    return checks


def _checks(form: str, agreement_WE: np.ndarray, trained: RerankerDescription) -> list[Check]:
    """A line a width, with its worst exit."""
    lines, least = [], LEAST[trained.model.dtype]
    for agreement_E, width in zip(agreement_WE, ("every token", f"{RATIO} to 1"), strict=False):
        worst = int(agreement_E.argmin())
        exit_layer = trained.first_exit + worst
        lines.append(Check(f"{form}, {width}, exit {exit_layer} (the worst)", float(agreement_E[worst]), least))
    return lines
