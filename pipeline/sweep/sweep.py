"""A sweep from its configuration to its ranking: prepare and score what its trainings share, train, measure, rank.

In: `Inputs` of a configuration with a block `sweep`. Out: a `Sweep`. Trainings whose policies exist are not repeated, and
one that fails leaves the others alone. The folder `sweeps/<name>` of the store has the configuration and the log of each
member, `curves.png` and `results.json`.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact
from cache.errors import AlignError, CorruptError, MachineError, StaleError, UsageError
from cache.files import write_json
from cache.fingerprint import fingerprint, short
from pipeline.commands.cache_ref import CACHE_REF
from pipeline.commands.judge import JUDGE
from pipeline.commands.prepare import PREPARE
from pipeline.commands.sample import SAMPLE
from pipeline.commands.train import TRAIN
from pipeline.inputs import Inputs
from pipeline.on_ray import cluster
from pipeline.sweep.members import Member, members_of
from pipeline.sweep.ranking import ACCURACY, Ranking, Trial, rank
from pipeline.sweep.runner import Ended, Processes, config_file, each_on_a_device, processes, until_free
from stages.cache_ref.stage import count_missing
from stages.runtime.context import Context, progress
from stages.train.job import find_policy
from stages.train.monitoring.best_evaluation import higher_is_better

WIN_RATE = "win_rate"
START = f"step0/{ACCURACY}"
JUDGED = ("sample", "judge")
WORKS = {command.name: command.work for command in (CACHE_REF, TRAIN, SAMPLE, JUDGE)}


@dataclass(frozen=True)
class Outcome:
    """How a training ended: its policy, or its problem in one line with the exit code of its process.

    `heldout` is the number of held-out examples that its metrics are computed over.
    """

    member: Member
    policy: Artifact | None
    heldout: int = 0
    reused: bool = False
    problem: str | None = None
    code: int = 0
    win_rate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Sweep:
    """Outcomes in the order of the members, their ranking, and rows that the reference scored and did not score again."""

    folder: Path
    outcomes: Sequence[Outcome]
    ranking: Ranking
    reference_rows: int
    reference_rows_saved: int

    @property
    def failed(self) -> list[Outcome]:
        """The trainings without a policy or without the verdicts asked for."""
        return [one for one in self.outcomes if one.problem]

    @property
    def failure(self) -> AlignError | None:
        """The error that the command ends with if a training failed: it has the exit code of the first one."""
        if not self.failed:
            return None
        kinds = {kind.exit_code: kind for kind in (UsageError, StaleError, CorruptError, MachineError)}
        kind = kinds.get(self.failed[0].code, MachineError if self.failed[0].code < 0 else AlignError)
        return kind(
            f"{len(self.failed)} of {len(self.outcomes)} trainings failed; the table names them. The same command tries "
            f"them again and keeps the others."
        )


def sweep(inputs: Inputs, on: str | None = None) -> Sweep:
    """Run every training that is not done, each as a process or, with `on` (`ray[:ADDRESS]`), as a task; and rank all."""
    config, context = inputs.config, inputs.context
    members = members_of(config)
    root = context.store.root
    folder = root / "sweeps" / f"sweep-{short(fingerprint(config.model_dump(mode='json')))}"
    folder.mkdir(parents=True, exist_ok=True)
    devices = (
        config.sweep.devices if on is None else range(len(members))
    )  # a cluster queues what it has no place for
    with processes() if on is None else cluster(on, WORKS) as own:
        by_member, rows, saved = _shared(inputs, members, folder, own)
        outcomes = _Trainings(by_member, folder, context, own).run(members, devices)
    metric = config.sweep.metric.removeprefix("eval/")
    better = metric == WIN_RATE or higher_is_better(metric)
    ranking = rank([trial_of(one) for one in outcomes if one.policy], metric, better)
    return Sweep(folder, outcomes, ranking, rows, saved)


def _shared(
    inputs: Inputs, members: Sequence[Member], folder: Path, own: Processes
) -> tuple[dict[int, Inputs], int, int]:
    """Prepared rows and reference log-probs, once for the members that share them.

    Returns the inputs of each member by its number, the rows that the reference has scored, and those that it would have
    scored again if every training had scored its own.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(member.data_key, []).append(member)
    found: dict[int, Inputs] = {}
    rows = saved = 0
    for group in groups.values():
        first = _inputs_of(group[0], inputs.context)
        PREPARE.work(first)
        found |= {member.number: first.with_training(member.config) for member in group}
        referring = [member for member in group if member.config.loss.needs_reference]
        if referring:
            needed = _score(first, config_file(folder, referring[0]), folder, own)
            rows, saved = rows + needed, saved + needed * (len(referring) - 1)
    return found, rows, saved


def _inputs_of(member: Member, context: Context) -> Inputs:
    return Inputs(member.config, replace(context, config_text=member.config.to_yaml()))


def _score(inputs: Inputs, config: Path, folder: Path, own: Processes) -> int:
    """Score what is missing, in a process of its own, which gives the memory back; the number of rows needed."""
    source = inputs.model(*inputs.config.reference_model)
    needed, missing, _ = count_missing(
        [inputs.rows, *inputs.eval_sets.values()], source, inputs.compute, inputs.context
    )
    if missing:
        inputs.context.log(f"sweep: the reference scores {missing:,} rows, once for all trainings")
        ended = own.run("cache-ref", config, inputs.context.store.address, folder / "cache-ref.log", None)
        if ended.problem:
            raise _as_error(ended)
    return needed


def _as_error(ended: Ended) -> AlignError:
    return MachineError(f"The reference could not be scored: {ended.problem}")


