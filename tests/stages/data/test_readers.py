"""Source files: every row or a reason with file and line, whatever the bytes."""

import gzip
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cache.errors import DataError
from stages.data.arrow_files import arrow_rows
from stages.data.readers import dataset_batches, read_source, source_identity
from stages.settings.data import DataSettings


@pytest.fixture
def read(tmp_path):
    """Writes bytes to a file of this name and reads them as (location, value or problem)."""

    def read(name, content=None, **settings):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        rows = read_source(DataSettings(path=str(tmp_path / name), **settings))
        return [(row.location, row.problem if row.value is None else row.value) for row in rows]

    return read


ROW = {"prompt": "Crème 東京 🦊\u2028x", "label": True, "n": -1.5, "list": [None, {"a": ""}]}


@pytest.mark.parametrize(
    ("name", "pack"),
    [("rows.jsonl", bytes), ("rows.jsonl.gz", gzip.compress), ("rows.JSONL", bytes)],
)
def test_jsonl(read, name, pack):
    """Lines end at line feeds only: U+2028 is text. Blank lines count, so that numbers are an editor's."""
    line = json.dumps(ROW, ensure_ascii=False).encode()
    content = b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line + b"\n\n" + line
    assert read(name, pack(content)) == [(f"{name}:{number}", ROW) for number in (1, 4, 6)]


@pytest.mark.parametrize(("name", "pack"), [("rows.json", bytes), ("rows.json.gz", gzip.compress)])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
def test_json_array(read, name, pack, mark):
    content = mark + json.dumps([ROW, 7, ROW]).encode()
    expected = [(f"{name}#1", ROW), (f"{name}#2", "expected an object, found int"), (f"{name}#3", ROW)]
    assert read(name, pack(content)) == expected


BAD_LINES = [
    (b'{"a": 1', "Expecting ',' delimiter"),
    (b'{"a": "b', "Invalid control character"),
    (b'{"a": 1, "b": 2, "a": 1}', "key 'a' appears twice"),
    (b'{"inner": {"a": 1, "a": 2}}', "key 'a' appears twice"),
    (b'{"a": NaN}', "NaN is not JSON"),
    (b'{"a": -Infinity}', "-Infinity is not JSON"),
    (b'{"a": 1e999}', "1e999 is larger than any float"),
    (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    (b"[1, 2]", "expected a JSON object, found list"),
    (b'"text"', "expected a JSON object, found str"),
    (b"{'a': 1}", "Expecting property name"),
    (b'{"a": 1} {"b": 2}', "Extra data"),
    (b'{"a":' * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES, ids=[problem for _, problem in BAD_LINES])
def test_a_bad_line_is_a_problem_of_that_line_alone(read, line, problem):
    rows = read("rows.jsonl", b'{"x": 0}\n' + line + b'\n{"x": 2}\n')
    assert [location for location, _ in rows] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert [rows[0][1], rows[2][1]] == [{"x": 0}, {"x": 2}]
    assert problem in rows[1][1]


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_any_bytes_give_one_row_or_problem_for_each_line_that_is_not_blank(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("read") / "rows.jsonl"
    content = b'{"x": 1}\n' + b"\n".join(lines)
    path.write_bytes(content)
    expected = [number for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    rows = list(read_source(DataSettings(path=str(path))))
    assert [row.location for row in rows] == [f"rows.jsonl:{number}" for number in expected]
    assert all((row.value is None) != (row.problem is None) for row in rows)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1}\n{"a": 2}\n', "one object a line goes in a .jsonl file"),
        (b'{"a": 1}', "expected a JSON array of objects, found dict"),
        (b'[{"a": 1}, {"a": NaN}]', "NaN is not JSON"),
        (b"[\xff]", "not UTF-8 at byte 1"),
    ],
)
def test_a_json_file_that_is_no_array_is_refused(read, content, problem):
    with pytest.raises(DataError, match=r"rows\.json.*" + problem.replace(".", r"\.")):
        read("rows.json", content)


@pytest.mark.parametrize("orient", ["columns", "split", "table"])
def test_a_json_file_of_pandas_is_told_the_orientation_that_works(tmp_path, read, orient):
    frame = pytest.importorskip("pandas").DataFrame([{"prompt": f"q{n}", "chosen": "a"} for n in range(2000)])
    frame.to_json(tmp_path / "rows.json", orient=orient)
    with pytest.raises(DataError, match="orient='records', lines=True") as caught:
        read("rows.json")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    assert len(read("rows.jsonl")) == 2000


TABLE = pa.table({"prompt": ["2020-01-01", "b", None], "nested": [[{"role": "user", "x": None}], [], None]})


def write_arrow(path, table, opener):
    with pa.OSFile(str(path), "wb") as sink, opener(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "rows.parquet": lambda path, table: parquet.write_table(table, path, row_group_size=2),
    "rows.arrow": lambda path, table: write_arrow(path, table, pa.ipc.new_file),
    "stream.arrow": lambda path, table: write_arrow(path, table, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITERS)
def test_parquet_and_arrow(read, tmp_path, name):
    WRITERS[name](tmp_path / name, TABLE)
    expected = TABLE.to_pylist()
    expected[0]["nested"] = [{"role": "user"}]
    assert read(name) == [(f"{name}#{number}", row) for number, row in enumerate(expected, 1)]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def schema(name, **properties):
    """A tool whose parameters have these types."""
    own = {key: {"type": kind, "enum": ["a", None]} for key, kind in properties.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"properties": own}}}


