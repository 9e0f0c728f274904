"""Prompts that end with an assistant turn are continued inside it; their ids are transformers' own."""

import copy
import json

import pytest
from transformers import AutoTokenizer

from stages.data.messages import prompt_of
from stages.data.source_row import BadRow
from stages.formats import FORMATS, Candidate, Preference
from stages.prepare.stage import prepare
from stages.sample.prompts import file_prompts
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.named_templates import NAMED
from stages.tokenization.template import Template
from tests.stages.tokenization.encoded import encode_all
from tests.stages.tokenization.test_thinking import (
    ASK,
    CALLS,
    CLOSES,
    END,
    FOUR,
    LOOP,
    MORE,
    MOVES,
    OPENS,
    SIX,
    SWITCH,
    SYSTEM,
    TWO_ENDS,
    with_blocks,
)

FORMAT = {one.name: one for one in FORMATS}
BEGUN, REST = {"role": "assistant", "content": "It is "}, {"role": "assistant", "content": "four."}
# Llama 3 and Gemma trim the text of a turn.
TRIMS = (
    LOOP + "{{- '<|' + m.role + '|>\n' + (m.content | trim) + '<|end|>' -}}" + END
    + "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)  # fmt: skip
TEMPLATES = {
    "opens": OPENS,
    "closes": CLOSES,
    "switch": SWITCH,
    "two ends": TWO_ENDS,
    "trims": TRIMS,
    "moves": MOVES,
    "blocks": with_blocks("{{- m.content + '<|end|>' -}}"),
    "block with header": with_blocks("{{- m.content + '<|end|>\n' -}}", header_inside=True),
    **NAMED,
}


def made(tokenizer, source):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    return Template(tokenizer, "auto", append_eos=True)


def continued(own, prompt, *completion, **options):
    """The trained text and all of the completion, after a comparison of the prompt with transformers'."""
    preference = Preference(prompt, [Candidate(list(completion), "chosen")], options.get("tools"))
    [encoded] = encode_all(own, preference)
    if isinstance(encoded, BadRow):
        raise encoded
    theirs = own.tokenizer.apply_chat_template(
        prompt, continue_final_message=True, **{"leading_bos": "", **options}
    )
    assert encoded.prompt_ids.tolist() == theirs["input_ids"]
    assert "assistant_turn_continued" in own.renderer.render(preference).notes
    [(ids, mask)] = encoded.completions
    return own.tokenizer.decode(ids[mask]), own.tokenizer.decode(ids)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("before", [[ASK], [SYSTEM, ASK], [ASK, FOUR, MORE]])
@pytest.mark.parametrize("begun", ["It is ", "It is", "Step 1: two.\nStep 2: "])
def test_the_prompt_is_what_transformers_continues(chat_tokenizer, name, before, begun):
    own = made(chat_tokenizer, TEMPLATES[name])
    trained, whole = continued(own, [*before, {**BEGUN, "content": begun}], REST)
    end = {"two ends": "<|pad|>", "chatml": "<|im_end|>\n<|end|>"}.get(name, "<|end|>")
    assert trained.lstrip() == "four." + end
    assert whole.startswith(trained)


@pytest.mark.parametrize("name", ["trims", "two ends", "blocks"])
def test_later_turns_are_trained_too(chat_tokenizer, name):
    trained, whole = continued(made(chat_tokenizer, TEMPLATES[name]), [ASK, BEGUN], REST, MORE, SIX)
    assert trained.split("four.")[1].endswith("6<|pad|>" if name == "two ends" else "6<|end|>")
    assert MORE["content"] in whole
    assert MORE["content"] not in trained


@pytest.mark.parametrize(
    "folder", [pytest.param("olmo2_dolma2", marks=pytest.mark.slow), "minimind", "torchtitan_test"]
)
def test_real_templates(shared_data, folder):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / folder)
    tulu = (shared_data / "tokenizers" / "tulu_chat_template.jinja").read_text()
    for source in (tokenizer.chat_template or tulu, tulu, NAMED["zephyr"], TRIMS):
        own = made(tokenizer, source)
        assert continued(own, [ASK, BEGUN], REST)[1].lstrip().startswith("four.")


def test_reasoning_that_the_prompt_brings_is_kept_in_its_block(chat_tokenizer):
    own = made(chat_tokenizer, SWITCH)
    preference = Preference([ASK, {**BEGUN, "reasoning_content": "two twos"}], [Candidate([REST], "chosen")])
    rendered = own.renderer.render(preference)
    assert rendered.prompt.endswith("<think>\ntwo twos\n</think>\n\nIt is ")
    assert [part.text for part in rendered.completions[0]] == ["four.<|end|>"]


