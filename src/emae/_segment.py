"""segment: predict, then decode: a whole volume to instances. Decoding holds the volume in memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from emae._decode import decode
from emae._predict import check_run, predict
from emae._runs import Run
from emae._volume import Volume, check_apart, check_output, create_volume, resample


def segment(run: Run, volume: Volume, out: str | Path, *, overlap: float = 0.5, mirror: int = 1,
            resample_to_run: bool = False, any_voxel_size: bool = False, overwrite: bool = False,
            say: Callable[[str], None] = lambda text: None) -> Volume:
    """Instances of a (Z, Y, X) volume, written to `out` (OME-Zarr 0.5, uint64) on the volume's own grid.

    The affinities stay beside it, in `<out>` with the ending `_prediction.zarr`: interrupted work goes on there.
    ValueError for a run whose decoder has no threshold.
    """
    out = Path(out)
    check_run(run)
    if run.config.validation and "decoder" not in run.record:
        raise ValueError(f"{run.name}: stopped before its threshold was chosen; go on with emae finetune --resume")
    if run.decoder.threshold is None:
        raise ValueError(f"{run.name}: no threshold was chosen (the run had no held-out labels); give one with "
                         "emae decode --threshold, after emae predict")
    check_output(out, overwrite)
    for path in (out, prediction_path(out)):
        check_apart(path, volume)
    affinities = predict(run, volume, prediction_path(out), overlap=overlap, mirror=mirror,
                         resample_to_run=resample_to_run, any_voxel_size=any_voxel_size, overwrite=overwrite, say=say)
    labels = decode(affinities, run.decoder)
    say(f"decoded {int(labels.max())} objects at threshold {run.decoder.threshold}")
    if resample_to_run:
        back = resample(Volume.from_array(labels, affinities.voxel_size_nm), volume.require_voxel_size(), order=0)
        labels = fit_shape(np.asarray(back), volume.shape)
    return save_labels(labels, out, volume, run, overwrite=overwrite)


def prediction_path(out: Path) -> Path:
    """Where `segment` keeps its affinities."""
    return out.with_name(out.name.removesuffix(".zarr") + "_prediction.zarr")


def fit_shape(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cut, or repeat the last voxels, to make up for the rounding of a resampled extent."""
    labels = labels[tuple(slice(0, s) for s in shape)]
    return np.pad(labels, [(0, s - n) for s, n in zip(shape, labels.shape, strict=True)], mode="edge")


def save_labels(labels: np.ndarray, out: str | Path, source: Volume, run: Run | None = None, *,
                overwrite: bool = False) -> Volume:
    """Write (Z, Y, X) instance labels and what they came from; all of them or, when interrupted, nothing."""
    check_apart(out, source)
    attrs = {"source": source.name, "source_box": str(source.box)}
    if run is not None:
        attrs |= {"run": str(run.folder.resolve()), "decoder": run.decoder.model_dump(mode="json"),
                  "threshold_chosen_on": run.record.get("threshold_chosen_on", "")}
    return create_volume(out, labels.shape, labels.dtype, source.require_voxel_size(), attrs=attrs, overwrite=overwrite,
                         array=labels)


