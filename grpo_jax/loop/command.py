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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import tyro

from grpo_jax.config.files import read_settings_file, with_settings
from grpo_jax.config.run import DistributedConfig, Preset
from grpo_jax.heartbeat import TRY_AGAIN, await_verdict, report_failure
from grpo_jax.hosts import MissingProcessError
from grpo_jax.loop.flags import flags_of, in_flags, rare_help, short_help, take_rare
from grpo_jax.loop.stop import INTERRUPTED
from grpo_jax.tasks.toy_config import TOY

DEBUG, DEBUG_VARIABLE = "--debug", "GRPO_JAX_DEBUG"
MISTAKE, BUG = 2, 1
"""Exit statuses: settings, data, files or results that a user can change; any other exception."""
MOST_CHARACTERS = 4000
AnyConfig = TypeVar("AnyConfig")


def run_command(
    config_type: type[AnyConfig],
    main: Callable[[AnyConfig], int | None],
    *,
    description: str | None,
    presets: Mapping[str, Preset[AnyConfig]] = MappingProxyType({}),
    args: Sequence[str] | None = None,
) -> int:
    """Parse a command line, run an experiment, and report an error as one message on stderr.

    The first argument may be the name of a preset, which the flags override. Without one, the preset ``toy`` is used
    unless ``--model`` or ``--config`` is given: then flags that are not given have the defaults of ``config_type``.
    ``--config FILE`` reads settings from a YAML or JSON file, such as ``config.json`` of a run; flags override it.
    ``--help`` explains the flags in ``config_type.COMMON_FLAGS``, ``--help-all`` all but the rarely changed ones, which
    ``--help-rare`` explains. With ``--debug``, or
    ``GRPO_JAX_DEBUG=1`` in the environment, an error comes with its traceback; errors that are not a user's mistake
    always do. In messages, names of settings become flags: ``num_prompts`` becomes ``--num-prompts``.

    Args:
        config_type: a dataclass whose fields become flags.
        main: runs the experiment and returns its exit status; None counts as 0.
        description: the text at the head of ``--help``.
        presets: configurations by name.
        args: the arguments after the program's name; by default those of the process.

    Returns:
        What ``main`` returns; 2 for a mistake in settings, data or files, or a result that is not finite; 1 for any
        other exception; 130 after Ctrl-C. Of a run that was stopped after a step, ``main`` returns 130 after Ctrl-C or
        an alarm. 75 says that a launcher may start the command again: after SIGTERM, or if another process was lost.
        The process itself ends with 69 if it does not find the others.

    Raises:
        SystemExit: with status 2 for an unknown flag or a value that cannot be parsed, after tyro's own message; with
            status 0 after help.
    """
    given = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in given or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    given = [arg for arg in given if arg != DEBUG]
    common = getattr(config_type, "COMMON_FLAGS", "").split()
    if common and ("-h" in given or "--help" in given):
        print(short_help(config_type, description or "", presets, common, given[:1]))
        return 0
    wants_rare = "--help-rare" in given
    given = ["--help" if arg == "--help-all" else arg for arg in given if arg != "--help-rare"]
    try:
        rare, _ = take_rare(flags_of(config_type), given)
        if "distributed" in rare:  # first of all, since some settings compute when they are made
            distributed = with_settings(DistributedConfig(), rare["distributed"], "command line")
            distributed.connect()
        default, flags = starting_point(config_type, presets, given)
        if wants_rare:
            print(rare_help(config_type, default))
            return 0
        config = _parse(config_type, flags, description or "", default)
        _check_numbers(config)
        return main(config) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        report_failure("interrupted", INTERRUPTED)
        return INTERRUPTED
    except SystemExit as ended:  # of tyro
        if ended.code:
            report_failure("its flags cannot be parsed", MISTAKE)
        raise
    except Exception as error:
        await_verdict(error)
        is_mistake = _is_mistake(error)
        if debug or not is_mistake:
            traceback.print_exception(error)
        text = re.sub(r"^command line[^:]*: ", "", _text_of(error))  # which the flag's name says
        text = in_flags(text, flags_of(config_type), typed=given, owner=_checked_class(error))
        if len(text) > MOST_CHARACTERS:
            text = f"{text[:MOST_CHARACTERS]} ... [{len(text):,} characters]"
        print(f"error: {text}", file=sys.stderr)
        if not debug and is_mistake:
            print(f"({DEBUG} shows the traceback)", file=sys.stderr)
        status = TRY_AGAIN if isinstance(error, MissingProcessError) else MISTAKE if is_mistake else BUG
        report_failure(text, status)
        return status


def starting_point(
    config_type: type[AnyConfig], presets: Mapping[str, Preset[AnyConfig]], args: Sequence[str]
) -> tuple[AnyConfig | None, list[str]]:
    """The configuration that flags override, and the flags: of a preset, a file, or None for the defaults.

    Args:
        config_type: a dataclass.
        presets: configurations by name.
        args: of the command.

    Raises:
        FileNotFoundError: the file of ``--config`` does not exist.
        ValueError: there is no such preset, or the file has an unknown setting or a wrong value.
    """
    flags = list(args)
    file, name = None, None
    for number, arg in enumerate(flags):
        if arg == "--config" or arg.startswith("--config="):
            value = arg.partition("=")[2] if "=" in arg else "".join(flags[number + 1 : number + 2])
            if not value:
                raise ValueError("--config needs the name of a file")
            file = Path(value)
            del flags[number : number + (2 if arg == "--config" else 1)]
            break
    if presets and flags and not flags[0].startswith("-"):
        name = flags.pop(0)
    settings = {} if file is None else read_settings_file(file)
    of_file = settings.pop("preset", None)
    name = name or of_file
    of_model = [flag.flag for flag in flags_of(config_type) if flag.path == ("model",)]  # distill.py calls it --teacher
    if name is None and file is None and not any(flag.partition("=")[0] in of_model for flag in flags):
        name = TOY if TOY in presets else None
    if name is not None and name not in presets:
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(presets)}")
    default = None if name is None else presets[name].config()
    rare, flags = take_rare(flags_of(config_type), flags)
    for source, changes in ((str(file), settings), ("command line", rare)):
        if changes:
            default = with_settings(config_type() if default is None else default, changes, source)
    return default, flags


def _check_numbers(config: Any, name: str = "") -> None:
    """Check that no setting is NaN, which no comparison with a bound finds.

    Raises:
        ValueError: one is; it says which.
    """
    if isinstance(config, float) and math.isnan(config):
        raise ValueError(f"{name} is nan; it must be a number")
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            _check_numbers(getattr(config, field.name), field.name)


def _parse(config_type: type[AnyConfig], args: Sequence[str], description: str, default: AnyConfig | None) -> AnyConfig:
    """The configuration; errors of ``__post_init__`` are raised, all others end the process as tyro does."""
    said = io.StringIO()
    try:
        # tyro prints some errors of __post_init__ in a box, with names that are not flags, and raises the others.
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(config_type, args=args, description=description)
            return tyro.cli(config_type, args=args, description=description, default=default)
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
    mistakes = (ValueError, OSError, FloatingPointError, ImportError, MemoryError)
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
