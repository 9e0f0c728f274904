"""A published folder talks as its rows did: transformers alone renders the prompts of the rows and stops at their end."""

import itertools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.data.rows import RowSet
from stages.models.chat_files import ChatFiles, ChatFormat, write_chat_files
from stages.models.loading import ModelSource
from stages.prepare.stage import prepare
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.template import Template

# Ends a turn with a token that is not the end of sequence, as Llama 3 and Gemma do; and begins it as others do.
OWN_END = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + END -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@pytest.fixture
def source(request, tmp_path):
    """A copy of a model folder of this fixture's name, with the given generation configuration."""

    def source(name, generation=None):
        folder = tmp_path / "source"
        shutil.copytree(request.getfixturevalue(name), folder)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return ModelSource("source", folder)

    return source


@pytest.fixture
def published(context, preferences, tmp_path):
    """The rows of the 24 conversations under a template, and the folder of a policy that was trained on them."""

    def published(source, choice, data=None, append_eos=True):
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        settings = PrepareSettings(heldout_fraction=0.0)
        data = DataSettings(path=str(data or preferences))
        rows = prepare(data, settings, Template(tokenizer, choice, append_eos), context)
        folder = tmp_path / "policy"
        AutoModelForCausalLM.from_pretrained(source.folder).save_pretrained(folder)
        write_chat_files(source, ChatFormat.of(rows), folder)
        return rows, folder

    return published


def own_end(tmp_path, end):
    path = tmp_path / "own.jinja"
    path.write_text(OWN_END.replace("END", repr(end)))
    return str(path)


def conversations(preferences):
    return [json.loads(line) for line in preferences.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "chatml", "zephyr", "tulu", "own"])
@pytest.mark.parametrize("model", ["tiny_model", "tiny_base_model"])
def test_the_template_of_the_folder_gives_the_ids_of_the_rows(
    source, published, preferences, tmp_path, model, choice
):
    choice = own_end(tmp_path, "<|pad|>") if choice == "own" else choice
    rows, folder = published(source(model), choice)
    tokenizer, found = AutoTokenizer.from_pretrained(folder), RowSet.of(rows, "train")
    prompts = [found.prompt(start).tolist() for start in found.starts]
    chats = [row["prompt"] for row in conversations(preferences)]
    theirs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    assert prompts == theirs
    chosen = found.completion(found.starts[0]).tolist()
    whole = chats[0] + conversations(preferences)[0]["chosen"]
    assert (
        tokenizer.apply_chat_template(whole, return_dict=False)[: len(prompts[0] + chosen) - 1]
        == prompts[0] + chosen[:-1]
    )


def generated(folder, rows, forced):
    """Ids that `generate()` of transformers adds to the first prompt, where the fourth is `forced`."""

    class Forced:
        def __call__(self, ids, scores):
            token = forced if ids.shape[1] == len(prompt) + 3 else 5
            return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([token]), 0.0)

    found = RowSet.of(rows, "train")
    prompt = found.prompt(found.starts[0]).tolist()
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=9,
        logits_processor=[Forced()],
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("declared", [None, {"eos_token_id": 0, "do_sample": True, "top_k": 7}])
def test_where_rows_end_with_another_token_everybody_stops_there(source, published, tmp_path, declared):
    end = "<|assistant|>"
    start = source("tiny_model", declared)
    rows, folder = published(start, own_end(tmp_path, end))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    id_ = tokenizer.convert_tokens_to_ids(end)
    found = RowSet.of(rows, "train")
    assert {int(found.completion(row)[-1]) for row in range(len(found))} == {id_}
    assert generated(folder, rows, id_) == [5, 5, 5, id_]
    assert len(generated(start.folder, rows, id_)) == 9
    # llama.cpp takes the end of sequence from here, vLLM from here and from the list.
    assert (
        tokenizer.eos_token == json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == end
    )
    written = json.loads((folder / "generation_config.json").read_text())
    eos = AutoTokenizer.from_pretrained(start.folder).eos_token_id
    assert written["eos_token_id"] == [eos, id_]
    assert {key: written[key] for key in declared or {}} == {
        **(declared or {}),
        **({"eos_token_id": [eos, id_]} if declared else {}),
    }


