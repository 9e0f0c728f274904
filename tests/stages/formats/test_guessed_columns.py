"""Maps guessed from the names of columns: the rows they give are those of a known format, and nothing is guessed twice."""

import json

import pytest

from cache.errors import DataError
from pipeline import yaml_1_2
from stages.data.source_row import SourceRow
from stages.formats import choose_format, renamed
from stages.formats.guessed_columns import as_yaml, guessed_columns

# In each the answer 4 is the better one.
LAYOUTS = [
    ("unpaired", {"prompt": "2+2?", "answer": "4", "thumb": "up"}),
    ("unpaired", {"user_message": "2+2?", "botAnswer": "4", "thumbs up": 1, "id": 7}),
    ("unpaired", {"Question": "2+2?", "Reply": "4", "Reply length": 1, "Liked": True, "system": "Count."}),
    ("preference", {"question": "2+2?", "good": "4", "bad": "5"}),
    ("preference", {"instruction": "2+2?", "preferred_response": "4", "dispreferred_response": "5"}),
    ("two_answers", {"query": "2+2?", "answer_a": "4", "answer_b": "5", "better": "a"}),
    ("two_answers", {"instruction": "2+2?", "output 1": "4", "output 2": "5", "preference": 1}),
    ("two_answers", {"prompt": "2+2?", "reply_0": "4", "reply_1": "5", "score_0": 2, "score_1": 1}),
    ("scored_rows", {"question": "2+2?", "reply": "4", "stars": 5}),
]


@pytest.mark.parametrize(("name", "row"), LAYOUTS)
def test_the_guessed_map_gives_a_row_of_a_known_format(name, row):
    columns = guessed_columns(row)
    (mapped,) = renamed([SourceRow("x:1", row)], columns)
    assert mapped.value is not None
    assert choose_format("auto", mapped.value, "x:1").name == name
    text = json.dumps(mapped.value)
    assert text.index('"2+2?"') < text.index('"4"')
    assert '"5"' not in text or text.index('"4"') < text.index('"5"')
    assert mapped.value.get("system") == row.get("system")


@pytest.mark.parametrize(("name", "row"), LAYOUTS)
def test_the_error_shows_a_map_that_can_be_pasted(name, row):
    with pytest.raises(DataError) as caught:
        choose_format("auto", row, "x:1")
    pasted = str(caught.value).split("in YAML, ")[1].split(". `align init`")[0]
    assert yaml_1_2.load(pasted) == {"data.columns": guessed_columns(row)} != {"data.columns": {}}


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "2+2?", "label": 1},
        {"instruction": "Add.", "input": "2+2", "answer": "4", "label": True},
        {"prompt": "2+2?", "answer": "4", "reply": "5", "label": True},
        {"prompt": "2+2?", "answer_a": "4", "answer_b": "5"},
        {"prompt": "2+2?", "good": True, "bad": False},
        {"prompt": "2+2?", "answer": "4", "rating": {"clarity": 3}},
        {"prompt": "2+2?", "answers": ["4", "5"], "label": 0},
    ],
)
def test_nothing_is_guessed_where_two_columns_or_none_would_do(row):
    assert guessed_columns(row) == {}


def test_names_that_are_no_plain_yaml_are_quoted():
    columns = {"prompt": "my: prompt", "completion": "{x}", "label": "thumb"}
    assert yaml_1_2.load(as_yaml(columns)) == columns
