"""Which prompts are held out: decided by a hash of how the conversation begins, so that none is in both splits."""

import hashlib
from typing import Any

from cache.fingerprint import canonical_json
from stages.data.messages import as_messages
from stages.formats import Preference, Tokens


def split_of(preference: Preference, heldout_fraction: float) -> str:
    """`heldout` or `train`, for a share of `heldout_fraction` of all conversations.

    Prompts that are alike up to their first user turn are in the same split: data sets rate several turns of one dialogue, and
    the later prompts hold the earlier ones with an answer. A plain text counts as the user turn it becomes in a chat, and white space does not count, because templates trim
    it: prompts that two sources write differently and that become the same ids are in the same split.
    """
    texts = prompt_texts(preference.prompt)
    roles = texts[::2]
    end = 2 * roles.index("user") + 2 if "user" in roles else len(texts)
    digest = hashlib.sha256("\0".join(texts[:end]).encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64 else "train"


def prompt_texts(prompt: Any) -> list[str]:
    """Roles and texts of a prompt in turn, runs of white space as one space; token ids as they are."""
    if isinstance(prompt, Tokens):
        return ["ids", canonical_json(prompt.ids).decode()]
    texts: list[str] = []
    for turn in as_messages(prompt, "user"):
        texts += [turn["role"], " ".join(str(turn["content"]).split())]
    return texts
