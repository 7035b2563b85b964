"""Prediction block by block: the answer depends on the volume and the network, on nothing else."""

import itertools
import tracemalloc

import h5py
import numpy as np
import pytest
import tiny
import torch
from torch import nn

import emae._predict as predict_module
from emae._augment import symmetries
from emae._decode import Agglomeration
from emae._formats import Source as VolumeSource
from emae._geometry import Box
from emae._normalise import Normalisation, measure_levels
from emae._predict import (
    align,
    blending_window,
    complete,
    crop_starts,
    fit_voxel_size,
    load_segmenter,
    predict,
    read_padded,
    shift_from,
)
from emae._runs import create_run, load_run
from emae._targets import NEAREST, Affinities, affinities
from emae._volume import Volume, open_path, resample

ISO = (8.0, 8.0, 8.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.untrained_run(tmp_path_factory.mktemp("runs") / "seg")


def volume(shape, voxel_size_nm=tiny.NM, seed=0):
    return Volume.from_array(tiny.noise(shape, seed), voxel_size_nm, name="mine")


class Oracle(nn.Module):
    """Knows the labels, for they are the grey values: exact for every edge inside the crop, undecided at its rim."""

    def __init__(self, offsets):
        super().__init__()
        self.offsets = offsets

    def forward(self, x):
        labels = ((x[:, 0] + 2) * 255 / 4).round().long()
        affinity, inside = affinities(labels, torch.ones_like(labels, dtype=torch.bool), self.offsets)
        return torch.where(inside, affinity.float() * 40 - 20, torch.tensor(0.0))


# ---- the grid of crops


@pytest.mark.parametrize("size, crop, overlap", [
    (32, 8, 0.5), (33, 8, 0.5), (8, 8, 0.5), (5, 8, 0.5), (9, 8, 0.0), (40, 10, 0.75), (7, 1, 0.5), (23, 8, 0.3),
])
def test_crops_lie_on_one_grid_and_cover_the_axis(size, crop, overlap):
    whole = crop_starts(size, crop, 0, size, overlap)
    assert whole == sorted(set(whole)) and whole[0] == 0 and whole[-1] == max(0, size - crop)
    assert all(b - a <= max(1, round(crop * (1 - overlap))) for a, b in itertools.pairwise(whole))
    for first, stop in itertools.combinations(range(size + 1), 2):
        touching = [s for s in whole if any(s <= v < s + crop for v in range(first, stop))]
        assert crop_starts(size, crop, first, stop, overlap) == touching and touching


def test_blending_window():
    window = blending_window((4, 6, 8))
    assert window.shape == (4, 6, 8) and window.min() > 0
    assert torch.equal(window, window.flip(0, 1, 2))
    line = [np.exp(-0.5 * ((v + 0.5 - 4) / 2) ** 2) for v in range(8)]
    np.testing.assert_allclose(window[1, 2] / window[1, 2].max(), np.array(line) / max(line), rtol=1e-5)


def test_shift_by_hand():
    x = torch.arange(8).view(2, 2, 2)
    assert shift_from(x, (-1, 0, 0)).flatten().tolist() == [0, 0, 0, 0, 0, 1, 2, 3]
    assert shift_from(x, (0, 1, -1)).flatten().tolist() == [0, 2, 0, 0, 0, 6, 0, 0]
    assert not shift_from(x, (0, 0, 2)).any()


# ---- mirrored and transposed variants


@pytest.mark.parametrize("offsets", [
    NEAREST, (*NEAREST, (-2, 0, 0), (0, -2, 0), (0, 0, 2)), ((0, 0, -1), (0, 2, 1), (-1, 0, 0), (0, -1, 0)),
])
@pytest.mark.parametrize("voxel_size", [ISO, tiny.NM])
def test_exact_affinities_average_to_exact_affinities(offsets, voxel_size):
    """Law: every symmetry by itself brings every channel back to its own offset and place."""
    rim, side = 2, 5
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (side + 2 * rim,) * 3))
    inner = (..., *[slice(rim, rim + side)] * 3)

    def exact(array):  # computed beyond the crop, so that edges leaving it are exact too
        return affinities(array[None], torch.ones_like(array, dtype=torch.bool)[None], offsets)[0][0][inner].float()

    wanted, window = exact(labels), blending_window((side,) * 3)
    tested = 0
    for symmetry in symmetries(voxel_size, (side,) * 3):
        if not all(predict_module._match(symmetry, o, offsets) for o in offsets):
            continue
        tested += 1
        mean, weight = align(exact(symmetry.apply(labels)), window, symmetry, offsets)
        assert mean.shape == weight.shape == wanted.shape
        torch.testing.assert_close(mean, wanted * weight)
        for k, offset in enumerate(offsets):
            moved = symmetry.move(offset)
            for v in itertools.product(range(side), repeat=3):
                leaves = any(not 0 <= a + o < side for a, o in zip(v, offset))
                # an answer stored at the edge's other end is missing where that lies outside the crop
                assert (weight[(k, *v)] == 0) == (moved not in offsets and leaves)
    usual = offsets[:3] == NEAREST
    assert tested == (48 if voxel_size == ISO else 16) if usual else 0 < tested < 48


