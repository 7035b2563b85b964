"""Volume, one lazy array over every format; the format written here; checks before work starts; resampling.

Spatial axes are the last three, z y x; with several channels there are four, (C, Z, Y, X). Lengths are
nanometres, boxes voxels (z, y, x). Needs numpy alone until a file is opened.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from emae._formats import (
    OPENERS,
    REMOTE,
    WITHOUT_KEYS,
    NanometresZYX,
    Place,
    Source,
    checked_voxel_size,
    named,
    open_store,
    place_of,
    resolved,
    zarr_node,
)
from emae._geometry import Box, parse_box

SAMPLE_CHUNKS = 16  # chunks read by a check before work starts, beside the middle one
PROGRESS = "emae_blocks.json"  # in a prediction: which of its blocks are done


class VolumeReadError(ValueError):
    """A box that could not be read; the message names the volume, the box and the fault."""


class Volume:
    """A lazy array, (Z, Y, X) or (C, Z, Y, X), that knows its voxel size and its name.

    Indexed like numpy (slices, integers, `...`); every read is checked for NaN and infinity. `box` says where
    this view lies in its file (z, y, x). Reads may come from several threads.
    """

    def __init__(self, source: Source, name: str, *, voxel_size_nm=None, box: Box | None = None):
        if len(source.shape) not in (3, 4) or 0 in source.shape:
            raise ValueError(f"{name}: shape {source.shape}, wanted (Z, Y, X) or (C, Z, Y, X) with no side 0")
        if source.dtype.kind not in "buif":
            raise ValueError(
                f"{name}: voxels of type {source.dtype}, wanted unsigned or signed integers or floats"
            )
        self._source, self.name = source, str(name)
        self.box = Box.of_shape(source.shape[-3:]) if box is None else box
        self.voxel_size_nm = (
            source.voxel_size_nm if voxel_size_nm is None else checked_voxel_size(voxel_size_nm)
        )
        self.dtype = source.dtype.newbyteorder("=")
        self.attrs = source.attrs

    @classmethod
    def from_array(
        cls, array: np.ndarray, voxel_size_nm=None, name: str = "array", attrs: dict | None = None
    ) -> Volume:
        """An array in memory, (Z, Y, X) or (C, Z, Y, X), as a Volume; reads are copies."""
        array = np.asarray(array)
        chunk_shape = (1,) * (array.ndim - 3) + tuple(min(side, 64) for side in array.shape[-3:])
        source = Source(
            array.shape, array.dtype, chunk_shape, lambda index: np.array(array[index]), attrs=attrs or {}
        )
        return cls(source, name, voxel_size_nm=voxel_size_nm)

    shape = property(lambda self: self._source.shape[:-3] + self.box.shape)
    ndim = property(lambda self: len(self._source.shape))
    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)
    writable = property(lambda self: self._source.write is not None)

    @property
    def path(self) -> Path | None:
        """The file or folder it is read from; None in memory and on the web."""
        place = self._source.place
        return None if place is None or place.remote else place.path

    @property
    def origin(self) -> str:
        """Which voxels these are, wherever one stands: file, key, box and resampling."""
        return f"{self._source.origin or self.name} {self.box}"

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Voxels of one unit of storage on every axis, cut to the volume."""
        return tuple(min(chunk, side) for chunk, side in zip(self._source.chunk_shape, self.shape))

    def __repr__(self) -> str:
        facts = f"shape={self.shape}, dtype={self.dtype}, voxel_size_nm={self.voxel_size_nm}, box={self.box}"
        return f"Volume({self.name!r}, {facts})"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        slices, then = self._slices(index)
        return self._read(slices)[then]

    def __setitem__(self, index, value) -> None:
        if not self.writable:
            raise ValueError(
                f"{self.name}: opened for reading; only what create_volume returns can be written"
            )
        slices, then = self._slices(index)
        if any(isinstance(t, slice) and t != slice(None) for t in then):
            raise IndexError(f"{self.name}: writing with a step is not supported")
        value = np.asarray(value)
        if not np.can_cast(value.dtype, self.dtype, "safe"):
            raise ValueError(
                f"{self.name}: {value.dtype} voxels given, {self.dtype} wanted: convert them first"
            )
        shape = tuple(s.stop - s.start for s in slices)
        kept = tuple(side for side, t in zip(shape, then) if isinstance(t, slice))
        value = np.broadcast_to(value.astype(self.dtype, copy=False), kept).reshape(shape)
        try:
            self._source.write(self._in_file(slices), value)
        except Exception as error:
            free = shutil.disk_usage(Path(self.name).parent).free
            raise OSError(
                f"{self.name}: cannot write box {_text(slices)} ({_gib(free)} free there): {error}"
            ) from error

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self.name}: a volume on disk cannot become an array without a copy")
        return self[...].astype(dtype or self.dtype, copy=False)

    def read(self, box: Box) -> np.ndarray:
        """The voxels of `box` (z, y, x in this view), all channels; ValueError where it leaves the volume."""
        if not Box.of_shape(self.shape[-3:]).contains(box):
            raise ValueError(
                f"{self.name}: box {box} leaves the volume, which has {self.shape[-3:]} voxels (z, y, x)"
            )
        return self._read((*(slice(0, c) for c in self.shape[:-3]), *box.slices))

    def crop(self, box: Box | str) -> Volume:
        """A lazy view of `box` (z, y, x in this view, or text "z0:z1,y0:y1,x0:x1")."""
        if isinstance(box, str):
            box = named(self.name, parse_box, box, self.shape[-3:])
        if box.is_empty or not Box.of_shape(self.shape[-3:]).contains(box):
            raise ValueError(
                f"{self.name}: box {box} is empty or leaves the volume, which has "
                f"{self.shape[-3:]} voxels (z, y, x)"
            )
        return Volume(
            self._source, self.name, voxel_size_nm=self.voxel_size_nm, box=box.shift(self.box.start)
        )

    def with_voxel_size(self, voxel_size_nm: Sequence[float]) -> Volume:
        """The same volume with this voxel size, nm (z, y, x), whatever its file says."""
        return Volume(self._source, self.name, voxel_size_nm=voxel_size_nm, box=self.box)

    def require_voxel_size(self) -> NanometresZYX:
        """The voxel size, nm (z, y, x); ValueError where nobody stated it: it is never guessed."""
        if self.voxel_size_nm is None:
            raise ValueError(
                f"{self.name} does not state its voxel size: give it in nm (z,y,x), as in --voxel-size 50,4,4"
            )
        return self.voxel_size_nm

    def _slices(self, index) -> tuple[tuple[slice, ...], tuple]:
        """Plain slices to read, and the index that then applies steps and drops integer axes."""
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = index[:at] + (slice(None),) * (self.ndim - len(index) + 1) + index[at + 1 :]
        index += (slice(None),) * (self.ndim - len(index))
        if len(index) != self.ndim:
            raise IndexError(f"{self.name}: {len(index)} indices for {self.ndim} axes")
        slices, then = [], []
        for item, side in zip(index, self.shape):
            if isinstance(item, slice):
                start, stop, step = item.indices(side)
                if step < 1:
                    raise IndexError(f"{self.name}: slice {item} has a step below 1")
                slices.append(slice(start, max(start, stop)))
                then.append(slice(None) if step == 1 else slice(None, None, step))
            else:
                at = int(item) + (side if item < 0 else 0)
                if not 0 <= at < side:
                    raise IndexError(f"{self.name}: index {item} outside an axis of {side}")
                slices.append(slice(at, at + 1))
                then.append(0)
        return tuple(slices), tuple(then)

    def _in_file(self, slices) -> tuple[slice, ...]:
        start = (0,) * (self.ndim - 3) + self.box.start
        return tuple(slice(s.start + o, s.stop + o) for s, o in zip(slices, start))

    def _read(self, slices) -> np.ndarray:
        shape = tuple(s.stop - s.start for s in slices)
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        index = self._in_file(slices)
        try:
            out = np.asarray(self._source.read(index), self.dtype)
        except (VolumeReadError, MemoryError):
            raise
        except Exception as error:  # every library has its own; the reader wants file, box and fault
            raise VolumeReadError(f"{self.name}: cannot read box {_text(index)}: {error}") from error
        assert out.shape == shape, (self.name, out.shape, shape)
        if self.dtype.kind == "f" and not (np.isfinite(out.min()) and np.isfinite(out.max())):
            bad = np.argwhere(~np.isfinite(out))
            where = tuple(int(b) + s.start for b, s in zip(bad[0], index))
            raise VolumeReadError(
                f"{self.name}: {len(bad)} NaN or infinite voxels in box {_text(index)}, the first "
                f"at {where}: replace them"
            )
        return out


