"""Chat templates by name, for models without one, and the choice of the template to use.

plain   hh-rlhf's transcript style, which needs no special tokens but end of sequence
chatml  OpenAI's and Qwen's: <|im_start|>role ... <|im_end|>
zephyr  Hugging Face's: <|role|> ... and the end-of-sequence token after every turn
tulu    Ai2's: <|role|> ... and the end-of-sequence token after assistant turns only
"""

import re
from pathlib import Path
from typing import Any

from cache.errors import DataError

# Line breaks are inside expressions, because `-%}` would remove them.
PLAIN_TEMPLATE = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '\n\nAssistant: ' ~ message['content'] ~ (eos_token or '') -}}"
    "{%- elif message['role'] == 'user' -%}{{- '\n\nHuman: ' ~ message['content'] -}}"
    "{%- else -%}{{- '\n\n' ~ (message['role'] | capitalize) ~ ': ' ~ message['content'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\n\nAssistant:' -}}{%- endif -%}"
)
NAMED = {
    "plain": PLAIN_TEMPLATE,
    "chatml": (
        "{{- leading_bos -}}"
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    "zephyr": (
        "{{- leading_bos -}}"
        "{%- for message in messages -%}"
        "{{- '<|' ~ message['role'] ~ '|>\n' ~ message['content'] ~ (eos_token or '') ~ '\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
    ),
    "tulu": (
        "{{- leading_bos -}}"
        "{%- for message in messages -%}"
        "{{- '<|' ~ message['role'] ~ '|>\n' ~ message['content'] -}}"
        "{%- if message['role'] == 'assistant' -%}{{- eos_token or '' -}}{%- endif -%}"
        "{{- '\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
    ),
}
MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>")
PLAIN_MARKS = ("\n\nHuman:", "\n\nAssistant:", "\n\nSystem:", "\n\nTool:")
ROLE_MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


def choose_source(tokenizer: Any, choice: str) -> tuple[str, str, bool]:
    """The template's source, its name in messages, and whether plain text is joined without it.

    `choice` is auto, chat, a name of `NAMED`, or the path of a Jinja file. Raises `DataError` when there is no such template.
    """
    if choice in ("auto", "chat") and tokenizer.chat_template:
        return _own_template(tokenizer), f"the chat template of {tokenizer.name_or_path}", False
    if choice == "chat":
        raise DataError(
            f"{tokenizer.name_or_path} has no chat template. Use --set prepare.template=plain (or {', '.join(list(NAMED)[1:])}, or a Jinja file), or add one to the model folder."
        )
    if choice in ("auto", "plain"):
        return PLAIN_TEMPLATE, "the template plain", True
    if choice in NAMED:
        return NAMED[choice], f"the template {choice}", False
    path = Path(choice).expanduser()
    try:
        return path.read_text(encoding="utf-8"), f"the template {path}", False
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"prepare.template={choice} is neither a readable file ({error}) nor one of auto, chat, {', '.join(NAMED)}."
        ) from error


def marks_of(source: str) -> set[str]:
    """The marks with which a template begins and ends turns; they need not be special tokens."""
    if source == PLAIN_TEMPLATE:
        return set(PLAIN_MARKS)
    marks = set(MARK.findall(source))
    # A template may concatenate the mark: '<|' + role + '|>'.
    return marks | set(ROLE_MARKS) if re.search(r"""['"]<\|['"]\s*[+~]""", source) else marks


def _own_template(tokenizer: Any) -> str:
    """The source of a tokenizer's template; of several, the one named default."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"{tokenizer.name_or_path} has several chat templates and none is named default "
            f"({', '.join(tokenizer.chat_template)}). Leave one in the model folder, or use --set prepare.template=plain."
        ) from error