def test_a_predictor_of_exact_affinities_through_all_of_predict(run, monkeypatch):
    labels = np.random.default_rng(0).integers(0, 4, (9, 50, 45)).astype(np.uint8)
    labels[..., 0, 0] = 255
    offsets = run.config.target.offsets
    monkeypatch.setattr(predict_module, "load_segmenter", lambda run: Oracle(offsets))
    both = affinities(torch.from_numpy(labels).long()[None], torch.ones(1, *labels.shape, dtype=torch.bool), offsets)
    wanted, inside = (t[0].numpy() for t in both)
    for mirror in (1, 5, 16):
        got = np.asarray(predict(run, Volume.from_array(labels, tiny.NM), block_vx=(5, 32, 32), mirror=mirror))
        assert ((got > 127) == wanted)[inside].all(), mirror


def test_mirror_counts_distinct_variants(run):
    em = volume((4, 32, 32))
    every = np.asarray(predict(run, em, mirror=16))
    np.testing.assert_array_equal(np.asarray(predict(run, em, mirror=100)), every)
    assert (np.asarray(predict(run, em, mirror=1)) != every).any()
    flipped = Volume.from_array(np.ascontiguousarray(np.asarray(em)[:, :, ::-1]), tiny.NM)
    other = np.asarray(predict(run, flipped, mirror=16)).astype(int)  # the average knows no left and right
    assert np.abs(other[0] - every[0][:, :, ::-1]).max() <= 1
    assert np.abs(other[2][:, :, :0:-1] - every[2][:, :, 1:]).max() <= 1, "the edge of v and v - 1, from the other side"


# ---- the whole volume


def by_loop(run, array, overlap=0.5):
    """All crops of the volume at once, in double precision."""
    model, crop, shape = load_segmenter(run), run.config.crop, array.shape
    levels = measure_levels(Volume.from_array(array, tiny.NM), run.config.normalisation)
    window = blending_window(crop).double().numpy()
    size = [max(c, s) for c, s in zip(crop, shape)]
    padded = np.pad(levels.apply(array), [(0, b - a) for a, b in zip(shape, size)], mode="symmetric")
    total, weight = np.zeros((run.config.target.channels, *size)), np.zeros(size)
    stride = [round(c * (1 - overlap)) for c in crop]
    for start in itertools.product(*(sorted({*range(0, s - c, d), s - c}) for s, c, d in zip(size, crop, stride))):
        place = tuple(slice(a, a + c) for a, c in zip(start, crop))
        with torch.no_grad():
            answer = model(torch.from_numpy(padded[place])[None, None]).sigmoid()[0].double().numpy()
        total[(slice(None), *place)] += answer * window
        weight[place] += window
    return (total / weight * 255)[(slice(None), *(slice(0, s) for s in shape))]


