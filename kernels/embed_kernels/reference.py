"""Plain PyTorch twins: the truth that kernels are tested against, and the path taken on CPU.

T packed tokens, S sequences, B rows, P distinct passages, C candidates of all rows (ragged), D width.
"""

import torch
from torch import Tensor


def gather_last_token(hidden_TD: Tensor, last_token_S: Tensor, eps: float = 1e-12) -> Tensor:
    """L2-normalised hidden state of each sequence's last token (arXiv 2409.15700, section 3.1: the [EOS] state).

    Args:
        hidden_TD: packed hidden states of any floating type.
        last_token_S: int64 index of each sequence's last token.

    Returns:
        embeddings_SD in fp32 (fp64 for fp64 input), each row of length 1.
    """
    picked_SD = hidden_TD.index_select(0, last_token_S)
    return torch.nn.functional.normalize(picked_SD.to(torch.promote_types(picked_SD.dtype, torch.float32)), eps=eps)


def similarity(
    query_BD: Tensor,
    passage_PD: Tensor,
    candidate_C: Tensor,
    row_C: Tensor,
    scale: float,
    copies_P: Tensor | None,
    exclude_key_B: Tensor,
    key_P: Tensor,
) -> tuple[Tensor, Tensor]:
    """Own-group logits, and the log-sum-exp over everybody else's candidates: all that contrastive losses need.

    A passage that several rows hold as a candidate is one row of `passage_PD` but counts once per copy, as if it had
    been repeated: a copy outside the row's own group adds exp(logit) once.

    Args:
        query_BD, passage_PD: embeddings, fp32. The rows may be one rank's slice; the passages are the whole step's.
        candidate_C, row_C: the rows' own candidates as indices into the passages, and the row each belongs to.
        scale: 1 / temperature.
        copies_P: over all rows of all ranks, how many candidates are a copy of passage p; None where in-batch and
            cross-device candidates take no part, which makes the second result -inf.
        exclude_key_B, key_P: passages whose key equals the row's are left out of the row's second result. With text
            ids as keys these are the duplicates of the row's positive.

    Returns:
        logits_C (scaled similarities of the own groups) and rest_lse_B (natural log; -inf where nothing is left).
    """
    scores_BP = (query_BD @ passage_PD.T) * scale
    logits_C = scores_BP[row_C, candidate_C]
    if copies_P is None:
        return logits_C, torch.full_like(scores_BP[:, 0], float("-inf"))
    weight_BP = copies_P.to(scores_BP.dtype).expand_as(scores_BP).clone()
    weight_BP.index_put_((row_C, candidate_C), -torch.ones_like(logits_C), accumulate=True)
    weight_BP = weight_BP.masked_fill(exclude_key_B[:, None] == key_P[None, :], 0.0)
    masked_BP = scores_BP.masked_fill(weight_BP <= 0, float("-inf"))
    # The shift is finite also for rows with nothing left, whose sum is then 0: no NaN in either direction.
    shift_B = masked_BP.detach().amax(dim=1).clamp_min(torch.finfo(scores_BP.dtype).min)
    sum_B = (weight_BP * torch.exp(masked_BP - shift_B[:, None])).sum(dim=1)
    some_B = sum_B > 0
    lse_B = torch.where(some_B, sum_B, torch.ones_like(sum_B)).log() + shift_B
    return logits_C, torch.where(some_B, lse_B, torch.full_like(lse_B, float("-inf")))
