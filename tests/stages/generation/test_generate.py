"""Stage 4's engines: what does not need vLLM, on models made here."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cache.errors import DataError, UsageError
from stages.generation.contract import EngineError
from stages.generation.engines import auto_engine, open_engine
from stages.generation.generate import Completion, generate, request_seed
from stages.generation.open_model import open_model
from stages.generation.requests import EngineOptions, Prompt, Request, Sampling
from stages.generation.transformers_engine import keep_likeliest, sample_network
from stages.generation.vllm_process import failure_cause, kv_cache_bytes
from tests.tiny_llama import EOS, VOCAB_SIZE, greedy_alone, random_prompts, save_model

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=12, seed=7, num_samples=1)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9, top_k=50, num_samples=2)
OPTIONS = EngineOptions(dtype="float32", max_model_length=96)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("other"), seed=1)


def sample(engine, model: Path, prompts, sampling: Sampling, options=OPTIONS) -> list[Completion]:
    with open_engine(engine) as running:
        return generate(running, open_model(model, sampling, options), prompts, sampling, options)


def prompt(*ids: int, id: str = "a") -> Prompt:
    return Prompt(id, "", list(ids))


def by_prompt(completions: list[Completion], prompts: list[Prompt]) -> dict[tuple[str, int], tuple]:
    return {(prompts[c.prompt_index].id, c.sample_index): (c.seed, c.token_ids, c.text) for c in completions}


def test_seed_depends_on_run_row_and_sample_only():
    seeds = {request_seed(run, row, index) for run in (0, 1) for row in ("a", "b", "a0") for index in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert request_seed(0, "a", 0) == 3354106440731298  # written into files: must never change


@pytest.mark.slow
def test_greedy_equals_generate_one_by_one(tiny: Path):
    prompts = random_prompts(20)
    completions = sample("transformers", tiny, prompts, GREEDY)
    assert [c.token_ids for c in completions] == [greedy_alone(tiny, p.ids, [EOS], 12) for p in prompts]
    assert [(c.prompt_index, c.sample_index) for c in completions] == [(index, 0) for index in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_completion_does_not_depend_on_the_batch(tiny: Path, dtype):
    """Flat probabilities and many tokens, so that in bfloat16 the shape of a batch alone would change some."""
    options = replace(OPTIONS, dtype=dtype)
    flat = replace(SAMPLED, temperature=2.0, top_p=1.0, top_k=0, max_tokens=32)
    prompts = random_prompts(24)
    whole = by_prompt(sample("transformers", tiny, prompts, flat, options), prompts)
    part = prompts[:0:-2]
    few = by_prompt(sample("transformers", tiny, part, replace(flat, num_samples=1), options), part)
    assert few == {key: whole[key] for key in few}
    assert len({tuple(tokens) for _, tokens, _ in whole.values()}) == 48


@pytest.mark.slow
def test_another_run_seed_gives_other_completions(tiny: Path):
    prompts = random_prompts(3)
    one = sample("transformers", tiny, prompts, SAMPLED)
    two = sample("transformers", tiny, prompts, replace(SAMPLED, seed=8))
    assert all(a.token_ids != b.token_ids for a, b in zip(one, two, strict=True))


@pytest.mark.slow
def test_sampled_frequencies_follow_the_probabilities(tiny: Path):
    """Of 800 first tokens at temperature 2 and top_k 4, each share is within 4 standard errors (0.07)."""
    ids = [5, 9, 30]
    network = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    logits = network(torch.tensor([ids])).logits[0, -1].detach()
    top = logits.topk(4)
    expected = dict(zip(top.indices.tolist(), (top.values / 2).softmax(-1).tolist(), strict=True))
    sampling = replace(GREEDY, temperature=2.0, top_k=4, max_tokens=1, num_samples=800)
    drawn = [c.token_ids[0] for c in sample("transformers", tiny, [prompt(*ids)], sampling)]
    assert set(drawn) <= set(expected)
    for token, share in expected.items():
        assert drawn.count(token) / 800 == pytest.approx(share, abs=0.07)


def test_a_failed_generation_leaves_the_generation_config_of_the_model(tiny: Path):
    """A policy that is sampled while it trains is saved later with this configuration."""
    network = AutoModelForCausalLM.from_pretrained(tiny)
    own = network.generation_config
    model = open_model(tiny, GREEDY, EngineOptions("float32", 64))
    with pytest.raises(IndexError):
        list(sample_network(network, model, [Request(0, 0, 0, [VOCAB_SIZE], 0.0)], GREEDY))
    assert network.generation_config is own
    assert own.temperature == 9.0


def test_keep_likeliest():
    """Probabilities 0.4, 0.3, 0.2, 0.1: 0.4 + 0.3 reaches 0.65; of the two likeliest, 4/7 already reaches 0.5."""
    logits = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()

    def kept(top_k: int, top_p: float) -> list[bool]:
        return keep_likeliest(logits, top_k, top_p).isfinite()[0].tolist()

    assert kept(0, 1.0) == kept(9, 1.0) == [True] * 4
    assert kept(2, 1.0) == kept(0, 0.65) == [False, True, False, True]
    assert kept(2, 0.5) == kept(0, 0.01) == [False, True, False, False]


@pytest.mark.slow
def test_stop_ids_end_a_completion(tiny: Path):
    prompts = random_prompts(6)
    free = sample("transformers", tiny, prompts, GREEDY)
    assert [c.finish_reason for c in free] == ["length"] * 6
    assert all(len(c.token_ids) == 12 for c in free)
    stop = free[0].token_ids[5]
    stopped = sample("transformers", tiny, prompts, replace(GREEDY, stop_token_ids=(stop,)))
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].token_ids == free[0].token_ids[: free[0].token_ids.index(stop) + 1]
    assert stopped[0].text == "".join(f" w{token}" for token in stopped[0].token_ids[:-1])


def test_every_declared_end_token_stops(tiny: Path, tmp_path: Path):
    save_model(tmp_path, seed=0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 17]}))
    assert open_model(tmp_path, replace(GREEDY, stop_token_ids=(40,)), OPTIONS).stop_token_ids == [
        EOS,
        17,
        40,
    ]


def test_context_limits_the_completion(tiny: Path):
    completion = sample("transformers", tiny, [prompt(*[5] * 90)], GREEDY)[0]
    assert (len(completion.token_ids), completion.finish_reason) == (6, "length")
    roomy = replace(OPTIONS, max_model_length=4096)
    assert open_model(tiny, GREEDY, roomy).max_length == 128


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "Row bad: the prompt is empty"),
        ([5] * 96, "Row bad: the prompt has 96 tokens; at most 95"),
        ([5, VOCAB_SIZE], "Row bad: token id 512 is not in the vocabulary"),
        ([5, -1], "Row bad: token id -1 is not in the vocabulary"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_bad_prompt_is_named_before_anything_starts(tiny: Path, engine, ids, message):
    with pytest.raises(DataError, match=message):
        sample(engine, tiny, [prompt(5, id="good"), prompt(*ids, id="bad")], GREEDY)


def test_no_model_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"nothing/config\.json is not the configuration of a model"):
        sample("transformers", tmp_path / "nothing", [prompt(5)], GREEDY)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.001), ("temperature", 2.5), ("top_p", 0.0), ("top_k", -1), ("num_samples", 0)],
)
def test_sampling_out_of_range(name, value):
    with pytest.raises(UsageError, match=rf"sample\.{name} is {value}; expected"):
        replace(GREEDY, **{name: value})


def test_without_vllm(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find_spec(name, *rest)
    )
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(
        EngineError, match=r"vLLM is not installed\. Install it with: pip install -e '\.\[vllm"
    ):
        sample("vllm", tiny, [prompt(5)], GREEDY)
    assert auto_engine() == "transformers"


@pytest.mark.slow
def test_several_models_are_sampled_by_one_engine(tiny: Path, other: Path):
    prompts = random_prompts(3)
    alone = [sample("transformers", model, prompts, SAMPLED) for model in (tiny, other)]
    with open_engine("transformers") as engine:
        both = [
            generate(engine, open_model(model, SAMPLED, OPTIONS), prompts, SAMPLED, OPTIONS)
            for model in (tiny, other)
        ]
    assert both == alone
    assert both[0] != both[1]


@pytest.mark.slow
def test_each_prompt_may_have_its_own_temperature(tiny: Path):
    """MT-bench's categories: the same completions as with that temperature for all."""
    prompts = random_prompts(4)
    cold = [replace(one, temperature=0.0) if number % 2 else one for number, one in enumerate(prompts)]
    mixed = sample("transformers", tiny, cold, SAMPLED)
    warm = sample("transformers", tiny, prompts, SAMPLED)
    greedy = sample("transformers", tiny, prompts, replace(SAMPLED, temperature=0.0))
    assert mixed == [(greedy if one.prompt_index % 2 else warm)[place] for place, one in enumerate(mixed)]


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("Traceback ...\n  raise\n[rank0]: RuntimeError: no such head\n", "RuntimeError: no such head"),
        (
            "ValueError: small KV\nRuntimeError: Engine core initialization failed. See above",
            "ValueError: small KV",
        ),
        (
            "m.ValidationError: 1 error for X\n  Value error, len is 9 [type=x]\n    For more, see URL",
            "m.ValidationError: 1 error for X | Value error, len is 9 [type=x]",
        ),
        ("    load()\nMemoryError\n", "MemoryError"),
        ("one\n\ntwo\nthree\nKilled\n", "two | three | Killed"),
        ("", "it wrote nothing"),
    ],
)
def test_cause_of_a_failed_worker(log, cause):
    assert failure_cause(log) == cause


def test_kv_cache_has_room_for_two_full_sequences(tiny: Path):
    """Llama 7B in float32: 2 * 32 layers * 32 heads * 128 * 4 bytes = 1 MiB a token, two sequences of 1024 tokens."""
    model = open_model(tiny, GREEDY, OPTIONS)
    assert kv_cache_bytes(model, OPTIONS) == 512 << 20
    large = replace(model, config=LlamaConfig(), max_length=1024)
    assert kv_cache_bytes(large, OPTIONS) == 2 << 30
    assert kv_cache_bytes(large, replace(OPTIONS, dtype="bfloat16")) == 1 << 30
    assert kv_cache_bytes(large, replace(OPTIONS, kv_cache_bytes=5)) == 5