@pytest.mark.parametrize("shape, overlap", [
    ((9, 50, 45), 0.5), ((9, 50, 45), 0.0), ((3, 20, 50), 0.5), ((2, 9, 7), 0.5),
])
def test_prediction_is_the_loop_and_no_block_shows(run, shape, overlap):
    """Also for volumes smaller than a crop: the rest is reflected, however little there is."""
    em = volume(shape)
    wanted = by_loop(run, np.asarray(em), overlap)
    whole = np.asarray(predict(run, em, overlap=overlap))
    assert whole.dtype == np.uint8 and np.abs(whole - wanted).max() <= 0.51
    assert whole.std() > 20, "the network says something"
    for block in [(4, 16, 16), (5, 23, 64), (100, 7, 100)]:
        np.testing.assert_array_equal(np.asarray(predict(run, em, block_vx=block, overlap=overlap)), whole)


def test_per_section_levels_and_contrast_go_through_prediction(tmp_path):
    """A jump of one section's brightness, and inverted contrast, are gone before the network sees them."""
    one = tiny.untrained_run(tmp_path / "one", normalisation=Normalisation(per="section"))
    two = tiny.untrained_run(tmp_path / "two", normalisation=Normalisation(per="section", invert=True))
    array = tiny.noise((9, 40, 40)) // 2
    jumps = array.copy()
    jumps[5] += 100
    plain = np.asarray(predict(one, Volume.from_array(array, tiny.NM)))
    jumped = predict(one, Volume.from_array(jumps, tiny.NM), block_vx=(4, 32, 32))
    np.testing.assert_array_equal(np.asarray(jumped), plain)
    inverted = np.asarray(predict(two, Volume.from_array(255 - array, tiny.NM))).astype(int)
    assert np.abs(inverted - plain).max() <= 3


def test_what_prediction_returns(run, tmp_path):
    em = volume((8, 40, 36)).crop("2:7,4:40,:")
    held = predict(run, em)
    disk = predict(run, em, tmp_path / "a.zarr")
    for got in (held, disk, open_path(tmp_path / "a.zarr")):
        assert got.shape == (4, 5, 36, 36) and got.dtype == np.uint8 and got.voxel_size_nm == tiny.NM
        assert got.attrs["offsets"] == [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, -4, 0]]
        assert got.attrs["source"] == "mine" and got.attrs["source_box"] == "2:7,4:40,0:36"
        np.testing.assert_array_equal(np.asarray(got), np.asarray(held))
    assert complete(tmp_path / "a.zarr") and complete(tmp_path / "gone.zarr")


# ---- interrupted


def stops_after(count, monkeypatch):
    original, calls = predict_module.predict_block, []

    def block(*args, **kwargs):
        if len(calls) == count:
            raise tiny.Stop
        calls.append(args[4])
        return original(*args, **kwargs)

    monkeypatch.setattr(predict_module, "predict_block", block)
    return calls


@pytest.mark.parametrize("after", [0, 1, 3])
def test_interrupted_and_started_again_goes_on(run, tmp_path, monkeypatch, after):
    em, block, out = volume((8, 40, 40)), (4, 32, 32), tmp_path / "a.zarr"
    wanted = np.asarray(predict(run, em, block_vx=block))
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        stops_after(after, patch)
        predict(run, em, out, block_vx=block)
    assert not complete(out)
    with monkeypatch.context() as patch:
        calls = stops_after(1000, patch)
        np.testing.assert_array_equal(np.asarray(predict(run, em, out, block_vx=block)), wanted)
        assert len(calls) == 8 - after, "what was done is not done again"
        predict(run, em, out, block_vx=block)
        assert len(calls) == 8 - after, "nor is a finished one"
    assert complete(out)


