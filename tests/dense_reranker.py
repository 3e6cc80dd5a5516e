"""A reranker's scores in loops over layers, pairs and tokens, on a padded batch: the truth of the tests.

Padding stands on the right, masks are matrices, attention is transformers' own eager one; of ours only the heads'
weights are used. S pairs, L tokens of the longest pair, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dense_loss import DenseStep
from torch import Tensor

from pipeline.settings import LossSettings


@dataclass(frozen=True)
class Pair:
    """Token ids of a pair, whose passage is ids[start:stop]."""

    ids: Sequence[int]
    start: int
    stop: int


def dense_scores(
    reranker: Any, pairs: Sequence[Pair], exits: Sequence[int], compress_layers: Sequence[int], ratio: int
) -> Tensor:
    """[S, exits]."""
    base = reranker.decoder.base_model.model if hasattr(reranker.decoder, "peft_config") else reranker.decoder
    packed = base.config._attn_implementation
    base.set_attn_implementation("eager")
    spans = [(pair.start, pair.stop) for pair in pairs]
    sequences = [base.embed_tokens(torch.tensor(pair.ids)) for pair in pairs]
    columns = {}
    for i in range(max(exits)):
        if i in compress_layers:
            sequences = [_merge(rows, *span, ratio) for rows, span in zip(sequences, spans, strict=True)]
            spans = [(start, start + -(-(stop - start) // ratio)) for start, stop in spans]
        sequences = _layer(base, i, sequences)
        last_SD = base.norm(torch.stack([rows[-1] for rows in sequences]))
        if i + 1 in exits:
            columns[i + 1] = last_SD @ reranker.heads.weight_HD[i + 1 - reranker.heads.first_exit]
    base.set_attn_implementation(packed)
    scores = torch.stack([columns[k] for k in sorted(columns)], dim=1)
    cap = getattr(base.config, "final_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _merge(rows_LD: Tensor, start: int, stop: int, ratio: int) -> Tensor:
    means = [rows_LD[i : min(i + ratio, stop)].mean(0) for i in range(start, stop, ratio)]
    return torch.stack([*rows_LD[:start], *means, *rows_LD[stop:]])


def _layer(base: Any, i: int, sequences: Sequence[Tensor]) -> list[Tensor]:
    """One layer on the padded batch; the rows of each pair, without padding."""
    longest = max(map(len, sequences))
    batch_SLD = torch.stack([torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows))) for rows in sequences])
    window = _window(base.config, i)
    mask = torch.full((len(sequences), 1, longest, longest), float("-inf"))
    for s, rows in enumerate(sequences):
        for query in range(longest):
            for key in range(longest):
                seen = key <= query and key < len(rows) and (window is None or query - key < window)
                if seen or key == query:  # a row of padding sees itself: a row without any key would be NaN
                    mask[s, 0, query, key] = 0.0
    positions = torch.arange(longest)[None].expand(len(sequences), -1)
    turns = base.rotary_emb(batch_SLD, positions)
    out_SLD = base.layers[i](batch_SLD, attention_mask=mask, position_ids=positions, position_embeddings=turns)
    return [out_SLD[s, : len(rows)] for s, rows in enumerate(sequences)]


def _window(config: Any, i: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[i] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def dense_reranker_loss(score_CE: Tensor, step: DenseStep, loss: LossSettings) -> Tensor:
    """The loss of a whole step, one row and one exit at a time."""
    rows, taught = [], []
    groups = score_CE.split([len(group) for group in step.groups])
    for group, own_CE, scores in zip(step.groups, groups, step.scores, strict=True):
        others = [i for i, p in enumerate(group) if i and step.text_P[p] != step.text_P[group[0]]]
        kept_GE = own_CE[[0, *others]]
        last_G = torch.softmax(kept_GE[:, -1].detach(), dim=0)
        for e in range(score_CE.shape[1]):
            log_G = kept_GE[:, e] - torch.logsumexp(kept_GE[:, e], dim=0)
            divergence = (last_G * (last_G.log() - log_G)).sum() if e < score_CE.shape[1] - 1 else 0.0
            rows.append(-log_G[0] + divergence)
            if scores is not None:
                wanted = torch.tensor([scores[i] for i in [0, *others]], dtype=score_CE.dtype)
                taught.append(-(torch.softmax(wanted / loss.teacher_temperature, dim=0) * log_G).sum())
    total = torch.stack(rows).mean()
    return total + loss.distillation_weight * torch.stack(taught).mean() if taught else total
