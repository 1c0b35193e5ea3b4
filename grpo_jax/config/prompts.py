"""Settings of the prompt format, and their resolution against the format that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from grpo_jax.data.chat_templates import uses_date
from grpo_jax.data.prompt_format import check_date, read_prompt_format
from grpo_jax.data.prompts import R1_ZERO, Rendering, checked_variables

AnySettings = TypeVar("AnySettings", bound="PromptConfig")
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True)
class PromptConfig:
    """Prompt format. Default: that of the model's training, else R1-Zero's plain template."""

    chat_template: bool = False
    """Write prompts with the tokenizer's chat template. Default: as the model was trained (its prompt_format.json)."""
    template: str | None = None
    """Plain prompt template with {question}. Default: as the model was trained, else a template like R1-Zero's."""
    system_prompt: str | None = None
    """System message for the chat template; '' for none. Default: as the model was trained."""
    template_kwargs: tuple[str, ...] = ()
    """Arguments of the chat template, as JSON or name=value, such as '{"enable_thinking": false}'. A column
    chat_template_kwargs sets them per row."""
    template_date: str | None = None
    """Current date for the chat template, such as 2026-11-27. Default: that of the model's training, else the date on
    which the run was started."""

    def __post_init__(self):
        if self.chat_template and self.template is not None:
            raise ValueError("chat_template and template are both set; a prompt is rendered with one of them")
        if self.template is not None and "{question}" not in self.template:
            raise ValueError(f"template must contain {{question}} where the prompt goes; it is {self.template!r}")
        if self.template_date is not None:
            check_date(self.template_date, "template_date")
        _ = self.template_variables
        if self.template is not None:
            self._check_no_chat_settings(self.template)

    @property
    def template_variables(self) -> dict[str, Any]:
        """``template_kwargs`` as a dict."""
        return parse_template_kwargs(self.template_kwargs)

    @property
    def says_template(self) -> bool:
        """Whether these settings choose a template."""
        return self.chat_template or self.template is not None

    def rendering(self, prompt_format: Mapping[str, Any] | None, tokenizer: Any, *, today: str) -> Rendering:
        """The arguments of ``prompts.render_prompts`` in effect.

        Args:
            prompt_format: format that the model was trained on; None if unknown.
            tokenizer: the model's tokenizer.
            today: date on which the run was started.

        Raises:
            ValueError: settings of a chat template with a plain template; a malformed ``prompt_format``.
        """
        trained = None if prompt_format is None else read_prompt_format(prompt_format)
        if self.template is not None:
            return {"template": self.template}
        start: Rendering = {"template": None if self.chat_template else R1_ZERO}
        if trained is not None and (trained.get("template") is None or not self.chat_template):
            start = trained
        template = start.get("template")
        if template is not None:
            self._check_no_chat_settings(template)
            return {"template": template}
        system_prompt = start.get("system_prompt") if self.system_prompt is None else self.system_prompt
        return {
            "template": None,
            "system_prompt": system_prompt or None,
            "template_kwargs": {**dict(start.get("template_kwargs") or {}), **self.template_variables},
            "date": (self.template_date or start.get("date") or today) if uses_date(tokenizer) else None,
        }

    def _check_no_chat_settings(self, template: str) -> None:
        for name in ("system_prompt", "template_kwargs", "template_date"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} needs chat_template, but the prompt template is plain: {template!r:.100}. Set "
                    "chat_template, or write the instructions into template"
                )


def with_format(settings: AnySettings, prompt_format: Mapping[str, Any]) -> AnySettings:
    """Settings with a given prompt format for any model, unless they choose a template themselves.

    Args:
        settings: the settings.
        prompt_format: the format, as ``read_prompt_format`` reads it.
    """
    if settings.says_template:
        return settings
    read = read_prompt_format(prompt_format)
    variables = {**(read.get("template_kwargs") or {}), **settings.template_variables}
    return replace(
        settings,
        chat_template=read.get("template") is None,
        template=read.get("template"),
        system_prompt=read.get("system_prompt") if settings.system_prompt is None else settings.system_prompt,
        template_kwargs=(json.dumps(variables),) if variables else (),
        template_date=settings.template_date or read.get("date"),
    )


def prompt_fields(settings: PromptConfig) -> dict[str, Any]:
    """The fields of ``PromptConfig`` in a subclass."""
    return {field.name: getattr(settings, field.name) for field in fields(PromptConfig)}


def prompt_flags(prompt_format: Mapping[str, Any]) -> list[str]:
    """Command-line flags that select a prompt format."""
    settings = with_format(PromptConfig(), prompt_format)
    flags = ["--chat-template"] if settings.chat_template else []
    for name in ("template", "system_prompt", "template_date"):
        value = getattr(settings, name)
        flags += [] if value is None else [f"--{name.replace('_', '-')}", value]
    return flags + (["--template-kwargs", *settings.template_kwargs] if settings.template_kwargs else [])


def parse_template_kwargs(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments of a chat template from JSON objects and ``name=value`` pairs.

    A value is JSON, or Python's ``True``, ``False`` or ``None``; anything else is a string.

    Raises:
        ValueError: a text has another form, or sets a variable that is reserved.
    """
    variables: dict[str, Any] = {}
    for text in texts:
        if text.lstrip().startswith("{"):
            try:
                variables |= json.loads(text)
            except ValueError as error:
                raise ValueError(f"template_kwargs: {text!r:.200} is not JSON: {error}") from error
            continue
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(
                f"template_kwargs: {text!r:.200} is neither name=value nor a JSON object such as "
                """'{"enable_thinking": false}'"""
            )
        try:
            variables[name.strip()] = json.loads(PYTHON_WORDS.get(value.strip(), value))
        except ValueError:
            variables[name.strip()] = value
    return checked_variables(variables, "template_kwargs")
