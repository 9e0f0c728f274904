"""The stages, wired: each looks for its inputs in the store, does its work or finds it done.

Stages meet only through artifacts. A missing input is an error that names the command to run;
`align run` is nothing but the four commands in order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact, Store
from pipeline.config import RunConfig
from pipeline.dry_run import plan_stages
from pipeline.inputs import Inputs
from pipeline.plan import plan_training
from stages.cache_ref.stage import cache_ref
from stages.evaluate import evaluate_model, saved_state
from stages.merge import find_merged, merge
from stages.prepare.stage import NOTHING_FILTERED, find_rows, prepare
from stages.runtime.context import Context
from stages.sample.stage import find_completions, sample
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.train.job import find_policy
from stages.train.publish import remove_leftovers
from stages.train.stage import train

STAGES = ("prepare", "cache-ref", "train", "sample")
Result = dict[str, Any]


class Session:
    """One configuration over one store."""

    def __init__(
        self,
        config: RunConfig,
        store: Path,
        arguments: str = "",
        loss: str | None = None,
        say: Callable[[str], None] | None = None,
        shard: str | None = None,
    ) -> None:
        """Check what can be checked without loading anything. `shard` is cache-ref's share of the work, `i/N`."""
        self.config, self.shard = config, shard
        settings = {} if say is None else {"say": say}
        self.context = Context(Store(store), config.to_yaml(), arguments, loss, **settings)
        self.inputs = Inputs(config, self.context)

    def run(self, stage: str) -> Result:
        """Run a stage, or all of them for 'run', and return what happened as plain data."""
        if stage != "run":
            return getattr(self, f"_{stage.replace('-', '_')}")()
        results: Result = {}
        for name in STAGES:
            if self._is_needed(name):
                results[name] = self.run(name)
            else:
                self.context.say(f"{name}: not needed, {self.inputs.loss_name} has no reference")
        return results

    def _is_needed(self, stage: str) -> bool:
        return stage != "cache-ref" or self.config.loss.needs_reference

    def plan(self, stage: str) -> Result:
        """What `run` would do, from what is in the store; writes nothing."""
        stages = [name for name in STAGES if self._is_needed(name)] if stage == "run" else [stage]
        return plan_stages(self.inputs, stages)

    def _prepare(self) -> Result:
        result = self._prepare_one(self.inputs.data, self.config.prepare, self.config.filter)
        sets = {
            name: self._prepare_one(data, self.inputs.eval_prepare)
            for name, data in self.config.eval.sets.items()
        }
        return {**result, "eval_sets": sets} if sets else result

    def _prepare_one(
        self, data: DataSettings, settings: PrepareSettings, filter_: FilterSettings = NOTHING_FILTERED
    ) -> Result:
        found = find_rows(data, settings, self.inputs.template, self.context, filter_)
        rows = found or prepare(data, settings, self.inputs.template, self.context, filter_)
        return self._artifact_result("prepare", rows, found is not None)

    def _cache_ref(self) -> Result:
        row_sets = [self.inputs.rows, *self.inputs.eval_sets.values()]
        source = self.inputs.model(*self.config.reference_model)
        revision = self.config.reference_model[1]
        result = cache_ref(row_sets, source, revision, self.inputs.compute, self.context, self.shard)
        if not result.rows_scored:
            whose = f" of shard {self.shard}" if self.shard else ""
            self.context.say(
                f"cache-ref: all {result.rows_needed:,} rows{whose} are already in {result.reference.folder}"
            )
        return {
            "artifact": str(result.reference.folder),
            "fingerprint": result.reference.fingerprint,
            "reused": result.rows_scored == 0,
            "rows_needed": result.rows_needed,
            "rows_scored": result.rows_scored,
            "forwards": result.forwards,
            "seconds": round(result.seconds, 3),
        }

    def _train(self) -> Result:
        job = self.inputs.job
        found = find_policy(job, self.context)
        if found:
            remove_leftovers(found)
        policy = found or train(job, self.config.track, self.context)
        return self._artifact_result("train", policy, found is not None)

    def _eval(self) -> Result:
        job, model = self.inputs.job, self.inputs.evaluated
        state = saved_state(model.folder, job.loss)
        if job.loss.keeps_state:
            begin = f"goes on from that of {model.name}" if state else "begins at 0, as before the first step"
            self.context.say(f"The running mean of {self.inputs.loss_name} {begin}: {model.folder}")
        sets = evaluate_model(job, model, state, self.context)
        kept = {"loss_state": state or None} if job.loss.keeps_state else {}
        return {"model": model.name, "loss": self.inputs.loss_name, **kept, "sets": sets}

    def _sample(self) -> Result:
        job = self.inputs.sample_job
        found = find_completions(job, self.context)
        completions = found or sample(job, self.context)
        result = self._artifact_result("sample", completions, found is not None)
        # Its preference can be counted, so the report does.
        known = {"quickstart": True} if self.inputs.is_quickstart else {}
        return {**result, "output": str(completions.path / "completions.jsonl"), **known}

    def _merge(self) -> Result:
        policy = self.inputs.policy_artifact
        found = find_merged(policy, self.context)
        merged = found or merge(
            policy, self.inputs.policy_source, self.inputs.rows, self.inputs.compute, self.context
        )
        return self._artifact_result("merge", merged, found is not None)

    def training_plan(self, measured: bool) -> Result:
        """What a training run of this configuration will take; needs the rows, and writes nothing."""
        rows, source = self.inputs.rows, self.inputs.policy_source
        say = self.context.say
        return plan_training(self.config, rows, source, self.inputs.compute, measured, say)

    def _artifact_result(self, stage: str, artifact: Artifact, reused: bool) -> Result:
        if reused:
            self.context.say(f"{stage}: already done, {artifact.path}")
        return {
            "artifact": str(artifact.path),
            "fingerprint": artifact.fingerprint,
            "reused": reused,
            **artifact.counts,
        }
