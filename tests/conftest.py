"""Tiny models, tokenizers and data that every floor's tests share; all made here, nothing fetched."""

import gc
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# The models here are tiny: a second thread only waits for the first, and on a busy machine it waits long.
# Set before torch is imported, and inherited by every process the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch and transformers bring a million objects; with the default of 700 a tenth of the time goes into looking through
# them for garbage again and again.
gc.set_threshold(50_000)

import pytest
import typer.main
from hypothesis import HealthCheck, settings

from cache.artifacts import Store
from stages.runtime.context import Context

# The same examples in every run, and no failure because a machine was busy.
settings.register_profile(
    "align", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("align")

# What a test without the mark `slow` may not do, so that `make fast` stays fast: start a process, or train (a draft
# of a policy, or of the quickstart's model). Audit events, because every library goes through them.
PROCESS_STARTS = {
    "subprocess.Popen",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.exec",
    "os.system",
}
TRAINED = ("/policy/.tmp-", "/quickstart/.tmp-")
_fast_test: str | None = None


def _refuse_slow_work(event: str, arguments: tuple) -> None:
    if _fast_test is None or event not in (*PROCESS_STARTS, "os.mkdir"):
        return
    what = str(arguments[0]) if arguments else ""
    if what == "uname":  # Python's platform module asks it, once
        return
    if event in PROCESS_STARTS or any(name in what for name in TRAINED):
        pytest.fail(f"{_fast_test} is not marked slow and does {event} {arguments[:2]}")


sys.addaudithook(_refuse_slow_work)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _fast_test
    _fast_test = None if item.get_closest_marker("slow") else item.nodeid
    try:
        return (yield)
    finally:
        _fast_test = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that take long go first, or the other worker waits for them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


ROOT = Path(__file__).resolve().parents[1]
BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = (
    "<|begin|>",
    "<|end|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
# Every turn ends with the end-of-sequence token and a line break, as in ChatML.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
ANIMALS = ("bear", "frog", "owl", "cow", "horse", "duck", "tiger", "swan", "sheep", "eagle", "goat", "crab")
QUESTIONS = ("Where does the {} live?", "What does the {} eat?")
ANSWERS = (
    ("The {} lives by the water.", "In a hole, I do not care."),
    ("It eats grass and berries.", "Go and ask the {} yourself."),
)


def preference_rows() -> list[dict]:
    """24 conversational pairs with distinct prompts; every fourth has a system turn."""
    rows = []
    for number, animal in enumerate(ANIMALS):
        for kind, question in enumerate(QUESTIONS):
            prompt = [{"role": "user", "content": question.format(animal)}]
            if (2 * number + kind) % 4 == 0:
                prompt.insert(0, {"role": "system", "content": "Be kind."})
            chosen, rejected = (answer.format(animal) for answer in ANSWERS[kind])
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
    return rows


def byte_level_bpe(special_tokens: list[str]):
    """A byte-level BPE of 320 ids, so that every text survives it and a character may take several ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        message["content"]
        for row in preference_rows()
        for side in row.values()
        for message in (*side, {"content": "\n\nHuman: \n\nAssistant: "})
    ]
    bpe.train_from_iterator(texts, trainer)
    return bpe


def save_tiny_llama(folder: Path, tokenizer, seed: int) -> Path:
    """A random Llama and its tokenizer as a Hugging Face folder."""
    from tests.tiny_llama import random_llama

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    random_llama(seed, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_chat_tokenizer():
    """With a chat template whose turns end with the end-of-sequence token; no beginning of sequence."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe([EOS, PAD, USER, ASSISTANT, SYSTEM]),
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_base_tokenizer():
    """Without a chat template; as Llama's, it begins every text with the beginning-of-sequence token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = byte_level_bpe([BOS, EOS, PAD])
    bpe.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def chat_tokenizer():
    return make_chat_tokenizer()


@pytest.fixture(scope="session")
def base_tokenizer():
    return make_base_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, chat_tokenizer) -> Path:
    """Folder of a random Llama with a chat template."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", chat_tokenizer, seed=1)


@pytest.fixture(scope="session")
def tiny_base_model(tmp_path_factory, base_tokenizer) -> Path:
    """Folder of a random Llama without a chat template."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-base", base_tokenizer, seed=2)


def write_preferences(path: Path) -> Path:
    """A JSONL file of 24 conversational pairs in a fixed random order."""
    rows = preference_rows()
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def preferences(tmp_path) -> Path:
    """A file of 24 conversational pairs that the test may change."""
    return write_preferences(tmp_path / "preferences.jsonl")


@pytest.fixture(scope="session")
def shared_preferences(tmp_path_factory) -> Path:
    """The same file for fixtures that several tests share; nobody changes it."""
    return write_preferences(tmp_path_factory.mktemp("data") / "preferences.jsonl")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that compare with the bits of a forked process, which computes with one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path) -> Store:
    """An empty store."""
    return Store(tmp_path / "artifacts")


@pytest.fixture
def said() -> list[str]:
    """The lines a stage said, in order."""
    return []


@pytest.fixture
def context(store, said) -> Context:
    """The surroundings of a stage run, over `store`; what it says goes to `said`."""
    return Context(store, log=said.append)


# The parser of a command line, which typer makes anew in each call, from the options of every command.
made_once = cache(typer.main.get_command)


@pytest.fixture
def align(tmp_path, monkeypatch, capsys):
    """Runs a command line in this process and returns (exit code, stdout, stderr)."""
    from pipeline.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(typer.main, "get_command", made_once)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["align", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; tests that want it are skipped where it is not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at ../shared/data (seen from {ROOT.name})")
    return folder


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """Small files in layouts that people use, beside the checkout; tests that want them are skipped where they are not."""
    folder = ROOT.parent / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip(f"no cases at ../shared/cases (seen from {ROOT.name})")
    return folder
