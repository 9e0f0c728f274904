"""Shares of independent jobs, joined: the bytes of one process, whatever the number of jobs; or a refusal that says what to type."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.artifacts import Artifact, Store, open_artifact
from cache.errors import CorruptError, DataError, StaleError, UsageError
from pipeline.commands.prepare import Prepared, PreparedShare
from pipeline.config import build_config
from pipeline.session import Session
from stages.prepare import shard_writer, share_files, sources
from stages.prepare.stage import join, prepare, prepare_share
from stages.runtime.context import Context
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.tokenization.template import Template
from tests.pipeline.small_run import settings as small_run

WORDS = ("ape", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")


def text(choice: random.Random, most: int) -> str:
    return " ".join(choice.choices(WORDS, k=choice.randint(0, most)))


def pair(choice: random.Random) -> dict:
    """Few prompts and answers, so that examples repeat, are empty, or have equal completions."""
    turned = choice.randrange(4) * 2
    rejected = " ".join(WORDS[turned:] + WORDS[:turned] + (choice.choice(WORDS[:2]),))
    return {
        "prompt": text(choice, 1),
        "chosen": choice.choice(("", *WORDS[:2])),
        "rejected": rejected,
    }


def conversation(choice: random.Random) -> dict:
    turns = [{"role": "user", "content": text(choice, 8) + "?"}]
    answers = [[{"role": "assistant", "content": text(choice, 12)}] for _ in "ab"]
    return {"prompt": turns, "chosen": answers[0], "rejected": answers[1]}


def unpaired(choice: random.Random) -> dict:
    weight = choice.choice([1, 1, 0.1])
    return {
        "prompt": text(choice, 2),
        "completion": text(choice, 3),
        "label": choice.random() < 0.5,
        "weight": weight,
    }


def ranked(choice: random.Random) -> dict:
    """One of the responses to a prompt; they stand anywhere in the file."""
    return {"prompt": choice.choice(WORDS), "response": text(choice, 9), "score": choice.randint(0, 3)}


def with_ids(choice: random.Random) -> dict:
    prompt, *answers = (choice.choices(range(10, 14), k=choice.randint(1, 2)) for _ in range(3))
    return {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}


KINDS = {
    "pairs": pair,
    "conversations": conversation,
    "unpaired": unpaired,
    "lists": ranked,
    "ids": with_ids,
}
BAD_LINES = ('{"prompt": "cut', "[1]", '{"prompt": "q", "chosen": true, "rejected": "b"}')
FILTERS = ("keep", "exact", "near")


@pytest.fixture(scope="module")
def template(chat_tokenizer):
    return Template(chat_tokenizer, "auto", append_eos=True)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(sources, "BATCH_ROWS", 7)
    monkeypatch.setattr(shard_writer, "SHARD_EXAMPLES", 4)
    monkeypatch.setattr(share_files, "SHARD_EXAMPLES", 4)


def data_of(folder: Path, kind: str, seed: int, count: int) -> DataSettings:
    """A file of these rows, of which some are no rows; for mixtures a second one."""
    choice = random.Random(seed)
    lines = [json.dumps(KINDS[kind](choice)) for _ in range(count)]
    for place in choice.sample(range(3, count), min(4, count - 3)):
        lines[place] = choice.choice(BAD_LINES[: 3 if kind == "pairs" else 2])
    path = folder / f"{kind}-{seed}-{count}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    if kind != "conversations":
        return DataSettings(path=str(path), on_bad_row="skip")
    other = folder / f"other-{seed}-{count}.jsonl"
    other.write_text("\n".join(json.dumps(pair(choice)) for _ in range(count)) + "\n")
    entries = [{"path": str(path), "weight": 2}, {"path": str(other), "weight": 1, "name": "other"}]
    return DataSettings.model_validate({"sources": entries, "on_bad_row": "skip"})


def content(artifact: Artifact) -> dict:
    """Everything that the manifest says but when and how it was made; the files with their sha256."""
    return {
        name: value
        for name, value in artifact.manifest.items()
        if name not in ("provenance", "manifest_sha256")
    }


def made_or_refused(make: Callable[[], Artifact]) -> dict | str:
    try:
        return content(make())
    except DataError as error:
        return str(error)


def context_in(folder: Path) -> Context:
    return Context(Store(folder), arguments="-c mine.yaml", log=lambda line: None)


@pytest.mark.slow  # a second for each example
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2)
@given(
    st.sampled_from(FILTERS),
    st.integers(1, 5),
    st.integers(20, 60),
    st.integers(0, 10**6),
)
def test_joined_shares_are_the_bytes_of_one_process(
    tmp_path_factory, template, kind, duplicates, jobs, count, seed
):
    folder = tmp_path_factory.mktemp("shares")
    given_ = (
        data_of(folder, kind, seed, count),
        PrepareSettings(
            max_length=26,
            truncation_mode="keep_start",
            heldout_fraction=0.5,
            graded="ranked" if kind == "lists" else "best_worst",
        ),
        template,
    )
    filter_ = FilterSettings(duplicates=duplicates, near_duplicate_similarity=0.7)
    alone = made_or_refused(lambda: prepare(*given_, context_in(folder / "alone"), filter_))
    context = context_in(folder / "joined")
    for number in random.Random(seed).sample(range(1, jobs + 1), jobs):
        prepare_share(f"{number}/{jobs}", *given_, context, filter_)
    assert made_or_refused(lambda: join(*given_, context, filter_)) == alone
    shutil.rmtree(folder)


def test_what_the_property_covers(tmp_path, template):
    """Its data has mismatched rows, both splits, both kinds of duplicates, cuts and rows of every fate."""
    given_ = (
        data_of(tmp_path, "pairs", 1, 60),
        PrepareSettings(max_length=26, truncation_mode="keep_start", heldout_fraction=0.5),
        template,
    )
    made = prepare(
        *given_, context_in(tmp_path), FilterSettings(duplicates="near", near_duplicate_similarity=0.7)
    )
    fates = {"bad_row", "not_text", "duplicate", "near_duplicate", "empty_completion"}
    assert fates <= made.counts["dropped"].keys()
    assert min(made.counts["examples"].values()) > 0
    assert made.counts["rows_by_role"]["mismatched"]
    assert made.counts["tokens_cut"], made.counts
    assert len([file for file in made.manifest["files"] if file["name"].startswith("train-")]) > 1


def test_more_jobs_than_batches(tmp_path, template):
    given_ = (data_of(tmp_path, "pairs", 2, 20), PrepareSettings(heldout_fraction=0.5), template)
    alone = prepare(*given_, context_in(tmp_path / "alone"))
    context = context_in(tmp_path / "joined")
    for number in range(1, 6):
        prepare_share(f"{number}/5", *given_, context)
    assert content(join(*given_, context)) == content(alone)


def test_a_share_keeps_examples_to_the_bit(template, tmp_path):
    """Scores and weights of 64 bits, an example whose neighbour has its id and its source, views and no copies."""
    import numpy as np

    from stages.data.rows import Example, Row
    from stages.prepare.counts import MadeExample

    def made(weight: float, score: float | None) -> MadeExample:
        ids = np.arange(3, dtype=np.int32)
        row = Row("ranked", ids, np.array([True, False, True]), score, weight, 2)
        return MadeExample("heldout", "s", Example("id", "x:1", ids[:2], [row, row], 5), 1, True, "words")

    all_made = [made(1 + 1e-12, 0.1), made(1.0, None), made(1 / 3, 1e300)]
    back = list(share_files.examples_of(share_files.share_table(all_made, [4, 4, 7])))
    assert [batch for batch, _ in back] == [4, 4, 7]
    for (_, found), one in zip(back, all_made, strict=True):
        assert [(row.weight, row.score, row.cut, row.role) for row in found.example.rows] == [
            (row.weight, row.score, row.cut, row.role) for row in one.example.rows
        ]
        assert [row.mask.tolist() for row in found.example.rows] == [[True, False, True]] * 2
        assert found.example.prompt_ids.tolist() == [0, 1]
        assert (
            found.example.prompt_cut,
            found.num_merged,
            found.loses_characters,
            found.text,
            found.split,
            found.source,
        ) == (
            5,
            1,
            True,
            "words",
            "heldout",
            "s",
        )


@pytest.fixture
def three(tmp_path, template):
    """Shares 1 and 3 of three, the arguments that made them, and the context."""
    given_ = (data_of(tmp_path, "pairs", 1, 60), PrepareSettings(heldout_fraction=0.5), template)
    context = context_in(tmp_path / "store")
    shares = [prepare_share(f"{number}/3", *given_, context) for number in (1, 3)]
    return given_, context, shares


@pytest.mark.slow
def test_missing_shares_are_named_with_what_to_type(three, tmp_path):
    given_, context, shares = three
    with pytest.raises(StaleError, match=r": 2/3\..*align prepare -c mine\.yaml --shard 2/3$"):
        join(*given_, context)
    assert not list((tmp_path / "store").glob("rows/*"))
    with pytest.raises(StaleError, match=r"No shares of .* align prepare -c mine\.yaml --shard 1/4 "):
        join(*given_, context_in(tmp_path / "empty"))
    # Shares of another number of jobs do not fill in.
    prepare_share("2/4", *given_, context)
    with pytest.raises(StaleError, match=r"1/4, 3/4, 4/4\..* --shard 1/4$"):
        join(*given_, context)
    prepare_share("2/3", *given_, context)
    assert join(*given_, context).counts["rows_in"] == 60
    assert all(share.path.is_dir() for share in shares)


def test_shares_of_other_rows_or_settings_are_not_joined(three):
    given_, context, _ = three
    data, settings_, template = given_
    other = (data, settings_.model_copy(update={"max_length": 9}), template)
    with pytest.raises(StaleError, match="No shares of"):
        join(*other, context)
    foreign = prepare_share("2/3", *other, context)
    wanted = context.store.root / "row-shares"
    mine = prepare_share("2/3", *given_, context).path
    shutil.rmtree(mine)
    foreign.path.rename(mine)
    assert mine.parent == wanted
    with pytest.raises(StaleError, match=r"holds another artifact than its name says \(.*max_length"):
        join(*given_, context)


def test_a_damaged_share_is_refused_with_the_command_that_makes_it_again(three):
    given_, context, (first, _) = three
    prepare_share("2/3", *given_, context)
    path = first.path / "examples-00000.arrow"
    damaged = bytearray(path.read_bytes())
    damaged[-200] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptError, match=r"Delete .* and run `align prepare --shard 1/3` again"):
        join(*given_, context)


def test_a_malformed_row_stops_the_share_that_holds_it(tmp_path, template):
    data = data_of(tmp_path, "pairs", 1, 30).model_copy(update={"on_bad_row": "error"})
    bad = [
        number
        for number, line in enumerate(Path(data.path).read_text().splitlines())
        if line in ('{"prompt": "cut', "[1]")
    ]
    holders = {number // 7 % 2 + 1 for number in bad}
    for number in (1, 2):
        if number in holders:
            with pytest.raises(DataError, match=r"jsonl:\d+: .*on_bad_row=skip"):
                prepare_share(
                    f"{number}/2", data, PrepareSettings(), template, context_in(tmp_path / "store")
                )
        else:
            prepare_share(f"{number}/2", data, PrepareSettings(), template, context_in(tmp_path / "store"))
    assert holders


@pytest.mark.slow
def test_the_command_makes_shares_of_rows_and_of_evaluation_sets_and_joins_them(
    tiny_model, preferences, tmp_path
):
    tree = small_run(tiny_model, preferences)
    tree["eval"] = {"sets": {"again": {"path": str(preferences)}}}

    def run(store: str, **options) -> Prepared | PreparedShare:
        return Session(build_config(tree), tmp_path / store, log=lambda line: None).run("prepare", **options)

    alone = run("alone")
    for number in (2, 1):
        made = run("store", shard=f"{number}/2")
        assert isinstance(made, PreparedShare)
        assert made.as_json()["shard"] == f"{number}/2"
        assert not made.as_json()["reused"]
        assert made.as_json()["eval_sets"]["again"]["rows_in"] > 0
    assert run("store", shard="2/2").as_json()["reused"]
    joined = run("store", join=True)
    for one, other in ((alone, joined), (alone.eval_sets["again"], joined.eval_sets["again"])):
        assert content(open_artifact(other.artifact.path)) == content(one.artifact)
    assert run("store", join=True).as_json()["reused"]
    assert isinstance(run("store", shard="1/2"), Prepared)  # the rows are there, so no share is made
    with pytest.raises(UsageError, match="--shard and --join"):
        run("store", shard="1/2", join=True)


def test_shares_hold_no_code_and_no_strange_types(template):
    """A share from elsewhere can be read by anything that reads Arrow."""
    assert {str(field.type) for field in share_files.ADDED} <= {"double", "bool", "string", "int32"}
    assert pa.types.is_float64(share_files.ADDED.field("exact_weight").type)
