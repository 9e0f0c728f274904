"""What a template leaves out is never lost in silence: the row is refused, or its hidden reasoning is named."""

import copy
import json

import pytest

from cache.errors import DataError
from stages.data.source_row import BadRow
from stages.formats import Candidate, Preference
from stages.prepare.stage import prepare
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.template import Template

# Writes user and assistant turns only, as the templates of many models without tools and system texts do.
TWO_ROLES = (
    "{%- for m in messages -%}"
    "{%- if m.role in ('user', 'assistant') -%}{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
# As Llama 2 and Gemma: the system text is part of the first user turn, and texts are trimmed.
SYSTEM_IN_USER = (
    "{%- set ns = namespace(system='') -%}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{%- set ns.system = m.content | trim ~ '\n\n' -%}"
    "{%- else -%}{{- '<|' + m.role + '|>' + ns.system + m.content | trim + '<|end|>' -}}{%- set ns.system = '' -%}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
# As Llama 3.1 and Mistral: the result of a tool is written as JSON.
RESULTS_AS_JSON = TWO_ROLES.replace(
    "{%- endfor -%}",
    "{%- if m.role == 'tool' -%}{{- '<|tool|>' + (m.content | tojson) + '<|end|>' -}}{%- endif -%}{%- endfor -%}",
)
# As Qwen 3: reasoning is shown in the last assistant turn alone, whether it is a field or a part of the text.
LAST_REASONING = (
    "{%- for m in messages -%}{%- set text = m.content -%}{%- set thought = m.reasoning_content -%}"
    "{%- if m.role == 'assistant' and '</think>' in text -%}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1] -%}{%- set text = text.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|' + m.role + '|>' -}}{%- if loop.last and thought -%}{{- '<think>' + thought + '</think>' -}}{%- endif -%}"
    "{{- text + '<|end|>' -}}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
# As Llama 3.1: a turn that calls tools has no text.
CALL_OR_TEXT = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' -}}"
    "{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}{{- c.function | tojson -}}{%- endfor -%}"
    "{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
FIRST_CALL_ONLY = CALL_OR_TEXT.replace("in m.tool_calls -%}", "in m.tool_calls[:1] -%}")


@pytest.fixture
def template(chat_tokenizer):
    def template(source):
        tokenizer = copy.deepcopy(chat_tokenizer)
        tokenizer.chat_template = source
        return Template(tokenizer, "auto", append_eos=True)

    return template


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def rendered(template, prompt, *completion):
    return template.renderer.render(Preference(prompt, [Candidate(list(completion), "chosen")]))


SYSTEM, ASKED, SAID = (
    turn("system", "Be brief."),
    turn("user", "What is 6 * 7?"),
    turn("assistant", "It is 42."),
)


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [
        ([SYSTEM, ASKED], "of the system turn 'Be brief.'"),
        ([ASKED, turn("assistant", "I ask."), turn("tool", "forty-two")], "of the tool turn 'forty-two'"),
        # The answer holds it, and so does the question.
        ([ASKED, turn("assistant", "I ask."), turn("tool", "42")], "of the tool turn '42'"),
        ([turn("system", "6"), ASKED], "of the system turn '6'"),
    ],
)
def test_a_turn_without_a_branch_in_the_template_is_refused(template, prompt, lost):
    with pytest.raises(BadRow, match=f"does not show the text {lost}; choose another prepare.template"):
        rendered(template(TWO_ROLES), prompt, SAID)


def test_a_turn_inside_a_completion_is_looked_for_too(template):
    steps = [turn("assistant", "I ask."), turn("tool", "forty-two"), SAID]
    with pytest.raises(BadRow, match="of the tool turn 'forty-two'"):
        rendered(template(TWO_ROLES), [ASKED], *steps)
    rendered(template(RESULTS_AS_JSON), [ASKED], *steps)


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        (SYSTEM_IN_USER, [turn("system", " Be\nbrief. "), turn("user", " q\n")]),
        (SYSTEM_IN_USER, [turn("system", ""), turn("user", "\n")]),
        (RESULTS_AS_JSON, [ASKED, SAID, turn("tool", '{"town": "Oslo",\n "sky": "\\\\blue é"}')]),
        (TWO_ROLES.replace("m.content", "m.content.replace('\n', ' ')"), [turn("user", "two\nlines")]),
    ],
)
def test_a_text_that_is_trimmed_moved_or_written_as_json_is_shown(template, source, prompt):
    assert rendered(template(source), prompt, SAID).notes == set()


