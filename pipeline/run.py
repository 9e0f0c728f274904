"""The stages, wired: each looks for its inputs in the store, does its work or finds it done.

Stages meet only through artifacts. A missing input is an error that names the command to run;
`align run` is nothing but the four commands in order.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact, Store
from cache.errors import StaleError, UsageError
from cache.ref_logps import RefLogps
from pipeline import quickstart
from pipeline.config import RunConfig
from pipeline.plan import plan_training
from stages.cache_ref import cache_ref, check_same_model, count_missing, open_reference
from stages.compute import Compute, resolve_compute
from stages.context import Context
from stages.evaluate import evaluate_model
from stages.job import Job, find_policy
from stages.loop_samples import PromptPool
from stages.merge import find_merged, merge
from stages.models import ModelSource, load_tokenizer, reference_identity, resolve_model
from stages.needs import check_needs
from stages.policy import remove_leftovers
from stages.prepare import NOTHING_FILTERED, find_rows, prepare
from stages.resume import open_origin
from stages.sample import SampleJob, find_completions, sample
from stages.settings import DataSettings, FilterSettings, PrepareSettings
from stages.sources import sources_of
from stages.templates import Template
from stages.train import train

QUICKSTART = "quickstart"
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

    def run(self, stage: str) -> Result:
        """Run a stage, or all of them for 'run', and return what happened as plain data."""
        if stage != "run":
            return getattr(self, f"_{stage.replace('-', '_')}")()
        results: Result = {}
        for name in STAGES:
            if self._is_needed(name):
                results[name] = self.run(name)
            else:
                self.context.say(f"{name}: not needed, {self._loss_name} has no reference")
        return results

    def _is_needed(self, stage: str) -> bool:
        return stage != "cache-ref" or self.config.loss.needs_reference

    def plan(self, stage: str) -> Result:
        """What `run` would do, from what is in the store; writes nothing."""
        stages = [name for name in STAGES if self._is_needed(name)] if stage == "run" else [stage]
        if (self._is_quickstart or self.config.policy.model == QUICKSTART) and not quickstart.folder_of(
            self.context.store.root
        ).is_dir():
            return {name: {"would": "build the quickstart's model and data first"} for name in stages}
        plans: Result = {}
        for name in stages:
            try:
                plans[name] = getattr(self, f"_plan_{name.replace('-', '_')}")()
            except StaleError as error:
                plans[name] = {"would": f"run after its inputs are there: {error}"}
        return plans

    @property
    def rows(self) -> Artifact:
        """The prepared rows of this configuration; raises `StaleError` when they are not there."""
        return self._rows

    def _prepare(self) -> Result:
        result = self._prepare_one(self._data, self.config.prepare, self.config.filter)
        sets = {name: self._prepare_one(data, self._eval_prepare) for name, data in self._eval_data.items()}
        return {**result, "eval_sets": sets} if sets else result

    def _prepare_one(
        self, data: DataSettings, settings: PrepareSettings, filter_: FilterSettings = NOTHING_FILTERED
    ) -> Result:
        found = find_rows(data, settings, self._template, self.context, filter_)
        rows = found or prepare(data, settings, self._template, self.context, filter_)
        return self._artifact_result("prepare", rows, found is not None)

    def _cache_ref(self) -> Result:
        source = self._model(*self.config.reference_model)
        row_sets = [self._rows, *self._eval_sets.values()]
        revision = self.config.reference_model[1]
        result = cache_ref(row_sets, source, revision, self._compute, self.context, self.shard)
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
        job = self._job
        found = find_policy(job, self.context)
        if found:
            remove_leftovers(found)
        policy = found or train(job, self.config.track, self.context)
        return self._artifact_result("train", policy, found is not None)

    def _eval(self) -> Result:
        name = self.config.eval.model
        model = self._policy if name is None else self._model(name, None, or_adapter=True)
        sets = evaluate_model(self._job, model, self.context)
        return {"model": model.name, "loss": self._loss_name, "sets": sets}

    def _sample(self) -> Result:
        job = self._sample_job
        found = find_completions(job, self.context)
        completions = found or sample(job, self.context)
        result = self._artifact_result("sample", completions, found is not None)
        # Its preference can be counted, so the report does.
        known = {"quickstart": True} if self._is_quickstart else {}
        return {**result, "output": str(completions.path / "completions.jsonl"), **known}

    def _merge(self) -> Result:
        policy = self._policy_artifact
        found = find_merged(policy, self.context)
        merged = found or merge(policy, self._policy_source, self._rows, self._compute, self.context)
        return self._artifact_result("merge", merged, found is not None)

    def training_plan(self, measured: bool) -> Result:
        """What a training run of this configuration will take; needs the rows, and writes nothing."""
        source = self._policy_source
        say = self.context.say
        return plan_training(self.config, self._rows, source, self._compute, measured, say)

    def _plan_merge(self) -> Result:
        return {
            "would": "reuse" if find_merged(self._policy_artifact, self.context) else "merge",
            "policy": str(self._policy_artifact.path),
        }

    def _plan_prepare(self) -> Result:
        found = find_rows(self._data, self.config.prepare, self._template, self.context, self.config.filter)
        missing = [
            name
            for name, data in self._eval_data.items()
            if find_rows(data, self._eval_prepare, self._template, self.context) is None
        ]
        return {
            "would": "reuse" if found and not missing else "read and tokenize",
            "source": self._source,
            **({"artifact": str(found.path)} if found else {}),
            **({"eval_sets": ", ".join(missing)} if missing else {}),
        }

    def _plan_cache_ref(self) -> Result:
        source = self._model(*self.config.reference_model)
        row_sets = [self._rows, *self._eval_sets.values()]
        needed, missing, tokens = count_missing(row_sets, source, self._compute, self.context)
        return {
            "would": "score" if missing else "reuse",
            "rows_needed": needed,
            "rows_missing": missing,
            "tokens": tokens,
        }

    def _plan_train(self) -> Result:
        job = self._job
        check_needs(job.loss, job.rows, job.settings.pairs, self.context)
        plan = job.plan
        return {
            "would": "reuse" if find_policy(job, self.context) else "train",
            "loss": self._loss_name,
            "examples": job.rows.counts["examples"]["train"],
            "steps": plan.steps,
            "batch_size": plan.batch_size,
            "learning_rate": plan.learning_rate,
        }

    def _plan_eval(self) -> Result:
        name = self.config.eval.model
        model = self._policy if name is None else self._model(name, None, or_adapter=True)
        return {"would": "evaluate", "model": model.name, "loss": self._loss_name}

    def _plan_sample(self) -> Result:
        job = self._sample_job
        return {
            "would": "reuse" if find_completions(job, self.context) else "generate",
            "num_prompts": len(job.prompts),
            "models": [model.name for model in job.models.values()],
        }

    def _artifact_result(self, stage: str, artifact: Artifact, reused: bool) -> Result:
        if reused:
            self.context.say(f"{stage}: already done, {artifact.path}")
        return {
            "artifact": str(artifact.path),
            "fingerprint": artifact.fingerprint,
            "reused": reused,
            **artifact.counts,
        }

    @property
    def _is_quickstart(self) -> bool:
        return self.config.data.path == QUICKSTART and not self.config.data.sources

    @property
    def _source(self) -> str:
        """The data by name, for people."""
        return " + ".join(source.name for source in sources_of(self.config.data))

    @property
    def _loss_name(self) -> str:
        return self.config.loss.model_dump()["name"]

    @cached_property
    def _compute(self) -> Compute:
        return resolve_compute(self.config.compute)

    @cached_property
    def _quickstart(self) -> quickstart.Quickstart:
        return quickstart.build(self.context.store.root, self.context.say)

    def _model(self, name: str, revision: str | None, or_adapter: bool = False) -> ModelSource:
        if name == QUICKSTART:
            return ModelSource(QUICKSTART, self._quickstart.model)
        return resolve_model(name, revision, or_adapter)

    @cached_property
    def _data(self) -> DataSettings:
        data = self.config.data
        return (
            data.model_copy(update={"path": str(self._quickstart.preferences)})
            if self._is_quickstart
            else data
        )

    @cached_property
    def _policy_source(self) -> ModelSource:
        return self._model(self.config.policy.model, self.config.policy.revision)

    @cached_property
    def _template(self) -> Template:
        settings = self.config.prepare
        quick = settings.tokenizer == "fastokens"
        return Template(load_tokenizer(self._policy_source), settings.template, settings.append_eos, quick)

    @cached_property
    def _rows(self) -> Artifact:
        return self._rows_of(self._data, self.config.prepare, self._source, self.config.filter)

    @cached_property
    def _eval_data(self) -> dict[str, DataSettings]:
        return dict(self.config.eval.sets)

    @property
    def _eval_prepare(self) -> PrepareSettings:
        """How evaluation sets are prepared: as the training rows, none of them set apart."""
        return self.config.prepare.model_copy(update={"heldout_fraction": 0.0})

    @cached_property
    def _eval_sets(self) -> dict[str, Artifact]:
        return {
            name: self._rows_of(data, self._eval_prepare, f"eval.sets.{name}")
            for name, data in self._eval_data.items()
        }

    def _rows_of(
        self,
        data: DataSettings,
        settings: PrepareSettings,
        what: str,
        filter_: FilterSettings = NOTHING_FILTERED,
    ) -> Artifact:
        rows = find_rows(data, settings, self._template, self.context, filter_)
        if rows is None:
            raise StaleError(
                f"The rows of {what} with these settings are not in {self.context.store.root}. Make them with: {self.context.command('prepare')}"
            )
        return rows

    @cached_property
    def _job(self) -> Job:
        config = self.config
        rows = self._rows
        start = reference_identity(self._policy_source, self._compute)
        reference: RefLogps | None = None
        if config.loss.needs_reference:
            name, revision = config.reference_model
            is_start = (name, revision) == (config.policy.model, config.policy.revision)
            reference = open_reference(name, revision, self._compute, self.context, check_files=not is_start)
            if is_start:  # the content of the weights is known, which says more than their dates
                check_same_model(reference, start, self.context)
        return Job(
            rows,
            self._policy_source,
            start,
            reference,
            config.loss,
            config.train,
            self._compute,
            config.adapter,
            eval_sets=self._eval_sets,
            origin=None if config.train.resume is None else open_origin(config.train.resume, self.context),
            pool=None if config.train.sample_steps is None else self._pool,
        )

    @property
    def _pool(self) -> PromptPool:
        """What is sampled while training: prompts and ways of the block sample."""
        job = SampleJob.of({}, self._rows, self._template, self.config.sample, self._compute)
        settings = self.config.train
        return PromptPool(job.prompts, settings.sample_prompts, settings.sample_strategy, job.sampling)

    @property
    def _policy(self) -> ModelSource:
        """The policy that this configuration has trained."""
        return ModelSource(self._policy_artifact.path.name, self._policy_artifact.path)

    @cached_property
    def _policy_artifact(self) -> Artifact:
        policy = find_policy(self._job, self.context)
        if policy is None:
            raise StaleError(
                f"The policy of this configuration is not in {self.context.store.root}. Train it with: {self.context.command('train')}"
            )
        return policy

    @cached_property
    def _sample_job(self) -> SampleJob:
        config = self.config
        models = {}
        if config.sample.model is not None:
            models["model"] = self._model(config.sample.model, None, or_adapter=True)
        else:
            models["policy"] = self._policy
        if config.sample.compare:
            if config.sample.model is not None:
                raise UsageError(
                    "sample.compare compares the trained policy with its reference; leave sample.model out."
                )
            models["reference"] = self._model(*config.reference_model)
        return SampleJob.of(models, self._rows, self._template, config.sample, self._compute)
