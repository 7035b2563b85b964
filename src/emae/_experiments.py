"""The assembled experiment records: one for pre-training, one for fine-tuning. Each checks that its parts fit."""

import typing
from typing import Annotated, Any, Literal

import pydantic

from emae._augment import Augmentation
from emae._config import Config, Count, Sides, parse_config
from emae._decode import CANDIDATES, Agglomeration
from emae._normalise import Normalisation
from emae._patches import grid_shape
from emae._sampling import LabelledSource, Source
from emae._targets import NEAREST, Target
from emae.models._mae import MaeConfig
from emae.models._segmenter import SegmenterConfig

Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]


class Schedule(Config):
    """How long, how fast, how often to look."""

    steps: Count = 1000
    batch: Count = 4
    """crops a step"""
    rate: Annotated[float, pydantic.Field(gt=0)] = 1e-3
    """the highest learning rate; linear warm-up to it, cosine from it to 0"""
    warmup: Annotated[int, pydantic.Field(ge=0)] = 100
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.05
    clip: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """largest gradient norm"""
    report_every: Count = 20
    """steps between lines of metrics.jsonl"""
    validate_every: Count = 200
    """steps between looks at held-out data"""
    checkpoint_every: Count = 200
    """steps between checkpoints"""

    @pydantic.model_validator(mode="after")
    def _ends(self) -> "Schedule":
        if self.warmup >= self.steps:
            raise ValueError(f"a warm-up of {self.warmup} steps never ends in {self.steps}; set schedule.warmup lower")
        return self


class Pretrain(Config):
    """A masked autoencoder on unlabelled volumes."""

    kind: Literal["pretrain"] = "pretrain"
    volumes: Annotated[tuple[Source, ...], pydantic.Field(min_length=1)]
    held_out: tuple[Source, ...] = ()
    """raw never trained on, where the loss and its trivial baselines are compared"""
    crop: Sides
    hidden_ratio: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.75
    model: MaeConfig = MaeConfig()
    normalisation: Normalisation = Normalisation()
    augmentation: Augmentation = Augmentation(contrast=0, brightness=0, section_jitter=0, noise=0)
    schedule: Schedule = Schedule()
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> "Pretrain":
        if self.augmentation.noise or self.augmentation.missing_section:
            raise ValueError("augmentation.noise and .missing_section change what is to be reconstructed; leave them 0")
        tokens = grid_shape(self.crop, self.model.encoder.patch)
        if tokens[0] * tokens[1] * tokens[2] < 4:
            raise ValueError(f"a crop of {self.crop} holds {tokens} patches of {self.model.encoder.patch}; "
                             "want 4 or more")
        return self


class Finetune(Config):
    """A segmenter on labelled cubes, started from a pre-training run or from scratch."""

    kind: Literal["finetune"] = "finetune"
    training: Annotated[tuple[LabelledSource, ...], pydantic.Field(min_length=1)]
    validation: tuple[LabelledSource, ...] = ()
    """labels never trained on: the loss is watched and the decoder's threshold chosen there"""
    crop: Sides
    model: SegmenterConfig = SegmenterConfig()
    target: Target = Target(offsets=NEAREST)
    decoders: Annotated[tuple[Agglomeration, ...], pydantic.Field(min_length=1)] = CANDIDATES
    """the validation labels choose one of these and its threshold"""
    normalisation: Normalisation = Normalisation()
    augmentation: Augmentation = Augmentation()
    schedule: Schedule = Schedule()
    encoder_rate: Fraction = 1.0
    """learning rate of the transferred encoder, as a share of the rest"""
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> "Finetune":
        grid_shape(self.crop, self.model.encoder.patch)
        missing = [o for o in NEAREST if o not in self.target.offsets]
        if missing:
            raise ValueError(f"agglomeration needs the nearest offsets; target.offsets lacks {missing}")
        return self


Experiment = Annotated[Pretrain | Finetune, pydantic.Field(discriminator="kind")]
KINDS: dict[str, type[Config]] = {"pretrain": Pretrain, "finetune": Finetune}


def parse_experiment(values: Any, where: str) -> Pretrain | Finetune:
    """The record named by its `kind`; ValueError names `where` and the fault."""
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{where}: kind is {kind!r}, want one of {', '.join(KINDS)}")
    return typing.cast(Any, parse_config(KINDS[kind], values, where))