def test_reasoning_of_earlier_turns_that_a_template_leaves_out_is_named(template):
    own = template(LAST_REASONING)
    thought = turn("assistant", "<think>six times seven</think>It is 42.")
    apart = turn("assistant", "It is 42.", reasoning_content="six times seven")
    more = turn("user", "And six times seven plus 1?")
    assert rendered(own, [ASKED], thought).notes == rendered(own, [ASKED], apart).notes == set()
    assert rendered(own, [ASKED, thought, more], turn("assistant", "43")).notes == {
        "think_text_not_in_template"
    }
    assert rendered(own, [ASKED, apart, more], turn("assistant", "43")).notes == {
        "reasoning_content_not_in_template"
    }


def test_a_text_beside_a_tool_call_and_a_second_call_are_looked_for(template):
    add, mul = (
        {"type": "function", "function": {"name": name, "arguments": {"a": 6}}} for name in ("add", "mul")
    )
    rendered(template(CALL_OR_TEXT), [ASKED], turn("assistant", "", tool_calls=[add, mul]))
    with pytest.raises(BadRow, match=r"the text of the assistant turn 'I ask\.'"):
        rendered(template(CALL_OR_TEXT), [ASKED], turn("assistant", "I ask.", tool_calls=[add]))
    with pytest.raises(BadRow, match="does not show the function 'mul'"):
        rendered(template(FIRST_CALL_ONLY), [ASKED], turn("assistant", "", tool_calls=[add, mul]))


@pytest.mark.parametrize("name", ["system_turns", "tool_result_no_role"])
def test_rows_whose_texts_vanish_are_refused_or_counted(shared_cases, template, context, name):
    path, own = shared_cases / "rows" / f"{name}.jsonl", template(TWO_ROLES)
    settings = PrepareSettings(heldout_fraction=0.0)
    with pytest.raises(DataError, match=f"{name}.jsonl:1: (system: .*)?content: .* does not show the text"):
        prepare(DataSettings(path=str(path)), settings, own, context)
    with pytest.raises(DataError, match="no usable training row"):
        prepare(DataSettings(path=str(path), on_bad_row="skip"), settings, own, context)
    shown = TWO_ROLES.replace("('user', 'assistant')", "('system', 'user', 'assistant', 'tool')")
    counts = prepare(DataSettings(path=str(path)), settings, template(shown), context).counts
    assert counts["rows_kept"] == len(path.read_text().splitlines())


def test_hidden_reasoning_is_counted_by_name(template, context, tmp_path):
    history = [ASKED, turn("assistant", "<think>hm</think>It is 42.", reasoning_content="so"), ASKED]
    rows = [{"prompt": history, "chosen": [turn("assistant", f"a{n}")], "rejected": [SAID]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(path=str(tmp_path / "rows.jsonl"))
    counts = prepare(data, PrepareSettings(heldout_fraction=0.0), template(LAST_REASONING), context).counts
    assert counts["notes"] == {"reasoning_content_not_in_template": 3, "think_text_not_in_template": 3}


# As Idefics 3 and LLaVA-NeXT: a text has to be a list of parts; a plain text is left out, or an error.
PARTS = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' -}}"
    "{%- for part in m.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}"
    "{{- '<|end|>' -}}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
FIRST_PART = PARTS.replace(
    "{%- for part in m.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}",
    "{{- m.content[0].text -}}",
).replace("part.text -}}", "part.text.strip() -}}")
# Takes both.
EITHER = PARTS.replace(
    "{%- for part in m.content -%}",
    "{%- if m.content is string -%}{{- 's' + m.content -}}{%- endif -%}{%- for part in m.content -%}",
)


@pytest.mark.parametrize("source", [PARTS, FIRST_PART])
def test_a_template_that_reads_parts_alone_is_given_parts(template, source):
    own = template(source)
    turns = [SYSTEM, ASKED, SAID]
    as_parts = [turn(one["role"], [{"type": "text", "text": one["content"]}]) for one in turns]
    text = rendered(own, turns[:2], SAID)
    theirs = own.tokenizer.apply_chat_template(as_parts[:2], tokenize=False, add_generation_prompt=True)
    assert text.prompt == theirs
    assert text.prompt + text.completions[0][0].text == own.tokenizer.apply_chat_template(
        as_parts, tokenize=False
    )
    begun = rendered(own, turns, turn("assistant", " Surely."))
    continued = own.tokenizer.apply_chat_template(as_parts, tokenize=False, continue_final_message=True)
    assert begun.prompt == continued


def test_a_template_that_reads_both_is_given_texts(template):
    assert rendered(template(EITHER), [ASKED], SAID).prompt == "<|user|>sWhat is 6 * 7?<|end|><|assistant|>"
