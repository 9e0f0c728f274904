"""Whether the token ids in rows or prompts are the same tokens to another model.

In: the tokenizer that made the ids, the ids in use, and a model.  Out: nothing, or a `UsageError` that names the first
ids that differ. Ids that are not in use may differ: vocabularies are padded, and models add tokens of their own.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cache.errors import UsageError
from cache.fingerprint import canonical_json
from stages.models.adapters import base_of, is_adapter
from stages.models.loading import ModelSource, has_tokenizer, load_tokenizer

SHOWN = 3


def vocabulary_sha256(tokenizer: Any) -> str:
    """Digest of every token with its id, added tokens included."""
    return hashlib.sha256(canonical_json(sorted(tokenizer.get_vocab().items()))).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of all that turns ids into text."""
    content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else vocabulary_sha256(tokenizer)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(canonical_json([content, special, sorted(tokenizer.all_special_ids)])).hexdigest()


@dataclass(frozen=True)
class TokensInUse:
    """The tokenizer that made some token ids, and these ids, each once; they are read when they are needed."""

    tokenizer: Any
    read_ids: Callable[[], Iterable[int]]

    def check(self, model: ModelSource, role: str, remedy: str, log: Callable[[str], None]) -> None:
        """Raise `UsageError` if an id in use is another token to `model`, or to the base of this adapter.

        `role` and `remedy` are for the message: what the model is used as, and what to type.
        """
        sources = [model]
        if is_adapter(model.folder):
            base = base_of(model)
            sources = [base, *([model] if has_tokenizer(model.folder) else [])]
        for source in sources:
            if str(source.folder) == str(self.tokenizer.name_or_path):
                continue
            if has_tokenizer(source.folder):
                self._compare(source, role, remedy)
            else:
                log(
                    f"{source.folder} has no tokenizer, so its vocabulary is not compared with that of the rows."
                )

    def _compare(self, source: ModelSource, role: str, remedy: str) -> None:
        ids, other = [int(number) for number in self.read_ids()], load_tokenizer(source)
        ours, theirs = (one.convert_ids_to_tokens(ids) for one in (self.tokenizer, other))
        differing = [
            f"{number} is {_shown(a)} and {_shown(b)}"
            for number, a, b in zip(ids, ours, theirs, strict=True)
            if a != b
        ]
        if differing:
            raise UsageError(
                f"{role} {source.name} has another vocabulary than {self.tokenizer.name_or_path}, whose tokens the rows are: "
                f"{len(differing):,} of {len(ids):,} ids differ, of these {', '.join(differing[:SHOWN])} there. {remedy}"
            )


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
