"""From a file to rows: nothing is lost in silence, no prompt is on both sides, and the identity is exact."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache.artifacts import Store
from cache.errors import DataError, MachineError, StaleError, UsageError
from stages.data.pairs import Pairs
from stages.data.rows import SPLITS, RowSet
from stages.losses import LOSSES
from stages.prepare.stage import PART_OF_THE_TEMPLATE, find_rows, prepare, rows_identity
from stages.runtime.context import Context
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.render import RenderOptions
from stages.tokenization.template import Template
from stages.train.preflight import check_data

EVERYTHING_FITS = PrepareSettings(max_length=4096, heldout_fraction=0.25)


@pytest.fixture(scope="module")
def base(base_tokenizer):
    return Template(base_tokenizer, "auto", append_eos=True)


@pytest.fixture(scope="module")
def chat(chat_tokenizer):
    return Template(chat_tokenizer, "auto", append_eos=True)


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataSettings(path=str(path), on_bad_row="skip")


def pairs(count):
    return [
        {"prompt": f"q{number}", "chosen": f" good {number}", "rejected": " bad"} for number in range(count)
    ]


def examples(artifact):
    """Per split, each example as (source, cycle, prompt text ids, rows as (role, ids))."""
    found = {}
    for split in SPLITS:
        rows = RowSet.of(artifact, split)
        found[split] = [
            (
                rows.sources[rows.starts[number]],
                int(rows.mismatch_groups[number]),
                tuple(rows.prompt(rows.starts[number]).tolist()),
                [
                    (str(rows.roles[row]), tuple(rows.completion(row).tolist()))
                    for row in range(rows.starts[number], rows.ends[number])
                ],
            )
            for number in range(rows.num_examples)
        ]
    return found


MIXED = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    "",
    '{"prompt": "cut',
    {"prompt": "q", "chosen": "a"},
    {"prompt": "q", "chosen": "same", "rejected": "same"},
    {"prompt": "q", "chosen": "a", "rejected": " \n"},
    {"prompt": "q", "chosen": "a", "rejected": True},
    {"prompt": "long", "chosen": "x" * 30 + "a", "rejected": "x" * 30 + "b"},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": [], "rejected": "b"},
    {"prompt": "r", "chosen": "a", "rejected": "b"},
    "[1]",
]


def test_rows_in_are_rows_kept_and_rows_dropped_by_reason(tmp_path, base, context):
    data = write(tmp_path / "mixed.jsonl", MIXED)
    artifact = prepare(data, PrepareSettings(max_length=8, heldout_fraction=0.0), base, context)
    counts = artifact.counts
    assert counts["dropped"] == {
        "bad_row": 4,
        "empty_completion": 1,
        "identical_after_truncation": 1,
        "identical_completions": 1,
        "not_text": 1,
    }
    assert (counts["rows_in"], counts["rows_kept"]) == (10, 2)
    assert counts["rows_in"] == counts["rows_kept"] + sum(counts["dropped"].values())
    assert counts["rows_by_role"] == {"chosen": 2, "rejected": 2, "mismatched": 4}
    rejected = [json.loads(line) for line in (artifact.path / "rejected.jsonl").read_text().splitlines()]
    assert [entry["location"] for entry in rejected] == [f"mixed.jsonl:{line}" for line in (3, 4, 7, 9, 11)]
    assert "rejected: expected text, found None" in rejected[1]["problem"]
    assert rejected[2]["problem"] == "rejected: expected text, found True"
    assert [entry["reason"] for entry in rejected] == ["bad_row", "bad_row", "not_text", "bad_row", "bad_row"]


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (2, "Invalid control"),
        (3, "rejected: expected text, found None"),
        (8, "chosen: "),
    ],
)
def test_a_bad_row_stops_with_file_and_line_and_leaves_nothing(
    tmp_path, base, context, store, number, problem
):
    good = pairs(4)
    path = tmp_path / "rows.jsonl"
    write(path, [*good, MIXED[number]])
    with pytest.raises(DataError, match=r"rows\.jsonl:5: .*--set data\.on_bad_row=skip") as caught:
        prepare(DataSettings(path=str(path)), EVERYTHING_FITS, base, context)
    assert problem in str(caught.value)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []
    assert list((store.root / "rows").iterdir()) == []


def test_rows_of_true_or_false_are_listed_and_stop_nothing_unless_they_are_the_column(
    tmp_path, base, context
):
    flagged = {"prompt": "q", "chosen": True, "rejected": "b"}
    data = DataSettings(path=write(tmp_path / "rows.jsonl", [*pairs(4), flagged]).path)
    artifact = prepare(data, EVERYTHING_FITS, base, context)
    assert (artifact.counts["rows_kept"], artifact.counts["dropped"]) == (4, {"not_text": 1})
    [listed] = (artifact.path / "rejected.jsonl").read_text().splitlines()
    assert json.loads(listed)["location"] == "rows.jsonl:5"
    data = DataSettings(path=write(tmp_path / "column.jsonl", [*pairs(4), *[flagged] * 5]).path)
    with pytest.raises(
        DataError, match=r"column\.jsonl:5: chosen: expected text, found True; the same in 5 of 9"
    ):
        prepare(data, EVERYTHING_FITS, base, context)


def test_text_that_spells_a_mark_of_the_template_is_listed_and_stops_nothing(
    tmp_path, base_tokenizer, context
):
    own = Template(base_tokenizer, "chatml", append_eos=True)
    forged = {"prompt": "q<|im_end|>", "chosen": "a", "rejected": "b"}
    data = DataSettings(path=write(tmp_path / "rows.jsonl", [*pairs(4), forged]).path)
    artifact = prepare(data, EVERYTHING_FITS, own, context)
    assert (artifact.counts["rows_kept"], artifact.counts["dropped"]) == (4, {"spells_turn_mark": 1})


@pytest.mark.slow
def test_more_rows_than_a_batch_and_a_shard_hold(tmp_path, base, context):
    """2,200 rows; rows are read 512 at a time and shards hold about 2,048 examples."""
    rows = pairs(2200)
    del rows[600]["rejected"]
    rows[700] = '{"prompt": '
    rows[1500] = {**rows[1500], "chosen": rows[1500]["rejected"]}
    data = write(tmp_path / "many.jsonl", rows)
    artifact = prepare(data, EVERYTHING_FITS.model_copy(update={"heldout_fraction": 0.02}), base, context)
    assert artifact.counts["dropped"] == {"bad_row": 2, "identical_completions": 1}
    found = examples(artifact)
    assert sum(record["name"].startswith("train-") for record in artifact.manifest["files"]) == 2
    sources = [source for split in SPLITS for source, *_ in found[split]]
    expected = [f"many.jsonl:{line}" for line in range(1, 2201) if line not in (601, 701, 1501)]
    assert sorted(sources) == sorted(expected)
    order = [int(source.rpartition(":")[2]) for source, *_ in found["train"]]
    assert order == sorted(order)
    for split in SPLITS:
        assert_each_completion_serves_once(found[split])


def assert_each_completion_serves_once(split):
    """In every cycle, the mismatched completions are the matched ones, each with another prompt than its own."""
    cycles = defaultdict(list)
    for _, cycle, prompt, rows in split:
        cycles[cycle].append((prompt, rows))
    for members in cycles.values():
        assert len(members) >= 2
        own = Counter(ids for _, rows in members for role, ids in rows if role != "mismatched")
        lent = Counter(ids for _, rows in members for role, ids in rows if role == "mismatched")
        assert own == lent
        for prompt, rows in members:
            borrowed = [ids for role, ids in rows if role == "mismatched"]
            lenders = {
                other
                for other, others in members
                if {ids for role, ids in others if role != "mismatched"} & set(borrowed)
            }
            assert lenders - {prompt}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 9])
def test_however_many_examples_each_completion_serves_once_as_mismatched(tmp_path, base, context, count):
    data = write(
        tmp_path / "rows.jsonl", [{**row, "rejected": f" bad {n}"} for n, row in enumerate(pairs(count))]
    )
    artifact = prepare(data, PrepareSettings(heldout_fraction=0.0), base, context)
    assert_each_completion_serves_once(examples(artifact)["train"])
    assert artifact.counts["rows_by_role"]["mismatched"] == 2 * count


def test_neighbours_that_share_a_prompt_lend_each_other_nothing(tmp_path, base, context):
    """Pairs taken apart into single completions: good and bad of one prompt follow each other."""
    rows = [
        {"prompt": f"q{number}", "completion": f" {label} {number}", "label": label}
        for number in range(4)
        for label in (True, False)
    ]
    artifact = prepare(
        write(tmp_path / "rows.jsonl", rows), PrepareSettings(heldout_fraction=0.0), base, context
    )
    split = examples(artifact)["train"]
    assert_each_completion_serves_once(split)
    answers = defaultdict(set)
    for _, _, prompt, members in split:
        answers[prompt] |= {ids for role, ids in members if role != "mismatched"}
    assert all(
        ids not in answers[prompt]
        for _, _, prompt, members in split
        for role, ids in members
        if role == "mismatched"
    )


def test_answers_that_stand_together_by_prompt_lend_each_other_nothing_and_none_goes_without(
    tmp_path, base, context
):
    """Thumbs for several answers to each prompt: whole groups of neighbours have one prompt."""
    rows = [
        {"prompt": f"q{number // 8}", "completion": f" answer {number}", "label": number % 3 == 0}
        for number in range(80)
    ]
    artifact = prepare(
        write(tmp_path / "rows.jsonl", rows), PrepareSettings(heldout_fraction=0.0), base, context
    )
    assert artifact.counts["rows_by_role"]["mismatched"] == 80
    split = examples(artifact)["train"]
    assert_each_completion_serves_once(split)
    assert sorted(source for source, *_ in split) == sorted(f"rows.jsonl:{n + 1}" for n in range(80))


def test_a_prompt_that_is_alone_has_no_mismatched_rows(tmp_path, base, context):
    rows = [{"prompt": "q", "completion": f" {number}", "label": True} for number in range(5)]
    artifact = prepare(
        write(tmp_path / "rows.jsonl", rows), PrepareSettings(heldout_fraction=0.0), base, context
    )
    assert artifact.counts["rows_by_role"] == {"desirable": 5}


def test_mismatched_rows_can_be_left_out(preferences, chat, context):
    data, without = (
        DataSettings(path=str(preferences)),
        EVERYTHING_FITS.model_copy(update={"mismatched": False}),
    )
    assert prepare(data, without, chat, context).counts["rows_by_role"] == {"chosen": 24, "rejected": 24}


def test_a_mismatched_row_fits_into_max_length(tmp_path, base, context):
    rows = [
        {"prompt": "q" * 8, "chosen": "a", "rejected": "b"},
        {"prompt": "r", "chosen": "c" * 20, "rejected": "d" * 20},
    ]
    settings = PrepareSettings(heldout_fraction=0.0, max_length=14, truncation_mode="keep_start")
    split = RowSet.of(prepare(write(tmp_path / "rows.jsonl", rows), settings, base, context), "train")
    assert split.max_length() == 14
    assert len(split) == 8


def prompts_of(found):
    return {split: {prompt for _, _, prompt, _ in members} for split, members in found.items()}


def repeated_prompts(count=60):
    rows = [{"prompt": f"q{n % 20}", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(count)]
    return rows


def test_no_prompt_is_on_both_sides(tmp_path, base, context):
    data = write(tmp_path / "rows.jsonl", repeated_prompts())
    found = examples(prepare(data, EVERYTHING_FITS, base, context))
    prompts = prompts_of(found)
    assert prompts["train"] & prompts["heldout"] == set()
    assert len(prompts["train"]) + len(prompts["heldout"]) == 20
    assert len(prompts["heldout"]) > 0


def test_the_order_of_the_file_changes_neither_the_sides_nor_the_keys(tmp_path, base, context):
    settings = EVERYTHING_FITS.model_copy(update={"mismatched": False})
    rows = repeated_prompts()
    first = prepare(write(tmp_path / "a.jsonl", rows), settings, base, context)
    random.Random(1).shuffle(rows)
    second = prepare(write(tmp_path / "b.jsonl", rows), settings, base, context)
    assert first.fingerprint != second.fingerprint
    assert prompts_of(examples(first)) == prompts_of(examples(second))
    for split in SPLITS:
        one, other = (RowSet.of(artifact, split) for artifact in (first, second))
        assert sorted(one.keys) == sorted(other.keys)
        assert sorted(one.example_ids) == sorted(other.example_ids)


def test_a_larger_share_holds_out_the_same_prompts_and_more(tmp_path, base, context):
    data = write(tmp_path / "rows.jsonl", pairs(40))
    sides = [
        prompts_of(examples(prepare(data, PrepareSettings(heldout_fraction=share), base, context)))["heldout"]
        for share in (0.0, 0.1, 0.4)
    ]
    assert sides[0] == set()
    assert sides[1] < sides[2]
    assert 8 <= len(sides[2]) <= 24  # 40 draws of 0.4: 16 expected, 3.1 the standard deviation


def test_copies_of_a_row_are_two_examples(tmp_path, base, context):
    data = write(tmp_path / "rows.jsonl", [*pairs(2), *pairs(2)])
    artifact = prepare(data, PrepareSettings(heldout_fraction=0.0), base, context)
    rows = RowSet.of(artifact, "train")
    assert rows.num_examples == 4
    assert len(set(rows.example_ids)) == 2


def test_two_runs_write_the_same_bytes(preferences, chat, tmp_path):
    data = DataSettings(path=str(preferences))
    files = []
    for name in ("one", "two"):
        artifact = prepare(data, EVERYTHING_FITS, chat, Context(Store(tmp_path / name)))
        files.append(artifact.manifest["files"])
    assert files[0] == files[1]
    assert any(record["name"].startswith("heldout-") for record in files[0])


def test_what_was_prepared_is_found_and_nothing_else(preferences, chat, context):
    data = DataSettings(path=str(preferences))
    assert find_rows(data, EVERYTHING_FITS, chat, context) is None
    artifact = prepare(data, EVERYTHING_FITS, chat, context)
    found = find_rows(data, EVERYTHING_FITS, chat, context)
    assert found is not None
    assert found.path == artifact.path
    assert find_rows(data, PrepareSettings(), chat, context) is None
    assert artifact.path.name.startswith("preferences-")


OTHER_SETTINGS = {
    "max_length": 77,
    "max_prompt_length": 11,
    "max_completion_length": 12,
    "truncation_mode": "keep_start",
    "heldout_fraction": 0.5,
    "mismatched": False,
    "graded": "ranked",
}
OTHER_DATA = {
    "format": "ultrafeedback",
    "columns": {"prompt": "prompt"},
    "labels": {"up": True},
    "ties": "half",
    "threshold": 3.0,
    "max_samples": 5,
    "on_bad_row": "skip",
}
# Of a single local file, which is taken whole; and what is left out anyhow.
NOT_IN_THE_ROWS = {"seed": 7, "ignore": ["prompt"]}
# Refused for a file: tests/stages/data/test_folders.py.
NOT_OF_A_FILE = {"config", "split", "revision"}


def test_every_setting_that_changes_the_rows_changes_the_identity(preferences, chat, chat_tokenizer):
    """`template`, `append_eos` and the template's options do so through the template that is made of them."""
    data, settings = DataSettings(path=str(preferences)), PrepareSettings()
    identity = rows_identity(data, settings, chat)
    assert set(PrepareSettings.model_fields) - PART_OF_THE_TEMPLATE - {"tokenizer", "num_workers"} == set(
        OTHER_SETTINGS
    )
    for name, value in OTHER_SETTINGS.items():
        assert rows_identity(data, settings.model_copy(update={name: value}), chat) != identity, name
    assert (
        set(DataSettings.model_fields) - {"path", "sources"}
        == {*OTHER_DATA, *NOT_IN_THE_ROWS} | NOT_OF_A_FILE
    )
    for name, value in OTHER_DATA.items():
        assert rows_identity(data.model_copy(update={name: value}), settings, chat) != identity, name
    for template in (
        Template(chat_tokenizer, "plain", True),
        Template(chat_tokenizer, "auto", False),
        *(
            Template(chat_tokenizer, "auto", True, options=RenderOptions(**options))
            for options in ({"thinking": "empty"}, {"arguments": {"date": "today"}}, {"system": "fold"})
        ),
    ):
        assert rows_identity(data, settings, template) != identity
    preferences.write_text(preferences.read_text() + "\n")
    assert rows_identity(data, settings, chat) != identity


