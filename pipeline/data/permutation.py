"""Keyed permutations that are computed per index: a shuffle of any size without a stored table.

A Feistel network permutes the numbers of 2 * h bits; cycle walking (apply it again until the result is below n)
restricts it to 0 .. n - 1. The domain is below 4 * n, so an index needs fewer than four applications on average.
"""

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6


def mix_key(*parts: int) -> int:
    """Hash integers of any sign and size to 64 bits; (1, 2) and (2, 1) and (1, 2, 0) differ."""
    state = len(parts)
    for part in parts:
        state = _mix_int((state * 0x2545F4914F6CDD1D + (part & _MASK) + _GOLDEN) & _MASK)
    return state


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Image of `index` under the permutation of 0 .. n - 1 that `key` names.

    Args:
        index: integers in 0 .. n - 1, any shape.
        n: size of the permuted range, 1 or more.
        key: from `mix_key`.

    Returns:
        int64 array of the same shape; memory and time go with `index`, not with n.
    """
    index = np.asarray(index, dtype=np.int64)
    assert n >= 1 and (index.size == 0 or (int(index.min()) >= 0 and int(index.max()) < n))
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    image = _feistel(index.reshape(-1).astype(np.uint64), half, key)
    while len(outside := np.flatnonzero(image >= n)):
        image[outside] = _feistel(image[outside], half, key)
    return image.astype(np.int64).reshape(index.shape)


def _feistel(value: np.ndarray, half: int, key: int) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = value >> shift, value & mask
    for r in range(_ROUNDS):
        round_key = np.uint64(_mix_int((key + (r + 1) * _GOLDEN) & _MASK))
        # The high bits of the mixed word depend on all bits of its input.
        left, right = right, left ^ (_mix_array(right ^ round_key) >> np.uint64(64 - half))
    return (left << shift) | right


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    """The same mixing (splitmix64's finaliser) on uint64 arrays, where products wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
