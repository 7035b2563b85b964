"""Crops: training samples out of volumes. Sample i of a run is a function of (seed, i) and of nothing else."""

from dataclasses import dataclass

import numpy as np
import pydantic
import torch

from emae._augment import Augmentation, Crop, augment
from emae._config import Config
from emae._datasets import label_kind, open_labels, open_stretches, open_volume
from emae._geometry import Box
from emae._normalise import Levels, Normalisation, measure_levels
from emae._volume import Volume, check_image, check_labels, check_pair, resample

VOXEL_SIZE_FACTOR = 1.25
"""largest ratio, per axis, between voxel sizes that one network may see"""
IN_MEMORY_BYTES = 2**31
"""volumes smaller than this are read once and kept; larger ones are read crop by crop"""


class Source(Config):
    """A volume to open: an address, or a data set and split such as `fib25/train`."""

    path: str
    voxel_size_nm: tuple[float, float, float] | None = None
    """z y x; only where the file does not say"""
    box: str | None = None
    """z0:z1,y0:y1,x0:x1"""
    resample_nm: tuple[float, float, float] | None = None
    """bring the raw volume to this voxel size, linearly, as it is read (unlabelled volumes)"""

    def open(self) -> list[Volume]:
        """The volume, cut where its stack jumps: no crop may hold both sides."""
        parts = open_stretches(self.path, voxel_size_nm=self.voxel_size_nm, box=self.box)
        return parts if self.resample_nm is None else [resample(part, self.resample_nm) for part in parts]


class LabelledSource(Config):
    """A labelled cube inside a (larger) raw volume."""

    raw: Source
    labels: str | None = None
    """address, or data set and split, of the labels; None = those of the split that `raw` names, without a box"""
    labels_key: str | None = None
    """which labels of a data set"""
    offset_vx: tuple[int, int, int] | None = None
    """where the first label voxel lies in `raw`; None = the two have the same shape"""
    valid: str | None = None
    """address of a mask of the labels' shape, 0 where labels are not known"""
    sections: tuple[int, ...] | None = None
    """sparse labels: only these sections of the label array are known"""

    @pydantic.model_validator(mode="after")
    def _named(self) -> "LabelledSource":
        if self.labels is None and self.raw.box is not None:
            raise ValueError("a raw volume with a box needs its labels named, and their offset_vx")
        return self

    def open(self) -> tuple[Volume, Volume, Volume | None]:
        """Raw, labels and valid, checked to fit one another."""
        raw, *more = self.raw.open()
        if more:
            raise ValueError(f"{raw.name}: the stack jumps between sections {raw.box.stop[0] - 1} and "
                             f"{raw.box.stop[0]}; labelled raw lies on one side: give a split, or raw.box")
        labels = open_labels(self.labels or self.raw.path, key=self.labels_key, voxel_size_nm=self.raw.voxel_size_nm)
        if labels.voxel_size_nm is None and raw.voxel_size_nm is not None:
            labels = labels.with_voxel_size(raw.voxel_size_nm)  # label files often do not say; raw does
        valid = None if self.valid is None else open_volume(self.valid, voxel_size_nm=labels.voxel_size_nm)
        check_pair(raw, labels, self.offset_vx, valid)
        kind = label_kind(self.labels or self.raw.path, self.labels_key)
        if kind == "semantic":
            raise ValueError(f"{labels.name}: classes, not instances; choose other labels with labels_key")
        if kind == "binary":
            labels = components(labels)
        first = 0 if self.offset_vx is None else self.offset_vx[0]
        known = range(max(0, -first), min(labels.shape[0], raw.shape[0] - first))
        if self.sections is not None and not (self.sections and set(self.sections) <= set(known)):
            raise ValueError(f"{labels.name}: sections {self.sections} are none, or not all among its "
                             f"{labels.shape[0]} and within {raw.name}")
        return raw, labels, valid


