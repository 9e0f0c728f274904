"""From prompts to completions: once for each model, in turns, resumed where it stopped, nothing left out in silence."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import load_dataset

from cache.artifacts import Artifact
from cache.errors import DataError, UsageError
from stages.data.rows import SPLITS
from stages.generation.completion_files import read_jsonl
from stages.generation.contract import Engine
from stages.generation.engines import open_engine
from stages.generation.generate import generate
from stages.generation.transformers_engine import TransformersEngine
from stages.models.loading import ModelSource
from stages.prepare.stage import prepare
from stages.runtime.compute import Compute
from stages.sample import stage
from stages.sample.job import SampleJob
from stages.sample.prompts import row_prompts
from stages.sample.stage import find_completions, sample
from stages.settings.data import DataSettings, PrepareSettings
from stages.settings.fields import SampleSettings
from stages.tokenization.template import Template
from tests.conftest import save_tiny_llama

COMPUTE = Compute(torch.device("cpu"), torch.float32, 2048)
ROWS: Any = SimpleNamespace(counts={"turn_end_ids": [0]}, path=Path("rows"))
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Why?", "And then?"]},
    {"question_id": 82, "category": "math", "turns": ["2+2?", "And 3?"]},
    {"question_id": 83, "category": "none", "turns": ["Who?"]},
]


@pytest.fixture(scope="module")
def chat(chat_tokenizer):
    return Template(chat_tokenizer, "auto", append_eos=True)


@pytest.fixture(scope="module")
def policies(tmp_path_factory, chat_tokenizer, tiny_model) -> dict[str, ModelSource]:
    other = save_tiny_llama(tmp_path_factory.mktemp("models") / "other", chat_tokenizer, seed=9)
    return {"one": ModelSource("org/one", tiny_model), "two": ModelSource(str(other), other)}


def written(tmp_path, rows, name="prompts.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def job_of(models, chat, prompts: str | None, rows=ROWS, **settings) -> SampleJob:
    given = {"engine": "transformers", "max_tokens": 5, "num_prompts": None, "prompts": prompts, **settings}
    return SampleJob.of(models, rows, chat, SampleSettings(**given), COMPUTE)


def lines(artifact: Artifact) -> list[dict]:
    return read_jsonl(artifact.path / "completions.jsonl")


@pytest.mark.slow
def test_the_reference_is_sampled_once_for_all_policies(policies, chat, tmp_path, context, monkeypatch):
    path = written(tmp_path, [{"prompt": "Hi", "id": "a"}, {"prompt": "Ho", "id": "b"}])
    sampled: list[str] = []
    complete = stage._sample_model

    def counted(job, side, *rest):
        sampled.append(job.models[side].short_name)
        return complete(job, side, *rest)

    monkeypatch.setattr(stage, "_sample_model", counted)
    reference = policies["two"]
    first = sample(job_of({"policy": policies["one"], "reference": reference}, chat, path), context)
    both_again = job_of({"policy": reference, "reference": policies["one"]}, chat, path)
    assert find_completions(both_again, context)["policy"].path == first["reference"].path
    assert sampled == ["one", reference.folder.name]
    assert [line["keys"] for line in lines(first["policy"])] == [{"id": "a"}, {"id": "b"}]
    assert {line["model"] for line in lines(first["reference"])} == {"other"}  # and no path of this machine
    assert str(tmp_path) not in (first["reference"].path / "alpaca_eval.json").read_text()
    other_seed = job_of({"policy": policies["one"]}, chat, path, seed=1)
    assert not find_completions(other_seed, context)


def test_there_are_prompts_times_samples_lines_in_order_that_datasets_reads(
    policies, chat, tmp_path, context
):
    rows = [{"prompt": f"Number {number}?"} for number in range(5)]
    made = sample(job_of({"model": policies["one"]}, chat, written(tmp_path, rows), num_samples=3), context)
    found = lines(made["model"])
    assert [(line["id"], line["sample_index"]) for line in found] == [
        (f"prompts.jsonl:{row + 1}", index) for row in range(5) for index in range(3)
    ]
    loaded = load_dataset(
        "json", data_files=str(made["model"].path / "completions.jsonl"), cache_dir=str(tmp_path / "hf")
    )["train"]
    assert loaded["completion"][:] == [line["completion"] for line in found]


@pytest.mark.slow
def test_the_second_turn_sees_the_first_answer_and_categories_their_temperatures(
    policies, chat, tmp_path, context
):
    path = written(tmp_path, MT_BENCH)
    job = job_of({"model": policies["one"]}, chat, path, temperature=1.5, num_samples=2)
    made = sample(job, context)["model"]
    found = lines(made)
    assert [(line["keys"]["question_id"], line["turn"], line["sample_index"]) for line in found] == [
        *((81, turn, sample) for sample in (0, 1) for turn in (1, 2)),
        *((82, turn, sample) for sample in (0, 1) for turn in (1, 2)),
        *((83, 1, sample) for sample in (0, 1)),
    ]
    for first, second in pairwise(found):
        if second["turn"] == 2:
            assert second["prompt"] == [
                *first["prompt"],
                {"role": "assistant", "content": first["completion"]},
                {"role": "user", "content": MT_BENCH[first["keys"]["question_id"] - 81]["turns"][1]},
            ]
    math = [line for line in found if line["keys"]["question_id"] == 82]
    greedy = {(line["turn"], line["completion"]) for line in math}
    assert len(greedy) == 2  # both samples, in both turns, at temperature 0
    [alone] = job_of({"model": policies["one"]}, chat, path).prompts[1:2]
    asked = job.encode([{"role": "user", "content": "2+2?"}])
    assert alone.ids == asked
    second = replace(alone, id="x", ids=job.encode(math[1]["prompt"]), next_turns=())
    with open_engine("transformers") as engine:
        sampling = replace(job.sampling, num_samples=1)
        [completion] = generate(engine, job.open(policies["one"]), [second], sampling, job.options)
    assert completion.text == math[1]["completion"]
    answers = [
        json.loads(line) for line in (made.path / "model_answer" / "one.jsonl").read_text().splitlines()
    ]
    assert [answer["question_id"] for answer in answers] == [81, 82, 83]
    assert [len(answer["choices"][1]["turns"]) for answer in answers] == [2, 2, 1]


@pytest.mark.slow
def test_a_later_turn_without_room_is_empty_and_counted(policies, chat, tmp_path, context):
    """The tiny model has 256 positions."""
    path = written(tmp_path, [MT_BENCH[0], {**MT_BENCH[1], "turns": ["2+2?", "And " * 300]}])
    made = sample(job_of({"model": policies["one"]}, chat, path), context)["model"]
    assert [line["finish_reason"] == "not_asked" for line in lines(made)] == [False, False, False, True]
    assert lines(made)[3]["completion"] == ""
    assert made.counts["not_asked"] == 1


class Stopped(TransformersEngine):
    """The engine, interrupted after a number of completions, as by Ctrl-C."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def complete(self, model, requests, *rest) -> Iterator[tuple[int, list[int]]]:
        self.asked = len(requests)
        for answer in super().complete(model, requests, *rest):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield answer


