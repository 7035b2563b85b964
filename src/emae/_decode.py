"""From affinities to instances: watershed fragments, agglomeration by waterz; and the classical path from raw.

Affinity 1 = same object. Channel k at voxel v belongs to the edge from v to v + offsets[k]; the nearest ones,
(-1,0,0), (0,-1,0), (0,0,-1), are used here, whatever their order.
An edge between two regions costs 1 - the mean affinity over their contact (or a quantile), and regions are
merged while the cost is below the threshold: 0 merges nothing, 1 merges all that any affinity connects.
"""

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
import pydantic

from emae._config import Config

NEAREST = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(1, 50))
FLAT_RATIO = 3.0  # sections thicker than this many in-plane voxels: fragments are made in each section


class Agglomeration(Config):
    """How affinities become instances. Defaults were measured: docs/decisions/decoding.md."""

    kind: Literal["agglomeration"] = "agglomeration"
    threshold: float | None = pydantic.Field(None, gt=0, le=1)
    """Merge while 1 - mean affinity of a contact is below this; None until chosen on held-out labels."""
    fragments: Literal["auto", "sections", "volume", "affinity"] = "auto"
    """Seeded watershed by section or in the volume (auto: by voxel size), or waterz's own from the affinities."""
    contact: Literal["mean", "quantile_25", "quantile_50", "quantile_75"] = "mean"
    """Which statistic of the affinities over a contact is compared with the threshold."""
    foreground: float = pydantic.Field(0.8, ge=0, le=1)
    """Voxels of a mean affinity above this share of its third quartile are inside objects; seeds are the
    maxima of the distance to the others."""
    seed_sigma_vx: float = pydantic.Field(1.0, ge=0)
    seed_spacing_vx: int = pydantic.Field(5, ge=1)
    """Window in which a seed is the highest point of the distance, voxels of the finest axis."""
    cut: float = pydantic.Field(0.05, ge=0, lt=1)
    """Fragments hang together by edges above this only; voxels without such an edge are background (0)."""
    min_size_vx: int = pydantic.Field(0, ge=0)
    small: Literal["merge", "remove"] = "merge"
    """Objects below min_size_vx join the nearest object left, or become background."""


# Neither way to make fragments wins on every slab (docs/decisions/decoding.md): let held-out labels choose
CANDIDATES = (Agglomeration(), Agglomeration(fragments="affinity", min_size_vx=100))


class ClassicalConfig(Config):
    """The classical baseline: boundaries from smoothed raw alone, then the same watershed and agglomeration.

    Sections thicker than FLAT_RATIO in-plane voxels are filtered one by one.
    """

    kind: Literal["classical"] = "classical"
    sigma_nm: float = pydantic.Field(15.0, gt=0)
    """Scale of the filters."""
    ridge: float = pydantic.Field(0.5, ge=0, le=1)
    """Weight of the dark-ridge filter (largest Hessian eigenvalue) against plain darkness."""
    agglomeration: Agglomeration = Agglomeration()


def decode(prediction, config: Agglomeration, offsets=None, voxel_size_nm=None) -> np.ndarray:
    """Instances (Z, Y, X) uint64 from affinities, ids dense from 1, 0 = background.

    prediction: (C, Z, Y, X) affinities, floats in [0, 1] or uint8 of 0..255, an array or a Volume.
    offsets: C x (dz, dy, dx) voxels, else prediction.attrs["offsets"], else NEAREST for 3 channels.
    voxel_size_nm: else the Volume's; needed by fragments="auto". A truth comes back from its own exact
    affinities, where its objects are 6-connected and larger than a voxel.
    Raises ValueError for a missing threshold, nearest offset or voxel size, and for values outside the range.
    """
    if config.threshold is None:
        raise ValueError("this decoder has no threshold: choose one on held-out labels, or set threshold=0.5")
    return next(decode_sweep(prediction, config, [config.threshold], offsets, voxel_size_nm))[1]


