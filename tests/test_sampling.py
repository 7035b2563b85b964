"""Crops: which voxels a sample holds, where its labels are known, and that (seed, i) says it all."""

import h5py
import numpy as np
import pytest
import tiny
import torch

from emae._augment import Augmentation
from emae._datasets import is_here
from emae._geometry import Box
from emae._normalise import Levels, Normalisation
from emae._sampling import (
    Crops,
    Cube,
    LabelledSource,
    Source,
    common_voxel_size,
    open_cubes,
    random_box,
    read_crop,
    sample_generator,
)
from emae._volume import Volume

NM = (40.0, 8.0, 8.0)
STILL = Augmentation(symmetry=False, contrast=0, brightness=0, section_jitter=0, noise=0)
IDENTITY = Levels(np.array([-2.0]), np.array([2.0]), False)
"""grey value v stays v between -4 and 4; raw below counts voxels in thousandths"""


def cube(shape=(12, 16, 20), labels=None, **values):
    raw = (np.arange(np.prod(shape)).reshape(shape) / 1000).astype(np.float32)
    volume = None if labels is None else Volume.from_array(labels, NM, "labels")
    return Cube(Volume.from_array(raw, NM, "raw"), IDENTITY, NM, volume, **values)


def place(crop, shape):
    """The box of `raw` that a crop shows, read from its first voxel."""
    start = np.unravel_index(round(float(crop.raw[0, 0, 0]) * 1000), shape)
    return Box(start, tuple(a + s for a, s in zip(start, crop.raw.shape)))


@pytest.fixture
def em(tmp_path):
    """A file as a lab has it: raw, and a labelled cube somewhere inside it."""
    rng = np.random.default_rng(0)
    path = tmp_path / "em.h5"
    with h5py.File(path, "w") as file:
        file["raw"] = rng.integers(0, 255, (12, 40, 44), np.uint8)
        file["labels"] = rng.integers(0, 5, (6, 20, 24)).astype(np.int64)
        file["valid"] = np.uint8(rng.random((6, 20, 24)) < 0.5) * 255
        file["floats"] = rng.random((6, 20, 24))
        file["negative"] = np.full((6, 20, 24), -1)
        file["nothing"] = np.zeros((6, 20, 24), np.uint32)
        file["constant"] = np.full((12, 40, 44), 3, np.uint8)
    return path


def source(path, **values):
    values = {"raw": Source(path=f"{path}:raw", voxel_size_nm=NM), "labels": f"{path}:labels",
              "offset_vx": (3, 10, 5)} | values  # fmt: skip
    return LabelledSource(**values)


# ---- a sample is a function of (seed, i)


def test_sample_i_is_a_function_of_seed_and_i():
    labels = np.random.default_rng(0).integers(0, 9, (12, 16, 20)).astype(np.uint32)

    def crops(seed):
        return Crops([cube(labels=labels), cube(labels=labels)], (4, 8, 8), Augmentation(), seed)

    one, two = crops(7), crops(7)
    torch.manual_seed(0)
    forwards = [one[i] for i in range(6)]
    torch.manual_seed(1)
    backwards = [two[i] for i in reversed(range(6))][::-1]
    for a, b in zip(forwards, backwards):
        assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert not torch.equal(one[0].raw, crops(8)[0].raw) and not torch.equal(one[0].raw, one[1].raw)
    batch = one.batch(2, 3)
    assert torch.equal(batch.raw, torch.stack([c.raw for c in forwards[2:5]]))
    assert torch.equal(batch.valid, torch.stack([c.valid for c in forwards[2:5]]))
    assert Crops([cube()], (4, 8, 8), STILL, 0).batch(0, 2).labels is None
    first = [torch.rand(3, generator=sample_generator(s, i)).tolist() for s in range(20) for i in range(20)]
    assert len({tuple(f) for f in first}) == 400


