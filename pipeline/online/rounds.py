"""Online DPO (Guo et al. 2024, arXiv 2402.04792) as rounds over the stages, with any loss of pairs.

A round samples `online.num_samples` completions of fresh prompts from the policy, judges them, pairs the best with the
worst, prepares the pairs, scores the reference for them alone, and trains. Weights and optimizer go on from round to
round (`train.begin_from`). Each round is made of artifacts with fingerprints, so an interrupted run continues in the phase
in which it stopped. The policies are compared on the held-out prompts of the data, which no round trains on.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from cache.artifacts import Artifact
from cache.errors import DataError, UsageError
from pipeline.commands.cache_ref import CACHE_REF
from pipeline.commands.evaluate import EVALUATE
from pipeline.commands.prepare import PREPARE
from pipeline.commands.train import TRAIN
from pipeline.inputs import Inputs
from pipeline.judges import open_judge
from pipeline.online.configs import Policy, distance_config, round_config
from pipeline.online.pairing import FILE, Scored, completion_rows, make_pairs
from stages.compare.completions import completions_of, paired
from stages.compare.verdicts import TIE, outcomes
from stages.compare.win_rate import win_rate
from stages.formats.contract import Preference
from stages.generation.completion_files import FILE as COMPLETIONS
from stages.generation.completion_files import read_jsonl
from stages.generation.requests import Prompt
from stages.judge.contract import Judge
from stages.judge.stage import Asking, judge_completions, judge_pairs
from stages.models.loading import ModelSource
from stages.prepare.heldout import split_of
from stages.sample.job import SampleJob
from stages.sample.prompts import prompts_of, row_prompts
from stages.sample.stage import sample_all

SIDE = "policy"


@dataclass(frozen=True)
class Evaluated:
    """A policy on the held-out prompts: mean score, win-rate against the first policy with its 95 % interval, lengths.

    `kl`: mean over its own completions of log(policy / reference), in nats a completion; None for a loss without a
    reference, which is not loaded for it.
    """

    reward: float | None
    wins: tuple[float, float, float]
    tokens: float
    unfinished: float
    kl: float | None
    reference_rows: int


@dataclass(frozen=True)
class Round:
    """One round. `policy` is what it began with, `reward` the mean score of its completions of the round's prompts.

    `reference_rows` counts the rows that the reference scored: those of the round's pairs.
    """

    number: int
    policy: Evaluated | None
    reward: float | None
    prompts: int
    pairs: int
    without_pair: dict[str, int]
    reference_rows: int
    reference_forwards: int
    trained: Path
    seconds: float


class OnlineRun:
    """The rounds of one configuration in one store."""

    def __init__(self, inputs: Inputs) -> None:
        """Open the judge and collect the prompts; raises `UsageError` or `DataError` before anything is sampled."""
        self.inputs, self.config, self.context = inputs, inputs.config, inputs.context
        self.settings = inputs.config.online
        if self.config.adapter.name != "none" and self.settings.reference == "previous":
            raise UsageError(
                "online.reference=previous needs whole models, and the policy of a round is an adapter. Leave one of "
                "online.reference and adapter out."
            )
        if self.settings.pairing == "best_of_n" and inputs.loss_name != "sft":
            raise UsageError(
                f"online.pairing=best_of_n is for the loss sft, and the loss is {inputs.loss_name}, which learns from the rejected "
                f"completion too. Use --loss sft, or --set online.pairing=best_worst."
            )
        self.judge: Judge = open_judge(inputs)
        if self.judge.compares and self.settings.num_samples != 2:
            raise UsageError(
                f"The judge {self.judge.name} compares two completions. Sample two of each prompt: --set online.num_samples=2"
            )

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of all rounds in turn: without those held out, each once before any comes again."""
        config, template = self.config, self.inputs.template
        source = self.settings.prompts or self.inputs.data.path
        if not self.settings.prompts and config.data.sources:
            raise UsageError("data.sources has several sources. Name the prompts: --set online.prompts=FILE")
        found = prompts_of(source, self.inputs.rows, template, None).prompts
        share = config.prepare.heldout_fraction
        own = {tuple(prompt.ids): prompt for prompt in found if _is_trained(prompt, share)}
        if not own:
            raise DataError(
                f"{source} has no prompt that is not held out. Name others: --set online.prompts=FILE"
            )
        needed = self.settings.rounds * self.settings.prompts_per_round
        order: list[Prompt] = []
        for epoch in range(-(-needed // len(own))):
            order += random.Random(f"{self.settings.seed} {epoch}").sample(list(own.values()), len(own))
        return order[:needed]

    @cached_property
    def heldout(self) -> list[Prompt]:
        """The prompts on which policies are compared: the first `sample.num_prompts` of those held out."""
        found = row_prompts(self.inputs.rows, ("heldout",), self.inputs.template)
        return found[: self.config.sample.num_prompts]

    @property
    def start(self) -> Policy:
        """The model before the first round."""
        return Policy(self.inputs.policy_source)

    def jobs(self, policy: Policy, number: int | None) -> list[SampleJob]:
        """What is sampled of a policy: the prompts of round `number`, which counts from 1, and the held-out prompts."""
        made = []
        if number is not None:
            count = self.settings.prompts_per_round
            own = {"num_samples": self.settings.num_samples, "seed": self.config.sample.seed + number}
            made.append(self._job(policy, self.prompts[(number - 1) * count : number * count], own))
        if self.heldout:
            made.append(self._job(policy, self.heldout, {"num_samples": 1}))
        return made

    def _job(self, policy: Policy, prompts: Sequence[Prompt], changes: dict[str, Any]) -> SampleJob:
        settings = self.config.sample.model_copy(update=changes)
        stops = tuple(self.inputs.rows.counts["turn_end_ids"])
        job = SampleJob({SIDE: policy.source}, list(prompts), settings, self.inputs.compute, stops)
        return job.with_possible_prompts()

    def round(
        self, number: int, policy: Policy, first: Artifact | None
    ) -> tuple[Round, Policy, Artifact | None]:
        """One round from `policy` on; `first` has the held-out completions of the first policy.

        Returns what happened, the trained policy, and the held-out completions of `policy`.
        """
        began = time.monotonic()
        jobs = self.jobs(policy, number)
        made = [done[SIDE] for done in sample_all(jobs, self.context)]
        heldout = made[1] if len(made) > 1 else None
        pairs, reward = self._pairs(made[0], jobs[0])
        if not pairs.counts["pairs"]:
            raise DataError(
                f"Round {number} has no pair of {pairs.counts['prompts']} prompts: {pairs.counts['without_pair']}. Raise "
                f"online.num_samples or sample.temperature, or use a judge whose scores differ."
            )
        scored, trained = self._train(pairs, policy)
        done = Round(
            number,
            None if heldout is None else self._evaluated(policy, jobs[1], heldout, first or heldout),
            reward,
            pairs.counts["prompts"],
            pairs.counts["pairs"],
            dict(pairs.counts["without_pair"]),
            scored.get("rows_scored", 0),
            scored.get("forwards", 0),
            Path(trained["artifact"]),
            time.monotonic() - began,
        )
        folder = Path(trained["artifact"])
        newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        runs_code = self.config.compute.trust_remote_code
        return done, Policy(ModelSource(folder.name, folder, runs_code=runs_code), newest), heldout

    def last(self, policy: Policy, first: Artifact | None) -> Evaluated | None:
        """The policy of the last round on the held-out prompts."""
        jobs = self.jobs(policy, None)
        if not jobs:
            return None
        [made] = sample_all(jobs, self.context)
        return self._evaluated(policy, jobs[0], made[SIDE], first or made[SIDE])

    def _pairs(self, completions: Artifact, job: SampleJob) -> tuple[Artifact, float | None]:
        """The pairs of a round, and the mean score of its completions."""
        scores = self._scores(completions)
        prompt_ids = {prompt.id: prompt.ids for prompt in job.prompts}
        groups: dict[str, list[Scored]] = {}
        for line, score in zip(read_jsonl(completions.path / COMPLETIONS), scores, strict=True):
            one = Scored(tuple(line["token_ids"]), score, line["finish_reason"] == "stop")
            groups.setdefault(line["id"], []).append(one)
        identity = {"completions": completions.fingerprint, "judge": dict(self.judge.identity)}
        made = make_pairs(
            [(prompt_ids[own], scored) for own, scored in groups.items()],
            self.settings,
            identity,
            completions.path.name,
            self.context,
        )
        given = [score for score in scores if score is not None]
        return made, fmean(given) if given and not self.judge.compares else None

    def _scores(self, completions: Artifact) -> list[float | None]:
        """A score for each completion; of two that the judge compares: 1 for the better, 0 for the other, equal for a tie."""
        entries = completions_of(completions.path)
        if not self.judge.compares:
            judged = judge_completions(self.judge, entries, self.context)
            return [verdict.score for verdict in judged.verdicts]
        halves = [[entry for entry in entries if entry.sample_index == index] for index in (0, 1)]
        found = paired(halves[0], [replace(entry, sample_index=0) for entry in halves[1]])
        judged = judge_pairs(self.judge, found.pairs, self._asking, self.context)
        first = {outcome.completion.id: outcome.preference for outcome in outcomes(judged.verdicts)}
        scores = []
        for entry in entries:
            preference = first.get(entry.id)
            scores.append(
                None if preference is None else preference if entry.sample_index == 0 else 1 - preference
            )
        return scores

    @property
    def _asking(self) -> Asking:
        judge = self.config.judge
        return Asking(judge.both_orders, judge.prompt_price, judge.completion_price)

    def _evaluated(self, policy: Policy, job: SampleJob, completions: Artifact, first: Artifact) -> Evaluated:
        own, others = completions_of(completions.path), completions_of(first.path)
        reward = None
        if not self.judge.compares:
            verdicts = judge_completions(self.judge, own, self.context).verdicts
            given = [verdict.score for verdict in verdicts if verdict.score is not None]
            reward = fmean(given) if given else None
        wins = None
        if completions.path != first.path:
            judged = judge_pairs(self.judge, paired(own, others).pairs, self._asking, self.context)
            rate = win_rate(outcomes(judged.verdicts))
            wins = (rate.rate, rate.low, rate.high)
        kl, scored = self._distance(policy, completions, job)
        return Evaluated(
            reward,
            wins or (TIE, TIE, TIE),
            fmean(entry.num_tokens or 0 for entry in own),
            fmean(entry.finish_reason != "stop" for entry in own),
            kl,
            scored,
        )

    def _distance(self, policy: Policy, completions: Artifact, job: SampleJob) -> tuple[float | None, int]:
        """KL(policy || reference) over its own completions of the held-out prompts, and the rows scored for it."""
        if not self.config.loss.needs_reference:
            return None, 0
        rows = completion_rows(completions, job.prompts, self.context)
        config = distance_config(self.config, rows.path / FILE, policy)
        inputs = Inputs(config, replace(self.context, config_text=config.to_yaml()))
        PREPARE.work(inputs)
        scored = CACHE_REF.work(inputs).as_json()
        metrics = EVALUATE.work(inputs).as_json()["sets"]["completions"]
        return metrics["logratios/chosen"], scored["rows_scored"]

    def _train(self, pairs: Artifact, policy: Policy) -> tuple[dict[str, Any], dict[str, Any]]:
        """Prepare the pairs, score the reference for them, train; the results of cache-ref and train."""
        config = round_config(self.config, pairs.path / FILE, policy)
        inputs = Inputs(config, replace(self.context, config_text=config.to_yaml()))
        PREPARE.work(inputs)
        scored = CACHE_REF.work(inputs).as_json() if config.loss.needs_reference else {}
        return scored, TRAIN.work(inputs).as_json()


def _is_trained(prompt: Prompt, heldout_fraction: float) -> bool:
    return split_of(Preference(prompt.content, []), heldout_fraction) == "train"
