"""Held out are conversations, not prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.formats import Preference
from stages.prepare.heldout import split_of

TEXT = st.text(min_size=1, max_size=8)


def conversation(system: str | None, turns: list[str]) -> Preference:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)
    ]
    return Preference(messages, [])


@pytest.mark.slow
@given(st.none() | TEXT, st.lists(TEXT, min_size=1, max_size=7).filter(lambda turns: len(turns) % 2))
def test_each_turn_of_a_dialogue_is_on_the_side_of_its_first(system, turns):
    sides = {split_of(conversation(system, turns[:end]), 0.5) for end in range(1, len(turns) + 1, 2)}
    assert len(sides) == 1


def test_a_text_is_on_the_side_of_the_user_turn_that_it_becomes():
    """And the share is that of the conversations, whatever their system prompts."""
    texts = [f"question {number}" for number in range(2000)]
    sides = [split_of(conversation(None, [text]), 0.2) for text in texts]
    assert [split_of(Preference(text, []), 0.2) for text in texts] == sides
    assert 0.17 < sides.count("heldout") / len(texts) < 0.23
    assert [split_of(conversation("Be brief.", [text]), 0.2) for text in texts] != sides
