"""Config: what it refuses, what it says, and the one override."""

from typing import Annotated, Literal

import pydantic
import pytest

from emae._config import Config, load_config, override, parse_config
from emae._experiments import Finetune, Pretrain, parse_experiment
from emae.recipes import RECIPES, recipe


class Left(Config):
    kind: Literal["left"] = "left"
    width: int = 3


class Right(Config):
    kind: Literal["right"] = "right"
    height: float = 1.5


class Whole(Config):
    name: str = "a"
    shape: tuple[int, int, int] = (1, 2, 3)
    part: Annotated[Left | Right, pydantic.Field(discriminator="kind")] = Left()
    more: tuple[Left, ...] = ()
    maybe: Left | None = None


def test_frozen_and_equal_by_value():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Whole().name = "b"
    assert Whole() == Whole() and Whole(name="b") != Whole()
    assert Whole.model_validate_json(Whole(part=Right(height=2)).model_dump_json()) == Whole(part=Right(height=2))
    with pytest.raises(pydantic.ValidationError):
        Right(height=float("nan"))


@pytest.mark.parametrize("values, wanted", [
    ({"nam": "b"}, "unknown key 'nam'; did you mean 'name'?"),
    ({"zzz": 1}, "unknown key 'zzz'; known: name, shape"),
    ({"part": {"kind": "right", "heigth": 2}}, "did you mean 'height'?"),
    ({"part": {"kind": "left", "height": 2}}, "known: kind, width"),
    ({"more": [{"width": 1}, {"widht": 2}]}, "'more.1.widht'; did you mean 'width'?"),
    ({"maybe": {"wdth": 1}}, "did you mean 'width'?"),
    ({"shape": [1, 2]}, "shape.2: Field required"),
    ({"part": {"kind": "middle"}}, "part: "),
    ({"name": 3, "nam": 1}, "; "),
])
def test_faults_are_named_with_the_nearest_known_name(values, wanted):
    with pytest.raises(ValueError) as error:
        parse_config(Whole, values, "my.json")
    assert str(error.value).startswith("my.json: ") and wanted in str(error.value)


@pytest.mark.parametrize("assignments, expected", [
    (["name=b"], Whole(name="b")),
    (["name=b", "name=c"], Whole(name="c")),
    (["part.width=7"], Whole(part=Left(width=7))),
    (['part={"kind": "right", "height": 2}', "part.height=4"], Whole(part=Right(height=4))),
    (["shape=[4,5,6]"], Whole(shape=(4, 5, 6))),
    (["shape.1=9"], Whole(shape=(1, 9, 3))),
    (['maybe={"width": 2}'], Whole(maybe=Left(width=2))),
    (["name=a=b"], Whole(name="a=b")),
])
def test_override(assignments, expected):
    assert override(Whole(), assignments) == expected


@pytest.mark.parametrize("assignment, wanted", [
    ("name", "want a.b=value"),
    ("nmae=b", "did you mean 'name'?"),
    ("part.widht=1", "did you mean 'width'?"),
    ("part.width.x=1", "'width' holds a value"),
    ("name.x.y=1", "nothing lies under 'x'"),
    ("shape.3=1", "no index of a list of 3"),
    ("part.width=wide", "--set: part.left.width: "),
    ("name=7", "--set: name: "),
    ("maybe.width=1", "'maybe' holds a value"),
])
def test_override_says_what_is_wrong(assignment, wanted):
    with pytest.raises(ValueError) as error:
        override(Whole(), [assignment])
    assert wanted in str(error.value)


def test_load_config(tmp_path):
    path = tmp_path / "c.json"
    with pytest.raises(FileNotFoundError, match="no such configuration"):
        load_config(Whole, path)
    for text, wanted in [("{", "not JSON"), ("[1]", "want a JSON object, got list"), ('{"nam": 1}', "did you mean")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=wanted) as error:
            load_config(Whole, path)
        assert str(path) in str(error.value)
    path.write_text(Whole(name="b").model_dump_json())
    assert load_config(Whole, path) == Whole(name="b")


# ---- the assembled experiments


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("verb, cls", [("pretrain", Pretrain), ("finetune", Finetune)])
def test_every_recipe_is_a_valid_configuration_and_comes_back_from_json(name, verb, cls):
    config = getattr(recipe(name), verb)()
    assert type(config) is cls
    assert parse_experiment(config.model_dump(mode="json"), "here") == config  # recipes are copies: checked here
    assert cls.model_validate_json(config.model_dump_json()) == config
    assert recipe(name).pretrain().model.encoder == recipe(name).finetune().model.encoder, "a pair shares its encoder"


def test_unknown_recipe_and_kind():
    with pytest.raises(ValueError, match="did you mean 'isbi2012'"):
        recipe("isbi2021")
    with pytest.raises(ValueError, match="here: kind is None, want one of pretrain, finetune"):
        parse_experiment({}, "here")
    with pytest.raises(ValueError, match="kind is None"):
        parse_experiment([], "here")


@pytest.mark.parametrize("verb, assignment, wanted", [
    ("pretrain", "crop=[8,160,150]", "does not divide a crop of (8, 160, 150)"),
    ("finetune", "crop=[7,160,160]", "does not divide a crop of (7, 160, 160)"),
    ("pretrain", "crop=[2,16,32]", "want 4 or more"),
    ("pretrain", "hidden_ratio=1", "less than 1"),
    ("pretrain", "hidden_ratio=0", "greater than 0"),
    ("pretrain", "schedule.step=3", "did you mean 'steps'"),
    ("pretrain", "schedule.steps=0", "schedule.steps: "),
    ("pretrain", "model.encoder.widht=3", "did you mean 'width'"),
    ("pretrain", "volumes=[]", "volumes: "),
    ("finetune", "crop=[0,160,160]", "crop.0: "),
    ("pretrain", "model.encoder.patch=[0,16,16]", "model.encoder.patch.0: "),
    ("finetune", "training=[]", "training: "),
    ("finetune", "target.offsets=[[-1,0,0],[0,-1,0]]", "lacks [(0, 0, -1)]"),
    ("finetune", 'training=[{"raw": {"path": "phantom/train", "box": ":,:,:64"}}]', "needs its labels named"),
])
def test_parts_that_do_not_fit_are_refused(verb, assignment, wanted):
    with pytest.raises(ValueError) as error:
        override(getattr(recipe("sections"), verb)(), [assignment])
    assert wanted in str(error.value)
