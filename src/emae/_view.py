"""Pictures: sections of volumes with labels over them, rows of panels, PNG bytes. numpy and PIL."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emae._datasets import DATASETS, Description, describe, looks_like_labels, open_labels, open_volume
from emae._geometry import Box
from emae._volume import Volume

LONGEST_VX = 1024  # of a volume's sides, the middle this many voxels are shown


def label_colours(labels: np.ndarray) -> np.ndarray:
    """(..., 3) uint8: a colour of its own for each id, the same in every picture and run; 0 is black.

    The hue is a hash of the id (the finaliser of splitmix64), so neighbouring ids look unlike each other.
    """
    ids, inverse = np.unique(np.asarray(labels), return_inverse=True)
    bits = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    hue, saturation, value = (((bits >> np.uint64(s)) & np.uint64(0xFFFF)) / 65536 for s in (0, 16, 32))
    saturation, value = 0.55 + 0.45 * saturation, 0.75 + 0.25 * value
    # HSV to RGB: https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    colours = value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))
    colours[ids == 0] = 0
    return np.rint(255 * colours).astype(np.uint8)[inverse].reshape(*np.shape(labels), 3)


def grey(image: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Any image as uint8: uint8 as it is, else stretched between `limits` (default its 0.5 and 99.5 percentiles)."""
    image = np.asarray(image)
    if image.dtype == np.uint8 and limits is None:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * np.uint8(255)
    low, high = np.percentile(image, [0.5, 99.5]) if limits is None else limits
    return np.clip(255 * (image - float(low)) / max(float(high) - float(low), 1e-12), 0, 255).astype(np.uint8)


def overlay(image: np.ndarray, labels: np.ndarray, alpha: float = 0.4) -> np.ndarray:
    """(Y, X, 3) uint8: labels in colour over a grey image (Y, X), dark where two of them meet; label 0 stays clear."""
    image, labels = grey(image), np.asarray(labels)
    if image.shape != labels.shape or image.ndim != 2:
        raise ValueError(f"image of shape {image.shape} and labels of shape {labels.shape}, wanted two equal (Y, X)")
    base = np.repeat(image[..., None], 3, axis=-1).astype(np.float32)
    out = np.where(labels[..., None] > 0, (1 - alpha) * base + alpha * label_colours(labels), base)
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    out[edge] *= 0.45
    return np.rint(out).astype(np.uint8)


