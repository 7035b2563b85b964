"""FIB-25 sample 2: neurons in isotropic 10 nm FIB-SEM (Takemura et al. 2015). Figures: docs/log.md."""

from emae._experiments import Finetune, Pretrain
from emae._sampling import LabelledSource, Source
from emae.recipes import general


def pretrain() -> Pretrain:
    """Inductive: most of the unlabelled cube and the training slab; held out: the cube's last 64 sections."""
    base = general.pretrain_isotropic()
    return base.model_copy(update={
        "volumes": (Source(path="fib25-unlabelled", box="0:352,:,:"), Source(path="fib25/train")),
        "held_out": (Source(path="fib25-unlabelled", box="352:416,:,:"),), "crop": (64, 64, 64)})


def finetune() -> Finetune:
    """All of the training slab's labels (7.5 M voxels); threshold chosen on the validation slab."""
    base = general.finetune_isotropic()
    return base.model_copy(update={
        "training": (LabelledSource(raw=Source(path="fib25/train")),),
        "validation": (LabelledSource(raw=Source(path="fib25", box="60:150,:,:"), labels="fib25/validation",
                                      offset_vx=(60, 0, 0)),), "crop": (64, 64, 64)})
