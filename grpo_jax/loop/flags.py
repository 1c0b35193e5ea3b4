"""Flags of a command: their names, their help, and their place in error messages."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from grpo_jax.config.files import parse_value
from grpo_jax.config.run import Preset

MOST_FLAGS, MOST_NAMES = 3, 40


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        flag: as it is typed, such as ``--optimizer.learning-rate``.
        path: the names of the fields that lead to the setting, such as ``("optimizer", "learning_rate")``.
        owner: the dataclass that the last of them belongs to.
        is_rare: whether it is left out of the help and of tyro's parser, as settings marked ``tyro.conf.Suppress`` are.
    """

    flag: str
    path: tuple[str, ...]
    owner: type
    is_rare: bool = False

    @property
    def help(self) -> str:
        """The docstring of the field."""
        return " ".join(field_docs(self.owner).get(self.path[-1], "").split())

    def value(self, config: Any) -> str:
        """The value of the setting in a configuration, as text.

        Args:
            config: of the command.
        """
        for name in self.path:
            config = getattr(config, name)
        return "none" if config is None or config == () else str(config)

    @property
    def names(self) -> set[str]:
        """What messages may call the setting: its field alone, its path with dots, its flag without dashes."""
        return {self.path[-1], ".".join(self.path), self.flag.removeprefix("--").replace("-", "_")}


