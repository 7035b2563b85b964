"""Phantom: synthetic serial-section tissue with exact labels, a function of its seed alone.

How it is made: branching skeletons grow through the free room of a box (thick dendrites with spines first, thin
axons with varicosities last). Every point then belongs to the neurite whose skeleton is nearest *relative to its
radius* (a multiplicatively weighted Voronoi diagram, its distances wobbled by smooth noise, so that membranes wave
and small profiles stay round among big ones). Stain is a sum of densities (membranes, mitochondria with cristae,
vesicles and their synapses, microtubules, endoplasmic reticulum, cytoplasm), projected through the thickness of each
section, so a membrane oblique to the cut is wide and faint. Transmission, blur, noise and the faults of a
serial-section microscope come last.

Lengths are nanometres, arrays (Z, Y, X).
"""

import functools
from typing import Annotated, NamedTuple

import numpy as np
import pydantic

from emae._config import Config

Positive = Annotated[float, pydantic.Field(gt=0)]

MARGIN_NM = 160.0  # skeletons grow this far outside the volume, so its faces are like its inside
ROOM_CELL_NM = 40.0  # resolution of the map of free room that steers growing skeletons
MIN_RADIUS_NM = 48.0
TIGHT_NM = 15.0  # a skeleton comes no nearer to another's surface, lest the thinner of the two is pinched off


class PhantomConfig(Config):
    """One phantom. Two equal configurations give the same arrays, bit for bit."""

    shape: tuple[int, int, int] = (64, 256, 256)
    """(Z, Y, X), voxels"""
    voxel_size_nm: tuple[Positive, Positive, Positive] = (40.0, 8.0, 8.0)
    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    membrane_nm: Positive = 24.0
    """width of the band between two neurites, both membranes and the cleft; labelled 0"""
    noise: Annotated[float, pydantic.Field(ge=0)] = 1.0
    """strength of shot and correlated noise; 1 = like ssTEM at 8 nm pixels"""
    missing_sections: Annotated[int, pydantic.Field(ge=0)] = 1
    """sections whose raw is 0 throughout; their labels stay"""
    shifted_sections: Annotated[int, pydantic.Field(ge=0)] = 1
    """sections displaced in their plane by `shift_nm`, raw and labels alike"""
    shift_nm: Annotated[float, pydantic.Field(ge=0)] = 48.0
    jumps: Annotated[float, pydantic.Field(ge=0)] = 1.0
    """strength of the brightness and contrast jumps between sections and of uneven illumination; 0 = none"""

    @pydantic.model_validator(mode="after")
    def _check(self):
        if min(self.shape) < 1 or min(self.shape[1:]) < 32:
            raise ValueError(f"shape {self.shape}: want at least 1 x 32 x 32 voxels")
        faults = self.missing_sections + self.shifted_sections
        if faults and self.shape[0] < 4 * faults:
            raise ValueError(f"shape {self.shape}: {faults} faulty sections want at least {4 * faults} sections")
        return self

    def without_defects(self) -> "PhantomConfig":
        """The same tissue, every section present, in place and of equal brightness."""
        return self.model_copy(update={"missing_sections": 0, "shifted_sections": 0, "jumps": 0.0})


class Phantom(NamedTuple):
    raw: np.ndarray
    """(Z, Y, X) uint8"""
    labels: np.ndarray
    """(Z, Y, X) uint32 neurite ids, each one 26-connected piece; 0 = membranes and cleft. A branch that leaves the
    volume and comes back is two ids, and so is a thin neurite torn by a shifted section."""
    mitochondria: np.ndarray
    """(Z, Y, X) uint32 mitochondrion ids, 0 = elsewhere; they lie inside the neurites and keep the neurite's label"""
    missing: tuple[int, ...]
    """indices of the blank sections"""
    shifted: tuple[int, ...]
    """indices of the displaced sections"""


class _Neurite(NamedTuple):
    points_nm: np.ndarray  # (N, 3)
    radius_nm: np.ndarray  # (N,)
    branches: list  # (start, stop) of each unbroken run of points
    thick: bool


class _Grid(NamedTuple):
    """The working grid: `sub` slices per section, `step` fine pixels per working pixel, with `pad` pixels around."""

    spacing_nm: tuple[float, float, float]
    shape: tuple[int, int, int]
    sub: int
    step: int
    pad: int


