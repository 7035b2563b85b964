"""Decoding: exact affinities of a truth give the truth back; noise, thresholds, small objects, bad input."""

import json
import subprocess
import sys

import cc3d
import numpy as np
import pytest
from scipy.spatial import cKDTree

from emae import _decode
from emae._decode import (
    NEAREST,
    Agglomeration,
    ClassicalConfig,
    choose_classical,
    choose_decoder,
    choose_threshold,
    decode,
    fragments,
    middle_of_plateau,
    nearest_affinities,
    segment_raw,
)
from emae._evaluate import score

HALF = Agglomeration(threshold=0.5)


def cells(shape, number, seed, voxel_size, wall_nm=0.0):
    """Random Voronoi cells, 6-connected and larger than a voxel; background walls between them or none."""
    rng = np.random.default_rng(seed)
    points = rng.random((number, 3)) * shape * np.asarray(voxel_size)
    at = np.stack(np.meshgrid(*[np.arange(s) * v for s, v in zip(shape, voxel_size, strict=True)], indexing="ij"), -1)
    distance, nearest = cKDTree(points).query(at.reshape(-1, 3), k=2)
    labels = (nearest[:, 0] + 1).reshape(shape).astype(np.uint32)
    if wall_nm:
        labels[(distance[:, 1] - distance[:, 0]).reshape(shape) < wall_nm] = 0
    labels = cc3d.connected_components(labels, connectivity=6)
    labels[np.bincount(labels.ravel())[labels] < 2] = 0
    return labels


def exact(labels, offsets=NEAREST):
    """Affinities by the definition, an edge at a time along each offset (all of them negative here)."""
    affinities = np.zeros((len(offsets), *labels.shape), np.float32)
    for channel, offset in zip(affinities, offsets, strict=True):
        upper = tuple(slice(-o, None) for o in offset)
        lower = tuple(slice(0, s + o) for o, s in zip(offset, labels.shape, strict=True))
        channel[upper] = (labels[upper] == labels[lower]) & (labels[upper] != 0)
    return affinities


def same_partition(a, b):
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(pairs[0]) == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))


@pytest.mark.parametrize("kind", ["auto", "sections", "volume", "affinity"])
@pytest.mark.parametrize("wall", [0.0, 15.0])
@pytest.mark.parametrize(("shape", "voxel_size"), [((30, 40, 50), (10, 10, 10)), ((8, 70, 80), (50, 5, 5))])
def test_exact_affinities_give_the_truth_back(kind, wall, shape, voxel_size):
    for seed in range(3):
        truth = cells(shape, 50, seed, voxel_size, wall)
        config = Agglomeration(threshold=0.5, fragments=kind)
        labels = decode(exact(truth), config, voxel_size_nm=voxel_size)
        s = score(true=truth, predicted=labels, relabel_true=False, unpredicted="one_segment")
        assert s.adapted_rand_error == 0 and s.voi == 0
        assert labels.dtype == np.uint64 and set(np.unique(labels)) - {0} == set(
            range(1, len(np.unique(truth[truth > 0])) + 1)
        )
        if wall:  # background voxels stay background (a wall of nm may be a voxel thin, but never an object)
            assert same_partition(labels, truth)


@pytest.mark.parametrize("threshold", [0.01, 0.99])
def test_any_threshold_does_for_exact_affinities(threshold):
    truth = cells((20, 30, 30), 20, 5, (1, 1, 1))
    assert same_partition(decode(exact(truth), Agglomeration(threshold=threshold), voxel_size_nm=(1, 1, 1)), truth)


@pytest.mark.parametrize(("shape", "voxel_size"), [((16, 60, 60), (10, 10, 10)), ((8, 90, 100), (50, 5, 5))])
def test_noise_and_a_hole_in_a_wall_are_survived(shape, voxel_size):
    truth = cells(shape, 15, 7, voxel_size, 2.5 * voxel_size[1])
    rng = np.random.default_rng(0)
    noisy = np.clip(exact(truth) * 0.7 + 0.15 + rng.normal(0, 0.1, (3, *shape)), 0, 1).astype(np.float32)
    z = shape[0] // 2
    left, right = truth[z, :, :-8], truth[z, :, 8:]
    y, x = np.argwhere((left != 0) & (right != 0) & (left != right))[50]
    noisy[:, z, y, x : x + 9] = 0.9  # a bridge between two cells, small beside their contact
    labels = decode(noisy, Agglomeration(threshold=0.5), voxel_size_nm=voxel_size)
    ours = score(true=truth, predicted=labels, voxel_size_nm=voxel_size)
    crude = cc3d.connected_components(noisy.mean(0) > 0.5, connectivity=6)  # falls into the hole
    assert ours.adapted_rand_error < 0.06
    assert score(true=truth, predicted=crude, voxel_size_nm=voxel_size).precision < 0.97 < ours.precision


