"""What the engine's benchmarks run on: real texts, tokenizers of two sizes, models of random weights.

In: a folder with `pairs/hh_harmless_base_test.jsonl.gz` (prompt-heavy), `pairs/llamafactory_dpo_en_demo.json`
(completion-heavy) and `tokenizers/olmo2_dolma2` (100,278 ids). Out: rows prepared by `align prepare`'s own
code, and folders of models, kept in `.bench-world` between runs. The 32,000-id tokenizer is a byte-level BPE
trained here on the texts of both files.
"""

import argparse
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE = 1e-6
ROOT = Path(__file__).resolve().parent.parent
WORLD = ROOT / ".bench-world"
DATASETS = {
    "hh": "pairs/hh_harmless_base_test.jsonl.gz",
    "en_demo": "pairs/llamafactory_dpo_en_demo.json",
}
VOCABULARIES = (32_000, 100_352)
# 16 layers: the share of the head in a forward pass is that of a 1B model (0.24, OLMo-2-1B has 0.19).
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def data_folder(doc: str | None) -> Path:
    """The folder that a benchmark is given as `--data`, its only option."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    return options.parse_args().data.resolve()


@dataclass(frozen=True)
class Work:
    """What one cell of the benchmark measures."""

    system: str
    task: str
    dtype: str
    dataset: str
    max_length: int
    vocabulary: int
    batch: int
    rounds: int
    data: str


@dataclass(frozen=True)
class World:
    """Tokenized rows of one dataset and the model that is to learn from them."""

    dataset: str
    max_length: int
    vocabulary: int
    rows: Any
    model_folder: Path

    @property
    def pairs(self) -> list[int]:
        """Example numbers, all of them pairs."""
        return list(range(self.rows.num_examples))


def build_world(
    data: Path, dataset: str, max_length: int, vocabulary: int, mismatched: bool = False
) -> World:
    """Prepare a dataset for a model of `vocabulary` ids; nothing is made twice."""
    from pipeline.config import build_config
    from pipeline.session import Session
    from stages.data.rows import RowSet

    model_folder = make_model(data, vocabulary)
    settings = {"max_length": max_length, "heldout_fraction": 0.0, "mismatched": mismatched}
    config = build_config(
        {
            "data": {"path": str(pairs_file(data, dataset))},
            "policy": {"model": str(model_folder)},
            "prepare": {**settings, "template": "plain"},
        }
    )
    session = Session(config, WORLD / "artifacts", log=lambda line: None)
    session.run("prepare")
    return World(dataset, max_length, vocabulary, RowSet.of(session.inputs.rows, "train"), model_folder)


def pairs_file(data: Path, dataset: str) -> Path:
    """A file `align prepare` reads: hh as it is, the other as plain pairs of conversations."""
    source = data / DATASETS[dataset]
    if dataset == "hh":
        return source
    path = WORLD / f"{dataset}.jsonl"
    if not path.is_file():
        WORLD.mkdir(exist_ok=True)
        lines = [json.dumps(_pair(row), ensure_ascii=False) for row in json.loads(source.read_text())]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _pair(row: dict) -> dict:
    """ShareGPT turns as messages."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def message(turn: dict) -> dict:
        return {"role": roles[turn["from"]], "content": turn["value"]}

    prompt = [message(turn) for turn in row["conversations"]]
    return {"prompt": prompt, "chosen": [message(row["chosen"])], "rejected": [message(row["rejected"])]}


def make_model(data: Path, vocabulary: int) -> Path:
    """A random OLMo-2 of `SHAPE` with its tokenizer, as a Hugging Face folder."""
    folder = WORLD / f"olmo2-16x512-{vocabulary}"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2Config

    if vocabulary == VOCABULARIES[0]:
        tokenizer = train_tokenizer(data, vocabulary)
    else:
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "olmo2_dolma2")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Olmo2Config(vocab_size=vocabulary, **SHAPE))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def train_tokenizer(data: Path, vocabulary: int) -> Any:
    """A byte-level BPE trained on the texts of both datasets, deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<eos>"], show_progress=False)
    texts = gzip.decompress((data / DATASETS["hh"]).read_bytes()).decode().splitlines()
    texts += (data / DATASETS["en_demo"]).read_text().splitlines()
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def reference_values(world: World, row: int) -> np.ndarray:
    """Stand-ins for cached reference log-probs, near what a random model gives; the same for every system."""
    noise = np.random.default_rng([7, row]).normal(0, 0.05, world.rows.completion_lengths[row])
    return (-np.log(world.vocabulary) + noise).astype(np.float32)


def statistics(world: World) -> dict[str, float]:
    """Mean token counts of a pair, and what sharing the prompt saves."""
    rows = world.rows
    chosen, rejected = (rows.completion_lengths[rows.roles == role] for role in ("chosen", "rejected"))
    prompt = rows.prompt_lengths[rows.roles == "chosen"]
    shared = prompt + chosen + rejected
    return {
        "pairs": len(prompt),
        "prompt_tokens": round(float(np.mean(prompt)), 1),
        "chosen_tokens": round(float(np.mean(chosen)), 1),
        "rejected_tokens": round(float(np.mean(rejected)), 1),
        "sharing": round(float((shared + prompt).sum() / shared.sum()), 3),
    }
