"""Patches and tokens, against loops over voxels."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emae._patches import (
    blank_voxels,
    grid_shape,
    hidden_count,
    patchify,
    positions,
    rotations,
    sample_hidden,
    token_centres_nm,
    unpatchify,
)

sides = st.tuples(*[st.integers(1, 3)] * 3)


def patchify_by_loop(x, patch):
    """Token (i, j, k) is number (i * gy + j) * gx + k: z slowest; so are the voxels in it, channels slowest of all."""
    grid = [s // p for s, p in zip(x.shape[2:], patch)]
    rows = []
    for i, j, k in itertools.product(*map(range, grid)):
        block = x[:, :, i * patch[0] : (i + 1) * patch[0], j * patch[1] : (j + 1) * patch[1],
                  k * patch[2] : (k + 1) * patch[2]]  # fmt: skip
        rows.append(block.reshape(len(x), -1))
    return torch.stack(rows, 1)


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.integers(1, 2), st.integers(1, 2))
def test_patchify_is_the_loop_and_unpatchify_its_inverse(grid, patch, batch, channels):
    shape = [g * p for g, p in zip(grid, patch)]
    x = torch.arange(batch * channels * np.prod(shape), dtype=torch.float32).reshape(batch, channels, *shape)
    tokens = patchify(x, patch)
    assert torch.equal(tokens, patchify_by_loop(x, patch))
    assert torch.equal(unpatchify(tokens, grid, patch), x)
    assert grid_shape(tuple(shape), patch) == grid


def test_token_order_is_that_of_the_positions():
    """Fault 1 of the public code: targets in one order, tokens in another. Write each voxel's place into the crop."""
    patch, grid, nm = (2, 3, 4), (2, 3, 4), (40.0, 8.0, 5.0)
    axes = [(torch.arange(g * p) + 0.5) * s for g, p, s in zip(grid, patch, nm)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # 3 channels: z, y, x in nm of every voxel
    mean = patchify(places[None], patch)[0].reshape(24, 3, -1).mean(-1)
    torch.testing.assert_close(mean, token_centres_nm(grid, patch, nm))


def test_a_patch_must_divide_the_crop():
    with pytest.raises(ValueError, match=r"patch of \(2, 4, 4\) .* crop of \(4, 8, 9\)"):
        grid_shape((4, 8, 9), (2, 4, 4))
    with pytest.raises(ValueError, match="does not divide"):
        patchify(torch.zeros(1, 1, 4, 8, 9), (2, 4, 4))


@pytest.mark.parametrize("tokens, ratio, count", [
    (216, 0.9, 194), (100, 0.75, 75), (4, 0.75, 3), (4, 0.01, 1), (4, 0.99, 3), (10, 0.5, 5),
])
def test_hidden_count_is_exact_and_leaves_both_kinds(tokens, ratio, count):
    assert hidden_count(tokens, ratio) == count
    for seed in range(5):
        assert sample_hidden(tokens, ratio, torch.Generator().manual_seed(seed)).sum() == count


def test_hidden_tokens_are_a_function_of_the_generator_and_uniform():
    def draw(seed):
        return sample_hidden(16, 0.5, torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    one = draw(3)
    torch.manual_seed(2)
    assert torch.equal(one, draw(3)) and not torch.equal(one, draw(4))
    share = torch.stack([draw(s) for s in range(2000)]).float().mean(0)
    assert (share - 0.5).abs().max() < 0.06  # 5 standard deviations of a mean of 2000


def test_positions_belong_to_places_not_to_crops():
    """The same place in nm has the same code in a larger crop, and with other patches."""
    nm, width, waves = (40.0, 8.0, 8.0), 48, (64.0, 16384.0)
    small = positions(token_centres_nm((2, 3, 3), (2, 4, 4), nm), width, waves).view(2, 3, 3, width)
    large = positions(token_centres_nm((4, 6, 5), (2, 4, 4), nm), width, waves).view(4, 6, 5, width)
    assert torch.equal(small, large[:2, :3, :3])
    # a patch of 3 x 12 voxels has its centre where the middle one of 3 x 3 patches of 4 has it
    coarse = positions(token_centres_nm((1, 1, 1), (2, 12, 12), nm), width, waves)
    torch.testing.assert_close(coarse[0], small[0, 1, 1])
    # and voxels half as large in patches of twice as many
    fine = positions(token_centres_nm((2, 3, 3), (4, 8, 8), (20.0, 4.0, 4.0)), width, waves).view(2, 3, 3, width)
    assert torch.equal(fine, small)
    assert not torch.allclose(positions(token_centres_nm((2, 3, 3), (2, 4, 4), (8.0, 8.0, 8.0)), width, waves),
                              small.reshape(-1, width))  # fmt: skip


def test_positions_by_hand():
    """Width 14 = 2 pairs an axis, wavelengths 10 and 1000 nm, 2 left over."""
    code = positions(torch.tensor([[2.5, 0.0, 500.0]]), 14, (10.0, 1000.0))[0]
    sines, cosines = code[:12].view(3, 4)[:, :2], code[:12].view(3, 4)[:, 2:]
    expected = 2 * np.pi * np.array([[2.5 / 10, 2.5 / 1000], [0, 0], [500 / 10, 500 / 1000]])
    np.testing.assert_allclose(sines, np.sin(expected), atol=1e-4)
    np.testing.assert_allclose(cosines, np.cos(expected), atol=1e-4)
    assert code.shape == (14,) and not code[12:].any()
    all_places = positions(token_centres_nm((4, 8, 8), (2, 4, 4), (40.0, 8.0, 8.0)), 24, (64.0, 16384.0))
    distance = torch.cdist(all_places, all_places) + 10 * torch.eye(len(all_places))
    assert distance.min() > 0.05, "two places share a code"


def test_rotations_by_hand():
    """Head width 14 = 7 pairs: 2 an axis, one that stays still."""
    code = rotations(torch.tensor([[2.5, 0.0, 500.0]]), 14, (10.0, 1000.0))[0]
    angles = 2 * np.pi * np.array([2.5 / 10, 2.5 / 1000, 0, 0, 500 / 10, 500 / 1000, 0])
    np.testing.assert_allclose(code, np.exp(1j * angles), atol=1e-4)
    large, small = (rotations(token_centres_nm(g, (2, 4, 4), (40.0, 8.0, 8.0)), 12, (64.0, 8192.0)).view(*g, 6)
                    for g in ((4, 6, 5), (2, 3, 3)))  # fmt: skip
    assert torch.equal(large[:2, :3, :3], small)


def test_blank_voxels_are_whole_sections_of_a_patch():
    x = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1] = -2.0  # a missing section
    x[0, 0, :, :4, 4:] = 1.5  # a border
    x[0, 0, 2, 4:, 4:] = 0.3 + 0.005 * torch.rand(4, 4)  # flat to within the spread
    x[0, 0, 3, 4, 4:] = 0.7  # one constant line is no constant section
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[0, 0, 1] = expected[0, 0, :, :4, 4:] = expected[0, 0, 2, 4:, 4:] = True
    assert torch.equal(unpatchify(blank_voxels(x, (2, 4, 4)), (2, 2, 2), (2, 4, 4)), expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_a_missing_section_is_blank_after_any_transposition(order):
    x = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    x[5] = -2.0
    turned = x.permute(order)
    wanted = patchify((x == -2.0).permute(order)[None, None].float(), (4, 4, 4)).bool()
    assert torch.equal(blank_voxels(turned[None, None], (4, 4, 4)), wanted)