# The whole turn loses what stands in its thinking block, and the begun one does not.
STRIPS = OPENS.replace("m.content.split('</think>')[-1].lstrip()", "(m.content.split('</think>')[-1] | trim)")


@pytest.mark.parametrize(
    ("source", "prompt", "completion", "problem"),
    [
        (STRIPS, [ASK, {**BEGUN, "content": "<think>\ntwo"}], [{**REST, "content": " twos\n</think>\n\n4"}], "writes the assistant turn that the prompt begins otherwise"),
        (SWITCH, [ASK, BEGUN], [REST, MORE, SIX], "writes the assistant turn that the prompt begins otherwise"),
        (SWITCH, [ASK, BEGUN], [{**REST, "reasoning_content": "two twos"}], "brings reasoning"),
        (SWITCH, [ASK, BEGUN], [{**REST, "content": "It is four."}], "repeats the assistant turn"),
        (LOOP + "{{- m.role -}}" + END, [ASK, BEGUN], [REST], "does not show its text"),
        (CALLS.replace("CALL", "{{- call.function.name -}}"), [ASK, {**BEGUN, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}], [REST], "calls a tool"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_named(chat_tokenizer, source, prompt, completion, problem):
    with pytest.raises(BadRow, match=problem):
        made(chat_tokenizer, source).renderer.render(Preference(prompt, [Candidate(completion, "chosen")]))


def test_steps_already_taken_begin_the_answer(shared_cases, chat_tokenizer, context):
    """Step-DPO's train.py puts them behind the generation prompt; stepdpo_trainer.py appends no end to a step."""
    path = shared_cases / "rows" / "step_dpo.jsonl"
    own = made(chat_tokenizer, NAMED["chatml"])
    for row in map(json.loads, path.read_text().splitlines()):
        preference = FORMAT["step_dpo"].convert(row)
        asked = [{"role": "user", "content": row["prompt"]}]
        opened = own.tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, leading_bos=""
        )
        rendered = own.renderer.render(preference)
        assert rendered.prompt == opened + row["initial_reason_steps"]
        assert [[part.text for part in parts] for parts in rendered.completions] == [
            [row["chosen"]],
            [row["rejected"]],
        ]
    made_rows = prepare(DataSettings(path=str(path)), PrepareSettings(heldout_fraction=0.0), own, context)
    assert made_rows.counts["rows_kept"] == 24
    assert made_rows.counts["notes"]["assistant_turn_continued"] == 24
    assert made_rows.counts["notes"]["step_without_end_token"] == 24


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_step_ends_where_its_text_ends(chat_tokenizer, name):
    own = made(chat_tokenizer, TEMPLATES[name])
    step = Candidate([{**REST, "content": "I add.\n"}], "chosen", ends_turn=False)
    for prompt in ([ASK], [ASK, BEGUN]):
        [parts] = own.renderer.render(Preference(prompt, [step])).completions
        assert "".join(part.text for part in parts).rstrip().endswith("I add.")


def test_a_first_step_has_none_before_it():
    row = {"prompt": "2+2?", "initial_reason_steps": "", "chosen": "4", "rejected": "5"}
    assert FORMAT["step_dpo"].convert(row).prompt == [ASK]


def test_a_transcript_may_end_inside_the_answer():
    row = {"prompt": "\n\nHuman: 2+2?\n\nAssistant: It is ", "chosen": "four.", "rejected": " five."}
    preference = FORMAT["preference"].convert(row)
    assert preference.prompt == [ASK, BEGUN]
    assert [side.completion[0]["content"] for side in preference.candidates] == ["four.", " five."]


def test_sampling_goes_on_inside_the_turn(tmp_path, chat_tokenizer):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": [ASK, BEGUN]}) + "\n" + json.dumps({"messages": [ASK, BEGUN]}))
    own = made(chat_tokenizer, TRIMS)
    found = file_prompts(str(path), own)
    assert [own.tokenizer.decode(prompt.ids) for prompt in found.prompts] == [
        "<|user|>\n2+2?<|end|><|assistant|>\nIt is",
        "<|user|>\n2+2?<|end|><|assistant|>\n",
    ]
    assert not found.problems


def test_template_arguments_of_a_prompt_reach_the_template(tmp_path, chat_tokenizer):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [ASK]}, {"prompt": [ASK], "chat_template_kwargs": {"enable_thinking": False}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = made(chat_tokenizer, SWITCH)
    for prompt, row in zip(file_prompts(str(path), own).prompts, rows, strict=True):
        given = row.get("chat_template_kwargs", {})
        theirs = own.tokenizer.apply_chat_template([ASK], add_generation_prompt=True, **given)
        assert prompt.ids == theirs["input_ids"]


def test_assistant_turns_alone_ask_nothing():
    with pytest.raises(BadRow, match="found assistant turns alone"):
        prompt_of({"prompt": [BEGUN]})
