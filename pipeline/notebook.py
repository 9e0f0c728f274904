"""The Python interface: the stages as methods, their artifacts as tables and figures.

In: a configuration as a dict, a YAML file or nothing (the quickstart), and a store. Out: what a notebook shows.

    from pipeline import Session

    session = Session({"data.path": "pairs.jsonl", "policy.model": "allenai/OLMo-2-0425-1B-SFT"})
    session.prepare()
    session.cache_ref()
    policy = session.train()
    other = session.changed(loss="kto").train()  # from the same cache
    policy.metrics, policy.picture(other)

A stage whose artifact exists is not run again. Whatever fails raises `AlignError`, whose text says what to do.
"""

import gc
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cache.artifacts import Artifact
from pipeline.commands.command import Result
from pipeline.config import RunConfig, build_config
from pipeline.config_sources import merged, set_key
from pipeline.session import Session as CommandSession

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TABLE_WIDTH = 100


@dataclass(frozen=True, repr=False)
class Made:
    """An artifact of a stage, and the table that the command line prints of it."""

    artifact: Artifact
    result: Result

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.artifact.path

    @property
    def counts(self) -> Mapping[str, Any]:
        """The counts of its manifest."""
        return self.artifact.counts

    def __repr__(self) -> str:
        """The table."""
        return _shown(self.result)


class Rows(Made):
    """Prepared rows."""

    def to_pandas(self, split: str = "train") -> "pd.DataFrame":
        """The columns of a split (train, heldout): token ids, masks, roles, scores."""
        import pyarrow as pa

        return pa.concat_tables(self.artifact.shards(split)).to_pandas()


class Policy(Made):
    """A trained model: a Hugging Face folder with the log of its training."""

    @property
    def metrics(self) -> "pd.DataFrame":
        """`metrics.jsonl`: a row for each step, a column for each metric, NaN where it was not logged."""
        import pandas as pd

        return pd.DataFrame(self._lines).set_index("step")

    @property
    def _lines(self) -> list[dict[str, Any]]:
        from stages.train.monitoring.metrics_log import METRICS, read_metrics

        return read_metrics(self.path / METRICS)

    def picture(self, *others: "Policy") -> "Picture":
        """Held-out accuracy, margin and log-ratios over the steps, with those of other trainings."""
        from stages.curves.charts import MAIN
        from stages.curves.draw import DrawnRun, picture

        runs = [DrawnRun(run.path.name, run._lines, style=place) for place, run in enumerate((self, *others))]
        return Picture(picture(MAIN, runs))


@dataclass(frozen=True)
class Picture:
    """A picture that a notebook shows; `figure` is matplotlib's, to save or to change."""

    figure: "Figure"

    def _repr_png_(self) -> bytes:
        target = io.BytesIO()
        self.figure.savefig(target, format="png", dpi=100, facecolor="white")
        return target.getvalue()


class Completions(Made):
    """Completions of one model."""

    def to_pandas(self) -> "pd.DataFrame":
        """A row for each completion."""
        import pandas as pd

        from stages.generation.completion_files import FILE, read_jsonl

        return pd.DataFrame(read_jsonl(self.path / FILE))


class Verdicts(Made):
    """What a judge said of a model's completions against the baseline's."""

    @property
    def win_rate(self) -> Mapping[str, float]:
        """`rate` with its 95 % interval `low` to `high`, and `wins`, `ties`, `losses`."""
        return self.result.as_json()["win_rate"]

    def to_pandas(self) -> "pd.DataFrame":
        """A row for each verdict, with both texts."""
        import pandas as pd

        from stages.compare.verdicts import read_verdicts

        return pd.DataFrame([verdict.as_json() for verdict in read_verdicts(self.path)])


class Session:
    """One configuration over one store; each method runs a stage, or finds what an earlier run made."""

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path | None = None,
        loss: str | None = None,
        store: str | Path = "artifacts",
    ) -> None:
        """Load nothing.

        `config` is a YAML file, or a dict of blocks (`{"train": {"seed": 1}}`) or dotted keys (`{"train.seed": 1}`); without
        it the quickstart. `loss` replaces the block loss by the defaults of this loss. Raises `UsageError` for an
        invalid configuration.
        """
        if config is None or isinstance(config, str | Path):
            tree = merged([] if config is None else [Path(config)], [], loss)
        else:
            tree = _with_keys({}, config, loss)
        self._open(build_config(tree), store)

    def _open(self, config: RunConfig, store: str | Path) -> None:
        self._commands, self._store = CommandSession(config, store), store

    @property
    def config(self) -> RunConfig:
        """The validated configuration."""
        return self._commands.config

    def changed(self, keys: Mapping[str, Any] | None = None, loss: str | None = None) -> "Session":
        """The same session with other settings, over the same store."""
        tree = _with_keys(self.config.model_dump(mode="json"), keys or {}, loss)
        other = Session.__new__(Session)
        other._open(build_config(tree), self._store)
        return other

    def prepare(self) -> Rows:
        """Stage 1: tokenized rows."""
        result = self._run("prepare")
        return Rows(result.artifact, result)

    def cache_ref(self) -> Mapping[str, Any]:
        """Stage 2: score with the reference what the store lacks; the counts of rows and forward passes."""
        return self._run("cache-ref").as_json()

    def train(self) -> Policy:
        """Stage 3: a policy, from the cache."""
        result = self._run("train")
        return Policy(result.artifact, result)

    def sample(self) -> dict[str, Completions]:
        """Stage 4: completions by side, `policy` and with `sample.compare` also `reference`."""
        result = self._run("sample")
        return {side: Completions(artifact, result) for side, artifact in result.artifacts.items()}

    def judge(self) -> Verdicts:
        """Ask the judge of the block judge about the completions."""
        result = self._run("judge")
        return Verdicts(result.artifact, result)

    def evaluate(self) -> "pd.DataFrame":
        """Held-out metrics of the policy or of `eval.model`: a row for each metric, a column for each set."""
        import pandas as pd

        return pd.DataFrame(self._run("eval").as_json()["sets"])

    def _run(self, name: str) -> Any:
        """The result of a command; the memory of its models is given back before this returns."""
        from stages.runtime.malloc import give_back_freed_memory

        # Inputs keep what they load, so each stage has its own.
        self._open(self.config, self._store)
        gc.freeze()  # what is there already need not be looked through for what this command leaves
        try:
            return self._commands.run(name)
        finally:
            self._open(self.config, self._store)
            gc.collect()
            gc.unfreeze()
            give_back_freed_memory()


def _with_keys(tree: dict[str, Any], keys: Mapping[str, Any], loss: str | None) -> dict[str, Any]:
    if loss is not None:
        tree["loss"] = {"name": loss}
    for name, value in keys.items():
        if isinstance(value, Mapping) and "." not in name and name != "loss":
            for key, inner in value.items():
                set_key(tree, [name, *key.split(".")], inner)
        else:
            set_key(tree, name.split("."), value)
    return tree


def _shown(result: Result) -> str:
    console = Console(highlight=False, width=TABLE_WIDTH, color_system=None)
    with console.capture() as captured:
        result.show(console)
    return captured.get()