def png_bytes(array: np.ndarray) -> bytes:
    """A PNG of (Y, X) or (Y, X, 3); what is not uint8 is stretched."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey(array))).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_png(array: np.ndarray, out: str | Path, *, overwrite: bool = True) -> Path:
    """`png_bytes` in a file; FileExistsError where there is one and overwrite is False."""
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another name, or replace it with --overwrite")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: its folder {out.parent} does not exist")
    out.write_bytes(png_bytes(array))
    return out


def enlarge(image: np.ndarray, scale_y: float, scale_x: float) -> np.ndarray:
    """An image (Y, X[, 3]) at another size by its nearest pixels: no colour or value that was not there."""
    rows, columns = (
        np.minimum(((np.arange(max(1, round(n * s))) + 0.5) / s).astype(int), n - 1)
        for n, s in zip(image.shape[:2], (scale_y, scale_x))
    )
    return image[np.ix_(rows, columns)]


def panel(
    images: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]],
    titles: Sequence[str] | Sequence[Sequence[str]] = (),
    out: str | Path | None = None,
    *,
    height: int | None = None,
    gap: int = 8,
) -> np.ndarray:
    """Images side by side under their titles, on white: one row, or a list of rows.

    height: pixels of every image (enlarged or reduced by nearest pixels); None leaves them. Returns (Y, X, 3) uint8 and
    writes it to `out` where given.
    """
    if not len(images):
        raise ValueError("no images, wanted at least one")
    rows = list(images) if isinstance(images[0], (list, tuple)) else [images]
    names = [] if not len(titles) else [titles] if isinstance(titles[0], str) else list(titles)
    made = [_row(row, names[k] if k < len(names) else (), height, gap) for k, row in enumerate(rows)]
    width = max(row.shape[1] for row in made)
    sheet = np.vstack([np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in made])
    if out is not None:
        write_png(sheet, out)
    return sheet


def _row(images, titles, height, gap) -> np.ndarray:
    tiles = []
    for image in images:
        tile = grey(image)
        tile = np.repeat(tile[..., None], 3, axis=-1) if tile.ndim == 2 else tile
        tiles.append(enlarge(tile, *[height / tile.shape[0]] * 2) if height else tile)
    head = 22 if any(titles) else 0
    sheet = np.full(
        (head + max(t.shape[0] for t in tiles) + gap, sum(t.shape[1] + gap for t in tiles), 3), 255, np.uint8
    )
    x = 0
    for k, tile in enumerate(tiles):
        if k < len(titles) and titles[k]:
            _write(sheet, titles[k], (x + 2, 3), (20, 20, 20), room=tile.shape[1] + gap)
        sheet[head : head + tile.shape[0], x : x + tile.shape[1]] = tile
        x += tile.shape[1] + gap
    return sheet


def _write(sheet: np.ndarray, text: str, at: tuple[int, int], colour, room: int, size: int = 14) -> None:
    """Text into an image, in place; smaller, then shorter, where the room is short."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    while font.getlength(text) > room - 4 and size > 9:
        size -= 1
        font = ImageFont.load_default(size)
    while len(text) > 1 and font.getlength(text) > room - 4:
        text = text[:-1]
    picture = Image.fromarray(sheet)
    ImageDraw.Draw(picture).text(at, text, fill=tuple(colour), font=font)
    sheet[:] = np.asarray(picture)


def section_views(
    raw,
    labels=None,
    out: str | Path | None = None,
    *,
    voxel_size_nm: Sequence[float] | None = None,
    at: Sequence[int] | None = None,
    longest_px: int = 560,
) -> np.ndarray:
    """Three orthogonal sections (xy, xz, yz) in true proportions, and the labels over them (labels alone: over grey).

    raw: Volume or array (Z, Y, X). labels: of the same shape, or None. Of a Volume only these sections are read, of a
    large one only the middle 1024 voxels. voxel_size_nm: of an array (default: cubes). at: the voxel (z, y, x) where
    they meet (default: the middle, or the nearest section that is not blank). Returns (Y, X, 3) uint8, writes `out`.
    """
    raw = raw if isinstance(raw, Volume) else Volume.from_array(raw)
    if raw.ndim != 3:
        raise ValueError(f"{raw.name}: shape {raw.shape}, wanted (Z, Y, X)")
    if labels is not None and tuple(labels.shape) != tuple(raw.shape):
        raise ValueError(f"labels of shape {tuple(labels.shape)} over an image of shape {raw.shape}, wanted the same")
    alone = labels is None and looks_like_labels(raw)
    labels = raw if alone else labels
    size = voxel_size_nm or raw.voxel_size_nm or (1.0, 1.0, 1.0)
    box = _shown(raw.shape, at)
    at = _meeting_point(raw, box) if at is None else tuple(int(a) for a in at)
    if not box.contains(Box(at, tuple(a + 1 for a in at))):
        raise ValueError(f"{raw.name}: no voxel {at}, its shape is {raw.shape}")
    lengths_nm = [n * s for n, s in zip(box.shape, size)]
    per_nm = longest_px / max(lengths_nm[1:])
    if lengths_nm[0] * per_nm > 2 * longest_px:  # a tall stack
        per_nm = 2 * longest_px / lengths_nm[0]
    rows, titles = [[]], [[]]
    if labels is not None:
        rows, titles = [[], []], [[], []]
    limits = None
    for axis, name in enumerate(("xy", "xz", "yz")):
        cut = list(box.slices)
        cut[axis] = slice(at[axis], at[axis] + 1)
        image = np.asarray(raw[tuple(cut)]).squeeze(axis)
        if alone:
            image = np.full(image.shape, 128, np.uint8)
        if image.dtype != np.uint8 and limits is None:
            limits = tuple(np.percentile(image, [0.5, 99.5]))
        image = grey(image, limits)
        other = [k for k in range(3) if k != axis]
        scale = [max(size[k] * per_nm, 1e-9) for k in other]
        rows[0].append(
            _with_bar(enlarge(image, *scale), per_nm) if axis == 0 and raw.voxel_size_nm else enlarge(image, *scale)
        )
        titles[0].append(f"{name}, {'zyx'[axis]} = {at[axis]}")
        if labels is not None:
            ids = np.asarray(labels[tuple(cut)]).squeeze(axis)
            rows[1].append(overlay(enlarge(image, *scale), enlarge(ids, *scale)))
            titles[1].append(f"labels {name}")
    if alone:
        rows, titles = rows[1:], titles[1:]
    if lengths_nm[0] < 0.7 * lengths_nm[1]:  # a flat stack: its narrow views lie below each other
        rows, titles = list(zip(*rows)), list(zip(*titles))
    return panel(rows, titles, out)


