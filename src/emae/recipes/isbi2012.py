"""ISBI 2012: neurons in serial sections of 50 x 4 x 4 nm (Cardona et al. 2010). Figures: docs/log.md."""

from emae._experiments import Finetune, Pretrain
from emae._sampling import LabelledSource, Source
from emae.recipes import general


def pretrain() -> Pretrain:
    """Inductive: 22 sections of the unlabelled stack and training sections 0-9; held out: the stack's last 8."""
    base = general.pretrain_sections()
    return base.model_copy(update={
        "volumes": (Source(path="isbi2012-test", box="0:22,:,:"), Source(path="isbi2012/train")),
        "held_out": (Source(path="isbi2012-test", box="22:30,:,:"),)})


def finetune() -> Finetune:
    """Ten labelled sections; threshold chosen on sections 10 and 11."""
    base = general.finetune_sections()
    return base.model_copy(update={
        "training": (LabelledSource(raw=Source(path="isbi2012/train")),),
        "validation": (LabelledSource(raw=Source(path="isbi2012", box="4:12,:,:"), labels="isbi2012/validation",
                                      offset_vx=(6, 0, 0)),)})
