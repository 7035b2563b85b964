"""Records against the files they describe, splits that never overlap, opening by name, descriptions."""

import itertools

import h5py
import numpy as np
import pytest

from emae import _datasets
from emae._datasets import (
    DATASETS,
    PHANTOMS,
    data_folder,
    describe,
    is_here,
    list_datasets,
    open_labels,
    open_stretches,
    open_volume,
)
from emae._geometry import Box
from emae._phantom import PhantomConfig

IN_FILES = [name for name, record in DATASETS.items() if record.file]


@pytest.fixture(autouse=True)
def small_phantoms(monkeypatch):
    small = {split: PhantomConfig(seed=config.seed, shape=(8, 64, 64)) for split, config in PHANTOMS.items()}
    monkeypatch.setattr(_datasets, "PHANTOMS", small)


def needs(name):
    if not is_here(name):
        pytest.skip(f"{DATASETS[name].file} is not in {data_folder()} (EMAE_DATA)")


@pytest.mark.parametrize("name", DATASETS)
def test_splits_lie_inside_and_never_overlap(name):
    record = DATASETS[name]
    if record.file is None:
        assert len({PHANTOMS[split].seed for split in record.splits}) == 3
        return
    for box in record.splits.values():
        assert Box.of_shape(record.shape).contains(box) and not box.is_empty
        assert any(run.contains(box) for run in record.runs), "a split holds a jump"
    for a, b in itertools.combinations(record.splits.values(), 2):
        assert a.intersect(b).is_empty
    for source in record.pretrain_on:
        base, _, split = source.partition("/")
        assert split or not DATASETS[base].splits, f"{source}: all of it would hold the test voxels"
        assert split not in ("validation", "test")


def test_splits_are_those_of_the_data_readme():
    """Copied from the README's table by hand: inclusive first and last index of the split axis."""
    table = {
        "fib25": (0, (0, 119), (120, 149), (150, 249)),
        "isbi2012": (0, (0, 9), (10, 11), (12, 15)),
        "epfl": (2, (0, 511), (512, 575), (640, 1023)),
        "cdeep3m": (0, (0, 11), (12, 13), (14, 19)),
        "vnc": (0, (0, 11), (12, 13), (14, 19)),
    }
    for name, (axis, *ranges) in table.items():
        record = DATASETS[name]
        for split, (first, last) in zip(("train", "validation", "test"), ranges, strict=True):
            box = record.splits[split]
            assert (box.start[axis], box.stop[axis] - 1) == (first, last), (name, split)
            others = [k for k in range(3) if k != axis]
            assert all(box.start[k] == 0 and box.stop[k] == record.shape[k] for k in others)
    assert str(DATASETS["isbi2012"].splits["extra"]) == "16:20,0:512,0:512"


@pytest.mark.parametrize("name", IN_FILES)
def test_records_agree_with_their_files(name):
    needs(name)
    record = DATASETS[name]
    with h5py.File(data_folder() / record.file) as file:
        arrays = {key for key in file if file[key].ndim == 3}
        assert arrays == {record.raw_key, *record.labels}
        assert {file[key].shape for key in arrays} == {record.shape}
        stated = file.attrs["voxel_size_nm"]
        assert record.voxel_size_assumed == bool(np.isnan(stated).any())
        if not record.voxel_size_assumed:
            assert np.allclose(stated, record.voxel_size_nm)
    volume = open_volume(name)
    assert volume.shape == record.shape and volume.require_voxel_size() == record.voxel_size_nm


def test_a_split_is_that_box_of_raw_and_labels():
    needs("fib25")
    with h5py.File(data_folder() / "fib25_sample2.h5") as file:
        raw, labels = file["raw"][150:152, 3:5, :7], file["labels"][150:152, 3:5, :7]
    box = "0:2,3:5,:7"
    assert np.array_equal(np.asarray(open_volume("fib25/test", box=box)), raw)
    assert np.array_equal(np.asarray(open_labels("fib25/test", box=box)), labels)
    assert open_volume("fib25/test").shape == (100, 250, 250)
    assert open_volume("fib25/test").box.start == (150, 0, 0)


def test_isbi_is_cut_at_its_jump():
    needs("isbi2012")
    assert [v.shape[0] for v in open_stretches("isbi2012")] == [16, 4]
    assert [(v.box.start[0], v.box.stop[0]) for v in open_stretches("isbi2012/extra")] == [(16, 20)]
    assert len(open_stretches("isbi2012/test")) == 1


