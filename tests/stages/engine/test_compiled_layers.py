"""`compute.compile`: compiled layers score as the layers that they are made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch._inductor import cpu_vec_isa
from transformers import AutoModelForCausalLM, LlamaConfig

from cache.errors import MachineError
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.compiled_layers import compile_layers
from stages.engine.packs import build_pack
from stages.engine.scorer import Scorer
from stages.engine.self_check import Way
from stages.runtime.compute import Compute

COMPILED = Compute(torch.device("cpu"), torch.float32, 2048, compile=True)
PLAIN = replace(COMPILED, compile=False)
SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_attention_heads=2, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else None
    return model


def pairs() -> RowSet:
    random = np.random.default_rng(3)

    def draw(length: int) -> np.ndarray:
        return random.integers(0, SHAPE["vocab_size"], length).astype(np.int32)

    def rows(*lengths: int) -> list[Row]:
        return [Row("ranked", draw(length), np.ones(length, bool)) for length in lengths]

    examples = [Example("0", "a", draw(20), rows(7, 30)), Example("1", "a", draw(3), rows(1, 12))]
    return RowSet([to_table(examples, [0, 1])])


def scored(scorer: Scorer, rows: RowSet, packs: list[list[int]]) -> torch.Tensor:
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    return torch.cat(
        [scorer(build_pack(rows, [groups[number] for number in pack])).completion_logps for pack in packs]
    )


@pytest.mark.slow
def test_compiled_layers_score_and_learn_as_they_are_written() -> None:
    """Log-probs and gradients, with checkpoints; and to the bit whatever shares a pack, so step 0 stays exact."""
    rows, found, gradients = pairs(), [], []
    for compute in (PLAIN, COMPILED):
        model = model_of()
        scorer = Scorer(model, compute, print, gradient_checkpointing=compute.compile)
        torch._dynamo.utils.counters.clear()
        found.append(scored(scorer, rows, [[0, 1]]))
        assert bool(torch._dynamo.utils.counters["frames"]) == compute.compile
        found[-1].sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, compiled = found
    torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-5)
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-7, name
    torch.testing.assert_close(scored(scorer, rows, [[0], [1]]), compiled, rtol=0, atol=0)


@pytest.mark.slow
def test_rows_alone_and_generation_run_the_layers_as_they_are_written() -> None:
    """The audit compares packs with rows alone: so it sees what the compiler did wrong."""
    scorer = Scorer(model_of(), COMPILED, print)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), scorer.rows_alone():
        scored(scorer, pairs(), [[0, 1]])
    ids = torch.ones(1, 3, dtype=torch.long)
    scorer.in_generation_mode(lambda model: model.generate(ids, max_new_tokens=4, do_sample=False))
    assert not torch._dynamo.utils.counters["frames"]


def test_a_model_that_is_not_packed_is_not_compiled_and_says_so() -> None:
    said: list[str] = []
    Scorer(model_of(), COMPILED, said.append, checked=Way(padded=True))
    assert said == ["The layers of LlamaForCausalLM are not compiled: its rows are not scored in packs."]


@pytest.mark.slow
def test_code_for_other_vector_instructions_is_not_taken_from_the_cache() -> None:
    """Their width is in torch's settings, which are a part of the key of its cache."""
    chosen = cpu_vec_isa.pick_vec_isa()
    compile_layers(model_of(), torch.device("cpu"))
    assert torch._inductor.config.cpp.simdlen == (chosen.bit_width() or 1)
    assert cpu_vec_isa.pick_vec_isa() == chosen  # naming it changes nothing else


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(MachineError, match=r"--set compute\.compile=false"):
        compile_layers(model_of(), torch.device("cpu"))
