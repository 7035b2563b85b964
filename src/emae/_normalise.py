"""Intensity normalisation: one configuration, stored in the run, applied again at prediction."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pydantic

from emae._config import Config
from emae._geometry import Box
from emae._volume import Volume

SAMPLE_SECTIONS = 32
SAMPLE_EXTENT = 1024


class Normalisation(Config):
    """Which grey values become -2 and 2. Everything a network sees went through this."""

    per: Literal["volume", "section", "dtype"] = "volume"
    """volume: percentiles of a fixed sample of the volume; section: of each section; dtype: the integer type's range"""
    percentiles: tuple[float, float] = (1.0, 99.0)
    invert: bool = False
    """for volumes with bright membranes"""

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> "Normalisation":
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles {self.percentiles}: want 0 <= low < high <= 100")
        return self


@dataclass(frozen=True)
class Levels:
    """Grey values that become -2 (low) and 2 (high): one of each, or one a section of the volume they come from."""

    low: np.ndarray
    high: np.ndarray
    invert: bool

    def apply(self, array: np.ndarray, first_section: int = 0) -> np.ndarray:
        """(Z, Y, X) grey values -> float32, about [-2, 2], clipped to [-4, 4]."""
        low, high = self.low, self.high
        if len(low) > 1:
            rows = slice(first_section, first_section + array.shape[0])
            low, high = low[rows], high[rows]
        scale = (4.0 / (high - low)).astype(np.float32)[:, None, None]
        x = (array.astype(np.float32) - low.astype(np.float32)[:, None, None]) * scale - np.float32(2.0)
        x = np.clip(x, -4.0, 4.0, out=x)
        return np.negative(x, out=x) if self.invert else x


def measure_levels(volume: Volume, config: Normalisation) -> Levels:
    """Read what the configuration needs of a (Z, Y, X) volume: a fixed central sample, never all of it.

    Sections that hold a single value (missing ones) do not count; they take the median of the others.
    ValueError for a volume that is constant.
    """
    if config.per == "dtype":
        if volume.dtype.kind not in "ui":
            raise ValueError(f"{volume.name}: normalisation per dtype needs integers, got {volume.dtype}; "
                             "use per = volume or section")
        info = np.iinfo(volume.dtype)
        return Levels(np.array([float(info.min)]), np.array([float(info.max)]), config.invert)
    depth = volume.shape[0]
    every = 1 if config.per == "section" else max(1, -(-depth // SAMPLE_SECTIONS))
    low, high = np.full(depth, np.nan), np.full(depth, np.nan)
    samples = []
    for z in range(0, depth, every):
        start = [max(0, (s - SAMPLE_EXTENT) // 2) for s in volume.shape[1:]]
        stop = [a + min(SAMPLE_EXTENT, s) for a, s in zip(start, volume.shape[1:], strict=True)]
        box = Box((z, *start), (z + 1, *stop))
        section = volume.read(box)
        if section.min() == section.max():
            continue
        low[z], high[z] = np.percentile(section, config.percentiles)
        if config.per == "volume":
            samples.append(section.ravel()[:: max(1, section.size // 65536)])
    if np.isnan(low).all():
        raise ValueError(f"{volume.name}: constant wherever it was sampled; there is nothing to learn from it")
    if config.per == "volume":
        ends = np.percentile(np.concatenate(samples), config.percentiles)
        low, high = ends[:1], ends[1:]
    else:
        low = np.where(np.isnan(low), np.nanmedian(low), low)
        high = np.where(np.isnan(high), np.nanmedian(high), high)
    flat = high <= low
    if flat.any():
        if flat.all():
            raise ValueError(f"{volume.name}: percentiles {config.percentiles} of its grey values are equal "
                             f"({low[0]:g}); choose others in the normalisation")
        low, high = np.where(flat, np.median(low[~flat]), low), np.where(flat, np.median(high[~flat]), high)
    return Levels(low, high, config.invert)
