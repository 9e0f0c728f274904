"""The trainings of a sweep: the combinations of its keys, each as a configuration and as a command line.

In: a `RunConfig` with a block `sweep`. Out: its members in a fixed order. A random draw is a function of `sweep.seed`.
"""

import json
import math
import random
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from cache.errors import UsageError
from pipeline import yaml_1_2
from pipeline.config import RunConfig, varied
from stages.settings.sweep import Range, SweepSettings

SEED = "train.seed"
# Blocks that say what is trained on, so that members who agree in them share rows and reference log-probs.
OWN_BLOCKS = ("loss", "adapter", "train", "track", "sweep", "sample", "judge", "online")


@dataclass(frozen=True)
class Member:
    """One training: its number from 1 on, the values of the keys that vary, and its configuration without the sweep."""

    number: int
    values: Mapping[str, Any]
    config: RunConfig
    assignments: Sequence[str]

    @property
    def setting(self) -> str:
        """What it shares with the members that differ from it in the seed alone."""
        return describe({key: value for key, value in self.values.items() if key != SEED})

    @property
    def name(self) -> str:
        """All values in one line."""
        return describe(self.values)

    @property
    def data_key(self) -> str:
        """Equal for members with the same rows and models."""
        shared = self.config.model_dump(mode="json", exclude=set(OWN_BLOCKS))
        return json.dumps(shared, sort_keys=True)

    def command(self, arguments: str) -> str:
        """The `align train` of this member; `arguments` are the command line's own, such as `-c FILE`."""
        own = shlex.join(part for line in self.assignments for part in ("--set", line))
        return " ".join(part for part in ("align train", arguments, own) if part)


def members_of(config: RunConfig) -> list[Member]:
    """All trainings of the block `sweep`; raises `UsageError` where there are none or one is not valid."""
    sweep = config.sweep
    if not sweep.keys and not sweep.seeds:
        raise UsageError(
            "The block sweep names no keys. Name some, for example sweep: {keys: {train.learning_rate: [1e-6, 3e-6]}}; "
            "configs/sweep-simpo.yaml is a whole one."
        )
    if sweep.seeds and SEED in sweep.keys:
        raise UsageError(f"sweep.seeds and sweep.keys both name {SEED}. Leave one of them out.")
    foreign = sorted(key for key in sweep.keys if key.partition(".")[0] == "sweep")
    if foreign:
        raise UsageError(f"sweep.keys: {foreign[0]} cannot vary within a sweep. Name keys of other blocks.")
    seeds = [{SEED: seed} for seed in sweep.seeds] or [{}]
    found = [{**values, **seed} for values in _combinations(sweep) for seed in seeds]
    base = config.model_copy(update={"sweep": SweepSettings()})
    return [_member(base, number, values) for number, values in enumerate(found, start=1)]


def _member(base: RunConfig, number: int, values: Mapping[str, Any]) -> Member:
    assignments = _assignments(values)
    if base.train.name is not None:  # a name is that of one run
        assignments.append(f"train.name={_typed(f'{base.train.name}-{number}')}")
    return Member(number, values, varied(base, assignments), assignments)


def _combinations(sweep: SweepSettings) -> Iterator[dict[str, Any]]:
    # A loss comes first: it replaces the whole block that its fields are set in.
    keys = sorted(sweep.keys, key=lambda key: key != "loss")
    if sweep.method == "random":
        draw = random.Random(sweep.seed)
        for _ in range(sweep.num_samples):
            yield {key: _draw(draw, sweep.keys[key]) for key in keys}
        return
    ranges = [key for key in keys if isinstance(sweep.keys[key], Range)]
    if ranges:
        raise UsageError(
            f"sweep.keys.{ranges[0]} is a range, which a grid has no steps for. List its values, or set sweep.method=random."
        )
    for values in product(*(_listed(sweep.keys[key]) for key in keys)):
        yield dict(zip(keys, values, strict=True))


def _listed(values: Sequence[Any] | Range) -> Sequence[Any]:
    assert not isinstance(values, Range)
    return values


def _draw(source: random.Random, values: Sequence[Any] | Range) -> Any:
    if not isinstance(values, Range):
        return source.choice(values)
    if values.log:
        drawn = math.exp(source.uniform(math.log(values.min), math.log(values.max)))
    else:
        drawn = source.uniform(values.min, values.max)
    whole = isinstance(values.min, int) and isinstance(values.max, int)
    # Three digits: a rate is no better known, and it is read and typed.
    return round(drawn) if whole else float(f"{drawn:.3g}")


def _assignments(values: Mapping[str, Any]) -> list[str]:
    """`KEY=VALUE` for `--set`."""
    return [f"{key}={_typed(value)}" for key, value in values.items()]


def _typed(value: Any) -> str:
    """A value as it is typed in YAML on one line."""
    if isinstance(value, str) and yaml_1_2.load(value) == value:
        return value
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return json.dumps(value, ensure_ascii=False)


def describe(values: Mapping[str, Any]) -> str:
    """Values with short names, such as `loss simpo, learning_rate 1e-06`."""
    return ", ".join(f"{short_name(key, values)} {shown(value)}" for key, value in values.items())


def short_name(key: str, keys: Mapping[str, Any] | Sequence[str]) -> str:
    """The last part of a key, or the whole key where another one of `keys` ends alike."""
    last = key.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in keys].count(last) == 1 else key


def shown(value: Any) -> str:
    """A value for people; a block of a loss with its name first."""
    if isinstance(value, Mapping) and "name" in value:
        rest = [f"{key} {shown(part)}" for key, part in value.items() if key != "name"]
        return " ".join([str(value["name"]), *rest])
    return str(value) if isinstance(value, str) else _typed(value)
