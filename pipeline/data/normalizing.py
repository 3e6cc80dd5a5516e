"""When two texts count as the same text: one rule for reserving evaluation rows and for decontamination.

U texts of a store.
"""

import hashlib
import sys
import unicodedata

import numpy as np
from tqdm import tqdm

from pipeline.data.store import TokenStore

_SLICE = 65536
_BLOCK = 1 << 22  # keys
_CACHED = 1 << 18


def normalize_text(text: str) -> str:
    """NFKC, case folded, every run of whitespace one space, none at the ends."""
    if text.isascii():
        return " ".join(text.casefold().split())
    # Folding can bring back what NFKC would change, so NFKC stands on both sides of it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def text_key(text: str) -> int:
    """64 bits of a hash of the normalised text: equal for texts that count as the same, 0 to 2**64 - 1."""
    digest = hashlib.blake2b(normalize_text(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def store_keys(store: TokenStore, bars: bool) -> np.ndarray:
    """`text_key` of every text of a store: uint64 [U]."""
    keys_U = np.empty(store.num_texts, dtype=np.uint64)
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=store.num_texts, desc="normalise", disable=not bars, mininterval=interval, unit="text") as progress:
        for shard, first in zip(store.shards, store.shard_starts.tolist(), strict=False):
            for start in range(0, len(shard.texts), _SLICE):
                texts = shard.texts.slice(start, _SLICE).to_pylist()
                keys_U[first + start : first + start + len(texts)] = [text_key(text) for text in texts]
                progress.update(len(texts))
    return keys_U


def is_among(keys: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
    """Which of the keys stand in the sorted ones, bool: np.isin, which sorts both, without memory beyond a block."""
    found = np.zeros(len(keys), dtype=bool)
    if len(sorted_keys):
        for start in range(0, len(keys), _BLOCK):
            block, here = keys[start : start + _BLOCK], found[start : start + _BLOCK]
            # In order, look-ups in an array beyond the processor's cache take a fifth of the time.
            order = np.argsort(block) if len(sorted_keys) > _CACHED else slice(None)
            place = np.searchsorted(sorted_keys, block[order])
            here[order] = sorted_keys[np.minimum(place, len(sorted_keys) - 1)] == block[order]
    return found
