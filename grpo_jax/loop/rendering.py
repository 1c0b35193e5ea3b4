"""The prompt format in effect for a model."""

from __future__ import annotations

import re
from collections.abc import Callable

from grpo_jax.config.prompts import PromptConfig
from grpo_jax.data.prompt_format import described, prompt_format_of
from grpo_jax.data.prompts import Rendering
from grpo_jax.models import Pretrained


def resolve_rendering(
    settings: PromptConfig, policy: Pretrained, *, say: Callable[[str], None], today: str
) -> Rendering:
    """The prompt format in effect for a model, which is also printed.

    Args:
        settings: prompt settings.
        policy: the model, with the prompt format that it was trained on.
        say: prints a line.
        today: date on which the run was started.

    Raises:
        ValueError: as ``PromptConfig.rendering``; or ``template_kwargs`` names a variable that the chat template does
            not read.
    """
    rendering = settings.rendering(policy.prompt_format, policy.tokenizer, today=today)
    template = getattr(policy.tokenizer, "chat_template", None)
    unread = [name for name in settings.template_variables if not re.search(rf"\b{re.escape(name)}\b", str(template))]
    if unread and rendering.get("template") is None:
        raise ValueError(f"template_kwargs: the chat template does not read a variable {unread[0]!r}; check its name")
    prompt_format = prompt_format_of(rendering, policy.tokenizer)
    if policy.prompt_format is None:
        why = "" if settings.says_template else ", the default: the model has no prompt_format.json"
    elif prompt_format == policy.prompt_format:
        why = ", as the model was trained"
    else:
        why = f"; the model was trained with {described(policy.prompt_format)}"
    say(f"prompts: {described(prompt_format)}{why}")
    return rendering