# One struct column holds the fields of every tool, and so a null for each field of the others.
TOOL_ROWS = [
    {
        "tools": [schema("weather", town="string"), schema("now")],
        "messages": [{"role": "assistant", "content": "", "tool_calls": [call("weather", town="Oslo")]}],
    },
    {
        "tools": [schema("convert", amount="number", to="string")],
        "messages": [
            {"role": "assistant", "tool_calls": [call("convert", amount=1.5, to="eur"), call("now")]},
            {"role": "tool", "content": "2"},
        ],
    },
    {"tools": None, "messages": [{"role": "user", "content": "q"}]},
]


@pytest.mark.parametrize("name", WRITERS)
def test_a_struct_column_says_what_the_same_row_says_as_json(read, tmp_path, name):
    WRITERS[name](tmp_path / name, pa.Table.from_pylist(TOOL_ROWS))
    expected = [
        value
        for _, value in read("rows.jsonl", "".join(json.dumps(row) + "\n" for row in TOOL_ROWS).encode())
    ]
    assert [value for _, value in read(name)] == expected == TOOL_ROWS


def test_a_dataset_of_the_hub_says_what_the_same_row_says_as_json():
    import datasets

    rows = arrow_rows(dataset_batches(datasets.Dataset.from_list(TOOL_ROWS)), "x[train]")
    assert [(row.location, row.value) for row in rows] == [
        (f"x[train]#{number}", row) for number, row in enumerate(TOOL_ROWS, 1)
    ]


WRITTEN_NULL = {"function": {"name": "f", "arguments": {"to": None, "deep": [{"x": None}]}}}


def test_a_null_that_is_written_stays(read, tmp_path):
    """In JSON, and in a column of JSON values, which `datasets` makes of objects of many shapes."""
    import datasets

    assert read("rows.jsonl", json.dumps(WRITTEN_NULL).encode()) == [("rows.jsonl:1", WRITTEN_NULL)]
    features = datasets.Features({"call": datasets.Json(), "calls": datasets.List(datasets.Json())})
    rows = [{"call": WRITTEN_NULL, "calls": [WRITTEN_NULL]}, {"call": None, "calls": None}]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    assert [row.value for row in arrow_rows(dataset_batches(dataset), "x")] == rows == list(dataset)
    assert [value for _, value in read("rows.parquet")] == rows


UNEVEN = [
    {"prompt": "a", "chosen": 'x "y"\nz', "rejected": "", "tools": [{"name": "f", "args": {"n": 1}}]},
    {"prompt": "b", "chosen": True, "rejected": {"text": [1, None]}, "tools": [{"name": "g", "args": ["m"]}]},
    {"prompt": "c", "chosen": None, "rejected": "5 or 6", "tools": None},
]


@pytest.mark.parametrize("write", ["to_parquet", "save_to_disk"])
def test_columns_of_uneven_type_that_datasets_writes_are_what_they_were(tmp_path, write):
    import datasets

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in UNEVEN))
    dataset = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    if not any(isinstance(feature, datasets.Json) for feature in dataset.features.values()):
        pytest.skip("this `datasets` writes no JSON columns")
    getattr(dataset, write)(str(tmp_path / "written"))
    if write == "to_parquet":
        (tmp_path / "written").rename(tmp_path / "written.parquet")
    path = next(path for path in tmp_path.glob("written*"))
    assert [row.value for row in read_source(DataSettings(path=str(path)))] == UNEVEN


def test_json_is_decoded_in_every_kind_of_list():
    values = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": [1]}']))
    lists = [
        pa.ListArray.from_arrays([0, 1], values),
        pa.LargeListArray.from_arrays([0, 1], values),
        pa.FixedSizeListArray.from_arrays(values, 1),
        pa.ListViewArray.from_arrays([0], [1], values),
    ]
    for column in lists:
        assert [row.value for row in arrow_rows([pa.table({"x": column})], "x")] == [{"x": [{"a": [1]}]}]