def sample_with(engine: Engine, job: SampleJob, context) -> Artifact:
    return stage._sample_model(job, "model", engine, context, None)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"", b"[1, 0, 3, [4", b"[1, 0, 1, [5]]"])
def test_an_interrupted_run_continues_and_writes_the_same_completions(
    policies, chat, tmp_path, context, damage
):
    """Also where a crash left a line that is not whole, which is sampled again."""
    rows = [{"prompt": f"Number {number}?"} for number in range(20)]
    job = job_of({"model": policies["one"]}, chat, written(tmp_path, rows), num_samples=2)
    with pytest.raises(KeyboardInterrupt), Stopped(after=19) as engine:
        sample_with(engine, job, context)
    [journal] = context.store.root.glob("completions/.tmp-*/progress.jsonl")
    with journal.open("ab") as file:
        file.write(damage)
    with Stopped(after=1000) as engine:
        resumed = sample_with(engine, job, context)
        assert engine.asked == 40 - 19
    assert sorted(path.name for path in resumed.path.iterdir() if not path.name.startswith(".")) == [
        "alpaca_eval.json",
        "completions.jsonl",
        "config.yaml",
        "manifest.json",
    ]
    whole = sample(job, replace(context, store=type(context.store)(tmp_path / "whole")))["model"]
    assert (whole.path / "completions.jsonl").read_bytes() == (
        resumed.path / "completions.jsonl"
    ).read_bytes()


def test_a_prompt_that_cannot_be_completed_is_left_out_or_stops_the_strict(policies, chat, tmp_path, context):
    path = written(
        tmp_path, [{"prompt": "Hi"}, {"prompt": "long " * 300}, {"text": "none"}, {"prompt": "Ho"}]
    )
    made = sample(job_of({"model": policies["one"]}, chat, path), context)["model"]
    assert made.counts["num_prompts"] == 2
    assert [problem.split(":")[1] for problem in made.counts["left_out"]] == ["3", "2"]
    with pytest.raises(DataError, match=r"prompts\.jsonl:3: .*sample\.on_bad_prompt=skip"):
        job_of({"model": policies["one"]}, chat, path, on_bad_prompt="error")


def test_rows_that_prepare_made_give_their_prompts(
    policies, chat, tmp_path, context, preferences, base_tokenizer
):
    rows = prepare(DataSettings(path=str(preferences)), PrepareSettings(), chat, context)
    job = job_of({"model": policies["one"]}, chat, str(rows.path))
    from_file = job_of({"model": policies["one"]}, chat, str(preferences))
    assert {tuple(one.ids) for one in job.prompts} == {tuple(one.ids) for one in from_file.prompts}
    assert len(job.prompts) == 24
    base = Template(base_tokenizer, "plain", append_eos=True)
    plain = written(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], "plain.jsonl")
    others = prepare(DataSettings(path=plain), PrepareSettings(), base, context)
    with pytest.raises(UsageError, match=r"prepared with another tokenizer than that of the policy"):
        job_of({"model": policies["one"]}, chat, str(others.path))


def test_preferences_without_a_column_of_prompts_have_prompts_too(policies, chat, tmp_path):
    turns = [{"role": "user", "content": "2+2?"}]
    row = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    job = job_of({"model": policies["one"]}, chat, written(tmp_path, [row]))
    assert [one.content for one in job.prompts] == [turns]


def test_a_prompt_of_the_rows_is_a_message_again(chat, context, preferences):
    """One that is more than a user turn is its text, without special tokens."""
    rows = prepare(DataSettings(path=str(preferences)), PrepareSettings(), chat, context)
    found = {str(one.content) for one in row_prompts(rows, SPLITS, chat)}
    asked = [json.loads(line)["prompt"] for line in preferences.read_text().splitlines()]
    single = {str(prompt) for prompt in asked if len(prompt) == 1}
    assert single <= found
    assert found - single == {f"Be kind.\n{prompt[1]['content']}\n" for prompt in asked if len(prompt) == 2}
