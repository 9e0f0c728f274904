"""Settings that change no row under the other settings name the same rows, and each that does other ones."""

import json

import pytest

from stages.prepare.stage import rows_identity
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.tokenization.template import Template


@pytest.fixture
def template(chat_tokenizer) -> Template:
    return Template(chat_tokenizer, "auto", True)


@pytest.fixture
def pairs(tmp_path) -> list[str]:
    """Two files of pairs."""
    paths = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    for path in paths:
        row = {"prompt": path.name, "chosen": "yes", "rejected": "no", "language": "en"}
        path.write_text(json.dumps(row) + "\n")
    return [str(path) for path in paths]


def identity(
    template: Template, data: dict, prepare: dict | None = None, filter_: dict | None = None
) -> dict:
    return rows_identity(
        DataSettings.model_validate(data),
        PrepareSettings.model_validate(prepare or {}),
        template,
        FilterSettings.model_validate(filter_ or {}),
    )


def sources(pairs: list[str], *changes: dict, **data) -> dict:
    return {
        "sources": [
            {"path": path, **change} for path, change in zip(pairs, changes or ({}, {}), strict=True)
        ],
        **data,
    }


def test_a_format_named_as_it_is_detected_is_none(template, pairs) -> None:
    path = pairs[0]
    assert identity(template, {"path": path, "format": "preference"}) == identity(template, {"path": path})
    assert identity(template, {"path": path, "format": "ultrafeedback"}) != identity(template, {"path": path})
    named = sources(pairs, {"format": "preference"}, {})
    assert identity(template, named) == identity(template, sources(pairs))
    assert identity(template, sources(pairs, format="hh")) == identity(template, sources(pairs))


def test_data_settings_that_choose_nothing(template, pairs) -> None:
    path = pairs[0]
    assert identity(template, {"path": path, "columns": {}}) == identity(template, {"path": path})
    assert identity(template, {"path": path, "seed": 3}) == identity(template, {"path": path})
    assert identity(template, sources(pairs, seed=3)) == identity(template, sources(pairs))
    ones, twos = ([{"weight": weight * scale} for weight in (1.0, 3.0)] for scale in (1, 2))
    assert identity(template, sources(pairs, *ones)) == identity(template, sources(pairs, *twos))
    assert identity(template, sources(pairs, *ones)) != identity(
        template, sources(pairs, {"weight": 1.0}, {"weight": 1.0})
    )
    assert identity(template, sources(pairs, *ones, seed=3)) != identity(template, sources(pairs, *ones))


def test_limits_of_a_part_that_are_not_below_that_of_the_whole(template, pairs) -> None:
    data = {"path": pairs[0]}
    for name in ("max_prompt_length", "max_completion_length"):
        assert identity(template, data, {"max_length": 64, name: 64}) == identity(
            template, data, {"max_length": 64}
        )
        assert identity(template, data, {"max_length": 64, name: 63}) != identity(
            template, data, {"max_length": 64}
        )


def test_details_of_filters_that_are_off(template, pairs) -> None:
    data = {"path": pairs[0]}
    details = {"language_column": "lang", "near_duplicate_similarity": 0.5, "decontaminate_words": 5}
    assert identity(template, data, filter_=details) == identity(template, data)
    on = {"duplicates": "near", "language": "en", "decontaminate": [pairs[1]]}
    for name, value in details.items():
        assert identity(template, data, filter_={**on, name: value}) != identity(template, data, filter_=on)
    exact = {"duplicates": "exact"}
    assert identity(template, data, filter_={**exact, "near_duplicate_similarity": 0.5}) == identity(
        template, data, filter_=exact
    )
    assert identity(template, data, filter_={"language": "EN"}) == identity(
        template, data, filter_={"language": "en"}
    )
