"""finetune: a segmenter learns the task from a few labels, started from a pre-training run or from scratch."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from emae._augment import Augmentation, Crop
from emae._decode import choose_decoder
from emae._evaluate import score
from emae._experiments import Finetune
from emae._fit import fit
from emae._geometry import Box, blocks
from emae._patches import Triple
from emae._predict import default_block, load_segmenter, predict_block
from emae._runs import Run, create_run, difference, load_tensors
from emae._sampling import Crops, Cube, common_voxel_size, far_apart, known_labels, open_cubes
from emae.models._segmenter import Segmenter

COVERAGE_FLOOR = 0.9
"""share of the encoder's parameters a pre-training run must fill; below it fine-tuning is refused"""
HELD_OUT_CROPS = 16
STILL = Augmentation(symmetry=False, contrast=0, brightness=0, section_jitter=0, noise=0)


class Transfer(NamedTuple):
    """What became of every tensor of the encoder."""

    matched: list[str]
    resized: list[str]
    missing: list[str]
    unexpected: list[str]
    coverage: float
    """share of the encoder's parameters that were filled"""

    def __str__(self) -> str:
        lines = [f"transfer: {self.coverage:.1%} of the encoder's parameters filled"]
        for name in ("matched", "resized", "missing", "unexpected"):
            rows = getattr(self, name)
            lines.append(f"  {name:10} {len(rows):4d}" + (f"  {', '.join(rows[:6])}" if rows else "")
                         + (" ..." if len(rows) > 6 else ""))
        return "\n".join(lines)


def transfer(weights: dict[str, torch.Tensor], model: Segmenter, patch: Triple) -> Transfer:
    """Copy the `encoder.` tensors of a pre-training run, which had that patch, into the segmenter's encoder.

    The embedding of another patch is resized; other tensors whose shapes differ count as missing. Nothing is refused
    here; see `finetune`.
    """
    source = {k: v for k, v in weights.items() if k.startswith("encoder.")}
    own = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    matched, resized, missing = [], [], []
    filled, wanted = {}, tuple(model.config.encoder.patch)
    for name, tensor in own.items():
        if name not in source:
            missing.append(name)
        elif name == "encoder.embed.weight" and tuple(patch) != wanted and len(source[name]) == len(tensor):
            filled[name] = resize_kernel(source[name], patch, wanted)
            resized.append(f"{name} {tuple(patch)} to {wanted}")
        elif source[name].shape == tensor.shape:
            filled[name] = source[name]
            matched.append(name)
        else:
            missing.append(f"{name} {tuple(source[name].shape)} for {tuple(tensor.shape)}")
    model.load_state_dict(filled, strict=False)
    coverage = sum(v.numel() for v in filled.values()) / sum(v.numel() for v in own.values())
    return Transfer(matched, resized, missing, [k for k in source if k not in own], coverage)


def resize_kernel(weight_DP: torch.Tensor, patch: Triple, wanted: Triple) -> torch.Tensor:
    """A patch embedding for another patch: its kernel, interpolated linearly, keeps its answer to a constant."""
    kernel = weight_DP.unflatten(1, (-1, *patch))
    share = torch.Size(patch).numel() / torch.Size(wanted).numel()
    return share * F.interpolate(kernel, size=wanted, mode="trilinear", align_corners=False).flatten(1)


def finetune(config: Finetune, out: str | Path, *, start: Run | Literal["scratch"], resume: bool = False,
             overwrite: bool = False, any_voxel_size: bool = False, say: Callable[[str], None] = print) -> Run:
    """Train a segmenter on labelled cubes and choose its threshold on held-out ones.

    start: the pre-training run whose encoder it begins with, or "scratch": the control, all else equal. ValueError
    below COVERAGE_FLOOR of transferred parameters and for another voxel size (more than 1.25x). An encoder of another
    patch is resized, one of another width or kind is refused.
    """
    if isinstance(start, Run):
        _check_start(start, config)
        if start.folder.resolve() == Path(out).resolve():
            raise FileExistsError(f"{out}: is the pre-training run itself; choose another --out")
    # what it learns from, where its choices are made
    cubes = open_cubes(config.training, config.normalisation, config.crop)
    held_out = open_cubes(config.validation, config.normalisation, config.crop, allow_smaller=True)
    voxel_size_nm = common_voxel_size([*cubes, *held_out])
    crops = Crops(cubes, config.crop, config.augmentation, config.seed)

    # what learns
    torch.manual_seed(config.seed)
    model = Segmenter(config.model, config.target.channels, voxel_size_nm)
    moved = None
    if isinstance(start, Run):
        moved = _start_from(start, model, voxel_size_nm, any_voxel_size)
        say(str(moved))
    record = {"kind": "finetune", "voxel_size_nm": voxel_size_nm, "start": str(getattr(start, "name", start))}
    run = create_run(out, config, resume=resume, overwrite=overwrite, **record)
    if resume and run.record["start"] != record["start"]:
        raise ValueError(f"{run.name}: was started from {run.record['start']}, not from {record['start']}")
    if moved is not None:
        run.save_record(transfer=moved._asdict())
    batch = config.schedule.batch

    def loss_of(crop: Crop) -> torch.Tensor:
        target, counts = config.target.compute(crop.labels, crop.valid)
        return config.target.loss(model(crop.raw[:, None]), target, counts)

    def step(i: int) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(crops.batch(i * batch, batch))}

    tests = Crops([c for c in held_out if _holds(c, config.crop)], config.crop, STILL, seed=0) if held_out else None

    def validate(done: int) -> dict[str, float]:
        if tests is None or not tests.cubes:
            return {}
        losses = [float(loss_of(tests.batch(first, batch))) for first in range(0, HELD_OUT_CROPS, batch)]
        return {"held_out_loss": float(np.mean(losses))}

    if not run.finished:
        fit(model, step, validate, config.schedule, run, encoder_rate=config.encoder_rate, resume=resume, say=say)
    if "decoder" not in run.record and held_out:
        calibrate(run, held_out, say=say)
    run.close()
    return run