def test_channels_are_found_by_their_offsets_and_uint8_is_the_same():
    truth = cells((10, 30, 30), 12, 2, (1, 1, 1))
    offsets = [(0, 0, -1), (-3, 0, 0), (0, -1, 0), (-1, 0, 0)]
    volume = exact(truth, offsets)
    plain, _ = nearest_affinities(exact(truth))
    picked, _ = nearest_affinities(volume, offsets)
    np.testing.assert_array_equal(picked, plain)

    class Lazy:
        name, dtype, shape, voxel_size_nm = (
            "affinities.zarr",
            np.dtype(np.uint8),
            volume.shape,
            (10.0, 10.0, 10.0),
        )

        def __getitem__(self, channel):
            return (volume[channel] * 255).astype(np.uint8)

    lazy = Lazy()
    lazy.attrs = {"offsets": [list(offset) for offset in offsets]}
    assert same_partition(decode(lazy, HALF), truth)
    with pytest.raises(ValueError, match=r"affinities.zarr: no channel has the offset \(-1, 0, 0\)"):
        nearest_affinities(lazy, [(0, 0, -1), (-3, 0, 0), (0, -1, 0), (-2, 0, 0)])


def test_sweep_leaves_earlier_results_and_fragments_alone():
    rng = np.random.default_rng(1)
    affinities = rng.random((3, 8, 24, 24)).astype(np.float32)
    config = Agglomeration(fragments="volume", seed_spacing_vx=2, seed_sigma_vx=0.5, foreground=0.5)
    pieces = fragments(affinities, config)
    before = pieces.copy()
    sweep = list(_decode._agglomerate(affinities, pieces, "mean", [0.6, 0.4, 0.5]))
    np.testing.assert_array_equal(pieces, before)
    assert [threshold for threshold, _ in sweep] == [0.4, 0.5, 0.6]
    counts = [len(np.unique(labels)) for _, labels in sweep]
    assert counts[0] > counts[1] > counts[2]
    for threshold, labels in sweep:  # each equals its own run from the start
        ((_, alone),) = _decode._agglomerate(affinities, pieces, "mean", [threshold])
        np.testing.assert_array_equal(alone, labels)


def test_waterz_itself_writes_into_its_fragments():
    import waterz

    affinities = np.ones((3, 2, 4, 4), np.float32)
    pieces = np.arange(1, 33, dtype=np.uint64).reshape(2, 4, 4)
    with _decode._quiet():
        (result,) = waterz.agglomerate(affinities, [0.5], fragments=pieces)
    assert result is pieces and len(np.unique(pieces)) == 1  # why _agglomerate copies


def test_mean_affinity_of_a_contact_decides_by_hand():
    # two 1 x 2 x 3 plates side by side in x: contact of two edges, 0.9 and 0.3, so a cost of 1 - 0.6 = 0.4
    affinities = np.ones((3, 1, 2, 6), np.float32)
    affinities[2, 0, :, 3] = [0.9, 0.3]
    affinities[1, 0, 1, 3:] = affinities[1, 0, 1, :3] = 1
    pieces = np.repeat(np.array([[[1, 2]]], np.uint64), 3, axis=2).repeat(2, axis=1)
    got = {t: len(np.unique(labels)) for t, labels in _decode._agglomerate(affinities, pieces, "mean", [0.38, 0.42])}
    assert got == {0.38: 2, 0.42: 1}


def test_small_objects_are_merged_or_removed():
    truth = np.ones((6, 20, 20), np.uint32)
    truth[:, 10:] = 2
    truth[2:4, 2:4, 2:4] = 3  # 8 voxels inside object 1
    affinities = exact(truth)
    kept = decode(affinities, HALF, voxel_size_nm=(1, 1, 1))
    merged = decode(affinities, HALF.model_copy(update={"min_size_vx": 9}), voxel_size_nm=(1, 1, 1))
    removed = decode(affinities, HALF.model_copy(update={"min_size_vx": 9, "small": "remove"}), voxel_size_nm=(1, 1, 1))
    assert same_partition(kept, truth)
    assert same_partition(merged, np.where(truth == 3, 1, truth))
    assert same_partition(removed, np.where(truth == 3, 0, truth)) and (removed[truth == 3] == 0).all()
    exactly = decode(affinities, HALF.model_copy(update={"min_size_vx": 8}), voxel_size_nm=(1, 1, 1))
    assert same_partition(exactly, truth)


def test_the_middle_of_a_plateau_is_chosen():
    assert middle_of_plateau([3, 1, 1, 1, 1, 1, 2]) == 3
    assert middle_of_plateau([0.0, 0.0, 0.0]) == 1
    assert middle_of_plateau([5, 4, 1, 2, 1]) == 2  # a second valley elsewhere does not pull it
    assert middle_of_plateau([2, 1]) == 1 and middle_of_plateau([1, 2]) == 0


