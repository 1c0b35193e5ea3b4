"""Settings from YAML or JSON files, applied to a configuration with their types checked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

AnyConfig = TypeVar("AnyConfig")


def _loader(source: str) -> Any:
    """A YAML loader that reads 1e-6 as a number and refuses a key that a mapping has twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                raise ValueError(f"{source}: {twice} occur twice in one mapping")
            return super().construct_mapping(node, deep)

    # YAML 1.1 reads 1e-6 as a string: its floats have a dot.
    number = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def parse_value(text: str) -> Any:
    """A value as a settings file has it: ``0.5``, ``none``, ``true`` or text.

    Args:
        text: of a command line.
    """
    import yaml

    if text.lower() == "none":
        return None
    try:
        return yaml.load(text, _loader(text))
    except yaml.YAMLError:
        return text


def read_settings_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a mapping with string keys, or names a key twice.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        read = yaml.load(path.read_text(), _loader(str(path)))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise ValueError(f"{path} must be a mapping of settings")
    return read


def with_settings(config: AnyConfig, settings: Mapping[str, Any], where: str) -> AnyConfig:
    """``config`` with the settings of a mapping, nested as ``config.json`` of a run has them.

    Args:
        config: a dataclass, perhaps with nested ones.
        settings: values by field name; those that are missing stay as they are.
        where: the source, for errors.

    Raises:
        ValueError: a setting is unknown or has a value of the wrong type; and as the dataclass raises.
    """
    assert dataclasses.is_dataclass(config)
    assert not isinstance(config, type)
    hints = get_type_hints(type(config), include_extras=True)
    names = sorted(field.name for field in dataclasses.fields(config))  # class variables have hints too
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    unknown = next((name for name in settings if name not in names), None)
    if unknown is not None:
        paths = [f"{path}.{unknown}" for path in _holders(config, unknown)]
        hint = f"it is nested, as {' or '.join(map(repr, paths))}" if paths else f"the settings are {names}"
        raise ValueError(f"{where}: {unknown!r} is not a setting; {hint}")
    changes = {}
    for name, value in settings.items():
        inner = getattr(config, name)
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            changes[name] = with_settings(inner, value, f"{where}, {name}")
        else:
            changes[name] = typed(name, value, hints[name], where)
    try:
        return replace(config, **changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _holders(config: Any, name: str) -> list[str]:
    """Paths of the nested dataclasses that have a field of this name."""
    found = []
    for field in dataclasses.fields(config):
        inner = getattr(config, field.name)
        if dataclasses.is_dataclass(inner):
            if name in {each.name for each in dataclasses.fields(inner)}:
                found.append(field.name)
            found += [f"{field.name}.{path}" for path in _holders(inner, name)]
    return found


def typed(name: str, value: Any, annotation: Any, where: str) -> Any:
    """A JSON value as its field holds it: lists as tuples, strings as paths, whole numbers as floats.

    Args:
        name: of the field.
        value: from a file.
        annotation: the type of the field.
        where: the source, for errors.

    Raises:
        ValueError: the value does not have the type.
    """
    from pydantic import TypeAdapter, ValidationError

    annotation = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    try:
        return TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        raise ValueError(f"{where}: {name} is {value!r}; it must be {_described(annotation)}") from None


def _described(annotation: Any) -> str:
    """A type as a user would say it, such as "refuse or skip", or as Python does."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_described(each) for each in get_args(annotation) if each is not NoneType)
    wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"typing\.|pathlib\.", "", wanted).replace("tuple[", "list[")
