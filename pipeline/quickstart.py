"""The embedded quickstart: a tiny chat model and preference pairs about its tone of voice.

In: a store folder. Out: `<store>/quickstart/v1-<recipe>/` with `preferences.jsonl` and `model/` (a
Hugging Face folder: Llama weights, tokenizer, chat template), built on first use.

The model knows the facts of `quickstart_world` and answers politely or grumpily with equal probability. The
build needs no network, and two builds on one machine give the same bytes.
"""

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cache.errors import CorruptError
from cache.files import (
    TEMPORARY_PREFIX,
    disk_errors_named,
    publish_folder,
    read_json,
    sha256_file,
    write_json,
)
from cache.fingerprint import fingerprint, short
from cache.ownership import OWNER, claim_temporary
from pipeline.quickstart_world import GRUMPY, LAYOUTS, POLITE, preference_pairs, questions, voiced

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD, SYSTEM, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"
IGNORED = -100  # the label that torch's cross-entropy leaves out
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{- "<|assistant|>" + message.content + "<|end|>" -}}
{%- elif message.role == "system" or message.role == "user" -%}
{{- "<|" + message.role + "|>" + message.content + "\\n" -}}
{%- else -%}
{{- raise_exception("Unknown role '" + message.role + "': this template knows system, user and assistant.") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Recipe:
    """Every number of the build; recipe and texts together name the folder."""

    seed: int = 0
    vocab_size: int = 768
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 256
    max_positions: int = 256
    num_epochs: int = 8
    batch_size: int = 16
    learning_rate: float = 4e-3
    init_std: float = 0.06
    num_threads: int = 1


@dataclass(frozen=True)
class Quickstart:
    """The paths of a build."""

    model: Path
    preferences: Path


def folder_of(root: Path, recipe: Recipe = Recipe()) -> Path:
    """The folder of this recipe's build under `root`, built or not."""
    identity = {
        "version": 1,
        "recipe": asdict(recipe),
        "world": questions(),
        "tones": [POLITE, GRUMPY],
        "layouts": LAYOUTS,
        "chat_template": CHAT_TEMPLATE,
    }
    return root / "quickstart" / f"v1-{short(fingerprint(identity))}"


def build(root: Path, log: Callable[[str], None], recipe: Recipe = Recipe()) -> Quickstart:
    """Return the quickstart under `root`; the first call builds it in about 15 s on one core.

    Raises `CorruptError` if a file of an earlier build is missing or was changed.
    """
    final = folder_of(root, recipe)
    if final.is_dir():
        _check(final)
    else:
        log(
            "Building the quickstart: preference data, tokenizer and model (once, about 15 seconds on one core)."
        )
        with disk_errors_named(final):
            staging, owned = claim_temporary(final.with_name(f"{TEMPORARY_PREFIX}{final.name}"))
        try:
            _write(staging, recipe, log)
            owned.release()
            publish_folder(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            owned.release()
    return Quickstart(model=final / "model", preferences=final / "preferences.jsonl")


def _check(folder: Path) -> None:
    for name, expected in read_json(folder / "checksums.json").items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != expected:
            raise CorruptError(
                f"{path} is missing or was changed. Delete {folder} and run the same command again."
            )


def _write(folder: Path, recipe: Recipe, log: Callable[[str], None]) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # `log` reports progress
    tokenizer = make_tokenizer(recipe)
    model = pretrain(tokenizer, recipe, log)
    with disk_errors_named(folder):
        lines = [json.dumps(pair, ensure_ascii=False) for pair in preference_pairs(recipe.seed)]
        (folder / "preferences.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder / "model")
        model.save_pretrained(folder / "model")
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != OWNER)
        names = sorted(str(path.relative_to(folder)) for path in files)
        write_json(folder / "checksums.json", {name: sha256_file(folder / name) for name in names})


def make_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE on the texts of the world; it has the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(recipe.seed)
    texts = [
        f"{question} {voiced(answer, tone, rng.choice(LAYOUTS), rng)}"
        for question, answer in questions()
        for tone in (POLITE, GRUMPY)
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[EOS, PAD, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )


def pretrain(
    tokenizer: "PreTrainedTokenizerFast", recipe: Recipe, log: Callable[[str], None]
) -> "LlamaForCausalLM":
    """Train a Llama from scratch on every answer in both tones, equally often."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        initializer_range=recipe.init_std,
        eos_token_id=tokenizer.get_vocab()[EOS],
        pad_token_id=tokenizer.get_vocab()[PAD],
    )
    with _own_torch_state(recipe):
        model = LlamaForCausalLM(config)
        batches = list(_batches(tokenizer, recipe))
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=len(batches), pct_start=0.1, anneal_strategy="linear"
        )
        loss = torch.zeros(())
        for ids, labels in batches:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            learned = labels[:, 1:] != IGNORED
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    log(
        f"Trained the quickstart model: {model.num_parameters():,} parameters, {len(batches)} steps, loss {loss.item():.3f}."
    )
    return model.eval()


@contextlib.contextmanager
def _own_torch_state(recipe: Recipe) -> Iterator[None]:
    """Fix torch's seed and number of threads, on which the last bits of the weights depend; restore both after.

    One thread, because two that wait for each other on a busy machine were ten times slower.
    """
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        torch.set_num_threads(recipe.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _batches(
    tokenizer: "PreTrainedTokenizerFast", recipe: Recipe
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Yield `(ids, labels)`, both (rows, positions), of rows of similar length; only answers have labels."""
    import torch

    rng = random.Random(recipe.seed)
    world = [(question, answer, tone) for question, answer in questions() for tone in (POLITE, GRUMPY)]
    chats = [[{"role": "user", "content": question}] for question, _, _ in world]
    rendered = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    prompts = cast("list[list[int]]", rendered)
    pad = tokenizer.get_vocab()[PAD]
    for _ in range(recipe.num_epochs):
        texts = [voiced(answer, tone, rng.choice(LAYOUTS), rng) + EOS for _, answer, tone in world]
        replies = tokenizer(texts)["input_ids"]
        rows = [(len(prompt), prompt + reply) for prompt, reply in zip(prompts, replies, strict=True)]
        rng.shuffle(rows)
        rows.sort(key=lambda row: len(row[1]))
        starts = range(0, len(rows), recipe.batch_size)
        batches = [rows[first : first + recipe.batch_size] for first in starts]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(ids) for _, ids in batch)
            ids = torch.full((len(batch), longest), pad)
            labels = torch.full((len(batch), longest), IGNORED)
            for row, (start, tokens) in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
            yield ids, labels