def _check_start(start: Run, config: Finetune) -> None:
    if start.config.kind != "pretrain":
        raise ValueError(f"{start.name}: a {start.config.kind} run; --from wants a pre-training run or scratch")
    if not start.finished:
        raise ValueError(f"{start.name}: not finished; go on with emae pretrain --resume")
    mine, theirs = config.model.encoder, start.config.model.encoder
    same = ("kind", "width", "heads", "mlp_ratio", "positions", "wavelengths_nm")  # patch and depth: see transfer
    different = [f"{k}: {getattr(theirs, k)} there, {getattr(mine, k)} here" for k in same
                 if getattr(mine, k) != getattr(theirs, k)]
    if start.config.normalisation != config.normalisation:
        raise ValueError(f"{start.name}: pre-trained with another normalisation "
                         f"({difference(start.config.normalisation, config.normalisation)}); set normalisation alike")
    if different:
        raise ValueError(f"{start.name}: a checkpoint of another architecture ({'; '.join(different)}); "
                         "set model.encoder to the pre-training's")


def _start_from(start: Run, model: Segmenter, voxel_size_nm: tuple[float, float, float],
                any_voxel_size: bool) -> Transfer:
    if not any_voxel_size and far_apart(start.voxel_size_nm, voxel_size_nm):
        raise ValueError(f"{start.name}: pre-trained at voxels of {start.voxel_size_nm} nm, labels at {voxel_size_nm} "
                         "nm; pre-train at the labels' size (--set volumes.0.resample_nm=[z,y,x]), or allow it with "
                         "--any-voxel-size")
    moved = transfer(load_tensors(start.weights), model, start.config.model.encoder.patch)
    if moved.coverage < COVERAGE_FLOOR:
        raise ValueError(f"{start.name}: only {moved.coverage:.1%} of the encoder would be filled, want "
                         f"{COVERAGE_FLOOR:.0%} or more\n{moved}")
    return moved


def _holds(cube: Cube, crop: tuple[int, int, int]) -> bool:
    return all(c <= s for c, s in zip(crop, cube.raw.shape, strict=True))


def calibrate(run: Run, held_out: list[Cube], say: Callable[[str], None] = print) -> None:
    """Predict the held-out labels, sweep decoders and thresholds, store the best and the whole table in the run.

    The cube with the most labelled voxels decides; the raw around it may be read, its labels alone are scored.
    """
    cube = max(held_out, key=known_labels)
    model = load_segmenter(run)
    raw_box = Box.of_shape(cube.raw.shape).shift(tuple(-o for o in cube.offset_vx))
    known = Box.of_shape(cube.labels.shape).intersect(raw_box)  # labels may overhang the raw volume
    if cube.sections is not None:  # from the first to the last known section
        known = known.intersect(Box((min(cube.sections), 0, 0), (max(cube.sections) + 1, *cube.labels.shape[1:])))
    box = known.shift(cube.offset_vx)
    predicted = np.empty((run.config.target.channels, *box.shape), np.uint8)
    for block in blocks(box, default_block(run.config.crop, box.shape), (0, 0, 0)):
        here = block.write.shift(tuple(-s for s in box.start))
        predicted[(slice(None), *here.slices)] = predict_block(model, run, cube.raw, cube.levels, block.write)
    labels = cube.labels.read(known)
    valid = None if cube.valid is None else cube.valid.read(known) != 0
    if cube.sections is not None:
        rows = np.isin(np.arange(known.start[0], known.stop[0]), cube.sections)[:, None, None]
        valid = np.broadcast_to(rows, labels.shape) if valid is None else valid & rows
    decoder, table = choose_decoder(labels, predicted, run.config.decoders, score, valid=valid,
                                    offsets=run.config.target.offsets, voxel_size_nm=run.voxel_size_nm)
    chosen = decoder.model_copy(update={"threshold": None}).model_dump()
    best = next(row for row in table if row["threshold"] == decoder.threshold and row["config"] == chosen)
    run.save_record(decoder=decoder.model_dump(mode="json"), threshold_table=table,
                    threshold_chosen_on=f"{cube.labels.name} {box}")
    say(f"threshold {decoder.threshold} with fragments {decoder.fragments} chosen on held-out labels: adapted Rand "
        f"error {best['adapted_rand_error']:.4f}, VOI {best['voi_split']:.3f} + {best['voi_merge']:.3f}, "
        f"{best['objects']} objects")
    if best["objects"] < 2:
        say("  everything there became one object: train longer, or hold out labels with more objects")
