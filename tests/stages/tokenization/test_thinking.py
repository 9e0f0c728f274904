"""Templates that open thinking blocks, move texts, end turns twice or mark too much: the prompt is transformers' own."""

import copy
import json

import pytest

from cache.errors import DataError
from stages.data.messages import messages
from stages.data.source_row import BadRow, Flagged
from stages.formats import Candidate, Preference
from stages.prepare.stage import prepare
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.render import RenderOptions
from stages.tokenization.template import Template
from tests.stages.tokenization.encoded import encode_all

EOS, PAD = "<|end|>", "<|pad|>"
TURN = "{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}"
LOOP, END = "{%- for m in messages -%}", "{%- endfor -%}"
ASK, MORE = {"role": "user", "content": "2+2?"}, {"role": "user", "content": "3+3?"}
FOUR, SIX = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "6"}
THOUGHT = {**FOUR, "reasoning_content": "two twos"}
ALOUD = {**FOUR, "content": "<think>\ntwo twos\n</think>\n\n4"}
# R1 and QwQ: the generation prompt opens a block, and finished turns have none.
OPENS = (
    LOOP + "{%- if m.role == 'assistant' -%}{{- '<|assistant|>' + m.content.split('</think>')[-1].lstrip() + '<|end|>' -}}"
    "{%- else -%}" + TURN + "{%- endif -%}" + END + "{%- if add_generation_prompt -%}{{- '<|assistant|><think>\n' -}}{%- endif -%}"
)  # fmt: skip
# GLM-4.7: opened by the generation prompt, closed by the turn.
CLOSES = OPENS.replace("'<|assistant|>' + m", "'<|assistant|></think>' + m").replace("<think>\n", "<think>")
# Qwen3: thinking is switched off by a closed block, and finished turns have one only behind the last question.
SWITCH = (
    LOOP + "{%- if m.role == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- if loop.last -%}{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' -}}{%- endif -%}{{- m.content + '<|end|>' -}}"
    "{%- else -%}" + TURN + "{%- endif -%}" + END + "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{%- endif -%}"
)  # fmt: skip


@pytest.fixture
def template(chat_tokenizer):
    def made(source, **options):
        tokenizer = copy.deepcopy(chat_tokenizer)
        tokenizer.chat_template = source
        return Template(tokenizer, "auto", append_eos=True, options=RenderOptions(**options))

    return made


def trained(own, prompt, *completion, tools=None, kwargs=None):
    """The trained text and the notes; the prompt's ids are compared with those of transformers."""
    preference = Preference(
        prompt, [Candidate(list(completion), "chosen")], tools, chat_template_kwargs=kwargs
    )
    [encoded] = encode_all(own, preference)
    if isinstance(encoded, BadRow):
        raise encoded
    theirs = own.tokenizer.apply_chat_template(
        prompt, tools=tools, add_generation_prompt=True, **(own.renderer.arguments | (kwargs or {}))
    )
    assert encoded.prompt_ids.tolist() == theirs["input_ids"]
    [(ids, mask)] = encoded.completions
    return own.tokenizer.decode(ids[mask]), own.renderer.render(preference).notes


@pytest.mark.parametrize("prompt", [[ASK], [ASK, FOUR, MORE]])
@pytest.mark.parametrize(
    ("thinking", "turn", "expected", "note"),
    [
        ("auto", FOUR, "\n</think>\n\n4<|end|>", "thinking_block_closed_empty"),
        ("auto", THOUGHT, "two twos\n</think>\n\n4<|end|>", "thinking_block_written_from_the_row"),
        ("auto", ALOUD, "two twos\n</think>\n\n4<|end|>", "thinking_block_written_from_the_row"),
        ("on", THOUGHT, "two twos\n</think>\n\n4<|end|>", "thinking_block_written_from_the_row"),
        ("empty", ALOUD, "\n</think>\n\n4<|end|>", "reasoning_left_out"),
    ],
)
def test_a_block_that_the_prompt_opens_is_closed_by_the_model(
    template, prompt, thinking, turn, expected, note
):
    text, notes = trained(template(OPENS, thinking=thinking), prompt, turn)
    assert text == expected
    assert note in notes


def test_a_block_that_the_template_closes_is_left_to_it(template):
    assert trained(template(CLOSES), [ASK], FOUR) == ("</think>4<|end|>", set())


def test_with_thinking_on_a_row_without_reasoning_is_dropped_and_counted(template):
    with pytest.raises(Flagged) as found:
        trained(template(OPENS, thinking="on"), [ASK], FOUR)
    assert found.value.reason == "no_reasoning"


