"""One tokenizer with one template: text of preferences, token ids of the text, and what identifies both.

`renderer` (`render.py`) makes the text, of which the prompt is a prefix; `encoder` (`encode.py`) makes ids of it.
"""

import hashlib
import json
from functools import cached_property
from typing import Any

from cache.errors import DataError
from stages.formats.contract import Candidate, Preference
from stages.tokenization.encode import Encoder, Text
from stages.tokenization.render import Renderer, RenderOptions

RENDER_VERSION = 5


class Template:
    """A tokenizer and a template, ready to render and encode preferences."""

    def __init__(
        self,
        tokenizer: Any,
        choice: str,
        append_eos: bool,
        quick: bool = False,
        options: RenderOptions | None = None,
    ) -> None:
        """Use `tokenizer` (a fast Hugging Face tokenizer) and the template that `choice` names.

        `choice` is as `prepare.template`; with `quick`, fastokens encodes. Raises `DataError` when tokenizer or
        template cannot be used.
        """
        if not tokenizer.is_fast:
            raise DataError(
                f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json). Convert it with transformers."
            )
        self.renderer = Renderer(tokenizer, choice, append_eos, options)
        if append_eos and tokenizer.eos_token is None:
            raise DataError(
                f"{tokenizer.name_or_path} has no end-of-sequence token. Use --set prepare.append_eos=false."
            )
        self.encoder = Encoder(tokenizer, quick)
        self.tokenizer = tokenizer
        self.append_eos = append_eos

    @cached_property
    def _tokenizer_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What changes the token ids: tokenizer, template, rules of rendering and encoding."""
        return {
            "render_version": RENDER_VERSION,
            "tokenizer": self._tokenizer_sha256,
            "special_tokens": json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str),
            "template": hashlib.sha256(self.renderer.chat.source.encode()).hexdigest(),
            "append_eos": self.append_eos,
            "end_tokens": self.renderer.ends.tokens,
            "arguments": self.renderer.arguments,
            "thinking": self.renderer.options.thinking,
            "system": self.renderer.options.system,
        }

    @property
    def special_ids(self) -> set[int]:
        """The ids of all special tokens."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {number for number, token in added if token.special} | set(self.tokenizer.all_special_ids)

    def turn_end_ids(self) -> list[int]:
        """Ids that end a completion: end of sequence, and the special token that closes a turn, if there is one."""
        ends = {self.tokenizer.eos_token_id}
        if self.renderer.uses_chat:
            prompt = [{"role": "user", "content": "a"}]
            [parts] = self.renderer.render(Preference(prompt, [Candidate("b", "chosen")])).completions
            [ids] = self.encoder.encode_texts([Text(parts[-1].text, add_special_tokens=False)])
            ends |= {int(ids[-1])} & self.special_ids
        return sorted(end for end in ends if end is not None)
