"""The first steps of a run: what their rows share, and how they are cut into packs at a budget of tokens.

In: the job of a run and its training rows. Out: numbers of positions, and the largest packs.
"""

from dataclasses import dataclass

import numpy as np

from stages.data.rows import RowSet
from stages.engine.packing import sized_packs
from stages.engine.packs import Pack, build_pack, inputs_of
from stages.engine.shared_tokens import SharedTokens, shared_tokens
from stages.train.job import Job

COUNTED_STEPS = 20

# The row numbers of examples, int64.
Groups = list[np.ndarray]


@dataclass(frozen=True)
class Packed:
    """The first steps, cut into packs: the largest ones, the largest first, and the mean positions of a step.

    `whole` says whether no step was cut.
    """

    largest: list[Pack]
    tokens_per_step: int
    whole: bool


class FirstSteps:
    """The first steps of an epoch."""

    def __init__(self, job: Job, rows: RowSet) -> None:
        """Take the examples in the order of the run. Mismatched rows are scored too, without gradient, where a loss needs them."""
        order, self._rows = job.data_order(rows), rows
        numbers = range(1, min(COUNTED_STEPS, job.resolved.steps_per_epoch) + 1)
        steps = [order.examples_of(number) for number in numbers]
        self._trained = [self._groups(step, mismatched=False) for step in steps]
        self._others = [self._groups(step, mismatched=True) for step in steps if "kl" in job.loss.needs]

    def packed(self, budget: int, largest: int = 1) -> Packed:
        """The steps in packs of up to `budget` tokens. As many as `largest` of the packs that have a gradient are built."""
        trained = [self._packs(step, budget) for step in self._trained]
        others = [self._packs(step, budget) for step in self._others]
        positions = sum(size for packs in trained + others for size, _ in packs)
        by_size = sorted((pack for packs in trained for pack in packs), key=lambda pack: -pack[0])
        return Packed(
            [build_pack(self._rows, groups) for _, groups in by_size[:largest]],
            round(positions / max(1, len(self._trained))),
            all(len(packs) <= 1 for packs in trained + others),
        )

    def shared(self) -> SharedTokens:
        """What the rows of a step share, the mean of the steps."""
        rows = self._rows
        shares = [
            shared_tokens(
                [(rows.prompt(group[0]), [rows.completion(row) for row in group]) for group in groups]
            )
            for groups in self._trained
        ]
        mean = np.array(shares or [SharedTokens(0, 0, 0)]).mean(0).round().astype(int).tolist()
        return SharedTokens(*mean)

    def _groups(self, examples: np.ndarray, mismatched: bool) -> Groups:
        groups = (self._rows.example_rows(example, mismatched=mismatched) for example in examples)
        return [group for group in groups if len(group)]

    def _packs(self, groups: Groups, budget: int) -> list[tuple[int, Groups]]:
        """The groups of each pack, and its positions."""
        packs = sized_packs([inputs_of(self._rows, group) for group in groups], budget)
        return [(size, [groups[item] for item in items]) for size, items in packs]