def make_phantom(config: PhantomConfig) -> Phantom:
    """The phantom of a configuration; 64 x 256 x 256 takes seconds on one core."""
    rng = np.random.default_rng(config.seed)
    grid = _working_grid(config)
    neurites = _grow(rng, np.array(grid.shape) * grid.spacing_nm)
    first, second, depth_nm = _territories(rng, neurites, grid, 0.5 * config.membrane_nm)
    mito_nm, mito_id = _mitochondria(rng, neurites, grid, first, depth_nm)
    synapse, vesicles_nm = _synapses(rng, neurites, grid, first, second, depth_nm, mito_nm)
    density, labels, mitochondria = _render(
        rng, config, grid, neurites, first, second, depth_nm, mito_nm, mito_id, synapse, vesicles_nm
    )
    return _image(rng, config, grid, density, labels, mitochondria)


@functools.lru_cache(maxsize=4)
def cached_phantom(config: PhantomConfig) -> Phantom:
    """`make_phantom`, made once per process; its arrays are read-only."""
    phantom = make_phantom(config)
    for array in (phantom.raw, phantom.labels, phantom.mitochondria):
        array.setflags(write=False)
    return phantom


def _working_grid(config: PhantomConfig) -> _Grid:
    z_nm, y_nm, x_nm = config.voxel_size_nm
    sub = max(1, 2 * round((z_nm / 13 - 1) / 2) + 1)  # odd, so one slice is the section's middle; about 13 nm each
    step = max(1, round(16 / max(y_nm, x_nm)))
    pad = int(np.ceil((config.shift_nm + 16) / min(y_nm, x_nm)))
    _, y, x = config.shape
    shape = (config.shape[0] * sub, -(-(y + 2 * pad) // step), -(-(x + 2 * pad) // step))
    return _Grid((z_nm / sub, y_nm * step, x_nm * step), shape, sub, step, pad)


def _smooth(rng, shape, sigma) -> np.ndarray:
    """Gaussian noise smoothed by `sigma` (per axis), standard deviation 1."""
    from scipy import ndimage

    field = rng.standard_normal(shape, np.float32)
    field = ndimage.gaussian_filter(field, sigma, mode="wrap", truncate=3)
    return field / max(float(field.std()), 1e-6)


# --- skeletons


class _Room:
    """Distance to the surface of what has grown so far (negative inside), on a coarse grid."""

    def __init__(self, extent_nm):
        self.shape = tuple(int(n) for n in np.ceil((extent_nm + 2 * MARGIN_NM) / ROOM_CELL_NM))
        self.nm = np.full(self.shape, 400.0, np.float32)
        self.inside = tuple(
            slice(int(MARGIN_NM // ROOM_CELL_NM), n - int(MARGIN_NM // ROOM_CELL_NM)) for n in self.shape
        )

    def at(self, points_nm):
        """Room at points (K, 3); NaN outside."""
        index = np.floor((points_nm + MARGIN_NM) / ROOM_CELL_NM).astype(int)
        out = ((index < 0) | (index >= self.shape)).any(1)
        index[out] = 0
        room = self.nm[tuple(index.T)]
        room[out] = np.nan
        return room

    def paint(self, points_nm, radius_nm):
        for point, radius in zip(points_nm, radius_nm, strict=True):
            box, squares = _squares(point + MARGIN_NM, radius + 240, (ROOM_CELL_NM,) * 3, self.shape)
            if box:
                np.minimum(self.nm[box], np.sqrt(squares) - np.float32(radius), out=self.nm[box])

    def seed(self, rng):
        """A roomy place: the best of some random cells. Returns (point, room there)."""
        cells = np.stack([rng.integers(0, n, 60) for n in self.shape], 1)
        room = self.nm[tuple(cells.T)]
        best = int(room.argmax())
        return (cells[best] + rng.random(3)) * ROOM_CELL_NM - MARGIN_NM, float(room[best])

    def empty_fraction(self):
        return float((self.nm[self.inside] > 55).mean())


def _squares(point_nm, reach_nm, spacing_nm, shape):
    """Box of the voxels within `reach_nm` of a point and their squared distances to it, or (None, None)."""
    box, axes = [], []
    for p, s, n in zip(point_nm, spacing_nm, shape, strict=True):
        start, stop = max(0, int((p - reach_nm) / s)), min(n, int((p + reach_nm) / s) + 1)
        if start >= stop:
            return None, None
        box.append(slice(start, stop))
        axes.append(((np.arange(start, stop, dtype=np.float32) + 0.5) * float(s) - float(p)) ** 2)
    return tuple(box), axes[0][:, None, None] + (axes[1][:, None] + axes[2][None, :])


def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _path(rng, room, start, direction, radius, length_nm):
    """Points of a curve that keeps its direction, likes room, and ends where there is none."""
    step = float(np.clip(0.5 * radius, 28, 70))
    points, direction = [start], _unit(direction)
    for _ in range(int(length_nm / step)):
        ways = _unit(np.vstack([direction, direction + 0.4 * rng.standard_normal((11, 3))]))
        ahead = room.at(points[-1] + ways * (step + 0.7 * radius))
        score = np.clip(np.nan_to_num(ahead, nan=radius), -radius, 1.2 * radius) / radius + 1.6 * ways @ direction
        best = int(score.argmax())
        if ahead[best] < TIGHT_NM:
            break
        direction = _unit(0.5 * direction + 0.5 * ways[best])
        points.append(points[-1] + step * ways[best])
        if np.isnan(room.at(points[-1][None])[0]):
            break
    return np.array(points)


def _radii(rng, room, points, radius, varicose):
    """Radius along a path: slow changes, and swellings where it is an axon; no wider than the room allows."""
    step = np.linalg.norm(points[1] - points[0])
    along = np.arange(len(points)) * step
    wave = np.sin(along / rng.uniform(150, 400) + rng.uniform(0, 6.3)) + np.sin(along / 90 + rng.uniform(0, 6.3))
    radii = radius * np.exp(0.13 * wave)
    if varicose:
        for centre in np.arange(rng.uniform(0, 900), along[-1] + 1, rng.uniform(700, 1600)):
            radii += rng.uniform(0.8, 2.0) * radius * np.exp(-(((along - centre) / rng.uniform(120, 220)) ** 2))
    free = np.nan_to_num(room.at(points), nan=400.0)
    return np.clip(radii, MIN_RADIUS_NM, np.maximum(MIN_RADIUS_NM, free + 30))


def _neurite(rng, room, start, direction, radius, kind):
    """One neurite through `start`, with branches; painted into the room when it is whole."""
    halves = [_path(rng, room, start, sign * direction, radius, 6000) for sign in (1, -1)]
    trunk = np.vstack([halves[1][::-1], halves[0][1:]])
    if len(trunk) < 4:
        return None
    parts = [(trunk, _radii(rng, room, trunk, radius, kind == "axon"))]
    pending = [(trunk, parts[0][1], 0)]
    while pending:
        points, radii, order = pending.pop()
        length = len(points) * np.linalg.norm(points[1] - points[0])
        branches = rng.poisson(length / (1800 if kind == "axon" else 1500)) if order < 2 else 0
        spines = rng.poisson(length / 500) if kind == "dendrite" and order == 0 else 0
        for which in range(branches + spines):
            at = int(rng.integers(1, len(points) - 1)) if len(points) > 2 else 0
            tangent = _unit(points[min(at + 1, len(points) - 1)] - points[max(at - 1, 0)])
            side = _unit(np.cross(tangent, rng.standard_normal(3)))
            spine = which >= branches
            width = 50.0 if spine else max(MIN_RADIUS_NM, rng.uniform(0.5, 0.8) * radii[at])
            reach = radii[at] + rng.uniform(250, 700) if spine else rng.uniform(800, 4000)
            child = _path(rng, room, points[at], side + (0 if spine else 0.7) * tangent, width, reach)
            if len(child) < 3:
                continue
            child_radii = _radii(rng, room, child, width, kind == "axon")
            if spine:  # a head at the end of its neck
                child_radii[-4:] = np.maximum(child_radii[-4:], rng.uniform(90, 150))
            parts.append((child, child_radii))
            if not spine:
                pending.append((child, child_radii, order + 1))
    stops = np.cumsum([len(p) for p, _ in parts])
    points, radii = np.vstack([p for p, _ in parts]), np.concatenate([r for _, r in parts])
    room.paint(points, radii)
    return _Neurite(
        points,
        radii,
        [(int(b - len(p)), int(b)) for b, (p, _) in zip(stops, parts, strict=True)],
        kind == "dendrite",
    )


def _grow(rng, extent_nm) -> list[_Neurite]:
    """Fill a box with neurites: dendrites, then middling fibres, then thin axons while there is room."""
    room = _Room(np.asarray(extent_nm, float))
    volume_um3 = float(np.prod(np.array(extent_nm) / 1000))
    tracts = _unit(np.array([[1.0, 0.35, 0.2], [0.5, 1.0, -0.6]]) + 0.4 * rng.standard_normal((2, 3)))

    def direction():
        if rng.random() < 0.65:
            return _unit(tracts[int(rng.random() < 0.35)] + 0.35 * rng.standard_normal(3))
        return _unit(rng.standard_normal(3))

    neurites = []
    thick, middling = rng.poisson(0.25 * volume_um3), rng.poisson(0.9 * volume_um3)
    for which in range(thick + middling):
        kind, radius = ("dendrite", rng.uniform(220, 360)) if which < thick else ("fibre", rng.uniform(110, 190))
        start, _ = room.seed(rng)
        neurites.append(_neurite(rng, room, start, direction(), radius, kind))
    failed = 0
    while room.empty_fraction() > 0.004 and failed < 60:
        start, _ = room.seed(rng)
        made = _neurite(rng, room, start, direction(), float(np.clip(rng.lognormal(4.35, 0.3), 52, 130)), "axon")
        if made is None:
            failed += 1
            room.paint(start[None], [0.0])  # leave this hole to its neighbours
        neurites.append(made)
    return [n for n in neurites if n is not None]


# --- geometry on the working grid


def _territories(rng, neurites, grid, half_nm):
    """Whose each working voxel is, who comes second, and the distance to the surface between the two, nm.

    The score of a neurite at a point is the smallest distance / radius over its skeleton points, times 1 + wobble.
    """
    shape = grid.shape
    best, runner = np.full(shape, np.inf, np.float32), np.full(shape, np.inf, np.float32)
    first, second = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    wobble = sum(a * _smooth(rng, shape, [s / nm for nm in grid.spacing_nm]) for a, s in ((0.15, 80.0), (0.07, 32.0)))
    for number, neurite in enumerate(neurites, 1):
        reach = 1.7 * neurite.radius_nm + 130
        low = np.maximum(((neurite.points_nm - reach[:, None]).min(0) / grid.spacing_nm).astype(int), 0)
        high = np.minimum(((neurite.points_nm + reach[:, None]).max(0) / grid.spacing_nm).astype(int) + 1, shape)
        if (high <= low).any():
            continue
        score = np.full(high - low, np.inf, np.float32)
        origin_nm = low * np.array(grid.spacing_nm)
        for point, radius, far in zip(neurite.points_nm, neurite.radius_nm, reach, strict=True):
            box, squares = _squares(point - origin_nm, far, grid.spacing_nm, score.shape)
            if box:
                squares *= np.float32(1 / radius**2)
                np.minimum(score[box], squares, out=score[box])
        np.sqrt(score, out=score)
        turn = rng.integers(0, shape)
        score *= (
            1 + wobble[np.ix_(*[(np.arange(a, b) + t) % n for a, b, t, n in zip(low, high, turn, shape, strict=True)])]
        )
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        wins, places = score < best[box], score < runner[box]
        places &= ~wins
        runner[box] = np.where(wins, best[box], np.where(places, score, runner[box]))
        second[box] = np.where(wins, first[box], np.where(places, number, second[box]))
        best[box] = np.where(wins, score, best[box])
        first[box] = np.where(wins, number, first[box])
    if (first == 0).any():  # small holes go to the nearest neurite
        from scipy import ndimage

        near = ndimage.distance_transform_edt(first == 0, grid.spacing_nm, return_distances=False, return_indices=True)
        first, second, best, runner = (a[tuple(near)] for a in (first, second, best, runner))
    lead = np.where(np.isfinite(runner), runner - best, 1.5).astype(np.float32)
    depth_nm = _surface_distance(first, lead, grid.spacing_nm)
    _absorb_specks(first, second, depth_nm, half_nm, grid.spacing_nm)
    return first, second, depth_nm


def _absorb_specks(first, second, depth_nm, half_nm, spacing_nm, least_um3=0.0012):
    """Give cytoplasm that membranes have cut off, in place, to the neurite that comes second there."""
    from scipy import ndimage
    from skimage import measure

    pieces = measure.label(np.where(depth_nm > half_nm, first, 0), connectivity=1)
    small = np.bincount(pieces.ravel()) * (float(np.prod(spacing_nm)) / 1e9) < least_um3
    for number, found in enumerate(ndimage.find_objects(pieces), 1):
        if not small[number]:
            continue
        box = tuple(slice(max(0, s.start - 8), s.stop + 8) for s in found)
        here = pieces[box] == number
        own, depth = first[box], depth_nm[box]
        take = ndimage.binary_dilation(here, iterations=2) & (own == own[here][0]) & (second[box] > 0)
        own[take] = second[box][take]
        surface = np.zeros(own.shape, bool)
        for axis in range(3):
            a, b = np.moveaxis(own, axis, 0), np.moveaxis(surface, axis, 0)
            b[1:] |= a[1:] != a[:-1]
            b[:-1] |= a[1:] != a[:-1]
        near = ndimage.binary_dilation(take, iterations=4)
        away = ndimage.distance_transform_edt(~surface, spacing_nm) if surface.any() else np.full(own.shape, 200.0)
        depth[near] = (away + 0.5 * min(spacing_nm))[near]


def _surface_distance(first, lead, spacing_nm, limit_nm=200.0):
    """lead / |gradient of lead|, the gradient taken across the surface (lead counts negative on the other side)."""
    squares = np.full(lead.shape, 1e-12, np.float32)
    for axis, nm in enumerate(spacing_nm):
        n = lead.shape[axis]
        if n < 2:
            continue
        value, own = np.moveaxis(lead, axis, 0), np.moveaxis(first, axis, 0)
        same = own[1:] == own[:-1]
        rise = np.zeros_like(value)
        rise[:-1] += np.where(same, value[1:], -value[1:]) - value[:-1]
        rise[1:] += value[1:] - np.where(same, value[:-1], -value[:-1])
        # seen from voxel i the neighbour at i - 1 is compared with i's own sign, so both differences are i's
        rise[1:-1] *= 0.5
        squares += (np.moveaxis(rise, 0, axis) / np.float32(nm)) ** 2
    return np.minimum(lead / np.sqrt(squares), np.float32(limit_nm))


def _mitochondria(rng, neurites, grid, first, depth_nm):
    """Signed distance into the mitochondria (positive inside), nm, and their ids near them."""
    inside_nm = np.full(grid.shape, -100.0, np.float32)
    ids = np.zeros(grid.shape, np.int32)
    extent_nm = np.array(grid.shape) * grid.spacing_nm
    number = 0
    for host, neurite in enumerate(neurites, 1):
        for start, stop in neurite.branches:
            points, radii = neurite.points_nm[start:stop], neurite.radius_nm[start:stop]
            wide = np.flatnonzero((radii > 92) & (points > -60).all(1) & (points < extent_nm + 60).all(1))
            if len(wide) < 3:
                continue
            spacing = np.linalg.norm(points[1] - points[0])
            for centre in rng.choice(wide, rng.poisson(len(wide) * spacing / 950 * (2.2 if neurite.thick else 1.0))):
                half = max(2, int(rng.uniform(100, 420) / spacing))
                run = slice(max(0, centre - half), centre + half + 1)
                radius = float(np.clip(rng.uniform(0.40, 0.58) * radii[centre], 50, 150))
                aside = _unit(rng.standard_normal(3)) * rng.uniform(0, max(0.0, radii[centre] - radius - 20))
                number += 1
                for k, point in enumerate(_between(points[run], 25.0)):
                    swell = radius * (1 + 0.12 * np.sin(0.5 * k + number))
                    box, squares = _squares(point + aside, swell + 60, grid.spacing_nm, grid.shape)
                    if not box:
                        continue
                    body = np.minimum(swell - np.sqrt(squares), depth_nm[box] - 24)
                    wins = (first[box] == host) & (body > inside_nm[box])
                    # two mitochondria that touch are one: the later keeps the earlier's voxels only where it is deeper
                    inside_nm[box] = np.where(wins, body, inside_nm[box])
                    ids[box] = np.where(wins & (body > -40), number, ids[box])
    return inside_nm, ids


def _between(points, step_nm):
    """Points every `step_nm` along a polyline."""
    if len(points) < 2:
        return points
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.arange(0, along[-1] + 1e-6, step_nm)
    return np.stack([np.interp(at, along, points[:, k]) for k in range(3)], 1)


def _synapses(rng, neurites, grid, first, second, depth_nm, mito_nm):
    """Field 0..1 of the dense membrane at synapses, and vesicle centres (V, 3), nm, clustered on one side of each."""
    spacing = np.array(grid.spacing_nm)
    field = np.zeros(grid.shape, np.float32)
    extent_um3 = float(np.prod(np.array(grid.shape) * spacing / 1000))
    widths = np.array([0.0] + [float(np.median(n.radius_nm)) for n in neurites])
    vesicles = []
    at = np.stack([rng.integers(0, n, int(6000 * max(extent_um3, 0.3))) for n in grid.shape], 1)
    where = tuple(at.T)
    bouton = (depth_nm[where] < 12) & (second[where] > 0) & (widths[first[where]] > 62) & (widths[first[where]] < 230)
    sites = at[bouton][: rng.poisson(3.2 * extent_um3) + 1]
    for site in sites:
        pre, post = first[tuple(site)], second[tuple(site)]
        centre = (site + 0.5) * spacing
        radius = rng.uniform(70, 150)
        box, squares = _squares(centre, 1.5 * radius, grid.spacing_nm, grid.shape)
        pair = ((first[box] == pre) & (second[box] == post)) | ((first[box] == post) & (second[box] == pre))
        field[box] = np.maximum(field[box], pair * np.exp(-((squares / radius**2) ** 2)))
        cloud = centre + rng.standard_normal((rng.integers(60, 260), 3)) * rng.uniform(90, 170)
        vesicles.append(cloud[_free(cloud, grid, first, depth_nm, mito_nm, pre)])
    stray = rng.random((int(25 * extent_um3), 3)) * np.array(grid.shape) * spacing
    vesicles.append(stray[_free(stray, grid, first, depth_nm, mito_nm, None)])
    return field, np.vstack(vesicles)


def _free(points_nm, grid, first, depth_nm, mito_nm, owner):
    """Which points lie in cytoplasm (of `owner`), clear of membranes and mitochondria."""
    index = np.floor(points_nm / grid.spacing_nm).astype(int)
    inside = ((index >= 0) & (index < grid.shape)).all(1)
    where = tuple(np.where(inside[:, None], index, 0).T)
    free = inside & (depth_nm[where] > 26) & (mito_nm[where] < -22)
    return free if owner is None else free & (first[where] == owner)


# --- from geometry to an image


class _Upsample:
    """Linear in-plane interpolation of working slices to the (padded) pixels of the sections."""

    def __init__(self, coarse, fine, step):
        self.near, self.low, self.high, self.weight = [], [], [], []
        for n, f in zip(coarse, fine, strict=True):
            at = np.clip((np.arange(f) + 0.5) / step - 0.5, 0, n - 1).astype(np.float32)
            low = np.minimum(at.astype(int), max(n - 2, 0))
            self.near.append(np.rint(at).astype(int))
            self.low.append(low)
            self.high.append(np.minimum(low + 1, n - 1))
            self.weight.append(at - low.astype(np.float32))

    def nearest(self, plane):
        return plane[np.ix_(*self.near)]

    def linear(self, plane):
        rows = plane[self.low[0]] * (1 - self.weight[0])[:, None] + plane[self.high[0]] * self.weight[0][:, None]
        return rows[:, self.low[1]] * (1 - self.weight[1]) + rows[:, self.high[1]] * self.weight[1]

    def signed(self, own, depth):
        """Depth inside the nearest voxel's owner, negative where the interpolated surface says otherwise."""
        mine, out = self.nearest(own), 0.0
        for y, wy in ((self.low[0], 1 - self.weight[0]), (self.high[0], self.weight[0])):
            for x, wx in ((self.low[1], 1 - self.weight[1]), (self.high[1], self.weight[1])):
                corner = np.ix_(y, x)
                out = out + np.where(own[corner] == mine, depth[corner], -depth[corner]) * (wy[:, None] * wx)
        return out


def _render(rng, config, grid, neurites, first, second, depth_nm, mito_nm, mito_id, synapse, vesicles_nm):
    """Stain density, labels and mitochondria of the padded sections."""
    from scipy import ndimage

    z_nm, y_nm, x_nm = config.voxel_size_nm
    sections = config.shape[0]
    fine = (config.shape[1] + 2 * grid.pad, config.shape[2] + 2 * grid.pad)
    up = _Upsample(grid.shape[1:], fine, grid.step)
    per_nm = [1 / nm for nm in grid.spacing_nm]
    sheet = _smooth(rng, grid.shape, [55 * p for p in per_nm])  # zero crossings: endoplasmic reticulum
    where_sheet = _smooth(rng, grid.shape, [140 * p for p in per_nm])
    stain = np.clip(1 + 0.3 * _smooth(rng, grid.shape, [60 * p for p in per_nm]), 0.3, 1.35)  # gaps, as real stain has

    hue = 0.40 + 0.05 * rng.standard_normal(len(neurites) + 1)
    hue[rng.random(len(hue)) < 0.10] += 0.16  # dark, glia-like
    hue = hue.astype(np.float32)
    waves = _unit(rng.standard_normal((int(mito_id.max()) + 1, 3)) * (0.4, 1, 1)) * 2 * np.pi
    waves = (waves / rng.uniform(38, 52, (len(waves), 1))).astype(np.float32)
    matrix = (0.40 + 0.07 * rng.standard_normal(len(waves))).astype(np.float32)
    rows = ((np.arange(fine[0]) + 0.5) * y_nm).astype(np.float32)[:, None]
    columns = ((np.arange(fine[1]) + 0.5) * x_nm).astype(np.float32)[None, :]

    density = np.zeros((sections, *fine), np.float32)
    labels = np.zeros(density.shape, np.int32)
    mitochondria = np.zeros(density.shape, np.int32)
    half_nm = 0.5 * config.membrane_nm
    for z in range(sections):
        for slice_z in range(z * grid.sub, (z + 1) * grid.sub):
            own = up.nearest(first[slice_z])
            depth = up.signed(first[slice_z], depth_nm[slice_z])
            owner = np.where(depth >= 0, own, up.nearest(second[slice_z]))
            clear = np.abs(depth)
            dense = up.linear(synapse[slice_z])
            layer = hue[owner] + 1.25 * up.linear(stain[slice_z]) * (1 + 0.25 * dense) * np.exp(
                -((clear / (half_nm * (0.92 + 1.0 * dense))) ** 2)
            )
            patch = up.linear(where_sheet[slice_z]) - 0.75
            reticulum = np.exp(-((up.linear(sheet[slice_z]) * 55 / 9) ** 2)) * np.clip(3 * patch, 0, 1)
            body = up.linear(mito_nm[slice_z])
            layer += 0.42 * reticulum * (clear > 34) * (body < -20)
            name = np.where(body > 0, up.nearest(mito_id[slice_z]), 0)
            iy, ix = np.nonzero(body > -25)
            if len(iy):
                deep, which = body[iy, ix], up.nearest(mito_id[slice_z])[iy, ix]
                k = waves[which]
                phase = (
                    k[:, 0] * ((slice_z + 0.5) * grid.spacing_nm[0]) + k[:, 1] * rows[iy, 0] + k[:, 2] * columns[0, ix]
                )
                phase += 2.2 * up.linear(sheet[slice_z])[iy, ix] + 1.2 * up.linear(where_sheet[slice_z])[iy, ix]
                cristae = np.clip(np.sin(phase), -0.3, 1) * np.clip((deep - 14) / 14, 0, 1)
                layer[iy, ix] += (
                    np.clip(deep / 8, 0, 1) * matrix[which] + 0.34 * cristae + 0.50 * np.exp(-(((deep - 4) / 10) ** 2))
                )
            density[z] += layer / grid.sub
            if slice_z == z * grid.sub + grid.sub // 2:
                labels[z] = np.where(clear > half_nm, owner, 0)
                mitochondria[z] = np.where(labels[z] > 0, name, 0)
    cytoplasm = 1 - np.clip(density - 0.55, 0, 1)
    dots = _tubules(rng, config, grid, neurites, first, depth_nm, mito_nm, density.shape)
    dots += _ribosomes(rng, config, density.shape)
    dots += _vesicles(config, vesicles_nm, density.shape)
    fibrous = _smooth(rng, density.shape, (0.3 * 40 / z_nm, 9 / y_nm, 9 / x_nm))
    cloudy = _smooth(rng, density.shape, (30 / z_nm, 32 / y_nm, 32 / x_nm))
    grain = 0.13 * np.maximum(fibrous, -0.8) * (1 + 0.4 * cloudy) + 0.05 * cloudy
    density += cytoplasm * (dots + grain)
    return ndimage.gaussian_filter(density, (0, 5 / y_nm, 5 / x_nm), truncate=3), labels, mitochondria


def _splat(points_nm, weights, voxel_size_nm, shape):
    """Sum of weights at points: nearest section, linear in its plane."""
    out = np.zeros(int(np.prod(shape)), np.float32)
    at = points_nm / np.array(voxel_size_nm) - (0, 0.5, 0.5)
    corner = np.floor(at).astype(np.int64)
    part = at - corner
    for dy in (0, 1):
        for dx in (0, 1):
            index = corner + (0, dy, dx)
            ok = ((index >= 0) & (index < shape)).all(1)
            share = np.abs(1 - dy - part[:, 1]) * np.abs(1 - dx - part[:, 2]) * weights
            out += np.bincount(np.ravel_multi_index(index[ok].T, shape), share[ok], minlength=out.size)
    return out.reshape(shape)


def _tubules(rng, config, grid, neurites, first, depth_nm, mito_nm, shape):
    """Density of microtubules: 24 nm tubes along the neurites, dots where cut across."""
    from scipy import ndimage

    points = []
    for number, neurite in enumerate(neurites, 1):
        for start, stop in neurite.branches:
            line = neurite.points_nm[start:stop]
            for _ in range(int(np.clip(neurite.radius_nm[start:stop].mean() / 22, 1, 14))):
                aside = rng.standard_normal(3) * 0.3 * neurite.radius_nm[start:stop].mean()
                tube = _between(line, 6.0) + aside
                points.append(tube[_free(tube, grid, first, depth_nm, mito_nm, number)])
    points = np.vstack(points) if points else np.zeros((0, 3))
    _, y_nm, x_nm = config.voxel_size_nm
    per_point = 6.0 * 500 / (40 * y_nm * x_nm)  # a tube cut across a 40 nm section: 500 nm^2 of stain
    field = _splat(points, np.full(len(points), per_point), config.voxel_size_nm, shape)
    return 0.5 * (1 - np.exp(-ndimage.gaussian_filter(field, (0, 6 / y_nm, 6 / x_nm), truncate=3)))


def _ribosomes(rng, config, shape):
    """Density of 20 nm grains strewn in clumps."""
    from scipy import ndimage

    _, y_nm, x_nm = config.voxel_size_nm
    extent_nm = np.array(shape) * config.voxel_size_nm
    clumps = rng.random((int(300 * np.prod(extent_nm / 1000)), 3)) * extent_nm
    points = np.repeat(clumps, 6, axis=0) + 55 * rng.standard_normal((6 * len(clumps), 3))
    weights = rng.uniform(0.4, 1.3, len(points)) * 270 / (y_nm * x_nm)  # 270 nm^2 of stain, in one section
    return ndimage.gaussian_filter(
        _splat(points, weights, config.voxel_size_nm, shape), (0, 7 / y_nm, 7 / x_nm), truncate=3
    )


def _vesicles(config, centres_nm, shape):
    """Density of 40 nm vesicles: a dark ring round a light core, in the section(s) they lie in."""
    z_nm, y_nm, x_nm = config.voxel_size_nm
    out = np.zeros(shape, np.float32)
    for centre in centres_nm:
        middle = np.floor(centre / config.voxel_size_nm).astype(int)
        reach = (int(20 / z_nm), int(np.ceil(30 / y_nm)), int(np.ceil(30 / x_nm)))
        low = np.maximum(middle - reach, 0)
        high = np.minimum(middle + np.array(reach) + 1, shape)
        if (high <= low).any():
            continue
        away = [
            (np.arange(a, b) + 0.5) * nm - c
            for a, b, nm, c in zip(low, high, config.voxel_size_nm, centre, strict=True)
        ]
        away[0] = np.maximum(np.abs(away[0]) - z_nm / 2, 0)
        distance = np.sqrt(away[0][:, None, None] ** 2 + away[1][:, None] ** 2 + away[2] ** 2)
        ring = 0.62 * np.exp(-(((distance - 15) / 6.5) ** 2)) - 0.10 * np.exp(-((distance / 8) ** 2))
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        out[box] = np.where(np.abs(ring) > np.abs(out[box]), ring, out[box])
    return out


def _image(rng, config, grid, density, labels, mitochondria) -> Phantom:
    """Cut the sections out of their padded canvas, with the faults of the microscope."""
    sections, height, width = config.shape
    faulty = _faulty_sections(rng, config)
    missing, shifted = sorted(faulty[: config.missing_sections]), sorted(faulty[config.missing_sections :])
    raw = np.zeros(config.shape, np.float32)
    kept = [np.zeros(config.shape, np.int32) for _ in range(2)]
    for z in range(sections):
        dy = dx = 0
        angle = rng.uniform(0, 2 * np.pi)
        if z in shifted:
            dy = round(config.shift_nm * np.sin(angle) / config.voxel_size_nm[1])
            dx = round(config.shift_nm * np.cos(angle) / config.voxel_size_nm[2])
        cut = (slice(grid.pad + dy, grid.pad + dy + height), slice(grid.pad + dx, grid.pad + dx + width))
        raw[z] = np.exp(-density[z][cut])
        for whole, source in zip(kept, (labels, mitochondria), strict=True):
            whole[z] = source[z][cut]
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    for z in range(sections):
        a, b, c, d, e = config.jumps * rng.standard_normal(5) * (0.025, 0.025, 0.02, 0.05, 0.06)
        gain = 1 + a * y + b * x + c * (x**2 + y**2)
        raw[z] = 0.52 + (1 + e) * (raw[z] * gain - 0.52) + d
    _, y_nm, x_nm = config.voxel_size_nm
    counts = np.maximum(raw, 0.02)
    raw += config.noise * 0.07 * np.sqrt(counts) * rng.standard_normal(raw.shape, np.float32)
    raw += config.noise * 0.018 * _smooth(rng, raw.shape, (0, 10 / y_nm, 10 / x_nm))
    raw = np.clip(np.rint(raw * 290 - 12), 1, 255).astype(np.uint8)
    raw[missing] = 0
    return Phantom(raw, _pieces(kept[0]), _pieces(kept[1]), tuple(missing), tuple(shifted))


def _faulty_sections(rng, config) -> list[int]:
    """Distinct sections, no two of them neighbours, none at the ends where there is room for that."""
    count, sections = config.missing_sections + config.shifted_sections, config.shape[0]
    chosen: list[int] = []
    while len(chosen) < count:
        z = int(rng.integers(1, sections - 1))
        if all(abs(z - other) > 1 for other in chosen):
            chosen.append(z)
    return chosen


def _pieces(labels, least_vx=30):
    """Each 26-connected piece of a label its own id, 1..n; specks below `least_vx` voxels become 0."""
    from skimage import measure

    pieces = measure.label(labels, connectivity=3, background=0)
    counts = np.bincount(pieces.ravel())
    keep = counts >= least_vx
    keep[0] = False
    names = np.zeros(len(counts), np.uint32)
    names[keep] = np.arange(1, int(keep.sum()) + 1)
    return names[pieces]
