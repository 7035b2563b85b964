"""Boxes and blocks of voxels: half-open, integer, any number of axes (z, y, x for a volume)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

AXIS_NAMES = "zyx"


@dataclass(frozen=True)
class Box:
    """Half-open box of voxels: start <= voxel < stop on every axis. Empty where stop <= start."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self):
        start, stop = tuple(int(v) for v in self.start), tuple(int(v) for v in self.stop)
        assert len(start) == len(stop), (start, stop)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "stop", stop)

    @classmethod
    def of_shape(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        return len(self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(max(0, b - a) for a, b in zip(self.start, self.stop))

    @property
    def size(self) -> int:
        product = 1
        for side in self.shape:
            product *= side
        return product

    @property
    def is_empty(self) -> bool:
        return self.size == 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in an array; numpy would read a negative start from the other end, so it is refused."""
        assert all(a >= 0 for a in self.start), f"box {self} starts before the array"
        return tuple(slice(a, max(a, b)) for a, b in zip(self.start, self.stop))

    def shift(self, offset: Sequence[int]) -> Box:
        """This box moved by `offset` voxels."""
        assert len(offset) == self.ndim
        return Box(
            tuple(a + o for a, o in zip(self.start, offset)), tuple(b + o for b, o in zip(self.stop, offset))
        )

    def grow(self, margin: int | Sequence[int]) -> Box:
        """`margin` voxels more on both sides of every axis (fewer where negative)."""
        margin = (margin,) * self.ndim if isinstance(margin, int) else tuple(margin)
        assert len(margin) == self.ndim
        return Box(
            tuple(a - m for a, m in zip(self.start, margin)), tuple(b + m for b, m in zip(self.stop, margin))
        )

    def intersect(self, other: Box) -> Box:
        """The voxels in both; an empty box (stop == start on some axis) where there are none."""
        assert self.ndim == other.ndim
        start = tuple(max(a, b) for a, b in zip(self.start, other.start))
        return Box(start, tuple(max(s, min(a, b)) for s, a, b in zip(start, self.stop, other.stop)))

    def contains(self, other: Box) -> bool:
        """Whether every voxel of `other` is in this box (an empty `other` always is)."""
        return other.is_empty or self.intersect(other) == other

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop))


def parse_box(text: str, shape: Sequence[int]) -> Box:
    """The box written "z0:z1,y0:y1,x0:x1" of an array of this `shape`; open ends ("10:,:,:") are its edges.

    ValueError where it is written otherwise, empty, or not inside the array: nothing is clipped.
    """
    wanted = (
        "z0:z1,y0:y1,x0:x1 in voxels, open ends allowed" if len(shape) == 3 else f"{len(shape)} ranges a:b"
    )
    parts = text.replace(" ", "").split(",")
    if len(parts) != len(shape):
        raise ValueError(f"box {text!r} has {len(parts)} ranges, wanted {len(shape)}: {wanted}")
    names = AXIS_NAMES if len(shape) == 3 else [f"axis {k}" for k in range(len(shape))]
    start, stop = [], []
    for name, part, side in zip(names, parts, shape):
        match = re.fullmatch(r"(\d*):(\d*)", part)
        if match is None:
            raise ValueError(f"box {text!r}: cannot read {part!r} for {name}, wanted {wanted}")
        a, b = int(match[1] or 0), int(match[2] or side)
        if b <= a:
            raise ValueError(f"box {text!r}: {name} range {part!r} is empty, wanted start < stop")
        if b > side:
            raise ValueError(
                f"box {text!r}: {name} range {part!r} ends outside the volume, which has {side} voxels there"
            )
        start.append(a)
        stop.append(b)
    return Box(tuple(start), tuple(stop))


@dataclass(frozen=True)
class Block:
    """One unit of blockwise work: `write` belongs to this block alone, `read` is `write` with its halo."""

    index: tuple[int, ...]
    read: Box
    write: Box


def blocks(total: Box, block_shape: Sequence[int], halo: int | Sequence[int]) -> list[Block]:
    """Blocks whose write boxes tile `total` exactly, first axis slowest, the last on each axis cut at its end.

    block_shape, halo: voxels per axis. read = write grown by halo and clipped to `total`.
    """
    block_shape = tuple(block_shape)
    if len(block_shape) != total.ndim or any(side < 1 for side in block_shape):
        raise ValueError(
            f"block shape {block_shape} does not fit box {total}: wanted {total.ndim} sides of 1 or more"
        )
    counts = [-(-side // block) for side, block in zip(total.shape, block_shape)]
    out = []
    for index in itertools.product(*map(range, counts)):
        start = tuple(a + i * side for a, i, side in zip(total.start, index, block_shape))
        write = Box(start, tuple(a + side for a, side in zip(start, block_shape))).intersect(total)
        out.append(Block(index, write.grow(halo).intersect(total), write))
    return out
