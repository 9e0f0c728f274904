"""The store of reference log-probs: what is in it is what was scored, or an error says otherwise.

The exhaustive tests touch every byte of a small shard. Arrow alone would not do: see
`test_without_the_checksum_damage_would_be_read_as_numbers`.
"""

import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import CorruptError, StaleError
from cache.fingerprint import row_key
from cache.ref_logps import SCHEMA, RefLogps
from cache.shards import read_shard, write_content_named_shard, write_shard

REFERENCE = {"weights": "w" * 64, "dtype": "float32", "scorer_version": 1}
OTHER = {**REFERENCE, "dtype": "bfloat16"}


def key(number):
    return row_key(np.array([number]), np.array([1, 2]))


KEYS = [key(number) for number in range(3)]
VALUES = [np.array(values, dtype=np.float32) for values in ([-0.5, -1.25], [-3.0], [-2.0, 0.0, -0.125])]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "ref"


@pytest.fixture
def shard(folder):
    return RefLogps(folder, REFERENCE).add(KEYS, VALUES)


def test_what_was_added_is_read_back_bit_by_bit(folder, shard):
    reference = RefLogps(folder, REFERENCE)
    assert len(reference) == 3
    for row, values in zip(KEYS, VALUES, strict=True):
        assert reference.get(row).dtype == np.float32
        assert reference.get(row).tobytes() == values.tobytes()
    assert key(7) not in reference
    assert shard.name == hashlib.sha256(shard.read_bytes()).hexdigest() + ".arrow"
    assert sorted(path.name for path in folder.glob("[!.]*")) == sorted(["manifest.json", shard.name])


def test_opening_an_empty_store_writes_nothing(folder):
    assert list(RefLogps(folder, REFERENCE).missing(KEYS)) == KEYS
    assert not folder.exists()


def test_only_what_is_missing_is_missing(folder, shard):
    reference = RefLogps(folder, REFERENCE)
    asked = [key(5), KEYS[1], key(4), key(5), KEYS[0]]
    assert list(reference.missing(asked)) == [key(5), key(4)]
    reference.add([key(5)], [np.array([-9.0])])
    assert list(reference.missing(asked)) == [key(4)]
    assert list(RefLogps(folder, REFERENCE).missing(asked)) == [key(4)]
    assert RefLogps(folder, REFERENCE).get(key(5)).tolist() == [-9.0]


def test_adding_the_same_rows_again_gives_the_same_file(folder, shard, tmp_path):
    before = shard.read_bytes()
    assert RefLogps(folder, REFERENCE).add(KEYS, VALUES) == shard
    elsewhere = RefLogps(tmp_path / "elsewhere", REFERENCE).add(KEYS, VALUES)
    assert shard.read_bytes() == before == elsewhere.read_bytes()
    assert len(list(folder.glob("*.arrow"))) == 1
    assert elsewhere.name == shard.name


def test_a_missing_row_is_named_with_the_command(folder, shard):
    reference = RefLogps(folder, REFERENCE)
    reference.require(KEYS, "align cache-ref -c mine.yaml")
    with pytest.raises(StaleError) as caught:
        reference.require([*KEYS, key(8), key(8)], "align cache-ref -c mine.yaml")
    assert str(caught.value) == (
        f"Reference log-probs are missing for 1 of 4 rows in {folder} (first: {key(8).hex()}). "
        f"Score them with: align cache-ref -c mine.yaml"
    )


def test_a_deleted_shard_is_rows_to_score_again(folder, shard):
    RefLogps(folder, REFERENCE).add([key(5)], [np.array([-9.0])])
    shard.unlink()
    reference = RefLogps(folder, REFERENCE)
    with pytest.raises(StaleError, match=r"missing for 3 of 4 rows .*align cache-ref"):
        reference.require([*KEYS, key(5)], "align cache-ref")


@pytest.mark.slow
def test_a_bit_flipped_in_any_byte_is_noticed(folder, shard, record_property):
    content = shard.read_bytes()
    record_property("cases", len(content))
    for position in range(len(content)):
        shard.write_bytes(
            content[:position] + bytes([content[position] ^ (1 << position % 8)]) + content[position + 1 :]
        )
        with pytest.raises(CorruptError, match=r"is damaged.*Delete that file and run `align cache-ref`"):
            RefLogps(folder, REFERENCE)
    shard.write_bytes(content)
    assert len(RefLogps(folder, REFERENCE)) == 3


@pytest.mark.slow
def test_a_shard_cut_at_any_length_is_noticed(folder, shard, record_property):
    content = shard.read_bytes()
    record_property("cases", len(content))
    for length in range(len(content)):
        shard.write_bytes(content[:length])
        with pytest.raises(CorruptError, match="is damaged"):
            RefLogps(folder, REFERENCE)