def test_every_place_is_drawn_and_none_outside():
    crops = Crops([cube((5, 6, 7))], (3, 4, 5), STILL, 0)
    boxes = {str(place(crops[i], (5, 6, 7))) for i in range(400)}
    assert len(boxes) == 3 * 3 * 3
    assert str(place(Crops([cube((5, 6, 7))], (5, 6, 7), STILL, 0)[0], (5, 6, 7))) == "0:5,0:6,0:7"


def test_volumes_are_drawn_by_their_number_of_voxels():
    cubes = [cube((4, 8, 8)), cube((12, 8, 8))]
    cubes[1] = Cube(Volume.from_array(np.full((12, 8, 8), 3.0, np.float32), NM), IDENTITY, NM)
    crops = Crops(cubes, (2, 4, 4), STILL, 0)
    share = np.mean([float(crops[i].raw[0, 0, 0]) == 3.0 for i in range(600)])
    assert 0.69 < share < 0.81  # 3/4 within 3.4 standard deviations


# ---- labels within a larger raw


@pytest.mark.parametrize("crop", [(4, 8, 8), (6, 10, 12), (8, 12, 16), (12, 16, 20)])
@pytest.mark.parametrize("offset", [(3, 4, 5), (0, 0, 0), (6, 6, 8)])
def test_labels_lie_where_their_offset_says(crop, offset):
    """Brute force: label v belongs to raw v + offset; outside the labels nothing is known."""
    shape, size = (12, 16, 20), (6, 10, 12)
    labels = np.random.default_rng(1).integers(0, 4, size).astype(np.uint16) * 1000
    known = np.random.default_rng(2).random(size) < 0.7
    big, sure = np.zeros(shape, np.int64), np.zeros(shape, bool)
    there = Box.of_shape(size).shift(offset).slices
    big[there], sure[there] = labels, known
    crops = Crops([cube(shape, labels, offset_vx=offset, valid=Volume.from_array(known.astype(np.uint8), NM))], crop,
                  STILL, 0)  # fmt: skip
    most = np.prod([min(c, s) for c, s in zip(crop, size)])
    for i in range(20):
        got = crops[i]
        box = place(got, shape)
        np.testing.assert_array_equal(got.valid, sure[box.slices])
        wanted, ids = big[box.slices], got.labels.numpy()
        np.testing.assert_array_equal(ids == 0, wanted == 0)
        for a in np.unique(wanted):  # dense ids, the same partition
            assert len(np.unique(ids[wanted == a])) == 1
        assert len(np.unique(ids)) == len(np.unique(wanted)) and ids.max() < 5
        inside = box.intersect(Box.of_shape(size).shift(offset))
        assert inside.size == most, "a crop covers as much of the labels as its size allows"


def test_labels_that_reach_beyond_the_raw():
    labels = np.arange(1, 1 + 16 * 20 * 24).reshape(16, 20, 24).astype(np.uint32)
    shape, offset = (12, 16, 20), (-2, -2, -2)
    crops = Crops([cube(shape, labels, offset_vx=offset)], (4, 8, 8), STILL, 0)
    for i in range(10):
        got = crops[i]
        start = place(got, shape).start
        assert bool(got.valid.all())
        first = labels[tuple(slice(s + 2, s + 2 + n) for s, n in zip(start, (4, 8, 8)))]
        rank = {int(v): k + 1 for k, v in enumerate(np.unique(first))}
        np.testing.assert_array_equal(got.labels, np.vectorize(rank.get)(first))


@pytest.mark.parametrize("sections, size", [
    ((0,), 4), ((11,), 4), ((0, 11), 3), ((2, 9), 12), ((5,), 1), ((0, 4, 8), 2),
])
def test_every_crop_holds_a_known_section_and_every_section_is_drawn(sections, size):
    labels = np.ones((12, 16, 20), np.uint32)
    crops = Crops([cube(labels=labels, sections=sections)], (size, 8, 8), STILL, 0)
    seen = set()
    for i in range(60):
        got = crops[i]
        start = place(got, (12, 16, 20)).start[0]
        known = {start + int(z) for z in got.valid.any(2).any(1).nonzero()}
        assert known == set(sections) & set(range(start, start + size)) and known
        seen |= known
    assert seen == set(sections)


