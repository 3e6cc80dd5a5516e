"""What a model gives for many items, in blocks on disk: each block is a file, complete or absent.

I items (texts or pairs), D numbers an item. A block is opened when it is read and closed again: a thousand open maps
would meet the usual limit of open files. Blocks have a fixed size: a model's last bits can depend on what shares a
batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.columns import open_columns, write_columns
from pipeline.mining.folder import progress_bar

BLOCK_ITEMS = 4096

Scored = tuple[np.ndarray, np.ndarray]  # float32 [I, D], and bool [I]: cut to the model's maximum length


@dataclass(frozen=True)
class StoredBlocks:
    """The values of all items as blocks of a folder."""

    folder: Path
    num_items: int
    block_items: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values of items start .. stop - 1 in memory: float32 [stop - start, D]."""
        values_ID = np.empty((stop - start, self.width), dtype=np.float32)
        for number in range(start // self.block_items, -(-stop // self.block_items)):
            offset = number * self.block_items
            first, last = max(start, offset), min(stop, offset + self.block_items)
            values_ID[first - start : last - start] = self._block(number)[0][first - offset : last - offset]
        return values_ID

    def take(self, index: np.ndarray) -> np.ndarray:
        """Values of these items: float32 [len(index), D]."""
        block, within = np.divmod(index, self.block_items)
        order = np.argsort(block, kind="stable")
        edges = np.flatnonzero(np.diff(block[order], prepend=-1, append=-1))
        taken = np.empty((len(index), self.width), dtype=np.float32)
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            here = order[start:stop]
            taken[here] = self._block(int(block[here[0]]))[0][within[here]]
        return taken

    @property
    def width(self) -> int:
        return int(self._block(0)[0].shape[1])

    def count_cut(self) -> int:
        """Items longer than the model reads."""
        return sum(int(self._block(b)[1].sum()) for b in range(-(-self.num_items // self.block_items)))

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(values [n, D], cut [n]) of a block as views of a map that closes with them."""
        columns = open_columns(_path(self.folder, number))
        return columns["value"].reshape(len(columns["cut"]), -1), columns["cut"]


def fill_blocks(
    folder: Path,
    num_items: int,
    compute: Callable[[slice], Scored],
    title: str,
    bars: bool,
    block_items: int = BLOCK_ITEMS,
) -> StoredBlocks:
    """Compute the values of all items into `folder`; blocks that are there already stay.

    Raises:
        ValueError: a value is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(num_items, title, "item", bars) as bar:
        for start in range(0, num_items, block_items):
            part, path = slice(start, min(start + block_items, num_items)), _path(folder, start // block_items)
            if not path.is_file():
                value_ID, cut_I = compute(part)
                assert len(value_ID) == len(cut_I) == part.stop - part.start
                if num_bad := int((~np.isfinite(value_ID)).sum()):
                    raise ValueError(
                        f"{title}: the model gives {num_bad:,} numbers that are not finite; its weights are damaged or "
                        "overflow in their precision"
                    )
                shapes = {"value": ("float32", value_ID.size), "cut": ("uint8", len(cut_I))}
                write_columns(path, shapes, [("value", 0, value_ID.reshape(-1)), ("cut", 0, cut_I)])
            bar.update(part.stop - part.start)
    return StoredBlocks(folder, num_items, block_items)


def _path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:06d}.safetensors"
