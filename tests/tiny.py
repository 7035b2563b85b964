"""The smallest experiments that go through everything: seconds of one busy core."""

from pathlib import Path

import h5py
import numpy as np
import torch

from emae._augment import Augmentation
from emae._decode import Agglomeration
from emae._experiments import Finetune, Pretrain, Schedule
from emae._normalise import Normalisation
from emae._phantom import PhantomConfig, make_phantom
from emae._runs import Run, create_run
from emae._sampling import LabelledSource, Source
from emae._targets import NEAREST, Affinities
from emae.models._mae import MaeConfig
from emae.models._segmenter import Segmenter, SegmenterConfig
from emae.models._vit import VitConfig

NM = (40.0, 8.0, 8.0)
VIT = VitConfig(patch=(2, 8, 8), width=24, depth=1, heads=2)
MAE = MaeConfig(encoder=VIT, decoder_width=24, decoder_depth=1, decoder_heads=2)
SEGMENTER = SegmenterConfig(encoder=VIT, stem=(1, 2, 2), channels=(8, 8, 16))
CROP = (4, 32, 32)


class Stop(BaseException):
    """Work ends here, as if killed: no Exception, so nothing may swallow it."""


def stop(*args, **kwargs):
    raise Stop


def quiet(text: str) -> None:
    pass


def write_phantom(folder: Path, seed: int = 0, shape=(12, 64, 64)) -> Path:
    """A file with `raw` and `labels`, of voxels of NM that it does not state."""
    phantom = make_phantom(PhantomConfig(shape=shape, voxel_size_nm=NM, seed=seed))
    path = folder / f"phantom{seed}.h5"
    with h5py.File(path, "w") as file:
        file["raw"], file["labels"] = phantom.raw, phantom.labels
    return path


def raw_of(path: Path, **values) -> Source:
    return Source(path=f"{path}:raw", **{"voxel_size_nm": NM, **values})


def labelled(path: Path, **values) -> LabelledSource:
    return LabelledSource(**{"raw": raw_of(path), "labels": f"{path}:labels", **values})


def schedule(steps: int, **values) -> Schedule:
    return Schedule(**{"steps": steps, "batch": 2, "rate": 3e-3, "warmup": min(3, steps - 1), "report_every": 5,
                       "validate_every": 8, "checkpoint_every": 3} | values)  # fmt: skip


def pretrain_config(path: Path, steps: int = 4, **values) -> Pretrain:
    values = {"volumes": (raw_of(path),), "held_out": (raw_of(path, box="4:12,:,:"),), "crop": CROP, "model": MAE,
              "schedule": schedule(steps)} | values  # fmt: skip
    return Pretrain(**values)


def finetune_config(path: Path, steps: int = 4, **values) -> Finetune:
    values = {"training": (labelled(path),), "validation": (labelled(path),), "crop": CROP, "model": SEGMENTER,
              "target": Affinities(offsets=(*NEAREST, (0, -4, 0))), "schedule": schedule(steps),
              "decoders": (Agglomeration(fragments="sections"),)} | values  # fmt: skip
    return Finetune(**values)


def untrained_run(folder: Path, *, voxel_size_nm=NM, threshold=0.5, seed=0, **values) -> Run:
    """A finished fine-tuning run whose network never learned anything."""
    values = {"training": (labelled(Path("gone.h5")),), "crop": CROP, "model": SEGMENTER,
              "target": Affinities(offsets=(*NEAREST, (0, -4, 0))), "decoders": (Agglomeration(threshold=threshold),),
              "normalisation": Normalisation(per="dtype"), "augmentation": Augmentation()} | values  # fmt: skip
    config = Finetune(**values)
    run = create_run(folder, config, resume=False, overwrite=False, kind="finetune", voxel_size_nm=voxel_size_nm)
    torch.manual_seed(seed)
    model = Segmenter(config.model, config.target.channels, voxel_size_nm)
    model.head.weight.data *= 20  # answers from 0 to 1, not all near a half
    run.save_weights(model)
    return run


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