def components(mask: Volume) -> Volume:
    """Instances of a binary mask: its 26-connected components, in memory."""
    import cc3d

    labels = cc3d.connected_components(np.asarray(mask) != 0, connectivity=26)
    return Volume.from_array(labels, mask.voxel_size_nm, name=mask.name)


@dataclass(frozen=True)
class Cube:
    """An opened source: where its crops come from."""

    raw: Volume
    levels: Levels
    voxel_size_nm: tuple[float, float, float]
    labels: Volume | None = None
    valid: Volume | None = None
    offset_vx: tuple[int, int, int] = (0, 0, 0)
    sections: tuple[int, ...] | None = None


def held(volume: Volume) -> Volume:
    """The volume, in memory if it is small."""
    nbytes = volume.dtype.itemsize * int(np.prod(volume.shape))
    if nbytes > IN_MEMORY_BYTES:
        return volume
    kept = Volume.from_array(np.asarray(volume), volume.voxel_size_nm, name=volume.name)
    return kept


def open_cubes(sources: tuple[Source, ...] | tuple[LabelledSource, ...], normalisation: Normalisation,
               crop: tuple[int, int, int], allow_smaller: bool = False) -> list[Cube]:
    """Open and check every source; ValueError names the one at fault.

    allow_smaller: volumes smaller than the crop will do, for prediction pads them.
    """
    cubes = []
    opened = []
    for source in sources:
        if isinstance(source, LabelledSource):
            opened.append((source, *source.open()))
        else:
            opened += [(source, part, None, None) for part in source.open()]
    for source, raw, labels, valid in opened:
        check_image(raw)
        if not allow_smaller and any(c > s for c, s in zip(crop, raw.shape, strict=True)):
            raise ValueError(f"{raw.name}: a crop of {tuple(crop)} is larger than the volume {raw.shape}; "
                             "use --set crop=[z,y,x] or a larger volume")
        voxel_size_nm = raw.require_voxel_size()
        if labels is not None:
            labels = check_labels(labels)
        cube = Cube(held(raw), measure_levels(raw, normalisation), voxel_size_nm)
        if isinstance(source, LabelledSource):
            cube = Cube(cube.raw, cube.levels, voxel_size_nm, held(labels),
                        None if valid is None else held(valid), source.offset_vx or (0, 0, 0), source.sections)
            if not known_labels(cube):
                raise ValueError(f"{labels.name}: no label where labels are known (sections "
                                 f"{source.sections or 'all'}, valid {source.valid or 'everywhere'}) and raw lies; "
                                 "there is nothing to learn from")
        cubes.append(cube)
    return cubes


def known_labels(cube: Cube) -> int:
    """Labelled voxels (not background) that are known and lie in the raw volume; counted section by section."""
    assert cube.labels is not None
    inside = Box.of_shape(cube.raw.shape).shift(tuple(-o for o in cube.offset_vx)).intersect(
        Box.of_shape(cube.labels.shape))
    count = 0
    for z in range(inside.start[0], inside.stop[0]):
        if cube.sections is not None and z not in cube.sections:
            continue
        section = Box((z, *inside.start[1:]), (z + 1, *inside.stop[1:]))
        known = cube.labels.read(section) != 0
        count += int((known if cube.valid is None else known & (cube.valid.read(section) != 0)).sum())
    return count


