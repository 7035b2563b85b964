"""DATASETS: one record per data set (where, voxel size, splits, meaning of labels, licence, citation); opening by name.

A name is a record ("fib25"), one split of it ("fib25/test"), or any address `open_path` knows. Boxes are voxels, z y x.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emae._config import nearest_name
from emae._geometry import Box
from emae._phantom import PhantomConfig, cached_phantom
from emae._volume import Volume, open_path

COUNTED_VX = 300_000_000  # label statistics of a larger volume are those of its middle


@dataclass(frozen=True)
class LabelKey:
    """One label array of a data set. kind: "instances" (ids), "binary" (0 / not 0) or "semantic" (classes)."""

    kind: str
    meaning: str


@dataclass(frozen=True)
class Dataset:
    """Everything the project knows of one data set. `splits` never overlap; test voxels are for scores alone."""

    name: str
    file: str | None  # in the data folder; None = made on the spot
    shape: tuple[int, int, int]
    voxel_size_nm: tuple[float, float, float]
    licence: str
    citation: str
    raw_key: str = "raw"
    labels: dict[str, LabelKey] = field(default_factory=dict)
    """by key; the first is what open_labels gives without a key"""
    splits: dict[str, Box] = field(default_factory=dict)
    pretrain_on: tuple[str, ...] = ()
    """names whose raw an *inductive* pre-training may see: no test voxel, and not the validation voxels either"""
    breaks_z: tuple[int, ...] = ()
    """sections that do not continue the one before; no 3D crop may hold both"""
    voxel_size_assumed: bool = False
    notes: str = ""

    @property
    def runs(self) -> list[Box]:
        """The whole volume cut at its breaks."""
        edges = [0, *self.breaks_z, self.shape[0]]
        return [Box((a, 0, 0), (b, *self.shape[1:])) for a, b in zip(edges, edges[1:])]


def _z_splits(shape, **ranges) -> dict[str, Box]:
    return {name: Box((a, 0, 0), (b, *shape[1:])) for name, (a, b) in ranges.items()}


def _x_splits(shape, **ranges) -> dict[str, Box]:
    return {name: Box((0, 0, a), (*shape[:2], b)) for name, (a, b) in ranges.items()}


# Validation and test keep the jumps in brightness but lose no section: their scores are about membranes, not about
# guessing what a blank section hid.
PHANTOMS = {
    "train": PhantomConfig(seed=1),
    "validation": PhantomConfig(seed=2, shape=(32, 256, 256), missing_sections=0, shifted_sections=0),
    "test": PhantomConfig(seed=3, shape=(32, 256, 256), missing_sections=0, shifted_sections=0),
}
_FIB25_CITATION = "Takemura et al. 2015, PNAS 112:13711 (FIB-25); neuroproof_examples, Janelia FlyEM"
_ISBI_LICENCE = "free for generating or testing non-commercial segmentation software; cite Cardona et al. 2010"
_ISBI_CITATION = "Cardona et al. 2010, PLoS Biology 8:e1000502; Arganda-Carreras et al. 2015, Front. Neuroanat. 9:142"
_VNC_CITATION = (
    "Gerhard et al. 2013, Segmented anisotropic ssTEM dataset of neural tissue, doi:10.6084/m9.figshare.856713"
)
_BINARY = "binary"

DATASETS: dict[str, Dataset] = {
    record.name: record
    for record in (
        Dataset(
            name="phantom",
            file=None,
            shape=PHANTOMS["train"].shape,
            voxel_size_nm=PHANTOMS["train"].voxel_size_nm,
            licence="made here: no rights reserved",
            citation="emae, _phantom.py",
            labels={
                "labels": LabelKey("instances", "neurites, exact; 0 = membranes and cleft"),
                "mitochondria": LabelKey("instances", "mitochondria, exact; inside the neurites"),
            },
            splits={name: Box.of_shape(config.shape) for name, config in PHANTOMS.items()},
            pretrain_on=("phantom/train",),
            notes="three phantoms of different seeds; `phantom` is its train. train has a missing and a shifted "
            "section, validation and test have none",
        ),
        Dataset(
            name="fib25",
            file="fib25_sample2.h5",
            shape=(250, 250, 250),
            voxel_size_nm=(10, 10, 10),
            licence="CC-BY",
            citation=_FIB25_CITATION,
            labels={
                "labels": LabelKey(
                    "instances", "dense neuron bodies, no background between cells; 0 = unlabelled (16 ppm)"
                )
            },
            splits=_z_splits((250, 250, 250), train=(0, 120), validation=(120, 150), test=(150, 250)),
            pretrain_on=("fib25/train", "fib25-unlabelled"),
            notes="FIB-SEM, Drosophila distal medulla. FFN's published segmentation of the test slab: "
            "adapted Rand error 0.078",
        ),
        Dataset(
            name="fib25-unlabelled",
            file="fib25_unlabelled_416.h5",
            shape=(416, 416, 416),
            voxel_size_nm=(10, 10, 10),
            licence="CC-BY",
            citation=_FIB25_CITATION,
            pretrain_on=("fib25-unlabelled",),
            notes="another cube of fib25's specimen, raw only",
        ),
        Dataset(
            name="isbi2012",
            file="isbi2012_train_z10-29.h5",
            shape=(20, 512, 512),
            voxel_size_nm=(50, 4, 4),
            licence=_ISBI_LICENCE,
            citation=_ISBI_CITATION,
            labels={
                "labels": LabelKey("instances", "neurites and glia, one id through all sections; 0 = membrane"),
                "mitochondria": LabelKey(_BINARY, "mitochondria; their values are coarse ids, taken as a mask"),
                "membranes_isbi": LabelKey(_BINARY, "membranes, the challenge's own labels, 1 = membrane"),
            },
            splits=_z_splits((20, 512, 512), train=(0, 10), validation=(10, 12), test=(12, 16), extra=(16, 20)),
            pretrain_on=("isbi2012/train", "isbi2012/extra", "isbi2012-test"),
            breaks_z=(16,),
            notes="sections 10-29 of the challenge's training stack, counted from 0 here; it jumps sideways between 15 "
            "and 16; extra = more training raw behind the jump",
        ),
        Dataset(
            name="isbi2012-test",
            file="isbi2012_test_raw.h5",
            shape=(30, 512, 512),
            voxel_size_nm=(50, 4, 4),
            licence=_ISBI_LICENCE,
            citation=_ISBI_CITATION,
            pretrain_on=("isbi2012-test",),
            notes="the challenge's test stack, no labels; nothing to do with isbi2012/test",
        ),
        Dataset(
            name="vnc",
            file="vnc_stack1.h5",
            shape=(20, 1024, 1024),
            voxel_size_nm=(50, 4.6, 4.6),
            licence="CC BY-NC-SA 3.0",
            citation=_VNC_CITATION,
            labels={
                "mitochondria": LabelKey(_BINARY, "mitochondria"),
                "membranes": LabelKey(_BINARY, "membranes"),
                "synapses": LabelKey(_BINARY, "synapses"),
                "labels": LabelKey(
                    "semantic",
                    "0, 32, 64, 96 oriented membrane; 128 junction; 159 glia or extracellular; 191 mitochondria; "
                    "223 synapse; 255 intracellular",
                ),
            },
            splits=_z_splits((20, 1024, 1024), train=(0, 12), validation=(12, 14), test=(14, 20)),
            pretrain_on=("vnc/train", "vnc-stack2"),
            notes="ssTEM, Drosophila larva ventral nerve cord; its source says sections of 45-50 nm",
        ),
        Dataset(
            name="vnc-stack2",
            file="vnc_stack2_raw.h5",
            shape=(20, 1024, 1024),
            voxel_size_nm=(50, 4.6, 4.6),
            licence="CC BY-NC-SA 3.0",
            citation=_VNC_CITATION,
            pretrain_on=("vnc-stack2",),
            notes="the second stack, raw only",
        ),
        Dataset(
            name="epfl",
            file="epfl_ca1_train_z000-019.h5",
            shape=(20, 768, 1024),
            voxel_size_nm=(5, 5, 5),
            licence="images: EPFL CVLab's own terms",
            citation="Lucchi et al. 2012, IEEE TMI 31:474 (images); GraphLab EM project (annotation)",
            labels={
                "labels": LabelKey(_BINARY, "mitochondria, with their boundary where drawn"),
                "membranes": LabelKey(_BINARY, "membranes"),
                "mito_boundaries": LabelKey(_BINARY, "boundaries of mitochondria"),
                "vesicles": LabelKey(_BINARY, "vesicles"),
                "psd": LabelKey(_BINARY, "postsynaptic densities"),
                "axon": LabelKey(_BINARY, "axons"),
            },
            splits=_x_splits((20, 768, 1024), train=(0, 512), validation=(512, 576), test=(640, 1024)),
            pretrain_on=("epfl/train",),
            notes="FIB-SEM, hippocampus CA1. Sections 5 nm apart are near copies, so x is split and not z, 576-639 "
            "left out. A re-annotation: scores do not compare with published Lucchi numbers",
        ),
        Dataset(
            name="cdeep3m",
            file="cdeep3m_mito_z010-029.h5",
            shape=(20, 1024, 1024),
            voxel_size_nm=(40, 8, 8),
            voxel_size_assumed=True,
            licence="UC Regents: education, research and non-profit purposes",
            citation="Haberl et al. 2018, Nature Methods 15:677",
            labels={"labels": LabelKey(_BINARY, "mitochondria")},
            splits=_z_splits((20, 1024, 1024), train=(0, 12), validation=(12, 14), test=(14, 20)),
            pretrain_on=("cdeep3m/train",),
            notes="the source does not state the voxel size; 40 x 8 x 8 nm is read off the image",
        ),
    )
}


def data_folder() -> Path:
    """EMAE_DATA where it is set, else `../shared/data` beside the repository or the working directory."""
    if os.environ.get("EMAE_DATA"):
        return Path(os.environ["EMAE_DATA"])
    beside = [root.parent / "shared" / "data" for root in (Path(__file__).resolve().parents[2], Path.cwd())]
    return next((folder for folder in beside if folder.is_dir()), beside[0])


def is_here(name: str) -> bool:
    """Whether the file of a data set is in the data folder (the phantom always is)."""
    record, _ = _find(name)
    return record is not None and (record.file is None or (data_folder() / record.file).is_file())


def _find(name: str) -> tuple[Dataset | None, str]:
    """The record and split that a name means, or (None, "") for an address."""
    base, slash, split = str(name).partition("/")
    record = DATASETS.get(base)
    if record is None:
        return None, ""
    if slash and split not in record.splits:
        known = ", ".join(record.splits) or "none"
        raise ValueError(f"{name}: data set {base} has no split {split!r}, it has: {known} (a folder: ./{name})")
    return record, split


def _file(record: Dataset) -> Path:
    path = data_folder() / record.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the file of data set {record.name!r} is not there: set EMAE_DATA to the folder that has it"
        )
    return path


def open_volume(
    name_or_address, *, voxel_size_nm: Sequence[float] | None = None, box: str | Box | None = None
) -> Volume:
    """The raw volume of a data set ("fib25"), of a split ("fib25/test"), or at any address; lazy.

    voxel_size_nm (z, y, x) comes before what record or file states. box: the part wanted, voxels of that volume or
    split. FileNotFoundError names the missing file, ValueError the fault.
    """
    record, split = _find(name_or_address)
    if record is None:
        return _open_address(name_or_address, voxel_size_nm, box)
    return _open(record, split, record.raw_key, voxel_size_nm, box)


def open_labels(
    name_or_address,
    key: str | None = None,
    *,
    voxel_size_nm: Sequence[float] | None = None,
    box: str | Box | None = None,
) -> Volume:
    """The labels that belong to `open_volume` of the same name and box.

    key: which label array; without it the record's first (instances where it has them), or what the address says.
    """
    record, split = _find(name_or_address)
    if record is None:
        return _open_address(name_or_address if key is None else f"{name_or_address}:{key}", voxel_size_nm, box)
    if not record.labels:
        raise ValueError(f"{name_or_address}: data set {record.name} has no labels")
    key = next(iter(record.labels)) if key is None else key
    if key not in record.labels:
        raise ValueError(f"{name_or_address}: no labels {key!r}; {nearest_name(key, record.labels)}")
    return _open(record, split, key, voxel_size_nm, box)


def label_kind(name_or_address, key: str | None = None) -> str:
    """What the labels of a data set mean (see LabelKey); labels at any other address are taken for "instances"."""
    record, _ = _find(name_or_address)
    if record is None:
        return "instances"
    return record.labels[next(iter(record.labels)) if key is None else key].kind


def open_stretches(
    name_or_address, *, voxel_size_nm: Sequence[float] | None = None, box: str | Box | None = None
) -> list[Volume]:
    """`open_volume`, cut where the stack jumps: what 3D crops may be taken from."""
    volume = open_volume(name_or_address, voxel_size_nm=voxel_size_nm, box=box)
    record, _ = _find(name_or_address)
    if record is None or not record.breaks_z:
        return [volume]
    parts = [run.intersect(volume.box) for run in record.runs]
    back = tuple(-s for s in volume.box.start)
    return [volume.crop(part.shift(back)) for part in parts if not part.is_empty]


def _open(record: Dataset, split: str, key: str, voxel_size_nm, box) -> Volume:
    size = record.voxel_size_nm if voxel_size_nm is None else voxel_size_nm
    if record.file is None:
        split = split or "train"
        name = f"{record.name}/{split}" + ("" if key == record.raw_key else f":{key}")
        volume = Volume.from_array(getattr(cached_phantom(PHANTOMS[split]), key), size, name=name)
    else:
        volume = open_path(f"{_file(record)}:{key}", voxel_size_nm=size)
        if volume.shape != record.shape:
            raise ValueError(
                f"{volume.name}: shape {volume.shape}, data set {record.name} has {record.shape}: another file?"
            )
        if split:
            volume = volume.crop(record.splits[split])
    return volume if box is None else volume.crop(box)


def _open_address(address, voxel_size_nm, box) -> Volume:
    try:
        return open_path(address, voxel_size_nm=voxel_size_nm, box=box)
    except FileNotFoundError as error:
        if "/" in str(address) or "." in str(address):
            raise
        raise FileNotFoundError(f"{error}; nor is it a data set: {nearest_name(str(address), DATASETS)}") from None


# ---- looking at them


@dataclass(frozen=True)
class LabelStatistics:
    """What a label array holds. Sizes are voxels; for kind "binary" objects are 26-connected components."""

    key: str
    kind: str
    meaning: str
    dtype: str
    objects: int
    background_fraction: float
    size_vx: dict[str, float]
    """smallest, quartiles and largest object"""
    classes: dict[int, float]
    """fraction of each value, for kind "semantic" """
    counted: str
    """the box that was counted"""


@dataclass(frozen=True)
class Description:
    """What `emae data show` prints; `str()` of it is that text."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    voxel_size_nm: tuple[float, ...] | None
    intensity: dict[str, float]
    labels: tuple[LabelStatistics, ...]
    record: Dataset | None

    def __str__(self) -> str:
        size = "not stated (give --voxel-size z,y,x)"
        if self.voxel_size_nm is not None:
            extent = " x ".join(f"{n * s / 1000:.3g}" for n, s in zip(self.shape[-3:], self.voxel_size_nm))
            size = " x ".join(f"{s:g}" for s in self.voxel_size_nm) + f" nm (z y x), {extent} um"
            if self.record is not None and self.record.voxel_size_assumed:
                size += "; ASSUMED, the source does not state it"
        lines = [
            ("name", self.name),
            ("file", self.file),
            ("shape", " x ".join(map(str, self.shape)) + f" {self.dtype}"),
            ("voxel size", size),
        ]
        if self.intensity:
            lines.append(("intensity", ", ".join(f"{k} {v:.4g}" for k, v in self.intensity.items())))
        if self.record is not None:
            if self.record.file is None:
                splits = {split: f"{box}, seed {PHANTOMS[split].seed}" for split, box in self.record.splits.items()}
            else:
                splits = {split: str(box) for split, box in self.record.splits.items()}
            lines += [
                ("splits" if k == 0 else "", f"{split:<10} {box}") for k, (split, box) in enumerate(splits.items())
            ]
            if self.record.breaks_z:
                lines.append(("runs", "; ".join(map(str, self.record.runs)) + " (no 3D crop across them)"))
        for stats in self.labels:
            lines.append(("labels", f"{stats.key} {stats.dtype}, {stats.kind}: {stats.meaning}"))
            if stats.classes:
                lines.append(("", "classes " + ", ".join(f"{v}: {100 * f:.1f} %" for v, f in stats.classes.items())))
            else:
                text = f"{stats.objects} objects, background {100 * stats.background_fraction:.1f} %"
                if stats.size_vx:
                    text += ", size in voxels: " + ", ".join(f"{k} {v:.0f}" for k, v in stats.size_vx.items())
                lines.append(("", text))
            if stats.counted:
                lines.append(("", f"counted in box {stats.counted}"))
        if self.record is not None:
            lines += [
                ("licence", self.record.licence),
                ("cite", self.record.citation),
                ("notes", self.record.notes),
            ]
        return "\n".join(f"{head:<11}{text}" for head, text in lines if text)