def test_a_map_column_is_an_object_and_broken_json_a_problem_of_its_row(read, tmp_path):
    table = pa.table(
        {
            "map": pa.array(
                [[("a", {"x": 1, "y": None})], None],
                pa.map_(pa.string(), pa.struct({"x": pa.int8(), "y": pa.int8()})),
            ),
            "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{", '{"a": 1}'])),
        }
    )
    write_arrow(tmp_path / "rows.arrow", table, pa.ipc.new_file)
    (_, problem), row = read("rows.arrow")
    assert "Expecting property name" in problem
    assert row == ("rows.arrow#2", {"map": None, "json": {"a": 1}})
    write_arrow(tmp_path / "map.arrow", table.select(["map"]), pa.ipc.new_file)
    assert read("map.arrow")[0] == ("map.arrow#1", {"map": {"a": {"x": 1}}})


@pytest.mark.parametrize("name", WRITERS)
def test_a_cut_parquet_or_arrow_file_is_refused_at_every_length(read, tmp_path, name):
    """Also between two batches of a stream, where Arrow itself sees only a shorter table."""
    WRITERS[name](tmp_path / name, TABLE)
    content = (tmp_path / name).read_bytes()
    for length in range(0, len(content), 8):
        with pytest.raises(DataError, match=name):
            read(name, content[:length])


def test_a_damaged_page_is_a_data_error_that_says_how_far_it_came(read, tmp_path):
    parquet.write_table(pa.table({"a": ["x", "y"] * 1000}), tmp_path / "rows.parquet")
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[10] ^= 255
    with pytest.raises(DataError, match=r"rows\.parquet is not a readable parquet file .*after row 0"):
        read("rows.parquet", bytes(content))


def test_arrow_text_that_is_not_utf_8_is_a_problem_of_that_row_alone(read, tmp_path):
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc"))
    parquet.write_table(pa.table({"a": texts}), tmp_path / "rows.parquet")
    assert read("rows.parquet") == [
        ("rows.parquet#1", {"a": "a"}),
        ("rows.parquet#2", "not UTF-8 at byte 0 of a text"),
        ("rows.parquet#3", {"a": "c"}),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_a_gz_file_cut_or_damaged_anywhere_is_refused(read, name):
    content = gzip.compress(json.dumps([{"a": number} for number in range(50)]).encode(), mtime=0)
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 255
    for bad in (content[: len(content) // 2], content[:-1], b"no gz", bytes(damaged)):
        with pytest.raises(DataError, match=f"{name} is not a complete .gz file"):
            read(name, bad)


def test_date_like_text_stays_text(read):
    assert read("rows.jsonl", b'{"a": "2020-01-01"}\n') == [("rows.jsonl:1", {"a": "2020-01-01"})]


def test_max_samples_counts_source_rows(read):
    content = b'{"a": 1}\n\nno\n{"a": 3}\n'
    assert [location for location, _ in read("rows.jsonl", content, max_samples=2)] == [
        "rows.jsonl:1",
        "rows.jsonl:3",
    ]
    assert len(read("rows.jsonl", content, max_samples=9)) == 3


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "./missing", "/no/such/folder/x", "a/b/c", "~/missing.json.gz"]
)
def test_a_missing_file_is_not_looked_for_on_a_hub(path):
    with pytest.raises(DataError, match=f"No such file: {path}.*--set data.path=PATH"):
        list(read_source(DataSettings(path=path)))


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.gz", "rows.json.zip"])
def test_a_file_of_another_type_is_refused_with_those_that_are_read(read, name):
    with pytest.raises(DataError, match=r"unknown file type.*\.jsonl, \.json, \.parquet, \.arrow"):
        read(name, b"{}")


def test_identity_is_the_content_and_not_the_path(tmp_path):
    for name, content in (("a.jsonl", b"{}\n"), ("b.jsonl", b"{}\n"), ("c.jsonl", b"{}")):
        (tmp_path / name).write_bytes(content)
    first, second, third = (
        source_identity(DataSettings(path=str(tmp_path / f"{name}.jsonl"))) for name in "abc"
    )
    assert first == second != third


def test_a_folder_is_its_files_in_name_order_and_known_by_their_content(tmp_path):
    """An edit that keeps size and date changes the identity; `datasets` would serve the old rows."""
    import os

    (tmp_path / "b.jsonl").write_text('{"n": 2}\n')
    (tmp_path / "a.json").write_text('[{"n": 1}]')
    (tmp_path / "notes.txt").write_text("not data")
    data = DataSettings(path=str(tmp_path))
    assert [(row.location, row.value) for row in read_source(data)] == [
        ("a.json#1", {"n": 1}),
        ("b.jsonl:1", {"n": 2}),
    ]
    before, stat = source_identity(data), (tmp_path / "b.jsonl").stat()
    (tmp_path / "b.jsonl").write_text('{"n": 3}\n')
    os.utime(tmp_path / "b.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source_identity(data) != before
