"""Recipes: functions that return a whole typed configuration. The docstring gives what to expect of it.

Each recipe is a pair: `pretrain()` and `finetune()` of one module, that share the encoder. RECIPES names them all.
"""

from collections.abc import Callable
from typing import NamedTuple

from emae._config import nearest_name
from emae._experiments import Finetune, Pretrain
from emae.recipes import fib25, general, isbi2012, phantom


class Recipe(NamedTuple):
    """The two configurations of one data set or kind of tissue."""

    pretrain: Callable[[], Pretrain]
    finetune: Callable[[], Finetune]
    summary: str


RECIPES: dict[str, Recipe] = {
    "phantom": Recipe(phantom.pretrain, phantom.finetune, "the embedded default: minutes, no data needed"),
    "fib25": Recipe(fib25.pretrain, fib25.finetune, "FIB-25 neurons, 10 nm isotropic"),
    "isbi2012": Recipe(isbi2012.pretrain, isbi2012.finetune, "ISBI 2012 neurons, 50 x 4 x 4 nm sections"),
    "isotropic": Recipe(general.pretrain_isotropic, general.finetune_isotropic, "your own FIB-SEM (voxels near cubes)"),
    "sections": Recipe(general.pretrain_sections, general.finetune_sections, "your own serial sections (thick in z)"),
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest known one."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; {nearest_name(name, RECIPES)}")
    return RECIPES[name]
