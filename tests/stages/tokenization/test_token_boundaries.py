"""Texts tokenized apart only where that gives the ids of the whole; the ids are those of the tokenizer itself."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from stages.tokenization.token_boundaries import PATTERNS, TokenBoundaries

# What patterns tell apart: letters of both cases and of none, digits, marks, white space of several kinds,
# contractions, combining characters, pieces of added tokens and whole ones.
PIECES = ["a", "Zq", "é", "e\u0301", "東", "ǅ", "7", "123", "'", "'s", "'re", "'Ll", ".", "/", "!?", "🦊", " ", "  ", "\n", "\r\n", "\t",
          "\u00a0", "\u3000", "\x85", "\x1c", "\u200b", "<", "<|", "<|en", "end|>", "d|>", "|>", "<|end|>", "<|user|>", "||", "||A||", "A||", "B||", "_", "re", "ll"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=8).map("".join)


def trained(pre_tokenizer, normalizer=None) -> Tokenizer:
    """A byte-level BPE that merges whatever its pre-tokenizer lets it, with four added tokens."""
    from tokenizers import trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        bpe.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [left + right for left in PIECES for right in PIECES] * 2
    bpe.train_from_iterator(corpus, trainer)
    # The end of one is the beginning of the other, as in OLMo 2's.
    bpe.add_tokens([AddedToken(text, normalized=False) for text in ("||A||", "||B||")])
    return bpe


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
KNOWN = {
    "gpt2": (GPT2, None),
    "digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), None),
    **{f"pattern {number}": (split(pattern), None) for number, pattern in enumerate(sorted(PATTERNS))},
    **{
        f"pattern {number}, removed, NFC": (split(pattern, "removed", True), normalizers.NFC())
        for number, pattern in enumerate(sorted(PATTERNS))
    },
}


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_called_separate_has_the_ids_of_the_whole(name):
    tokenizer = trained(*KNOWN[name])
    boundaries = TokenBoundaries(tokenizer)
    assert boundaries.is_known
    yes, no = 0, 0

    @settings(max_examples=200)
    @example("x'", "re")
    @example("a \n", "  \n b")
    @example("q\n", "<|end|>")
    @example("<|", "end|>x")
    @example("||A||", "B||x")
    @example("||A||B||", "x")
    @given(texts, texts)
    def check(before, after):
        nonlocal yes, no
        if boundaries.can_split(boundaries.tail(before), before, after):
            yes += 1
            assert ids(tokenizer, before) + ids(tokenizer, after) == ids(tokenizer, before + after)
        else:
            no += ids(tokenizer, before) + ids(tokenizer, after) != ids(tokenizer, before + after)

    check()
    # Both answers were given, and "no" was needed: a guard that always says yes fails above.
    assert yes > 20
    assert no > 5


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", split(r"\w+")),
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
    ],
    ids=["prefix space", "metaspace", "other pattern", "NFKC"],
)
def test_a_tokenizer_the_argument_was_not_made_for_is_never_cut(change):
    tokenizer = trained(GPT2)
    change(tokenizer)
    boundaries = TokenBoundaries(tokenizer)
    assert not boundaries.is_known
    assert boundaries.tail("a\n") is None
    assert not boundaries.can_split(boundaries.tail("a\n"), "a\n", "b")


@pytest.mark.slow
def test_real_chats_are_nearly_always_cut(shared_data):
    """So that the guard pays: of the first lines of hh-rlhf rendered by OLMo 2's own template, all but a few."""
    import gzip

    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizers" / "olmo2_dolma2" / "tokenizer.json"))
    boundaries = TokenBoundaries(tokenizer)
    with gzip.open(shared_data / "pairs" / "hh_harmless_base_test.jsonl.gz") as lines:
        rows = [json.loads(line) for _, line in zip(range(200), lines, strict=False)]
    separate = 0
    for row in rows:
        head, _, reply = row["chosen"].rpartition("\n\nAssistant: ")
        before, after = f"<|endoftext|><|user|>\n{head}\n<|assistant|>\n", f"{reply}<|endoftext|>"
        if boundaries.can_split(boundaries.tail(before), before, after):
            separate += 1
            assert ids(tokenizer, before) + ids(tokenizer, after) == ids(tokenizer, before + after)
    assert separate > 190
