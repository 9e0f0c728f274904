"""Which examples lend each other their completions."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.data.rows import Example, Row
from stages.prepare.mismatched import add_mismatched, in_order, with_other_prompts


def examples(prompts: list[int]) -> list[Example]:
    """One completion each, which is the number of the example."""
    return [
        Example(
            str(number),
            f"x:{number}",
            np.array([prompt]),
            [Row("desirable", np.array([number]), np.array([True]))],
        )
        for number, prompt in enumerate(prompts)
    ]


@given(st.lists(st.integers(0, 6), max_size=70))
def test_whoever_can_borrow_does_and_only_from_another_prompt(prompts):
    """With as many other prompts as there are groups, every group has one."""
    groups = with_other_prompts(examples(prompts))
    for group in groups:
        add_mismatched(group, 100)
    found = [example for group in groups for example in group]
    assert sorted(int(example.example_id) for example in found) == list(range(len(prompts)))
    for example in found:
        for row in example.rows[1:]:
            assert prompts[int(row.ids[0])] != example.prompt_ids[0]
    most = max(Counter(prompts).values(), default=0)
    if len(prompts) - most >= len(groups):
        assert all(len(example.rows) == 2 for example in found)


@given(st.integers(0, 70))
def test_groups_have_four_members_and_the_last_is_not_alone(count):
    sizes = [len(group) for group in in_order(examples(list(range(count))))]
    assert sum(sizes) == count
    assert all(size == 4 for size in sizes[:-1])
    assert count == 1 or all(2 <= size <= 5 for size in sizes)


@given(st.lists(st.integers(0, 1000), max_size=70, unique=True))
def test_without_shared_prompts_the_order_of_the_data_stays(prompts):
    found = [example.example_id for group in with_other_prompts(examples(prompts)) for example in group]
    assert found == [str(number) for number in range(len(prompts))]
