"""Rows left out on purpose: by what rule, and each counted under its reason."""

import json
import sys

import pytest

from cache.errors import DataError, MachineError, UsageError
from stages.data.rows import RowSet
from stages.prepare.filters import EvaluationPrompts, Filters
from stages.prepare.stage import prepare, rows_identity
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.tokenization.template import Template

WHOLE = PrepareSettings(heldout_fraction=0.0, mismatched=False, max_length=4096)


@pytest.fixture(scope="module")
def base(base_tokenizer):
    return Template(base_tokenizer, "auto", append_eos=True)


@pytest.fixture
def kept(tmp_path, base, context):
    """Prepares rows with a filter and returns the numbers of those kept, and the reasons of the others."""

    def run(rows, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        artifact = prepare(DataSettings(path=str(path)), WHOLE, base, context, FilterSettings(**settings))
        split = RowSet.of(artifact, "train")
        counts = artifact.counts
        assert counts["rows_in"] == counts["rows_kept"] + sum(counts["dropped"].values()) == len(rows)
        numbers = [int(split.sources[start].rpartition(":")[2]) for start in split.starts]
        return numbers, counts["dropped"]

    return run


def row(prompt="q", chosen="a", rejected="b", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_lengths_are_of_the_uncut_example(kept):
    """`q` is two ids after the beginning of sequence is counted; a letter and the end are two more."""
    rows = [row("q"), row("qzqzqz"), row("q", "xzxzxz"), row("qz", "xz", "zx")]
    assert kept(rows, max_prompt_tokens=3) == ([1, 3, 4], {"filter_prompt_length": 1})
    assert kept(rows, min_prompt_tokens=3) == ([2, 4], {"filter_prompt_length": 2})
    assert kept(rows, max_completion_tokens=3) == ([1, 2, 4], {"filter_completion_length": 1})
    assert kept(rows, min_completion_tokens=3) == ([4], {"filter_completion_length": 3})


def test_the_score_gap_may_be_exactly_the_least(kept):
    scored = [row(f"q{gap}", score_chosen=3.0 + gap, score_rejected=3.0) for gap in (0.5, 1.0, 2.0)]
    assert kept([*scored, row()], min_score_gap=1.0) == (
        [2, 3],
        {"filter_score_gap": 1, "filter_no_scores": 1},
    )


def test_languages_by_the_column_that_names_them(kept):
    rows = [row("a", language="English"), row("b", language="german"), row("c"), row("d", language="english")]
    reasons = {"filter_language": 1, "filter_no_language": 1}
    assert kept(rows, language="english") == ([1, 4], reasons)
    rows = [row("a", lang="de"), row("b", lang="en")]
    assert kept(rows, language="de", language_column="lang") == ([1], {"filter_language": 1})


def test_a_pattern_is_looked_for_in_every_text(kept):
    rows = [row("see http://x"), row("b", "http://x"), row("c", "a", "http://x"), row("d", "https:")]
    assert kept(rows, drop_pattern=r"https?://\w") == ([4], {"filter_pattern": 3})


def test_exact_duplicates_keep_the_first(kept):
    rows = [row("a"), row("a"), row("a", "b", "a"), row("b"), row("a")]
    assert kept(rows, duplicates="exact") == ([1, 3, 4], {"duplicate": 2})
    assert kept(rows) == ([1, 2, 3, 4, 5], {})


WORDS = [f"w{number}" for number in range(100)]


def test_near_duplicates_are_those_above_the_similarity(kept):
    """Of 100 words, one changed word touches 5 of about 96 sequences: Jaccard 91/101 = 0.90; 30 changed ones leave few."""
    text = " ".join(WORDS)
    one = " ".join([*WORDS[:50], "other", *WORDS[51:]])
    many = " ".join("other" + word if number % 4 == 0 else word for number, word in enumerate(WORDS))
    rows = [row(text), row(one), row(many), row(text), row("something else entirely, of six words")]
    assert kept(rows, duplicates="near") == ([1, 3, 5], {"duplicate": 1, "near_duplicate": 1})
    assert kept(rows, duplicates="near", near_duplicate_similarity=0.97)[0] == [1, 2, 3, 5]


def test_near_duplicates_without_datasketch_say_what_to_install(monkeypatch, kept):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(MachineError, match=r"pip install -e '\.\[dedup\]'"):
        kept([row()], duplicates="near")


LONG = "Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences and must-see attractions."


def test_prompts_that_hold_or_repeat_an_evaluation_prompt_are_dropped(tmp_path, kept):
    path = tmp_path / "eval.jsonl"
    questions = [
        {"turns": [LONG, "Rewrite your previous response."]},
        {"turns": ["Why is the clear sky always blue?"]},
    ]
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    rows = [
        row(LONG),
        row("Please " + LONG.upper().replace(",", " ")),  # in a longer text, written otherwise
        row("A recent trip to Hawaii, highlighting cultural experiences"),  # 8 words of it
        row("post about a recent trip to Hawaii highlighting cultural experiences and must see attractions"),
        row("Tell me: why is the clear sky always blue?"),
        row("Why is the clear sky always green?"),
        row("rewrite your previous response"),  # a second turn is one of its own
        row("q", chosen=LONG),  # an answer may say what it likes
        row("Now rewrite your previous response."),  # and is too short to count inside another text
    ]
    assert kept(rows, decontaminate=[str(path)]) == ([3, 6, 8, 9], {"filter_evaluation_prompt": 5})


@pytest.mark.parametrize(
    "name",
    ["messages_from_human", "messages_parts", "messages_role_human", "prompt_message", "turns_content_only"],
)
def test_every_layout_of_evaluation_prompts_is_found(shared_cases, kept, name):
    """Ten of the twenty rows are evaluation prompts."""
    path = shared_cases / "prompts" / f"eval_{name}.jsonl"
    rows = [json.loads(line) for line in (shared_cases / "rows" / "leak_train.jsonl").open()]
    found, dropped = kept(rows, decontaminate=[str(path)])
    assert (len(found), dropped) == (10, {"filter_evaluation_prompt": 10})


def test_an_evaluation_prompt_that_cannot_be_used_is_counted(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"prompt": LONG}) + '\n{"id": 1}\n{"turns": [7]}\n')
    filters = Filters(FilterSettings(decontaminate=[str(path)]))
    assert len(filters.notes()) == 1
    assert "2 prompts cannot be used, the first is eval.jsonl:2: expected a prompt" in filters.notes()[0]
    path.write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"eval\.jsonl:1: .*No prompt of .* can be read"):
        Filters(FilterSettings(decontaminate=[str(path)]))


