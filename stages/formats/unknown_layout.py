"""What is said of rows that no format matches: where their answers are, or which column is misspelt."""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from stages.data.messages import PROMPT_COLUMNS, is_conversation
from stages.formats.contract import Format
from stages.formats.guessed_columns import as_yaml, guessed_columns

ANSWER_WORDS = ("chosen", "rejected", "response", "completion", "output", "answer", "text", "label")
TEXT_KEYS = ("text", "content", "response", "answer", "completion", "output", "value")
SCORE_KEYS = {"score": "rewards", "reward": "rewards", "rating": "rewards", "rank": "ranks"}
MOST_NAMES = 12


def unknown_layout(row: Mapping[str, Any], formats: Sequence[type[Format]]) -> str:
    """The end of the error message for a row that no format matches."""
    places = list(_answer_lists(row, ""))
    if places:
        return _nested(row, *places[0])
    guess = guessed_columns(row)
    if guess:
        return (
            "fits no known format. By the names of its columns this map fits: in YAML, "
            f"data.columns: {as_yaml(guess)}. `align init` writes it and shows the rows."
        )
    misspelt = _nearest(row, formats)
    if misspelt:
        return misspelt
    texts = [column for column, value in row.items() if isinstance(value, str) and " " in value]
    if {"chosen", "rejected"} <= row.keys():
        others = [column for column in texts if column not in ("chosen", "rejected")]
        return f"has no prompt column, and chosen and rejected do not begin alike. Map it in YAML, data.columns: {{prompt: {others[0] if others else 'question'}, chosen: chosen, rejected: rejected}}."
    if any(column in row for column in PROMPT_COLUMNS) and not any(
        word in str(column) for column in row for word in ANSWER_WORDS
    ):
        return (
            "has a prompt and no answers. Sample from prompts with align sample --set sample.prompts=FILE. "
            "If there are answers, map the columns in YAML (data.columns), or choose a format with --set data.format=NAME; docs/formats.md shows a row of each."
        )
    return (
        "fits no known format. Map the columns in YAML, for example data.columns: {prompt: question, chosen: good, rejected: bad}, "
        "or choose a format with --set data.format=NAME; docs/formats.md shows a row of each."
    )


def names_of(row: Mapping[str, Any]) -> str:
    """The columns of a row for an error message, the first few where there are many."""
    names = sorted(map(str, row))
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _answer_lists(value: Any, path: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Lists of objects that have text, at any depth: the path, the key of the text, and the first object."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _answer_lists(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and len(value) > 1 and not is_conversation(value):
        first = value[0]
        key = next(
            (key for key in TEXT_KEYS if isinstance(first, Mapping) and isinstance(first.get(key), str)), None
        )
        if key is not None:
            yield path, key, first


def _nested(row: Mapping[str, Any], path: str, key: str, first: Mapping[str, Any]) -> str:
    score = next((name for name in SCORE_KEYS if name in first), None)
    own = row.get("prompt")
    prompt = next((name for name in PROMPT_COLUMNS if isinstance(row.get(name), str)), "question")
    if isinstance(own, Mapping):
        prompt = next((f"prompt.{name}" for name in TEXT_KEYS if isinstance(own.get(name), str)), prompt)
    verdict = f', {SCORE_KEYS[score]}: "{path}[*].{score}"' if score else ", rewards: ..."
    return (
        f"has its answers nested in {path}. Map them in YAML, "
        f'data.columns: {{prompt: {prompt}, responses: "{path}[*].{key}"{verdict}}}.'
    )


def _nearest(row: Mapping[str, Any], formats: Sequence[type[Format]]) -> str:
    """The message for a row that has the columns of a format but for one or two that are nearly spelt so."""
    found: list[tuple[int, int, str]] = []
    for format_ in formats:
        wanted = set(json.loads(format_.example))
        missing, others = wanted - row.keys(), [str(name) for name in row if name not in wanted]
        if not 0 < len(missing) < len(wanted):
            continue
        near = {name: get_close_matches(name, others, 1, 0.75) for name in sorted(missing)}
        if all(near.values()):
            pairs = ", ".join(f"{name}: {close[0]}" for name, close in near.items())
            spelt = " and ".join(f"{close[0]} is near to {name}" for name, close in near.items())
            kept = ", ".join(f"{name}: {name}" for name in json.loads(format_.example) if name not in missing)
            found.append(
                (
                    len(missing),
                    -len(wanted),
                    f"fits no known format; {spelt} of the format {format_.name}. Rename it, or map the columns in YAML, data.columns: {{{pairs}, {kept}}}.",
                )
            )
    return min(found)[2] if found else ""
