"""The list of losses is complete, and a block that is not a loss is refused in one helpful line."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from cache.errors import UsageError
from stages.losses import LOSSES, AnyLoss, Loss, parse_loss


def subclasses(cls):
    return {child for direct in cls.__subclasses__() for child in {direct, *subclasses(direct)}}


def test_the_union_holds_every_loss():
    named = {cls for cls in subclasses(Loss) if "name" in cls.model_fields}
    assert named == set(LOSSES.values())


@pytest.mark.parametrize("name", LOSSES)
def test_docstrings_have_formula_when_and_values(name):
    text = LOSSES[name].__doc__ or ""
    assert [key for key in ("Formula: ", "When: ", "Values: ") if key not in text] == []


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mixture"])
def test_a_loss_survives_being_saved_and_is_frozen(name):
    loss = parse_loss({"name": name})
    assert parse_loss(json.loads(loss.model_dump_json())) == loss
    with pytest.raises(ValidationError, match="frozen"):
        loss.name = "other"


def test_a_mixture_survives_being_saved():
    parts = [{"weight": 0.8, "loss": {"name": "dpo", "beta": 0.2}}, {"loss": {"name": "sft"}}]
    mixture = parse_loss({"name": "mixture", "parts": parts})
    assert parse_loss(json.loads(mixture.model_dump_json())) == mixture
    assert TypeAdapter(AnyLoss).validate_python(mixture.model_dump()) == mixture


def test_numbers_that_yaml_reads_as_text_are_accepted():
    """PyYAML reads 5e-2 as a string."""
    assert parse_loss({"name": "dpo", "beta": "5e-2"}) == parse_loss({"name": "dpo", "beta": 0.05})


PARTS = [{"loss": {"name": "dpo"}}, {"loss": {"name": "kto", "betta": 1}, "wieght": 2}]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"name": "kt0"}, "loss.name: unknown loss 'kt0'. Known losses: {all}. Did you mean 'kto'?"),
        ({"name": "xyz"}, "loss.name: unknown loss 'xyz'. Known losses: {all}."),
        ({"beta": 0.1}, "loss.name is missing. Known losses: {all}."),
        (
            {"name": "kto", "label_smoothing": 0.1},
            "loss.label_smoothing is not a field of kto (fields: beta, desirable_weight, undesirable_weight).",
        ),
        (
            {"name": "simpo", "gamma_beta": 0.5},
            "loss.gamma_beta is not a field of simpo (fields: beta, gamma_beta_ratio, label_smoothing)."
            " Did you mean 'gamma_beta_ratio'?",
        ),
        ({"name": "dpo", "beta": 0}, "loss.beta is 0, but it should be greater than 0"),
        ({"name": "dpo", "beta": float("inf")}, "loss.beta is inf, but it should be a finite number"),
        ({"name": "dpo", "ld_alpha": 1.5}, "loss.ld_alpha is 1.5, but it should be less than or equal to 1"),
        (
            {"name": "cdpo", "label_smoothing": 0.5},
            "loss.label_smoothing is 0.5, but it should be less than 0.5",
        ),
        ({"name": "exo", "label_smoothing": 0}, "loss.label_smoothing is 0, but it should be greater than 0"),
        (
            {"name": "ipo", "normalize": "token"},
            "loss.normalize is 'token', but it should be 'mean' or 'sum'",
        ),
        (
            {"name": "orpo", "nll_span": "prompt"},
            "loss.nll_span is 'prompt', but it should be 'completion' or 'sequence'",
        ),
        (
            {"name": "alphapo", "alpha": 0},
            "loss.alpha must not be 0; simpo is the loss for alpha 0 (gamma_beta_ratio = gamma / beta)",
        ),
        (
            {"name": "dpo", "f_alpha_divergence_coef": 0.5},
            "loss.f_alpha_divergence_coef=0.5 has no effect with f_divergence=reverse_kl;"
            " set f_divergence=alpha_divergence or leave it out",
        ),
        (
            {"name": "dpo", "f_divergence": "alpha_divergence"},
            "loss.f_divergence=alpha_divergence needs f_alpha_divergence_coef (0.5 is usual)",
        ),
        (
            {"name": "dpo", "beta": -1, "sft_weight": -2},
            "loss.beta is -1, but it should be greater than 0;"
            " loss.sft_weight is -2, but it should be greater than or equal to 0",
        ),
        ({"name": "mixture"}, "loss.parts is missing (mixture needs it)"),
        ({"name": "mixture", "parts": []}, "loss.parts is empty; a mixture has at least one part"),
        (
            {"name": "mixture", "parts": PARTS},
            "loss.parts.1.loss.betta is not a field of kto (fields: beta, desirable_weight, undesirable_weight)."
            " Did you mean 'beta'?; loss.parts.1.wieght is not a field of a part (fields: weight, loss)."
            " Did you mean 'weight'?",
        ),
        (
            {"name": "mixture", "parts": [{"loss": {"name": "mixture"}}]},
            "loss.parts.0.loss.name: unknown loss 'mixture'. Known losses: {single}.",
        ),
        (
            {"name": "mixture", "parts": [{"loss": {"name": "dpo"}}, {"loss": {"name": "dpo", "beta": 1}}]},
            "loss.parts has the same loss twice: dpo, dpo; add up the weights in one part",
        ),
        (
            {"name": "mixture", "parts": [{"loss": {"name": "dpo"}}, {"loss": {"name": "bco"}}]},
            "loss.parts has bco, which keeps a running state, in a later place; put it first",
        ),
        (
            {"name": "mixture", "parts": [{"loss": {"name": "infonca"}}]},
            "loss.parts has infonca, a loss of ranked lists; the parts of a mixture are losses of pairs",
        ),
    ],
)
def test_a_wrong_block_is_refused_in_one_line(block, message):
    with pytest.raises(UsageError) as error:
        parse_loss(block)
    names = list(LOSSES)
    single = ", ".join(name for name in names if name != "mixture")
    assert str(error.value) == message.replace("{all}", ", ".join(names)).replace("{single}", single)
    assert "\n" not in str(error.value)
