"""An LLM judge behind vLLM's own OpenAI-compatible server."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from stages.compare.comparison import Against
from stages.compare.completions import Completed, paired
from stages.judge.endpoint import EndpointJudge
from stages.judge.stage import Asking, judge_pairs
from stages.settings.judge import JudgeSettings
from tests.tiny_llama import random_llama

TEMPLATE = """
user: "{prompt} A: {first} B: {second}"
verdicts: {first: '^A$', second: '^B$', tie: '^C$'}
"""
NUMBER = 5
# The last is longer than the model reads.
OURS = [Completed(str(n), f"Q{n}", f"ours {n}", 0, "policy") for n in range(NUMBER)]
OURS += [Completed("long", "Q", "x" * 300, 0, "policy")]
THEIRS = [Completed(own.id, own.prompt, f"theirs {own.id}", 0, "reference") for own in OURS]


def save_model_that_says(reply: str, folder: Path, tokenizer) -> Path:
    """A Llama that writes `reply` and the end of its turn after any prompt of the chat template.

    Without attention and MLPs the last token alone decides the next: the output layer maps each to its successor.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = random_llama(1, tie_word_embeddings=False, **special)
    opening = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=False
    )
    chain = [opening[-1], *tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = model.model.norm(model.model.embed_tokens.weight)
        model.lm_head.weight.zero_()
        for token, successor in pairwise(chain):
            model.lm_head.weight[successor] += states[token]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """The address of a server of `model`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "always-a", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed on this system")
def test_a_model_that_always_names_the_first_is_seen_to_be_biased(
    tmp_path, chat_tokenizer, context, monkeypatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # One process for the engine and its worker: each imports everything.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    template = tmp_path / "short.yaml"
    template.write_text(TEMPLATE)
    model = save_model_that_says("A", tmp_path / "judge", chat_tokenizer)
    with served(model, tmp_path / "server.log") as address:
        judge = EndpointJudge.of(JudgeSettings(endpoint=address, template=str(template), max_tokens=8))
        assert judge.model == "always-a"
        verdicts = judge_pairs(judge, paired(OURS, THEIRS).pairs, Asking(True), context).verdicts
    *short, first, second = verdicts
    found = Against.of(short)
    assert found.rate is not None
    assert found.position is not None
    assert (found.rate.ties, found.rate.rate) == (NUMBER, 0.5)
    assert (found.position.first_wins, found.position.disagreements) == (1.0, NUMBER)
    assert "256" in (first.problem or "")
    assert (first.preference, second.preference) == (None, None)
    # The server's own count of what it read: the chat template's tokens.
    [expected] = {
        len(
            chat_tokenizer.apply_chat_template(
                [{"role": "user", "content": f"Q{n} A: ours {n} B: theirs {n}"}], add_generation_prompt=True
            )["input_ids"]
        )
        for n in range(NUMBER)
    }
    assert {verdict.prompt_tokens for verdict in short} == {expected}
    assert {verdict.completion_tokens for verdict in short} == {2}
