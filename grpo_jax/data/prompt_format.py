"""``prompt_format.json``: the prompt format that a model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from grpo_jax.data.chat_templates import uses_date
from grpo_jax.data.messages import plain_data
from grpo_jax.data.prompts import Rendering, checked_variables

NAME = "prompt_format.json"


def read_prompt_format(prompt_format: Mapping[str, Any]) -> Rendering:
    """The arguments of ``prompts.render_prompts`` that reproduce a prompt format.

    Raises:
        ValueError: the format is malformed.
    """
    kind, template = prompt_format.get("kind"), prompt_format.get("template")
    if kind == "plain":
        if not isinstance(template, str) or "{question}" not in template:
            raise ValueError(f"{NAME}: template must be text with {{question}}; it is {template!r:.200}")
        return {"template": template}
    if kind != "chat":
        raise ValueError(f"{NAME}: kind must be 'chat' or 'plain'; it is {kind!r:.200}")
    system_prompt, today = prompt_format.get("system_prompt"), prompt_format.get("date")
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise ValueError(f"{NAME}: system_prompt must be text; it is {system_prompt!r:.200}")
    if today is not None:
        check_date(today, f"{NAME}: date")
    variables = checked_variables(prompt_format.get("template_kwargs") or {}, f"{NAME}: template_kwargs")
    return {"template": None, "system_prompt": system_prompt, "template_kwargs": variables, "date": today}


def prompt_format_of(rendering: Rendering, tokenizer: Any) -> dict[str, Any]:
    """The inverse of ``read_prompt_format``, as JSON types.

    Args:
        rendering: arguments of ``prompts.render_prompts``.
        tokenizer: a transformers tokenizer. The date is included if its chat template uses one.
    """
    template = rendering.get("template")
    if template is not None:
        return {"kind": "plain", "template": template}
    fields = {
        "system_prompt": rendering.get("system_prompt"),
        "template_kwargs": plain_data(rendering.get("template_kwargs") or {}),
        "date": rendering.get("date") if uses_date(tokenizer) else None,
    }
    return {"kind": "chat", **{name: value for name, value in fields.items() if value}}


def check_date(text: Any, where: str) -> None:
    """Check that a text is an ISO date such as "2026-11-27".

    Args:
        text: any value.
        where: the setting or source location, for the error.

    Raises:
        ValueError: it is not.
    """
    try:
        date.fromisoformat(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {text!r:.200}; it must be a date such as 2026-11-27") from None


def described(prompt_format: Mapping[str, Any]) -> str:
    """A one-line description of a prompt format."""
    if prompt_format["kind"] == "plain":
        return f"the plain template {prompt_format['template']!r:.80}"
    rest = [f"{name} {prompt_format[name]!r:.80}" for name in prompt_format if name != "kind"]
    return ", ".join(["the tokenizer's chat template", *rest])
