"""Tiny models made by code, their prompts, and transformers' own greedy completion to compare with."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from stages.generation.requests import Prompt

VOCAB_SIZE = 512
EOS = 2


def random_llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    """Two layers of head_dim 32, 256 positions; `changes` are keys of its configuration."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        # Wide enough that log-probs differ from token to token by whole nats.
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def save_model(folder: Path, seed: int, head_dim: int = 32) -> Path:
    """A random Llama with sharp logits, and a tokenizer whose id N reads as the word wN."""
    model = random_llama(
        seed,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        head_dim=head_dim,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    # What a trained model may ship with, and what must not reach our sampling.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0
    )
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": EOS} | {f"\u2581w{index}": index for index in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def random_prompts(count: int) -> list[Prompt]:
    """Prompts of 1 to 60 tokens, spread over two padded widths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [
        Prompt(f"row-{index}", "", torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())
        for index, length in enumerate(lengths)
    ]


def greedy_alone(model: Path, prompt: list[int], stop: list[int], num_tokens: int) -> list[int]:
    """transformers' own greedy completion of one prompt, unpadded."""
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.generation_config = GenerationConfig()
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=stop, pad_token_id=0)
    ids = torch.tensor([prompt])
    return network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
        0, len(prompt) :
    ].tolist()
