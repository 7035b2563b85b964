"""The formats an EM lab keeps its volumes in, told by content: one opener each, `OPENERS` is the whole list.

An opener takes a `Place` and returns a `Source`: the few facts of an array, (Z, Y, X) or (C, Z, Y, X), and
one function that reads slices of it. Foreign axis orders end here (N5 and precomputed are x, y, z). Voxel
sizes are nm (z, y, x), None where not stated. Libraries are imported by the opener that needs them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

CACHE_BYTES = 256 * 2**20  # decoded sections per stack; decoded chunks over all chunked volumes
UNIT_NM = {
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers"), 1.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "\\u00b5m"), 1e3),  # the last as ImageJ writes it, escaped
    **dict.fromkeys(("micron", "microns", "micrometer", "micrometre", "micrometers"), 1e3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e6),
    **dict.fromkeys(("cm", "centimeter"), 1e7),
    **dict.fromkeys(("m", "meter", "metre"), 1e9),
    **dict.fromkeys(("\u00e5", "angstrom"), 0.1),  # lower case, as every unit is looked up
    **dict.fromkeys(("pm", "picometer"), 1e-3),
}
SECTION_SUFFIXES = {".png", ".tif", ".tiff"}
REMOTE = re.compile(r"(https?|s3|gs)://[^/]+")
NanometresZYX = tuple[float, float, float]


@dataclass(frozen=True)
class Source:
    """What an opener hands over. Slices are plain (step 1, inside the array), one per axis of `shape`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]
    voxel_size_nm: NanometresZYX | None = None
    attrs: dict = field(default_factory=dict)
    write: Callable[[tuple[slice, ...], np.ndarray], None] | None = None
    place: Place | None = None  # what on disk or on the web it is read from, wherever one stands
    origin: str = ""  # the same as text, with what was done to it (a box, resampling)


@dataclass(frozen=True)
class Place:
    """A file, folder or web address, and what followed its colon ("" where nothing did)."""

    base: str
    key: str = ""

    remote = property(lambda self: bool(REMOTE.match(self.base)))
    path = property(lambda self: Path(self.base))
    name = property(lambda self: f"{self.base}:{self.key}" if self.key else self.base)

    def inside(self, *parts: str) -> Place:
        parts = [part.strip("/") for part in parts if part.strip("/")]
        return Place("/".join([self.base.rstrip("/"), *parts])) if parts else Place(self.base)

    def kvstore(self):
        return (
            self.base.rstrip("/") + "/"
            if self.remote
            else {"driver": "file", "path": os.path.abspath(self.base) + "/"}
        )

    def json(self, file: str) -> dict | None:
        """A metadata file here; None where there is none."""
        if self.remote:
            data = _remote_bytes(self, file)
        else:
            data = (self.path / file).read_bytes() if (self.path / file).is_file() else b""
        if not data:
            return None
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{self.base}/{file}: damaged metadata: {error}") from error
        return value if isinstance(value, dict) else None


def place_of(address: str) -> Place:
    address = re.sub(
        r"^(zarr|zarr2|zarr3|n5|precomputed|file)://", "", str(address)
    )  # neuroglancer's way to write a source
    if remote := REMOTE.match(address):
        base, _, key = address[remote.end() :].partition(":")
        return Place(remote[0] + base.rstrip("/"), key.strip("/"))
    if Path(address).exists():
        return Place(address)
    for colon in re.finditer(":", address):
        if Path(address[: colon.start()]).exists():
            return Place(address[: colon.start()], address[colon.end() :].strip("/"))
    raise FileNotFoundError(f"{address}: no such file or folder")


def resolved(place: Place) -> Place:
    """The same place from any working folder, links followed."""
    return place if place.remote else Place(str(place.path.resolve()), place.key)


def named(name: str, function: Callable, *arguments, what: str = ""):
    """function(*arguments); a library's exception becomes a ValueError that begins with the file's name."""
    try:
        return function(*arguments)
    except (FileNotFoundError, ConnectionError, MemoryError):
        raise
    except Exception as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {what}{': ' if what else ''}{error}") from error


