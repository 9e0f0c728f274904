"""Several sources in one set: in their shares, the same rows every time, each prompt on one side, every row accounted for."""

import json
from collections import Counter

import pytest

from cache.artifacts import Store
from cache.errors import DataError, UsageError
from stages.data.rows import SPLITS, RowSet
from stages.prepare.stage import prepare, rows_identity
from stages.runtime.context import Context
from stages.settings.data import DataSettings, PrepareSettings, SourceSettings
from stages.tokenization.template import Template

WHOLE = PrepareSettings(heldout_fraction=0.0, mismatched=False)


@pytest.fixture(scope="module")
def chat(chat_tokenizer):
    return Template(chat_tokenizer, "auto", append_eos=True)


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pairs(name, count):
    return [{"prompt": f"{name}{number}", "chosen": "a", "rejected": "b"} for number in range(count)]


def mixed(*sources, **more):
    return DataSettings(sources=[SourceSettings(**source) for source in sources], **more)


def sources_of(artifact, split="train"):
    rows = RowSet.of(artifact, split)
    return [rows.sources[start] for start in rows.starts]


def by_name(sources):
    return Counter(source.split("/")[0] for source in sources)


def test_weights_are_shares_and_no_row_is_taken_twice(tmp_path, chat, context):
    data = mixed(
        {"path": write(tmp_path / "big.jsonl", pairs("x", 300)), "weight": 3},
        {"path": write(tmp_path / "small.jsonl", pairs("y", 40)), "weight": 1},
    )
    artifact = prepare(data, WHOLE, chat, context)
    sources = sources_of(artifact)
    assert by_name(sources) == {"big": 120, "small": 40}
    assert len(set(sources)) == 160
    # Every stretch of the mixture is mixed.
    for start in range(0, 160, 20):
        assert by_name(sources[start : start + 20]) == {"big": 15, "small": 5}
    counts = artifact.counts["sources"]
    assert {name: counts[name]["rows_in"] for name in counts} == {"big": 120, "small": 40}


def test_counts_take_so_many_rows_and_others_are_taken_whole(tmp_path, chat, context):
    data = mixed(
        {"path": write(tmp_path / "a.jsonl", pairs("x", 50)), "count": 7},
        {"path": write(tmp_path / "b.jsonl", pairs("y", 9))},
    )
    assert by_name(sources_of(prepare(data, WHOLE, chat, context))) == {"a": 7, "b": 9}


def test_the_seed_chooses_the_rows_and_nothing_else_does(tmp_path, chat):
    source = {"path": write(tmp_path / "a.jsonl", pairs("x", 200)), "count": 20}
    other = {"path": write(tmp_path / "b.jsonl", pairs("y", 5))}
    chosen = []
    for number, data in enumerate(
        (mixed(source), mixed(source), mixed(source, other), mixed(source, seed=1))
    ):
        artifact = prepare(data, WHOLE, chat, Context(Store(tmp_path / f"store{number}")))
        chosen.append([entry for entry in sources_of(artifact) if entry.startswith("a/")])
    assert chosen[0] == chosen[1] == chosen[2] != chosen[3]
    numbers = [int(entry.rpartition(":")[2]) for entry in chosen[0]]
    assert numbers == sorted(numbers)
    # Not the beginning of the file: of 20 rows of 200, these many lie in the first half.
    assert 3 <= sum(number <= 100 for number in numbers) <= 17


def test_a_prompt_is_on_one_side_however_the_sources_write_it(tmp_path, chat, context):
    """As text, as a conversation, with other white space; the template and the format see three different rows."""
    prompts = [f"question {number}" for number in range(60)]
    shapes = {
        "text": lambda text: text,
        "turns": lambda text: [{"role": "user", "content": text}],
        "spaced": lambda text: f" {text.replace(' ', '  ')} ",
    }
    sources = [
        {
            "path": write(
                tmp_path / f"{name}.jsonl",
                [{"prompt": shape(text), "chosen": "a", "rejected": "b"} for text in prompts],
            )
        }
        for name, shape in shapes.items()
    ]
    artifact = prepare(mixed(*sources), PrepareSettings(heldout_fraction=0.3), chat, context)
    lines = {}
    for split in SPLITS:
        lines[split] = {name: set() for name in shapes}
        for source in sources_of(artifact, split):
            name, _, line = source.partition("/")
            lines[split][name].add(line.rpartition(":")[2])
    assert len(lines["heldout"]["text"]) > 5
    assert lines["heldout"]["text"] == lines["heldout"]["turns"] == lines["heldout"]["spaced"]
    assert not lines["heldout"]["text"] & lines["train"]["text"]


def test_every_row_of_every_source_is_kept_or_counted(tmp_path, chat, context):
    """Sources of two formats, with bad rows, ties and duplicates, their rows taken in part."""
    graded = [
        {"prompt": f"g{number}", "responses": ["a", "b"], "rewards": [number % 3, 1]} for number in range(30)
    ]
    first = [*pairs("x", 20), '{"prompt": ', *pairs("x", 3), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    data = mixed(
        {"path": write(tmp_path / "one" / "rows.jsonl", first), "name": "one"},
        {"path": write(tmp_path / "two" / "rows.jsonl", graded), "name": "two", "count": 21},
        on_bad_row="skip",
    )
    artifact = prepare(data, WHOLE, chat, context)
    counts = artifact.counts
    assert counts["sources"]["one"] == {
        "format": "preference",
        "rows_in": 25,
        "rows_kept": 23,
        "dropped": {"bad_row": 1, "identical_completions": 1},
    }
    two = counts["sources"]["two"]
    assert two["rows_in"] == 21 == two["rows_kept"] + sum(two["dropped"].values())
    assert set(two["dropped"]) == {"tie"}
    assert counts["rows_in"] == 46 == counts["rows_kept"] + sum(counts["dropped"].values())
    [rejected] = (artifact.path / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["location"] == "one/rows.jsonl:21"


def test_every_share_is_part_of_the_identity(tmp_path, chat):
    source = {"path": write(tmp_path / "a.jsonl", pairs("x", 20))}
    variants = [source, {**source, "count": 3}, {**source, "weight": 2}, {**source, "name": "b"}]
    found = [json.dumps(rows_identity(mixed(entry), WHOLE, chat)) for entry in variants]
    # The seed draws the rows of a share.
    found.append(json.dumps(rows_identity(mixed({**source, "count": 3}, seed=1), WHOLE, chat)))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("sources", "more", "error", "problem"),
    [
        ([{"path": "a.jsonl"}], {"path": "b.jsonl"}, UsageError, r"data\.path and data\.sources are both set"),
        ([{"path": "x/a.jsonl"}, {"path": "y/a.jsonl"}], {}, UsageError, "two sources have the name 'a'"),
        ([{"path": "a.jsonl", "count": 1, "weight": 1}], {}, UsageError, "a weight and a count"),
        ([{"path": "a.jsonl", "count": 9}], {}, DataError, "has 4 rows, fewer than its count of 9"),
        ([{"path": "none.jsonl"}], {}, DataError, "No such file: none.jsonl"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(tmp_path, monkeypatch, chat, context, sources, more, error, problem):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", pairs("x", 4))
    with pytest.raises(error, match=problem):
        prepare(mixed(*sources, **more), WHOLE, chat, context)
