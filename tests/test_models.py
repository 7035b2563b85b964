"""What the networks see, what they do not, and what they are asked; the three faults of the public code, caught."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from emae._finetune import transfer
from emae._patches import blank_voxels, patchify, sample_hidden, token_centres_nm, unpatchify
from emae.models._mae import Mae, MaeConfig, gather, order_tokens, patch_normalise
from emae.models._segmenter import Segmenter, SegmenterConfig, depth_to_space, level_strides, space_to_depth
from emae.models._vit import Block, Places, Vit, VitConfig, turn

NM = (40.0, 8.0, 8.0)
PATCH, CROP, GRID = (2, 4, 4), (4, 16, 16), (2, 4, 4)
VIT = VitConfig(patch=PATCH, width=24, depth=1, heads=2)
MAE = MaeConfig(encoder=VIT, decoder_width=24, decoder_depth=1, decoder_heads=2)
SEGMENTER = SegmenterConfig(encoder=VIT, stem=(1, 2, 2), channels=(8, 8))
both_positions = pytest.mark.parametrize("positions", ["absolute", "rotary"])


def placed(config, positions):
    """The configuration with that kind of positions in its encoder."""
    return config.model_copy(update={"encoder": VIT.model_copy(update={"positions": positions})})


@pytest.fixture
def x():
    return torch.randn(2, 1, *CROP, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hidden():
    return torch.stack([sample_hidden(32, 0.75, torch.Generator().manual_seed(s)) for s in (1, 2)])


def built(cls, *args):
    torch.manual_seed(0)
    model = cls(*args).eval()
    for parameter in model.parameters():  # zero-initialised biases and mask tokens would hide faults
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model


def with_patch(x, token, value):
    """The crop with the voxels of one token replaced."""
    tokens = patchify(x, PATCH).clone()
    tokens[:, token] = value
    return unpatchify(tokens, GRID, PATCH)


# ---- the autoencoder


@both_positions
def test_encoder_sees_visible_tokens_only(x, hidden, positions):
    model = built(Mae, placed(MAE, positions))
    with torch.no_grad():
        before, index = model.reconstruct(x, hidden, NM)
        assert before.shape == (2, 24, 32) and torch.equal(index[0], hidden[0].nonzero()[:, 0])
        for token in range(32):
            after, _ = model.reconstruct(with_patch(x, token, 1.7), hidden, NM)
            for b in range(2):
                if hidden[b, token]:
                    assert torch.equal(after[b], before[b]), "a hidden patch was looked at"
                else:
                    assert (after[b] - before[b]).abs().amax(-1).min() > 0, "a visible patch was not looked at"


def test_the_encoder_is_given_no_hidden_token(x, hidden):
    model, lengths = built(Mae, MAE), []
    model.encoder.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape))
    model(x, hidden, NM)
    assert lengths == [(2, 8, 24)]


def test_order_tokens(hidden):
    visible, gone = order_tokens(hidden)
    for b in range(2):
        assert visible[b].tolist() == [n for n in range(32) if not hidden[b, n]]
        assert gone[b].tolist() == [n for n in range(32) if hidden[b, n]]
    with pytest.raises(AssertionError, match="equally many"):
        order_tokens(torch.tensor([[True, False], [True, True]]))


@pytest.mark.parametrize("target", ["pixels", "patch-normalised"])
def test_loss_is_over_hidden_voxels_that_are_not_blank(x, hidden, target):
    """Brute force: paint the prediction into a volume voxel by voxel and compare there, token by token in a loop."""
    x[0, 0, 1], x[1, 0, :, :8, :4] = -2.0, 0.4  # a missing section; a border
    model = built(Mae, MAE.model_copy(update={"target": target}))
    with torch.no_grad():
        predicted, index = model.reconstruct(x, hidden, NM)
        loss = model(x, hidden, NM).item()
    errors = []
    for b, (m, token) in itertools.product(range(2), enumerate(index[0].tolist())):
        token = int(index[b, m])
        i, j, k = np.unravel_index(token, GRID)
        block = x[b, 0, 2 * i : 2 * i + 2, 4 * j : 4 * j + 4, 4 * k : 4 * k + 4].numpy().astype(float)
        answer = predicted[b, m].view(2, 4, 4).numpy()
        kept = np.array([section.max() - section.min() >= 0.01 for section in block])
        if not kept.any():
            continue
        if target == "patch-normalised":
            block = (block - block[kept].mean()) / np.sqrt(block[kept].var() + 1e-6)
        errors += ((answer - block)[kept] ** 2).ravel().tolist()
    assert len(errors) < 2 * 24 * 32
    assert loss == pytest.approx(np.mean(errors), rel=1e-4)


def test_missing_sections_do_not_change_the_loss_and_an_empty_crop_costs_nothing(hidden):
    model = built(Mae, MAE)
    weight = model.target(torch.zeros(2, 1, *CROP), order_tokens(hidden)[1])[1]
    assert not weight.any() and model(torch.zeros(2, 1, *CROP), hidden, NM).item() == 0


def test_patch_normalise_by_hand():
    patches = torch.tensor([[[1.0, 3.0, 100.0, 100.0], [2.0, 4.0, 6.0, 8.0]]])
    blank = torch.tensor([[[False, False, True, True], [False] * 4]])
    out = patch_normalise(patches, blank)
    torch.testing.assert_close(out[0, 0, :2], torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[0, 1], (torch.tensor([2.0, 4, 6, 8]) - 5) / 5**0.5, atol=1e-4, rtol=0)
    flat = patch_normalise(torch.full((1, 1, 4), 3.0), torch.ones(1, 1, 4, dtype=torch.bool))
    assert torch.isfinite(flat).all()


def test_fault_1_targets_are_the_tokens_the_network_was_not_shown(hidden):
    """Each voxel of the crop carries its token's number: the target of hidden token n must be n everywhere."""
    number = torch.arange(32.0)[None, :, None].expand(2, -1, 32) + torch.linspace(0, 0.5, 32)
    i, j, k = torch.meshgrid(torch.arange(4) // 2, torch.arange(16) // 4, torch.arange(16) // 4, indexing="ij")
    assert torch.equal(unpatchify(number, GRID, PATCH)[0, 0].floor().long(), (i * 4 + j) * 4 + k)
    model = built(Mae, MAE)
    index = order_tokens(hidden)[1]
    target, _ = model.target(unpatchify(number, GRID, PATCH), index)
    assert torch.equal(target.floor(), index[..., None].expand_as(target).float())


def test_fault_1_the_place_of_a_token_is_the_place_of_its_voxels():
    """Learn a crop that is a function of place alone (rotary positions know differences of places only)."""
    places = token_centres_nm(GRID, PATCH, NM)
    z, y, x = (places - places.mean(0)).T / places.std(0)[:, None]
    crop = unpatchify((z + y * x)[None, :, None] + 0.1 * torch.randn(1, 32, 32), GRID, PATCH)
    torch.manual_seed(0)
    model = Mae(placed(MAE, "absolute"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        loss = model(crop, sample_hidden(32, 0.75, torch.Generator().manual_seed(step))[None], NM)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.item() < 0.2 * crop.var(), "the encoder's places say nothing about the decoder's"


@both_positions
def test_one_model_runs_at_other_crops_and_places_are_in_nanometres(x, positions):
    model = built(Mae, placed(MAE, positions))
    for shape, grid in [((2, 8, 16), 8), ((6, 8, 20), 30)]:
        hidden = sample_hidden(grid, 0.5, torch.Generator().manual_seed(0))[None]
        assert torch.isfinite(model(torch.randn(1, 1, *shape), hidden, NM))
    vit = model.encoder
    large, small = (next(p for p in vit.places(grid, NM) if p is not None) for grid in ((2, 4, 4), (2, 2, 3)))
    assert torch.equal(large[0].view(2, 4, 4, -1)[:, :2, :3], small[0].view(2, 2, 3, -1))
    with torch.no_grad():  # the same voxels with other sizes are other places
        assert not torch.allclose(vit(x, NM), vit(x, (8.0, 8.0, 8.0)))
        assert vit(x, NM).shape == (2, 24, *GRID)
    with pytest.raises(ValueError, match="does not divide"):
        vit(torch.zeros(1, 1, 4, 16, 15), NM)


def test_block_against_torch():
    """Pre-norm transformer block: torch's own encoder layer with the same weights."""
    mine = built(Block, 24, 2, 4.0)
    theirs = nn.TransformerEncoderLayer(24, 2, 96, dropout=0, activation="gelu", batch_first=True, norm_first=True)
    theirs.load_state_dict({
        "self_attn.in_proj_weight": mine.qkv.weight, "self_attn.in_proj_bias": mine.qkv.bias,
        "self_attn.out_proj.weight": mine.project.weight, "self_attn.out_proj.bias": mine.project.bias,
        "linear1.weight": mine.up.weight, "linear1.bias": mine.up.bias,
        "linear2.weight": mine.down.weight, "linear2.bias": mine.down.bias,
        "norm1.weight": mine.norm1.weight, "norm1.bias": mine.norm1.bias,
        "norm2.weight": mine.norm2.weight, "norm2.bias": mine.norm2.bias,
    })  # fmt: skip
    tokens = torch.randn(2, 7, 24)
    torch.testing.assert_close(mine(tokens), theirs(tokens), atol=1e-5, rtol=1e-5)


def test_turned_tokens_by_hand():
    """Pair k is element k of the first half and of the second; the product of two knows only their difference."""
    angle = torch.tensor([[[0.3, 1.1]], [[0.8, -2.0]]])
    turned = torch.polar(torch.ones_like(angle), angle)
    q = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    out = turn(q, turned[:1]).flatten()
    wanted = [1 * np.cos(0.3) - 3 * np.sin(0.3), 2 * np.cos(1.1) - 4 * np.sin(1.1),
              1 * np.sin(0.3) + 3 * np.cos(0.3), 2 * np.sin(1.1) + 4 * np.cos(1.1)]  # fmt: skip
    np.testing.assert_allclose(out, wanted, rtol=1e-5)
    k, shift = torch.randn(1, 1, 1, 4), torch.polar(torch.ones(1, 1, 2), torch.tensor([[[0.4, 7.0]]]))
    product = (turn(q, turned[:1]) * turn(k, turned[1:])).sum()
    torch.testing.assert_close((turn(q, turned[:1] * shift) * turn(k, turned[1:] * shift)).sum(), product)


@pytest.mark.parametrize("config", [
    MAE.model_copy(update={"encoder": VIT.model_copy(update={"heads": 5})}),
    MAE.model_copy(update={"decoder_heads": 5}),
])
def test_heads_must_divide_the_width(config):
    with pytest.raises(ValueError, match="5 heads do not divide a width of 24"):
        Mae(config)


@pytest.mark.parametrize("width, heads", [(24, 8), (24, 6), (21, 3), (30, 2)])
def test_rotary_heads_are_even_and_turn_three_axes(width, heads):
    """Narrower than 6 there is no pair for each of z, y, x; an odd head has no pairs."""
    with pytest.raises(ValueError, match="even head width of 6 or more"):
        VitConfig(width=width, heads=heads)
    with pytest.raises(ValueError, match="even head width of 6 or more"):
        MaeConfig(decoder_width=width, decoder_heads=heads)
    still = VitConfig(width=width, heads=heads, positions="absolute")
    MaeConfig(encoder=still, decoder_width=width, decoder_heads=heads)
    assert VitConfig(width=24, heads=4).heads == 4



# ---- the segmenter


@both_positions
def test_transferred_encoder_gives_the_tokens_of_the_pre_trained_one(x, positions):
    mae, segmenter = built(Mae, placed(MAE, positions)), built(Segmenter, placed(SEGMENTER, positions), 3, NM)
    with torch.no_grad():
        wanted = mae.encoder(x, NM)
        assert not torch.allclose(segmenter.encoder(x, NM), 0.9 * wanted)
        moved = transfer(mae.state_dict(), segmenter, PATCH)
        assert torch.equal(segmenter.encoder(x, NM), wanted)
        # the path of pre-training with nothing hidden, tokens in any order
        order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
        again = mae.encoder.encode(gather(patchify(x, PATCH), order), mae.encoder.places(GRID, NM).of(order))
        torch.testing.assert_close(again, gather(wanted.flatten(2).transpose(1, 2), order))
    assert moved.coverage == 1 and not (moved.missing or moved.resized or moved.unexpected)


@both_positions
def test_fault_2_the_segmenter_uses_positions(x, positions):
    """Without positions attention is blind to order: permuting the patches would permute the tokens."""
    model = built(Segmenter, placed(SEGMENTER, positions), 3, NM)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    shuffled = unpatchify(patchify(x, PATCH)[:, order], GRID, PATCH)
    with torch.no_grad():
        tokens = model.encoder(x, NM).flatten(2)[:, :, order]
        assert (model.encoder(shuffled, NM).flatten(2) - tokens).abs().max() > 1e-2
        before = model(x)
        model.encoder.places = lambda grid, nm: Places(None, None)
        blind = model.encoder(x, NM).flatten(2)[:, :, order]
        torch.testing.assert_close(model.encoder(shuffled, NM).flatten(2), blind)
        assert (model(x) - before).abs().max() > 1e-3


def test_the_transformer_matters_to_the_segmenter(x):
    model = built(Segmenter, SEGMENTER, 3, NM)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("patch, stem, nm, channels", [
    ((2, 4, 4), (1, 2, 2), NM, (8, 8)), ((2, 16, 16), (1, 2, 2), NM, (8, 8, 8, 16)),
    ((8, 8, 8), (2, 2, 2), (8.0, 8.0, 8.0), (8, 8, 16)), ((1, 16, 16), (1, 4, 4), (50.0, 4.0, 4.0), (8, 8, 8)),
    ((4, 4, 4), (4, 4, 4), (8.0, 8.0, 8.0), (8,)),
])
def test_segmenter_shapes(patch, stem, nm, channels):
    encoder = VIT.model_copy(update={"patch": patch})
    model = built(Segmenter, SegmenterConfig(encoder=encoder, stem=stem, channels=channels), 5, nm)
    crop = tuple(2 * p for p in patch)
    assert model(torch.randn(2, 1, *crop)).shape == (2, 5, *crop)
    product = np.prod([stem, *model.strides], axis=0)
    assert tuple(product) == patch


def test_the_segmenter_answers_where_it_is_asked():
    """A voxel changed far away in a corner changes the answer most in that corner's surroundings."""
    model = built(Segmenter, SEGMENTER, 1, NM)
    x = torch.zeros(1, 1, *CROP)
    y = x.clone()
    y[0, 0, 1, 2, 13] = 3.0
    with torch.no_grad():
        change = (model(y) - model(x)).abs()[0, 0]
    z, r, c = np.unravel_index(int(change.argmax()), CROP)
    assert abs(z - 1) <= 2 and abs(r - 2) <= 4 and abs(c - 13) <= 4


def test_space_to_depth_by_hand():
    x = torch.arange(2 * 4 * 4.0).view(1, 1, 2, 4, 4)
    out = space_to_depth(x, (1, 2, 2))
    assert out.shape == (1, 4, 2, 2, 2)
    assert out[0, :, 1, 0, 1].tolist() == [18, 19, 22, 23]
    y = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(depth_to_space(space_to_depth(y, (2, 3, 4)), (2, 3, 4)), y)
    assert torch.equal(depth_to_space(space_to_depth(y, (1, 2, 2)), (1, 2, 2)), y)
    two_d = depth_to_space(torch.arange(16.0).view(1, 4, 1, 2, 2), (1, 2, 2))[0, :, 0]
    assert torch.equal(two_d, F.pixel_shuffle(torch.arange(16.0).view(1, 4, 2, 2), 2)[0])


@pytest.mark.parametrize("patch, stem, nm, wanted", [
    ((4, 16, 16), (1, 2, 2), (40, 8, 8), [(1, 2, 2), (2, 2, 2), (2, 2, 2)]),
    ((8, 8, 8), (2, 2, 2), (8, 8, 8), [(2, 2, 2), (2, 2, 2)]),
    ((1, 16, 16), (1, 4, 4), (50, 4, 4), [(1, 2, 2), (1, 2, 2)]),
    ((2, 16, 16), (1, 2, 2), (50, 4, 4), [(1, 2, 2), (1, 2, 2), (2, 2, 2)]),
    ((2, 2, 2), (2, 2, 2), (8, 8, 8), []),
])
def test_level_strides(patch, stem, nm, wanted):
    assert level_strides(patch, stem, nm) == wanted


@pytest.mark.parametrize("patch, stem, channels, wanted", [
    ((3, 4, 4), (1, 2, 2), (8, 8), "times a power of two must be the patch"),
    ((2, 4, 4), (1, 3, 2), (8, 8), "times a power of two must be the patch"),
    ((2, 16, 16), (1, 2, 2), (8, 8), "has 4 levels"),
    ((2, 4, 4), (1, 2, 2), (8, 12), "multiples of 8"),
])
def test_segmenters_that_cannot_be(patch, stem, channels, wanted):
    encoder = VIT.model_copy(update={"patch": patch})
    with pytest.raises(ValueError, match=wanted):
        Segmenter(SegmenterConfig(encoder=encoder, stem=stem, channels=channels), 3, NM)


def test_blank_is_judged_before_normalising_patches(hidden):
    """A nearly flat patch is noise, and dividing by its spread would blow it up: it is left out instead."""
    x = 0.004 * torch.rand(2, 1, *CROP)
    assert bool(blank_voxels(x, PATCH).all())


def test_vit_is_given_its_channels():
    assert Vit(VIT, channels=2)(torch.randn(1, 2, *CROP), NM).shape == (1, 24, *GRID)
