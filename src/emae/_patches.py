"""Patches: a crop as tokens and back, which tokens are hidden, where they lie in nanometres.

Legend: B batch, C channels, Z Y X voxels, N tokens in (z, y, x) order, P = C*pz*py*px voxels of a patch.
One order of tokens and one order inside a patch, here and nowhere else.
"""

import math

import torch

Triple = tuple[int, int, int]


def grid_shape(crop_shape: Triple, patch: Triple) -> Triple:
    """Tokens per axis; ValueError where the patch does not divide the crop."""
    if any(c % p for c, p in zip(crop_shape, patch, strict=True)):
        raise ValueError(f"a patch of {tuple(patch)} voxels does not divide a crop of {tuple(crop_shape)} (z, y, x)")
    z, y, x = (c // p for c, p in zip(crop_shape, patch, strict=True))
    return z, y, x


def patchify(x_BCZYX: torch.Tensor, patch: Triple) -> torch.Tensor:
    """(B, C, Z, Y, X) -> (B, N, P); tokens in (z, y, x) order, voxels of a patch in (c, z, y, x) order."""
    B, C = x_BCZYX.shape[:2]
    (gz, gy, gx), (pz, py, px) = grid_shape(tuple(x_BCZYX.shape[2:]), patch), patch
    x = x_BCZYX.reshape(B, C, gz, pz, gy, py, gx, px).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(B, gz * gy * gx, C * pz * py * px)


def unpatchify(x_BNP: torch.Tensor, grid: Triple, patch: Triple) -> torch.Tensor:
    """The inverse of `patchify`: (B, N, P) -> (B, C, Z, Y, X)."""
    (gz, gy, gx), (pz, py, px) = grid, patch
    x = x_BNP.reshape(x_BNP.shape[0], gz, gy, gx, -1, pz, py, px).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(x.shape[0], x.shape[1], gz * pz, gy * py, gx * px)


def hidden_count(tokens: int, ratio: float) -> int:
    """How many of `tokens` are hidden: at least one, and at least one stays visible."""
    return min(max(round(tokens * ratio), 1), tokens - 1)


def sample_hidden(tokens: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """(N,) bool, True = hidden from the encoder; exactly `hidden_count` of them, uniformly at random."""
    hidden = torch.zeros(tokens, dtype=torch.bool)
    hidden[torch.randperm(tokens, generator=generator)[: hidden_count(tokens, ratio)]] = True
    return hidden


def token_centres_nm(grid: Triple, patch: Triple, voxel_size_nm: tuple[float, float, float]) -> torch.Tensor:
    """(N, 3) float32: token centres from the crop's corner, in nanometres, z y x."""
    axes = [(torch.arange(g, dtype=torch.float32) + 0.5) * p * nm
            for g, p, nm in zip(grid, patch, voxel_size_nm, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def positions(centres_nm_N3: torch.Tensor, width: int, wavelengths_nm: tuple[float, float]) -> torch.Tensor:
    """(N, width) fixed sine-cosine code of token centres in nm (Vaswani et al. 2017, per axis, in nm).

    Each axis takes a third of the width (rounded down to sine-cosine pairs; the rest stays 0). Wavelengths run
    geometrically from the shortest to the longest, so the code of a place does not depend on the crop's size.
    """
    pairs = width // 6
    shortest, longest = wavelengths_nm
    steps = torch.linspace(0, 1, pairs) if pairs > 1 else torch.zeros(1)
    frequency = 2 * math.pi / (shortest * (longest / shortest) ** steps)
    phase = centres_nm_N3[:, :, None] * frequency  # (N, 3, pairs)
    code = torch.cat([phase.sin(), phase.cos()], dim=-1).reshape(len(centres_nm_N3), 6 * pairs)
    return torch.nn.functional.pad(code, (0, width - code.shape[1]))


def rotations(centres_nm_N3: torch.Tensor, head_width: int, wavelengths_nm: tuple[float, float]) -> torch.Tensor:
    """(N, head_width // 2) complex: rotary positions of token centres in nm (Su et al. 2021, per axis, in nm).

    Each axis turns a third of the pairs (rounded down; the rest stays still), wavelengths as in `positions`. The
    product of a turned query and a turned key depends on the difference of their places alone.
    """
    pairs = head_width // 6
    shortest, longest = wavelengths_nm
    steps = torch.linspace(0, 1, pairs) if pairs > 1 else torch.zeros(1)
    frequency = 2 * math.pi / (shortest * (longest / shortest) ** steps)
    phase = (centres_nm_N3[:, :, None] * frequency).flatten(1)  # (N, 3 * pairs)
    phase = torch.nn.functional.pad(phase, (0, head_width // 2 - 3 * pairs))
    return torch.polar(torch.ones_like(phase), phase)


def blank_voxels(x_BCZYX: torch.Tensor, patch: Triple, spread: float = 0.01) -> torch.Tensor:
    """(B, N, P) bool, True where a plane of a patch holds nothing: a missing section, a black border.

    Empty means that the voxels of one plane within one patch spread (max - min) by less than `spread`, in units of the
    normalised intensity range. Planes of all three directions count: a crop may have been transposed.
    """
    planes = patchify(x_BCZYX, patch).unflatten(-1, (-1, *patch))  # (B, N, C, pz, py, px)
    blank = torch.zeros_like(planes, dtype=torch.bool)
    for within in ((-2, -1), (-3, -1), (-3, -2)):
        if min(planes.shape[within[0]], planes.shape[within[1]]) > 1:
            blank |= (planes.amax(within, keepdim=True) - planes.amin(within, keepdim=True)) < spread
    return blank.flatten(2)