def test_real_evaluation_prompts_are_found_and_ordinary_ones_are_not(shared_data, kept):
    path = shared_data / "eval" / "mt_bench_question.jsonl"
    questions = [json.loads(line)["turns"] for line in path.read_text().splitlines()]
    evaluation = EvaluationPrompts([str(path)], 13)
    assert all(evaluation.is_in(f"{turn}\n") for turns in questions for turn in turns)
    long = [turn for turns in questions for turn in turns if len(turn.split()) > 12]
    assert len(long) > 80
    assert all(evaluation.is_in(f"Hello. {turn} Thanks!") for turn in long)
    other = (shared_data / "eval" / "vicuna_bench_question.jsonl").read_text().splitlines()
    found = [question for line in other if evaluation.is_in(question := json.loads(line)["turns"][0])]
    # The two that both lists hold.
    assert [question.split(" ")[0] for question in found] == ["Implement", "Compose"]
    assert found[1] == LONG


@pytest.mark.parametrize(
    ("settings", "error", "problem"),
    [
        ({"drop_pattern": "("}, UsageError, r"filter\.drop_pattern is not a regular expression"),
        ({"decontaminate": ["none.jsonl"]}, DataError, "No such file: none.jsonl"),
    ],
)
def test_what_cannot_be_used_is_one_line(kept, settings, error, problem):
    with pytest.raises(error, match=problem):
        kept([row()], **settings)


def test_every_filter_changes_the_identity(tmp_path, base):
    path, evaluation = tmp_path / "rows.jsonl", tmp_path / "eval.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    evaluation.write_text('{"prompt": "a"}\n')
    data = DataSettings(path=str(path))
    others = {
        "min_prompt_tokens": 1,
        "max_prompt_tokens": 9,
        "min_completion_tokens": 1,
        "max_completion_tokens": 9,
        "min_score_gap": 0.5,
        "language": "en",
        "language_column": "lang",
        "drop_pattern": "x",
        "duplicates": "exact",
        "near_duplicate_similarity": 0.9,
        "decontaminate": [str(evaluation)],
        "decontaminate_words": 8,
    }
    assert set(others) == set(FilterSettings.model_fields)
    # Settings of another filter, without which these have no effect.
    needed = {
        "language_column": {"language": "en"},
        "near_duplicate_similarity": {"duplicates": "near"},
        "decontaminate_words": {"decontaminate": [str(evaluation)]},
    }

    def identity(**settings):
        return rows_identity(data, WHOLE, base, FilterSettings(**settings))

    for name, value in others.items():
        without = needed.get(name, {})
        assert identity(**without) != identity(**without, **{name: value}), name