def _arranged(get, shape, dtype, chunk_shape, axes: Sequence[str], **facts) -> Source:
    """A Source over an array whose axes are named by `axes` ("z", "y", "x", anything else), in any order.

    get takes one slice or integer per axis of the foreign array. Of the other axes one may have several
    elements: it becomes the channels, the first axis.
    """
    axes = [axis.lower() for axis in axes]
    if sorted(a for a in axes if a in "zyx") != ["x", "y", "z"]:
        raise ValueError(f"axes {axes} of shape {tuple(shape)}, wanted z, y and x among them")
    others = [k for k, axis in enumerate(axes) if axis not in "zyx" and shape[k] > 1]
    if len(others) > 1 or any(axes[k] == "t" for k in others):
        raise ValueError(
            f"axes {axes} of shape {tuple(shape)}, wanted z y x and at most one axis of channels: "
            f"export one time point"
        )
    order = others + [axes.index(axis) for axis in "zyx"]
    kept = sorted(order)

    def index_of(slices):
        index = [0] * len(axes)
        for axis, item in zip(order, slices):
            index[axis] = item
        return tuple(index)

    def read(slices):
        return np.asarray(get(index_of(slices))).transpose([kept.index(axis) for axis in order])

    return Source(
        tuple(int(shape[k]) for k in order),
        np.dtype(dtype),
        tuple(int(chunk_shape[k]) for k in order),
        read,
        **facts,
    )


def _default_axes(shape) -> list[str]:
    """(Z, Y, X), (C, Z, Y, X), (T, C, Z, Y, X), or with one last channel of size 1."""
    if len(shape) < 3:
        raise ValueError(f"an array of shape {tuple(shape)}, wanted a volume (Z, Y, X)")
    names = ["z", "y", "x"]
    if len(shape) > 3 and shape[-1] == 1:
        names.append("last")
    return [f"other{k}" for k in range(len(shape) - len(names))] + names


def checked_voxel_size(voxel_size_nm) -> NanometresZYX:
    """Three finite positive lengths in nm (z, y, x), as a tuple."""
    try:
        size = tuple(float(v) for v in voxel_size_nm)
    except (TypeError, ValueError):
        size = ()
    if len(size) != 3 or not all(math.isfinite(v) and v > 0 for v in size):
        raise ValueError(
            f"voxel size {voxel_size_nm}, wanted three positive lengths in nm (z, y, x), as in 50,4,4"
        )
    return size


def _stated(size, unit: str | Sequence[str] | None = "nm") -> NanometresZYX | None:
    """A stated voxel size in nm; None where absent, of unknown unit, or a placeholder (0, NaN, all 1)."""
    units = [unit] * 3 if unit is None or isinstance(unit, str) else list(unit)
    if (
        size is None
        or np.size(size) != 3
        or len(units) != 3
        or any(str(u).lower() not in UNIT_NM for u in units)
    ):
        return None
    size = [float(v) for v in size]
    if not all(math.isfinite(v) and v > 0 for v in size) or all(v == 1 for v in size):
        return None
    return tuple(round(v * UNIT_NM[str(u).lower()], 9) for v, u in zip(size, units))


def _voxel_size_of_attributes(attrs: dict) -> NanometresZYX | None:
    """From HDF5 or Zarr attributes: ours; CREMI's and funlib's (nm unless a unit is named); Fiji's (um)."""
    unit = attrs.get("units", attrs.get("unit", "nm"))
    stated = [
        (attrs.get("voxel_size_nm"), "nm"),
        (attrs.get("resolution"), unit),
        (attrs.get("voxel_size"), unit),
    ]
    stated.append((attrs.get("element_size_um"), "um"))
    return next((size for value, u in stated if (size := _stated(value, u))), None)


# ---- files: TIFF, PNG, MRC, HDF5 ---------------------------------------------------------------------------


def _starts(place: Place, *magics: bytes, at: int = 0) -> bool:
    if place.remote or not place.path.is_file():
        return False
    with open(place.path, "rb") as file:
        file.seek(at)
        return any(file.read(len(magic)) == magic or file.seek(at) is None for magic in magics)


