"""Targets: what the segmenter is to predict at each voxel, computed from labels, and how far off it is.

Legend: B batch, K output channels, Z Y X voxels. Targets are computed after augmentation, never before.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from emae._config import Config

Offset = tuple[int, int, int]
NEAREST: tuple[Offset, ...] = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))


class Affinities(Config):
    """Does a voxel belong to the same object as its neighbour at `+offset`? One channel an offset."""

    kind: Literal["affinities"] = "affinities"
    offsets: tuple[Offset, ...] = NEAREST
    """(dz, dy, dx) in voxels; the three nearest are needed for agglomeration, longer ones make the training better"""

    @property
    def channels(self) -> int:
        return len(self.offsets)

    def compute(self, labels_BZYX: torch.Tensor, valid_BZYX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Target and where it counts, both (B, K, Z, Y, X) bool."""
        return affinities(labels_BZYX, valid_BZYX, self.offsets)

    def loss(self, logits: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy, averaged over the voxels that count; a scalar."""
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
        return (loss * counts).sum() / counts.sum().clamp_min(1)

    @staticmethod
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()


Target = Affinities  # a union once there are more


def affinities(labels_BZYX: torch.Tensor, valid_BZYX: torch.Tensor,
               offsets: tuple[Offset, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where a voxel and its neighbour at `+offset` share a nonzero label.

    labels: (B, Z, Y, X) integer, 0 = background. valid: the same shape, False where labels are not known.
    Returns affinity and counts, both (B, K, Z, Y, X) bool; counts is False where the neighbour lies outside the crop
    or either voxel is not valid.
    """
    shape = labels_BZYX.shape[1:]
    affinity = torch.zeros((len(labels_BZYX), len(offsets), *shape), dtype=torch.bool, device=labels_BZYX.device)
    counts = torch.zeros_like(affinity)
    for k, offset in enumerate(offsets):
        if any(abs(o) >= s for o, s in zip(offset, shape, strict=True)):
            continue  # no voxel has this neighbour
        here = (slice(None), *(slice(max(0, -o), s - max(0, o)) for o, s in zip(offset, shape, strict=True)))
        there = (slice(None), *(slice(max(0, o), s - max(0, -o)) for o, s in zip(offset, shape, strict=True)))
        affinity[:, k][here] = (labels_BZYX[here] == labels_BZYX[there]) & (labels_BZYX[here] != 0)
        counts[:, k][here] = valid_BZYX[here] & valid_BZYX[there]
    return affinity, counts
