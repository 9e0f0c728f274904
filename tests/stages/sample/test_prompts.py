"""Prompts of a file: text, messages and MT-bench's turns, through the template that trained the policy."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cache.errors import DataError
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.sample.job import SampleJob
from stages.sample.prompts import file_prompts
from stages.settings.fields import SampleSettings
from stages.tokenization.template import Template

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def chat(chat_tokenizer):
    return Template(chat_tokenizer, "auto", append_eos=True)


def prompts_file(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(tmp_path, template, *rows):
    path = prompts_file(tmp_path, *rows)
    return [template.tokenizer.decode(prompt.ids) for prompt in file_prompts(str(path), template).prompts]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?"},
        {"prompt": [USER], "completion": "4"},
        {"instruction": "2+2?", "output": "4"},
        {"question": "2+2?"},
        {"messages": [USER]},
        {"messages": [{"from": "human", "value": "2+2?"}, ASSISTANT]},
        {"messages": [{"role": "human", "content": "2+2?"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"turns": [{"content": "2+2?"}, {"content": "And 3+3?"}]},
        {"question_id": 81, "category": "math", "turns": ["2+2?", "And 3+3?"]},
    ],
)
def test_every_layout_of_a_prompt_is_the_same_prompt(tmp_path, chat, row):
    assert prompts(tmp_path, chat, row) == ["<|user|>2+2?<|end|>\n<|assistant|>"]


def test_system_and_tools_count(tmp_path, chat):
    [text] = prompts(tmp_path, chat, {"prompt": "2+2?", "system": "Be brief."})
    assert text.startswith("<|system|>Be brief.<|end|>\n<|user|>2+2?")
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: tools: .* does not show them"):
        prompts(tmp_path, chat, {"prompt": "2+2?", "tools": [{"name": "add"}]})


def test_a_prompt_whose_text_holds_a_special_token_is_refused(tmp_path, chat):
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: the text spells a special token"):
        prompts(tmp_path, chat, {"prompt": [{"role": "user", "content": "hi<|end|>"}]})


def test_a_column_that_is_not_empty_is_taken_before_one_that_is(tmp_path, chat):
    assert prompts(tmp_path, chat, {"prompt": "", "question": "2+2?"}) == prompts(
        tmp_path, chat, {"prompt": "2+2?"}
    )


@pytest.mark.parametrize(
    "row", [{"prompt": ""}, {"prompt": [ASSISTANT]}, {"text": "2+2?"}, {"turns": []}, {"prompt": 4}]
)
def test_what_cannot_be_asked_is_named_and_the_rest_go_on(tmp_path, chat, row):
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: .*No row of .* has a prompt"):
        prompts(tmp_path, chat, row)
    assert prompts(tmp_path, chat, {"prompt": "fine"}, row) == prompts(tmp_path, chat, {"prompt": "fine"})
    [problem] = file_prompts(str(prompts_file(tmp_path, {"prompt": "fine"}, row)), chat).problems
    assert problem.startswith("prompts.jsonl:2: ")


@pytest.mark.parametrize(
    ("name", "number"), [("mt_bench_question", 80), ("vicuna_bench_question", 80), ("ifeval_input_data", 541)]
)
def test_real_benchmarks(shared_data, chat, name, number):
    assert len(file_prompts(str(shared_data / "eval" / f"{name}.jsonl"), chat).prompts) == number


def test_a_prompt_that_the_model_has_no_positions_for_is_left_out_and_named(
    shared_cases, tiny_model, chat, tmp_path
):
    """The tiny model has 256 positions."""
    path = shared_cases / "prompts" / "prompts_one_long.jsonl"
    models = {"model": ModelSource("tiny", tiny_model)}
    rows: Any = SimpleNamespace(counts={"turn_end_ids": [0]}, path=tmp_path)
    compute = Compute(torch.device("cpu"), torch.float32, 2048)
    every = file_prompts(str(path), chat).prompts
    long = [prompt.id for prompt in every if len(prompt.ids) >= 256]
    job = SampleJob.of(models, rows, chat, SampleSettings(prompts=str(path)), compute)
    assert long == ["prompts_one_long.jsonl:2"]
    [problem] = job.left_out
    assert problem.startswith("prompts_one_long.jsonl:2: the prompt has ")
    assert [prompt.id for prompt in job.prompts] == [prompt.id for prompt in every if prompt.id not in long]
    (tmp_path / "long.jsonl").write_text(path.read_text().splitlines()[1] + "\n")
    with pytest.raises(
        DataError, match=r"long\.jsonl:1: the prompt has .*at most 255 .*None of 1 prompts can be"
    ):
        SampleJob.of(models, rows, chat, SampleSettings(prompts=str(tmp_path / "long.jsonl")), compute)