def test_overwrite_goes_on_with_unfinished_work_and_repeats_a_finished_one(run, tmp_path, monkeypatch):
    em, block, out = volume((8, 40, 40)), (4, 32, 32), tmp_path / "a.zarr"
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        stops_after(3, patch)
        predict(run, em, out, block_vx=block)
    with monkeypatch.context() as patch:
        calls = stops_after(1000, patch)
        got = predict(run, em, out, block_vx=block, overwrite=True)
        assert len(calls) == 5
        np.testing.assert_array_equal(np.asarray(got), np.asarray(predict(run, em, block_vx=block)))
        calls.clear()
        predict(run, em, out, block_vx=block, overwrite=True)
        assert len(calls) == 8


def test_another_box_is_another_work_also_when_resampled(run, tmp_path):
    """Two boxes of one shape; resampled, their views are equal in name, size and box."""
    fine = Volume.from_array(tiny.noise((8, 64, 64)), (40.0, 4.0, 4.0), name="fine")
    one, other = (fine.crop(box) for box in ("0:4,:,:", "4:8,:,:"))
    for k, views in enumerate([(one, other), tuple(resample(v, tiny.NM) for v in (one, other))]):
        first = predict(run, views[0], tmp_path / f"{k}.zarr", resample_to_run=not k)
        with pytest.raises(FileExistsError, match="holds another prediction"):
            predict(run, views[1], tmp_path / f"{k}.zarr", resample_to_run=not k)
        predict(run, views[0], tmp_path / f"{k}.zarr", resample_to_run=not k)
        assert "0:4,0:64,0:64" in (first.attrs["source_box"] if not k else first.attrs["source"])


def test_a_run_and_a_file_may_be_named_otherwise_when_work_goes_on(tmp_path, monkeypatch):
    """From another folder, by another path, the run moved: the content counts."""
    own = tiny.untrained_run(tmp_path / "seg")
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["raw"] = tiny.noise((8, 40, 40))
    em = open_path(tmp_path / "em.h5:raw", voxel_size_nm=tiny.NM)
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        stops_after(3, patch)
        predict(own, em, tmp_path / "a.zarr", block_vx=(4, 32, 32))
    own.folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    calls = stops_after(1000, monkeypatch)
    em = open_path("em.h5:raw", voxel_size_nm=tiny.NM)
    got = predict(load_run("moved"), em, "a.zarr", block_vx=(4, 32, 32))
    assert len(calls) == 5 and got.attrs["run"] == str((tmp_path / "seg").resolve())


def test_killed_before_the_first_note(run, tmp_path, monkeypatch):
    em, out = volume((4, 32, 32)), tmp_path / "a.zarr"
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        patch.setattr(predict_module, "write_whole", tiny.stop)
        predict(run, em, out)
    assert out.exists() and not complete(out)
    np.testing.assert_array_equal(np.asarray(predict(run, em, out)), np.asarray(predict(run, em)))


def test_a_full_disk_leaves_work_that_goes_on(run, tmp_path, monkeypatch):
    em, block, out = volume((8, 40, 40)), (4, 32, 32), tmp_path / "a.zarr"
    wanted, original, writes = np.asarray(predict(run, em, block_vx=block)), Volume.__setitem__, []

    def full(self, index, value):
        writes.append(index)
        if len(writes) == 4:
            raise OSError(28, "No space left on device")
        original(self, index, value)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Volume, "__setitem__", full)
        predict(run, em, out, block_vx=block)
    assert not complete(out) and len(writes) == 4
    np.testing.assert_array_equal(np.asarray(predict(run, em, out, block_vx=block)), wanted)


# ---- refusals