def decode_sweep(
    affinities, config: Agglomeration, thresholds: Iterable[float], offsets=None, voxel_size_nm=None
) -> Iterator[tuple[float, np.ndarray]]:
    """(threshold, instances) by increasing threshold; fragments and contacts are computed once."""
    affinities, voxel_size_nm = nearest_affinities(affinities, offsets, voxel_size_nm)
    pieces = fragments(affinities, config, voxel_size_nm)
    for threshold, labels in _agglomerate(affinities, pieces, config.contact, thresholds):
        yield threshold, _tidy(labels, config, voxel_size_nm)


def choose_threshold(
    true,
    affinities,
    config: Agglomeration,
    score: Callable,
    thresholds: Iterable[float] = THRESHOLDS,
    *,
    valid=None,
    offsets=None,
    voxel_size_nm=None,
) -> tuple[Agglomeration, list[dict]]:
    """The config with the threshold of the lowest sqrt(adapted Rand error x VOI), and the scores of all.

    score: called as score(true=, predicted=, valid=, voxel_size_nm=), e.g. emae.score; returns .adapted_rand_error
    .voi_split .voi_merge. Of a plateau (within 1 % of the best, around it) the middle is taken.
    """
    affinities, voxel_size_nm = nearest_affinities(affinities, offsets, voxel_size_nm)
    table = []
    for threshold, labels in decode_sweep(affinities, config, thresholds, voxel_size_nm=voxel_size_nm):
        s = score(true=true, predicted=labels, valid=valid, voxel_size_nm=voxel_size_nm)
        row = {k: getattr(s, k) for k in ("adapted_rand_error", "precision", "recall", "voi_split", "voi_merge")}
        criterion = float(np.sqrt(s.adapted_rand_error * (s.voi_split + s.voi_merge)))
        table.append({"threshold": threshold, "criterion": criterion, "objects": int(labels.max()), **row})
    chosen = middle_of_plateau([row["criterion"] for row in table])
    return config.model_copy(update={"threshold": table[chosen]["threshold"]}), table


def choose_decoder(
    true, affinities, configs: Iterable[Agglomeration], score: Callable,
    thresholds: Iterable[float] = THRESHOLDS, *, valid=None, offsets=None, voxel_size_nm=None,
) -> tuple[Agglomeration, list[dict]]:  # fmt: skip
    """choose_threshold for each of `configs`: the best with its threshold, and all rows with their "config"."""
    affinities, voxel_size_nm = nearest_affinities(affinities, offsets, voxel_size_nm)
    thresholds, table, best = list(thresholds), [], None
    for config in configs:
        config, rows = choose_threshold(
            true, affinities, config, score, thresholds, valid=valid, voxel_size_nm=voxel_size_nm
        )
        table += [{"config": config.model_copy(update={"threshold": None}).model_dump(), **row} for row in rows]
        criterion = next(row["criterion"] for row in rows if row["threshold"] == config.threshold)
        if best is None or criterion < best[0]:
            best = criterion, config
    if best is None:
        raise ValueError("no configs to choose from")
    return best[1], table


def middle_of_plateau(values) -> int:
    """Index in the middle of the run of values within 1 % of the lowest, around the (first) lowest."""
    values = np.asarray(values, float)
    best = int(values.argmin())
    good = values <= values[best] * 1.01 + 1e-6
    low = best - int(np.argmin(np.r_[good[best::-1], False])) + 1
    high = best + int(np.argmin(np.r_[good[best:], False])) - 1
    return (low + high) // 2


def segment_raw(raw, config: ClassicalConfig, voxel_size_nm=None) -> np.ndarray:
    """The classical baseline: instances (Z, Y, X) uint64 from raw (bright cytoplasm, dark membranes)."""
    affinities, voxel_size_nm = raw_affinities(raw, config, voxel_size_nm)
    return decode(affinities, config.agglomeration, NEAREST, voxel_size_nm)