def test_without_the_checksum_damage_would_be_read_as_numbers(shard):
    """A flipped sign or exponent is a valid Arrow file: plain reading gives other log-probs in silence."""
    content = shard.read_bytes()
    position = content.index(VALUES[1].tobytes())
    shard.write_bytes(content[: position + 2] + bytes([content[position + 2] ^ 4]) + content[position + 3 :])
    table = pa.ipc.open_file(pa.memory_map(str(shard))).read_all()
    table.validate(full=True)
    read = table.column("token_logps").to_pylist()
    assert read[1] != [-3.0]
    assert all(value <= 0 for values in read for value in values)  # nor would their sign give it away


def test_the_arrow_stream_format_would_not_notice_a_cut(tmp_path):
    """Why shards are IPC files: a stream cut between two batches reads as a shorter table."""
    table = pa.table({"x": [1, 2]})
    with pa.OSFile(str(tmp_path / "stream"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
        cut = sink.tell()
        writer.write_table(table)
    content = (tmp_path / "stream").read_bytes()
    assert pa.ipc.open_stream(content).read_all().num_rows == 4
    assert pa.ipc.open_stream(content[:cut]).read_all().num_rows == 2


def test_a_shard_of_another_reference_is_refused(folder, shard, tmp_path):
    foreign = RefLogps(tmp_path / "other", OTHER).add(KEYS, VALUES)
    assert foreign.name != shard.name
    shutil.copy(foreign, folder)
    with pytest.raises(CorruptError, match=f"{foreign.name} was written for another reference"):
        RefLogps(folder, REFERENCE)


def test_two_shards_swapped_between_references_are_refused(folder, shard, tmp_path):
    foreign = RefLogps(tmp_path / "other", OTHER).add(KEYS, VALUES)
    contents = shard.read_bytes(), foreign.read_bytes()
    shard.write_bytes(contents[1])
    foreign.write_bytes(contents[0])
    for where, identity in ((folder, REFERENCE), (tmp_path / "other", OTHER)):
        with pytest.raises(CorruptError, match="is damaged"):
            RefLogps(where, identity)


def test_the_store_of_another_reference_is_refused_naming_the_field(folder, shard):
    with pytest.raises(StaleError, match=r"belongs to another reference: dtype: float32 -> bfloat16"):
        RefLogps(folder, OTHER)


@pytest.mark.slow
def test_a_bit_flipped_in_the_manifest_never_changes_the_reference(folder, shard):
    """It is noticed, or it lies outside the identity and changes nothing that is used."""
    path = folder / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ (1 << position % 8)]) + content[position + 1 :]
        )
        try:
            assert RefLogps(folder, REFERENCE).fingerprint == json.loads(content)["fingerprint"]
        except (CorruptError, StaleError):
            continue


