"""The embedded default: synthetic tissue, no data needed. `make demo` runs it."""

from emae._experiments import Finetune, Pretrain, Schedule
from emae._sampling import Source
from emae.recipes import general


def pretrain() -> Pretrain:
    """About two minutes on 2 cores; ends below interpolation on held-out tissue."""
    base = general.pretrain_sections()
    return base.model_copy(update={
        "volumes": (Source(path="phantom/train"),), "held_out": (Source(path="phantom/validation"),),
        "schedule": Schedule(steps=400, batch=4, warmup=40, validate_every=100, checkpoint_every=100)})


def finetune() -> Finetune:
    """About two minutes on 2 cores."""
    base = general.finetune_sections()
    return base.model_copy(update={
        "schedule": Schedule(steps=200, batch=2, warmup=20, validate_every=50, checkpoint_every=100)})