def test_threshold_is_chosen_on_labels_with_its_table():
    truth = cells((12, 40, 40), 12, 4, (1, 1, 1), 2.0)
    rng = np.random.default_rng(2)
    noisy = np.clip(exact(truth) * 0.4 + 0.35 + rng.normal(0, 0.15, (3, *truth.shape)), 0, 1).astype(np.float32)
    config, table = choose_threshold(
        truth, noisy, Agglomeration(fragments="volume"), score, [0.02, 0.2, 0.3, 0.4, 0.5, 0.9]
    )
    errors = {row["threshold"]: row["adapted_rand_error"] for row in table}
    assert errors[config.threshold] == min(errors.values()) < errors[0.02] and errors[0.9] > 0.5
    assert json.loads(json.dumps(table)) == table
    s = score(true=truth, predicted=decode(noisy, config))
    assert s.adapted_rand_error == errors[config.threshold]


def test_decoder_is_chosen_among_candidates():
    truth = cells((8, 40, 40), 8, 4, (40, 5, 5))
    noisy = exact(truth) * 0.5 + 0.3
    bad = Agglomeration(fragments="volume", min_size_vx=9000, small="remove")
    candidates = [bad, Agglomeration(), Agglomeration(fragments="affinity")]
    config, table = choose_decoder(
        truth, noisy.astype(np.float32), candidates, score, [0.1, 0.5], voxel_size_nm=(40, 5, 5)
    )
    # a flood of voxels is ragged where walls have no thickness; edges are not, and so the last candidate is exact
    assert config == candidates[2].model_copy(update={"threshold": 0.1}) and len(table) == 6
    assert same_partition(decode(noisy.astype(np.float32), config, voxel_size_nm=(40, 5, 5)), truth)
    assert [row["criterion"] == 0 for row in table] == [False] * 4 + [True] * 2
    with pytest.raises(ValueError, match="no configs"):
        choose_decoder(truth, noisy, [], score, voxel_size_nm=(40, 5, 5))


def test_nothing_is_printed():
    code = (
        "import numpy as np; from emae._decode import *; print('before');"
        "decode(np.ones((3, 4, 8, 8), np.float32), Agglomeration(threshold=0.5, fragments='volume'));"
        "print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "before\nafter\n" and done.stderr == ""


def grey(truth, seed):
    """Bright cells, dark walls, noise."""
    from scipy.ndimage import gaussian_filter

    clean = gaussian_filter(np.where(truth > 0, 180.0, 60.0), 0.7)
    return np.clip(clean + np.random.default_rng(seed).normal(0, 20, truth.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("shape", "voxel_size"), [((32, 48, 48), (10, 10, 10)), ((6, 100, 100), (40, 5, 5))])
def test_classical_path_finds_cells_with_dark_walls(shape, voxel_size):
    validation = cells(shape, 14, 0, voxel_size, 40.0 if shape[0] > 10 else 25.0)
    test = cells(shape, 14, 1, voxel_size, 40.0 if shape[0] > 10 else 25.0)
    configs = [ClassicalConfig(sigma_nm=s * voxel_size[1], ridge=r) for s, r in ((1, 0.5), (2, 0.5), (1, 1.0))]
    config, table = choose_classical(
        validation, grey(validation, 0), configs, score, [0.2, 0.3, 0.4, 0.5], voxel_size_nm=voxel_size
    )
    assert len(table) == 3 and config.agglomeration.threshold is not None
    labels = segment_raw(grey(test, 1), config, voxel_size)
    assert score(true=test, predicted=labels, voxel_size_nm=voxel_size).adapted_rand_error < 0.15


def test_bad_input():
    good = exact(cells((6, 20, 20), 6, 0, (1, 1, 1)))
    assert decode(good, HALF, voxel_size_nm=(1, 1, 1)).max() == 6  # the good twin
    for affinities, message in [
        (good[0], "shape"),
        (good[:2], "2 channels and no offsets"),
        (good * 2, r"in \[0, 1\]"),
        (np.where(good > 0, np.nan, good), r"in \[0, 1\]"),
        (good.astype(np.int32), "int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode(affinities, HALF, voxel_size_nm=(1, 1, 1))
    with pytest.raises(ValueError, match="3 channels but 2 offsets"):
        decode(good, HALF, NEAREST[:2])
    with pytest.raises(ValueError, match="needs the voxel size"):
        decode(good, HALF)
    with pytest.raises(ValueError, match="no threshold"):
        decode(good, Agglomeration(), voxel_size_nm=(1, 1, 1))
    with pytest.raises(ValueError, match="nanometres"):
        segment_raw(np.zeros((4, 8, 8), np.uint8), ClassicalConfig())
