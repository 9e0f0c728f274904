"""Which examples are turns of one conversation."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.rows import Example, Row, RowSet, to_table
from stages.prepare.stage import prepare
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.render import RenderOptions
from stages.tokenization.template import Template
from stages.train.conversations import conversations

END = 9
PROMPTS = st.lists(st.lists(st.sampled_from([1, 2, END]), min_size=1, max_size=5), min_size=1, max_size=12)


def rows_of(prompts: list[list[int]]) -> RowSet:
    completion = [Row("desirable", np.array([5], np.int32), np.ones(1, bool))]
    examples = [
        Example(str(number), f"made:{number}", np.array(prompt, np.int32), completion)
        for number, prompt in enumerate(prompts)
    ]
    return RowSet([to_table(examples, [0] * len(examples))])


def turns(prompt: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(prompt) if token == END and place]
    return prompt[: ends[-1] + 1] if ends else prompt


@pytest.mark.slow
@given(PROMPTS)
def test_a_conversation_is_what_goes_on_from_one_another(prompts):
    """By definition: connected where the turns of one begin with those of the other."""
    expected = list(range(len(prompts)))
    for one, first in enumerate(map(turns, prompts)):
        for other, second in enumerate(map(turns, prompts)):
            if second[: len(first)] == first:
                joined = expected[other]
                expected = [expected[one] if number == joined else number for number in expected]
    found = conversations(rows_of(prompts), [END])
    pairs = {(mine, theirs) for mine, theirs in zip(found.tolist(), expected, strict=True)}
    assert len(pairs) == len(set(found.tolist())) == len(set(expected))


def test_a_token_that_begins_every_text_and_ends_turns_joins_nothing():
    """As <|endoftext|> of OLMo 2 is both."""
    assert len(set(conversations(rows_of([[END, 1], [END, 2], [END, 2, 1]]), [END]).tolist())) == 2


TEMPLATE = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' + OPENS -}}{%- endif -%}"
)


@pytest.mark.parametrize("opens", ["", "<think>\n\n</think>\n\n"])
def test_the_turns_of_prepared_rows_are_found(opens, chat_tokenizer, tmp_path, context):
    """Feedback on each turn, also where a template opens an answer otherwise than it writes it later (Qwen3)."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("OPENS", repr(opens))
    template = Template(tokenizer, "auto", append_eos=True, options=RenderOptions())
    lines, expected = [], []
    for talk in range(3):
        told = [{"role": "system", "content": "Be brief."}]
        for turn in range(3):
            told = [*told, {"role": "user", "content": f"question {turn} of {talk}"}]
            answer = [{"role": "assistant", "content": f"answer {turn}"}]
            lines.append({"prompt": told, "completion": answer, "label": turn % 2 == 0})
            expected.append(talk)
            told = told + answer
    path = tmp_path / "feedback.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    artifact = prepare(
        DataSettings(path=str(path)), PrepareSettings(heldout_fraction=0, max_length=512), template, context
    )
    found = conversations(RowSet.of(artifact, "train"), artifact.counts["turn_end_ids"])
    assert [found.tolist().index(number) // 3 for number in found] == expected