@cache
def field_docs(owner: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, those of its bases included.

    Args:
        owner: the dataclass.
    """
    docs: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        if dataclasses.is_dataclass(each):
            body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, text in pairwise(body.body):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    match text:
                        case ast.Expr(ast.Constant(str(doc))):
                            docs[field.target.id] = doc
    return docs


def flags_of(config_type: type) -> list[Flag]:
    """The flags of a dataclass with nested ones: those that tyro makes, and the rare ones."""
    return [*_flags(config_type, "", (), is_rare=False)]


def _flags(owner: type, prefix: str, path: tuple[str, ...], *, is_rare: bool) -> Iterator[Flag]:
    hints = get_type_hints(owner, include_extras=True)
    for field in dataclasses.fields(owner):
        hint, name, rare = hints[field.name], field.name, is_rare
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
            rare = is_rare or tyro.conf.Suppress in marks
            named = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
            name = named[0] if named else name
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        inner = next((each for each in options if isinstance(each, type) and dataclasses.is_dataclass(each)), None)
        own = (*path, field.name)
        if inner is None:
            yield Flag(f"--{prefix}{name}".replace("_", "-"), own, owner, rare)
        else:
            yield from _flags(inner, f"{prefix}{name}." if name else prefix, own, is_rare=rare)


def take_rare(flags: Sequence[Flag], args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings given by rare flags, nested as in a settings file, and the other arguments.

    Args:
        flags: of the command.
        args: of the command.

    Raises:
        ValueError: a rare flag has no value.
    """
    rare = {flag.flag: flag for flag in flags if flag.is_rare}
    settings: dict[str, Any] = {}
    rest = list(args)
    for number in reversed(range(len(rest))):
        name, has_value, value = rest[number].partition("=")
        flag = rare.get(name.replace("_", "-"))
        if flag is None:
            continue
        end = number + 1
        while not has_value and end < len(rest) and not rest[end].startswith("--"):
            end += 1
        texts = [value] if has_value else rest[number + 1 : end]
        if not texts:
            raise ValueError(f"{name} needs a value")
        is_list = "tuple" in str(get_type_hints(flag.owner)[flag.path[-1]])  # of its bases too
        values = [parse_value(text) for text in texts]
        inner = settings
        for each in flag.path[:-1]:
            inner = inner.setdefault(each, {})
        inner.setdefault(flag.path[-1], values if is_list else values[0] if len(values) == 1 else values)
        del rest[number:end]
    return settings, rest


def short_help(
    config_type: type, description: str, presets: Mapping[str, Preset], common: Sequence[str], args: Sequence[str]
) -> str:
    """The text of ``--help``: usage, presets, common flags, and the names of all others by group.

    Args:
        config_type: a dataclass.
        description: of the command.
        presets: configurations by name.
        common: the flags to explain.
        args: the first argument may name a preset, whose values are then shown as defaults.

    Raises:
        ValueError: a common flag does not exist.
    """
    width = min(shutil.get_terminal_size((110, 40)).columns, 120)
    preset = presets.get(args[0]) if args else None
    default = config_type() if preset is None else preset.config()
    flags = {flag.flag: flag for flag in flags_of(config_type) if not flag.is_rare}
    missing = [flag for flag in common if flag not in flags]
    if missing:
        raise ValueError(f"there are no flags {missing}")
    lines = [f"usage: {Path(sys.argv[0]).name} {'[PRESET] ' if presets else ''}[--config FILE] [flags]", ""]
    lines += [description.strip(), ""]
    if preset is not None:
        lines += [f"preset {args[0]}: {preset.summary}"]
        facts = ("paper", "hardware", "memory", "cost", "score")
        lines += [f"  {name}: {getattr(preset, name)}" for name in facts if getattr(preset, name)]
    elif presets:
        lines += ["presets (PRESET --help tells more; toy is used if neither a preset, --model nor --config is given):"]
        lines += [f"  {name:<16} {each.summary}" for name, each in presets.items()]
    lines += ["", "common flags:"]
    for name in common:
        flag = flags[name]
        text = f"{flag.help} [{flag.value(default)}]"
        wrapped = textwrap.wrap(text, width - 32) or [""]
        lines += [f"  {name:<28}  {wrapped[0]}", *(f"{'':<32}{line}" for line in wrapped[1:])]
    others: dict[str, list[str]] = {}
    for name, flag in flags.items():
        if name not in common:
            others.setdefault(flag.path[0] if len(flag.path) > 1 else "run", []).append(name)
    lines += ["", "other flags, by group (--help-all explains all):"]
    for group, names in others.items():
        prefix = f"--{group.replace('_', '-')}."
        is_stage = len(names) > MOST_NAMES and all(name.startswith(prefix) for name in names)
        lines += textwrap.wrap(
            f"{group}: {f'{len(names)} flags {prefix}*' if is_stage else ' '.join(names)}",
            width - 2,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
    lines += rare_names(flags_of(config_type), width)
    return "\n".join([*lines, "", "--debug shows the traceback of an error."])


def rare_names(flags: Sequence[Flag], width: int) -> list[str]:
    """Lines that name the rare flags, by their first field.

    Args:
        flags: of the command.
        width: of the lines in characters.
    """
    groups: dict[str, list[str]] = {}
    for flag in flags:
        if flag.is_rare:
            prefix, dot, _ = flag.flag.rpartition(".")
            groups.setdefault(f"{prefix}.*" if dot else flag.flag, []).append(flag.flag)
    names = [f"{name} ({len(group)})" if name.endswith(".*") else name for name, group in groups.items()]
    text = f"rarely changed (--help-rare explains them): {' '.join(names)}"
    return textwrap.wrap(text, width - 2, subsequent_indent="    ", break_on_hyphens=False) if names else []


def rare_help(config_type: type, default: Any) -> str:
    """The text of ``--help-rare``: rare flags with their defaults.

    Args:
        config_type: a dataclass.
        default: has the values that are shown as defaults; None for those of ``config_type``.
    """
    width = min(shutil.get_terminal_size((110, 40)).columns, 120)
    default = config_type() if default is None else default
    lines = ["flags that are rarely changed, and usually in a file for --config:"]
    for flag in flags_of(config_type):
        if flag.is_rare:
            lines.append(f"  {flag.flag}")
            lines += textwrap.wrap(
                f"{flag.help} [{flag.value(default)}]", width - 8, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def in_flags(text: str, flags: Sequence[Flag], *, typed: Sequence[str] = (), owner: type | None = None) -> str:
    """A message with flags in the place of names of settings.

    Names with an underscore or a dot are replaced wherever they stand by themselves, outside quotes and paths. Names of
    one word are replaced where a message begins with them and says what they are or must be.

    Args:
        text: the message.
        flags: those of the command.
        typed: the arguments of the command. Where several flags set fields of one name, those among the arguments are
            meant, or else those with the fewest dots.
        owner: the dataclass whose fields the message is about, if that is known.
    """
    of_name: dict[str, list[Flag]] = {}
    for flag in flags:
        for name in flag.names:
            of_name.setdefault(name, []).append(flag)
    given = {each.partition("=")[0].replace("_", "-").replace("--no-", "--") for each in typed}

    def flag_of(name: str) -> str:
        found = of_name[name]
        for narrower in (
            [flag for flag in found if owner is not None and issubclass(owner, flag.owner)],
            [flag for flag in found if any(flag.flag == each or _without_no(flag.flag, each) for each in given)],
        ):
            found = narrower or found
        fewest = min(flag.flag.count(".") for flag in found)
        meant = dict.fromkeys(flag.flag for flag in found if flag.flag.count(".") == fewest or flag.flag in given)
        return " or ".join([*meant][:MOST_FLAGS])

    several = sorted((name for name in of_name if "_" in name or "." in name), key=len, reverse=True)
    if several:
        alone = rf"(?<![\w./\\'\"`-])({'|'.join(map(re.escape, several))})(?![\w/\\'\"`(]|\.\w|-\w)(= )?"
        text = re.sub(alone, lambda found: flag_of(found[1]) + (" " if found[2] else ""), text)
    first = re.match(r"([a-z]\w*)(?=(:| is| are| has| holds| needs| must|=))", text)
    if first is not None and first[1] in of_name:
        text = flag_of(first[1]) + text[first.end() :]
    return text


def _without_no(flag: str, given: str) -> bool:
    """Whether an argument is the negation of a flag, as in ``--data.no-packing``."""
    return given.replace(".no-", ".") == flag
