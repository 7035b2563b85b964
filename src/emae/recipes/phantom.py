"""The embedded default: synthetic tissue, no data needed. `make demo` runs it.

Small patches and a small transformer, for minutes on a laptop; everything else is as for serial sections.
"""

from emae._decode import Agglomeration
from emae._experiments import Finetune, Pretrain, Schedule
from emae._sampling import Source
from emae.models._mae import MaeConfig
from emae.models._segmenter import SegmenterConfig
from emae.models._vit import VitConfig
from emae.recipes import general

ENCODER = VitConfig(patch=(2, 8, 8), width=96, depth=4, heads=4, wavelengths_nm=(128.0, 4096.0))


def pretrain() -> Pretrain:
    """About a minute on 2 cores; too short to end below good interpolation (docs/log.md)."""
    base = general.pretrain_sections()
    return base.model_copy(update={
        "volumes": (Source(path="phantom/train"),), "held_out": (Source(path="phantom/validation"),),
        "crop": (8, 96, 96),
        "model": MaeConfig(encoder=ENCODER, decoder_depth=2, decoder_heads=4),
        "schedule": Schedule(steps=600, batch=4, rate=2e-3, warmup=60, validate_every=100, checkpoint_every=100)})


def finetune() -> Finetune:
    """Two to three minutes on 2 cores; figures in docs/log.md."""
    base = general.finetune_sections()
    return base.model_copy(update={
        "crop": (8, 128, 128), "model": SegmenterConfig(encoder=ENCODER, stem=(1, 2, 2), channels=(32, 48, 96)),
        "decoders": (Agglomeration(),),
        "schedule": Schedule(steps=400, batch=2, rate=2e-3, warmup=40, validate_every=100, checkpoint_every=50)})