def open_path(
    address, *, voxel_size_nm: Sequence[float] | None = None, box: str | Box | None = None
) -> Volume:
    """Open a volume of any known format for reading; nothing but its header is read.

    address: a path; "file.h5:key"; "x.zarr:1" or "x.zarr:s1" for a scale level or an array within; an
    http(s), s3 or gs address of a Zarr, N5 or precomputed volume. voxel_size_nm (z, y, x) comes before what
    the file states. box: the part to open, z y x voxels. FileNotFoundError, or ValueError naming the file and
    the fault; a prediction whose blocks are not all done is one.
    """
    place = place_of(address)
    if not complete(address):
        raise ValueError(
            f"{place.name}: not every block is predicted yet; the same emae predict command goes on"
        )
    volume = _open(place, voxel_size_nm)
    return volume if box is None else volume.crop(box)


def _open(place: Place, voxel_size_nm: Sequence[float] | None = None) -> Volume:
    for format_name, recognises, opener in OPENERS:
        if recognises(place):
            if place.key and format_name in WITHOUT_KEYS:
                raise ValueError(
                    f"{place.name}: {format_name} has no parts, so {place.key!r} names nothing in it"
                )
            source = named(place.name, opener, place, what=f"cannot be opened as {format_name}")
            source = replace(source, place=resolved(place), origin=resolved(place).name)
            return Volume(source, place.name, voxel_size_nm=voxel_size_nm)
    known = ", ".join(name for name, _, _ in OPENERS)
    if place.remote:
        raise FileNotFoundError(
            f"{place.base}: no Zarr, N5 or precomputed metadata there (other formats: fetch the file first)"
        )
    raise ValueError(f"{place.base}: not a known volume, wanted one of: {known}")