def list_datasets() -> str:
    """The table `emae data list` prints: every record, and whether its file is here."""
    head = ("name", "here", "shape", "voxel nm", "splits", "labels")
    rows = [head]
    for record in DATASETS.values():
        kinds = ", ".join(f"{key} ({value.kind})" for key, value in record.labels.items()) or "none"
        size = ",".join(f"{s:g}" for s in record.voxel_size_nm) + ("?" if record.voxel_size_assumed else "")
        shape = " x ".join(map(str, record.shape))
        rows.append(
            (
                record.name,
                "yes" if is_here(record.name) else "no",
                shape,
                size,
                ", ".join(record.splits) or "-",
                kinds,
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)
    return f"{text}\nfolder: {data_folder()} (EMAE_DATA); ? = assumed"


def describe(
    name_or_address,
    labels=None,
    *,
    voxel_size_nm: Sequence[float] | None = None,
    box: str | Box | None = None,
) -> Description:
    """Shape, type, voxel size, splits and label statistics of a data set, a split of one, or any volume.

    labels: address of the labels of a volume that is no data set. An address of labels (32 or 64 bit integers, or an
    array with a `kind` attribute) is described as labels.
    """
    record, _ = _find(name_or_address)
    volume = open_volume(name_or_address, voxel_size_nm=voxel_size_nm, box=box)
    found, intensity = [], {}
    if looks_like_labels(volume):
        found.append(_label_statistics(volume, str(name_or_address), None))
    else:
        intensity = _intensity(volume)
    if record is not None:
        for key, label_key in record.labels.items():
            array = open_labels(name_or_address, key, voxel_size_nm=voxel_size_nm, box=box)
            found.append(_label_statistics(array, key, label_key))
    if labels is not None:
        found.append(_label_statistics(open_volume(labels, voxel_size_nm=voxel_size_nm, box=box), str(labels), None))
    return Description(
        name=str(name_or_address),
        file=volume.name,
        shape=tuple(volume.shape),
        dtype=str(volume.dtype),
        voxel_size_nm=volume.voxel_size_nm,
        intensity=intensity,
        labels=tuple(found),
        record=record,
    )


def looks_like_labels(volume: Volume) -> bool:
    """Whether a volume is labels by its type, or by the `kind` its file states."""
    kind = volume.dtype.kind
    return kind == "b" or (kind in "ui" and (volume.dtype.itemsize >= 4 or "kind" in volume.attrs))


def _middle(volume: Volume, most_vx: int) -> Box:
    """The middle of a volume, at most so many voxels: the whole where it is smaller."""
    shape = list(volume.shape[-3:])
    while int(np.prod(shape)) > most_vx:
        axis = int(np.argmax(shape))
        shape[axis] = -(-shape[axis] // 2)
    start = tuple((n - s) // 2 for n, s in zip(volume.shape[-3:], shape))
    return Box(start, tuple(a + s for a, s in zip(start, shape)))


def _intensity(volume: Volume) -> dict[str, float]:
    """Of the middle of a volume (at most 32 M voxels)."""
    values = volume.read(_middle(volume, 32_000_000))
    low, median, high = np.percentile(values, [1, 50, 99])
    return {"min": float(values.min()), "1 %": float(low), "median": float(median), "99 %": float(high),
            "max": float(values.max()), "mean": float(values.mean())}  # fmt: skip


def _label_statistics(volume: Volume, key: str, label_key: LabelKey | None) -> LabelStatistics:
    if volume.ndim != 3 or volume.dtype.kind == "f":
        raise ValueError(f"{volume.name}: {volume.ndim} axes of {volume.dtype}, wanted labels (Z, Y, X) of integers")
    box = _middle(volume, COUNTED_VX)
    ids, counts = _counts(volume, box)
    if label_key is None:
        meaning = str(volume.attrs.get("kind", "as the file has them"))
        label_key = LabelKey(_BINARY if len(ids[ids != 0]) == 1 else "instances", meaning)
    background = float(counts[ids == 0].sum() / counts.sum())
    sizes, classes = counts[ids != 0], {}
    if label_key.kind == _BINARY:
        from skimage import measure

        pieces = measure.label(volume.read(box) != 0, connectivity=3)
        sizes = np.bincount(pieces.ravel())[1:]
    elif label_key.kind == "semantic":
        classes = {int(i): float(c / counts.sum()) for i, c in zip(ids, counts)}
    quantiles = np.quantile(sizes, [0, 0.25, 0.5, 0.75, 1]) if len(sizes) else []
    return LabelStatistics(
        key=key,
        kind=label_key.kind,
        meaning=label_key.meaning,
        dtype=str(volume.dtype),
        objects=len(sizes),
        background_fraction=background,
        size_vx=dict(zip(("min", "25 %", "median", "75 %", "max"), map(float, quantiles))),
        classes=classes,
        counted="" if box == Box.of_shape(volume.shape) else str(box),
    )


def _counts(volume: Volume, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Values and how often they occur, slab by slab of chunks."""
    total: dict[int, int] = {}
    step = max(volume.chunk_shape[0], 1)
    for z in range(box.start[0], box.stop[0], step):
        slab = Box((z, *box.start[1:]), (min(z + step, box.stop[0]), *box.stop[1:]))
        for value, count in zip(*(a.tolist() for a in np.unique(volume.read(slab), return_counts=True))):
            total[value] = total.get(value, 0) + count
    values = sorted(total)
    return np.array(values), np.array([total[v] for v in values])