def test_what_does_not_change_the_rows_does_not_change_the_identity(
    preferences, chat, chat_tokenizer, tmp_path
):
    data, settings = DataSettings(path=str(preferences)), PrepareSettings()
    identity = rows_identity(data, settings, chat)
    assert rows_identity(data.model_copy(update=NOT_IN_THE_ROWS), settings, chat) == identity
    assert (
        rows_identity(
            data, settings.model_copy(update={"template": "chat"}), Template(chat_tokenizer, "chat", True)
        )
        == identity
    )
    for other in ({"num_workers": 3}, {"tokenizer": "fastokens"}):
        assert rows_identity(data, settings.model_copy(update=other), chat) == identity
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(preferences.read_bytes())
    assert rows_identity(DataSettings(path=str(moved)), settings, chat) == identity


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", "", "holds no rows"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.jsonl", "\n\n", "holds no rows"),
        ("rows.jsonl", "no\nno\n", r"rows\.jsonl:1: .*None of the first"),
        ("rows.jsonl", '{"question": "q"}\n', r"rows\.jsonl:1: a row with columns question has a prompt and no answers"),
        ("rows.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "a"}\n', r"no usable training row among 1 \(1 identical_completions\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_source_without_usable_rows_says_why(tmp_path, base, context, name, content, problem, on_bad_row):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=problem):
        prepare(
            DataSettings(path=str(tmp_path / name), on_bad_row=on_bad_row), EVERYTHING_FITS, base, context
        )


def test_where_every_row_is_bad_the_commonest_problems_are_said_and_all_are_kept(tmp_path, base, context):
    rows = [{"prompt": "q", "chosen": n, "rejected": "b"} for n in range(3)]
    data = write(tmp_path / "rows.jsonl", [*rows, {"prompt": 1, "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError) as caught:
        prepare(data, PrepareSettings(), base, context)
    said = str(caught.value)
    assert "4 bad_row" in said
    assert "3 as rows.jsonl:1: chosen: expected text, found 0; 1 as rows.jsonl:4: prompt: expected" in said
    kept = Path(said.split("All are listed in ")[1].removesuffix("."))
    assert [json.loads(line)["location"] for line in kept.open()] == [f"rows.jsonl:{n}" for n in range(1, 5)]


def test_a_store_that_cannot_be_written_is_one_line(preferences, chat):
    context = Context(Store(preferences))  # a file
    with pytest.raises(MachineError, match="Cannot write"):
        prepare(DataSettings(path=str(preferences)), EVERYTHING_FITS, chat, context)


@pytest.mark.parametrize(
    "name", ["..", "../../x", "a b/ü é.jsonl", "x" * 300, ".jsonl", "CON.jsonl", "a\n\x07b.jsonl"]
)
def test_no_name_of_a_source_leads_out_of_the_store(tmp_path, context, name):
    from stages.prepare.stage import artifact_name

    folder = context.store.folder("rows", artifact_name(DataSettings(path=name)), {})
    assert folder.parent == context.store.root / "rows"
    assert folder.name.isprintable()
    folder.mkdir(parents=True)


def test_the_counts_of_what_was_cut(tmp_path, base, context):
    """`q` is one id after the beginning of sequence; 6 letters and the end are 7 ids, of which 4 are cut off."""
    rows = [
        {"prompt": "q", "chosen": "xzxzxz", "rejected": "z"},
        {"prompt": "x", "chosen": "q", "rejected": "z"},
    ]
    settings = PrepareSettings(max_completion_length=3, heldout_fraction=0.0, mismatched=False)
    counts = prepare(write(tmp_path / "rows.jsonl", rows), settings, base, context).counts
    assert (counts["prompts_cut"], counts["completions_cut"], counts["tokens_cut"]) == (0, 1, 4)
    assert counts["tokens"] == 2 + 3 + 2 + (2 + 2 + 2)


@pytest.mark.slow
def test_hh_rlhf_itself(shared_data, base, context):
    data = DataSettings(path=str(shared_data / "pairs" / "hh_harmless_base_test.jsonl.gz"))
    counts = prepare(data, PrepareSettings(max_length=1 << 20, mismatched=False), base, context).counts
    assert counts["rows_in"] == 2312
    assert counts["dropped"] == {"empty_completion": 4, "prompts_differ": 5}
    assert (counts["format"], counts["rows_kept"]) == ("hh", 2303)


@pytest.mark.slow
def test_graded_stories_themselves(shared_data, base, context):
    data = DataSettings(path=str(shared_data / "graded" / "tinystories_graded_synthetic.jsonl"))
    counts = prepare(data, PrepareSettings(max_length=1 << 20), base, context).counts
    assert (counts["format"], counts["rows_in"]) == ("graded", 403)
    assert counts["rows_kept"] + sum(counts["dropped"].values()) == 403
    assert counts["scored_rows"] == 2 * counts["rows_kept"]


def graded(*rows):
    return [
        {"prompt": f"Prompt {number}.", "responses": responses, "rewards": rewards}
        for number, (responses, rewards) in enumerate(rows)
    ]


RANKED = graded(
    (["middle", "worst", "best", "other"], [2, -1, 3.5, 2]),
    (["down", "up"], [0, 1]),
    (["low", "high", "low"], [0, 2, 0]),
    (["a", "b", "c"], [1, 1, 1]),
    (["alone"], [1]),
    (["same", "between", "same"], [2, 1, 0]),
    (["best", " ", "worst"], [2, 1, 0]),
)


def test_a_ranked_list_keeps_every_response_with_its_score(tmp_path, base, context):
    data = write(tmp_path / "graded.jsonl", RANKED)
    settings = PrepareSettings(heldout_fraction=0, graded="ranked")
    found = prepare(data, settings, base, context)
    split = RowSet.of(found, "train")
    kept = [split.example_rows(example, mismatched=False) for example in range(split.num_examples)]
    assert [split.scores[rows].tolist() for rows in kept] == [[2, -1, 3.5, 2], [0, 1], [0, 2, 0]]
    assert {str(role) for rows in kept for role in split.roles[rows]} == {"ranked"}
    assert found.counts["dropped"] == {
        "tie": 1,
        "fewer_than_two_responses": 1,
        "identical_completions": 1,
        "empty_completion": 1,
    }
    assert found.counts["scored_rows"] == found.counts["rows_by_role"]["ranked"] == 9


def test_a_ranked_list_lends_its_best_and_its_worst(tmp_path, base, context):
    """The mismatched rows are those that best_worst makes, so kto trains alike on both."""
    data = write(tmp_path / "graded.jsonl", RANKED[:3])
    made = {}
    for choice in ("best_worst", "ranked"):
        split = RowSet.of(
            prepare(data, PrepareSettings(heldout_fraction=0, graded=choice), base, context), "train"
        )
        rows = [split.example_rows(example, mismatched=True) for example in range(split.num_examples)]
        made[choice] = [[split.keys[row] for row in group] for group in rows]
    assert made["ranked"] == made["best_worst"]
    assert [len(group) for group in made["ranked"]] == [2, 2, 2]


def test_only_graded_data_can_be_ranked(preferences, chat, context):
    with pytest.raises(
        UsageError, match=r"prepare.graded=ranked is for graded or ranked responses.*preference"
    ):
        prepare(DataSettings(path=str(preferences)), PrepareSettings(graded="ranked"), chat, context)


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, chat):
    """Six batches with bad rows among them, so that outcomes come back out of order."""
    rows = [{"prompt": f"q{number}", "chosen": f"good {number}", "rejected": "bad"} for number in range(3000)]
    del rows[700]["chosen"], rows[2100]["chosen"]
    data = write(tmp_path / "rows.jsonl", rows)
    found = []
    for workers in (1, 2):
        settings = EVERYTHING_FITS.model_copy(update={"num_workers": workers})
        context = Context(Store(tmp_path / f"store{workers}"), log=lambda line: None)
        artifact = prepare(data, settings, chat, context)
        found.append((artifact.manifest["files"], artifact.counts, artifact.fingerprint))
    assert found[0] == found[1]
    assert found[0][1]["dropped"] == {"bad_row": 2}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_with_any_number_of_processes_the_first_bad_row_is_the_one_named(tmp_path, chat, context, workers):
    rows = pairs(2000)
    rows[900]["chosen"] = 1
    rows[1500]["prompt"] = None
    path = tmp_path / "rows.jsonl"
    write(path, rows)
    settings = EVERYTHING_FITS.model_copy(update={"num_workers": workers})
    with pytest.raises(DataError, match=r"rows\.jsonl:901: chosen"):
        prepare(DataSettings(path=str(path)), settings, chat, context)


@pytest.mark.slow
def test_fastokens_gives_the_same_rows(shared_data, tmp_path):
    pytest.importorskip("fastokens")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "olmo2_dolma2")
    data = DataSettings(path=str(shared_data / "pairs" / "hh_harmless_base_test.jsonl.gz"), max_samples=150)
    files = []
    for quick in (False, True):
        context = Context(Store(tmp_path / str(quick)), log=lambda line: None)
        template = Template(tokenizer, "auto", append_eos=True, quick=quick)
        files.append(prepare(data, EVERYTHING_FITS, template, context).manifest["files"])
    assert files[0] == files[1]


def test_fastokens_that_disagrees_ends_the_stage(preferences, chat_tokenizer, context):
    """A library whose ids are off by one in one text of a batch, as a wrong version's would be."""
    pytest.importorskip("fastokens")
    template = Template(chat_tokenizer, "auto", append_eos=True, quick=True)
    backend = template.encoder.batch_backend
    right = backend._quick

    class Wrong:
        def encode_batch(self, texts, special):
            found = [list(encoding.ids) for encoding in right.encode_batch(texts, special)]
            found[0][-1] += 1
            return [SimpleNamespace(ids=ids) for ids in found]

    backend._quick = Wrong()
    with pytest.raises(DataError, match=r"different ids for .*prepare\.tokenizer=tokenizers"):
        prepare(DataSettings(path=str(preferences)), EVERYTHING_FITS, template, context)


def test_a_prompt_is_on_one_side_as_text_and_as_a_conversation(tmp_path, chat, context):
    """The same 40 prompts in three formats: the held-out ones are the same."""
    held = []
    for number, layout in enumerate(
        [
            lambda q: {"prompt": q, "chosen": "a", "rejected": "b"},
            lambda q: {"prompt": [{"role": "user", "content": q}], "completion": "a", "label": True},
            lambda q: {"instruction": q, "input": "", "output": ["a", "b"]},
        ]
    ):
        data = write(tmp_path / f"{number}.jsonl", [layout(f"q{n}") for n in range(40)])
        held.append(prompts_of(examples(prepare(data, EVERYTHING_FITS, chat, context)))["heldout"])
    assert held[0] == held[1] == held[2]
    assert 0 < len(held[0]) < 40


def test_a_tie_taken_both_ways_is_one_example_of_two_pairs_with_half_the_weight(tmp_path, base, context):
    values = [{"prompt": f"q{n}", "responses": [f" a{n}", f" b{n}"], "rewards": [1, n % 2]} for n in range(4)]
    settings = PrepareSettings(heldout_fraction=0.0)
    data = write(tmp_path / "rows.jsonl", values)
    dropped = prepare(data, settings, base, context)
    assert (dropped.counts["dropped"], dropped.counts["rows_kept"]) == ({"tie": 2}, 2)
    both = prepare(data.model_copy(update={"ties": "half"}), settings, base, context)
    assert (both.counts["dropped"], both.counts["rows_kept"]) == ({}, 4)
    split = RowSet.of(both, "train")
    pairs_of = Pairs(split, "best_worst")
    tied, won = pairs_of.of(1), pairs_of.of(0)
    assert (len(tied), len(won)) == (2, 1)
    assert split.weights[tied].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert split.keys[tied[0, 0]] == split.keys[tied[1, 1]]
    assert split.weights[won].tolist() == [[1.0, 1.0]]
    assert (dropped.counts["weighted_rows"], both.counts["weighted_rows"]) == (0, 8)
    check_data(LOSSES["dpo"](), both, "best_worst", context)
    check_data(LOSSES["simpo"](), dropped, "best_worst", context)
    with pytest.raises(
        UsageError, match=r"Loss simpo ignores weights, and 8 rows .*Losses with weights: dpo, "
    ):
        check_data(LOSSES["simpo"](), both, "best_worst", context)
    assert both.counts["rows_by_role"] == {"chosen": 6, "rejected": 6, "mismatched": 8}


def test_weights_and_masks_of_turns_reach_the_rows(tmp_path, chat, context):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    said = [user, {**answer, "loss_weight": 0.0}, user, {**answer, "loss_weight": 0.5}]
    row = {"chosen_messages": said, "rejected_messages": [user, {"role": "assistant", "content": "b"}]}
    settings = PrepareSettings(heldout_fraction=0.0, mismatched=False)
    split = RowSet.of(prepare(write(tmp_path / "v1.jsonl", [row]), settings, chat, context), "train")
    assert split.weights.tolist() == [0.5, 1.0]
    trained = split.completion(0)[split.mask(0).astype(bool)]
    assert chat.tokenizer.decode(trained) == "a<|end|>"


def test_what_is_found_gathered_and_out_of_balance_is_said(tmp_path, base, context, said):
    scored = [{"prompt": f"q{n // 3}", "text": f" {n}", "reward": n} for n in range(9)]
    counts = prepare(write(tmp_path / "a.jsonl", scored), PrepareSettings(), base, context).counts
    assert said[0].startswith("detected: scored_rows (prompt, text or response")
    assert said[0].endswith("override with --set data.format=NAME")
    assert (counts["rows_in"], counts["notes"]) == (3, {"rows_gathered_into_lists": 9})
    for good, expected in (
        (3, {"desirable_weight": [3.0, 4.0]}),
        (6, None),
        (9, {"undesirable_weight": [2.25, 3.0]}),
    ):
        marked = [
            {"prompt": f"q{n}", "completion": " a", "label": n < good} for n in range(12 if good != 6 else 11)
        ]
        data = write(tmp_path / f"{good}.jsonl", marked)
        found = prepare(data, PrepareSettings(), base, context).counts
        assert found["kto_weights"] == expected
    assert counts["kto_weights"] is None


def test_a_column_map_is_part_of_preparing(tmp_path, base, context):
    data = write(
        tmp_path / "rows.jsonl",
        [{"ask": f"q{n}", "good": "a", "bad": "b"} for n in range(3)] + [{"ask": "q"}],
    )
    mapped = data.model_copy(update={"columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}})
    artifact = prepare(mapped, PrepareSettings(heldout_fraction=0.0), base, context)
    assert (artifact.counts["format"], artifact.counts["rows_kept"]) == ("preference", 3)
    assert "good: no such column" in (artifact.path / "rejected.jsonl").read_text()


def test_rows_of_token_ids_become_rows(tmp_path, base, context):
    values = [{"prompt_ids": [5, 6, n], "chosen_ids": [8, 2], "rejected_ids": [9]} for n in range(10, 14)]
    artifact = prepare(
        write(tmp_path / "ids.jsonl", values), PrepareSettings(heldout_fraction=0.0), base, context
    )
    split = RowSet.of(artifact, "train")
    assert split.prompt(0).tolist() == [5, 6, 10]
    assert [split.completion(row).tolist() for row in (0, 1)] == [[8, 2], [9]]


REAL = {
    "pairs/llamafactory_dpo_en_demo.json": ("llama_factory_sharegpt", 300, 300, {}),
    "pairs/llamafactory_oasst_rm_zh.json": ("llama_factory_ranked", 775, 772, {"identical_completions": 3}),
    "pairs/llamafactory_v1_dpo_demo.jsonl": ("llama_factory_v1", 10, 10, {}),
    "pairs/pandalm_testset_v1.json": (
        "pandalm",
        999,
        836,
        {"not_text": 6, "empty_completion": 52, "tie": 105},
    ),
    "pairs/torchtune_stack_exchange_paired_tiny.json": ("stack_exchange", 25, 25, {}),
    "graded/odpo_imdb_test.jsonl": ("scored_rows", 252, 249, {"empty_completion": 3}),
    "graded/odpo_tldr_train.json": ("odpo", 572, 567, {"fewer_than_two_responses": 3, "tie": 2}),
    "graded/prometheus_vicuna_eval.json": ("prometheus", 80, 74, {"tie": 6}),
    "kto/llamafactory_kto_en_demo.json": ("kto_messages", 300, 300, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL)
def test_real_files_need_nothing_but_their_path(shared_data, base, context, path):
    settings = PrepareSettings(max_length=1 << 20, mismatched=False)
    counts = prepare(
        DataSettings(path=str(shared_data / path), on_bad_row="skip"), settings, base, context
    ).counts
    assert (counts["format"], counts["rows_in"], counts["rows_kept"], counts["dropped"]) == REAL[path]


def test_nothing_in_the_data_is_executed_or_connected_to(tmp_path, base, context):
    """Pickles, YAML tags, templates and code beside and inside the rows stay data."""
    import pickle
    import sys

    class Bomb:
        def __reduce__(self):
            return print, ("executed",)

    folder = tmp_path / "data"
    folder.mkdir()
    texts = [
        "!!python/object/apply:os.system ['id']",
        "{{ ''.__class__.__mro__ }}",
        "__import__('os')",
        "${HOME}",
    ]
    rows = [{"prompt": text, "chosen": text + "a", "rejected": text + "b"} for text in texts]
    write(folder / "rows.jsonl", rows)
    (folder / "rows.pkl").write_bytes(pickle.dumps(Bomb()))
    (folder / "conftest.py").write_text("raise SystemExit")
    (folder / "dataset_infos.json.py").write_text("raise SystemExit")
    seen, watching = [], True
    forbidden = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")

    def hook(event, arguments):
        if watching and event.startswith(forbidden):
            seen.append((event, arguments))

    sys.addaudithook(hook)
    artifact = prepare(DataSettings(path=str(folder)), PrepareSettings(heldout_fraction=0.0), base, context)
    watching = False
    assert seen == []
    split = RowSet.of(artifact, "train")
    decoded = base.tokenizer.decode(split.prompt(0), skip_special_tokens=True)
    assert (artifact.counts["rows_kept"], decoded) == (4, texts[0])


def test_feedback_on_one_prompt_is_told_which_losses_fit(shared_cases, base, context):
    """Mismatched rows were asked for; the advice to ask for them led back to the same line."""
    data = DataSettings(path=str(shared_cases / "rows" / "kto_one_prompt.jsonl"))
    rows = prepare(data, PrepareSettings(heldout_fraction=0.0), base, context)
    with pytest.raises(
        UsageError, match=r"needs mismatched rows.*all have the same prompt.*or use .*apo_zero_unpaired"
    ) as caught:
        check_data(LOSSES["kto"](), rows, "best_worst", context)
    assert "prepare.mismatched" not in str(caught.value)
    for name in str(caught.value).split("or use ")[1].rstrip(".").split(" or "):
        check_data(LOSSES[name](), rows, "best_worst", context)
    without = prepare(data, PrepareSettings(heldout_fraction=0.0, mismatched=False), base, context)
    with pytest.raises(StaleError, match=r"align prepare --set prepare\.mismatched=true"):
        check_data(LOSSES["kto"](), without, "best_worst", context)


def test_rows_that_are_all_held_out_are_not_called_an_empty_source(shared_cases, base, context):
    path = shared_cases / "rows" / "all_held_out.jsonl"
    num_rows = len(path.read_text().splitlines())
    with pytest.raises(
        DataError,
        match=rf"All {num_rows} examples of all_held_out\.jsonl are held out: prepare\.heldout_fraction=0\.05 .*--set prepare\.heldout_fraction=0\.$",
    ):
        prepare(DataSettings(path=str(path)), PrepareSettings(), base, context)
    assert prepare(DataSettings(path=str(path)), PrepareSettings(heldout_fraction=0.0), base, context)
