"""Pictures: stable colours, true proportions, readable PNGs, few reads."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from emae._view import enlarge, grey, label_colours, overlay, panel, png_bytes, section_views, show, write_png
from emae._volume import Volume


def read_png(source):
    with Image.open(source) as image:
        return np.array(image)


def test_colours_depend_on_the_id_alone():
    a = label_colours(np.array([[0, 5], [7, 5]]))
    assert a.shape == (2, 2, 3) and a.dtype == np.uint8
    assert (a[0, 0] == 0).all() and (a[0, 1] == a[1, 1]).all() and (a[0, 1] != a[1, 0]).any()
    b = label_colours(np.array([7, 2**40 + 1, 5], np.uint64))
    assert (b[0] == a[1, 0]).all() and (b[2] == a[0, 1]).all()
    many = label_colours(np.arange(1, 200))
    assert Counter(map(tuple, many.tolist())).most_common(1)[0][1] <= 2
    assert many.max(1).min() > 150, "never dark: dark is for boundaries"
    steps = np.abs(np.diff(many.astype(int), axis=0)).sum(1)
    assert np.median(steps) > 100, "neighbouring ids look unlike each other"


def test_overlay_colours_inside_darkens_between_and_leaves_background():
    image = np.full((6, 9), 120, np.uint8)
    labels = np.zeros((6, 9), np.int64)
    labels[:, 3:6], labels[:, 6:] = 4, 5
    out = overlay(image, labels)
    assert (out[3, 1] == 120).all()
    assert np.abs(out[3, 4] - np.rint(0.6 * 120 + 0.4 * label_colours(np.array([4]))[0])).max() <= 1
    assert out[3, 6].sum() < 0.6 * out[3, 7].sum(), "the boundary of 4 and 5 is dark"
    with pytest.raises(ValueError, match="wanted two equal"):
        overlay(image, labels[1:])


def test_grey_of_every_type():
    assert grey(np.array([[0, 255]], np.uint8)).tolist() == [[0, 255]]
    assert grey(np.array([[False, True]])).tolist() == [[0, 255]]
    assert grey(np.array([[0.0, 0.5, 1.0]]), (0, 1)).tolist() == [[0, 127, 255]]
    assert grey(np.full((3, 3), 7.0)).dtype == np.uint8, "a constant image does not divide by 0"


def test_png_can_be_read_back(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    assert np.array_equal(read_png(io.BytesIO(png_bytes(image))), image)
    write_png(image, tmp_path / "a.png")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_png(image, tmp_path / "a.png", overwrite=False)
    with pytest.raises(FileNotFoundError, match="folder"):
        write_png(image, tmp_path / "none" / "a.png")


def test_enlarge_repeats_pixels():
    image = np.array([[1, 2], [3, 4]])
    assert np.array_equal(enlarge(image, 2, 3), np.kron(image, np.ones((2, 3), int)))
    assert np.array_equal(enlarge(np.arange(8)[None], 1, 0.5), [[1, 3, 5, 7]])


def test_panel_puts_rows_of_images_side_by_side():
    dark, light = np.zeros((10, 20), np.uint8), np.full((10, 30, 3), 200, np.uint8)
    sheet = panel([dark, light], gap=5)
    assert sheet.shape == (15, 20 + 30 + 10, 3)
    assert (sheet[:10, :20] == 0).all() and (sheet[:10, 25:55] == 200).all() and (sheet[10:] == 255).all()
    titled = panel([[dark], [light]], [["a title"], ["b"]], gap=5)
    assert titled.shape == (2 * (22 + 15), 35, 3)
    assert (titled[:22] < 128).any(), "the title is written"
    assert panel([dark], height=20, gap=0).shape == (20, 40, 3)


def test_views_have_true_proportions_and_read_three_sections(tmp_path):
    rng = np.random.default_rng(0)
    raw = rng.integers(1, 255, (10, 40, 50), np.uint8)
    labels = (rng.random((10, 40, 50)) < 0.5).astype(np.uint32)
    reads = []

    class Counting(Volume):
        def _read(self, slices):
            reads.append(tuple(s.stop - s.start for s in slices))
            return super()._read(slices)

    volume = Counting.from_array(raw, (40, 10, 10))
    sheet = section_views(volume, labels, tmp_path / "v.png", longest_px=500)
    assert set(reads) == {(1, 40, 50), (10, 1, 50), (10, 40, 1)}
    # 10 x 40 nm = 400 nm of z beside 400 nm of y and 500 nm of x: 500 px wide, 400 px high, all three views
    assert sheet.shape == (2 * (22 + 400 + 8), 500 + 500 + 400 + 3 * 8, 3)
    assert np.array_equal(read_png(tmp_path / "v.png"), sheet)
    xz = sheet[22:422, 508:1008, 0]
    assert np.array_equal(xz[20::40, 5::10], raw[:, 20]), "xz is the section y = 20, z downwards"


def test_a_blank_section_is_not_the_one_shown():
    raw = np.random.default_rng(0).integers(1, 255, (9, 32, 32), np.uint8)
    raw[4] = 0
    sheet = section_views(raw, at=None, longest_px=32)
    assert sheet[22:54, :32].max() > 0


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="wanted the same"):
        section_views(np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4, 6), np.uint8))
    with pytest.raises(ValueError, match="no voxel"):
        section_views(np.zeros((3, 4, 5), np.uint8), at=(3, 0, 0))


def test_show_describes_and_draws(tmp_path):
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["raw"] = rng.integers(0, 255, (4, 32, 32), np.uint8)
        file["ids"] = rng.integers(0, 3, (4, 32, 32)).astype(np.uint64)
    raw, ids, out = f"{tmp_path}/own.h5:raw", f"{tmp_path}/own.h5:ids", tmp_path / "own.png"
    described = show(raw, out, labels=ids, voxel_size_nm=(40, 8, 8))
    assert described.labels[0].objects == 2 and read_png(out).shape[1] > 500
    with pytest.raises(FileExistsError, match="own.png"):
        show(raw, out)
    show(ids, out, overwrite=True)
    pixels = read_png(out).reshape(-1, 3).astype(int)
    assert (np.ptp(pixels, axis=1) > 40).mean() > 0.1, "labels alone are shown in colour"