def test_thinking_is_switched_off_by_the_templates_own_argument(template):
    own = template(SWITCH, thinking="off")
    assert trained(own, [ASK], FOUR) == ("4<|end|>", set())
    assert trained(own, [ASK], THOUGHT) == ("4<|end|>", {"reasoning_left_out"})
    assert trained(template(SWITCH), [ASK], FOUR) == ("<think>\n\n</think>\n\n4<|end|>", set())
    with pytest.raises(DataError, match=r"no argument that switches thinking off.*prepare\.thinking=empty"):
        template(OPENS, thinking="off")


def test_arguments_of_a_row_reach_the_template_and_are_part_of_its_id(shared_cases, template, context):
    own, path = template(SWITCH), shared_cases / "rows" / "qwen_like.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    text, _ = trained(own, row["prompt"], *row["chosen"], kwargs=row["chat_template_kwargs"])
    assert text == row["chosen"][0]["content"] + EOS
    made = prepare(DataSettings(path=str(path)), PrepareSettings(heldout_fraction=0.0), own, context)
    assert made.counts["rows_kept"] == 8


def test_arguments_are_part_of_the_identity_and_of_the_published_template(template):
    own, plain = template(SWITCH, arguments={"enable_thinking": False}), template(SWITCH)
    assert own.identity() != plain.identity()
    published = copy.deepcopy(plain.tokenizer)
    published.chat_template = own.renderer.published_source
    for given in ({}, {"enable_thinking": True}):
        theirs = plain.tokenizer.apply_chat_template(
            [ASK], tokenize=False, add_generation_prompt=True, **({"enable_thinking": False} | given)
        )
        assert theirs == published.apply_chat_template(
            [ASK], tokenize=False, add_generation_prompt=True, **given
        )


def test_turns_are_found_where_earlier_turns_lose_their_block(template):
    """Only the last turn has its block in a finished conversation."""
    text, notes = trained(template(SWITCH), [ASK], FOUR, MORE, SIX)
    assert text == "4<|end|><think>\n\n</think>\n\n6<|end|>"
    assert notes == set()


# Phi-3: the end of the turn, and at the very end another token.
TWO_ENDS = (
    LOOP + "{{- '<|' + m.role + '|>' + m.content + '<|pad|>\n' -}}" + END
    + "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"
)  # fmt: skip


def test_nothing_is_trained_behind_the_token_at_which_generation_stops(template):
    own = template(TWO_ENDS)
    assert trained(own, [ASK], FOUR)[0] == "4<|pad|>"
    assert trained(own, [ASK], FOUR, MORE, SIX)[0] == "4<|pad|>6<|pad|>"
    assert own.turn_end_ids() == sorted(own.tokenizer.convert_tokens_to_ids([EOS, PAD]))


def test_an_end_that_the_model_folder_declares_ends_a_turn_before_the_next_mark(template):
    """GLM: a turn has no end of its own; generation stops at the mark of the next one."""
    source = TWO_ENDS.replace("<|pad|>\n", "").replace("{{- eos_token -}}", "")
    assert trained(template(source), [ASK], FOUR, MORE, SIX) == (
        "46<|end|>",
        {"turn_without_end_token"},
    )
    own = template(source.replace("'<|' + m.role + '|>'", "{'user': '<|user|>', 'assistant': '<|assistant|>'}[m.role]"),
                   end_ids=[template(source).tokenizer.convert_tokens_to_ids("<|user|>")])  # fmt: skip
    assert trained(own, [ASK], FOUR, MORE, SIX) == ("4<|user|>6<|end|>", set())


def with_blocks(inside, behind="", header_inside=False):
    opening = (
        "{%- generation -%}{{- '<|assistant|>' -}}"
        if header_inside
        else "{{- '<|assistant|>' -}}{%- generation -%}"
    )
    return (
        LOOP + "{%- if m.role == 'assistant' -%}" + opening + inside + "{%- endgeneration -%}" + behind + "{%- else -%}" + TURN
        + "{%- endif -%}" + END + "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        with_blocks("{{- m.content + '<|end|>' -}}"),
        with_blocks("{{- m.content + '<|end|>\n' -}}"),
        with_blocks("{{- m.content -}}", "{{- '<|end|>\n' -}}"),
        with_blocks("{{- m.content + '<|end|>\n' -}}", header_inside=True),
        with_blocks(
            "{{- m.content -}}{%- endgeneration -%}{%- generation -%}{{- '<|end|>' -}}", "{{- '\n' -}}"
        ),
    ],
)
def test_a_block_trains_the_turn_and_its_end_once(template, source):
    own = template(source)
    assert trained(own, [ASK], FOUR)[0] == "4<|end|>"
    assert trained(own, [ASK], FOUR, MORE, SIX)[0] == "4<|end|>6<|end|>"


