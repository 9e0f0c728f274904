"""From scored completions of one prompt to a pair, and the file of pairs that `prepare` reads.

In: completions with token ids, and a score of each. Out: which is chosen and which rejected, or why there is no pair.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.artifacts import Artifact
from cache.files import write_bytes
from cache.fingerprint import fingerprint
from stages.generation.completion_files import FILE as COMPLETIONS
from stages.generation.completion_files import read_jsonl
from stages.generation.requests import Prompt
from stages.runtime.context import Context
from stages.settings.online import OnlineSettings, Pairing, Unfinished

KIND = "online-rows"
FILE = "rows.jsonl"
# Below every score: completions that did not end, with `online.unfinished: worst`.
WORST = float("-inf")


@dataclass(frozen=True)
class Scored:
    """A completion: what the model wrote, its score (None if the judge gave none), and whether it ended."""

    token_ids: tuple[int, ...]
    score: float | None
    finished: bool


class NoPair(Exception):
    """Completions of which none can be preferred; the argument is the reason it is counted under."""


def pair_of(
    completions: Sequence[Scored], pairing: Pairing, unfinished: Unfinished, draw: random.Random
) -> tuple[int, int]:
    """The places of the chosen and the rejected completion; raises `NoPair`. Of equal scores the first is taken."""
    scores = {place: _score(one, unfinished) for place, one in enumerate(completions)}
    usable = {place: score for place, score in scores.items() if score is not None}
    if len(usable) < 2:
        raise NoPair("fewer_than_two_completions")
    best = max(usable, key=lambda place: usable[place])
    others = [place for place in usable if completions[place].token_ids != completions[best].token_ids]
    if not others:
        raise NoPair("identical_completions")
    if usable[best] == WORST:
        raise NoPair("none_finished")
    if pairing == "best_of_n":  # what is rejected is not trained, and a tie has a best completion too
        return best, min(others, key=lambda place: usable[place])
    below = [place for place in others if usable[place] < usable[best]]
    if not below:
        raise NoPair("tie")
    if pairing == "best_random":
        return best, draw.choice(below)
    return best, min(below, key=lambda place: usable[place])


def _score(completion: Scored, unfinished: Unfinished) -> float | None:
    if completion.score is None or (not completion.finished and unfinished == "drop"):
        return None
    if not completion.finished and unfinished == "worst":
        return WORST
    return completion.score


def make_pairs(
    groups: Sequence[tuple[Sequence[int], Sequence[Scored]]],
    settings: OnlineSettings,
    identity: dict[str, Any],
    name: str,
    context: Context,
) -> Artifact:
    """The artifact with the pairs of (prompt ids, completions), as token ids: those that the policy wrote.

    `identity` says where they come from. The counts have the prompts without a pair by reason.
    """
    identity = {
        **identity,
        "pairing": settings.pairing,
        "unfinished": settings.unfinished,
        "seed": settings.seed,
    }
    found = context.store.find(KIND, name, identity)
    if found is not None:
        return found
    draw = random.Random(fingerprint(identity))
    lines, reasons = [], dict[str, int]()
    for prompt_ids, completions in groups:
        try:
            chosen, rejected = pair_of(completions, settings.pairing, settings.unfinished, draw)
        except NoPair as reason:
            reasons[str(reason)] = reasons.get(str(reason), 0) + 1
            continue
        ids = {
            "prompt_ids": list(prompt_ids),
            "chosen_ids": list(completions[chosen].token_ids),
            "rejected_ids": list(completions[rejected].token_ids),
        }
        lines.append(json.dumps({**ids}) + "\n")
    counts = {"prompts": len(groups), "pairs": len(lines), "without_pair": reasons}
    return _published(lines, name, identity, counts, context)


def completion_rows(completions: Artifact, prompts: Sequence[Prompt], context: Context) -> Artifact:
    """The artifact with completions as single rows of token ids, for their distance to the reference."""
    identity = {"completions": completions.fingerprint}
    found = context.store.find(KIND, completions.path.name, identity)
    if found is not None:
        return found
    ids = {prompt.id: list(prompt.ids) for prompt in prompts}
    lines = [
        json.dumps({"prompt_ids": ids[line["id"]], "completion_ids": line["token_ids"], "label": True}) + "\n"
        for line in read_jsonl(completions.path / COMPLETIONS)
    ]
    return _published(lines, completions.path.name, identity, {"completions": len(lines)}, context)


def _published(
    lines: Sequence[str], name: str, identity: dict[str, Any], counts: dict[str, Any], context: Context
) -> Artifact:
    draft = context.store.draft(KIND, name, "online", identity)
    try:
        write_bytes(draft.path / FILE, "".join(lines).encode())
        return context.store.publish(draft, counts, {}, context.config_text)
    finally:
        draft.discard()