def _shown(shape, at) -> Box:
    """The part of a volume that is shown: the middle, or what lies round `at`."""
    sides = [min(n, LONGEST_VX) for n in shape]
    centre = [n // 2 for n in shape] if at is None else at
    start = tuple(int(np.clip(c - s // 2, 0, n - s)) for c, s, n in zip(centre, sides, shape))
    return Box(start, tuple(a + s for a, s in zip(start, sides)))


def _meeting_point(raw: Volume, box: Box) -> tuple[int, int, int]:
    """The middle of the box, in the section nearest to it that is not blank (of the nearest 9)."""
    z, y, x = ((a + b) // 2 for a, b in zip(box.start, box.stop))
    for near in sorted(range(max(box.start[0], z - 4), min(box.stop[0], z + 5)), key=lambda k: abs(k - z)):
        section = np.asarray(raw[(slice(near, near + 1), *box.slices[1:])])
        if section.min() < section.max():
            return near, y, x
    return z, y, x


def _with_bar(image: np.ndarray, px_per_nm: float) -> np.ndarray:
    """A scale bar of a round length, about a fifth of the image, in its lower left corner."""
    wanted_nm = 0.2 * image.shape[1] / px_per_nm
    power = 10 ** np.floor(np.log10(wanted_nm))
    length_nm = power * max(f for f in (1, 2, 5) if f * power <= wanted_nm)
    length = max(1, round(length_nm * px_per_nm))
    out = np.repeat(image[..., None], 3, axis=-1)
    height = out.shape[0]
    if height < 60 or length > out.shape[1] - 20:
        return out
    out[height - 34 : height - 6, 6 : max(length, 52) + 18] = (
        out[height - 34 : height - 6, 6 : max(length, 52) + 18] // 3
    )
    out[height - 14 : height - 10, 12 : 12 + length] = 255
    text = f"{length_nm:g} nm" if length_nm < 1000 else f"{length_nm / 1000:g} um"
    _write(out, text, (11, height - 33), (255, 255, 255), room=max(length, 52) + 8, size=13)
    return out


def show(
    name_or_address,
    out: str | Path | None = None,
    labels=None,
    *,
    voxel_size_nm: Sequence[float] | None = None,
    box: str | Box | None = None,
    overwrite: bool = False,
) -> Description:
    """`emae data show`: the description of a data set or any volume (print it), and a PNG of its sections in `out`.

    labels: a key of the data set's labels (default: its first), or the address of labels for any other volume.
    """
    if out is not None and Path(out).exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another name, or replace it with --overwrite")
    where = {"voxel_size_nm": voxel_size_nm, "box": box}
    raw, over = open_volume(name_or_address, **where), None
    record = DATASETS.get(str(name_or_address).partition("/")[0])
    if record is not None and (record.labels or labels):
        over = open_labels(name_or_address, labels, **where)
    elif record is None and labels is not None:
        over = open_volume(labels, **where)
    described = describe(name_or_address, labels if record is None else None, **where)
    if out is not None:
        section_views(raw, over, out)
    return described
