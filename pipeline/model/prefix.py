"""A prefix that many sequences share, encoded once: later tokens see its keys and values beside their own sequence's.

Attention over two sets of keys is exact from the attention over each and their log-sum-exps a and b (Hydragen, arXiv
2402.05099, section 3.1): (e^a out_a + e^b out_b) / (e^a + e^b). Over the prefix there is no mask, so all tokens of all
sequences are one block of queries, and nobody gets a copy of the prefix's keys and values.

T packed tokens, P tokens of the prefix, H heads, G heads of keys and values, K head width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Prefix:
    """Keys (after rotation) and values of the prefix in every layer; a forward pass over the prefix alone fills it."""

    length: int  # P
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [P, G, K]
    values: dict[int, Tensor] = field(default_factory=dict)
    is_full: bool = False

    def add(self, layer: int, key_PGK: Tensor, value_PGK: Tensor) -> None:
        """Keep one layer's keys and values."""
        assert len(key_PGK) == self.length and layer not in self.keys
        self.keys[layer], self.values[layer] = key_PGK.detach(), value_PGK.detach()

    @property
    def num_bytes(self) -> int:
        """Memory of the whole prefix."""
        tensors = [*self.keys.values(), *self.values.values()]
        return sum(t.numel() * t.element_size() for t in tensors)


def attend_prefix(query_THK: Tensor, key_PGK: Tensor, value_PGK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every token to all of the prefix: (out [T, H, K], log-sum-exp [T, H] in fp32)."""
    num_tokens, num_heads, width = query_THK.shape
    groups = num_heads // key_PGK.shape[1]
    # The heads that share a head of keys become more rows of it.
    rows = query_THK.view(num_tokens, -1, groups, width).permute(1, 2, 0, 3).reshape(1, -1, groups * num_tokens, width)
    key, value = (x.transpose(0, 1)[None] for x in (key_PGK, value_PGK))
    out, lse = attend_rows(rows, key, value, scale, causal=False)
    out = out[0].view(-1, groups, num_tokens, width).permute(2, 0, 1, 3).reshape(num_tokens, num_heads, width)
    lse = lse[0].view(-1, groups, num_tokens).permute(2, 0, 1).reshape(num_tokens, num_heads)
    return out, lse


def attend_rows(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of a block: query [1, H, T, K], key and value [1, H, P, K] -> (out, log-sum-exp [1, H, T] in fp32)."""
    if query.device.type == "cpu":
        # What torch's own attention runs on a CPU, which otherwise keeps the log-sum-exp to itself.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return attend_rows_plainly(query, key, value, scale, causal)


def attend_rows_plainly(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The same in plain operations."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        length = scores.shape[-1]
        above = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """One attention from two over different keys: outs [T, H, K], log-sum-exps [T, H]."""
    share = torch.sigmoid(lse_a - lse_b)[..., None]  # e^a / (e^a + e^b)
    return (share * out_a.float() + (1 - share) * out_b.float()).to(out_a.dtype)
