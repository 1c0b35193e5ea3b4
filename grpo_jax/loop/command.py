"""The command line of an experiment: settings by tyro, and errors as one message that names flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import jax
import tyro

DEBUG, DEBUG_VARIABLE = "--debug", "GRPO_JAX_DEBUG"
MISTAKE, BUG, INTERRUPTED = 2, 1, 130
"""Exit statuses: settings, data, files or results that a user can change; any other exception; Ctrl-C."""
MOST_CHARACTERS = 4000
MOST_FLAGS = 3
AnyConfig = TypeVar("AnyConfig")


def run_command(
    config_type: type[AnyConfig],
    main: Callable[[AnyConfig], int | None],
    *,
    description: str | None,
    args: Sequence[str] | None = None,
) -> int:
    """Parse a command line, run an experiment, and report an error as one message on stderr.

    In a message, names of settings become the flags that set them: ``num_prompts`` becomes ``--num-prompts``. With
    ``--debug`` among the arguments, or ``GRPO_JAX_DEBUG=1`` in the environment, the traceback comes first. Exceptions
    that are not a user's mistake always come with their traceback.

    Args:
        config_type: a dataclass whose fields become flags.
        main: runs the experiment and returns its exit status; None counts as 0.
        description: the text at the head of ``--help``.
        args: the arguments after the program's name; by default those of the process.

    Returns:
        What ``main`` returns; 2 for a mistake in settings, data or files, or a result that is not finite; 1 for any
        other exception; 130 after Ctrl-C.

    Raises:
        SystemExit: with status 2 for an unknown flag or a value that cannot be parsed, after tyro's own message; with
            status 0 after ``--help``.
    """
    given = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in given or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    given = [each for each in given if each != DEBUG]
    about = f"{(description or '').rstrip()}\n\n{DEBUG} shows the traceback of an error."
    try:
        config = _parse(config_type, given, about)
        check_numbers(config)
        return main(config) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        is_mistake = _is_mistake(error)
        if debug or not is_mistake:
            traceback.print_exception(error)
        text = in_flags(_text_of(error), flags_of(config_type), typed=given, owner=_checked_class(error))
        if len(text) > MOST_CHARACTERS:
            text = f"{text[:MOST_CHARACTERS]} ... [{len(text):,} characters]"
        print(f"error: {text}", file=sys.stderr)
        if not debug and is_mistake:
            print(f"({DEBUG} shows the traceback)", file=sys.stderr)
        return MISTAKE if is_mistake else BUG


def check_numbers(config: Any, name: str = "") -> None:
    """Check that no setting is NaN, which no comparison with a bound finds.

    Raises:
        ValueError: one is; it says which.
    """
    if isinstance(config, float) and math.isnan(config):
        raise ValueError(f"{name} is nan; it must be a number")
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            check_numbers(getattr(config, field.name), field.name)


def _parse(config_type: type[AnyConfig], args: Sequence[str], description: str) -> AnyConfig:
    """The configuration; errors of ``__post_init__`` are raised, all others end the process as tyro does."""
    said = io.StringIO()
    try:
        # tyro prints some errors of __post_init__ in a box, with names that are not flags, and raises the others.
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_type, args=args, description=description)
    except SystemExit as ended:
        cause = ended.__context__
        while cause is not None and not (isinstance(cause, ValueError) and _checked_class(cause)):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise


def _checked_class(error: BaseException) -> type | None:
    """The dataclass in whose ``__post_init__`` an error was raised; None if it was not."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "__post_init__":
            found = type(frame.f_locals.get("self"))
    return found


def _is_mistake(error: Exception) -> bool:
    if isinstance(error, KeyError):  # of a lookup that failed, the only argument is the key
        return bool(error.args) and " " in str(error.args[0])
    mistakes = (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError, MemoryError)
    return isinstance(error, mistakes) or type(error) is RuntimeError or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _text_of(error: Exception) -> str:
    if _is_out_of_memory(error):
        return (
            f"a device is out of memory: {str(error).splitlines()[0][:300]}. More micro-batches, shorter lengths, "
            "fewer samples at once (cache_bytes), or more devices (mesh) take less"
        )
    if isinstance(error, MemoryError):
        return f"the host is out of memory: {error}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text if _is_mistake(error) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        flag: as it is typed, such as ``--optimizer.learning-rate``.
        path: the names of the fields that lead to the setting, such as ``("optimizer", "learning_rate")``.
        owner: the dataclass that the last of them belongs to.
    """

    flag: str
    path: tuple[str, ...]
    owner: type

    @property
    def names(self) -> set[str]:
        """What messages may call the setting: its field alone, its path with dots, its flag without dashes."""
        return {self.path[-1], ".".join(self.path), self.flag.removeprefix("--").replace("-", "_")}


def flags_of(config_type: type) -> list[Flag]:
    """The flags that tyro makes of a dataclass with nested ones."""
    return [*_flags(config_type, "", ())]


def _flags(owner: type, prefix: str, path: tuple[str, ...]) -> Iterator[Flag]:
    hints = get_type_hints(owner, include_extras=True)
    for field in dataclasses.fields(owner):
        hint, name = hints[field.name], field.name
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
            named = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
            name = named[0] if named else name
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        inner = next((each for each in options if isinstance(each, type) and dataclasses.is_dataclass(each)), None)
        own = (*path, field.name)
        if inner is None:
            yield Flag(f"--{prefix}{name}".replace("_", "-"), own, owner)
        else:
            yield from _flags(inner, f"{prefix}{name}." if name else prefix, own)


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
