"""Recipes for a lab's own volumes: shapes follow the voxels, everything else is the default.

The volumes are given on the command line (`emae pretrain isotropic my.tif --out runs/mae`); the paths here are the
phantom's, so that each recipe is a whole configuration that can be run as it is.
"""

from emae._augment import Augmentation
from emae._experiments import Finetune, Pretrain, Schedule
from emae._sampling import LabelledSource, Source
from emae._targets import NEAREST, Affinities
from emae.models._mae import MaeConfig
from emae.models._segmenter import SegmenterConfig
from emae.models._vit import VitConfig

ISOTROPIC_ENCODER = VitConfig(patch=(8, 8, 8))
SECTIONS_ENCODER = VitConfig(patch=(2, 16, 16))
ISOTROPIC = SegmenterConfig(encoder=ISOTROPIC_ENCODER, stem=(2, 2, 2), channels=(32, 64, 128))
SECTIONS = SegmenterConfig(encoder=SECTIONS_ENCODER, stem=(1, 4, 4), channels=(48, 96, 128))
ISOTROPIC_TARGET = Affinities(offsets=(
    *NEAREST, (-3, 0, 0), (0, -3, 0), (0, 0, -3), (-9, 0, 0), (0, -9, 0), (0, 0, -9)))
SECTIONS_TARGET = Affinities(offsets=(
    *NEAREST, (-2, 0, 0), (0, -5, 0), (0, 0, -5), (-3, 0, 0), (0, -15, 0), (0, 0, -15)))


def pretrain_isotropic() -> Pretrain:
    """A masked autoencoder for near-cubic voxels: patch 8^3, crop 64^3; 26 minutes of one core."""
    return Pretrain(volumes=(Source(path="phantom/train"),), crop=(64, 64, 64),
                    model=MaeConfig(encoder=ISOTROPIC_ENCODER),
                    schedule=Schedule(steps=5000, batch=4, rate=1.5e-3, warmup=300, validate_every=1000,
                                      checkpoint_every=250))


def finetune_isotropic() -> Finetune:
    """A segmenter for near-cubic voxels; 35 minutes of one core."""
    return Finetune(training=(LabelledSource(raw=Source(path="phantom/train")),),
                    validation=(LabelledSource(raw=Source(path="phantom/validation")),), crop=(64, 64, 64),
                    model=ISOTROPIC, target=ISOTROPIC_TARGET,
                    schedule=Schedule(steps=2000, batch=2, rate=1e-3, warmup=100, validate_every=500,
                                      checkpoint_every=250))


def pretrain_sections() -> Pretrain:
    """A masked autoencoder for serial sections: patch 2 x 16 x 16, crop 8 x 160 x 160; 21 minutes of one core."""
    return Pretrain(volumes=(Source(path="phantom/train"),), crop=(8, 160, 160),
                    model=MaeConfig(encoder=SECTIONS_ENCODER),
                    schedule=Schedule(steps=5000, batch=4, rate=1.5e-3, warmup=300, validate_every=1000,
                                      checkpoint_every=250))


def finetune_sections() -> Finetune:
    """A segmenter for serial sections; 24 minutes of one core."""
    return Finetune(training=(LabelledSource(raw=Source(path="phantom/train")),),
                    validation=(LabelledSource(raw=Source(path="phantom/validation")),), crop=(8, 160, 160),
                    model=SECTIONS, target=SECTIONS_TARGET,
                    augmentation=Augmentation(blur=0.2, missing_section=0.1),
                    schedule=Schedule(steps=2000, batch=2, rate=1e-3, warmup=100, validate_every=500,
                                      checkpoint_every=250))
