"""A chat template compiled once: transformers' own sandbox, without what its tokenizer does for every call."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What templates ask a loop, once or twice for each message. The sandbox inspects every attribute anew.
LOOP_ATTRIBUTES = frozenset(
    {"first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"}
)


class ChatTemplate:
    """Renders messages as `tokenizer.apply_chat_template` does, to the letter."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Compile `source`; raises `jinja2.TemplateError` when it is no template."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        sandbox = copy.copy(_compile_jinja_template(source).environment)
        sandbox.__class__ = _Sandbox
        self._template = sandbox.from_string(source)
        # Put together once, where jinja would chain the globals anew for every rendering.
        globals_ = dict(self._template.globals)
        self._variables = {**globals_, **special_tokens, "tools": None, "documents": None}

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The text of a conversation; whatever the template raises goes through."""
        variables = {**self._variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        context = self._template.new_context(variables, shared=True)
        return "".join(self._template.root_render_func(context))


class _Sandbox(ImmutableSandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is LoopContext and attribute in LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)