def test_existing_outputs_are_refused(run, tmp_path, monkeypatch):
    em = volume((8, 40, 40))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/a.txt").write_text("x")
    (tmp_path / "file.zarr").write_text("x")
    for name in ("thesis", "file.zarr"):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=f"{name} exists"):
                predict(run, em, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "thesis/a.txt").exists() and (tmp_path / "file.zarr").read_text() == "x"
    out = tmp_path / "a.zarr"
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        stops_after(2, patch)
        predict(run, em, out, block_vx=(4, 32, 32))
    other = tiny.untrained_run(tmp_path / "other", seed=1)
    renamed = Volume.from_array(np.asarray(em), tiny.NM, name="another")
    changed = Volume.from_array(255 - np.asarray(em) // 2, tiny.NM, name="mine")
    resized = em.with_voxel_size((40.0, 8.0, 9.0))
    for args, values in [((other, em), {}), ((run, renamed), {}), ((run, resized), {}), ((run, em), {"mirror": 2}),
                         ((run, em), {"overlap": 0.25})]:  # fmt: skip
        with pytest.raises(FileExistsError, match="a.zarr: holds another prediction .*--overwrite"):
            predict(*args, out, block_vx=(4, 32, 32), **values)
    section = tiny.untrained_run(tmp_path / "section", normalisation=Normalisation())
    predict(section, em, tmp_path / "b.zarr")
    with pytest.raises(FileExistsError, match="b.zarr: holds another prediction"):
        predict(section, changed, tmp_path / "b.zarr")  # the same name, other voxels
    got = predict(other, em, out, overwrite=True)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(predict(other, em)))


