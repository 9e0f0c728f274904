"""Orders of roles for which a template has no place are folded, counted or refused, with what to do."""

import pytest

from stages.data.source_row import BadRow
from stages.formats import Candidate, Preference
from stages.tokenization.render import RenderOptions
from stages.tokenization.template import Template
from tests.stages.tokenization.test_prefill import TRIMS, made
from tests.stages.tokenization.test_thinking import ASK, FOUR, MORE, NO_SYSTEM, SIX, SYSTEM

ALTERNATES = (
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate') -}}{%- endif -%}{%- endfor -%}" + TRIMS
)
# DeepSeek V4: texts of one side are joined.
JOINS = TRIMS.replace(
    "{{- '<|' + m.role + '|>\n' + ",
    "{%- if loop.index0 and m.role == loop.previtem.role -%}{{- '\n\n' -}}{%- else -%}{{- '<|' + m.role + '|>\n' -}}{%- endif -%}{{- ",
).replace(" + '<|end|>'", " + ('' if loop.nextitem and loop.nextitem.role == m.role else '<|end|>')")


def rendered(own, prompt, *completion):
    return own.renderer.render(Preference(prompt, [Candidate(list(completion), "chosen")]))


@pytest.mark.parametrize(
    ("source", "note"),
    [(TRIMS, "consecutive_user_turns"), (JOINS, "consecutive_user_turns_joined_by_the_template")],
)
def test_consecutive_user_turns_are_counted_as_what_becomes_of_them(chat_tokenizer, source, note):
    own = made(chat_tokenizer, source)
    text = rendered(own, [ASK, MORE], SIX)
    assert text.notes == {note}
    assert text.prompt == own.tokenizer.apply_chat_template(
        [ASK, MORE], tokenize=False, add_generation_prompt=True
    )
    assert rendered(own, [ASK], FOUR, MORE, ASK, SIX).notes == {note}
    assert rendered(own, [ASK, FOUR, MORE], SIX).notes == set()


def test_a_template_that_refuses_consecutive_user_turns_is_named_as_the_cause(chat_tokenizer):
    own = made(chat_tokenizer, ALTERNATES)
    with pytest.raises(
        BadRow, match=r"two user turns follow each other, and .* refuses that .*on_bad_row=skip"
    ):
        rendered(own, [ASK, MORE], SIX)
    assert rendered(own, [ASK, FOUR, MORE], SIX).notes == set()


def test_a_template_without_system_turns_names_the_setting(chat_tokenizer):
    own = made(chat_tokenizer, NO_SYSTEM)
    with pytest.raises(BadRow, match=r"has no place for a system turn .*prepare\.system=fold"):
        rendered(own, [SYSTEM, ASK], FOUR)
    folds = Template(own.tokenizer, "auto", append_eos=True, options=RenderOptions(system="fold"))
    assert rendered(folds, [SYSTEM, ASK], FOUR).notes == {"system_text_folded_into_the_user_turn"}
