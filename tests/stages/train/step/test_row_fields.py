"""The table of fields that a loss may need is the fields there are."""

import dataclasses

from stages.losses import Rows
from stages.losses.contract import CARRY_GRADIENT
from stages.train.step.row_fields import ALWAYS, FIELDS


def test_every_field_of_rows_has_its_function_and_the_fields_always_filled_are_those_without_a_default() -> (
    None
):
    fields = dataclasses.fields(Rows)
    assert set(FIELDS) == {field.name for field in fields}
    assert {field.name for field in fields if field.default is dataclasses.MISSING} == ALWAYS
    assert set(CARRY_GRADIENT) <= set(FIELDS)
