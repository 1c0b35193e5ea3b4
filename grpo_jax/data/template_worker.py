"""The process that renders chat templates, which are untrusted code from checkpoints; started by ``chat_templates``.

Run as ``python -m grpo_jax.data.template_worker``. It imports only jinja2. Requests on stdin are pickled, answers on
stdout are JSON, and each is preceded by its length.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import signal
import struct
import sys
import time
from contextlib import suppress
from datetime import date, datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

LENGTH = struct.Struct("!Q")
KILL_AFTER = 5
"""Seconds after the time limit at which the process is killed if the timer could not interrupt rendering."""
MEMORY_BYTES = 2 << 30
MAX_CHARACTERS = 1 << 24
"""Maximum characters of a rendered text."""


class OutOfTime(BaseException):
    """Rendering took too long. Not an ``Exception``, so that no filter catches it."""


class GenerationBlocks(jinja2.ext.Extension):
    """The tag ``{% generation %}``, which marks assistant text and does not change what is rendered."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse the block as its body in a new scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without private attributes, which could be used to escape the sandbox."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the private attribute {name!r}")
        super().__setitem__(name, value)


def make_namespace(*args: Any, **kwargs: Any) -> Namespace:
    """A ``Namespace`` with these attributes."""
    namespace = Namespace()
    for name, value in dict(*args, **kwargs).items():
        namespace[name] = value
    return namespace


def raise_exception(message: str) -> None:
    """The function with which templates reject a conversation.

    Raises:
        TemplateError: always.
    """
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """The filter ``tojson``, without the HTML escapes of jinja2's own."""
    allowed = {name: options[name] for name in ("indent", "separators", "sort_keys") if name in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, **allowed)


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Compile a chat template as transformers does."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "namespace": make_namespace}
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any], today: str) -> str:
    """Render one conversation, deterministically.

    Args:
        source: the chat template.
        variables: variables of the template.
        today: date for ``strftime_now``.
    """
    now = datetime.combine(date.fromisoformat(today), datetime.min.time())
    random.seed(0)
    text = compiled(source).render(**{"strftime_now": now.strftime, **variables})
    if len(text) > MAX_CHARACTERS:
        raise jinja2.TemplateError(f"it writes {len(text):,} characters; the limit is {MAX_CHARACTERS:,}")
    return text


def limited(source: str, variables: dict[str, Any], today: str, seconds: float) -> dict[str, str]:
    """Render one conversation within limits.

    Args:
        source: the chat template.
        variables: variables of the template.
        today: date for ``strftime_now``.
        seconds: limit of CPU time.

    Returns:
        ``{"text": ...}`` or ``{"error": ...}``.
    """
    used = time.process_time()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + KILL_AFTER, hard))
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
        try:
            return {"text": render(source, variables, today)}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except OutOfTime:
        return {"error": f"it takes more than {seconds:g} seconds"}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 30} GiB of memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"syntax error in line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:
        return {"error": str(error.message or type(error).__name__)}
    except RecursionError:
        return {"error": "it is nested too deeply, or recurses without end"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _out_of_time(number: int, frame: Any) -> None:
    """Signal handler of the timer.

    Raises:
        OutOfTime: always.
    """
    raise OutOfTime


def read(stream: BinaryIO) -> bytes | None:
    """Read a message; None if the stream has ended."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = stream.read(LENGTH.unpack(head)[0])
    return body if len(body) == LENGTH.unpack(head)[0] else None


def main() -> None:
    """Answer requests until stdin ends, with all texts of a request or those before the first error."""
    signal.signal(signal.SIGPROF, _out_of_time)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):  # nothing to write
        with suppress(ValueError, OSError):
            resource.setrlimit(limit, (0, 0))
    while (body := read(sys.stdin.buffer)) is not None:
        source, today, seconds, chats = pickle.loads(body)
        texts: list[str] = []
        error = None
        for variables in chats:
            result = limited(source, variables, today, seconds)
            if (error := result.get("error")) is not None:
                break
            texts.append(result["text"])
        answer = json.dumps({"texts": texts, "error": error and error[:2000]}).encode()
        sys.stdout.buffer.write(LENGTH.pack(len(answer)) + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
