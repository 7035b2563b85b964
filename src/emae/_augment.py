"""Augmentation: functions (crop, generator) -> crop, image and labels together.

A crop is a `Crop` of (Z, Y, X) tensors; the geometric functions move all of them, the others touch the image alone.
"""

import itertools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from emae._config import Config


class Crop(NamedTuple):
    """One training sample, all (Z, Y, X)."""

    raw: torch.Tensor
    """float32, normalised"""
    labels: torch.Tensor | None = None
    """int64, 0 = background"""
    valid: torch.Tensor | None = None
    """bool, False where labels are not known"""


class Augmentation(Config):
    """What is done to every crop, in this order; 0 turns a part off."""

    symmetry: bool = True
    """mirror every axis and transpose the axes that share voxel size and crop length: 48 for isotropic data, 16 else"""
    contrast: float = 0.25
    """gain drawn from 1 +- this, for the whole crop"""
    brightness: float = 0.3
    """offset drawn from +- this, in normalised units (percentiles span 4)"""
    section_jitter: float = 0.1
    """the same two, a tenth as likely to be large, for each section by itself: standard deviation"""
    noise: float = 0.25
    """standard deviation of white noise, drawn from 0 to this"""
    blur: float = 0.0
    """probability of a 3 x 3 binomial blur in the section plane"""
    missing_section: float = 0.0
    """probability that one inner section of the crop is blank in the image while its labels stay"""


class Symmetry(NamedTuple):
    """An axis order, then mirrors: x -> x.permute(order).flip(axes)."""

    order: tuple[int, int, int]
    mirror: tuple[bool, bool, bool]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Move the last three axes of `x`."""
        lead = x.ndim - 3
        x = x.permute(*range(lead), *(lead + a for a in self.order))
        axes = [lead + a for a in range(3) if self.mirror[a]]
        return x.flip(axes) if axes else x

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `apply`."""
        lead = x.ndim - 3
        axes = [lead + a for a in range(3) if self.mirror[a]]
        x = x.flip(axes) if axes else x
        back = [self.order.index(a) for a in range(3)]
        return x.permute(*range(lead), *(lead + a for a in back))

    def move(self, offset: tuple[int, int, int]) -> tuple[int, int, int]:
        """Where an offset points after `apply`."""
        z, y, x = (-offset[a] if m else offset[a] for a, m in zip(self.order, self.mirror, strict=True))
        return z, y, x


def symmetries(voxel_size_nm: tuple[float, float, float], shape: tuple[int, int, int]) -> list[Symmetry]:
    """The mirrors and transposes that leave voxel size and shape as they are; the identity comes first."""
    def alike(a: int, b: int) -> bool:
        return abs(voxel_size_nm[a] - voxel_size_nm[b]) < 0.01 * voxel_size_nm[a] and shape[a] == shape[b]

    orders = [o for o in itertools.permutations(range(3)) if all(alike(a, b) for a, b in enumerate(o))]
    return [Symmetry((o[0], o[1], o[2]), m) for o in orders for m in itertools.product((False, True), repeat=3)]


def augment(crop: Crop, config: Augmentation, voxel_size_nm: tuple[float, float, float],
            generator: torch.Generator) -> Crop:
    """The whole chain; the same generator state gives the same crop."""
    if config.symmetry:
        crop = random_symmetry(crop, voxel_size_nm, generator)
    raw = random_intensity(crop.raw, config, generator)
    if config.blur and torch.rand((), generator=generator) < config.blur:
        raw = blur_sections(raw)
    if config.noise:
        raw = raw + torch.randn(raw.shape, generator=generator) * (config.noise * torch.rand((), generator=generator))
    if config.missing_section and torch.rand((), generator=generator) < config.missing_section and len(raw) > 2:
        raw = raw.clone()
        raw[int(torch.randint(1, len(raw) - 1, (), generator=generator))] = -2.0
    return crop._replace(raw=raw)


def random_symmetry(crop: Crop, voxel_size_nm: tuple[float, float, float], generator: torch.Generator) -> Crop:
    group = symmetries(voxel_size_nm, tuple(crop.raw.shape))
    chosen = group[int(torch.randint(len(group), (), generator=generator))]
    return Crop(*(None if part is None else chosen.apply(part).contiguous() for part in crop))


def random_intensity(raw: torch.Tensor, config: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """Gain and offset of the crop, and of each section by itself."""
    gain = 1 + config.contrast * (2 * torch.rand((), generator=generator) - 1)
    offset = config.brightness * (2 * torch.rand((), generator=generator) - 1)
    jitter = config.section_jitter * torch.randn((2, len(raw), 1, 1), generator=generator)
    return raw * (gain * (1 + jitter[0])) + (offset + jitter[1])


def blur_sections(raw: torch.Tensor) -> torch.Tensor:
    """3 x 3 binomial filter in y and x, borders replicated."""
    line = torch.tensor([0.25, 0.5, 0.25])
    x = F.pad(raw[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(F.conv2d(x, line.view(1, 1, 3, 1)), line.view(1, 1, 1, 3))[:, 0]