def test_sparse_sections_of_a_cube_inside_raw():
    labels = np.ones((4, 16, 20), np.uint32)
    crops = Crops([cube(labels=labels, sections=(0, 3), offset_vx=(5, 0, 0))], (3, 8, 8), STILL, 0)
    for i in range(40):
        got = crops[i]
        start = place(got, (12, 16, 20)).start[0]
        known = {start + int(z) for z in got.valid.any(2).any(1).nonzero()}
        assert known and known <= {5, 8}


def test_per_section_levels_follow_the_crop():
    raw = np.random.default_rng(0).integers(0, 100, (8, 8, 8)).astype(np.float32)
    levels = Levels(np.arange(8.0), np.arange(8.0) + 100, False)
    one = Cube(Volume.from_array(raw, NM), levels, NM)
    got = read_crop(one, Box((3, 1, 1), (6, 5, 5)))
    np.testing.assert_array_equal(got.raw, levels.apply(raw)[3:6, 1:5, 1:5])


# ---- opening


def test_open_a_labelled_cube(em):
    with h5py.File(em) as file:
        labels, valid = file["labels"][...], file["valid"][...]
    cubes = open_cubes((source(em, valid=f"{em}:valid", sections=(1, 4)),), Normalisation(), (4, 16, 16))
    got = cubes[0]
    assert got.voxel_size_nm == NM and got.offset_vx == (3, 10, 5) and got.labels.dtype.kind == "u"
    np.testing.assert_array_equal(np.asarray(got.labels), labels)
    crop = read_crop(got, Box((3, 10, 5), (9, 30, 29)))
    rows = np.isin(np.arange(6), (1, 4))[:, None, None]
    np.testing.assert_array_equal(crop.valid, (valid != 0) & rows)
    np.testing.assert_array_equal(crop.labels, labels)


def test_sources_of_one_shape_need_no_offset(em):
    path = f"{em}:raw"
    got = open_cubes((Source(path=path, voxel_size_nm=NM, box="2:8,:,4:40"),), Normalisation(), (4, 16, 16))[0]
    assert got.raw.shape == (6, 40, 36) and got.labels is None
    raw = Source(path=path, voxel_size_nm=NM, box="3:9,10:30,5:29")
    both = open_cubes((source(em, raw=raw, offset_vx=None),), Normalisation(), (4, 16, 16))[0]
    assert both.labels.shape == both.raw.shape == (6, 20, 24)


@pytest.mark.parametrize("values, wanted", [
    ({"labels": "{em}:floats"}, "floats: labels of type float64"),
    ({"labels": "{em}:negative"}, "negative: negative label -1"),
    ({"labels": "{em}:nothing"}, "nothing: all labels are 0"),
    ({"offset_vx": None}, "shapes differ"),
    ({"offset_vx": (8, 10, 5)}, "outside"),
    ({"valid": "{em}:raw"}, "raw: valid mask of shape"),
    ({"sections": (1, 6)}, r"sections \(1, 6\) are none, or not all among its 6"),
    ({"sections": ()}, "sections"),
    ({"labels": "{em}:label"}, "label"),
    ({"labels": "{em}.gone"}, "gone"),
    ({"raw": "{em}:constant"}, "constant"),
])
def test_bad_input_names_the_file_and_the_fault(em, values, wanted):
    values = {k: v.format(em=em) if isinstance(v, str) else v for k, v in values.items()}
    if "raw" in values:
        values["raw"] = Source(path=values["raw"], voxel_size_nm=NM)
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        open_cubes((source(em, **values),), Normalisation(), (4, 16, 16))


