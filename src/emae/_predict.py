"""predict: a run's network over a whole volume, block by block, straight to disk.

Crops lie on one grid over the volume and overlap; where they do, they are averaged with a weight that falls towards
their borders. A block gathers every crop that touches it, so the answer does not depend on the blocks, nor on whether
the work was interrupted.

    |--crop 0--|          one block needs crops 0, 1 and 2; memory is that of the block
          |--crop 1--|
    [=====block=====]
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from emae._augment import Symmetry, symmetries
from emae._geometry import Block, Box, blocks
from emae._normalise import Levels, measure_levels
from emae._runs import Run, load_tensors, load_weights, write_whole
from emae._sampling import far_apart
from emae._volume import PROGRESS, Volume, check_apart, check_image, complete, create_volume, resample, written_attrs
from emae.models._segmenter import Segmenter


def check_run(run: Run) -> None:
    """ValueError unless this is a fine-tuning run whose training ended."""
    if run.config.kind != "finetune":
        raise ValueError(f"{run.name}: a {run.config.kind} run; prediction needs a fine-tuned one (emae finetune)")
    if not run.finished:
        raise ValueError(f"{run.name}: not finished; go on with emae finetune --resume")


def load_segmenter(run: Run) -> Segmenter:
    """The trained network of a fine-tuning run; ValueError for another kind of run or an unfinished one."""
    check_run(run)
    model = Segmenter(run.config.model, run.config.target.channels, run.voxel_size_nm)
    load_weights(model, load_tensors(run.weights), run.weights)
    return model.eval()


def fit_voxel_size(run: Run, volume: Volume, *, resample_to_run: bool = False, any_voxel_size: bool = False) -> Volume:
    """The volume, resampled on request, if its voxel size is within VOXEL_SIZE_FACTOR of the training's.

    ValueError with both sizes and the two remedies otherwise.
    """
    have, want = volume.require_voxel_size(), run.voxel_size_nm
    if resample_to_run:
        return resample(volume, want)
    if not any_voxel_size and far_apart(have, want):
        raise ValueError(f"{volume.name}: voxels of {have} nm (z, y, x), but {run.name} was trained at {want} nm; "
                         "--resample resamples the volume on the fly, --any-voxel-size predicts as it is")
    return volume


def predict(run: Run, volume: Volume, out: str | Path | None = None, *, block_vx: tuple[int, int, int] | None = None,
            overlap: float = 0.5, mirror: int = 1, resample_to_run: bool = False, any_voxel_size: bool = False,
            overwrite: bool = False, say: Callable[[str], None] = lambda text: None) -> Volume:
    """Predict every voxel of a (Z, Y, X) volume.

    out: an OME-Zarr 0.5 to write; None keeps the result in memory. Interrupted work goes on when called again, also
    with `overwrite`, which makes a finished one anew. overlap: share of a crop that the next one covers again, per
    axis. mirror: how many mirrored and transposed variants are averaged (1 = none). Returns a (C, Z, Y, X) uint8
    volume, 255 = 1.0, whose attrs carry `offsets`, with the voxel size of what was predicted.
    """
    if not 0 <= overlap < 1 or mirror < 1:
        raise ValueError(f"overlap {overlap} and mirror {mirror}: want 0 <= overlap < 1 and mirror >= 1")
    if out is not None:
        check_apart(out, volume)
    model = load_segmenter(run)
    attrs = {"offsets": [list(o) for o in run.config.target.offsets], "run": str(run.folder.resolve()),
             "source": volume.name, "source_box": str(volume.box)}
    volume = fit_voxel_size(run, volume, resample_to_run=resample_to_run, any_voxel_size=any_voxel_size)
    check_image(volume)
    levels = measure_levels(volume, run.config.normalisation)
    shape, channels = volume.shape, run.config.target.channels
    block_vx = block_vx or default_block(run.config.crop, shape)
    work = blocks(Box.of_shape(shape), block_vx, (0, 0, 0))

    if out is None:
        result = np.empty((channels, *shape), np.uint8)
        for block in work:
            predicted = predict_block(model, run, volume, levels, block.write, overlap, mirror)
            result[(slice(None), *block.write.slices)] = predicted
        return Volume.from_array(result, volume.voxel_size_nm, name=f"prediction of {volume.name}", attrs=attrs)

    out = Path(out)
    done_file = out / PROGRESS
    key = attrs["work"] = fingerprint(run, volume, levels, block_vx, overlap, mirror)
    there = written_attrs(out)
    begun = there.get("work") == key and not (overwrite and complete(out))
    if there.get("work") and not begun and not overwrite:
        raise FileExistsError(f"{out}: holds another prediction (other run, volume or settings); --overwrite replaces "
                              "it, another name keeps both")
    done = set(json.loads(done_file.read_text())["done"]) if begun and done_file.is_file() else set()
    chunk = tuple(min(c, b) for c, b in zip((64, 128, 128), block_vx, strict=True))
    target = create_volume(out, (channels, *shape), np.uint8, volume.require_voxel_size(),
                           attrs=there if begun else attrs,  # a run or file called by another name is the same one
                           chunk_shape=(1, *(c if b % c == 0 else b for c, b in zip(chunk, block_vx, strict=True))),
                           overwrite=overwrite, resume=begun)
    if not begun:
        write_whole(done_file, json.dumps({"key": key, "blocks": len(work), "done": []}).encode())
    for index, block in enumerate(work):
        if index in done:
            continue
        predicted = predict_block(model, run, volume, levels, block.write, overlap, mirror)
        target[(slice(None), *block.write.slices)] = predicted
        done.add(index)
        write_whole(done_file, json.dumps({"key": key, "blocks": len(work), "done": sorted(done)}).encode())
        say(f"predicted block {len(done)}/{len(work)}")
    return target


def fingerprint(run: Run, volume: Volume, levels: Levels, block_vx: tuple[int, int, int], overlap: float,
                mirror: int) -> str:
    """What the blocks of a half-finished prediction must have in common; the levels speak for the voxels."""
    parts = [run.config.model_dump_json(), hashlib.sha256(run.weights.read_bytes()).hexdigest(), volume.origin,
             str(volume.shape), str(volume.voxel_size_nm), str(levels.low), str(levels.high),
             str(block_vx), str(overlap), str(mirror)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def default_block(crop: tuple[int, int, int], shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Whole chunks of about 8 crop strides an axis, no larger than the volume needs."""
    z, y, x = (min(-(-4 * c // 64) * 64, -(-s // 64) * 64) for c, s in zip(crop, shape[-3:], strict=True))
    return z, y, x


def predict_block(model: Segmenter, run: Run, volume: Volume, levels: Levels, box: Box,
                  overlap: float = 0.5, mirror: int = 1) -> np.ndarray:
    """(C, *box.shape) uint8: the weighted mean of all crops of the volume's grid that touch `box`."""
    crop = run.config.crop
    offsets = run.config.target.offsets
    total = np.zeros((len(offsets), *box.shape), np.float32)
    window = blending_window(crop)
    variants = symmetries(run.voxel_size_nm, crop)
    usable = [s for s in variants if all(_match(s, o, offsets) for o in offsets)]
    # spread over the group: identity first, then as different from one another as a stride makes them
    mirror = min(mirror, len(usable))
    chosen = [usable[(k * len(usable)) // mirror] for k in range(mirror)]
    weights = np.zeros((1 if mirror == 1 else len(offsets), *box.shape), np.float32)
    for start in itertools.product(*(crop_starts(s, c, a, b, overlap) for s, c, a, b in
                                     zip(volume.shape, crop, box.start, box.stop, strict=True))):
        place = Box(start, tuple(a + c for a, c in zip(start, crop, strict=True)))
        raw = read_padded(volume, levels, place)
        both = place.intersect(box)
        here, there = both.shift(tuple(-s for s in start)), both.shift(tuple(-s for s in box.start))
        for symmetry in chosen:
            with torch.inference_mode():
                x = symmetry.apply(raw).contiguous()[None, None]
                predicted = run.config.target.probabilities(model(x))[0]
                if mirror == 1:  # nothing was moved: one weight serves all channels
                    mean, weight = predicted.mul_(window), window[None]
                else:
                    mean, weight = align(predicted, window, symmetry, offsets)
            total[(slice(None), *there.slices)] += mean[(slice(None), *here.slices)].numpy()
            weights[(slice(None), *there.slices)] += weight[(slice(None), *here.slices)].numpy()
    total /= np.maximum(weights, 1e-12, out=weights)  # in place: these two are most of the memory
    total *= 255
    return np.rint(total, out=total).astype(np.uint8)


def _match(symmetry: Symmetry, offset: tuple[int, int, int], offsets: tuple) -> bool:
    moved = symmetry.move(offset)
    return moved in offsets or tuple(-m for m in moved) in offsets


def align(predicted_KZYX: torch.Tensor, window_ZYX: torch.Tensor, symmetry: Symmetry,
          offsets: tuple[tuple[int, int, int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the prediction of a moved crop back: every channel to its own offset and place.

    The edge (v, v + o) of the crop is, in the moved crop, the edge between v' and v' + o'. If the network has a channel
    for o', its value at v' is meant; if it has one for -o', the value stored at v' + o'. Returns weighted predictions
    and weights, both (K, Z, Y, X); weight 0 where no value was predicted.
    """
    values, weights = [], []
    moved_window = symmetry.apply(window_ZYX)
    for offset in offsets:
        moved = symmetry.move(offset)
        if moved in offsets:
            value, weight = predicted_KZYX[offsets.index(moved)], moved_window
        else:
            flipped = predicted_KZYX[offsets.index((-moved[0], -moved[1], -moved[2]))]
            value, weight = shift_from(flipped, moved), shift_from(moved_window, moved)
        values.append(symmetry.undo(value * weight))
        weights.append(symmetry.undo(weight))
    return torch.stack(values), torch.stack(weights)


def shift_from(x_ZYX: torch.Tensor, offset: tuple[int, int, int]) -> torch.Tensor:
    """y[v] = x[v + offset], 0 where that lies outside."""
    out = torch.zeros_like(x_ZYX)
    if all(abs(o) < s for o, s in zip(offset, x_ZYX.shape, strict=True)):
        here = tuple(slice(max(0, -o), s - max(0, o)) for o, s in zip(offset, x_ZYX.shape, strict=True))
        there = tuple(slice(max(0, o), s - max(0, -o)) for o, s in zip(offset, x_ZYX.shape, strict=True))
        out[here] = x_ZYX[there]
    return out


def crop_starts(size: int, crop: int, first: int, stop: int, overlap: float = 0.5) -> list[int]:
    """Starts of the overlapping crops that touch first..stop on an axis of `size`.

    The last crop ends with the axis; on an axis shorter than a crop the only one starts at 0 and is padded.
    """
    stride = max(1, round(crop * (1 - overlap)))
    starts = list(range(0, max(1, size - crop), stride)) + ([size - crop] if size > crop else [])
    return [s for s in dict.fromkeys(starts) if s < stop and s + crop > first]


def read_padded(volume: Volume, levels: Levels, box: Box) -> torch.Tensor:
    """Normalised raw of a box; what lies beyond the volume is reflected (repeated where too thin to reflect)."""
    inside = box.intersect(Box.of_shape(volume.shape))
    array = levels.apply(volume.read(inside), inside.start[0])
    pads = [(a - b, d - c) for a, b, c, d in zip(inside.start, box.start, inside.stop, box.stop, strict=True)]
    if any(p for pad in pads for p in pad):
        array = np.pad(array, pads, mode="symmetric")
    return torch.from_numpy(np.ascontiguousarray(array))


def blending_window(crop: tuple[int, int, int]) -> torch.Tensor:
    """(Z, Y, X) weights, a Gaussian of standard deviation a quarter of the crop, above 0 everywhere."""
    lines = [torch.exp(-0.5 * ((torch.arange(c) + 0.5 - c / 2) / (c / 4)) ** 2) for c in crop]
    return lines[0][:, None, None] * lines[1][:, None] * lines[2]


__all__ = ["Block", "align", "check_run", "complete", "fit_voxel_size", "load_segmenter", "predict"]
