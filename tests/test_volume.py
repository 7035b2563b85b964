"""Every format written by somebody else's library, opened by ours; what we write, read by somebody else's."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from emae._geometry import Box
from emae._volume import (
    Volume,
    check_free_space,
    check_image,
    check_labels,
    check_pair,
    create_volume,
    open_path,
    resample,
)

NM = (50.0, 4.0, 4.5)
SHAPE = (6, 20, 30)


@pytest.fixture
def em():
    return np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)


def tiff_imagej(path, em):
    tifffile.imwrite(
        path,
        em,
        imagej=True,
        resolution=(1 / 0.0045, 1 / 0.004),
        metadata={"axes": "ZYX", "spacing": 0.05, "unit": "um"},
    )


def tiff_ome(path, em):
    size = {
        "PhysicalSizeX": 4.5,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.004,
        "PhysicalSizeZ": 50,
        "PhysicalSizeZUnit": "nm",
    }
    tifffile.imwrite(path, em, ome=True, compression="zlib", metadata={"axes": "ZYX", **size})


def tiff_pages(path, em):
    with tifffile.TiffWriter(path) as tiff:
        for section in em:
            tiff.write(section, metadata=None, contiguous=False, compression="zlib")


def png_folder(path, em):
    path.mkdir()
    for k, section in enumerate(em):  # s8, s9, s10: natural order is not that of the names
        Image.fromarray(section).save(path / f"s{k + 8}.png")
    (path / "notes.txt").write_text("seen")


def tiff_folder(path, em):
    path.mkdir()
    for k, section in enumerate(em):
        tifffile.imwrite(path / f"s{k + 8}.tif", section)


def hdf5(path, em, **attrs):
    with h5py.File(path, "w") as file:
        array = file.create_dataset("volumes/raw", data=em, chunks=(2, 8, 8), compression="gzip")
        array.attrs.update(attrs or {"resolution": NM})


def mrc(path, em):
    with mrcfile.new(path) as file:
        file.set_data(em.astype(np.int16))
        file.voxel_size = tuple(v * 10 for v in NM[::-1])


def plain_zarr(path, em, version=2, **attrs):
    array = zarr.create_array(
        path, shape=em.shape, dtype=em.dtype, chunks=(1,) * (em.ndim - 3) + (2, 8, 8), zarr_format=version
    )
    array[...] = em
    array.attrs.update(attrs or {"resolution": list(NM), "units": ["nm", "nm", "nm"]})


def ome_zarr(path, em, version="0.4", axes="zyx", unit="micrometer"):
    """Two levels, the second at half the size in y and x, written with zarr-python."""
    names = [
        {"name": a, "type": "space", **({"unit": unit} if unit else {})} if a in "zyx" else {"name": a}
        for a in axes
    ]
    scale = [{"z": 0.05, "y": 0.004, "x": 0.0045}.get(a, 1.0) for a in axes]
    half = [v * (2 if a in "yx" else 1) for v, a in zip(scale, axes)]
    levels = [
        {"path": p, "coordinateTransformations": [{"type": "scale", "scale": v}]}
        for p, v in (("s0", scale), ("s1", half))
    ]
    multiscales = [{"version": version, "axes": names, "datasets": levels}]
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    group.attrs.update(
        {"multiscales": multiscales}
        if version == "0.4"
        else {"ome": {"version": version, "multiscales": multiscales}}
    )
    steps = tuple(slice(None, None, 2 if a in "yx" else 1) for a in axes)
    for name, data in (("s0", em), ("s1", em[steps])):
        array = group.create_array(
            name, shape=data.shape, dtype=data.dtype, chunks=tuple(min(8, s) for s in data.shape)
        )
        array[...] = data


def n5(path, em):
    import tensorstore

    meta = {
        "dimensions": em.shape[::-1],
        "blockSize": [8, 8, 2],
        "dataType": "uint8",
        "compression": {"type": "gzip"},
    }
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{path}/raw/"}, "metadata": meta}
    tensorstore.open(spec, create=True).result()[...] = em.T
    attributes = json.loads((path / "raw/attributes.json").read_text())
    attributes["pixelResolution"] = {"unit": "um", "dimensions": [0.0045, 0.004, 0.05]}
    (path / "raw/attributes.json").write_text(json.dumps(attributes))


def precomputed(path, em):
    import tensorstore

    scale = {
        "size": em.shape[::-1],
        "resolution": NM[::-1],
        "encoding": "raw",
        "chunk_size": [8, 8, 2],
        "voxel_offset": [7, 0, 2],
    }
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "scale_metadata": scale,
        "multiscale_metadata": {"data_type": "uint8", "num_channels": 1, "type": "image"},
    }
    tensorstore.open(spec, create=True).result()[..., 0] = em.T


def ours(path, em):
    create_volume(path, em.shape, em.dtype, NM)[...] = em


WRITERS = {
    "ij.tif": tiff_imagej,
    "x.ome.tif": tiff_ome,
    "stack.h5": hdf5,
    "t.mrc": mrc,
    "v2.zarr": plain_zarr,
    "v3.zarr": functools.partial(plain_zarr, version=3),
    "ome4.zarr": ome_zarr,
    "ome5.zarr": functools.partial(ome_zarr, version="0.5"),
    "vol.n5": n5,
    "pre": precomputed,
    "ours.zarr": ours,
}
NO_SIZE = {"pages.tif": tiff_pages, "png": png_folder, "tiffs": tiff_folder}


@pytest.mark.parametrize("name", [*WRITERS, *NO_SIZE])
def test_every_format_opens_with_its_voxels_size_and_crops(tmp_path, em, name):
    (WRITERS | NO_SIZE)[name](tmp_path / name, em)
    volume = open_path(tmp_path / name)
    assert volume.shape == SHAPE and str(tmp_path / name) in volume.name
    np.testing.assert_array_equal(volume[...], em)
    np.testing.assert_array_equal(volume[1:5:2, 3, ..., -4:], em[1:5:2, 3, -4:])
    np.testing.assert_array_equal(open_path(tmp_path / name, box="2:,3:9,:11")[:], em[2:, 3:9, :11])
    np.testing.assert_array_equal(
        volume.crop("2:,3:9,:11").crop("1:2,1:,:").read(Box((0, 0, 1), (1, 2, 5))), em[3:4, 4:6, 1:5]
    )
    assert volume.crop("2:,3:9,:11").crop("1:2,1:,:").box == Box((3, 4, 0), (4, 9, 11))
    if name in WRITERS:
        assert volume.require_voxel_size() == pytest.approx(NM, rel=1e-6)
    else:
        with pytest.raises(ValueError, match=r"--voxel-size 50,4,4"):
            volume.require_voxel_size()
        assert open_path(tmp_path / name, voxel_size_nm=NM).require_voxel_size() == NM
    check_image(volume)  # the good twin of every bad file below


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64", ">u2", "int64", "uint64"])
def test_types_of_voxels(tmp_path, em, dtype):
    em = em.astype(dtype)
    plain_zarr(tmp_path / "a.zarr", em)
    hdf5(tmp_path / "a.h5", em)
    for address in (tmp_path / "a.zarr", tmp_path / "a.h5"):
        volume = open_path(address)
        assert volume.dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_array_equal(np.asarray(volume), em)


def test_16_bit_png(tmp_path, em):
    deep = em.astype(np.uint16) * 257
    png_folder(tmp_path / "png", deep)
    np.testing.assert_array_equal(open_path(tmp_path / "png")[...], deep)


@pytest.mark.parametrize("writer", [ome_zarr, functools.partial(ome_zarr, version="0.5")])
def test_ome_zarr_levels_by_number_name_and_path(tmp_path, em, writer):
    writer(tmp_path / "x.zarr", em)
    for address in (f"{tmp_path}/x.zarr:1", f"{tmp_path}/x.zarr:s1", f"{tmp_path}/x.zarr/s1"):
        level = open_path(address)
        np.testing.assert_array_equal(level[...], em[:, ::2, ::2])
        assert level.voxel_size_nm == pytest.approx((50, 8, 9))
    with pytest.raises(ValueError, match="x.zarr.*'7'.*s0, s1"):
        open_path(f"{tmp_path}/x.zarr:7")


def test_ome_zarr_without_units_does_not_state_a_voxel_size(tmp_path, em):
    ome_zarr(tmp_path / "x.zarr", em, unit=None)
    assert open_path(tmp_path / "x.zarr").voxel_size_nm is None


@pytest.mark.parametrize("stated", [(1, 1, 1), (0, 4, 4), (np.nan, 4, 4), (4, 4), "unknown"])
def test_a_placeholder_is_no_voxel_size(tmp_path, em, stated):
    hdf5(tmp_path / "a.h5", em, resolution=stated)
    assert open_path(tmp_path / "a.h5").voxel_size_nm is None
    hdf5(tmp_path / "b.h5", em, resolution=NM, units="pixel")
    assert open_path(tmp_path / "b.h5").voxel_size_nm is None
    assert open_path(tmp_path / "b.h5", voxel_size_nm=(40, 4, 4)).voxel_size_nm == (40, 4, 4)


def test_axes_are_brought_to_channels_first(tmp_path, em):
    two = np.stack([em, 255 - em])
    ome_zarr(tmp_path / "tc.zarr", two[None], axes="tczyx")
    ome_zarr(tmp_path / "one.zarr", em[None, None], axes="tczyx", version="0.5")
    ome_zarr(tmp_path / "xyz.zarr", two.transpose(0, 3, 2, 1), axes="cxyz", version="0.5")  # webKnossos
    tifffile.imwrite(tmp_path / "zc.tif", two.swapaxes(0, 1), imagej=True, metadata={"axes": "ZCYX"})
    for name in ("tc.zarr", "xyz.zarr", "zc.tif"):
        volume = open_path(tmp_path / name)
        assert volume.shape == (2, *SHAPE)
        np.testing.assert_array_equal(volume[1, 2:4, 5], two[1, 2:4, 5])
        np.testing.assert_array_equal(
            volume.crop("1:2,2:9,4:7").read(Box((0, 1, 0), (1, 2, 3))), two[:, 1:2, 3:4, 4:7]
        )
    np.testing.assert_array_equal(open_path(tmp_path / "one.zarr")[...], em)
    ome_zarr(tmp_path / "times.zarr", two, axes="tzyx")
    with pytest.raises(ValueError, match="times.zarr.*one time point"):
        open_path(tmp_path / "times.zarr")


def test_hdf5_keys_and_attributes(tmp_path, em):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["raw"], file["labels"], file["table"] = em, em.astype(np.uint32), np.zeros(3)
        file.attrs["voxel_size_nm"] = np.array(NM, np.float32)
        file["labels"].attrs["element_size_um"] = (0.03, 0.006, 0.006)
        file["ilastik"] = em[..., None]
        file["unknown"] = em
        file["raw"].attrs["voxel_size_nm"] = [np.nan] * 3
    assert open_path(f"{path}:labels").voxel_size_nm == (30, 6, 6)
    assert open_path(f"{path}:/raw").voxel_size_nm == NM  # NaN is unknown: the file's own statement counts
    assert open_path(f"{path}:ilastik").shape == SHAPE
    for wrong in (path, f"{path}:membranes"):
        with pytest.raises(ValueError, match=r"a\.h5.*labels.*raw"):
            open_path(wrong)


def test_a_part_that_is_none_or_no_volume(tmp_path, em):
    tiff_imagej(tmp_path / "a.tif", em)
    with pytest.raises(ValueError, match=r"a\.tif:3: TIFF has no parts"):
        open_path(f"{tmp_path}/a.tif:3")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"], file["table"] = em, np.zeros((3, 4))
    assert open_path(tmp_path / "a.h5").shape == SHAPE
    with pytest.raises(ValueError, match=r"a\.h5:table.*shape \(3, 4\), wanted a volume"):
        open_path(f"{tmp_path}/a.h5:table")
    with pytest.raises(ValueError, match=r"a\.h5:chair.*no array 'chair'.*raw"):
        open_path(f"{tmp_path}/a.h5:chair")


def test_n5_scale_takes_its_groups_resolution_times_its_factors(tmp_path, em):
    n5(tmp_path / "v.n5", em)
    shutil.copytree(tmp_path / "v.n5/raw", tmp_path / "v.n5/c0/s1")
    at = tmp_path / "v.n5/c0/s1/attributes.json"
    attributes = json.loads(at.read_text())
    at.write_text(
        json.dumps(
            {
                **{k: v for k, v in attributes.items() if k != "pixelResolution"},
                "downsamplingFactors": [2, 2, 1],
            }
        )
    )
    (tmp_path / "v.n5/c0/attributes.json").write_text(json.dumps({"resolution": list(NM[::-1])}))
    assert open_path(tmp_path / "v.n5:c0/s1").voxel_size_nm == (50, 8, 9)
    with pytest.raises(ValueError, match="v.n5.*c0/s1, raw"):
        open_path(tmp_path / "v.n5")


def test_zarr_inside_a_plain_group(tmp_path, em):
    zarr.open_group(tmp_path / "g.zarr", mode="w", zarr_format=2)
    plain_zarr(tmp_path / "g.zarr/volumes_raw", em)
    np.testing.assert_array_equal(open_path(tmp_path / "g.zarr")[...], em)
    plain_zarr(tmp_path / "g.zarr/volumes_labels", em)
    np.testing.assert_array_equal(open_path(f"{tmp_path}/g.zarr:volumes_raw")[...], em)
    with pytest.raises(ValueError, match="volumes_labels, volumes_raw"):
        open_path(tmp_path / "g.zarr")


@pytest.fixture
def web(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_http_addresses(tmp_path, em, web):
    for name in ("ome4.zarr", "ome5.zarr", "v2.zarr", "pre", "vol.n5"):
        WRITERS[name](tmp_path / name, em)
        volume = open_path(f"{web}/{name}" + (":raw" if name == "vol.n5" else ""), box="1:4,2:9,:")
        np.testing.assert_array_equal(volume[...], em[1:4, 2:9])
        assert volume.voxel_size_nm == pytest.approx(NM)
    assert open_path(f"{web}/ome5.zarr:1").shape == (6, 10, 15)
    with pytest.raises(FileNotFoundError, match="nothing.zarr.*Zarr, N5 or precomputed"):
        open_path(f"{web}/nothing.zarr")


def test_unreachable_address_ends_soon_and_says_so():
    with pytest.raises(ConnectionError, match="127.0.0.1:9/x.zarr"):
        open_path("http://127.0.0.1:9/x.zarr")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_bucket_addresses_reach_the_store_of_their_kind(scheme):
    import tensorstore

    from emae._formats import place_of

    place = place_of(f"{scheme}://bucket/a/x.zarr:s1")
    assert (place.base, place.key, place.remote) == (f"{scheme}://bucket/a/x.zarr", "s1", True)
    spec = tensorstore.KvStore.Spec(place.kvstore()).to_json()
    assert (spec["driver"], spec["bucket"], spec["path"]) == (
        {"s3": "s3", "gs": "gcs"}[scheme],
        "bucket",
        "a/x.zarr/",
    )


# ---- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPE, "uint64"), ((3, *SHAPE), "uint8"), (SHAPE, "float32"), (SHAPE, "bool")]
)
def test_what_is_written_is_read_by_independent_readers(tmp_path, shape, dtype):
    from ome_zarr_models.v05 import Image as OmeImage

    data = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    attrs = {"offsets": [[-1, 0, 0], [0, -9, 0], [0, 0, -1]]}
    out = create_volume(
        tmp_path / "o.zarr", shape, dtype, NM, chunk_shape=(1,) * (len(shape) - 3) + (4, 8, 16), attrs=attrs
    )
    for z in (0, 4):
        out[..., z : z + 4, :, :] = data[..., z : z + 4, :, :]
    group = zarr.open_group(tmp_path / "o.zarr", mode="r")
    np.testing.assert_array_equal(group["0"][...], data)
    image = OmeImage.from_zarr(group).ome_attributes.multiscales[0]
    assert [(a.name, a.type, a.unit) for a in image.axes][-3:] == [(n, "space", "nanometer") for n in "zyx"]
    assert image.datasets[0].coordinateTransformations[0].scale[-3:] == list(NM)
    back = open_path(tmp_path / "o.zarr")
    assert (back.attrs, back.voxel_size_nm, back.dtype, back.writable) == (attrs, NM, np.dtype(dtype), False)
    np.testing.assert_array_equal(back[...], data)
    with pytest.raises(ValueError, match="opened for reading"):
        back[0] = 0


def test_writing_through_a_crop_and_casting(tmp_path, em):
    out = create_volume(tmp_path / "o.zarr", SHAPE, "uint16", NM)
    out.crop("2:4,5:9,:")[0, 1] = em[0, 0]
    assert out[2, 6].tolist() == em[0, 0].tolist() and out[...].sum() == em[0, 0].sum()
    with pytest.raises(ValueError, match="int64 voxels given, uint16 wanted"):
        out[0] = np.zeros(SHAPE[1:], np.int64)


def test_an_existing_output_is_kept_unless_overwritten_and_never_when_it_is_no_volume(tmp_path, em):
    ours(tmp_path / "o.zarr", em)
    with pytest.raises(FileExistsError, match=r"o\.zarr exists.*--overwrite"):
        create_volume(tmp_path / "o.zarr", SHAPE, "uint8", NM)
    np.testing.assert_array_equal(open_path(tmp_path / "o.zarr")[...], em)
    assert create_volume(tmp_path / "o.zarr", (3, 4, 5), "uint8", NM, overwrite=True)[...].sum() == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/final.tex").write_text("years")
    with pytest.raises(FileExistsError, match="never replaced"):
        create_volume(tmp_path / "thesis", SHAPE, "uint8", NM, overwrite=True)
    assert (tmp_path / "thesis/final.tex").exists()
    ome_zarr(tmp_path / "raw.zarr", em, version="0.5")  # the input given as the output by mistake
    with pytest.raises(FileExistsError, match="never replaced"):
        create_volume(tmp_path / "raw.zarr", SHAPE, "uint8", NM, overwrite=True)


def test_resume_reopens_the_same_output_only(tmp_path, em):
    ours(tmp_path / "o.zarr", em)
    again = create_volume(tmp_path / "o.zarr", SHAPE, "uint8", NM, resume=True)
    np.testing.assert_array_equal(again[...], em)
    again[0] = np.zeros(SHAPE[1:], np.uint8)
    assert open_path(tmp_path / "o.zarr")[0].sum() == 0
    with pytest.raises(ValueError, match="o.zarr holds another volume"):
        create_volume(tmp_path / "o.zarr", SHAPE, "uint16", NM, resume=True)


def test_too_little_space_is_found_before_work_starts(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(OSError, match=r"o\.zarr may need .* GiB"):
        create_volume(tmp_path / "o.zarr", (64, 256, 256), "float32", NM)
    assert os.listdir(tmp_path) == []
    check_free_space(tmp_path, 2**20, "x")
    create_volume(tmp_path / "o.zarr", SHAPE, "uint8", NM)  # the good twin


FILL_DISK = """
import numpy as np, resource, sys
from emae._volume import create_volume
out = create_volume(sys.argv[1], (64, 128, 128), "uint8", (1, 2, 3))
out[:32] = np.ones((32, 128, 128), np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    out[...] = np.random.default_rng(0).integers(0, 255, (64, 128, 128), np.uint8)
except OSError as error:
    print(error)
"""  # a child: the limit would stay


def test_a_write_that_fails_is_told_and_leaves_the_old_chunk(tmp_path):
    """A file-size limit stands in for a full disk: the write of the new chunk ends half way."""
    done = subprocess.run(
        [sys.executable, "-c", FILL_DISK, tmp_path / "o.zarr"], capture_output=True, text=True
    )
    assert "o.zarr: cannot write box 0:64,0:128,0:128" in done.stdout and "free there" in done.stdout, done
    np.testing.assert_array_equal(
        zarr.open_group(tmp_path / "o.zarr", mode="r")["0"][:33, 0, 0], [1] * 32 + [0]
    )


# ---- bad input: the good twins are in test_every_format_opens... -------------------------------------------


def cut(path, fraction):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])


@pytest.mark.parametrize("fraction", [0.02, 0.4, 0.9])
@pytest.mark.parametrize("name", ["ij.tif", "x.ome.tif", "pages.tif", "stack.h5", "t.mrc"])
def test_truncated_files_are_named(tmp_path, name, fraction):
    em = np.random.default_rng(0).integers(0, 255, (6, 40, 60), np.uint8)
    (WRITERS | NO_SIZE)[name](tmp_path / name, em)
    check_image(open_path(tmp_path / name))
    cut(tmp_path / name, fraction)
    with pytest.raises(ValueError, match=name):
        check_image(open_path(tmp_path / name))


@pytest.mark.parametrize(("name", "file"), [("png", "s10.png"), ("tiffs", "s10.tif")])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.95])
def test_truncated_section_is_named(tmp_path, em, name, file, fraction):
    NO_SIZE[name](tmp_path / name, em)
    cut(tmp_path / name / file, fraction)
    with pytest.raises(ValueError, match=file):
        check_image(open_path(tmp_path / name))


def test_section_damaged_within_is_found_when_read(tmp_path, em):
    png_folder(tmp_path / "png", em)
    data = bytearray((tmp_path / "png/s10.png").read_bytes())
    data[60:160] = bytes(100)
    (tmp_path / "png/s10.png").write_bytes(data)
    volume = open_path(tmp_path / "png")
    volume[0]
    with pytest.raises(ValueError, match=r"s10\.png"):
        volume[2]


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("v2.zarr", "1.1.2"),
        ("ome4.zarr", "s0/0.1.2"),
        ("ome5.zarr", "s0/c/0/1/2"),
        ("ours.zarr", "0/c/0/0/0"),
    ],
)
def test_damaged_chunk_is_an_error_absent_chunk_is_the_fill_value(tmp_path, em, name, chunk):
    WRITERS[name](tmp_path / name, em)
    cut(tmp_path / name / chunk, 0.5)
    with pytest.raises(ValueError, match=rf"{name}.*box 0:6,0:20,0:30"):
        open_path(tmp_path / name)[...]
    (tmp_path / name / chunk).unlink()
    assert (open_path(tmp_path / name)[...] == em).mean() < 1


def test_truncated_map_says_how_many_bytes_there_are(tmp_path, em):
    mrc(tmp_path / "t.mrc", em)
    cut(tmp_path / "t.mrc", 0.5)
    with pytest.raises(ValueError, match=rf"t\.mrc.*truncated: {(1024 + 2 * em.size) // 2} bytes"):
        open_path(tmp_path / "t.mrc")


def test_missing_file_and_unknown_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.tif"):
        open_path(tmp_path / "gone.tif")
    with pytest.raises(FileNotFoundError, match=r"gone\.h5"):
        open_path(f"{tmp_path}/gone.h5:raw")
    (tmp_path / "movie.avi").write_bytes(b"RIFF" * 300)
    with pytest.raises(ValueError, match=r"movie\.avi.*wanted one of: TIFF, HDF5"):
        open_path(tmp_path / "movie.avi")
    with pytest.raises(ValueError, match="not a known volume"):
        open_path(tmp_path)


def test_damaged_metadata_is_named(tmp_path, em):
    plain_zarr(tmp_path / "a.zarr", em, version=3)
    cut(tmp_path / "a.zarr/zarr.json", 0.5)
    with pytest.raises(ValueError, match=r"a\.zarr/zarr\.json"):
        open_path(tmp_path / "a.zarr")


def test_sections_of_other_shapes_types_series_or_colours(tmp_path, em):
    png_folder(tmp_path / "shapes", em)
    Image.fromarray(em[0, :10]).save(tmp_path / "shapes/s9.png")
    png_folder(tmp_path / "series", em)
    Image.fromarray(em[0]).save(tmp_path / "series/labels9.png")
    png_folder(tmp_path / "colour", em)
    Image.fromarray(np.stack([em[0]] * 3, -1)).save(tmp_path / "colour/s9.png")
    with tifffile.TiffWriter(tmp_path / "pages.tif") as tiff:
        for k, section in enumerate(em):
            tiff.write(section[k:], metadata=None)
    tifffile.imwrite(tmp_path / "rgb.tif", np.stack([em] * 3, -1), photometric="rgb")
    for name, fault in [
        ("shapes", "s9.png.*10, 30"),
        ("series", "2 series"),
        ("colour", "s9.png.*RGB"),
        ("pages.tif", "different shapes"),
        ("rgb.tif", "colour"),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*{fault}"):
            open_path(tmp_path / name)


@pytest.mark.parametrize("numbers, missing", [
    ([8, 9, 11, 12], "sections 10 are missing between s0008.png and s0012.png"),
    ([0, 1, 5, 6, 8], "sections 2 to 4, 7 are missing"),
    ([0, 10, 20, 40], "sections 30 are missing"),
    ([417, 418, 419], None), ([0, 10, 20, 30], None), ([5], None), ([3, 7], None),
])  # fmt: skip
def test_a_missing_section_number_is_an_error(tmp_path, em, numbers, missing):
    """A closed gap would shift z. A folder may begin anywhere and count in any even step."""
    for number in numbers:
        Image.fromarray(em[0]).save(tmp_path / f"s{number:04}.png")
    if missing is None:
        assert open_path(tmp_path).shape == (len(numbers), *em.shape[1:])
    else:
        with pytest.raises(ValueError, match=f"{missing}.*blank section.*rename"):
            open_path(tmp_path)


def test_section_numbers_are_judged_where_one_number_varies(tmp_path, em):
    for name in ("w1_s3", "w1_s5", "w1_s6"):  # the wafer's number does not vary, the section's does
        (tmp_path / "one").mkdir(exist_ok=True)
        Image.fromarray(em[0]).save(tmp_path / f"one/{name}.png")
    for name in ("w1_s3", "w1_s4", "w2_s9"):
        (tmp_path / "two").mkdir(exist_ok=True)
        Image.fromarray(em[0]).save(tmp_path / f"two/{name}.png")
    with pytest.raises(ValueError, match="sections 4 are missing"):
        open_path(tmp_path / "one")
    assert open_path(tmp_path / "two").shape[0] == 3



@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_in_the_sample_and_at_every_read(tmp_path, em, bad):
    good = em.astype(np.float32)
    plain_zarr(tmp_path / "good.zarr", good)
    check_image(open_path(tmp_path / "good.zarr"))
    good[3, 4, 5] = bad
    plain_zarr(tmp_path / "bad.zarr", good)
    with pytest.raises(ValueError, match=r"bad\.zarr.*NaN or infinite.*\(3, 4, 5\)"):
        check_image(open_path(tmp_path / "bad.zarr"))
    volume = open_path(tmp_path / "bad.zarr", box="2:,:,:")
    volume[0]
    with pytest.raises(ValueError, match=r"1 NaN or infinite.*\(3, 4, 5\)"):
        volume[0:3]


def test_constant_volume(em):
    volume = Volume.from_array(np.full((200, 200, 200), 7, np.uint8), name="blank.tif")
    with pytest.raises(ValueError, match=r"blank\.tif: constant, every voxel is 7"):
        check_image(volume)
    almost = np.full((200, 200, 200), 7, np.uint8)
    almost[70, 130, 10] = 8  # outside the fixed sample: still an image
    check_image(Volume.from_array(almost))


def test_images_of_label_types_and_many_channels_are_refused(em):
    with pytest.raises(ValueError, match="seg.h5: uint32 voxels look like labels"):
        check_image(Volume.from_array(em.astype(np.uint32), name="seg.h5"))
    with pytest.raises(ValueError, match="2 channels"):
        check_image(Volume.from_array(np.stack([em, em])))


def test_labels(em):
    ids = em.astype(np.int64)
    checked = check_labels(Volume.from_array(ids, NM, name="ids"))
    assert checked.dtype == np.uint64 and checked.voxel_size_nm == NM
    np.testing.assert_array_equal(checked[...], ids)
    check_labels(Volume.from_array(np.full((4, 4, 4), 3, np.uint8)))  # one object is something
    for array, fault in [
        (em.astype(np.float32), "float32"),
        (ids - 100, "negative label"),
        (ids * 0, "all labels are 0"),
    ]:
        with pytest.raises(ValueError, match=f"bad: .*{fault}"):
            check_labels(Volume.from_array(array, name="bad"))


def test_a_negative_or_a_lonely_label_outside_the_sample(em):
    ids = np.zeros((200, 200, 200), np.int32)
    ids[70, 130, 10] = 5
    checked = check_labels(Volume.from_array(ids))
    ids[70, 130, 10] = -5
    with pytest.raises(ValueError, match="negative label -5"):
        checked[64:80, 120:140]


def volume(shape, nm=NM, name="v", **attrs):
    return Volume.from_array(np.zeros(shape, np.uint8), nm, name, attrs)


def test_pairs():
    raw = volume((20, 30, 40), name="raw")
    assert check_pair(raw, volume((20, 30, 40))) == Box.of_shape((20, 30, 40))
    assert check_pair(raw, volume((5, 6, 7)), (15, 0, 33)) == Box((15, 0, 33), (20, 6, 40))
    assert check_pair(raw, volume((30, 40, 7)), (-5, -5, 3)) == Box(
        (0, 0, 3), (20, 30, 10)
    )  # CREMI: labels reach beyond
    assert check_pair(raw, volume((20, 30, 40), None)) == Box.of_shape((20, 30, 40))
    with pytest.raises(ValueError, match="shapes differ: raw.*offset.*voxels.*states an offset of"):
        check_pair(raw, volume((5, 6, 7), offset=[0, 8, 8]))
    with pytest.raises(ValueError, match="at offset.*outside raw"):
        check_pair(raw, volume((5, 6, 7)), (16, 0, 0))
    with pytest.raises(ValueError, match="voxel sizes differ: raw"):
        check_pair(raw, volume((20, 30, 40), (40.0, 4.0, 4.0)))
    with pytest.raises(ValueError, match="m: valid mask"):
        check_pair(raw, volume((5, 6, 7)), (0, 0, 0), valid=volume((5, 6, 8), name="m"))
    check_pair(raw, volume((5, 6, 7)), (0, 0, 0), valid=volume((5, 6, 7)))


@pytest.mark.parametrize("wrong", [(4, 4), (0, 4, 4), (np.nan, 4, 4), "big", (-1, 4, 4)])
def test_voxel_size_given_wrongly(em, wrong):
    with pytest.raises(ValueError, match="wanted three positive lengths in nm"):
        Volume.from_array(em).with_voxel_size(wrong)


def test_box_and_index_outside(tmp_path, em):
    ours(tmp_path / "o.zarr", em)
    with pytest.raises(ValueError, match=r"o\.zarr.*outside the volume"):
        open_path(tmp_path / "o.zarr", box="0:7,:,:")
    whole = open_path(tmp_path / "o.zarr")
    with pytest.raises(ValueError, match=r"o\.zarr.*leaves the volume"):
        whole.read(Box((0, 0, 0), (7, 1, 1)))
    with pytest.raises(IndexError, match=r"o\.zarr"):
        whole[6]


# ---- resampling --------------------------------------------------------------------------------------------


def test_resample_keeps_a_plane_and_a_constant():
    """A linear ramp in nm stays that ramp away from the borders; a constant stays everywhere."""
    z, y, x = np.indices((12, 24, 24))
    ramp = Volume.from_array(((z + 0.5) * 40 + (y + 0.5) * 8 + (x + 0.5) * 6).astype(np.float32), (40, 8, 6))
    for nm in [(20.0, 4.0, 6.0), (80.0, 16.0, 12.0), (50.0, 6.5, 10.0)]:
        out = resample(ramp, nm)
        k = [np.arange(s) for s in out.shape]
        truth = np.add.outer(np.add.outer((k[0] + 0.5) * nm[0], (k[1] + 0.5) * nm[1]), (k[2] + 0.5) * nm[2])
        inner = tuple(slice(3, s - 3) for s in out.shape)
        np.testing.assert_allclose(out[inner], truth[inner], rtol=1e-5)
        np.testing.assert_allclose(out[4:, 5:9, 2:7], out[...][4:, 5:9, 2:7], rtol=1e-6)  # lazy = whole
        flat = resample(Volume.from_array(np.full((12, 24, 24), 9, np.uint8), (40, 8, 6)), nm)
        assert (flat[...] == 9).all() and flat.voxel_size_nm == nm


def test_resample_to_twice_the_voxel_is_the_mean_and_to_the_same_is_the_same(em):
    em = em.astype(np.float32)
    raw = Volume.from_array(em, (50, 4, 4))
    np.testing.assert_array_equal(resample(raw, (50, 4, 4))[...], em)
    pairs = em.reshape(6, 10, 2, 15, 2).mean((2, 4))
    np.testing.assert_allclose(resample(raw, (50, 8, 8))[...], pairs, rtol=1e-5)


def test_resample_labels_takes_the_nearest_and_never_mixes():
    ids = np.zeros((4, 6, 6), np.uint32)
    ids[:, 2:4, 3:] = 1000
    up = resample(Volume.from_array(ids, (8, 4, 4)), (4, 2, 2), order=0)
    np.testing.assert_array_equal(up[...], ids.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert set(np.unique(resample(Volume.from_array(ids, (8, 4, 4)), (8, 7, 7), order=0)[...])) <= {0, 1000}
    with pytest.raises(ValueError, match="--voxel-size"):
        resample(Volume.from_array(ids), (4, 4, 4))


# ---- laziness and threads ----------------------------------------------------------------------------------


def test_opening_and_reading_a_corner_does_not_read_the_volume(tmp_path):
    """A 4 GiB TIFF-like, MRC and Zarr volume that exists only as holes: reading a corner stays small."""
    import resource

    shape = (1024, 2048, 2048)
    header = Path(tmp_path / "big.mrc")
    mrc(header, np.zeros((1, 8, 8), np.uint8))
    with mrcfile.mmap(header, mode="r+") as file:
        file.header.nx, file.header.ny, file.header.nz, file.header.mode = shape[2], shape[1], shape[0], 0
    os.truncate(header, 1024 + np.prod(shape))
    create_volume(tmp_path / "big.zarr", (1024, 1024, 1024), "uint8", NM)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("big.mrc", "big.zarr"):
        assert open_path(tmp_path / name, voxel_size_nm=NM)[500:510, 100:200, 100:200].shape == (10, 100, 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("name", ["x.ome.tif", "png", "stack.h5", "ours.zarr"])
def test_reads_from_several_threads(tmp_path, em, name):
    from concurrent.futures import ThreadPoolExecutor

    (WRITERS | NO_SIZE)[name](tmp_path / name, em)
    source = open_path(tmp_path / name)
    with ThreadPoolExecutor(4) as pool:
        for k, section in enumerate(pool.map(lambda k: source[k % 6], range(60))):
            np.testing.assert_array_equal(section, em[k % 6])