def test_which_runs_predict(run, tmp_path):
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["raw"] = tiny.noise((4, 32, 32))
    mae = create_run(tmp_path / "mae", tiny.pretrain_config(tmp_path / "em.h5"), resume=False, overwrite=False,
                     kind="pretrain", voxel_size_nm=tiny.NM)  # fmt: skip
    with pytest.raises(ValueError, match="mae: a pretrain run; prediction needs a fine-tuned one"):
        predict(mae, volume((4, 32, 32)))
    young = create_run(tmp_path / "young", run.config, resume=False, overwrite=False, kind="finetune",
                       voxel_size_nm=tiny.NM)  # fmt: skip
    with pytest.raises(ValueError, match="young: not finished; go on with emae finetune --resume"):
        predict(young, volume((4, 32, 32)))
    wide = tiny.untrained_run(tmp_path / "wide", model=tiny.SEGMENTER.model_copy(update={"channels": (8, 16, 16)}))
    young.weights.write_bytes(wide.weights.read_bytes())
    with pytest.raises(ValueError, match="weights.safetensors: a checkpoint of another architecture"):
        predict(young, volume((4, 32, 32)))
    young.weights.write_bytes(wide.weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        predict(young, volume((4, 32, 32)))


@pytest.mark.parametrize("array, wanted", [
    (np.full((4, 32, 32), 7, np.uint8), "mine: constant"),
    (np.zeros((2, 4, 32, 32), np.uint8), "mine: 2 channels"),
    (np.full((4, 32, 32), np.nan, np.float32), "mine: 4096 NaN"),
])
def test_bad_volumes(tmp_path, run, array, wanted):
    with pytest.raises(ValueError, match=wanted):
        predict(run, Volume.from_array(array, tiny.NM, name="mine"), tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("values", [{"overlap": 1.0}, {"overlap": -0.1}, {"mirror": 0}])
def test_bad_settings(run, values):
    with pytest.raises(ValueError, match="want 0 <= overlap < 1 and mirror >= 1"):
        predict(run, volume((4, 32, 32)), **values)


def test_voxel_size_is_checked_with_two_remedies(run):
    for size in [(40.0, 8.0, 8.0), (50.0, 8.0, 6.4), (32.0, 10.0, 8.0)]:
        assert fit_voxel_size(run, volume((4, 32, 32), size)).voxel_size_nm == size
    for size in [(50.1, 8.0, 8.0), (40.0, 8.0, 6.3), (40.0, 4.0, 4.0)]:
        em = volume((6, 32, 32), size)
        with pytest.raises(ValueError) as error:
            predict(run, em)
        for part in ("mine", str(size), "(40.0, 8.0, 8.0)", "--resample", "--any-voxel-size"):
            assert part in str(error.value)
        assert predict(run, em, any_voxel_size=True).shape == (4, 6, 32, 32)
    with pytest.raises(ValueError, match="mine does not state its voxel size.*--voxel-size"):
        predict(run, volume((4, 32, 32), None))


def test_resampled_on_the_fly(run):
    """At twice the resolution: what is predicted is the volume averaged by twos."""
    fine = tiny.noise((6, 64, 80))
    got = predict(run, Volume.from_array(fine, (40.0, 4.0, 4.0), name="fine"), resample_to_run=True)
    mean = fine.reshape(6, 32, 2, 40, 2).mean((2, 4))
    assert got.shape == (4, 6, 32, 40) and got.voxel_size_nm == tiny.NM
    wanted = np.asarray(predict(run, Volume.from_array(np.rint(mean).astype(np.uint8), tiny.NM)))
    assert np.abs(np.asarray(got).astype(int) - wanted).max() <= 20  # halves are rounded either way
    assert np.abs(np.asarray(got).astype(int) - wanted).mean() < 1


# ---- memory


def test_memory_is_that_of_a_block(tmp_path):
    """64 MB of prediction from a volume that is made as it is read."""
    reads = []

    def read(slices):
        box = tuple(s.stop - s.start for s in slices)
        reads.append(box)
        y, x = np.ogrid[slices[1], slices[2]]
        return np.broadcast_to(((y * 7 + x * 3) % 251).astype(np.uint8), box).copy()

    class Flat(nn.Module):
        def forward(self, x):
            return torch.zeros(1, 1, 1, 1, 1).expand(1, 4, *x.shape[2:])

    em = Volume(VolumeSource((16, 1024, 1024), np.dtype(np.uint8), (16, 64, 64), read), "made", voxel_size_nm=tiny.NM)
    big = tiny.untrained_run(tmp_path / "big", crop=(8, 128, 128))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_module, "load_segmenter", lambda run: Flat())
        predict(big, em.crop("0:16,0:128,0:128"), tmp_path / "warm.zarr", overlap=0.0)
        reads.clear()
        tracemalloc.start()
        predict(big, em, tmp_path / "a.zarr", block_vx=(16, 256, 128), overlap=0.0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    block = 4 * 16 * 256 * 128 * 4  # channels, voxels, bytes of a float
    assert peak < 3.5 * block < em.size * 4 / 2, peak / block
    assert max(np.prod(r) for r in reads) <= 8 * 128 * 128
    assert (open_path(tmp_path / "a.zarr")[:, ::5, ::111, ::97] == 128).all()


def test_read_padded_reflects(run):
    em = volume((3, 4, 5))
    levels = measure_levels(em, Normalisation(per="dtype"))
    got = read_padded(em, levels, Box((0, 0, 0), (8, 6, 5))).numpy()
    plain = levels.apply(np.asarray(em))
    np.testing.assert_array_equal(got[:3, :4], plain)
    np.testing.assert_array_equal(got[:, :4, :], plain[[0, 1, 2, 2, 1, 0, 0, 1]])
    np.testing.assert_array_equal(got[:3, 4:], plain[:, [3, 2]])


def test_offsets_of_any_order(tmp_path):
    target = Affinities(offsets=((0, 0, -1), (0, -4, 0), (-1, 0, 0), (0, -1, 0)))
    other = tiny.untrained_run(tmp_path / "other", target=target, decoders=(Agglomeration(threshold=0.5),))
    assert predict(other, volume((4, 32, 32)), mirror=16).attrs["offsets"] == [list(o) for o in target.offsets]
