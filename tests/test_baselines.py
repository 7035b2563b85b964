"""The trivial answers, by hand on tiny crops; none of them may look at what is hidden."""

import itertools

import numpy as np
import pytest
import torch

from emae._baselines import interpolate_visible, trivial_losses
from emae._patches import patchify, sample_hidden, unpatchify
from emae.models._mae import Mae, MaeConfig, order_tokens
from emae.models._vit import VitConfig

NM, ISO = (40.0, 8.0, 8.0), (8.0, 8.0, 8.0)


def mae(patch, target="pixels"):
    torch.manual_seed(0)
    return Mae(MaeConfig(encoder=VitConfig(patch=patch, width=12, depth=1, heads=2), decoder_width=12, decoder_depth=1,
                         decoder_heads=2, target=target))  # fmt: skip


def hide(tokens, *numbers):
    hidden = torch.zeros(1, tokens, dtype=torch.bool)
    hidden[0, list(numbers)] = True
    return hidden


@pytest.mark.parametrize("nm", [NM, ISO])
@pytest.mark.parametrize("shape, patch", [((4, 16, 16), (2, 4, 4)), ((6, 20, 12), (2, 4, 4)), ((8, 8, 8), (4, 4, 4))])
def test_interpolation_never_looks_at_hidden_voxels(shape, patch, nm):
    grid = tuple(s // p for s, p in zip(shape, patch))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, *shape, generator=generator)
    hidden = torch.stack([sample_hidden(int(np.prod(grid)), 0.75, generator) for _ in range(2)])
    filled = interpolate_visible(x, hidden, patch, nm)
    tokens = patchify(x, patch)
    other = unpatchify(torch.where(hidden[..., None], torch.tensor(1e6), tokens), grid, patch)
    assert torch.equal(interpolate_visible(other, hidden, patch, nm), filled)
    out = patchify(filled, patch)
    assert torch.equal(out[~hidden], tokens[~hidden]), "visible voxels stay as they are"
    assert torch.isfinite(filled).all() and out[hidden].abs().max() <= tokens[~hidden].abs().max() + 1e-5
    tokens = tokens + (~hidden[..., None]).float()  # a visible voxel does matter
    again = patchify(interpolate_visible(unpatchify(tokens, grid, patch), hidden, patch, nm), patch)
    torch.testing.assert_close(again[hidden], out[hidden] + 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 20, 36), (6, 20, 20)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_linear_ramp_is_nearly_right(shape, axis):
    """Single hidden patches inside a ramp of 1 a voxel: far better than the mean, and not shifted."""
    patch = (2, 4, 4)
    grid = tuple(s // p for s, p in zip(shape, patch))
    ramp = torch.arange(float(shape[axis])).view([-1 if a == axis else 1 for a in range(3)]).expand(shape)[None, None]
    ramp = ramp + 0.02 * torch.rand(shape, generator=torch.Generator().manual_seed(0))  # constant sections are blank
    hidden = torch.zeros(1, *grid, dtype=torch.bool)
    hidden[0, 1::2, 1:-1:3, 1:-1:3] = True
    hidden = hidden.flatten(1)
    error = patchify(interpolate_visible(ramp, hidden, patch, NM) - ramp, patch)[hidden]
    assert error.abs().max() < (1.6 if axis else 2.1), "within a patch's half-width of a ramp"
    if axis:
        assert error.mean().abs() < 0.35, "interpolation is shifted"


def test_interpolation_by_hand_between_two_columns():
    """One row of 4 patches of 1 voxel, the two inner ones hidden: 0 ? ? 12 is a straight line."""
    x = torch.tensor([0.0, 99, 99, 12]).view(1, 1, 1, 1, 4)
    out = interpolate_visible(x, hide(4, 1, 2), (1, 1, 1), ISO)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 4, 8, 12]), atol=1e-4, rtol=0)


def test_only_one_patch_visible():
    x = torch.zeros(1, 1, 2, 8, 8)
    x[0, 0, :, :4, :4] = 5.0
    hidden = hide(4, 1, 2, 3)
    assert torch.equal(interpolate_visible(x, hidden, (2, 4, 4), NM), torch.full_like(x, 5.0))


def test_a_missing_section_is_no_evidence():
    """Voxels without an image are visible, but nobody would interpolate from them."""
    x = 1.0 + 0.1 * torch.rand(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1] = -4.0
    hidden = sample_hidden(32, 0.75, torch.Generator().manual_seed(1))[None]
    filled = interpolate_visible(x, hidden, (2, 4, 4), NM)
    gone = unpatchify(hidden[..., None].expand(-1, -1, 32).float(), (2, 4, 4), (2, 4, 4)) > 0
    assert filled[gone].min() > 0.99 and filled[gone].max() < 1.11
    assert bool((filled[0, 0, 1][~gone[0, 0, 1]] == -4).all()), "visible voxels stay as they are"