@pytest.mark.parametrize("content", [b"[]", b'{"identity": 1}', b'{"identity": null}', b"{}"])
def test_a_manifest_of_another_kind_is_refused(folder, shard, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises((CorruptError, StaleError), match=r"manifest\.json|another reference"):
        RefLogps(folder, REFERENCE)


@pytest.mark.parametrize("name", ["notes.arrow", "0" * 64 + ".arrow"])
def test_a_stray_shard_is_refused(folder, shard, name):
    shutil.copy(shard, folder / name)
    with pytest.raises(CorruptError, match=name):
        RefLogps(folder, REFERENCE)


def test_what_a_killed_writer_left_is_ignored(folder, shard):
    (folder / ".tmp-shard.123.abc").write_bytes(shard.read_bytes()[:50])
    assert len(RefLogps(folder, REFERENCE)) == 3


def test_a_shard_of_other_columns_is_refused(folder, shard):
    reference = RefLogps(folder, REFERENCE)
    table = pa.table(
        {"row_key": KEYS, "token_logps": [[-1.0]] * 3},
        schema=pa.schema(
            [("row_key", pa.binary(16)), ("token_logps", pa.list_(pa.float64()))],
            {"reference": reference.fingerprint},
        ),
    )
    write_content_named_shard(folder, table)
    with pytest.raises(CorruptError, match="in another format"):
        RefLogps(folder, REFERENCE)


NO_LOG_PROBS = [np.nan, np.inf, -np.inf, 0.1, 2e-4]


@pytest.mark.parametrize("value", NO_LOG_PROBS)
def test_a_scorer_that_gives_no_log_prob_is_refused_with_row_and_token(folder, value):
    values = [VALUES[0], VALUES[1], np.array([-2.0, -1.0, value])]
    with pytest.raises(CorruptError, match=f"is not a log-prob: row {KEYS[2].hex()}, completion token 2"):
        RefLogps(folder, REFERENCE).add(KEYS, values)
    assert list(folder.glob("*.arrow")) == []


@pytest.mark.parametrize("value", NO_LOG_PROBS)
def test_a_shard_made_by_hand_with_the_right_checksum_is_refused_with_row_and_token(folder, shard, value):
    reference = RefLogps(folder, REFERENCE)
    schema = SCHEMA.with_metadata({"reference": reference.fingerprint})
    table = pa.table({"row_key": [key(7), key(8)], "token_logps": [[-1.0, -1.0], [value]]}, schema=schema)
    path = write_content_named_shard(folder, table)
    with pytest.raises(CorruptError, match=f"row {key(8).hex()}, completion token 0, in {path}"):
        RefLogps(folder, REFERENCE)


def test_rounding_just_above_zero_is_stored_as_zero(folder):
    reference = RefLogps(folder, REFERENCE)
    reference.add([KEYS[0]], [np.array([1e-6, -1e-6, -0.0, -1e-42])])
    assert reference.get(KEYS[0]).tolist() == np.array([0, -1e-6, 0, -1e-42], dtype=np.float32).tolist()


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(st.lists(st.floats(-(2.0**99), 0, width=32), max_size=4), min_size=1, max_size=5))
def test_any_log_probs_survive(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("ref")
    keys = [key(number) for number in range(len(rows))]
    RefLogps(folder, REFERENCE).add(keys, [np.array(row, dtype=np.float32) for row in rows])
    reference = RefLogps(folder, REFERENCE)
    assert [reference.get(row).tolist() for row in keys] == rows


def test_a_shard_reads_back_against_its_record(tmp_path):
    table = pa.table({"x": [[1, 2], [], [3]], "s": ["a", None, "é"]})
    record = write_shard(tmp_path / "a.arrow", table)
    assert (record.name, record.num_rows, record.num_bytes) == (
        "a.arrow",
        3,
        (tmp_path / "a.arrow").stat().st_size,
    )
    assert read_shard(tmp_path / "a.arrow", record.sha256, "repair").equals(table)
    with pytest.raises(StaleError, match=r"b\.arrow is missing\. Type this\."):
        read_shard(tmp_path / "b.arrow", record.sha256, "Type this.")


def test_a_file_with_the_right_checksum_that_is_no_arrow_file_is_corrupt(tmp_path):
    (tmp_path / "a.arrow").write_bytes(b"text")
    with pytest.raises(CorruptError, match="not a readable Arrow file"):
        read_shard(tmp_path / "a.arrow", hashlib.sha256(b"text").hexdigest(), "repair")


def test_shards_that_have_not_changed_are_not_read_again(folder, shard):
    """A flipped shard is believed where the note says that it was checked as it is now: only then is nothing read."""
    RefLogps(folder, REFERENCE)
    content = bytearray(shard.read_bytes())
    position = content.index(VALUES[1].tobytes())
    content[position + 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(CorruptError, match="is damaged"):
        RefLogps(folder, REFERENCE)
    noted = json.loads((folder / ".checked.json").read_text())
    stat = shard.stat()
    noted[shard.name][:4] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    (folder / ".checked.json").write_text(json.dumps(noted))
    assert RefLogps(folder, REFERENCE).get(KEYS[1]).tolist() != [-3.0]
    with pytest.raises(CorruptError, match="is damaged"):
        RefLogps(folder, REFERENCE, believe_notes=False)
    (folder / ".checked.json").write_text("[]")
    with pytest.raises(CorruptError, match="is damaged"):
        RefLogps(folder, REFERENCE)


def test_rows_that_were_added_are_found_before_and_after_they_are_sorted(folder, monkeypatch):
    monkeypatch.setattr("cache.ref_logps.PENDING_ROWS", 2)
    reference = RefLogps(folder, REFERENCE)
    for number in range(7):
        reference.add([key(number)], [np.array([-number], np.float32)])
        assert len(reference) == number + 1
        assert [reference.get(key(one)).tolist() for one in range(number + 1)] == [
            [-one] for one in range(number + 1)
        ]
        assert list(reference.missing([key(number), key(99)])) == [key(99)]
    with pytest.raises(KeyError):
        reference.get(key(99))


def test_log_probs_stay_in_the_files(folder):
    """Opened stores map their values: Arrow allocates nothing for them."""
    keys = [number.to_bytes(16, "little") for number in range(100)]
    RefLogps(folder, REFERENCE).add(keys, [np.full(1000, -1.0, np.float32)] * len(keys))
    before = pa.total_allocated_bytes()
    store = RefLogps(folder, REFERENCE)
    assert store.get(keys[7])[999] == -1.0
    assert pa.total_allocated_bytes() - before < 10_000
