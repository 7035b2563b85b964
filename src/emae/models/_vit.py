"""The transformer of all models: plain pre-norm blocks over tokens whose places are given in nanometres.

Legend: B batch, N tokens, D width, P voxels of a patch, H heads.
"""

from typing import Literal, NamedTuple

import pydantic
import torch
from torch import nn
from torch.nn import functional as F

from emae._config import Config, Count, Sides
from emae._patches import Triple, grid_shape, patchify, positions, rotations, token_centres_nm


class VitConfig(Config):
    """The encoder: what is transferred from pre-training to fine-tuning."""

    kind: Literal["vit"] = "vit"
    patch: Sides = (4, 16, 16)
    """voxels of one token, z y x"""
    width: Count = 192
    depth: Count = 6
    heads: Count = 6
    mlp_ratio: float = 4.0
    positions: Literal["absolute", "rotary"] = "rotary"
    """absolute: sine-cosine codes added to the tokens; rotary: queries and keys are turned by their place"""
    wavelengths_nm: tuple[float, float] = (128.0, 8192.0)
    """shortest and longest wavelength of the positions"""

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> "VitConfig":
        check_heads(self.width, self.heads, self.positions)
        return self


def check_heads(width: int, heads: int, positions: str) -> None:
    """ValueError unless the heads divide the width and, for rotary positions, are wide enough to turn z, y and x."""
    if width % heads or width < 6:
        raise ValueError(f"{heads} heads do not divide a width of {width}, or it is below 6")
    if positions == "rotary" and (width // heads % 2 or width // heads < 6):
        raise ValueError(f"{heads} heads of a width of {width} are {width // heads} wide each; rotary positions want "
                         "an even head width of 6 or more")


class Places(NamedTuple):
    """Where tokens lie, in the form a configuration wants it."""

    added: torch.Tensor | None
    """(B or 1, N, D), added to the tokens"""
    turned: torch.Tensor | None
    """(B or 1, N, head width / 2) complex, turns queries and keys"""

    def of(self, index_BM: torch.Tensor) -> "Places":
        """The places of some tokens of each sample."""
        return Places(*(None if p is None else
                        p.expand(len(index_BM), -1, -1).gather(1, index_BM[..., None].expand(-1, -1, p.shape[-1]))
                        for p in self))


def places(config: VitConfig, grid: Triple, voxel_size_nm: tuple[float, float, float], width: int, heads: int,
           like: torch.Tensor) -> Places:
    """Of a whole grid of tokens, for a transformer of that width and number of heads, on the device of `like`."""
    centres = token_centres_nm(grid, config.patch, voxel_size_nm)
    if config.positions == "absolute":
        return Places(positions(centres, width, config.wavelengths_nm)[None].to(like), None)
    return Places(None, rotations(centres, width // heads, config.wavelengths_nm)[None].to(like.device))


def turn(x_BHNW: torch.Tensor, turned_BNW: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (first half, second half) of the last axis by the angle of each token and pair."""
    cos, sin = turned_BNW.real[:, None], turned_BNW.imag[:, None]
    a, b = x_BHNW.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        check_heads(width, heads, "absolute")  # a block does not know its positions
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, int(width * mlp_ratio))
        self.down = nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x_BND: torch.Tensor, turned_BNW: torch.Tensor | None = None) -> torch.Tensor:
        B, N, D = x_BND.shape
        q, k, v = self.qkv(self.norm1(x_BND)).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if turned_BNW is not None:
            q, k = turn(q, turned_BNW), turn(k, turned_BNW)
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

    def encode(self, patches_BNP: torch.Tensor, where: Places) -> torch.Tensor:
        """(B, N, P) patches and their places -> (B, N, D) tokens."""
        x = self.embed(patches_BNP)
        x = x if where.added is None else x + where.added
        for block in self.blocks:
            x = block(x, where.turned)
        return self.norm(x)

    def places(self, grid: Triple, voxel_size_nm: tuple[float, float, float]) -> Places:
        """Of a whole grid of tokens."""
        return places(self.config, grid, voxel_size_nm, self.config.width, self.config.heads, self.embed.weight)

    def forward(self, x_BCZYX: torch.Tensor, voxel_size_nm: tuple[float, float, float]) -> torch.Tensor:
        """Every token of a crop: (B, C, Z, Y, X) -> (B, D, gz, gy, gx)."""
        z, y, x = grid_shape(tuple(x_BCZYX.shape[2:]), self.config.patch)
        tokens = self.encode(patchify(x_BCZYX, self.config.patch), self.places((z, y, x), voxel_size_nm))
        return tokens.transpose(1, 2).reshape(len(tokens), -1, z, y, x)