def raw_affinities(raw, config: ClassicalConfig, voxel_size_nm=None):
    """Pseudo-affinities (3, Z, Y, X) of smoothed raw, and the voxel size.

    Boundary in [0, 1] = darkness and dark ridge (largest eigenvalue of the Hessian), both between their 1st and
    99th percentile (of the section, where filters are by section); an edge has the affinity 1 - its darker end.
    """
    voxel_size_nm = getattr(raw, "voxel_size_nm", None) if voxel_size_nm is None else voxel_size_nm
    if voxel_size_nm is None:
        raise ValueError(f"{getattr(raw, 'name', 'raw')}: give voxel_size_nm=(z, y, x); the filters are in nanometres")
    raw = np.asarray(raw)
    sigma = [config.sigma_nm / size for size in voxel_size_nm]
    if _flat(voxel_size_nm):
        boundary = np.stack([_boundary(section, sigma[1:], config.ridge) for section in raw])
    else:
        boundary = _boundary(raw, sigma, config.ridge)
    affinities = np.zeros((3, *raw.shape), np.float32)
    for axis, channel in enumerate(affinities):
        upper, lower = _ends(axis, 3)
        channel[upper] = 1 - np.maximum(boundary[upper], boundary[lower])
    return affinities, voxel_size_nm


def choose_classical(
    true, raw, configs: Iterable[ClassicalConfig], score: Callable,
    thresholds: Iterable[float] = THRESHOLDS[1::2], *, valid=None, voxel_size_nm=None,
) -> tuple[ClassicalConfig, list[dict]]:  # fmt: skip
    """The best of `configs` on held-out labels with its best threshold, and one row of scores per config."""
    thresholds, table, chosen = list(thresholds), [], []
    for config in configs:
        affinities, size = raw_affinities(raw, config, voxel_size_nm)
        agglomeration, rows = choose_threshold(
            true, affinities, config.agglomeration, score, thresholds, valid=valid, voxel_size_nm=size
        )
        chosen.append(config.model_copy(update={"agglomeration": agglomeration}))
        row = next(row for row in rows if row["threshold"] == agglomeration.threshold)
        table.append({"config": chosen[-1].model_dump(), **row})
    return chosen[int(np.argmin([row["criterion"] for row in table]))], table


def classical_grid(voxel_size_nm) -> list[ClassicalConfig]:
    """The 24 configurations for choose_classical on real data; a wider range of scales was tried first."""
    scales = (3, 5, 7) if _flat(voxel_size_nm) else (1, 1.5, 2)
    return [
        ClassicalConfig(
            sigma_nm=scale * min(voxel_size_nm),
            ridge=ridge,
            agglomeration=Agglomeration(foreground=foreground, contact=contact),
        )
        for scale in scales
        for ridge in (0.5, 1.0)
        for foreground in (0.6, 0.8)
        for contact in ("mean", "quantile_50")
    ]


def _flat(voxel_size_nm):
    return voxel_size_nm[0] > FLAT_RATIO * max(voxel_size_nm[1:])


def _boundary(raw, sigma, ridge):
    """Darkness and dark ridges of an image of any number of axes, float32 in [0, 1]."""
    from scipy.ndimage import gaussian_filter

    raw = raw.astype(np.float32)
    n = raw.ndim
    dark = -gaussian_filter(raw, sigma)
    hessian = np.empty((*raw.shape, n, n), np.float32)
    for i in range(n):
        for j in range(i, n):
            order = np.eye(n, dtype=int)[i] + np.eye(n, dtype=int)[j]
            hessian[..., i, j] = hessian[..., j, i] = gaussian_filter(raw, sigma, order=order) * sigma[i] * sigma[j]
    ridges = np.empty_like(raw)
    for index in range(len(raw)):
        ridges[index] = np.linalg.eigvalsh(hessian[index])[..., -1]
    np.maximum(ridges, 0, out=ridges)
    return ridge * _stretch(ridges) + (1 - ridge) * _stretch(dark)


