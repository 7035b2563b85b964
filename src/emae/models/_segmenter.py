"""The light segmenter: a small U-Net whose deepest level is the token grid of the pre-trained transformer.

It never works at full resolution: the crop enters by space-to-depth (the stem) and leaves by depth-to-space, which is
where other 3D segmenters spend most of their time. Strides follow the patch: the product of all is the patch, so the
transformer's tokens and the deepest features lie on one grid. Kernels reach across sections only where voxels are
near isotropic, or once a level on the way up.

Legend: B batch, C channels, K output channels, Z Y X voxels.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from emae._config import Config, Sides
from emae._patches import Triple, patchify
from emae.models._vit import Vit, VitConfig

GROUPS = 8
"""of channels that are normalised together"""


class SegmenterConfig(Config):
    """Encoder (transferred), convolutional path, and how deep it goes."""

    kind: Literal["segmenter"] = "segmenter"
    encoder: VitConfig = VitConfig()
    channels: tuple[int, ...] = (48, 96, 128)
    """features of each level, finest first; levels beyond the patch's own halvings are not built"""
    stem: Sides = (1, 4, 4)
    """space-to-depth of the raw crop"""


def level_strides(patch: Triple, stem: Triple, voxel_size_nm: tuple[float, float, float]) -> list[Triple]:
    """Down-sampling between levels, 1 or 2 an axis: axes with the smallest voxels first, until the patch is reached.

    level_strides((4, 16, 16), (1, 2, 2), (40, 8, 8)) -> [(1, 2, 2), (2, 2, 2), (2, 2, 2)]
    """
    left = [p // s for p, s in zip(patch, stem, strict=True)]
    if any(p % s or n & (n - 1) for p, s, n in zip(patch, stem, left, strict=True)):
        raise ValueError(f"stem {stem} times a power of two must be the patch {patch}, on every axis")
    pitch = [nm * s for nm, s in zip(voxel_size_nm, stem, strict=True)]
    strides = []
    while max(left) > 1:
        finest = min(p for p, n in zip(pitch, left, strict=True) if n > 1)
        most = max(left)
        # an axis is halved when its voxels are as fine as the finest, or when it must be to end with the others
        stride = [2 if n > 1 and (p < 2 * finest or n >= most) else 1 for p, n in zip(pitch, left, strict=True)]
        left = [n // s for n, s in zip(left, stride, strict=True)]
        pitch = [p * s for p, s in zip(pitch, stride, strict=True)]
        strides.append(tuple(stride))
    return strides


class Residual(nn.Module):
    """x + convolution(relu(convolution(norm(x)))). One norm and one activation: on a CPU their memory traffic costs as
    much as the convolutions themselves."""

    def __init__(self, width: int, kernels: tuple[Triple, Triple]):
        super().__init__()
        first, second = kernels
        self.norm = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv3d(width, width, first, padding=tuple(k // 2 for k in first))
        self.conv2 = nn.Conv3d(width, width, second, padding=tuple(k // 2 for k in second))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.conv1(self.norm(x)), inplace=True)
        return self.conv2(y).add_(x)


class Pointwise(nn.Conv3d):
    """A convolution whose kernel is its stride, as one matrix product: torch has no fast one of these at batch 1."""

    def __init__(self, inputs: int, outputs: int, stride: Triple = (1, 1, 1)):
        super().__init__(inputs, outputs, stride, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.kernel_size == (1, 1, 1) else space_to_depth(x, self.kernel_size)
        return F.linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class Segmenter(nn.Module):
    """(B, 1, Z, Y, X) normalised raw -> (B, K, Z, Y, X) logits. The crop must be a multiple of the patch."""

    def __init__(self, config: SegmenterConfig, outputs: int, voxel_size_nm: tuple[float, float, float]):
        super().__init__()
        self.config, self.outputs, self.voxel_size_nm = config, outputs, tuple(voxel_size_nm)
        self.strides = level_strides(config.encoder.patch, config.stem, voxel_size_nm)
        if len(config.channels) < len(self.strides) + 1:
            raise ValueError(f"channels {config.channels}: a patch of {config.encoder.patch} with the stem "
                             f"{config.stem} has {len(self.strides) + 1} levels")
        widths = config.channels[: len(self.strides) + 1]
        if any(w % GROUPS for w in widths):
            raise ValueError(f"channels {config.channels}: want multiples of {GROUPS}")
        pitches = [[nm * s for nm, s in zip(voxel_size_nm, config.stem, strict=True)]]
        for stride in self.strides:
            pitches.append([p * s for p, s in zip(pitches[-1], stride, strict=True)])
        flat = [(1 if p[0] > 1.2 * min(p[1:]) else 3, 3, 3) for p in pitches]
        full = (3, 3, 3)
        stem_voxels = torch.Size(config.stem).numel()

        self.encoder = Vit(config.encoder)
        self.stem = nn.Conv3d(stem_voxels, widths[0], flat[0], padding=tuple(k // 2 for k in flat[0]))
        self.down = nn.ModuleList(Residual(w, (f, f)) for w, f in zip(widths[:-1], flat[:-1], strict=True))
        self.pool = nn.ModuleList(
            Pointwise(a, b, s) for a, b, s in zip(widths[:-1], widths[1:], self.strides, strict=True))
        self.from_tokens = Pointwise(config.encoder.width, widths[-1])
        self.bottom = Residual(widths[-1], (full, full))
        self.lift = nn.ModuleList(Pointwise(b, a) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.up = nn.ModuleList(Residual(w, (f, full)) for w, f in zip(widths[:-1], flat[:-1], strict=True))
        self.head = Pointwise(widths[0], outputs * stem_voxels)
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, x_BCZYX: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(x_BCZYX, self.voxel_size_nm)
        x = self.stem(space_to_depth(x_BCZYX, self.config.stem))
        skips = []
        for block, pool in zip(self.down, self.pool, strict=True):
            skips.append(block(x))
            x = pool(skips[-1])
        x = self.bottom(x + self.from_tokens(tokens))
        for block, lift, stride in reversed(list(zip(self.up, self.lift, self.strides, strict=True))):
            x = F.interpolate(lift(x), scale_factor=tuple(float(s) for s in stride), mode="nearest")
            x = block(x + skips.pop())
        return depth_to_space(self.head(F.relu(x, inplace=True)), self.config.stem)


def space_to_depth(x_BCZYX: torch.Tensor, stem: Triple) -> torch.Tensor:
    """(B, C, Z, Y, X) -> (B, C*sz*sy*sx, Z/sz, Y/sy, X/sx)."""
    z, y, x = (n // s for n, s in zip(x_BCZYX.shape[2:], stem, strict=True))
    tokens = patchify(x_BCZYX, stem)  # (B, N, C*s), channels last already
    return tokens.view(len(tokens), z, y, x, -1).permute(0, 4, 1, 2, 3)


def depth_to_space(x_BCZYX: torch.Tensor, stem: Triple) -> torch.Tensor:
    """The inverse of `space_to_depth`."""
    (B, C, Z, Y, X), (sz, sy, sx) = x_BCZYX.shape, stem
    x = x_BCZYX.view(B, -1, sz, sy, sx, Z, Y, X).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, C // (sz * sy * sx), Z * sz, Y * sy, X * sx)