class _Sections:
    """2D sections decoded one at a time, the last ones kept (at most CACHE_BYTES)."""

    def __init__(
        self, decode: Callable[[int], np.ndarray], lead: tuple[int, ...], shape: tuple[int, int], dtype
    ):
        self.decode, self.numbers, self.shape, self.dtype = (
            decode,
            np.arange(math.prod(lead)).reshape(lead),
            shape,
            dtype,
        )
        self.kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self.lock = threading.Lock()

    def section(self, number: int) -> np.ndarray:
        with self.lock:  # tifffile's and PIL's file handles are not for two threads
            if number not in self.kept:
                section = np.asarray(self.decode(number))
                if section.shape != self.shape:
                    raise ValueError(f"section {number} has shape {section.shape}, wanted {self.shape}")
                self.kept[number] = section
                while len(self.kept) > max(1, CACHE_BYTES // section.nbytes):
                    self.kept.popitem(last=False)
            self.kept.move_to_end(number)
            return self.kept[number]

    def __call__(self, index) -> np.ndarray:
        numbers, (rows, columns) = self.numbers[index[:-2]], index[-2:]
        out = np.empty((numbers.size, rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        for k, number in enumerate(numbers.ravel()):
            out[k] = self.section(int(number))[rows, columns]
        return out.reshape(numbers.shape + out.shape[1:])


def _mapped(path, dtype, shape, offset: int):
    """Reader of an uncompressed array in a file, through a memory map; its length is checked first."""
    wanted, found = offset + math.prod(shape) * np.dtype(dtype).itemsize, os.path.getsize(path)
    if found < wanted:
        raise ValueError(f"truncated: {found} bytes, the header promises {wanted}")
    array = np.memmap(path, dtype, "r", offset, tuple(shape))
    return lambda index: np.array(array[index])


def _open_tiff_file(path):
    """tifffile's handle; what it merely logs about a broken chain of pages is an error here."""
    import tifffile

    faults = []
    handler = logging.Handler()
    handler.emit = lambda record: faults.append(record.getMessage())
    logger, propagate = logging.getLogger("tifffile"), logging.getLogger("tifffile").propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        tiff = tifffile.TiffFile(path)
        try:
            len(tiff.pages), tiff.series
        except Exception:
            tiff.close()
            raise
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    if broken := next(
        (fault for fault in faults if "invalid page offset" in fault or "corrupted" in fault), None
    ):
        tiff.close()
        raise ValueError(f"truncated or damaged: {broken}")
    return tiff


def _open_tiff(place: Place) -> Source:
    tiff = _open_tiff_file(place.path)
    close = True
    try:
        series = tiff.series[0]
        if len(tiff.series) > 1 and not tiff.is_ome:
            shapes = sorted({s.shape for s in tiff.series})
            raise ValueError(f"pages of different shapes {shapes[:4]}: wanted one stack of equal sections")
        axes = series.axes
        if axes[-2:] != "YX":
            raise ValueError(
                f"axes {axes} of shape {series.shape}, wanted grey sections (..., Y, X): colour "
                f"is not supported"
            )
        shape = series.shape if len(series.shape) > 2 else (1, *series.shape)
        axes = (
            "zyx" if len(shape) == 3 else axes.lower()
        )  # whatever the first of three is called (Z, T, C, I, Q), it counts sections
        if "z" not in axes:  # pages without a name beside channels or times
            axes = re.sub("[iq]", "z", axes, count=1)
        dtype = np.dtype(series.dtype).newbyteorder(tiff.byteorder)
        if series.dataoffset is not None:
            get = _mapped(place.path, dtype, shape, series.dataoffset)
        else:
            length = tiff.filehandle.size
            for number, page in enumerate(series.pages):
                if (
                    page is None
                    or max(map(sum, zip(page.dataoffsets, page.databytecounts)), default=0) > length
                ):
                    raise ValueError(f"truncated: page {number} of {len(series.pages)} ends outside the file")
            get = _Sections(lambda k: series.pages[k].asarray(), shape[:-2], shape[-2:], dtype)
            weakref.finalize(get, tiff.close)
            close = False
        chunk = (1,) * (len(shape) - 2) + shape[-2:]
        return _arranged(get, shape, dtype, chunk, axes, voxel_size_nm=_tiff_voxel_size(tiff))
    finally:
        if close:
            tiff.close()


def _tiff_voxel_size(tiff) -> NanometresZYX | None:
    """From OME-XML, or from ImageJ's unit, spacing and resolution; plain TIFF has no z."""
    if tiff.is_ome:
        from xml.etree import ElementTree

        pixels = next(
            (e for e in ElementTree.fromstring(tiff.ome_metadata).iter() if e.tag.endswith("}Pixels")), None
        )
        if pixels is None:
            return None
        sizes = [float(pixels.get(f"PhysicalSize{axis}", "nan")) for axis in "ZYX"]
        return _stated(sizes, [pixels.get(f"PhysicalSize{axis}Unit", "\u00b5m") for axis in "ZYX"])
    stated, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
    if not {"unit", "spacing"} <= set(stated) or "XResolution" not in tags or "YResolution" not in tags:
        return None
    per_unit = [tags[tag].value for tag in ("YResolution", "XResolution")]
    return _stated([stated["spacing"], *(d / n if n else math.nan for n, d in per_unit)], stated["unit"])


def _section_files(place: Place) -> list[Path]:
    if place.remote or not place.path.is_dir():
        return []
    found = [
        p for p in place.path.iterdir() if p.suffix.lower() in SECTION_SUFFIXES and not p.name.startswith(".")
    ]
    return sorted(
        found, key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)]
    )


def _open_folder(place: Place) -> Source:
    files = _section_files(place)
    series = sorted({re.sub(r"\d+", "#", file.name) for file in files})
    if len(series) > 1:
        raise ValueError(
            f"files of {len(series)} series ({', '.join(series[:4])}), wanted the sections of one "
            f"volume: one folder each"
        )
    _check_numbers(files)
    headers = [named(str(file), _section_header, file, what="not a readable section") for file in files]
    for file, header in zip(files, headers):
        if header != headers[0]:
            (shape, dtype), (first_shape, first_dtype) = header, headers[0]
            raise ValueError(
                f"{file.name} is {shape} {dtype}, {files[0].name} is {first_shape} {first_dtype}: "
                f"wanted sections of one shape and type"
            )
    shape, dtype = headers[0]

    def decode(number):
        section = named(str(files[number]), _read_section, files[number], what="damaged section")
        if section.shape != shape:
            raise ValueError(f"{files[number]} is now {section.shape}, was {shape}")
        return section

    get = _Sections(decode, (len(files),), shape, dtype)
    return _arranged(get, (len(files), *shape), dtype, (1, *shape), "zyx")


def _check_numbers(files: list[Path]) -> None:
    """ValueError where section numbers are missing between the first and the last: closing the gap would shift z.

    Judged only where the names differ in exactly one number; an even step (every tenth) is no gap.
    """
    rows = [[int(part) for part in re.findall(r"\d+", file.name)] for file in files]
    columns = [set(column) for column in zip(*rows)]
    varying = [sorted(column) for column in columns if len(column) > 1]
    if len(varying) != 1:
        return
    numbers = varying[0]
    step = math.gcd(*(b - a for a, b in zip(numbers, numbers[1:])))
    gaps = [(a, b) for a, b in zip(numbers, numbers[1:]) if b - a > step]
    if gaps:
        missing = [f"{a + step}" if b - a == 2 * step else f"{a + step} to {b - step}" for a, b in gaps]
        more = f" and {len(missing) - 6} more gaps" if len(missing) > 6 else ""
        raise ValueError(
            f"sections {', '.join(missing[:6])}{more} are missing between {files[0].name} and {files[-1].name}: put a "
            f"blank section in each place, so that z stays true, or rename the files without gaps"
        )


PNG_TYPES = {"1": "u1", "L": "u1", "I;16": "u2", "I;16B": "u2", "I": "i4", "F": "f4"}


def _png(file: Path):
    from PIL import PngImagePlugin

    return PngImagePlugin.PngImageFile(file)  # Image.open would refuse sections above 178 million pixels


def _section_header(file: Path) -> tuple[tuple[int, int], np.dtype]:
    if file.suffix.lower() != ".png":
        tiff = _open_tiff_file(file)
        with tiff:
            if len(tiff.pages) != 1:
                raise ValueError(
                    f"{len(tiff.pages)} pages in one section, wanted 1 (open a multi-page TIFF by "
                    f"its own name)"
                )
            page = tiff.pages[0]
            if max(map(sum, zip(page.dataoffsets, page.databytecounts)), default=0) > tiff.filehandle.size:
                raise ValueError("truncated")
            if page.ndim != 2:
                raise ValueError(f"shape {page.shape}, wanted a grey section (Y, X)")
            return page.shape, np.dtype(page.dtype)
    with _png(file) as image:
        if image.mode not in PNG_TYPES:
            raise ValueError(
                f"colour mode {image.mode}, wanted grey (8 or 16 bit): convert the sections first"
            )
        header = (image.size[1], image.size[0]), np.dtype(PNG_TYPES[image.mode])
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        if b"IEND" not in stream.read():
            raise ValueError("truncated: the PNG has no end marker")
    return header


def _read_section(file: Path) -> np.ndarray:
    if file.suffix.lower() != ".png":
        with _open_tiff_file(file) as tiff:
            return tiff.pages[0].asarray()
    with _png(file) as image:
        return np.asarray(image).astype(PNG_TYPES[image.mode])


def _is_mrc(place: Place) -> bool:
    return _starts(place, b"MAP ", b"MAP\0", at=208) or (
        not place.remote
        and place.path.is_file()
        and place.path.suffix.lower() in {".mrc", ".rec", ".st", ".map"}
    )


def _open_mrc(place: Place) -> Source:
    import mrcfile

    with mrcfile.open(place.path, header_only=True) as mrc:
        header = mrc.header.copy()
        angstrom = [float(mrc.voxel_size[axis]) for axis in "zyx"]
    order = [int(header[field]) for field in ("mapc", "mapr", "maps")]
    if order not in ([1, 2, 3], [0, 0, 0]):
        raise ValueError(f"axes stored in the order {order}, wanted 1, 2, 3 (x fastest, then y, z)")
    shape = tuple(int(header[field]) for field in ("nz", "ny", "nx"))
    dtype = mrcfile.utils.data_dtype_from_header(header)
    get = _mapped(place.path, dtype, shape, 1024 + int(header["nsymbt"]))
    return _arranged(get, shape, dtype, (1, *shape[1:]), "zyx", voxel_size_nm=_stated(angstrom, "angstrom"))


def _open_hdf5(place: Place) -> Source:
    import h5py

    file = h5py.File(place.path, "r", rdcc_nbytes=CACHE_BYTES, rdcc_nslots=100_003)
    arrays: dict[str, tuple] = {}
    file.visititems(
        lambda key, item: arrays.update({key: item.shape}) if isinstance(item, h5py.Dataset) else None
    )
    volumes = [key for key, shape in arrays.items() if len(shape or ()) >= 3]
    listing = ", ".join(f"{key} {arrays[key]}" for key in volumes) or "none"
    key = place.key or (volumes[0] if len(volumes) == 1 else "")
    if not key:
        raise ValueError(f"which array? Write {place.base}:KEY; 3D arrays in it: {listing}")
    if key not in arrays:
        raise ValueError(f"no array {key!r} in {place.base}; 3D arrays in it: {listing}")
    array = file[key]
    attrs: dict = {}
    for item in (file, array.parent, array):  # the nearest statement counts
        attrs.update({name: _plain(value) for name, value in item.attrs.items()})
    axes = _hdf5_axes(attrs, array)
    chunk = array.chunks or (1,) * max(0, array.ndim - 2) + array.shape[-2:]
    size = next(
        (s for item in (array, array.parent, file) if (s := _voxel_size_of_attributes(dict(item.attrs)))),
        None,
    )
    return _arranged(
        array.__getitem__, array.shape, array.dtype, chunk, axes, voxel_size_nm=size, attrs=attrs
    )


def _hdf5_axes(attrs: dict, array) -> Sequence[str]:
    named = attrs.get("axes")
    if isinstance(attrs.get("axistags"), str):  # ilastik, vigra
        named = [axis["key"] for axis in json.loads(attrs["axistags"])["axes"]]
    if isinstance(named, (str, list)) and len(named) == array.ndim and {"z", "y", "x"} <= set(named):
        return list(named)
    return _default_axes(array.shape)


def _plain(value):
    """An HDF5 attribute as JSON would hold it."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


# ---- chunked folders and addresses, all through tensorstore ------------------------------------------------


@lru_cache(maxsize=1)
def _context():
    """For every chunked volume: one cache, threads by the CPU budget, retries that end (default: minutes)."""
    import tensorstore

    threads = {
        "limit": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    }
    retries = {"max_retries": 4, "initial_delay": "200ms", "max_delay": "2s"}
    services = {f"{service}_request_retries": retries for service in ("http", "s3", "gcs")}
    return tensorstore.Context(
        {"cache_pool": {"total_bytes_limit": CACHE_BYTES}, "data_copy_concurrency": threads, **services}
    )


def _remote_bytes(place: Place, file: str) -> bytes:
    import tensorstore

    try:
        return bytes(
            tensorstore.KvStore.open(place.kvstore(), context=_context()).result().read(file).result().value
        )
    except Exception as error:
        raise ConnectionError(
            f"{place.base}/{file}: cannot be reached: {str(error).splitlines()[0]}"
        ) from error


def open_store(spec: dict, **options):
    import tensorstore

    return tensorstore.open(spec, context=_context(), **options).result()


def _chunked(store, axes: Sequence[str], **facts) -> Source:
    """A Source over a tensorstore: its origin moved to 0, absent chunks are the fill value."""
    import tensorstore

    store = store[tensorstore.d[:].translate_to[0]] if store.rank else store
    dtype = store.dtype.numpy_dtype
    chunk = [side or 1 for side in store.chunk_layout.read_chunk.shape]
    return _arranged(lambda index: store[index].read().result(), store.shape, dtype, chunk, axes, **facts)


def zarr_node(place: Place) -> tuple[str, dict, dict] | None:
    """("array" or "group", attributes, array metadata) of a Zarr 2 or 3 node; None where there is none."""
    if (node := place.json("zarr.json")) is not None:
        return node.get("node_type", "array"), node.get("attributes", {}), {**node, "driver": "zarr3"}
    if (array := place.json(".zarray")) is not None:
        return "array", place.json(".zattrs") or {}, {**array, "driver": "zarr"}
    attrs = place.json(".zattrs")
    if attrs is not None or place.json(".zgroup") is not None:
        return "group", attrs or {}, {}
    return None


def _open_zarr(place: Place) -> Source:
    root = Place(place.base)
    kind, attrs, meta = zarr_node(root)
    scales = _scales(attrs)
    if place.key and kind == "group":
        if zarr_node(root.inside(place.key)) is not None:
            if scales and place.key in scales["paths"]:
                return _zarr_scale(root, scales, scales["paths"].index(place.key), attrs)
            return _open_zarr(root.inside(place.key))
        if not (scales and place.key.isdigit() and int(place.key) < len(scales["paths"])):
            found = scales["paths"] if scales else _arrays_within(root, _zarr_kind)
            raise ValueError(
                f"no array or scale level {place.key!r} in it, wanted one of: {', '.join(found) or 'none'}"
            )
    elif place.key:
        raise ValueError(f"it is one array, so nothing is called {place.key!r} in it")
    if scales:
        return _zarr_scale(root, scales, int(place.key or 0), attrs)
    if kind == "group":
        found = _arrays_within(root, _zarr_kind)
        if len(found) == 1:
            return _open_zarr(root.inside(found[0]))
        raise ValueError(
            f"which array? Write {place.base}:KEY, KEY one of: {', '.join(found) or 'none found'}"
        )
    if not root.remote and (above := zarr_node(Place(str(root.path.absolute().parent)))) is not None:
        scales = _scales(above[1])  # a path such as x.zarr/1: its group states the voxel size
        if scales and root.path.absolute().name in scales["paths"]:
            parent = Place(str(root.path.absolute().parent))
            return _zarr_scale(parent, scales, scales["paths"].index(root.path.absolute().name), above[1])
    axes = meta.get("dimension_names") or attrs.get("axis_names") or attrs.get("axes") or ()
    return _zarr_array(
        root, meta["driver"], axes, voxel_size_nm=_voxel_size_of_attributes(attrs), attrs=attrs
    )


def _zarr_array(place: Place, driver: str, axes, **facts) -> Source:
    store = open_store({"driver": driver, "kvstore": place.kvstore(), "open": True})
    axes = [re.sub(r".*\^", "", str(axis)).lower() for axis in axes]
    return _chunked(
        store,
        axes if {"z", "y", "x"} <= set(axes) and len(axes) == store.rank else _default_axes(store.shape),
        **facts,
    )


def _scales(attrs: dict) -> dict | None:
    """OME-Zarr 0.4 ("multiscales") or 0.5 ("ome"): paths, axis names, and per level the voxel size in nm."""
    multiscales = attrs.get("ome", {}).get("multiscales") or attrs.get("multiscales")
    if not multiscales:
        return None
    image = multiscales[0]
    axes = [
        a if isinstance(a, dict) else {"name": a} for a in image.get("axes") or [{"name": n} for n in "tczyx"]
    ]
    names = [axis["name"].lower() for axis in axes]
    units = [axes[names.index(a)].get("unit") if a in names else None for a in "zyx"]
    sizes = []
    for dataset in image["datasets"]:
        factor = np.ones(len(axes))
        steps = dataset.get("coordinateTransformations", []) + image.get("coordinateTransformations", [])
        scale_steps = [step["scale"] for step in steps if step.get("type") == "scale" and "scale" in step]
        for scale in scale_steps:
            factor = factor * scale
        spatial = [factor[names.index(a)] if a in names else math.nan for a in "zyx"]
        sizes.append(_stated(spatial, units) if scale_steps else None)
    return {
        "paths": [d["path"].strip("/") for d in image["datasets"]],
        "axes": names,
        "voxel_sizes_nm": sizes,
    }


def _zarr_scale(root: Place, scales: dict, level: int, attrs: dict) -> Source:
    place = root.inside(scales["paths"][level])
    node = zarr_node(place)
    if node is None or node[0] != "array":
        raise ValueError(f"scale level {level} ({place.base}) is stated but not there")
    ours = attrs.get("emae", {k: v for k, v in attrs.items() if k not in ("ome", "multiscales")})
    return _zarr_array(
        place, node[2]["driver"], scales["axes"], voxel_size_nm=scales["voxel_sizes_nm"][level], attrs=ours
    )


def _zarr_kind(place: Place) -> str | None:
    node = zarr_node(place)
    if node is None:
        return None
    return "array" if node[0] == "array" or _scales(node[1]) else "group"


def _arrays_within(root: Place, kind_of: Callable[[Place], str | None]) -> list[str]:
    """Paths of the arrays (or multiscale images) below a local group; a web address cannot be listed."""
    found, stack = [], [] if root.remote else [""]
    while stack:
        path = stack.pop()
        for child in sorted((root.path / path).iterdir()):
            if child.is_dir() and (kind := kind_of(Place(str(child)))) is not None:
                (found if kind == "array" else stack).append(f"{path}/{child.name}".strip("/"))
    return sorted(found)


def _n5_kind(place: Place) -> str | None:
    attrs = place.json("attributes.json")
    if attrs is None:
        return "group" if not place.remote and any(place.path.glob("*/attributes.json")) else None
    return "array" if "dimensions" in attrs else "group"


def _open_n5(place: Place) -> Source:
    array = place.inside(place.key)
    if _n5_kind(array) != "array":
        found = _arrays_within(Place(place.base), _n5_kind)
        if place.key or len(found) != 1:
            raise ValueError(
                f"which array? Write {place.base}:KEY, KEY one of: {', '.join(found) or 'none found'}"
            )
        array = place.inside(found[0])
    attrs = array.json("attributes.json") or {}
    above = Place(array.base.rstrip("/").rpartition("/")[0]).json("attributes.json") or {}
    store = open_store({"driver": "n5", "kvstore": array.kvstore(), "open": True})
    names = ["x", "y", "z"] + [
        f"other{k}" for k in range(store.rank - 3)
    ]  # N5's own order is x fastest, first
    return _chunked(store, names, voxel_size_nm=_n5_voxel_size(attrs, above), attrs=attrs)


def _n5_voxel_size(attrs: dict, above: dict) -> NanometresZYX | None:
    """From the array, or from its multiscale group times the array's downsamplingFactors; x, y, z."""
    factors = np.array(attrs.get("downsamplingFactors", [1, 1, 1]), float)
    for stated, factor in ((attrs, np.ones(3)), (above, factors)):
        if transform := stated.get("transform"):  # COSEM: axes named
            at = [list(transform["axes"]).index(axis) for axis in "zyx"]
            return _stated(np.array(transform["scale"])[at], [transform["units"][k] for k in at])
        pixel = stated.get("pixelResolution")
        pixel = (
            {"dimensions": pixel}
            if isinstance(pixel, list)
            else pixel or {"dimensions": stated.get("resolution")}
        )
        if pixel.get("dimensions") is not None:
            unit = pixel.get("unit", (stated.get("units") or ["nm"])[0])
            return _stated((np.array(pixel["dimensions"], float)[:3] * factor)[::-1], unit)
    return None


def _open_precomputed(place: Place) -> Source:
    info = Place(place.base).json("info")
    keys = [scale["key"] for scale in info["scales"]]
    if place.key and place.key not in keys and not (place.key.isdigit() and int(place.key) < len(keys)):
        raise ValueError(f"no scale {place.key!r}, wanted one of: {', '.join(keys)}")
    level = keys.index(place.key) if place.key in keys else int(place.key or 0)
    scale = info["scales"][level]
    store = open_store(
        {
            "driver": "neuroglancer_precomputed",
            "kvstore": Place(place.base).kvstore(),
            "scale_index": level,
            "open": True,
        }
    )
    attrs = {"voxel_offset_vx": list(scale.get("voxel_offset", (0, 0, 0)))[::-1]}
    return _chunked(
        store, ["x", "y", "z", "c"], voxel_size_nm=_stated(scale["resolution"][::-1]), attrs=attrs
    )


def _is_hdf5(place: Place) -> bool:
    return _starts(place, b"\x89HDF\r\n\x1a\n") or _starts(place, b"\x89HDF\r\n\x1a\n", at=512)


def _is_folder(place: Place) -> bool:
    return place.remote or place.path.is_dir()


def _is_zarr(place: Place) -> bool:
    return _is_folder(place) and zarr_node(Place(place.base)) is not None


def _is_precomputed(place: Place) -> bool:
    return _is_folder(place) and "scales" in (Place(place.base).json("info") or {})


def _is_n5(
    place: Place,
) -> bool:  # a root may have no attributes of its own, and on the web it cannot be listed
    inside = [Place(place.base), *([place.inside(place.key)] if place.key else [])]
    return _is_folder(place) and any(_n5_kind(p) is not None for p in inside)


OPENERS: tuple[tuple[str, Callable[[Place], bool], Callable[[Place], Source]], ...] = (
    ("TIFF", lambda place: _starts(place, b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _open_tiff),
    ("HDF5", _is_hdf5, _open_hdf5),
    ("MRC", _is_mrc, _open_mrc),
    ("Zarr or OME-Zarr", _is_zarr, _open_zarr),
    ("precomputed", _is_precomputed, _open_precomputed),
    ("N5", _is_n5, _open_n5),
    ("a folder of PNG or TIFF sections", lambda place: bool(_section_files(place)), _open_folder),
)
WITHOUT_KEYS = ("TIFF", "MRC", OPENERS[-1][0])