def _stretch(image):
    low, high = np.percentile(image, (1, 99))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def nearest_affinities(prediction, offsets=None, voxel_size_nm=None):
    """The three nearest channels in waterz's order, contiguous float32 in [0, 1], and the voxel size or None."""
    attrs = getattr(prediction, "attrs", {})
    offsets = attrs.get("offsets") if offsets is None else offsets
    voxel_size_nm = getattr(prediction, "voxel_size_nm", None) if voxel_size_nm is None else voxel_size_nm
    name = getattr(prediction, "name", "affinities")
    if len(prediction.shape) != 4:
        raise ValueError(f"{name}: want affinities (C, Z, Y, X), got shape {tuple(prediction.shape)}")
    if offsets is None:
        if prediction.shape[0] != 3:
            raise ValueError(f"{name}: {prediction.shape[0]} channels and no offsets: give offsets=((-1,0,0), ...)")
        offsets = NEAREST
    offsets = [tuple(int(o) for o in offset) for offset in offsets]
    if len(offsets) != prediction.shape[0]:
        raise ValueError(f"{name}: {prediction.shape[0]} channels but {len(offsets)} offsets {offsets}")
    missing = [offset for offset in NEAREST if offset not in offsets]
    if missing:
        raise ValueError(f"{name}: no channel has the offset {missing[0]}, only {offsets}; agglomeration needs it")
    affinities = np.empty((3, *prediction.shape[1:]), np.float32)
    for channel, offset in zip(affinities, NEAREST, strict=True):
        channel[:] = np.asarray(prediction[offsets.index(offset)])
    if prediction.dtype == np.uint8:
        affinities /= 255
    elif not np.issubdtype(prediction.dtype, np.floating):
        raise ValueError(f"{name}: affinities must be floats in [0, 1] or uint8, got {prediction.dtype}")
    if not (affinities.min() >= 0 and affinities.max() <= 1):  # also refuses NaN
        raise ValueError(f"{name}: affinities must lie in [0, 1], got {affinities.min():g} to {affinities.max():g}")
    return affinities, voxel_size_nm


def fragments(affinities, config: Agglomeration, voxel_size_nm=None) -> np.ndarray:
    """Small pieces of objects, (Z, Y, X) uint64, 0 = background; affinities as from nearest_affinities."""
    kind = config.fragments
    if kind == "auto":
        if voxel_size_nm is None:
            raise ValueError(
                "fragments='auto' needs the voxel size: give voxel_size_nm=(z, y, x), or choose "
                "fragments='sections' (thick sections) or 'volume' (isotropic)"
            )
        kind = "sections" if _flat(voxel_size_nm) else "volume"
    if kind == "affinity":
        return _edge_watershed(affinities, config.cut, 0.9999)
    if kind == "sections":
        pieces = np.empty(affinities.shape[1:], np.uint64)
        last = 0
        for z in range(len(pieces)):
            pieces[z] = _seeded_watershed(affinities[1:, z], config, (1.0, 1.0))
            pieces[z] += np.uint64(last)
            last = int(pieces[z].max())
    else:
        size = np.ones(3) if voxel_size_nm is None else np.asarray(voxel_size_nm, float)
        pieces = _seeded_watershed(affinities, config, tuple(size / size.min()))
    return _cut(affinities, pieces, config.cut)


def _seeded_watershed(affinities, config, voxel_size):
    """Watershed of 1 - mean affinity from the maxima of the distance to boundaries; any number of axes."""
    from edt import edt
    from scipy import ndimage
    from skimage.segmentation import watershed

    inside = _inside(affinities)
    axes = tuple(range(inside.ndim))
    distance = edt(
        np.ascontiguousarray(inside > config.foreground * np.percentile(inside, 75)), anisotropy=voxel_size, parallel=1
    )
    np.minimum(distance, max(inside.shape), out=distance)  # nothing outside: edt says infinity
    if config.seed_sigma_vx:
        distance = ndimage.gaussian_filter(distance, [config.seed_sigma_vx / s for s in voxel_size])
    window = [max(1, round(config.seed_spacing_vx / s)) for s in voxel_size]
    maxima = (ndimage.maximum_filter(distance, size=window) == distance) & (distance > 0)
    seeds, _ = ndimage.label(maxima, np.ones((3,) * len(axes)))
    if not seeds.any():
        return np.ones(inside.shape, np.uint64)
    return watershed(1 - inside, seeds).astype(np.uint64)