def test_what_transformers_marks_is_trained(template):
    own = template(with_blocks("{{- m.content + '<|end|>' -}}"))
    marked = own.tokenizer.apply_chat_template(
        [ASK, FOUR], return_dict=True, return_assistant_tokens_mask=True
    )
    text = own.tokenizer.decode(
        [i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    )
    assert trained(own, [ASK], FOUR)[0] == text


CALLS = (
    LOOP + "{%- if m.tool_calls -%}{{- '<|assistant|>' -}}{%- for call in m.tool_calls -%}CALL<|end|>{%- endfor -%}"
    "{%- else -%}" + TURN + "{%- endif -%}" + END + "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)  # fmt: skip
NINE = CALLS.replace(
    "CALL",
    "{%- if call.id | length != 9 -%}{{- raise_exception('nine') -}}{%- endif -%}{{- call.id + call.function.name + (call.function.arguments | tojson) + (tools | string) -}}",
)
AS_TEXT = CALLS.replace("CALL", "{{- call.function.name + '(' + call.function.arguments + ')' -}}")
AS_OBJECT = CALLS.replace("CALL", "{{- call.function.name -}}{{- call.function.arguments | tojson -}}")
PRINTED = CALLS.replace("CALL", "{{- call.function.name -}}{{- call.function.arguments -}}")


def rows_of(shared_cases, name):
    return [json.loads(line) for line in (shared_cases / "rows" / f"{name}.jsonl").read_text().splitlines()]


def test_the_ids_of_tool_calls_reach_the_template(shared_cases, template):
    own = template(NINE)
    for row in rows_of(shared_cases, "tool_rounds"):
        text, _ = trained(own, messages(row, "prompt"), *messages(row, "chosen"), tools=row["tools"])
        assert text == row["chosen"][0]["content"] + EOS


@pytest.mark.parametrize(("source", "wants_text"), [(AS_TEXT, True), (PRINTED, True), (AS_OBJECT, False)])
def test_arguments_are_given_as_an_object_or_as_the_rows_text(shared_cases, template, source, wants_text):
    own = template(source)
    for row in rows_of(shared_cases, "tools_string_arguments"):
        [turn] = copy.deepcopy(row["chosen"])
        function = turn["tool_calls"][0]["function"]
        if not wants_text:
            function["arguments"] = json.loads(function["arguments"])
        head, whole = (
            own.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opens)
            for turns, opens in ((row["prompt"], True), ([*row["prompt"], turn], False))
        )
        assert trained(own, row["prompt"], *messages(row, "chosen"))[0] == whole.removeprefix(head)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {"town": "Oslo"}}}]}  # fmt: skip
