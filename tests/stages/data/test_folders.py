"""A local folder is read as `datasets` reads it: its splits, its configurations, and what it saved itself."""

import json

import datasets
import pytest

from cache.errors import AlignError, DataError, UsageError
from stages.data.readers import files_note, read_source, source_identity
from stages.settings.data import DataSettings


def rows_of(folder, **settings):
    return [row.value for row in read_source(DataSettings(path=str(folder), **settings))]


def numbered(first, count):
    return [{"n": number} for number in range(first, first + count)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: part/one.jsonl}, {split: test, path: part/two.jsonl}]
- config_name: large
  default: true
  data_files: [{split: train, path: [part/two.jsonl, part/one.jsonl]}]
---
"""
# The files of a folder with the number of rows in each, and its card.
LAYOUTS = {
    "a clone": (
        [
            "data/train-00000-of-00002.jsonl",
            "data/train-00001-of-00002.jsonl",
            "data/test-00000-of-00001.jsonl",
        ],
        "",
    ),
    "names": (["my_train.jsonl", "my-dev.jsonl", "test.jsonl"], ""),
    "folders": (["train/b.jsonl", "train/a.jsonl", "validation/c.jsonl"], ""),
    "neither": (["b.jsonl", "deep/a.jsonl"], ""),
    "configurations": (["part/one.jsonl", "part/two.jsonl", "other.jsonl"], CARD),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("config", [None, "small"])
def test_the_rows_of_every_split_are_those_of_load_dataset(tmp_path, name, config):
    files, card = LAYOUTS[name]
    folder = tmp_path / "folder"
    for place, file in enumerate(files):
        write(folder / file, numbered(10 * place, 3))
    (folder / "README.md").write_text(card)
    if config and not card:
        with pytest.raises(
            DataError, match=r"folder cannot be read as a dataset \(BuilderConfig 'small' not found"
        ):
            rows_of(folder, config=config)
        return
    expected = datasets.load_dataset(str(folder), config, cache_dir=str(tmp_path / "cache"))
    assert {split: rows_of(folder, split=split, config=config) for split in expected} == {
        split: list(own) for split, own in expected.items()
    }
    with pytest.raises(UsageError, match=f"has no such split. It has {', '.join(expected)}"):
        rows_of(folder, split="nope", config=config)


def test_what_is_not_read_is_said(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "extra.jsonl", ".git/x.jsonl"):
        write(tmp_path / name, numbered(0, 1))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert files_note(DataSettings(path=str(tmp_path))) == (
        f"{tmp_path}: the split train has 1 file; other splits: test; not read: extra.jsonl"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved dataset of two files, and a saved DatasetDict; of rows with a struct of two shapes."""
    folder = tmp_path_factory.mktemp("saved")
    rows = [{"call": {"town": "Oslo"}}, {"call": {"amount": 2}}, {"call": {"town": "Lima"}}]
    one, two = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:1])
    one.save_to_disk(folder / "one", num_shards=2)
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(folder / "both")
    return folder, rows


def test_a_saved_dataset_is_read_as_load_from_disk_reads_it(saved):
    folder, rows = saved
    assert len(datasets.load_from_disk(folder / "one")) == 3
    assert rows_of(folder / "one") == rows_of(folder / "both") == rows
    assert rows_of(folder / "both", split="test") == rows[:1]
    assert files_note(DataSettings(path=str(folder / "one"))) is None
    with pytest.raises(UsageError, match="holds one saved dataset, which has no splits"):
        rows_of(folder / "one", split="test")
    with pytest.raises(
        UsageError, match=r"both has no such split. It has train, test. Choose with --set data.split"
    ):
        rows_of(folder / "both", split="validation")


def test_a_saved_folder_with_a_missing_part_is_one_line(saved, tmp_path):
    import shutil

    folder, _ = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "both" / "train" / "state.json").unlink()
    (tmp_path / "one" / "state.json").write_text("{}")
    shutil.copytree(folder / "one", tmp_path / "cut")
    (tmp_path / "cut" / "state.json").write_text("{")
    for name in ("both", "one", "cut"):
        with pytest.raises(AlignError, match=r"state\.json .*save_to_disk"):
            rows_of(tmp_path / name)


def test_the_cases_themselves(shared_cases):
    assert len(rows_of(shared_cases / "cloned_set")) == 36
    assert len(rows_of(shared_cases / "cloned_set", split="test")) == 12
    expected = list(datasets.load_from_disk(shared_cases / "saved_to_disk"))
    assert rows_of(shared_cases / "saved_to_disk") == expected


def test_the_splits_of_a_folder_have_identities_of_their_own(tmp_path):
    write(tmp_path / "train.jsonl", numbered(0, 1))
    write(tmp_path / "test.jsonl", numbered(1, 1))
    alone = DataSettings(path=str(tmp_path / "test.jsonl"))
    train, test = (
        source_identity(DataSettings(path=str(tmp_path), split=name)) for name in ("train", "test")
    )
    assert train != test == source_identity(alone)


@pytest.mark.parametrize("key", ["split", "config"])
def test_a_single_file_has_neither_splits_nor_configurations(tmp_path, key):
    write(tmp_path / "x.jsonl", numbered(0, 1))
    with pytest.raises(UsageError, match=f"data.{key}=test: .*x.jsonl is one file, which has no {key}"):
        rows_of(tmp_path / "x.jsonl", **{key: "test"})
    with pytest.raises(UsageError, match=r"data\.revision=main: .* is local"):
        rows_of(tmp_path, revision="main")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("rows.txt", "the split train has no data file but rows.txt. Expected"),
        ("notes", "holds no data file"),
    ],
)
def test_a_folder_of_other_files_is_refused_with_those_that_are_read(tmp_path, file, problem):
    (tmp_path / file).write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=problem):
        rows_of(tmp_path)


def test_a_folder_whose_card_cannot_be_read_is_one_line(tmp_path):
    write(tmp_path / "train.jsonl", numbered(0, 1))
    (tmp_path / "README.md").write_text("---\nconfigs: [{data_files: {\n---\n")
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        rows_of(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "dataset_infos.json").write_text('{"default": 7}')
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        rows_of(tmp_path)