def test_what_the_source_declares_stays(source, published, tmp_path):
    """As Gemma: the end of turn stands in the list beside the end of sequence."""
    tokenizer = AutoTokenizer.from_pretrained(source("tiny_model").folder)
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
    generation = {"eos_token_id": [7, eos, turn], "do_sample": True, "temperature": 0.6}
    folder = tmp_path / "source"
    (folder / "generation_config.json").write_text(json.dumps(generation))
    rows, policy = published(ModelSource("source", folder), own_end(tmp_path, "<|user|>"))
    assert json.loads((policy / "generation_config.json").read_text()) == generation
    assert AutoTokenizer.from_pretrained(policy).eos_token_id == eos
    assert generated(policy, rows, turn) == [5, 5, 5, turn]


def test_rows_without_a_template_leave_that_of_the_source(source, published, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"prompt": "q", "chosen": " a", "rejected": " b"}\n')
    _, folder = published(source("tiny_base_model"), "auto", tmp_path / "text.jsonl")
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


def test_an_adapter_has_the_tokenizer_alone(source, published, tmp_path):
    start = source("tiny_model")
    rows, _ = published(start, "zephyr")
    (tmp_path / "adapter").mkdir()
    write_chat_files(start, ChatFormat.of(rows), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "generation_config.json").exists()
    assert "<|assistant|>\n" in AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template


def test_later_checkpoints_have_the_files_of_the_first_and_do_not_open_the_source(
    source, published, tmp_path
):
    """Of the tokenizer's two templates, rows of plain text use none: both are published, one in a folder of its own."""
    start = source("tiny_model", {"do_sample": True})
    tokenizer = AutoTokenizer.from_pretrained(start.folder)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(start.folder)
    (tmp_path / "text.jsonl").write_text('{"prompt": "q", "chosen": " a", "rejected": " b"}\n')
    rows, folder = published(start, "plain", tmp_path / "text.jsonl")
    files = ChatFiles(start, ChatFormat.of(rows))
    for number in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{number}"
        checkpoint.mkdir()
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(folder / name, checkpoint / name)
        files.write(checkpoint)
        shutil.rmtree(start.folder, ignore_errors=True)
    first, second = (tmp_path / f"checkpoint-{number}" for number in (1, 2))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert Path("additional_chat_templates/tool_use.jinja") in names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert json.loads((second / "generation_config.json").read_text())["do_sample"] is True


def test_what_others_write_at_the_same_time_is_no_chat_file(source, published, tmp_path):
    """Other ranks write their shards into the folder of a checkpoint while the first saves the tokenizer there."""
    start = source("tiny_model")
    rows, folder = published(start, "zephyr")
    files, done = ChatFiles(start, ChatFormat.of(rows)), threading.Event()

    def other_rank():
        for number in itertools.count():
            (folder / "shards").mkdir(exist_ok=True)
            (folder / "shards" / f"{number:05d}.safetensors").touch()
            if done.wait(0.001):
                return

    with ThreadPoolExecutor() as pool:
        other = pool.submit(other_rank)
        files.write(folder)
        done.set()
    other.result()
    (tmp_path / "next").mkdir()
    files.write(tmp_path / "next")
    assert list((folder / "shards").iterdir())
    assert {path.name for path in (tmp_path / "next").iterdir()} == {
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_an_ordinary_last_token_ends_no_turn(chat_tokenizer):
    """Without an end token, and with none appended, a turn ends with any token of the text."""
    import copy

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    assert Template(tokenizer, "auto", append_eos=False).turn_end_ids() == [tokenizer.eos_token_id]