RESULT = {"role": "tool", "name": "rain", "content": "9 mm"}
SHOWN = (
    LOOP + "{%- if m.tool_calls -%}{{- '<|assistant|>' + m.tool_calls[0].function.name + (m.tool_calls[0].function.arguments | tojson) -}}"
    "{%- else -%}" + TURN + "{%- endif -%}" + END + "{{- (tools or '') | string | length -}}"
)  # fmt: skip
# Command R+: instructions at the end, in front of the generation prompt.
INSTRUCTED = SHOWN.replace("{{- (tools or '') | string | length -}}", "{{- '<|system|>' + ((tools or '') | string) + '<|end|>' -}}") + "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"  # fmt: skip
# Apertus: a finished conversation has no mark between a result and the answer to it.
UNMARKED = (
    LOOP + "{%- if m.role == 'user' -%}{{- '<|user|>' + m.content + '<|end|>' -}}{%- elif m.role == 'tool' -%}{{- '[' + m.content + ']' -}}"
    "{%- else -%}{%- if loop.previtem.role == 'user' -%}{{- '<|assistant|>' -}}{%- endif -%}"
    "{%- if m.tool_calls -%}{{- m.tool_calls[0].function.name + (tools | string) -}}{%- endif -%}{{- m.content -}}{%- endif -%}" + END
    + "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)  # fmt: skip
# Gemma 4: the result is written with the name of the function that was called; the generation prompt closes a block.
NAMED_RESULT = (
    "{{- '<|system|>' + (tools | string) -}}"
    + LOOP + "{%- if m.role == 'tool' -%}{{- loop.previtem.tool_calls[0].function.name + ':' + m.content + '<|pad|>' -}}"
    "{%- elif m.tool_calls -%}{{- '<|assistant|>' + m.tool_calls[0].function.name + '<|pad|>' -}}"
    "{%- elif loop.first or loop.previtem.role != 'tool' -%}" + TURN + "{%- else -%}{{- m.content + '<|end|>' -}}{%- endif -%}" + END
    + "{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{- '<|assistant|><|channel>thought\n<channel|>' -}}{%- endif -%}"
)  # fmt: skip
# A system text of the template's own, written with the generation prompt alone.
ONLY_ASKED = (
    "{%- if add_generation_prompt -%}{{- '<|system|>Be brief.<|end|>' -}}{%- endif -%}" + LOOP + TURN + END
    + "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)  # fmt: skip
TOOLS = [{"name": "rain"}]


def test_instructions_in_front_of_the_generation_prompt_are_no_part_of_the_answer(template):
    own = template(INSTRUCTED)
    assert trained(own, [ASK], FOUR, tools=TOOLS)[0] == "4<|end|>"
    assert trained(own, [ASK, FOUR, MORE], SIX, tools=TOOLS)[0] == "6<|end|>"
    assert trained(own, [ASK], CALL, tools=TOOLS)[0] == 'rain{"town": "Oslo"}<|end|>'
    with pytest.raises(BadRow, match="another beginning than the conversation has"):
        trained(own, [ASK], CALL, RESULT, FOUR, tools=TOOLS)


def test_an_answer_without_a_mark_behind_a_result_is_what_follows_the_result(template):
    assert trained(template(UNMARKED), [ASK, CALL, RESULT], FOUR, tools=TOOLS)[0] == "4<|end|>"


def test_a_call_is_found_where_its_result_repeats_the_name(template):
    own = template(NAMED_RESULT, end_ids=[template(NAMED_RESULT).tokenizer.pad_token_id])
    text, _ = trained(own, [ASK], CALL, RESULT, FOUR, tools=TOOLS)
    assert text == "rain<|pad|>4<|end|>"


def test_a_text_that_comes_with_the_generation_prompt_is_in_the_context_of_every_turn(template):
    assert trained(template(ONLY_ASKED), [ASK], FOUR, MORE, SIX)[0] == "4<|end|>6<|end|>"


SYSTEM = {"role": "system", "content": "Be brief."}
# Mistral v0.3: the system text stands in the last user turn.
MOVES = (
    "{%- if messages[0].role == 'system' -%}{%- set system, messages = messages[0].content, messages[1:] -%}{%- endif -%}"
    + LOOP + "{%- if m.role == 'user' -%}{{- '<|user|>' -}}"
    "{%- if system is defined and m == (messages | selectattr('role', 'equalto', 'user') | list | last) -%}{{- system + '\n\n' -}}{%- endif -%}"
    "{{- m.content + '<|assistant|>' -}}{%- else -%}{{- m.content + eos_token -}}{%- endif -%}" + END
)  # fmt: skip
NO_SYSTEM = (
    LOOP + "{%- if m.role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
    + TURN + END + "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)  # fmt: skip


def test_a_system_text_that_moves_stands_where_inference_has_it(template):
    own = template(MOVES)
    assert trained(own, [SYSTEM, ASK, FOUR, MORE], SIX)[0] == "6<|end|>"
    with pytest.raises(BadRow, match="another beginning than the conversation has"):
        trained(own, [SYSTEM, ASK], FOUR, MORE, SIX)


def test_a_system_text_is_folded_where_the_template_has_no_place_for_it(template):
    with pytest.raises(BadRow, match="System role not supported"):
        template(NO_SYSTEM).renderer.render(Preference([SYSTEM, ASK], [Candidate([FOUR], "chosen")]))
    own = template(NO_SYSTEM, system="fold")
    rendered = own.renderer.render(Preference([SYSTEM, ASK], [Candidate([FOUR], "chosen")]))
    folded = own.tokenizer.apply_chat_template(
        [{**ASK, "content": "Be brief.\n\n2+2?"}], tokenize=False, add_generation_prompt=True
    )
    assert (rendered.prompt, rendered.notes) == (folded, {"system_text_folded_into_the_user_turn"})
    kept = template(SWITCH, system="fold").renderer.render(
        Preference([SYSTEM, ASK], [Candidate([FOUR], "chosen")])
    )
    assert kept.notes == set()


def test_a_model_without_a_template_is_told_how_its_conversations_are_written(base_tokenizer, chat_tokenizer):
    note = Template(base_tokenizer, "auto", append_eos=True).renderer.fallback_note()
    assert note is not None
    assert "has no chat template" in note
    assert r"\n\nHuman: a\n\nAssistant: b" in note
    for made in (Template(base_tokenizer, "plain", True), Template(chat_tokenizer, "auto", True)):
        assert made.renderer.fallback_note() is None
