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
    group_offsets: Tensor,
    scale: float | Tensor,
    copies_P: Tensor | None,
    exclude_keys: tuple[Tensor, Tensor] | None = None,
    require_keys: tuple[Tensor, Tensor] | None = None,
    threshold_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Own-group logits and the log-sum-exp of the rest, as `embed_kernels.similarity` describes; holds B x P matrices.

    Inputs below fp32 are widened first, so logits are fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(query_BD.dtype, torch.float32)
    query_BD, passage_PD = query_BD.to(wide), passage_PD.to(wide)
    row_C = torch.repeat_interleave(
        torch.arange(len(query_BD), device=query_BD.device), group_offsets.diff(), output_size=len(candidate_C)
    )
    if copies_P is None:
        logits_C = (query_BD[row_C] * passage_PD[candidate_C]).sum(dim=1) * scale
        return logits_C, torch.full_like(query_BD[:, 0], float("-inf"))
    if len(passage_PD) == 0:
        return query_BD.new_empty(0), torch.full_like(query_BD.sum(dim=1), float("-inf"))
    cosine_BP = query_BD @ passage_PD.T
    scores_BP = cosine_BP * scale
    logits_C = scores_BP[row_C, candidate_C]
    weight_BP = copies_P.to(wide).expand_as(scores_BP).clone()
    weight_BP.index_put_((row_C, candidate_C), -torch.ones_like(logits_C), accumulate=True)
    if exclude_keys is not None:
        weight_BP = weight_BP.masked_fill(exclude_keys[0][:, None] == exclude_keys[1][None, :], 0.0)
    if require_keys is not None:
        weight_BP = weight_BP.masked_fill(require_keys[0][:, None] != require_keys[1][None, :], 0.0)
    if threshold_B is not None:
        weight_BP = weight_BP.masked_fill(cosine_BP > threshold_B[:, None], 0.0)
    masked_BP = scores_BP.masked_fill(weight_BP <= 0, float("-inf"))
    # The shift is finite also for rows with nothing left, whose sum is then 0: no NaN in either direction.
    shift_B = masked_BP.detach().amax(dim=1).clamp_min(torch.finfo(wide).min)
    sum_B = (weight_BP * torch.exp(masked_BP - shift_B[:, None])).sum(dim=1)
    none_B = sum_B == 0  # false for NaN, which must show
    lse_B = torch.where(none_B, torch.ones_like(sum_B), sum_B).log() + shift_B
    return logits_C, torch.where(none_B, torch.full_like(lse_B, float("-inf")), lse_B)