def test_losses_by_hand():
    """1 x 2 x 4 voxels, patches of 1 x 2 x 1, two hidden. Visible: (0, 2) and (4, 6), their mean 3."""
    x = torch.tensor([[0.0, 1, 4, 8], [2, 5, 6, 10]]).view(1, 1, 1, 2, 4)
    hidden = hide(4, 1, 3)
    losses = trivial_losses(mae((1, 2, 1)), x, hidden, ISO)
    assert losses["visible_mean"] == pytest.approx(((1 - 3) ** 2 + (5 - 3) ** 2 + (8 - 3) ** 2 + (10 - 3) ** 2) / 4)
    assert losses["oracle_mean"] == pytest.approx((4 + 4 + 1 + 1) / 4)
    filled = interpolate_visible(x, hidden, (1, 2, 1), ISO)
    assert losses["interpolation"] == pytest.approx(float((filled - x)[..., [1, 3]].square().mean()))


@pytest.mark.parametrize("target", ["pixels", "patch-normalised"])
def test_losses_are_the_models_own_loss(target):
    """Make the network give the trivial answer: its loss is then the trivial one. Blank voxels count in neither."""
    patch, grid = (2, 4, 4), (2, 4, 4)
    x = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0, 2] = -2.0
    x[1, 0, :, :, :4] = 0.5
    hidden = torch.stack([sample_hidden(32, 0.5, torch.Generator().manual_seed(s)) for s in range(2)])
    model = mae(patch, target)
    losses = trivial_losses(model, x, hidden, NM)
    kept = patchify(torch.ones_like(x), patch)
    for b, n in itertools.product(range(2), range(32)):
        block = patchify(x, patch)[b, n].view(2, 16)
        kept[b, n] = ((block.amax(1) - block.amin(1)) >= 0.01).float().repeat_interleave(16)
    tokens, index = patchify(x, patch), order_tokens(hidden)[1]
    answers = {}
    if target == "pixels":
        seen = kept * ~hidden[..., None]
        mean = (tokens * seen).sum((1, 2)) / seen.sum((1, 2))
        answers["visible_mean"] = mean[:, None, None].expand(2, 16, 32)
        rows = index[..., None].expand(-1, -1, 32)
        hid, keep = tokens.gather(1, rows), kept.gather(1, rows)
        answers["oracle_mean"] = ((hid * keep).sum(-1) / keep.sum(-1).clamp_min(1))[..., None].expand(2, 16, 32)
        answers["interpolation"] = patchify(interpolate_visible(x, hidden, patch, NM), patch).gather(1, rows)
    else:
        answers["visible_mean"] = answers["oracle_mean"] = torch.zeros(2, 16, 32)
    for name, answer in answers.items():
        model.reconstruct = lambda *args, a=answer: (a, index)
        assert losses[name] == pytest.approx(model(x, hidden, NM).item(), rel=1e-4), name
    assert grid and set(losses) == {"visible_mean", "interpolation", "oracle_mean"}


def test_interpolation_beats_the_mean_on_smooth_tissue_and_not_on_noise():
    generator = torch.Generator().manual_seed(0)
    place = torch.stack(torch.meshgrid(*[torch.arange(float(s)) for s in (8, 64, 64)], indexing="ij"))
    smooth = torch.sin(place[1] / 9) * torch.cos(place[2] / 11) + 0.1 * place[0]
    hidden = sample_hidden(4 * 8 * 8, 0.75, generator)[None]
    model = mae((2, 8, 8))
    losses = trivial_losses(model, smooth[None, None], hidden, NM)
    assert losses["interpolation"] < 0.45 * losses["visible_mean"]
    noise = trivial_losses(model, torch.randn(1, 1, 8, 64, 64, generator=generator), hidden, NM)
    assert 1 < noise["interpolation"] < 1.2 and noise["visible_mean"] == pytest.approx(1, abs=0.05)


def test_interpolation_is_the_harmonic_fill():
    """Against scipy's sparse solution of the same equations on a small crop; copying the nearest voxel is worse."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import spsolve

    field = gaussian_filter(np.random.default_rng(0).normal(size=(8, 24, 24)), (0.7, 3, 3)).astype(np.float32)
    x = torch.from_numpy(field / field.std())[None, None]
    patch, grid = (2, 4, 4), (4, 6, 6)
    hidden = sample_hidden(144, 0.6, torch.Generator().manual_seed(1))[None]
    where = unpatchify(hidden[..., None].expand(-1, -1, 32), grid, patch)[0, 0].numpy()
    number = np.arange(x.numel()).reshape(8, 24, 24)
    rows, columns, weights = [], [], []
    for axis, size in enumerate(NM):
        for a, b in ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1))):
            here, there = (tuple(s if k == axis else slice(None) for k in range(3)) for s in (a, b))
            rows.append(number[here].ravel()), columns.append(number[there].ravel())
            weights.append(np.full(rows[-1].size, size**-2))
    matrix = coo_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))).tocsr()
    laplace = diags(np.asarray(matrix.sum(1)).ravel()) - matrix
    inside, values = where.ravel(), x.numpy().ravel().astype(np.float64)
    wanted = spsolve(laplace[inside][:, inside].tocsc(), -laplace[inside][:, ~inside] @ values[~inside])
    ours = interpolate_visible(x, hidden, patch, NM)[0, 0].numpy()
    assert np.abs(ours[where] - wanted).max() < 0.05
    nearest = distance_transform_edt(where, sampling=NM, return_distances=False, return_indices=True)
    true = x[0, 0].numpy()
    assert ((ours - true)[where] ** 2).mean() < 0.95 * ((true[tuple(nearest)] - true)[where] ** 2).mean()
