"""Grey values to about [-2, 2]: where -2 and 2 come from."""

import numpy as np
import pytest

from emae._geometry import Box
from emae._normalise import Levels, Normalisation, measure_levels
from emae._volume import Volume


def volume(array):
    return Volume.from_array(array, (40.0, 8.0, 8.0), name="mine")


@pytest.fixture
def em():
    return np.random.default_rng(0).integers(20, 200, (6, 32, 32)).astype(np.uint8)


def test_levels_by_hand():
    levels = Levels(np.array([10.0]), np.array([50.0]), invert=False)
    x = levels.apply(np.array([[[10, 30, 50, 0, 200]]], np.uint8))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[0, 0], [-2, 0, 2, -3, 4])  # 10 -> -2, 50 -> 2, straight between, cut at +-4
    bright = Levels(np.array([10.0]), np.array([50.0]), invert=True)
    np.testing.assert_allclose(bright.apply(np.array([[[10, 30, 50, 0, 200]]], np.uint8)), -x)


@pytest.mark.parametrize("dtype, scale", [(np.uint8, 1), (np.uint16, 250), (np.int16, -100), (np.float32, 1e-3)])
def test_volume_percentiles_are_those_of_the_voxels_whatever_the_type(em, dtype, scale):
    array = (em * float(scale)).astype(dtype)
    levels = measure_levels(volume(array), Normalisation(percentiles=(5, 90)))
    low, high = np.percentile(array, (5, 90))
    np.testing.assert_allclose([levels.low[0], levels.high[0]], [low, high], rtol=1e-5)
    x = levels.apply(array)
    np.testing.assert_allclose(x, np.clip((array.astype(float) - low) / (high - low) * 4 - 2, -4, 4), atol=1e-4)


def test_missing_sections_do_not_count(em):
    holes = em.copy()
    holes[2] = 0
    holes[4] = 255
    got, wanted = measure_levels(volume(holes), Normalisation()), np.percentile(em[[0, 1, 3, 5]], (1, 99))
    np.testing.assert_allclose([got.low[0], got.high[0]], wanted)


def test_sections_each_by_itself(em):
    jumps = em.copy()
    jumps[1] //= 2
    jumps[3] = 7  # missing: takes the median of the others
    levels = measure_levels(volume(jumps), Normalisation(per="section"))
    rows = [np.percentile(jumps[z], (1, 99)) for z in (0, 1, 2, 4, 5)]
    wanted = np.insert(np.array(rows), 3, np.median(rows, axis=0), axis=0)
    np.testing.assert_allclose(np.stack([levels.low, levels.high], 1), wanted)
    whole = levels.apply(jumps)
    for z in range(6):  # a box of the volume gets the levels of its own sections
        np.testing.assert_array_equal(levels.apply(jumps[z : z + 2], z), whole[z : z + 2])
    assert abs(whole[1].mean() - whole[0].mean()) < 0.1  # the jump is gone


def test_a_section_with_few_grey_values_takes_the_levels_of_the_others(em):
    dust = em.copy()
    dust[2] = 0
    dust[2, 16, 16] = 9  # its 1 and 99 percentiles are equal
    levels = measure_levels(volume(dust), Normalisation(per="section"))
    assert (levels.high > levels.low).all() and np.isfinite(levels.apply(dust)).all()
    assert levels.high[2] == np.median(np.delete(levels.high, 2))


def test_dtype_is_the_range_of_the_type(em):
    for dtype, low, high in [(np.uint8, 0, 255), (np.uint16, 0, 65535), (np.int8, -128, 127)]:
        levels = measure_levels(volume(np.array([[[low, high, 0]]], dtype)), Normalisation(per="dtype"))
        np.testing.assert_allclose(levels.apply(np.array([[[low, high]]], dtype)), [[[-2, 2]]], atol=1e-5)
    with pytest.raises(ValueError, match="mine: normalisation per dtype needs integers, got float32"):
        measure_levels(volume(em.astype(np.float32)), Normalisation(per="dtype"))


@pytest.mark.parametrize("per", ["volume", "section"])
def test_nothing_to_learn_from(per):
    with pytest.raises(ValueError, match="mine: constant wherever it was sampled"):
        measure_levels(volume(np.full((3, 8, 8), 7, np.uint8)), Normalisation(per=per))
    dust = np.zeros((3, 32, 32), np.uint8)
    dust[:, 3, 3] = 9
    with pytest.raises(ValueError, match=r"mine: percentiles \(1.0, 99.0\) of its grey values are equal"):
        measure_levels(volume(dust), Normalisation(per=per))


@pytest.mark.parametrize("percentiles", [(99, 1), (-1, 99), (1, 101), (50, 50)])
def test_percentiles_must_be_in_order(percentiles):
    with pytest.raises(ValueError, match="percentiles"):
        Normalisation(percentiles=percentiles)


def test_only_a_sample_of_a_large_volume_is_read():
    read = []

    class Watched(Volume):
        def read(self, box: Box):
            read.append(box.size)
            return super().read(box)

    em = np.random.default_rng(0).integers(0, 255, (100, 8, 1500), np.uint8)
    watched = Watched.from_array(em, (1, 1, 1))
    measure_levels(watched, Normalisation())
    assert max(read) == 8 * 1024 and len(read) <= 32
    read.clear()
    measure_levels(watched, Normalisation(per="section"))
    assert len(read) == 100
