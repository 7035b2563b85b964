"""The phantom: a function of its seed, exact labels, faults where it says, harder than thresholding."""

import numpy as np
import pytest
from scipy import ndimage

from emae._phantom import PhantomConfig, cached_phantom, make_phantom

SMALL = PhantomConfig(shape=(16, 128, 128), seed=3)


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(SMALL)


@pytest.fixture(scope="module")
def clean():
    return make_phantom(SMALL.without_defects())


def test_seed_decides_everything(phantom):
    again = make_phantom(SMALL)
    assert all(np.array_equal(a, b) for a, b in zip(phantom, again, strict=True))
    other = make_phantom(SMALL.model_copy(update={"seed": 4}))
    assert (other.labels > 0).sum() > 0 and not np.array_equal(phantom.labels, other.labels)
    assert phantom.raw.dtype == np.uint8 and phantom.labels.dtype == np.uint32


def test_every_label_is_one_piece_and_ids_are_dense(phantom):
    for labels in (phantom.labels, phantom.mitochondria):
        ids = np.unique(labels)
        assert np.array_equal(ids, np.arange(len(ids))), "0, 1, 2, ... without holes"
        for i, box in enumerate(ndimage.find_objects(labels.astype(np.int32)), 1):
            assert ndimage.label(labels[box] == i, np.ones((3, 3, 3)))[1] == 1, i


def test_neurites_fill_the_tissue_and_hold_the_mitochondria(phantom):
    assert 0.1 < (phantom.labels == 0).mean() < 0.35
    assert len(np.unique(phantom.labels)) > 30
    inside = phantom.mitochondria > 0
    assert 0.01 < inside.mean() < 0.2
    assert (phantom.labels[inside] > 0).all()
    for i in np.unique(phantom.mitochondria[inside]):
        assert len(np.unique(phantom.labels[phantom.mitochondria == i])) == 1, "a mitochondrion in two neurites"


def test_neighbouring_neurites_never_touch_within_a_section(phantom):
    """Labels differ only across a band of 0: three pixels of a 24 nm membrane at 8 nm."""
    for a, b in (
        (phantom.labels[:, 1:], phantom.labels[:, :-1]),
        (phantom.labels[..., 1:], phantom.labels[..., :-1]),
    ):
        assert ((a != b) & (a > 0) & (b > 0)).mean() < 1e-4


def test_membranes_are_dark_and_mitochondria_darker_than_cytoplasm(clean):
    cytoplasm = np.median(clean.raw[(clean.labels > 0) & (clean.mitochondria == 0)])
    assert np.median(clean.raw[clean.labels == 0]) < cytoplasm - 50
    assert np.median(clean.raw[clean.mitochondria > 0]) < cytoplasm - 30


def test_faults_are_where_it_says_and_can_be_turned_off(phantom, clean):
    assert len(phantom.missing) == 1 and len(phantom.shifted) == 1 and not set(phantom.missing) & set(phantom.shifted)
    blank = np.array([section.max() == 0 for section in phantom.raw])
    assert np.flatnonzero(blank).tolist() == list(phantom.missing)
    assert (phantom.labels[phantom.missing[0]] > 0).mean() > 0.5, "the truth of a missing section stays"
    assert clean.missing == clean.shifted == () and clean.raw.min() > 0
    means = [np.array([s.mean() for s in p.raw])[~blank] for p in (phantom, clean)]
    assert np.abs(np.diff(means[0])).mean() > 2 * np.abs(np.diff(means[1])).mean(), "brightness jumps"


def test_a_shifted_section_moves_raw_and_labels_together(phantom, clean):
    (z,) = phantom.shifted
    ways = [(dy, dx) for dy in range(-8, 9) for dx in range(-8, 9)]

    def displacement(moved, still):
        middle = slice(10, -10)

        def match(way):
            return np.corrcoef(np.roll(still, way, (0, 1))[middle, middle].ravel(), moved[middle, middle].ravel())[0, 1]

        return max(ways, key=match)

    by_labels = displacement(phantom.labels[z] > 0, clean.labels[z] > 0)
    assert by_labels == displacement(phantom.raw[z].astype(float), clean.raw[z].astype(float))
    assert abs(np.hypot(*by_labels) - SMALL.shift_nm / 8) < 1
    other = next(k for k in range(16) if k not in (*phantom.missing, z))
    assert displacement(phantom.labels[other] > 0, clean.labels[other] > 0) == (0, 0)


def test_one_tissue_at_any_voxel_size():
    """At other voxels the neurites keep their size in nm: the mean profile has a similar area."""

    def profile_nm2(config):
        labels = make_phantom(config.without_defects()).labels[config.shape[0] // 2]
        sizes = np.bincount(labels.ravel())[1:]
        return np.median(sizes[sizes > 0]) * np.prod(config.voxel_size_nm[1:])

    anisotropic = profile_nm2(PhantomConfig(shape=(16, 160, 160), voxel_size_nm=(40, 8, 8)))
    isotropic = profile_nm2(PhantomConfig(shape=(64, 128, 128), voxel_size_nm=(10, 10, 10)))
    assert 0.4 < isotropic / anisotropic < 2.5


def test_neither_trivial_nor_impossible():
    """Watershed of the smoothed image finds much of it and makes real errors."""
    from skimage.metrics import adapted_rand_error
    from skimage.segmentation import watershed

    phantom = make_phantom(PhantomConfig(shape=(24, 160, 160), seed=1).without_defects())
    smooth = ndimage.gaussian_filter(phantom.raw.astype(np.float32), (0, 1.5, 1.5))
    bright = smooth > ndimage.gaussian_filter(smooth, (0, 14, 14)) - 10
    inside = np.stack([ndimage.distance_transform_edt(section) for section in bright])
    seeds, _ = ndimage.label(ndimage.gaussian_filter(inside, (0.5, 1, 1)) > 4)
    error = adapted_rand_error(phantom.labels, watershed(-inside, seeds), ignore_labels=(0,))[0]
    assert 0.1 < error < 0.75


def test_cached_phantom_is_made_once_and_read_only():
    config = PhantomConfig(shape=(4, 64, 64), missing_sections=0, shifted_sections=0)
    assert cached_phantom(config) is cached_phantom(config)
    with pytest.raises(ValueError, match="read-only"):
        cached_phantom(config).raw[0] = 0


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"shape": (4, 64, 64)}, "at least 8 sections"),
        ({"shape": (64, 8, 256)}, "32"),
        ({"noise": -1}, "noise"),
        ({"voxel_size_nm": (0, 8, 8)}, "voxel_size_nm"),
        ({"sede": 1}, "sede"),
    ],
)
def test_bad_configurations_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        PhantomConfig(**bad)