def complete(address) -> bool:
    """Whether every block of a prediction is done; what predict did not write is nobody's to doubt."""
    try:
        place = place_of(address)
    except FileNotFoundError:
        return True
    if place.remote:
        return True
    for folder in (place.path, place.path.absolute().parent):  # the parent of x.zarr/0
        if (folder / PROGRESS).is_file():
            state = json.loads((folder / PROGRESS).read_text())
            return len(state["done"]) == state["blocks"]
        if written_attrs(folder).get("work"):  # killed before the first note
            return False
    return True


def written_attrs(path: Path) -> dict:
    """The attrs that `create_volume` wrote there; empty for anything else."""
    try:
        return json.loads((path / "zarr.json").read_text())["attributes"]["emae"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# ---- writing -----------------------------------------------------------------------------------------------


def create_volume(
    path,
    shape,
    dtype,
    voxel_size_nm,
    *,
    chunk_shape=None,
    attrs: dict | None = None,
    overwrite=False,
    resume=False,
    array: np.ndarray | None = None,
) -> Volume:
    """A new OME-Zarr 0.5 volume to write into: (Z, Y, X) or (C, Z, Y, X), voxel size in nm, filled with 0.

    attrs go under attributes["emae"] and come back as Volume.attrs. A chunk is written whole or not at all
    (temporary file, then rename); two writers must not share a chunk. resume=True reopens an existing one of
    the same shape, type and attrs. array: its voxels, in place before the volume gets its name.
    FileExistsError where something is there; overwrite=True replaces what was written by this function,
    nothing else. OSError without the free space.
    """
    path, shape, dtype = Path(path), tuple(int(s) for s in shape), np.dtype(dtype)
    voxel_size_nm, attrs = checked_voxel_size(voxel_size_nm), json.loads(json.dumps(attrs or {}))
    if REMOTE.match(str(path)) or re.match(r"\w+:/", str(path)):
        raise ValueError(f"{path}: volumes are written to local paths only")
    if len(shape) not in (3, 4) or min(shape) < 1 or dtype.kind not in "buif":
        raise ValueError(
            f"{path}: shape {shape} of {dtype}, wanted (Z, Y, X) or (C, Z, Y, X) of integers or floats"
        )
    if chunk_shape is None:  # 1 MB of uint8; a channel apart, so that one can be looked at alone
        chunk_shape = (1,) * (len(shape) - 3) + (64, 128, 128)
    chunk_shape = tuple(min(int(c), s) for c, s in zip(chunk_shape, shape, strict=True))
    if resume and path.exists():
        return _reopened(path, shape, dtype, voxel_size_nm, attrs)
    check_output(path, overwrite)
    check_free_space(
        path.parent,
        math.prod(shape) * dtype.itemsize // (8 if dtype.itemsize >= 4 and dtype.kind in "ui" else 1),
        path,
    )
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    shutil.rmtree(draft, ignore_errors=True)
    names = ["c", "z", "y", "x"][-len(shape) :]
    blosc = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": dtype.itemsize}
    metadata = {
        "shape": shape,
        "data_type": dtype.name,
        "fill_value": False if dtype.kind == "b" else 0,
        "dimension_names": names,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": blosc},
        ],
    }
    open_store(
        {"driver": "zarr3", "kvstore": Place(str(draft / "0")).kvstore(), "metadata": metadata}, create=True
    )
    axes = [
        {"name": n, "type": "space", "unit": "nanometer"} if n != "c" else {"name": n, "type": "channel"}
        for n in names
    ]
    scale = [{"type": "scale", "scale": [1.0] * (len(shape) - 3) + list(voxel_size_nm)}]
    image = {"name": path.stem, "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    attributes = {"ome": {"version": "0.5", "multiscales": [image]}, "emae": attrs}
    (draft / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1)
    )
    if array is not None:
        try:
            _writable(draft)[...] = array
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    if path.exists():
        shutil.rmtree(path)
    os.rename(draft, path)
    return _writable(path)