class _Trainings:
    """The trainings of a sweep in progress."""

    def __init__(
        self, by_member: Mapping[int, Inputs], folder: Path, context: Context, own: Processes
    ) -> None:
        self.by_member, self.folder, self.context, self.own = by_member, folder, context, own
        self.outcomes: dict[int, Outcome] = {}
        # Looking a policy up uses tokenizers and models that members share.
        self.lookup = threading.Lock()

    def run(self, members: Sequence[Member], devices: Sequence[int]) -> list[Outcome]:
        """Run every member that is not done; the outcomes in their order."""
        with progress("sweep", len(members), "trainings") as advance:

            def work(member: Member, device: int | None) -> None:
                outcome = self._outcome(member, device)
                self.outcomes[member.number] = outcome
                advance(1, member.name)
                self._tell(outcome, len(members))

            each_on_a_device(members, devices, work, self.own)
        return [self.outcomes[member.number] for member in members]

    def _outcome(self, member: Member, device: int | None) -> Outcome:
        config = config_file(self.folder, member)
        try:
            policy = self._policy(member)
            reused = policy is not None
            if policy is None:
                if (ended := self._stage("train", member, config, device)).problem:
                    return Outcome(member, None, problem=ended.problem, code=ended.code)
                policy = self._policy(member)
        except AlignError as error:
            return Outcome(member, None, problem=str(error), code=error.exit_code)
        heldout = heldout_size(self.by_member[member.number])
        return self._judged(Outcome(member, policy, heldout, reused), config, device)

    def _policy(self, member: Member) -> Artifact | None:
        inputs = self.by_member[member.number]
        with self.lookup:
            return find_policy(inputs.job, inputs.context)

    def _judged(self, outcome: Outcome, config: Path, device: int | None) -> Outcome:
        """The outcome with its win-rate, if the configuration names a judge."""
        if not outcome.member.config.judge.is_named:
            return outcome
        ended: Ended | None = None
        for stage in JUDGED:
            ended = until_free(partial(self._stage, stage, outcome.member, config, device))
            if ended.problem:
                return replace(outcome, problem=f"{stage}: {ended.problem}", code=ended.code)
        assert ended is not None
        assert ended.result is not None
        return replace(outcome, win_rate=ended.result["win_rate"])

    def _stage(self, stage: str, member: Member, config: Path, device: int | None) -> Ended:
        log = self.folder / f"{member.number:03}.log"
        return self.own.run(stage, config, self.context.store.address, log, device)

    def _tell(self, outcome: Outcome, total: int) -> None:
        place = f"sweep: {outcome.member.number} of {total}, {outcome.member.name}"
        if outcome.problem:
            # One that ends because the sweep does has not failed.
            end = "stopped" if self.own.stopping.is_set() else f"FAILED, {outcome.problem}"
            self.context.log(f"{place}: {end}")
            return
        assert outcome.policy is not None
        accuracy = outcome.policy.counts["final"].get(ACCURACY)
        known = "" if accuracy is None else f", held-out accuracy {accuracy:.3f}"
        self.context.log(f"{place}: {'already done' if outcome.reused else 'done'}{known}")


def trial_of(outcome: Outcome) -> Trial:
    """The held-out metrics of a finished training, with the change of the log-probs, which every loss has."""
    assert outcome.policy is not None
    counts, member = outcome.policy.counts, outcome.member
    metrics: dict[str, float] = {**counts["final"]}
    for side in ("chosen", "rejected"):
        # For a policy that starts as the reference this is the log-ratio, so that losses without one compare.
        if f"logps/{side}" in metrics:
            metrics[f"logps_change/{side}"] = metrics[f"logps/{side}"] - counts["step0"][f"logps/{side}"]
    sizes = {ACCURACY: outcome.heldout}
    if outcome.win_rate is not None:
        metrics[WIN_RATE] = outcome.win_rate["rate"]
        sizes[WIN_RATE] = sum(outcome.win_rate[key] for key in ("wins", "ties", "losses"))
    if ACCURACY in counts["step0"]:
        metrics[START] = counts["step0"][ACCURACY]
    loss = member.config.loss
    return Trial(member.setting, member.values, metrics, sizes, loss.model_dump(), loss.needs_reference)


def heldout_size(inputs: Inputs) -> int:
    """The number of held-out examples that an evaluation during training is computed over."""
    there = inputs.rows.counts["examples"]["heldout"]
    return min(there, inputs.config.train.eval_samples or there)


def write_results(found: Sweep) -> None:
    """Write `results.json` into the folder of the sweep."""
    write_json(found.folder / "results.json", as_json(found))


def as_json(found: Sweep) -> dict[str, Any]:
    """Plain data."""
    ranking = found.ranking
    return {
        "folder": str(found.folder),
        "metric": ranking.metric,
        "best": ranking.best,
        "verdict": ranking.verdict,
        "within_noise": list(ranking.close),
        "settings": [
            {
                "setting": setting.name,
                "values": dict(setting.values),
                "trainings": len(setting.trials),
                "mean": setting.mean(ranking.metric),
                "spread": setting.spread(ranking.metric),
            }
            for setting in ranking.settings
        ],
        "trainings": [
            {
                "number": one.member.number,
                "values": dict(one.member.values),
                "artifact": None if one.policy is None else str(one.policy.path),
                "reused": one.reused,
                "problem": one.problem,
                "metrics": None if one.policy is None else dict(trial_of(one).metrics),
            }
            for one in found.outcomes
        ],
        "reference_rows": found.reference_rows,
        "reference_rows_saved": found.reference_rows_saved,
    }
