"""Predicted memory against allocated memory, and offloaded activations against activations on the device."""

from dataclasses import replace

import pytest
import torch

from benchmarks.two_builds import allocated_at_most
from stages.engine.activation_offload import offloaded
from stages.engine.scorer import Scorer
from stages.models.loading import ModelSource, load_model
from stages.plan.memory import LayerwiseShapes, Shapes, pairs_pack
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings, TrainSettings
from tests.tiny_llama import random_llama

pytestmark = pytest.mark.slow

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 4096)
BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16, 4096)
ALL = AdapterSettings()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSource:
    """A Llama of four layers whose activations are far larger than rounding."""
    folder = tmp_path_factory.mktemp("memory")
    llama = random_llama(
        0,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    llama.save_pretrained(folder)
    return ModelSource("memory", folder)


def allocated_by_a_pass(scorer: Scorer, pack) -> int:
    """The most bytes that a second forward and backward pass had allocated."""

    def work() -> None:
        scorer(pack).completion_logps.sum().backward()

    def with_one_cast() -> None:
        with scorer.weights_cast_once():
            work()

    work()
    return allocated_at_most(with_one_cast)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("compute", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_predicted_activations_are_what_torch_allocates(model, compute, checkpointing):
    settings = TrainSettings(gradient_checkpointing=checkpointing)
    pack = pairs_pack(3, 200, 512)
    predicted = Shapes(model, settings, ALL, compute).predict(pack)
    scorer = Scorer(load_model(model, compute), compute, print, checkpointing)
    assert predicted.weights == sum(parameter.nbytes for parameter in scorer.parameters())
    assert predicted.activations == pytest.approx(allocated_by_a_pass(scorer, pack), rel=0.05)


def test_memory_of_four_layers_is_extrapolated_from_two(model):
    whole = Shapes(model, TrainSettings(), ALL, FLOAT32)
    layerwise = LayerwiseShapes(model, TrainSettings(), ALL, FLOAT32)
    for cell in ((1, 64), (2, 256)):
        expected, found = (shapes.predict(pairs_pack(*cell, 512)) for shapes in (whole, layerwise))
        assert found.num_parameters == expected.num_parameters
        assert found.total == pytest.approx(expected.total, rel=0.02)


def test_memory_saving_settings_have_smaller_predictions(model):
    pack = pairs_pack(1, 256, 512)

    def predicted(compute=FLOAT32, adapter=ALL, **changes):
        return Shapes(model, TrainSettings(**changes), adapter, compute).predict(pack)

    full = predicted()
    assert predicted(gradient_checkpointing=True).activations < 0.5 * full.activations
    assert predicted(optimizer="adamw_8bit").optimizer == full.optimizer // 4
    lora = predicted(adapter=AdapterSettings(name="lora", r=4))
    assert lora.gradients < 0.1 * full.gradients
    assert lora.num_trained + full.num_parameters == lora.num_parameters
    halved = predicted(BFLOAT16, AdapterSettings(name="lora", r=4))
    assert halved.weights < 0.65 * lora.weights
    quantized = predicted(replace(FLOAT32, load_in_4bit=True), AdapterSettings(name="lora", r=4))
    assert quantized.weights < 0.4 * lora.weights


def test_offloaded_activations_give_the_same_gradients(model):
    """What is saved leaves its memory and comes back the same, weights stay where they are."""
    found = []
    for offload in (False, True):
        scorer = Scorer(load_model(model, FLOAT32), FLOAT32, print, activation_offload=offload)
        scorer(pairs_pack(3, 200, 512)).completion_logps.sum().backward()
        found.append([parameter.grad for parameter in scorer.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    weight = torch.nn.Parameter(torch.ones(300, 300))
    saved = []
    with offloaded(True):
        given = torch.ones(300, 300, requires_grad=True) * 2
        result = (given @ weight).sum()
        saved = [
            result.grad_fn.next_functions[0][0]._saved_self,
            result.grad_fn.next_functions[0][0]._saved_mat2,
        ]
    assert saved[0].data_ptr() != given.data_ptr()
    assert saved[1].data_ptr() == weight.data_ptr()
