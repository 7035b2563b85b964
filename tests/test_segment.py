"""segment: raw to instances on disk, with a perfect network (score 0) and with a real one (score above a line)."""

import h5py
import numpy as np
import pytest
import tiny
import torch
from skimage import measure
from torch import nn

import emae._predict as predict_module
import emae._segment as segment_module
from emae._decode import Agglomeration
from emae._evaluate import score
from emae._finetune import finetune
from emae._phantom import PhantomConfig, make_phantom
from emae._predict import complete
from emae._pretrain import pretrain
from emae._runs import load_run
from emae._segment import fit_shape, prediction_path, save_labels, segment
from emae._targets import NEAREST, Affinities
from emae._volume import Volume, create_volume, open_path


class Perfect(nn.Module):
    """Grey values are labels; an edge that leaves the crop is taken for an inner one."""

    def forward(self, x):
        labels = ((x[:, 0] + 2) * 255 / 4).round().long()
        channels = []
        for offset in NEAREST:
            axis = [d for d, o in enumerate(offset) if o][0] + 1
            other = torch.cat([labels.narrow(axis, 0, 1), labels.narrow(axis, 0, labels.shape[axis] - 1)], axis)
            channels.append((labels == other) & (labels != 0))
        return torch.stack(channels, 1).float() * 40 - 20


@pytest.fixture(scope="module")
def tissue():
    """Labels of tiny tissue, few enough to be grey values; pieces hang together by faces and are no single voxels."""
    labels = measure.label(make_phantom(PhantomConfig(shape=(12, 96, 96), voxel_size_nm=tiny.NM, seed=3)).labels,
                           connectivity=1)  # fmt: skip
    labels *= (np.bincount(labels.ravel()) > 1)[labels]
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    assert 5 < labels.max() < 256
    return labels.astype(np.uint8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("emae._runs.Run._tensorboard", lambda self: None)
    (tmp_path / "runs").mkdir()
    return tiny.untrained_run(tmp_path / "runs/seg", target=Affinities(offsets=NEAREST),
                              decoders=(Agglomeration(threshold=0.5, fragments="affinity"),))  # fmt: skip


@pytest.fixture
def perfect(monkeypatch):
    monkeypatch.setattr(predict_module, "load_segmenter", lambda run: Perfect())


def raw(labels, voxel_size_nm=tiny.NM):
    return Volume.from_array(labels, voxel_size_nm, name="tissue")


def test_a_perfect_network_scores_zero(run, perfect, tissue, tmp_path):
    said = []
    got = segment(run, raw(tissue), tmp_path / "labels.zarr", say=said.append)
    assert got.shape == tissue.shape and got.dtype == np.uint64 and got.voxel_size_nm == tiny.NM
    result = score(true=tissue, predicted=np.asarray(got))
    assert max(result.adapted_rand_error, result.voi_split, result.voi_merge) < 1e-12
    again = open_path(tmp_path / "labels.zarr")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(got))
    assert again.attrs["decoder"]["threshold"] == 0.5 and again.attrs["source"] == "tissue"
    assert open_path(prediction_path(tmp_path / "labels.zarr")).shape == (3, *tissue.shape)
    assert any("objects at threshold 0.5" in s for s in said) and any("block" in s for s in said)


def test_resampled_labels_lie_on_the_original_grid(run, perfect, tissue, tmp_path):
    """Twice the resolution in the plane, and odd sides: labels come back on that grid."""
    fine = tissue.repeat(2, 1).repeat(2, 2)[:, :-1, :-1]
    with pytest.raises(ValueError, match="--resample"):
        segment(run, raw(fine, (40.0, 4.0, 4.0)), tmp_path / "labels.zarr")
    assert not list(tmp_path.glob("*.zarr"))
    got = segment(run, raw(fine, (40.0, 4.0, 4.0)), tmp_path / "labels.zarr", resample_to_run=True)
    assert got.shape == fine.shape and got.voxel_size_nm == (40.0, 4.0, 4.0)
    assert open_path(tmp_path / "labels_prediction.zarr").voxel_size_nm == tiny.NM
    inner = (slice(None), slice(0, 180), slice(0, 180))
    assert score(true=fine[inner], predicted=np.asarray(got)[inner]).adapted_rand_error < 0.05