def test_crop_larger_than_the_volume_and_voxel_sizes_apart(em):
    path = f"{em}:raw"
    raw = Source(path=path, voxel_size_nm=NM)
    with pytest.raises(ValueError, match=r"raw: a crop of \(16, 16, 16\) is larger than the volume \(12, 40, 44\)"):
        open_cubes((raw,), Normalisation(), (16, 16, 16))
    assert open_cubes((raw,), Normalisation(), (16, 16, 16), allow_smaller=True)
    with pytest.raises(ValueError, match="--voxel-size"):
        open_cubes((Source(path=path),), Normalisation(), (4, 16, 16))
    near, far = [Source(path=path, voxel_size_nm=(40.0, 8.0, x)) for x in (9.9, 10.1)]
    assert common_voxel_size(open_cubes((raw, near), Normalisation(), (4, 16, 16))) == NM
    with pytest.raises(ValueError, match=r"more than 1.25x: .*8.0\) nm, .*10.1\) nm"):
        common_voxel_size(open_cubes((raw, far), Normalisation(), (4, 16, 16)))


def test_a_volume_too_large_for_memory_is_read_crop_by_crop(em, monkeypatch):
    small = open_cubes((source(em),), Normalisation(), (4, 16, 16))
    monkeypatch.setattr("emae._sampling.IN_MEMORY_BYTES", 0)
    lazy = open_cubes((source(em),), Normalisation(), (4, 16, 16))
    a, b = [Crops(c, (4, 16, 16), Augmentation(), 3)[5] for c in (small, lazy)]
    assert all(torch.equal(p, q) for p, q in zip(a, b))


def test_random_box_stays_inside_for_any_offset():
    """Crops as large as raw, labels at its ends and beyond them."""
    for offset in [(-3, 0, 0), (0, 0, 0), (9, 12, 16)]:
        labels = np.ones((18 if offset[0] < 0 else 3, 4, 4), np.uint8)
        for shape in [(12, 16, 20), (2, 2, 2), (11, 3, 20)]:
            c = cube(labels=labels, offset_vx=offset)
            for seed in range(20):
                assert Box.of_shape((12, 16, 20)).contains(random_box(c, shape, sample_generator(0, seed)))


def test_a_source_can_be_resampled_to_the_voxel_size_of_the_labels(tmp_path):
    path = tiny.write_phantom(tmp_path)
    (cube,) = open_cubes((tiny.raw_of(path, resample_nm=(40.0, 16.0, 16.0)),), Normalisation(), (4, 16, 16))
    assert cube.voxel_size_nm == (40.0, 16.0, 16.0) and cube.raw.shape == (12, 32, 32)


needs_data = pytest.mark.skipif(not (is_here("isbi2012") and is_here("cdeep3m") and is_here("vnc")),
                                reason="the data folder is absent: set EMAE_DATA")


@needs_data
def test_no_crop_straddles_the_jump_of_the_isbi_stack():
    cubes = open_cubes((Source(path="isbi2012", box="8:20,:,:"),), Normalisation(), (4, 64, 64))
    assert [c.raw.shape[0] for c in cubes] == [8, 4]
    with pytest.raises(ValueError, match="the stack jumps between sections 15 and 16"):
        LabelledSource(raw=Source(path="isbi2012")).open()


@needs_data
def test_binary_labels_become_instances_and_classes_are_refused():
    raw, labels, _ = LabelledSource(raw=Source(path="cdeep3m/test")).open()
    assert np.asarray(labels).max() > 20
    with pytest.raises(ValueError, match="classes, not instances"):
        LabelledSource(raw=Source(path="vnc/test"), labels_key="labels").open()


def test_nothing_known_to_learn_from_is_refused(tmp_path):
    with h5py.File(tmp_path / "valid.h5", "w") as file:
        file["valid"] = np.zeros((12, 64, 64), np.uint8)
    source = tiny.labelled(tiny.write_phantom(tmp_path), valid=f"{tmp_path}/valid.h5:valid")
    with pytest.raises(ValueError, match="no label where labels are known.*nothing to learn from"):
        open_cubes((source,), Normalisation(), (4, 16, 16))
