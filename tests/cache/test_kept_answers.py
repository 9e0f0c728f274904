import json

import pytest

from cache.errors import CorruptError, MachineError
from cache.kept_answers import KeptAnswers
from tests.full_disk import full_disk

VALUES = {"a": {"value": 0.1}, "b": {"value": None, "text": "line\nbreak \u2028 \u00e9"}}


def test_what_was_added_is_read_again_from_the_files_of_all_writers(tmp_path):
    first, second = KeptAnswers(tmp_path), KeptAnswers(tmp_path)
    first.add({"a": VALUES["a"]})
    second.add({"b": VALUES["b"]})
    first.add({"c": 1})
    assert len(list(tmp_path.iterdir())) == 2
    found = KeptAnswers(tmp_path)
    assert {key: found.get(key) for key in VALUES} == VALUES
    assert "c" in found
    assert "d" not in found


def test_reading_and_adding_nothing_create_no_file(tmp_path):
    KeptAnswers(tmp_path / "none").add({})
    assert not (tmp_path / "none").exists()


def test_a_killed_writer_loses_at_most_its_last_line(tmp_path):
    """At whatever byte its file was cut."""
    KeptAnswers(tmp_path).add(VALUES)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for length in range(first_line, len(whole)):
        path.write_bytes(whole[:length])
        found = KeptAnswers(tmp_path)
        assert "a" in found
        assert "b" not in found


def test_any_other_change_is_an_error(tmp_path):
    KeptAnswers(tmp_path).add(VALUES)
    [path] = tmp_path.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[0])
    for changed in (
        json.dumps(entry | {"value": {"value": 0.2}}),
        json.dumps(entry | {"key": "z"}),
        "{}",
        "null",
        "no JSON",
        "",
    ):
        path.write_bytes(changed.encode() + b"\n" + lines[1])
        with pytest.raises(CorruptError, match=f"{path.name}:1 was changed after it was written"):
            KeptAnswers(tmp_path)


def test_a_full_disk_leaves_no_half_line_behind_which_the_next_would_be_lost(tmp_path):
    kept = KeptAnswers(tmp_path)
    kept.add({"a": "x"})
    with full_disk(1000), pytest.raises(MachineError, match="Cannot write"):
        kept.add({"b": "x" * 2000})
    assert "b" not in kept
    kept.add({"c": "x"})
    found = KeptAnswers(tmp_path)
    assert ("a" in found, "b" in found, "c" in found) == (True, False, True)
