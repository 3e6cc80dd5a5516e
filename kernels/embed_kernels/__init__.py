"""Fused embedding kernels in Triton, each with a plain PyTorch twin in `reference`."""

from embed_kernels.dispatch import Impl, gather_last_token, gather_similarity, require_impl, similarity

__all__ = ["Impl", "gather_last_token", "gather_similarity", "require_impl", "similarity"]
