"""The masked autoencoder (He et al. 2022) in three dimensions, anisotropic patches, places in nanometres.

Legend: B batch, N tokens, V visible and M hidden ones (N = V + M), D encoder width, E decoder width, P voxels of
a patch.
"""

from typing import Literal

import pydantic
import torch
from torch import nn

from emae._config import Config, Count
from emae._patches import Triple, blank_voxels, grid_shape, patchify
from emae.models._vit import Block, Vit, VitConfig, check_heads, initialise, places


class MaeConfig(Config):
    """Encoder, decoder, and what the hidden patches are compared with."""

    kind: Literal["mae"] = "mae"
    encoder: VitConfig = VitConfig()
    decoder_width: Count = 96
    decoder_depth: Count = 4
    decoder_heads: Count = 6
    target: Literal["pixels", "patch-normalised"] = "pixels"
    """pixels: normalised grey values; patch-normalised: each hidden patch to mean 0 and variance 1"""

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> "MaeConfig":
        check_heads(self.decoder_width, self.decoder_heads, self.encoder.positions)
        return self


def order_tokens(hidden_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B, V) of the visible and (B, M) of the hidden tokens; every sample hides equally many."""
    count = hidden_BN.sum(1)
    assert bool((count == count[0]).all()), "samples of a batch must hide equally many tokens"
    order = hidden_BN.to(torch.uint8).argsort(dim=1, stable=True)
    visible = hidden_BN.shape[1] - int(count[0])
    return order[:, :visible], order[:, visible:]


def gather(x_BNP: torch.Tensor, index_BM: torch.Tensor) -> torch.Tensor:
    """(B, N, P) and (B, M) -> (B, M, P)."""
    return x_BNP.gather(1, index_BM[..., None].expand(-1, -1, x_BNP.shape[-1]))


def patch_normalise(target_BMP: torch.Tensor, blank_BMP: torch.Tensor) -> torch.Tensor:
    """Each patch to mean 0, variance 1, counted over its voxels that are not blank."""
    weight = (~blank_BMP).to(target_BMP)
    count = weight.sum(-1, keepdim=True).clamp_min(1)
    mean = (target_BMP * weight).sum(-1, keepdim=True) / count
    variance = ((target_BMP - mean).square() * weight).sum(-1, keepdim=True) / count
    return (target_BMP - mean) / (variance + 1e-6).sqrt()


class Mae(nn.Module):
    """encode the visible, place them among mask tokens, decode, compare the hidden."""

    def __init__(self, config: MaeConfig, channels: int = 1):
        super().__init__()
        width, patch_voxels = config.decoder_width, channels * torch.Size(config.encoder.patch).numel()
        self.config = config
        self.encoder = Vit(config.encoder, channels)
        self.to_decoder = nn.Linear(config.encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.decoder = nn.ModuleList(Block(width, config.decoder_heads, 4.0) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width)
        self.to_voxels = nn.Linear(width, patch_voxels)
        for part in (self.to_decoder, self.decoder, self.to_voxels):
            initialise(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def reconstruct(self, x_BCZYX: torch.Tensor, hidden_BN: torch.Tensor,
                    voxel_size_nm: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden patches as the network imagines them, (B, M, P), and their indices, (B, M)."""
        config = self.config.encoder
        visible_BV, hidden_BM = order_tokens(hidden_BN)
        grid = grid_shape(tuple(x_BCZYX.shape[2:]), config.patch)
        where = self.encoder.places(grid, voxel_size_nm)
        seen = self.encoder.encode(gather(patchify(x_BCZYX, config.patch), visible_BV), where.of(visible_BV))

        where = places(config, grid, voxel_size_nm, self.config.decoder_width, self.config.decoder_heads, seen)
        tokens = self.to_decoder(seen)
        x_BNE = self.mask_token.expand(len(seen), hidden_BN.shape[1], -1)
        x_BNE = x_BNE.scatter(1, visible_BV[..., None].expand_as(tokens), tokens)
        x_BNE = x_BNE if where.added is None else x_BNE + where.added
        for block in self.decoder:
            x_BNE = block(x_BNE, where.turned)
        return self.to_voxels(self.norm(gather(x_BNE, hidden_BM))), hidden_BM

    def forward(self, x_BCZYX: torch.Tensor, hidden_BN: torch.Tensor,
                voxel_size_nm: tuple[float, float, float]) -> torch.Tensor:
        """Mean squared error over the hidden voxels that are not blank; a scalar."""
        predicted_BMP, hidden_BM = self.reconstruct(x_BCZYX, hidden_BN, voxel_size_nm)
        target_BMP, weight_BMP = self.target(x_BCZYX, hidden_BM)
        return ((predicted_BMP - target_BMP).square() * weight_BMP).sum() / weight_BMP.sum().clamp_min(1)

    def target(self, x_BCZYX: torch.Tensor, hidden_BM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the hidden patches should be and the weight of each voxel (0 = blank), both (B, M, P)."""
        patch: Triple = self.config.encoder.patch
        target = gather(patchify(x_BCZYX, patch), hidden_BM)
        blank = gather(blank_voxels(x_BCZYX, patch), hidden_BM)
        if self.config.target == "patch-normalised":
            target = patch_normalise(target, blank)
        return target, (~blank).to(target)
