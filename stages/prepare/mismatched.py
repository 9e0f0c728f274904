"""KTO's mismatched rows: each example of a small group is given the completions of another one, with another prompt.

In: examples. Out: groups of examples (mismatch groups), within which completions rotate. The KL estimate of
KTO needs completions that do not belong to their prompts (2402.01306, section 4.1).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from stages.data.pairs import best_and_worst
from stages.data.rows import Example, Row
from stages.formats import Candidate

# Examples of a mismatch group; small, so that an optimizer step of any usual size holds whole groups.
GROUP_EXAMPLES = 4
# Examples that may change places so that those of one prompt, which often stand together, come into different groups.
WINDOW_EXAMPLES = 1024
Value = TypeVar("Value")


def compared(entries: Sequence[Candidate] | Sequence[Row], values: Sequence[Value]) -> Sequence[Value]:
    """The values of the entries that are compared: the best and the worst of a ranked list, else the first two.

    Unpaired feedback has one. Of a tie's two pairs, the second has the same completions as the first.
    """
    scores = [entry.score for entry in entries if entry.role == "ranked" and entry.score is not None]
    return [values[place] for place in best_and_worst(scores)] if scores else values[:2]


def in_order(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """Neighbours in groups of `GROUP_EXAMPLES`; the last one is larger or smaller, and no example is alone."""
    ends = [*range(GROUP_EXAMPLES, len(examples) - 1, GROUP_EXAMPLES), *([len(examples)] if examples else [])]
    return [examples[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def with_other_prompts(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """Groups in which each example finds the completions of another prompt: in order, if those do.

    Otherwise the examples of a prompt are dealt out to all groups, those of the most frequent prompt first.
    """
    groups = in_order(examples)
    if all(None not in _donors(_prompts(group)) for group in groups):
        return groups
    prompts = _prompts(examples)
    often = Counter(prompts)
    first = {prompt: place for place, prompt in reversed(list(enumerate(prompts)))}
    order = sorted(range(len(prompts)), key=lambda place: (-often[prompts[place]], first[prompts[place]]))
    return [[examples[place] for place in order[number :: len(groups)]] for number in range(len(groups))]


def _prompts(examples: Sequence[Example]) -> list[bytes]:
    return [example.prompt_ids.tobytes() for example in examples]


def add_mismatched(group: Sequence[Example], max_length: int) -> None:
    """Add to each example, as mismatched rows, the completions of another one in the group, cut to `max_length` tokens.

    A ranked list gives its best and its worst, as a pair does.
    """
    matched = [list(compared(example.rows, example.rows)) for example in group]
    for example, donor in zip(group, _donors(_prompts(group)), strict=True):
        if donor is None:
            continue
        room = max_length - len(example.prompt_ids)
        example.rows += [
            Row("mismatched", row.ids[:room], row.mask[:room], cut=row.cut + max(0, len(row.ids) - room))
            for row in matched[donor]
            if row.mask[:room].any()
        ]


def _donors(prompts: Sequence[Any]) -> list[int | None]:
    """For each example of a group, the one whose completions become its mismatched rows; None where there is none.

    The next one; or, where neighbours share a prompt, the nearest rotation in which none gets completions of its own
    prompt, so that every completion serves once. Where there is no such rotation, the next one with another prompt.
    """
    count = len(prompts)
    for step in range(1, count):
        rotated = [(index + step) % count for index in range(count)]
        if all(prompts[index] != prompts[donor] for index, donor in enumerate(rotated)):
            return list(rotated)
    return [
        next(
            (
                (index + step) % count
                for step in range(1, count)
                if prompts[(index + step) % count] != prompts[index]
            ),
            None,
        )
        for index in range(count)
    ]