def far_apart(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two voxel sizes differ by more than VOXEL_SIZE_FACTOR on an axis: another scale, another task."""
    return any(max(a, b) > VOXEL_SIZE_FACTOR * min(a, b) for a, b in zip(one, other, strict=True))


def common_voxel_size(cubes: list[Cube]) -> tuple[float, float, float]:
    """That of the first; ValueError where another, of training or held-out data, is more than 1.25x off on an axis."""
    sizes = {c.voxel_size_nm for c in cubes}
    if any(far_apart(s, t) for s in sizes for t in sizes):
        raise ValueError("sources of one training differ in voxel size by more than 1.25x: "
                         + ", ".join(f"{c.raw.name} {c.voxel_size_nm} nm" for c in cubes))
    return cubes[0].voxel_size_nm


class Crops:
    """`crops[i]` is sample i: a Crop drawn by (seed, i) from the cubes, volumes chosen by their number of voxels."""

    def __init__(self, cubes: list[Cube], shape: tuple[int, int, int], augmentation: Augmentation, seed: int):
        self.cubes, self.shape, self.augmentation, self.seed = cubes, shape, augmentation, seed
        sizes = np.array([int(np.prod((c.raw if c.labels is None else c.labels).shape[-3:])) for c in cubes], float)
        self.share = np.cumsum(sizes / sizes.sum())

    def __getitem__(self, i: int) -> Crop:
        generator = sample_generator(self.seed, i)
        chosen = int(np.searchsorted(self.share, float(torch.rand((), generator=generator)), side="right"))
        cube = self.cubes[min(chosen, len(self.cubes) - 1)]
        crop = read_crop(cube, random_box(cube, self.shape, generator))
        return augment(crop, self.augmentation, cube.voxel_size_nm, generator)

    def batch(self, first: int, count: int) -> Crop:
        """Samples first .. first + count - 1, stacked: (B, Z, Y, X)."""
        crops = [self[i] for i in range(first, first + count)]
        return Crop(*(None if parts[0] is None else torch.stack(parts) for parts in zip(*crops, strict=True)))


def sample_generator(seed: int, i: int) -> torch.Generator:
    """The generator of sample i: SeedSequence mixes (seed, i), so neighbours share nothing."""
    state = np.random.SeedSequence([seed, i]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def random_box(cube: Cube, shape: tuple[int, int, int], generator: torch.Generator) -> Box:
    """A crop inside the raw volume that covers as much of the labels as its size allows."""
    start = []
    for axis, size in enumerate(shape):
        low, high = 0, cube.raw.shape[axis] - size
        if cube.labels is not None:
            first = cube.offset_vx[axis]
            ends = sorted((first, first + cube.labels.shape[axis] - size))
            if axis == 0 and cube.sections is not None:  # any place that holds the known section drawn
                known = first + cube.sections[int(torch.randint(len(cube.sections), (), generator=generator))]
                ends = [known - size + 1, known]
            low, high = max(low, ends[0]), min(high, ends[1])
            low, high = min(low, cube.raw.shape[axis] - size), max(high, 0)
            high = max(low, high)
        start.append(low + int(torch.randint(high - low + 1, (), generator=generator)))
    return Box(tuple(start), tuple(s + n for s, n in zip(start, shape, strict=True)))


def read_crop(cube: Cube, box: Box) -> Crop:
    """Normalised raw, labels (dense ids) and where they are known, of a box of the raw volume."""
    raw = torch.from_numpy(cube.levels.apply(cube.raw.read(box), box.start[0]))
    if cube.labels is None:
        return Crop(raw)
    labels = np.zeros(box.shape, np.int64)
    valid = np.zeros(box.shape, bool)
    there = box.shift(tuple(-o for o in cube.offset_vx)).intersect(Box.of_shape(cube.labels.shape))
    if not there.is_empty:
        here = there.shift(cube.offset_vx).shift(tuple(-s for s in box.start))
        _, dense = np.unique(np.append(cube.labels.read(there).ravel(), 0), return_inverse=True)  # 0 stays 0
        labels[here.slices] = dense[:-1].reshape(there.shape)
        known = np.ones(there.shape, bool) if cube.valid is None else cube.valid.read(there) != 0
        if cube.sections is not None:
            known &= np.isin(np.arange(there.start[0], there.stop[0]), cube.sections)[:, None, None]
        valid[here.slices] = known
    return Crop(raw, torch.from_numpy(labels), torch.from_numpy(valid))
