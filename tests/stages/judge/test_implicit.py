import pytest
import torch

from stages.compare.completions import Completed
from stages.judge.implicit import ImplicitJudge
from stages.judge.stage import judge_completions
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.tokenization.template import Template
from tests.conftest import save_tiny_llama

COMPUTE = Compute(torch.device("cpu"), torch.float32, 64)
TEXTS = ["The bear lives by the water.", "In a hole.", "It eats grass and berries, and it is a bear."]


@pytest.fixture(scope="module")
def models(tmp_path_factory, chat_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    names = ("policy", "reference")
    return [
        ModelSource(name, save_tiny_llama(folder / name, chat_tokenizer, seed))
        for seed, name in enumerate(names)
    ]


def log_prob(source, messages, text):
    """The summed log-prob of `text` and the end of its turn after `messages`, in float64, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float64)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    whole = prompt + tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logps[place - 1, whole[place]].item() for place in range(len(prompt), len(whole)))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["Where does the bear live?", [{"role": "user", "content": "What now?"}]])
def test_the_score_is_beta_times_the_log_ratio(models, context, chat_tokenizer, prompt):
    template = Template(chat_tokenizer, "auto", append_eos=True)
    judge = ImplicitJudge(*models, 0.3, template, COMPUTE, context.log)
    entries = [Completed(str(n), prompt, text, 0, "policy") for n, text in enumerate(TEXTS)]
    found = [verdict.score for verdict in judge_completions(judge, entries, context).verdicts]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    policy, reference = ([log_prob(model, messages, text) for text in TEXTS] for model in models)
    expected = [0.3 * (a - b) for a, b in zip(policy, reference, strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(found) - min(found) > 0.1


@pytest.mark.slow
def test_equal_models_give_no_reward_and_a_text_that_is_too_long_has_a_problem(
    models, context, chat_tokenizer
):
    template = Template(chat_tokenizer, "auto", append_eos=True)
    judge = ImplicitJudge(models[0], models[0], 0.3, template, COMPUTE, context.log)
    entries = [Completed("0", "Who?", "A bear.", 0, "m"), Completed("1", "Who?", "bear " * 300, 0, "m")]
    short, long = judge_completions(judge, entries, context).verdicts
    assert short.score == 0
    assert long.score is None
    assert "and the models have 256 positions" in long.problem
