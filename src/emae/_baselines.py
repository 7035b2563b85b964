"""Trivial answers to the masked autoencoder's question. A network that does not beat them has learned nothing.

Legend: B batch, C channels, Z Y X voxels, N tokens, M hidden ones, P voxels of a patch.
"""

import torch
from torch.nn import functional as F

from emae._patches import Triple, blank_voxels, grid_shape, patchify, unpatchify
from emae.models._mae import Mae, gather, order_tokens, patch_normalise

SWEEPS = 200
"""Jacobi sweeps; more change the losses by less than a hundredth"""


def interpolate_visible(x_BCZYX: torch.Tensor, hidden_BN: torch.Tensor, patch: Triple,
                        voxel_size_nm: tuple[float, float, float]) -> torch.Tensor:
    """Fill the hidden patches from the visible voxels alone; the visible ones stay as they are.

    The harmonic fill: each hidden voxel is the mean of its six neighbours, weighted by 1 / distance^2 in nm, which is
    linear interpolation in one dimension; SWEEPS Jacobi sweeps from a push-pull start (Gortler et al. 1996: visible
    voxels averaged into coarser and coarser grids, finest axes first, then empty cells filled from the coarser grid).
    Blank voxels (missing sections) are no evidence, unless there are no others.
    """
    grid = grid_shape(tuple(x_BCZYX.shape[2:]), patch)
    blank_BNP = blank_voxels(x_BCZYX, patch)
    visible_BNP = ~hidden_BN[..., None].expand_as(blank_BNP)
    seen_BNP = visible_BNP & ~blank_BNP
    seen_BNP = torch.where(seen_BNP.any(2, keepdim=True).any(1, keepdim=True), seen_BNP, visible_BNP)  # all blank
    weight = unpatchify(seen_BNP, grid, patch).to(x_BCZYX)
    values, weights, factors, pitch = [x_BCZYX * weight], [weight], [], list(voxel_size_nm)
    while bool((weights[-1] == 0).any()) and max(values[-1].shape[2:]) > 1:
        shape = values[-1].shape[2:]
        finest = min(p for p, s in zip(pitch, shape, strict=True) if s > 1)
        factor = [2 if s > 1 and p < 2 * finest else 1 for p, s in zip(pitch, shape, strict=True)]
        pad = [v for s, f in reversed(list(zip(shape, factor, strict=True))) for v in (0, -s % f)]
        total = [F.avg_pool3d(F.pad(part, pad), factor) for part in (values[-1], weights[-1])]
        values.append(total[0])
        weights.append(total[1])
        factors.append(tuple(float(f) for f in factor))
        pitch = [p * f for p, f in zip(pitch, factor, strict=True)]
    filled = values[-1] / weights[-1].clamp_min(1e-12)
    for value, weight, factor in reversed(list(zip(values[:-1], weights[:-1], factors, strict=True))):
        coarse = F.interpolate(filled, scale_factor=factor, mode="trilinear", align_corners=False)
        z, y, x = value.shape[2:]  # odd sides were padded: cut, lest everything shifts
        filled = torch.where(weight > 0, value / weight.clamp_min(1e-12), coarse[..., :z, :y, :x])
    seen = unpatchify(seen_BNP, grid, patch)
    squared = torch.tensor(voxel_size_nm).pow(-2)
    wz, wy, wx = (squared / (2 * squared.sum())).tolist()
    for _ in range(SWEEPS):
        p = F.pad(filled, (1, 1, 1, 1, 1, 1), mode="replicate")
        mean = wz * (p[..., 2:, 1:-1, 1:-1] + p[..., :-2, 1:-1, 1:-1])
        mean += wy * (p[..., 1:-1, 2:, 1:-1] + p[..., 1:-1, :-2, 1:-1])
        mean += wx * (p[..., 1:-1, 1:-1, 2:] + p[..., 1:-1, 1:-1, :-2])
        filled = torch.where(seen, filled, mean)
    return torch.where(unpatchify(visible_BNP, grid, patch), x_BCZYX, filled)


@torch.no_grad()
def trivial_losses(model: Mae, x_BCZYX: torch.Tensor, hidden_BN: torch.Tensor,
                   voxel_size_nm: tuple[float, float, float]) -> dict[str, float]:
    """What three trivial answers would score on the model's own loss, lower is better.

    visible_mean: the mean of the visible voxels of the crop. interpolation: `interpolate_visible`. oracle_mean: the
    true mean of each hidden patch, which no method knows. With a patch-normalised target the means are 0 by definition,
    and the interpolated patch is normalised by its own mean and variance.
    """
    patch = model.config.encoder.patch
    visible_BV, hidden_BM = order_tokens(hidden_BN)
    target_BMP, weight_BMP = model.target(x_BCZYX, hidden_BM)
    patches = patchify(x_BCZYX, patch)
    interpolated = gather(patchify(interpolate_visible(x_BCZYX, hidden_BN, patch, voxel_size_nm), patch), hidden_BM)
    visible = gather(patches, visible_BV)
    if model.config.target == "patch-normalised":
        interpolated = patch_normalise(interpolated, torch.zeros_like(interpolated, dtype=torch.bool))
        mean = oracle = torch.zeros(())
    else:
        seen = (~gather(blank_voxels(x_BCZYX, patch), visible_BV)).to(visible)
        mean = ((visible * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1))[:, None, None]
        oracle = (target_BMP * weight_BMP).sum(-1, keepdim=True) / weight_BMP.sum(-1, keepdim=True).clamp_min(1)

    def loss(answer: torch.Tensor) -> float:
        return float(((answer - target_BMP).square() * weight_BMP).sum() / weight_BMP.sum().clamp_min(1))

    return {"visible_mean": loss(mean), "interpolation": loss(interpolated), "oracle_mean": loss(oracle)}
