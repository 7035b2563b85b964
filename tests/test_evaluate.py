"""Scores: counted by hand, by brute force over voxel pairs, by scikit-image where it is right, and on real data."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from emae._evaluate import _nearest, contingency, score, scores_of

AS_GIVEN = {"relabel_true": False}
tiny = hnp.arrays(np.uint16, st.tuples(*[st.integers(1, 3)] * 3), elements=st.integers(0, 3))


def test_a_split_counted_by_hand_has_perfect_precision():
    # 4 voxels of one object cut in two: 6 pairs together in true, 2 in predicted, 2 in both
    s = score(true=np.array([1, 1, 1, 1]), predicted=np.array([5, 5, 9, 9]))
    assert (s.precision, s.recall) == (1.0, 2 / 6)
    assert s.adapted_rand_error == pytest.approx(1 - 2 * 2 / (6 + 2))
    assert (s.voi_split, s.voi_merge) == (1.0, 0.0)
    from skimage.metrics import adapted_rand_error

    _, precision, recall = adapted_rand_error(np.array([1, 1, 1, 1]), np.array([5, 5, 9, 9]))
    assert (precision, recall) == (pytest.approx(s.recall), pytest.approx(s.precision))  # exchanged there


def test_a_merge_counted_by_hand_has_perfect_recall():
    s = score(true=np.array([1, 1, 1, 2, 0]), predicted=np.array([7, 7, 7, 7, 7]))
    assert (s.precision, s.recall) == (3 / 6, 1.0)
    assert s.voi_split == 0
    assert s.voi_merge == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    assert (s.true_objects, s.predicted_objects, s.voxels) == (2, 1, 4)


def brute_force(true, predicted, single=()):
    """Sets of ordered voxel pairs, and entropies of the joint histogram, by plain loops."""
    at = [i for i in range(true.size) if true.flat[i]]
    ids = [("alone", i) if i in single else int(predicted.flat[i]) for i in range(true.size)]
    in_true = {(i, j) for i, j in itertools.permutations(at, 2) if true.flat[i] == true.flat[j]}
    in_predicted = {(i, j) for i, j in itertools.permutations(at, 2) if ids[i] == ids[j]}
    both = len(in_true & in_predicted)
    error = 1 - 2 * both / (len(in_true) + len(in_predicted)) if in_true or in_predicted else 0

    def entropy(keys):
        p = np.array([keys.count(k) for k in set(keys)]) / len(keys)
        return -(p * np.log2(p)).sum()

    t, p = [int(true.flat[i]) for i in at], [ids[i] for i in at]
    joint = entropy(list(zip(t, p, strict=True)))
    return error, both / len(in_predicted) if in_predicted else 1, joint - entropy(t), joint - entropy(p)


@settings(deadline=None, max_examples=150)
@given(tiny, st.data())
def test_equals_counting_all_pairs(true, data):
    predicted = data.draw(hnp.arrays(np.int64, true.shape, elements=st.sampled_from([0, 1, 2, 2**40])))
    if not true.any():
        with pytest.raises(ValueError, match="nothing to score"):
            score(true=true, predicted=predicted, unpredicted="one_segment", **AS_GIVEN)
        return
    for unpredicted, single in (("one_segment", ()), ("singletons", np.flatnonzero(predicted == 0))):
        s = score(true=true, predicted=predicted, unpredicted=unpredicted, **AS_GIVEN)
        got = (s.adapted_rand_error, s.precision, s.voi_split, s.voi_merge)
        assert got == pytest.approx(brute_force(true, predicted, single), abs=1e-9)
    dropped = score(true=true, predicted=predicted + 1, valid=predicted != 0, unpredicted="nearest", **AS_GIVEN) \
        if (predicted[true != 0] != 0).any() else None  # fmt: skip
    if dropped:
        s = score(true=true, predicted=predicted, unpredicted="drop", **AS_GIVEN)
        assert s.adapted_rand_error == dropped.adapted_rand_error and s.voi_merge == dropped.voi_merge


@settings(deadline=None, max_examples=50)
@given(tiny, st.data())
def test_names_of_segments_do_not_matter(true, data):
    if not true.any():
        return
    predicted = data.draw(hnp.arrays(np.uint8, true.shape, elements=st.integers(1, 4)))
    names = np.array(data.draw(st.permutations([3, 10**12, 77, 2**63 + 5])), np.uint64)
    a = score(true=true, predicted=predicted)
    b = score(true=true, predicted=names[predicted - 1])
    assert a == b
    perfect = score(true=true, predicted=np.where(true, names[true % 4], 0), **AS_GIVEN)
    assert perfect.adapted_rand_error == 0 and perfect.voi == 0


def test_swapping_the_arguments_swaps_the_sides():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(1, 9, (2, 6, 7, 8))
    a, b = (
        score(true=true, predicted=predicted, **AS_GIVEN),
        score(true=predicted, predicted=true, **AS_GIVEN),
    )
    assert a.adapted_rand_error == b.adapted_rand_error
    assert (a.precision, a.voi_split) == (b.recall, b.voi_merge)


@pytest.mark.parametrize("ids", [40, 3000, 2**45])
def test_parity_with_scikit_image(ids):
    from skimage.metrics import adapted_rand_error, variation_of_information

    rng = np.random.default_rng(ids)
    true = np.repeat(rng.integers(0, 60, (8, 30, 6)), 5, axis=2)
    predicted = np.where(rng.random(true.shape) < 0.1, rng.integers(1, ids, true.shape), true + 1)
    s = score(true=true, predicted=predicted, **AS_GIVEN)
    _, dense = np.unique(predicted, return_inverse=True)
    error, precision, recall = adapted_rand_error(true, dense.reshape(true.shape), ignore_labels=(0,))
    assert s.adapted_rand_error == pytest.approx(error, abs=1e-12)
    assert (s.precision, s.recall) == (pytest.approx(recall), pytest.approx(precision))
    split, merge = variation_of_information(true, dense.reshape(true.shape), ignore_labels=(0,))
    assert (s.voi_split, s.voi_merge) == (pytest.approx(split), pytest.approx(merge))


def test_slabs_and_merged_tables_equal_one_table(monkeypatch):
    rng = np.random.default_rng(1)
    true, predicted = rng.integers(0, 5, (9, 10, 11)), rng.integers(0, 2**50, (9, 10, 11)) % 7
    valid = rng.random(true.shape) < 0.8
    whole = contingency(true, predicted, valid)
    monkeypatch.setattr("emae._evaluate.SLAB_VOXELS", 150)
    parts = contingency(true[:4], predicted[:4], valid[:4]) + contingency(true[4:], predicted[4:], valid[4:])
    for name in ("true", "predicted", "count"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert whole.voxels == (valid & (true != 0)).sum()


def test_lazy_arrays_are_read_by_slabs(monkeypatch):
    class Lazy:
        shape, dtype, name = (6, 4, 4), np.dtype(np.uint32), "lazy.zarr"
        voxel_size_nm, largest = (50.0, 4.0, 4.0), 0

        def __getitem__(self, index):
            part = np.arange(96, dtype=np.uint32).reshape(6, 4, 4)[index] // 8
            self.largest = max(self.largest, part.size)
            return part

    monkeypatch.setattr("emae._evaluate.SLAB_VOXELS", 32)
    lazy = Lazy()
    s = score(true=lazy, predicted=Lazy(), unpredicted="one_segment", **AS_GIVEN)
    assert s.voi == 0 and s.voxels == 88 and lazy.largest == 32


def test_truth_is_cut_into_its_components_inside_the_box():
    true = np.array([[4, 4, 0, 0, 4, 4]])  # one neuron, entering the box twice
    predicted = np.array([[1, 1, 1, 2, 2, 2]])
    assert score(true=true, predicted=predicted).adapted_rand_error == 0
    assert score(true=true, predicted=predicted, **AS_GIVEN).recall == 4 / 12
    diagonal = np.eye(3, dtype=int)[None]  # 26-connected: one object
    assert score(true=diagonal, predicted=diagonal).true_objects == 1
    cut = score(
        true=np.array([3, 3, 3, 3, 3]),
        predicted=np.array([1, 1, 1, 2, 2]),
        valid=np.array([1, 1, 0, 1, 1]) > 0,
    )
    assert cut.true_objects == 2 and cut.adapted_rand_error == 0


def test_unpredicted_voxels_by_choice():
    true = np.array([[[1, 1, 1, 2, 2, 2]]])
    predicted = np.array([[[1, 0, 0, 0, 0, 2]]])
    nearest = score(true=true, predicted=predicted)
    assert nearest.adapted_rand_error == 0
    assert score(true=true, predicted=predicted, unpredicted="drop").voxels == 2
    assert score(true=true, predicted=predicted, unpredicted="singletons").predicted_objects == 6
    assert score(true=true, predicted=predicted, unpredicted="one_segment").predicted_objects == 3
    protocols = {score(true=true, predicted=predicted, unpredicted=u).protocol
                 for u in ("nearest", "drop", "singletons", "one_segment")}  # fmt: skip
    assert len(protocols) == 4 and nearest.protocol in str(nearest)


def test_nearest_is_measured_in_nanometres():
    true = np.array([[[1, 0, 1]], [[1, 1, 1]]])
    predicted = np.array([[[0, 0, 5]], [[7, 7, 7]]])  # (0,0,0) is 1 section or 2 pixels away from a segment
    isotropic = score(true=true, predicted=predicted, **AS_GIVEN)
    thick = score(true=true, predicted=predicted, **AS_GIVEN, voxel_size_nm=(50, 4, 4))
    assert isotropic.recall == pytest.approx((4 * 3) / (5 * 4))
    assert thick.recall == pytest.approx((3 * 2 + 2 * 1) / (5 * 4))
    assert "50,4,4 nm" in thick.protocol and "no voxel size" in isotropic.protocol


def test_nearest_equals_a_distance_transform():
    from scipy.ndimage import distance_transform_edt

    rng = np.random.default_rng(3)
    predicted = np.where(rng.random((6, 20, 20)) < 0.02, rng.integers(1, 9, (6, 20, 20)), 0)
    true = np.ones_like(predicted)
    filled, _ = _nearest(true, predicted, None, (40.0, 7.0, 5.0))
    distance = distance_transform_edt(predicted == 0, sampling=(40, 7, 5))
    for label in range(1, 9):  # ties may fall either way, so compare distances and not ids
        to_label = distance_transform_edt(predicted != label, sampling=(40, 7, 5))
        np.testing.assert_allclose(to_label[filled == label], distance[filled == label])
    assert (filled != 0).all()


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 3), int), "true has float64"),
        (np.ones((2, 3), int), np.ones((2, 3), np.float32), "predicted has float32"),
        (np.ones((2, 3), int), np.ones((3, 2), int), "one shape"),
        (np.array([1, -1]), np.array([1, 1]), "true has negative"),
        (np.array([1, 1]), np.array([1, -3]), "predicted has negative"),
        (np.zeros(4, int), np.ones(4, int), "nothing to score"),
        (np.ones(4, int), np.zeros(4, int), "0 everywhere"),
    ],
)
def test_bad_input(true, predicted, message):
    with pytest.raises(ValueError, match=message):
        score(true=true, predicted=predicted)


def test_bad_choices():
    a = np.ones((2, 3, 4), int)
    assert score(true=a, predicted=a.astype(np.int8), valid=np.ones_like(a, bool)).voxels == 24  # the good twin
    with pytest.raises(ValueError, match="nearest, singletons"):
        score(true=a, predicted=a, unpredicted="guess")
    with pytest.raises(ValueError, match="valid must"):
        score(true=a, predicted=a, valid=np.ones(3, bool))
    with pytest.raises(ValueError, match="2 values"):
        score(true=a, predicted=a, voxel_size_nm=(4, 4))
    with pytest.raises(ValueError, match="nothing to score"):
        scores_of(contingency(a, a * 0), "drop")


def test_isbi_baseline_of_copying_the_last_training_section():
    path = Path(os.environ.get("EMAE_DATA", Path(__file__).parents[2] / "shared/data")) / "isbi2012_train_z10-29.h5"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    import cc3d
    import h5py

    with h5py.File(path) as file:
        labels = file["labels"][:16]
    copied = np.stack([cc3d.connected_components(labels[9], connectivity=8)] * 4)
    s = score(true=labels[12:16], predicted=copied, voxel_size_nm=(50, 4, 4))
    assert s.adapted_rand_error == pytest.approx(0.54, abs=0.005)  # counted elsewhere, kept with the data
    raw_ids = score(true=labels[12:16], predicted=np.stack([labels[9]] * 4), voxel_size_nm=(50, 4, 4))
    assert raw_ids.adapted_rand_error > s.adapted_rand_error  # ids that join outside the section count as merges