def check_output(path: Path, overwrite: bool) -> None:
    """Whether `create_volume` may write there; FileExistsError, FileNotFoundError or ValueError otherwise."""
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists: choose another name, or replace it with --overwrite")
        # --overwrite must not cost a lab its data
        if "emae" not in (zarr_node(Place(str(path))) or ("", {}))[1]:
            raise FileExistsError(
                f"{path} exists and was not written by emae: it is never replaced, choose another name"
            )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: its folder {path.parent} may not be written to")


def check_apart(out, *inputs: Volume) -> None:
    """ValueError where `out` is, holds or lies in what one of the inputs is read from: --overwrite would destroy it."""
    place = Path(out).resolve()
    for volume in inputs:
        path = volume.path
        if path is not None and (place == path or place in path.parents or path in place.parents):
            what = "is" if place == path else "lies in" if path in place.parents else "holds"
            raise ValueError(
                f"{out}: {what} the input {volume.name}, which is never replaced: choose another name"
            )


def check_free_space(folder, needed_bytes: int, what) -> None:
    """OSError where the disk of `folder` has fewer bytes free; `what` is the output, for the message."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"{what} may need {_gib(needed_bytes)}, its disk has {_gib(free)} free: make room or "
            f"write elsewhere"
        )


def _reopened(path: Path, shape, dtype, voxel_size_nm, attrs) -> Volume:
    volume = _open(Place(str(path)))
    found, wanted = (volume.shape, volume.dtype, volume.attrs), (shape, dtype, attrs)
    if found != wanted or not same_voxel_size(volume.voxel_size_nm, voxel_size_nm):
        raise ValueError(
            f"{path} holds another volume ({found}, {volume.voxel_size_nm} nm), wanted {wanted}, "
            f"{voxel_size_nm} nm: "
            "it is not the output of this work; choose another name or --overwrite"
        )
    return _writable(path)


def _writable(path: Path) -> Volume:
    store = open_store({"driver": "zarr3", "kvstore": Place(str(path / "0")).kvstore(), "open": True})

    def write(slices, value):
        store[slices].write(value).result()  # waits until the chunk files are renamed into place

    return Volume(replace(_open(Place(str(path)))._source, write=write), str(path))


# ---- checks before work starts, and resampling -------------------------------------------------------------


def _chunk_boxes(volume: Volume, count: int | None = None) -> Iterator[Box]:
    """Boxes of chunks (z, y, x): the middle one and `count` spread from first to last; all for None."""
    spatial, chunk = volume.shape[-3:], volume.chunk_shape[-3:]
    grid = [-(-side // c) for side, c in zip(spatial, chunk)]
    total = math.prod(grid)
    numbers = (
        range(total)
        if count is None
        else sorted({round(k * (total - 1) / max(1, count - 1)) for k in range(count)})
    )
    middle = [] if count is None else [np.ravel_multi_index([g // 2 for g in grid], grid)]
    for number in dict.fromkeys([*middle, *numbers]) if count is not None else numbers:
        start = tuple(int(i) * c for i, c in zip(np.unravel_index(number, grid), chunk))
        yield Box(start, tuple(a + c for a, c in zip(start, chunk))).intersect(Box.of_shape(spatial))


def _varies(volume: Volume) -> bool:
    """Whether any two voxels differ: the fixed sample; only where that is constant, every chunk."""
    first = None
    for boxes in (list(_chunk_boxes(volume, SAMPLE_CHUNKS)), _chunk_boxes(volume)):
        varies = False
        for box in boxes:
            chunk = volume.read(box)
            first = chunk.flat[0] if first is None else first
            varies = varies or bool((chunk != first).any())
            if varies and not isinstance(boxes, list):
                return True
        if varies:
            return True
    return False


def check_image(volume: Volume) -> None:
    """ValueError unless an image: one channel of uint8, uint16, int8, int16 or float, finite, not constant.

    Reads a fixed sample of chunks, and so finds a damaged or truncated file; later reads are checked too.
    """
    if volume.ndim != 3:
        raise ValueError(f"{volume.name}: {volume.shape[0]} channels, wanted an image (Z, Y, X)")
    if volume.dtype.kind != "f" and volume.dtype.itemsize > 2 or volume.dtype.kind == "b":
        raise ValueError(
            f"{volume.name}: {volume.dtype} voxels look like labels, wanted an image of uint8, "
            f"uint16 or float"
        )
    if not _varies(volume):
        value = volume[0, 0, 0]
        raise ValueError(
            f"{volume.name}: constant, every voxel is {value}: wanted an EM image (is it the "
            f"right file, key or box?)"
        )


def check_labels(labels: Volume) -> Volume:
    """The labels as an unsigned volume (signed types are checked for negative values at every read).

    ValueError for floats, several channels, a negative label in the fixed sample of chunks, or labels that
    are all 0.
    """
    if labels.ndim != 3:
        raise ValueError(f"{labels.name}: {labels.shape[0]} channels, wanted labels (Z, Y, X)")
    if labels.dtype.kind == "f":
        raise ValueError(
            f"{labels.name}: labels of type {labels.dtype}, wanted integers: convert them "
            f"(astype) if they are ids"
        )
    unsigned = np.dtype(f"u{labels.dtype.itemsize}")

    def read(slices):
        out = labels[slices]
        if labels.dtype.kind == "i" and out.min() < 0:
            raise VolumeReadError(
                f"{labels.name}: negative label {out.min()} in box {_text(slices)}, wanted 0 "
                f"(background) and above"
            )
        return out.astype(unsigned)

    source = Source(
        labels.shape,
        unsigned,
        labels.chunk_shape,
        read,
        labels.voxel_size_nm,
        labels.attrs,
        place=labels._source.place,
        origin=labels.origin,
    )
    checked = Volume(source, labels.name)
    if not _varies(checked) and checked[0, 0, 0] == 0:
        raise ValueError(
            f"{labels.name}: all labels are 0, nothing to learn from (is it the right file, key or box?)"
        )
    return checked


def same_voxel_size(a, b) -> bool:
    """Equal within 0.1 % on every axis, or one of them unknown."""
    return a is None or b is None or bool(np.allclose(a, b, rtol=1e-3, atol=0))


def check_pair(
    raw: Volume, labels: Volume, offset_vx: Sequence[int] | None = None, valid: Volume | None = None
) -> Box:
    """The box of `raw` (z, y, x of that view) that has labels: labels[v] belongs to raw[v + offset_vx].

    Without an offset the shapes must be equal. With one, on each axis the labels lie within the raw or reach
    over both of its ends; sticking out at one end only is taken for a wrong offset. valid: a mask of the
    labels' shape. ValueError otherwise, and where both voxel sizes are known and differ.
    """
    if not same_voxel_size(raw.voxel_size_nm, labels.voxel_size_nm):
        raise ValueError(
            f"voxel sizes differ: {raw.name} {raw.voxel_size_nm} nm, {labels.name} "
            f"{labels.voxel_size_nm} nm: resample one of them"
        )
    if valid is not None and valid.shape != labels.shape:
        raise ValueError(
            f"{valid.name}: valid mask of shape {valid.shape}, wanted that of {labels.name}, {labels.shape}"
        )
    raw_box, label_box = Box.of_shape(raw.shape[-3:]), Box.of_shape(labels.shape[-3:])
    if offset_vx is None:
        if raw_box != label_box:
            stated = labels.attrs.get("offset")
            hint = (
                f"; the labels' file states an offset of {stated} (usually nm)" if stated is not None else ""
            )
            raise ValueError(
                f"shapes differ: {raw.name} {raw_box.shape}, {labels.name} {label_box.shape}: "
                f"give the offset of the labels in voxels (z,y,x) of the raw{hint}"
            )
        return raw_box
    placed = label_box.shift(tuple(int(o) for o in offset_vx))
    both = placed.intersect(raw_box)
    nested = all(s in (p, r) for s, p, r in zip(both.shape, placed.shape, raw_box.shape))
    if both.is_empty or not nested:
        raise ValueError(
            f"{labels.name} at offset {tuple(offset_vx)} covers {placed}, outside {raw.name}, "
            f"which covers {raw_box}"
        )
    return both


def resample(volume: Volume, voxel_size_nm: Sequence[float], *, order: int = 1) -> Volume:
    """A lazy view at another voxel size, nm (z, y, x), of the same extent to half a voxel.

    order 1: linear interpolation; where voxels grow by a factor f, averaged over a width of f - 1 old voxels,
    so that nothing aliases (f = 2 is the plain mean of two; linear ramps stay exact for any f); integers are
    rounded. order 0: the nearest voxel, for labels. Voxel centres lie at (i + 1/2) x voxel size.
    """
    assert order in (0, 1), order
    old, new = volume.require_voxel_size(), checked_voxel_size(voxel_size_nm)
    lead, sides = volume.shape[:-3], volume.shape[-3:]
    shape = tuple(max(1, round(side * a / b)) for side, a, b in zip(sides, old, new))
    factors = [b / a for a, b in zip(old, new)]

    def read(slices):
        weights, reads = [], []
        for item, side, factor in zip(slices[-3:], sides, factors):
            centre = np.clip((np.arange(item.start, item.stop) + 0.5) * factor - 0.5, 0, side - 1)
            width = max(0.0, factor - 1) if order else 0.0
            low = max(0, int(np.floor(centre[0] - width / 2)))
            high = min(side, int(np.ceil(centre[-1] + width / 2)) + 1)
            weights.append(_linear_weights(centre[:, None] - np.arange(low, high)[None], width))
            reads.append(slice(low, high))
        out = volume[(*slices[:-3], *reads)]
        for axis, weight in enumerate(weights, start=out.ndim - 3):
            if order:
                out = np.moveaxis(np.tensordot(weight.astype(np.float32), out, (1, axis)), 0, axis)
            else:
                out = out.take(weight.argmax(1), axis)
        return (np.rint(out) if volume.dtype.kind in "ui" and order else out).astype(volume.dtype)

    chunk = tuple(max(1, round(c / f)) for c, f in zip(volume.chunk_shape[-3:], factors))
    source = Source(
        lead + shape,
        volume.dtype,
        volume.chunk_shape[:-3] + chunk,
        read,
        new,
        volume.attrs,
        place=volume._source.place,
        origin=f"{volume.origin} of {old} nm at {new} nm",
    )
    part = "" if volume.box == Box.of_shape(volume._source.shape[-3:]) else f" {volume.box}"
    return Volume(source, f"{volume.name}{part} at {new} nm")


def _linear_weights(distance: np.ndarray, width: float) -> np.ndarray:
    """Weights (new, old) of linear interpolation averaged over `width` old voxels; rows sum to 1."""
    if width < 1e-6:
        weight = np.maximum(0.0, 1 - np.abs(distance))
    else:  # the integral of the hat function, from its two ends
        ends = [np.clip(distance + side, -1, 1) for side in (width / 2, -width / 2)]
        upper, lower = [np.where(t < 0, (t + 1) ** 2 / 2, 1 - (1 - t) ** 2 / 2) for t in ends]
        weight = upper - lower
    return weight / weight.sum(1, keepdims=True)


def _text(slices) -> str:
    return ",".join(f"{s.start}:{s.stop}" for s in slices)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
