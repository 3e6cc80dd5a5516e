"""Fused embedding kernels and their plain PyTorch twins."""

from embed_kernels.reference import gather_last_token, similarity

__all__ = ["gather_last_token", "similarity"]
