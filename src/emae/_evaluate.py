"""Scores of a segmentation against its truth: adapted Rand error and variation of information.

Everything is counted from one sparse table of (true id, predicted id, voxels).
Arguments are always named `true` and `predicted`; 0 is "no label" in both.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from emae._config import Config

Unpredicted = Literal["nearest", "singletons", "one_segment", "drop"]
SLAB_VOXELS = 2**23  # voxels counted at a time: about 250 MB of scratch at the worst (every voxel its own run)


@dataclass(frozen=True)
class Contingency:
    """How many voxels carry each (true, predicted) pair of ids; pairs are unique and sorted.

    true, predicted: (K,) uint64 ids. count: (K,) int64 voxels, all > 0. Voxels of true id 0 are not counted.
    Tables of disjoint blocks add up: `a + b`.
    """

    true: np.ndarray
    predicted: np.ndarray
    count: np.ndarray

    def __add__(self, other: "Contingency") -> "Contingency":
        return _table(*(np.concatenate([getattr(self, k), getattr(other, k)]) for k in ("true", "predicted", "count")))

    @property
    def voxels(self) -> int:
        return int(self.count.sum())


class Scores(Config):
    """Scores of one segmentation. `print` shows the numbers and the protocol they were counted by.

    adapted_rand_error: 1 - 2 * pairs together in both / (pairs together in true + pairs together in predicted).
    precision: pairs together in both / pairs together in predicted (low = false merges).
    recall: pairs together in both / pairs together in true (low = false splits).
    voi_split = H(predicted | true), voi_merge = H(true | predicted), bits.
    """

    adapted_rand_error: float
    precision: float
    recall: float
    voi_split: float
    voi_merge: float
    true_objects: int
    predicted_objects: int
    voxels: int
    protocol: str

    @property
    def voi(self) -> float:
        return self.voi_split + self.voi_merge

    def __str__(self) -> str:
        return (
            f"adapted Rand error {self.adapted_rand_error:.4f} (precision {self.precision:.4f}, "
            f"recall {self.recall:.4f})\n"
            f"VOI {self.voi:.4f} bits (split {self.voi_split:.4f}, merge {self.voi_merge:.4f})\n"
            f"{self.true_objects} true and {self.predicted_objects} predicted objects over {self.voxels} voxels\n"
            f"protocol: {self.protocol}"
        )


def contingency(true, predicted, valid=None) -> Contingency:
    """Count the (true, predicted) pairs of two label arrays, slab by slab along the first axis.

    true, predicted: integer labels of one shape, arrays or lazy arrays (a Volume); valid: bool, the same shape.
    Voxels whose true id is 0, or which are not valid, are not counted. Memory is bounded by a slab.
    Raises ValueError for float or negative labels and for shapes that differ.
    """
    true, predicted, valid = _check(true, predicted, valid)
    table = Contingency(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))
    depth = max(1, SLAB_VOXELS // max(1, math.prod(true.shape[1:])))
    for z in range(0, true.shape[0], depth):
        slab = slice(z, z + depth)
        t = np.asarray(true[slab]).ravel()
        p = np.asarray(predicted[slab]).ravel()
        for name, labels in (("true", t), ("predicted", p)):
            _check_not_negative(labels, name)
        if valid is not None:
            t = np.where(np.asarray(valid[slab]).ravel(), t, 0)
        table = table + _table(*_runs(t, p))
    return table


def score(
    *,
    true,
    predicted,
    valid=None,
    unpredicted: Unpredicted = "nearest",
    relabel_true=True,
    voxel_size_nm=None,
) -> Scores:
    """Score a segmentation by the protocol of a cropped region.

    true, predicted: (Z, Y, X) (or fewer axes) integer labels, arrays or Volumes; 0 in true = not scored.
    valid: bool mask of the voxels to score. relabel_true: truth is first cut into its 26-connected components inside
    the box (ids that join outside it are no errors). unpredicted: what a predicted 0 means: "nearest" segment
    (distances in nm by voxel_size_nm, else that of the volumes, else in voxels), "singletons" (each voxel a segment),
    "one_segment", or "drop" (not scored). Pairs are counted without self-pairs.
    Raises ValueError for float or negative labels, shapes that differ, a truth of zeros, or a prediction of zeros
    where "nearest" needs a segment.
    """
    if unpredicted not in get_args(Unpredicted):
        raise ValueError(f"unpredicted={unpredicted!r} is not known; choose one of {', '.join(get_args(Unpredicted))}")
    if voxel_size_nm is None:
        voxel_size_nm = getattr(true, "voxel_size_nm", None) or getattr(predicted, "voxel_size_nm", None)
    true, predicted, valid = _check(true, predicted, valid)
    said = ["true 0 ignored" if valid is None else "true 0 and invalid voxels ignored"]
    if relabel_true:
        import cc3d

        true = _whole(true, "true")
        if valid is not None:
            true, valid = np.where(np.asarray(valid), true, 0), None
        true = cc3d.connected_components(_three_axes(true), connectivity=26).reshape(true.shape)
        said.insert(0, "truth relabelled by 26-connected components in the box")
    else:
        said.insert(0, "truth ids as given")
    if unpredicted == "nearest":
        predicted, unit = _nearest(true, _whole(predicted, "predicted"), valid, voxel_size_nm)
        said.append(f"predicted 0 -> nearest segment ({unit})")
    else:
        said.append({"singletons": "each predicted 0 its own segment", "one_segment": "predicted 0 one segment",
                     "drop": "predicted 0 dropped"}[unpredicted])  # fmt: skip
    said += ["pairs without self-pairs", "VOI in bits"]
    return scores_of(contingency(true, predicted, valid), unpredicted, "; ".join(said))


def scores_of(table: Contingency, unpredicted: Unpredicted = "one_segment", protocol: str = "") -> Scores:
    """Scores from a (merged) table. Predicted id 0 is a segment, dropped, or a segment per voxel, by `unpredicted`."""
    if unpredicted == "drop":
        keep = table.predicted != 0
        table = Contingency(table.true[keep], table.predicted[keep], table.count[keep])
    if not len(table.count):
        raise ValueError("nothing to score: no voxel has a true label (and is valid and predicted, where asked for)")
    single = (table.predicted == 0) & (unpredicted == "singletons")
    singles = int(table.count[single].sum())
    n = table.voxels
    a = _sums(table.true, table.count)
    ij = table.count[~single]
    b = _sums(table.predicted[~single], ij)

    together, in_true, in_predicted = _pairs(ij, n), _pairs(a, n), _pairs(b, n)
    both = in_true + in_predicted
    # H(p|t) = (sum a log a - sum ij log ij) / n; a voxel that is its own segment has ij = b = 1 and adds nothing
    log_ij, log_a, log_b = _entropy_sum(ij), _entropy_sum(a), _entropy_sum(b)
    return Scores(
        adapted_rand_error=1 - 2 * together / both if both else 0.0,
        precision=together / in_predicted if in_predicted else 1.0,
        recall=together / in_true if in_true else 1.0,
        voi_split=max(0.0, (log_a - log_ij) / n),
        voi_merge=max(0.0, (log_b - log_ij) / n),
        true_objects=len(a),
        predicted_objects=len(b) + singles,
        voxels=n,
        protocol=protocol or f"ids as given; true 0 ignored; predicted 0: {unpredicted}; pairs without self-pairs",
    )


def _check(true, predicted, valid):
    """The arrays with shape and dtype looked at (values are looked at as they are read)."""
    arrays = []
    for name, labels in (("true", true), ("predicted", predicted)):
        labels = labels if hasattr(labels, "shape") and hasattr(labels, "dtype") else np.asarray(labels)
        if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != bool:
            raise ValueError(
                f"{_name(labels, name)} has {labels.dtype} values; labels must be integers: convert them to uint32 or "
                "uint64 (and decode a prediction first)"
            )
        arrays.append(labels)
    if tuple(arrays[0].shape) != tuple(arrays[1].shape):
        raise ValueError(
            f"true and predicted must have one shape, got {_name(arrays[0], 'true')} {tuple(arrays[0].shape)} and "
            f"{_name(arrays[1], 'predicted')} {tuple(arrays[1].shape)}: crop both to the same box"
        )
    if valid is not None:
        valid = valid if hasattr(valid, "shape") else np.asarray(valid)
        if tuple(valid.shape) != tuple(arrays[0].shape):
            raise ValueError(
                f"valid must have the shape of the labels, {tuple(arrays[0].shape)}, got {tuple(valid.shape)}"
            )
    return *arrays, valid


def _name(labels, role):
    name = getattr(labels, "name", None)
    return f"{role} ({name})" if name else role


def _check_not_negative(labels, name):
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise ValueError(f"{name} has negative labels (lowest {labels.min()}); use 0 for background and ids from 1")


def _whole(labels, name):
    array = np.asarray(labels)
    _check_not_negative(array, _name(labels, name))
    return array


def _three_axes(array):
    return array.reshape((1,) * (3 - array.ndim) + array.shape)


def _runs(true, predicted):
    """Runs of equal (true, predicted) in two flat arrays: ids and lengths, without those of true 0.

    Neighbours along x are mostly alike: counting runs instead of voxels is where the speed comes from.
    """
    change = np.empty(len(true), bool)
    change[:1] = True
    np.not_equal(true[1:], true[:-1], out=change[1:])
    change[1:] |= predicted[1:] != predicted[:-1]
    start = np.flatnonzero(change)
    length = np.diff(start, append=len(true))
    true = true[start]
    keep = true != 0
    return true[keep].astype(np.uint64), predicted[start[keep]].astype(np.uint64), length[keep]


def _table(true, predicted, count) -> Contingency:
    """Unique sorted pairs of the rows given."""
    if not len(count):
        return Contingency(true, predicted, count)
    import fastremap

    ids_t, ids_p = fastremap.unique(true), fastremap.unique(predicted)
    t = _dense(true, ids_t)
    key = t * len(ids_p) + _dense(predicted, ids_p)
    cells = len(ids_t) * len(ids_p)
    if cells <= 4 * len(key) + 2**16:  # small enough to count straight into the full table
        full = np.bincount(key, weights=count, minlength=cells).astype(np.int64)  # exact below 2**53 voxels
        key = np.flatnonzero(full)
        total = full[key]
    else:
        order = np.argsort(key, kind="stable")
        first = np.flatnonzero(np.diff(key[order], prepend=-1))
        total = np.add.reduceat(count[order], first)
        key = key[order][first]
    return Contingency(ids_t[key // len(ids_p)], ids_p[key % len(ids_p)], total)


def _dense(ids, unique):
    """Index of every id in the sorted `unique`, int64."""
    if int(unique[-1]) < 2**22:
        lookup = np.zeros(int(unique[-1]) + 1, np.int64)
        lookup[unique.astype(np.int64)] = np.arange(len(unique))
        return lookup[ids.astype(np.int64)]
    return np.searchsorted(unique, ids)


def _sums(ids, count):
    """Voxels of every distinct id."""
    if not len(ids):
        return count
    unique, inverse = np.unique(ids, return_inverse=True)
    return np.bincount(inverse, weights=count, minlength=len(unique)).astype(np.int64)


def _pairs(count, total):
    """Sum of n * (n - 1), exact: the ordered pairs inside each set, without self-pairs."""
    count = count.astype(np.uint64 if total < 2**32 else object)
    return int((count * (count - 1)).sum()) if len(count) else 0


def _entropy_sum(count):
    """Sum of n log2 n, in the order of size so that equal partitions give equal sums to the last bit."""
    count = np.sort(count).astype(np.float64)
    return float((count * np.log2(count)).sum())


def _nearest(true, predicted, valid, voxel_size_nm):
    """`predicted` with its zeros at scored voxels set to the nearest segment, and the unit of "nearest"."""
    unit = "distance in voxels, no voxel size given"
    if voxel_size_nm is not None:
        if len(voxel_size_nm) != predicted.ndim:
            raise ValueError(f"voxel_size_nm has {len(voxel_size_nm)} values for labels of {predicted.ndim} axes")
        unit = f"distance in nm, voxels {','.join(f'{s:g}' for s in voxel_size_nm)} nm"
    wanted = (predicted == 0) & (np.asarray(true) != 0)
    if valid is not None:
        wanted &= np.asarray(valid)
    if not wanted.any():
        return predicted, unit
    from scipy.spatial import cKDTree

    # the segment voxel nearest to any empty voxel touches an empty voxel with a face: only those are searched
    empty = predicted == 0
    surface = np.zeros_like(empty)
    for axis in range(empty.ndim):
        here, there = ([slice(None)] * empty.ndim for _ in range(2))
        here[axis], there[axis] = slice(1, None), slice(None, -1)
        surface[tuple(here)] |= empty[tuple(there)]
        surface[tuple(there)] |= empty[tuple(here)]
    surface &= ~empty
    at = np.argwhere(surface)
    if not len(at):
        raise ValueError(
            "predicted is 0 everywhere: no nearest segment; see that the file is a segmentation, or score it with "
            'unpredicted="one_segment"'
        )
    scale = np.ones(predicted.ndim) if voxel_size_nm is None else np.asarray(voxel_size_nm, float)
    _, index = cKDTree(at * scale, balanced_tree=False).query(np.argwhere(wanted) * scale)
    predicted = predicted.copy()
    predicted[wanted] = predicted[tuple(at[index].T)]
    return predicted, unit
