import pytest
import torch

from cache.errors import DataError
from stages.compare.completions import Completed
from stages.judge.reward_model import RewardModelJudge
from stages.judge.stage import judge_completions
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from tests.conftest import make_chat_tokenizer

PROMPT = [{"role": "user", "content": "Where does the bear live?"}]
TEXTS = ["In the wood.", "The bear lives in a den in the wood, by the water.", "No.", "", "In the wood"]
ENTRIES = [Completed(str(n), PROMPT, text, 0, "policy") for n, text in enumerate(TEXTS)]
COMPUTE = Compute(torch.device("cpu"), torch.float32, 64)


def save_reward_model(folder, pad=None, labels=1, tokenizer=None, **changes):
    """A random Llama with a head of scores; `pad` is the padding id of its configuration."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    config = LlamaConfig(**{**shape, **changes}, num_labels=labels, pad_token_id=pad)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    (tokenizer or make_chat_tokenizer()).save_pretrained(folder)
    return ModelSource(str(folder), folder)


def row_by_row(source, entries):
    """Each conversation alone, without padding, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(source.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    found = []
    for entry in entries:
        turns = [*entry.prompt, {"role": "assistant", "content": entry.completion}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            found.append(model(ids).logits.item())
    return found


def scores(source, context, entries=ENTRIES, compute=COMPUTE):
    judge = RewardModelJudge.of(source, compute, context.log)
    return [verdict.score for verdict in judge_completions(judge, entries, context).verdicts]


@pytest.mark.parametrize("pad", ["none", "own", "end of turn"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_each_row_alone(tmp_path, context, said, pad, side):
    """Whether the model has no padding id, one of its own, or pads with the token that every row ends with."""
    tokenizer = make_chat_tokenizer()
    tokenizer.padding_side = side
    ids = {"none": None, "own": tokenizer.pad_token_id, "end of turn": tokenizer.eos_token_id}
    source = save_reward_model(tmp_path / "model", ids[pad], tokenizer=tokenizer)
    expected = row_by_row(source, ENTRIES)
    assert max(expected) - min(expected) > 0.1
    assert scores(source, context) == pytest.approx(expected, abs=1e-5)
    assert said == []


def test_rows_are_sorted_by_length_and_batched_to_the_token_budget(tmp_path, context, monkeypatch):
    from transformers import LlamaForSequenceClassification

    shapes = []
    forward = LlamaForSequenceClassification.forward

    def noted(self, input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", noted)
    source = save_reward_model(tmp_path / "model", 1)
    scores(source, context, [ENTRIES[n % 5] for n in range(5)])
    batches = shapes[2:]  # after the comparison of a row alone with one in a batch
    assert sum(rows for rows, _ in batches) == len(TEXTS)
    assert all(rows == 1 or rows * width <= COMPUTE.tokens_per_batch for rows, width in batches)
    assert [width for _, width in batches] == sorted(width for _, width in batches)


def test_a_model_that_reads_another_token_in_a_batch_is_scored_row_by_row(
    tmp_path, context, said, monkeypatch
):
    """A forward pass that always reads the last position, as models without an id for padding did."""
    from transformers import LlamaForSequenceClassification

    def last_position(self, input_ids, attention_mask=None):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return type("Output", (), {"logits": self.score(hidden)[:, -1]})

    source = save_reward_model(tmp_path / "model")
    expected = row_by_row(source, ENTRIES)
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", last_position)
    assert scores(source, context) == pytest.approx(expected, abs=1e-5)
    assert "beside a longer one, so rows are scored one at a time" in said[0]


def test_a_model_with_several_outputs_is_refused(tmp_path, context):
    source = save_reward_model(tmp_path / "model", labels=3)
    with pytest.raises(DataError, match=r"has 3 outputs \(LlamaForSequenceClassification\)"):
        scores(source, context)


def test_a_causal_model_is_refused_and_not_given_a_random_head(tiny_model, tmp_path, context):
    import json
    import shutil

    source = ModelSource("tiny", tiny_model)
    with pytest.raises(DataError, match=r"has 2 outputs \(LlamaForCausalLM\)"):
        scores(source, context)
    changed = shutil.copytree(tiny_model, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"id2label": {"0": "score"}}))
    with pytest.raises(DataError, match=r"lacks weights that the model has: score.weight"):
        scores(ModelSource("changed", changed), context)


def test_a_decoder_without_a_chat_template_is_refused(tmp_path, context, base_tokenizer):
    source = save_reward_model(tmp_path / "model", tokenizer=base_tokenizer)
    with pytest.raises(DataError, match="has no chat template"):
        scores(source, context)


def test_a_conversation_that_cannot_be_scored_is_named_and_the_others_go_on(tmp_path, context):
    source = save_reward_model(tmp_path / "model", max_position_embeddings=40)
    long = Completed("long", PROMPT, "wood " * 60, 0, "policy")
    judge = RewardModelJudge.of(source, COMPUTE, context.log)
    found = judge_completions(judge, [ENTRIES[2], long], context).verdicts
    assert found[0].score is not None
    assert "tokens, and model has 40 positions" in (found[1].problem or "")


def test_an_encoder_without_a_template_reads_the_pair_of_texts(tmp_path, context):
    """Against transformers alone, one pair at a time."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        AutoModelForSequenceClassification,
        BertConfig,
        BertForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "encoder")
    fast.save_pretrained(tmp_path / "encoder")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        expected = [
            model(**fast(PROMPT[0]["content"], text, return_tensors="pt")).logits.item() for text in TEXTS
        ]
    assert scores(ModelSource("encoder", tmp_path / "encoder"), context) == pytest.approx(expected, abs=1e-5)