def _inside(affinities):
    """Mean affinity of every voxel over its edges, both ways along each axis."""
    total, edges = np.zeros((2, *affinities.shape[1:]), np.float32)
    for axis, channel in enumerate(affinities):
        for side in _ends(axis, channel.ndim):
            total[side] += channel[_ends(axis, channel.ndim)[0]]
            edges[side] += 1
    return total / np.maximum(edges, 1)


def _ends(axis, ndim):
    """Slices of the upper and lower voxels of the edges along an axis; affinities are stored at the upper."""
    upper, lower = ([slice(None)] * ndim for _ in range(2))
    upper[axis], lower[axis] = slice(1, None), slice(None, -1)
    return tuple(upper), tuple(lower)


def _cut(affinities, pieces, cut):
    """Pieces split where they hang together by no edge above `cut`; voxels without such an edge become 0."""
    inner = np.zeros_like(affinities)
    alone = np.ones(pieces.shape, bool)
    for axis, channel in enumerate(affinities):
        upper, lower = _ends(axis, 3)
        edge = channel[upper] > cut
        alone[upper] &= ~edge
        alone[lower] &= ~edge
        inner[axis][upper] = edge & (pieces[upper] == pieces[lower])
    joined = _edge_watershed(inner, 0.5, 0.6)
    # a voxel that only the watershed line cut off still belongs to an object: its own piece
    lone = (joined == 0) & ~alone
    joined[lone] = joined.max() + np.arange(1, np.count_nonzero(lone) + 1, dtype=np.uint64)
    return joined


def _edge_watershed(affinities, low, high):
    """waterz's watershed of the edges: no edge <= low is crossed, edges >= high always are."""
    import waterz

    with _quiet():
        return next(waterz.agglomerate(affinities, [0.0], aff_threshold_low=low, aff_threshold_high=high))


def _agglomerate(affinities, pieces, contact, thresholds):
    """(threshold, new labels) by increasing threshold. waterz writes into the fragments it is given."""
    import waterz

    statistic = "MeanAffinity<RegionGraphType, ScoreValue>"
    if contact != "mean":
        quantile = contact.removeprefix("quantile_")
        statistic = f"HistogramQuantileAffinity<RegionGraphType, {quantile}, ScoreValue, 256, false>"
    thresholds = sorted({float(threshold) for threshold in thresholds})
    own = pieces.copy()
    sweep = waterz.agglomerate(
        affinities, thresholds, fragments=own, scoring_function=f"OneMinus<{statistic}>", discretize_queue=256
    )
    for threshold in thresholds:
        with _quiet():
            next(sweep)
        yield threshold, own.copy()


def _tidy(labels, config, voxel_size_nm):
    """Small objects merged or removed, ids dense from 1 (uint64)."""
    import fastremap

    labels, _ = fastremap.renumber(labels, in_place=True)
    if config.min_size_vx > 1:
        sizes = np.bincount(labels.ravel())
        keep = sizes >= config.min_size_vx
        keep[0] = True
        if keep[1:].any() and not keep.all():
            small = ~keep[labels]
            labels[small] = 0
            if config.small == "merge":
                labels = _fill(labels, small, voxel_size_nm)
            labels, _ = fastremap.renumber(labels)
    return labels.astype(np.uint64)


def _fill(labels, where, voxel_size_nm):
    """Labels at `where` (among the zeros) set to the nearest object."""
    from scipy.spatial import cKDTree

    empty = labels == 0
    surface = np.zeros_like(empty)  # the object voxel nearest to an empty one touches an empty one with a face
    for axis in range(3):
        upper, lower = _ends(axis, 3)
        surface[upper] |= empty[lower]
        surface[lower] |= empty[upper]
    at = np.argwhere(surface & ~empty)
    scale = np.ones(3) if voxel_size_nm is None else np.asarray(voxel_size_nm, float)
    _, index = cKDTree(at * scale, balanced_tree=False).query(np.argwhere(where) * scale)
    labels[where] = labels[tuple(at[index].T)]
    return labels


@contextlib.contextmanager
def _quiet():
    """Nothing on standard output: waterz reports there, from C++ too, and `--json` must stay JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
