"""Config: the frozen pydantic base of every configuration, and its one override.

A configuration lives beside what it configures. Unknown keys are refused, with the nearest known name.
"""

import difflib
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

C = TypeVar("C", bound="Config")

Count = Annotated[int, pydantic.Field(ge=1)]
Sides = tuple[Count, Count, Count]
"""voxels, z y x, at least one on each axis"""


class Config(pydantic.BaseModel):
    """A frozen record. Equality is by value; `model_dump_json` of it repeats the run it configured."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def nearest_name(name: str, known: typing.Iterable[str]) -> str:
    """', did you mean ...?' for the nearest of `known`, or the list of all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)


def parse_config(cls: type[C], values: dict, where: str) -> C:
    """`cls(**values)` whose errors are one readable ValueError naming `where` (a file, `--set`)."""
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        lines = []
        for fault in error.errors():
            path = ".".join(str(part) for part in fault["loc"])
            if fault["type"] == "extra_forbidden":
                owner = _owner(cls, values, fault["loc"][:-1])
                hint = nearest_name(str(fault["loc"][-1]), owner.model_fields) if owner else ""
                lines.append(f"unknown key {path!r}; {hint}")
            else:
                message = fault["msg"].removeprefix("Value error, ")
                lines.append(f"{path}: {message}" if path else message)
        raise ValueError(f"{where}: " + "; ".join(lines)) from None


def load_config(cls: type[C], path: str | Path) -> C:
    """Read a configuration's JSON file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    return parse_config(cls, read_object(path), str(path))


def read_object(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: want a JSON object, got {type(values).__name__}")
    return values


def override(config: C, assignments: typing.Sequence[str]) -> C:
    """The configuration with `a.b=value` applied; values are JSON, or plain text where they are not.

    override(config, ["optimiser.rate=1e-4", "crop=[32,160,160]"])
    """
    values = config.model_dump(mode="json")
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: want a.b=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *parents, last = path.split(".")
        target: Any = values
        for part in parents:
            target = _step(target, part, path)
        if isinstance(target, list):
            _step(target, last, path)
            target[int(last)] = value
        elif isinstance(target, dict):
            _step(target, last, path)
            target[last] = value
        else:
            raise ValueError(f"--set {path}: {parents[-1] if parents else path!r} holds a value, not a group")
    return parse_config(type(config), values, "--set")


def _step(target: Any, part: str, path: str) -> Any:
    if isinstance(target, dict):
        if part not in target:
            raise ValueError(f"--set {path}: no {part!r} here; {nearest_name(part, target)}")
        return target[part]
    if isinstance(target, list):
        if not part.isdigit() or int(part) >= len(target):
            raise ValueError(f"--set {path}: {part!r} is no index of a list of {len(target)}")
        return target[int(part)]
    raise ValueError(f"--set {path}: nothing lies under {part!r}")


def _owner(cls: type[Config], values: Any, path: tuple) -> type[Config] | None:
    """The Config class that owns the keys at `path` (through optionals, unions by `kind`, lists)."""
    owner: type[Config] | None = cls
    for part in path:
        if isinstance(part, int):
            values = values[part] if isinstance(values, list) and part < len(values) else None
            continue
        if owner is None or part not in owner.model_fields:
            continue  # pydantic puts the tag of a union into the path
        values = values.get(part) if isinstance(values, dict) else None
        options = [c for c in _classes(owner.model_fields[part].annotation) if issubclass(c, Config)]
        kind = values.get("kind") if isinstance(values, dict) else None
        owner = next((c for c in options if "kind" in c.model_fields and c.model_fields["kind"].default == kind),
                     options[0] if options else None)
    return owner


def _classes(annotation: Any) -> list[type]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated, list, tuple, dict):
        return [c for part in typing.get_args(annotation) for c in _classes(part)]
    return [annotation] if isinstance(annotation, type) else []