@pytest.mark.parametrize("name, mitochondria", [("epfl", 26), ("cdeep3m", 120)])
def test_counted_objects_are_those_of_the_readme(name, mitochondria):
    needs(name)
    key = next(iter(DATASETS[name].labels))
    stats = _datasets._label_statistics(open_labels(name, key), key, DATASETS[name].labels[key])
    assert stats.objects == mitochondria


def test_the_phantom_by_name():
    train, test = open_volume("phantom"), open_volume("phantom/test")
    assert np.array_equal(train[...], open_volume("phantom/train")[...])
    assert not np.array_equal(train[...], test[...])
    labels = open_labels("phantom/test", box="1:3,:,:")
    assert labels.shape == (2, 64, 64) and labels.voxel_size_nm == test.voxel_size_nm == (40, 8, 8)
    mitochondria = open_labels("phantom/test", "mitochondria")[...]
    assert (open_labels("phantom/test")[...][mitochondria > 0] > 0).all()


def test_any_address_and_a_given_voxel_size(tmp_path):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["raw"] = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
        file["ids"] = np.ones((4, 5, 6), np.uint32)
    volume = open_volume(f"{tmp_path}/own.h5:raw", voxel_size_nm=(30, 6, 6), box="1:3,:,:")
    assert volume.shape == (2, 5, 6) and volume.voxel_size_nm == (30, 6, 6)
    assert open_labels(tmp_path / "own.h5", "ids").shape == (4, 5, 6)
    assert open_volume("phantom", voxel_size_nm=(50, 4, 4)).voxel_size_nm == (50, 4, 4)


def test_description_counts_what_is_there(tmp_path):
    labels = np.zeros((4, 10, 10), np.uint32)
    labels[:, :2], labels[0, 5, :4] = 7, 9  # 80 and 4 voxels
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["raw"] = np.random.default_rng(0).integers(0, 255, (4, 10, 10), np.uint8)
        file["ids"] = labels
    shown = describe(f"{tmp_path}/own.h5:raw", f"{tmp_path}/own.h5:ids")
    (stats,) = shown.labels
    assert (stats.objects, stats.size_vx["min"], stats.size_vx["max"]) == (2, 4, 80)
    assert stats.background_fraction == pytest.approx(1 - 84 / 400)
    assert shown.voxel_size_nm is None and "--voxel-size" in str(shown)
    assert describe(f"{tmp_path}/own.h5:ids").labels[0].objects == 2, "labels alone are seen to be labels"


def test_binary_labels_are_counted_by_connected_pieces(tmp_path):
    mask = np.zeros((3, 8, 8), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = 255  # touch by a corner: one
    mask[2, 6, 6] = 255
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["mask"] = mask
        file["mask"].attrs["kind"] = "binary test mask"
    (stats,) = describe(f"{tmp_path}/own.h5:mask").labels
    assert (stats.kind, stats.objects, stats.meaning) == ("binary", 2, "binary test mask")


def test_the_texts_hold_what_they_promise():
    table = list_datasets()
    assert all(any(line.startswith(name + " ") for line in table.splitlines()) for name in DATASETS)
    text = str(describe("phantom/test"))
    for word in (
        "8 x 64 x 64 uint8",
        "40 x 8 x 8 nm",
        "seed 3",
        "objects",
        "background",
        "median",
        "licence",
    ):
        assert word in text, word


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: open_volume("fib25/tset"), "no split 'tset', it has: train, validation, test"),
        (lambda: open_volume("vnc-stack2/train"), "it has: none"),
        (lambda: open_labels("fib25-unlabelled"), "no labels"),
        (lambda: open_labels("phantom", "mitochondira"), "did you mean 'mitochondria'"),
        (lambda: open_volume("phantom", box="0:99,:,:"), "outside the volume"),
    ],
)
def test_wrong_names_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_an_absent_file_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("EMAE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fib25_sample2\.h5.*EMAE_DATA"):
        open_volume("fib25/test")
    assert not is_here("fib25") and is_here("phantom") and "no" in list_datasets()
    with pytest.raises(FileNotFoundError, match="did you mean 'cdeep3m'"):
        open_volume("cdeep3")


def test_another_file_of_the_same_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("EMAE_DATA", str(tmp_path))
    with h5py.File(tmp_path / "fib25_sample2.h5", "w") as file:
        file["raw"] = np.zeros((4, 5, 6), np.uint8)
    with pytest.raises(ValueError, match="shape"):
        open_volume("fib25")
