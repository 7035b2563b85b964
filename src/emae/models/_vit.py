"""The transformer of all models: plain pre-norm blocks over tokens whose places are given in nanometres.

Legend: B batch, N tokens, D width, P voxels of a patch, H heads.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from emae._config import Config, Count, Sides
from emae._patches import Triple, patchify, positions, token_centres_nm


class VitConfig(Config):
    """The encoder: what is transferred from pre-training to fine-tuning."""

    kind: Literal["vit"] = "vit"
    patch: Sides = (4, 16, 16)
    """voxels of one token, z y x"""
    width: Count = 192
    depth: Count = 6
    heads: Count = 6
    mlp_ratio: float = 4.0
    wavelengths_nm: tuple[float, float] = (64.0, 16384.0)
    """shortest and longest wavelength of the sine-cosine positions"""


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); optionally only some tokens ask and are returned."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        if width % heads or width < 6:
            raise ValueError(f"{heads} heads do not divide a width of {width}, or it is below 6")
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, int(width * mlp_ratio))
        self.down = nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        B, N, D = x_BND.shape
        q, k, v = self.qkv(self.norm1(x_BND)).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x_BND + self.project(attended.transpose(1, 2).reshape(B, N, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer, as MAE does (He et al. 2022)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class Vit(nn.Module):
    """Tokens in, tokens out. It sees the tokens it is given and nothing else."""

    def __init__(self, config: VitConfig, channels: int = 1):
        super().__init__()
        pz, py, px = config.patch
        self.config = config
        self.embed = nn.Linear(channels * pz * py * px, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        initialise(self)

    def encode(self, patches_BNP: torch.Tensor, positions_BND: torch.Tensor) -> torch.Tensor:
        """(B, N, P) patches and (B or 1, N, D) positions -> (B, N, D) tokens."""
        x = self.embed(patches_BNP) + positions_BND
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def positions(self, grid: Triple, voxel_size_nm: tuple[float, float, float]) -> torch.Tensor:
        """(1, N, D) for a whole grid of tokens."""
        centres = token_centres_nm(grid, self.config.patch, voxel_size_nm)
        code = positions(centres, self.config.width, self.config.wavelengths_nm)
        return code[None].to(self.embed.weight)

    def forward(self, x_BCZYX: torch.Tensor, voxel_size_nm: tuple[float, float, float]) -> torch.Tensor:
        """Every token of a crop: (B, C, Z, Y, X) -> (B, D, gz, gy, gx)."""
        z, y, x = (s // p for s, p in zip(x_BCZYX.shape[2:], self.config.patch, strict=True))
        tokens = self.encode(patchify(x_BCZYX, self.config.patch), self.positions((z, y, x), voxel_size_nm))
        return tokens.transpose(1, 2).reshape(len(tokens), -1, z, y, x)
