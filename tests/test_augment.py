"""Symmetries and grey values: what moves with the image, what is left alone."""

import itertools

import numpy as np
import pytest
import torch

from emae._augment import Augmentation, Crop, Symmetry, augment, blur_sections, random_intensity, symmetries
from emae._targets import affinities

ISOTROPIC, SECTIONS = (8.0, 8.0, 8.0), (40.0, 8.0, 8.0)
EVERY = symmetries(ISOTROPIC, (4, 4, 4))
NONE = Augmentation(symmetry=False, contrast=0, brightness=0, section_jitter=0, noise=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("voxel, shape, count", [
    (ISOTROPIC, (4, 4, 4), 48), (SECTIONS, (4, 4, 4), 16), (ISOTROPIC, (2, 4, 4), 16), (ISOTROPIC, (4, 2, 4), 16),
    (SECTIONS, (2, 4, 6), 8), ((8.0, 4.0, 8.0), (4, 4, 4), 16), ((1.0, 2.0, 3.0), (4, 4, 4), 8),
])
def test_how_many_symmetries(voxel, shape, count):
    group = symmetries(voxel, shape)
    assert len(set(group)) == len(group) == count
    assert group[0] == Symmetry((0, 1, 2), (False, False, False))
    x = torch.arange(int(np.prod(shape))).reshape(shape)
    moved = [s.apply(x) for s in group]
    assert all(m.shape == x.shape for m in moved) and torch.equal(moved[0], x)
    assert len({tuple(m.flatten().tolist()) for m in moved}) == count, "two symmetries do the same"


@pytest.mark.parametrize("symmetry", EVERY, ids=str)
def test_undo_and_move(symmetry):
    """`move` by hand: mark a voxel and its neighbour, see where they go."""
    x = torch.randn(2, 3, 4, 5, generator=generator())
    assert torch.equal(symmetry.undo(symmetry.apply(x)), x)
    assert torch.equal(symmetry.apply(symmetry.undo(x)), x)
    offset = (-1, 2, 3)
    marks = torch.zeros(9, 9, 9, dtype=torch.int64)
    marks[4, 4, 4], marks[3, 6, 7] = 1, 2
    moved = symmetry.apply(marks)
    here, there = (moved == 1).nonzero()[0], (moved == 2).nonzero()[0]
    assert tuple((there - here).tolist()) == symmetry.move(offset)


@pytest.mark.parametrize("voxel, shape", [(ISOTROPIC, (6, 6, 6)), (SECTIONS, (3, 6, 6)), (SECTIONS, (3, 4, 6))])
def test_labels_and_valid_follow_the_image(voxel, shape):
    place = torch.arange(int(np.prod(shape))).reshape(shape)
    crop = Crop(place.float(), place, place % 3 == 0)
    seen = set()
    for seed in range(300):
        out = augment(crop, NONE.model_copy(update={"symmetry": True}), voxel, generator(seed))
        assert torch.equal(out.raw, out.labels.float()) and torch.equal(out.valid, out.labels % 3 == 0)
        assert out.raw.is_contiguous() and out.labels.is_contiguous()
        seen.add(tuple(out.labels.flatten().tolist()))
    assert len(seen) == len(symmetries(voxel, shape)), "every symmetry is drawn"


def test_targets_come_after_augmentation():
    """Mirroring turns offset -1 into +1: affinities of the moved labels are not the moved affinities."""
    labels = torch.randint(0, 3, (5, 5, 5), generator=generator())
    valid = torch.ones_like(labels, dtype=torch.bool)
    offsets = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
    for symmetry in EVERY:
        target, counts = affinities(symmetry.apply(labels)[None], symmetry.apply(valid)[None], offsets)
        back = symmetry.undo(target[0])
        for k, offset in enumerate(offsets):
            # channel k in the moved crop is, in the crop, the edge to the offset that `move` brings to `offset`
            o = next(tuple(s * e for e in edge) for s in (1, -1) for edge in offsets
                     if symmetry.move(tuple(s * e for e in edge)) == offset)
            for v in itertools.product(range(1, 4), repeat=3):
                w = tuple(a + b for a, b in zip(v, o))
                assert back[(k, *v)] == bool(labels[v] == labels[w] and labels[v] != 0)


def test_intensity_touches_the_image_alone_and_is_a_function_of_the_generator():
    crop = Crop(torch.randn(6, 8, 8, generator=generator()), torch.arange(384).view(6, 8, 8), torch.ones(6, 8, 8) > 0)
    config = Augmentation(symmetry=False, blur=0.5, missing_section=0.5)
    torch.manual_seed(0)
    one = augment(crop, config, SECTIONS, generator(5))
    torch.manual_seed(1)
    two = augment(crop, config, SECTIONS, generator(5))
    assert torch.equal(one.raw, two.raw) and not torch.equal(one.raw, augment(crop, config, SECTIONS, generator(6)).raw)
    assert torch.equal(one.labels, crop.labels) and torch.equal(one.valid, crop.valid)
    before = crop.raw.clone()
    for seed in range(20):
        augment(crop, config, SECTIONS, generator(seed))
    assert torch.equal(crop.raw, before), "the crop handed in was changed"
    assert torch.equal(augment(crop, NONE, SECTIONS, generator(0)).raw, crop.raw)


def test_gain_and_offset_within_their_ranges():
    raw = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    drawn = []
    for seed in range(400):
        out = random_intensity(raw, NONE.model_copy(update={"contrast": 0.2, "brightness": 0.5}), generator(seed))
        drawn.append((float(out[1, 0, 0] - out[0, 0, 0]), float(out[0, 0, 0])))
    gain, offset = np.array(drawn).T
    assert 0.8 <= gain.min() < 0.82 and 1.18 < gain.max() <= 1.2
    assert -0.5 <= offset.min() < -0.45 and 0.45 < offset.max() <= 0.5
    out = random_intensity(torch.zeros(2000, 1, 1), NONE.model_copy(update={"section_jitter": 0.1}), generator())
    assert 0.09 < out.std() < 0.11, "each section by itself"


def test_missing_section_is_an_inner_one_and_rare_as_asked():
    crop = Crop(torch.randn(5, 4, 4, generator=generator()), torch.ones(5, 4, 4, dtype=torch.int64))
    config = NONE.model_copy(update={"missing_section": 0.25})
    gone = []
    for seed in range(400):
        out = augment(crop, config, SECTIONS, generator(seed))
        gone += [z for z in range(5) if bool((out.raw[z] == -2).all())]
        assert bool((out.labels == 1).all())
    assert set(gone) == {1, 2, 3} and 70 < len(gone) < 130


def test_blur_by_hand():
    x = torch.zeros(2, 5, 5)
    x[0, 2, 2] = 16
    wanted = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(blur_sections(x)[0, 1:4, 1:4], wanted) and not blur_sections(x)[1].any()
    torch.testing.assert_close(blur_sections(torch.ones(1, 4, 4)), torch.ones(1, 4, 4))  # borders replicated