def test_fit_shape():
    labels = np.arange(8).reshape(2, 2, 2)
    assert fit_shape(labels, (2, 1, 3)).tolist() == [[[0, 1, 1]], [[4, 5, 5]]]
    np.testing.assert_array_equal(fit_shape(labels, (2, 2, 2)), labels)


def test_interrupted_while_decoding_goes_on_with_its_prediction(run, perfect, tissue, tmp_path, monkeypatch):
    out, blocks = tmp_path / "labels.zarr", []
    original = predict_module.predict_block
    monkeypatch.setattr(predict_module, "predict_block", lambda *a, **k: blocks.append(1) or original(*a, **k))
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        patch.setattr(segment_module, "decode", tiny.stop)
        segment(run, raw(tissue), out)
    done = len(blocks)
    assert done and complete(prediction_path(out)) and not out.exists()
    segment(run, raw(tissue), out)
    assert len(blocks) == done


def test_a_volume_of_labels_is_whole_or_not_there(run, tissue, tmp_path, monkeypatch):
    out, original = tmp_path / "labels.zarr", Volume.__setitem__

    def full(self, index, value):
        original(self, index, value)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Volume, "__setitem__", full)
        save_labels(tissue, out, raw(tissue), run)
    assert not list(tmp_path.glob("*labels*")) and not list(tmp_path.glob(".*"))
    save_labels(tissue, out, raw(tissue), run)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Volume, "__setitem__", full)
        save_labels(tissue // 2, out, raw(tissue), run, overwrite=True)
    np.testing.assert_array_equal(np.asarray(open_path(out)), tissue)


def test_what_is_refused_before_any_work(run, tissue, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_module, "predict", lambda *args, **kwargs: pytest.fail("work was begun"))
    no_threshold = tiny.untrained_run(tmp_path / "runs/none", threshold=None)
    with pytest.raises(ValueError, match="none: no threshold was chosen"):
        segment(no_threshold, raw(tissue), tmp_path / "labels.zarr")
    create_volume(tmp_path / "ours.zarr", (2, 2, 2), np.uint8, tiny.NM)
    (tmp_path / "theirs").mkdir()
    with pytest.raises(FileExistsError, match="ours.zarr exists: choose another name, or replace it with --overwrite"):
        segment(run, raw(tissue), tmp_path / "ours.zarr")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="theirs exists"):
            segment(run, raw(tissue), tmp_path / "theirs", overwrite=overwrite)
    with pytest.raises(FileNotFoundError, match="its folder"):
        segment(run, raw(tissue), tmp_path / "gone/labels.zarr")


def test_from_raw_to_instances(tmp_path, monkeypatch):
    """Flow: pre-train on tissue, fine-tune from it, segment other tissue; far better than one object."""
    monkeypatch.setattr("emae._runs.Run._tensorboard", lambda self: None)
    torch.set_num_threads(1)
    config = PhantomConfig(shape=(12, 128, 128), voxel_size_nm=tiny.NM, noise=0.3).without_defects()
    paths = []
    for seed in (1, 2):
        tissue = make_phantom(config.model_copy(update={"seed": seed}))
        paths.append(tmp_path / f"tissue{seed}.h5")
        with h5py.File(paths[-1], "w") as file:
            file["raw"], file["labels"] = tissue.raw, tissue.labels
    mae = pretrain(tiny.pretrain_config(paths[0], 10, held_out=()), tmp_path / "mae", say=tiny.quiet)
    schedule = tiny.schedule(80, rate=1e-2, warmup=5, report_every=60, validate_every=200, checkpoint_every=60)
    model = tiny.SEGMENTER.model_copy(update={"channels": (16, 16, 16)})
    tuned = finetune(tiny.finetune_config(paths[0], schedule=schedule, model=model), tmp_path / "seg", start=mae,
                     say=tiny.quiet)  # fmt: skip
    run = load_run(tuned.folder)
    volume = open_path(f"{paths[1]}:raw", voxel_size_nm=tiny.NM)
    got = np.asarray(segment(run, volume, tmp_path / "labels.zarr"))
    with h5py.File(paths[1]) as file:
        truth = file["labels"][...]
    mine = score(true=truth, predicted=got)
    one = score(true=truth, predicted=np.ones_like(got))
    assert mine.adapted_rand_error < 0.25 < one.adapted_rand_error, (mine, run.metrics())
