"""CSV, TSV and Excel: the rows that the same table has as JSON, and what is wrong with a file that is none."""

import csv
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import DataError
from stages.data.readers import read_source
from stages.data.table_files import read_excel
from stages.formats import conversion, detect_format
from stages.settings.data import DataSettings, PrepareSettings
from tests.conftest import preference_rows

TURN = {"role": "user", "content": 'Say "2+2",\nplease; 東京 🦊'}
TEXT_ROWS = [
    {"prompt": "007, is\nit?", "chosen": "true", "rejected": '"no"', "margin": 1.5, "weight": 2},
    {"prompt": "b;c", "chosen": "4", "rejected": "[1, 2]", "margin": None, "weight": None},
]


def write_csv(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(
            {
                name: json.dumps(value) if isinstance(value, list | dict | bool) else value
                for name, value in row.items()
            }
            for row in rows
        )


def write_excel(path, rows):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [list(rows[0]), *([*row.values()] for row in rows)]:
        book.active.append([json.dumps(v) if isinstance(v, list | dict) else v for v in row])
    book.save(path)


def write_pandas(path, rows):
    pytest.importorskip("pandas").DataFrame(rows).to_csv(path, index=False)


def write_datasets(path, rows):
    import datasets

    datasets.Dataset.from_list(rows).to_csv(path)


WRITERS = {
    "rows.csv": write_csv,
    "rows.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "semicolons.csv": lambda path, rows: write_csv(path, rows, ";"),
    "rows.xlsx": write_excel,
    "pandas.csv": write_pandas,
    "datasets.csv": write_datasets,
}


def preferences(path):
    data = DataSettings(path=str(path))
    rows = list(read_source(data))
    format_ = detect_format("auto", rows)
    convert = conversion(format_, data, PrepareSettings(), rows)
    return format_.name, [convert(row.value) for row in rows]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "rows",
    [
        TEXT_ROWS,
        preference_rows(),
        [{"prompt": "q", "completion": "x\ny", "label": label} for label in (True, False)],
        [{"prompt": "q", "completion": "x", "label": label} for label in ("up", "down")],
        [{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 2, "score_B": 1}],
    ],
    ids=["texts", "conversations", "true and false", "thumbs", "numbers"],
)
def test_a_table_says_what_the_same_rows_say_as_json(tmp_path, name, rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    WRITERS[name](tmp_path / name, rows)
    assert preferences(tmp_path / name) == preferences(tmp_path / "rows.jsonl")


def test_a_gz_and_a_byte_order_mark(tmp_path):
    write_csv(tmp_path / "rows.csv", TEXT_ROWS)
    content = b"\xef\xbb\xbf" + (tmp_path / "rows.csv").read_bytes()
    (tmp_path / "marked.csv").write_bytes(content)
    (tmp_path / "marked.csv.gz").write_bytes(gzip.compress(content))
    expected = preferences(tmp_path / "rows.csv")
    assert preferences(tmp_path / "marked.csv") == expected == preferences(tmp_path / "marked.csv.gz")


@pytest.mark.slow
@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 2)))
def test_any_texts_come_back_as_they_were_written(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("read") / "rows.csv"
    rows = [{"a": "first", "b": "row"}, *({"a": f"x{a}", "b": f"x{b}"} for a, b in values)]
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["a", "b"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert [row.value for row in read_source(DataSettings(path=str(path)))] == rows


def test_a_row_with_another_number_of_cells_is_a_problem_of_that_row_alone(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1\n2,x\n3,x,y\n4,x\n5,x,y\n")
    found = [
        (row.location, row.value or row.problem)
        for row in read_source(DataSettings(path=str(tmp_path / "rows.csv")))
    ]
    assert found == [
        ("rows.csv#1", "expected 2 cells, found 1"),
        ("rows.csv#2", {"a": "2", "b": "x"}),
        ("rows.csv#3", "expected 2 cells, found 3"),
        ("rows.csv#4", {"a": "4", "b": "x"}),
        ("rows.csv#5", "expected 2 cells, found 3"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.csv", b"a,b\n\xff,x\n", r"rows\.csv is not a readable csv file .*Save it as CSV in UTF-8"),
        ("rows.csv", b"", r"rows\.csv is not a readable csv file"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "two columns have the name 'a'"),
        ("rows.xlsx", b"no zip", r"rows\.xlsx is not a readable Excel file"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, name, content, problem):
    if name.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        list(read_source(DataSettings(path=str(tmp_path / name))))


def test_the_quickstart_s_own_data_can_be_a_table(tmp_path):
    from pipeline.quickstart_world import preference_pairs

    rows = preference_pairs(0)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_csv(tmp_path / "rows.csv", rows)
    assert preferences(tmp_path / "rows.csv") == preferences(tmp_path / "rows.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs/llamafactory_dpo_en_demo", "kto/llamafactory_kto_en_demo"])
@pytest.mark.parametrize("write", [write_csv, write_pandas])
def test_real_data_can_be_a_table(shared_data, tmp_path, name, write):
    source = shared_data / f"{name}.json"
    write(tmp_path / "rows.csv", json.loads(source.read_bytes()))
    assert preferences(tmp_path / "rows.csv") == preferences(source)


def test_cells_of_a_sheet_stand_under_their_own_names(tmp_path):
    """A column without a name shifts no other; what stands under no name is a problem of its row."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        ["prompt", None, "chosen", "rejected"],
        ["q", None, "good", "bad"],
        ["q", "note", "x", "y"],
        ["q", None, "x", "y", "z"],
    ):
        book.active.append(row)
    book.save(tmp_path / "rows.xlsx")
    found = list(read_excel(tmp_path / "rows.xlsx"))
    assert found[0].value == {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert [row.problem for row in found[1:]] == [
        f"the cell {cell!r} has no name in the first line" for cell in ("note", "z")
    ]
    book.active["B1"] = "chosen"
    book.save(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match="two columns have the name 'chosen'"):
        list(read_excel(tmp_path / "rows.xlsx"))
