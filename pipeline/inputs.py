"""What one configuration means in one store: its data, models, rows, jobs; each found or loaded on first use.

In: a `RunConfig` and the stages' surroundings. Out: what the stages are handed. A missing artifact is a
`StaleError` that names the command which makes it.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from cache.artifacts import Artifact
from cache.errors import StaleError, UsageError
from cache.ref_logps import RefLogps
from pipeline import quickstart
from pipeline.config import RunConfig
from stages.cache_ref.store_lookup import check_same_model, open_reference
from stages.data.mixing import sources_of
from stages.models.loading import ModelSource, load_tokenizer, reference_identity, resolve_model
from stages.prepare.stage import NOTHING_FILTERED, find_rows
from stages.runtime.compute import Compute, resolve_compute, set_up_process
from stages.runtime.context import Context
from stages.sample.stage import SampleJob
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.tokenization.template import Template
from stages.train.job import Job, find_policy
from stages.train.resume import open_origin
from stages.train.samples import PromptPool

QUICKSTART = "quickstart"


class RowsSource(NamedTuple):
    """What a rows artifact is made from, as `find_rows` and `prepare` take it."""

    data: DataSettings
    settings: PrepareSettings
    template: Template
    context: Context
    filter_: FilterSettings


class Inputs:
    """One configuration over one store, looked up as it is asked for."""

    def __init__(self, config: RunConfig, context: Context) -> None:
        """Nothing is looked up yet."""
        self.config, self.context = config, context

    @property
    def is_quickstart(self) -> bool:
        """Whether the data is the embedded set."""
        return self.config.data.path == QUICKSTART and not self.config.data.sources

    @property
    def data_name(self) -> str:
        """The data by name, for people."""
        return " + ".join(source.name for source in sources_of(self.config.data))

    @property
    def loss_name(self) -> str:
        """The loss as it is named in YAML."""
        return self.config.loss.model_dump()["name"]

    @cached_property
    def compute(self) -> Compute:
        """Where and in what arithmetic models run; this process is set up for it."""
        compute = resolve_compute(self.config.compute)
        set_up_process(compute)
        return compute

    @cached_property
    def _quickstart(self) -> quickstart.Quickstart:
        return quickstart.build(self.context.store.root, self.context.say)

    def model(self, name: str, revision: str | None, or_adapter: bool = False) -> ModelSource:
        """A model by its name; with `or_adapter` a folder of adapter weights will do."""
        if name == QUICKSTART:
            return ModelSource(QUICKSTART, self._quickstart.model)
        return resolve_model(name, revision, or_adapter)

    @cached_property
    def data(self) -> DataSettings:
        """The data block, the embedded set's file in place of its name."""
        data = self.config.data
        return (
            data.model_copy(update={"path": str(self._quickstart.preferences)})
            if self.is_quickstart
            else data
        )

    @cached_property
    def policy_source(self) -> ModelSource:
        """The model that training starts from."""
        return self.model(self.config.policy.model, self.config.policy.revision)

    @cached_property
    def template(self) -> Template:
        """The policy's tokenizer with the template of this configuration."""
        settings = self.config.prepare
        quick = settings.tokenizer == "fastokens"
        return Template(load_tokenizer(self.policy_source), settings.template, settings.append_eos, quick)

    @property
    def rows_source(self) -> RowsSource:
        """What the training and held-out rows are made from."""
        return RowsSource(self.data, self.config.prepare, self.template, self.context, self.config.filter)

    @property
    def eval_sources(self) -> dict[str, RowsSource]:
        """What the named evaluation sets are made from: prepared like the training rows, none held out or filtered."""
        settings = self.config.prepare.model_copy(update={"heldout_fraction": 0.0})
        return {
            name: RowsSource(data, settings, self.template, self.context, NOTHING_FILTERED)
            for name, data in self.config.eval.sets.items()
        }

    @cached_property
    def rows(self) -> Artifact:
        """The prepared rows; raises `StaleError` when they are not there."""
        if self.needs_quickstart:  # then there are none of it, and to look for them would build it
            raise self._no_rows(self.data_name)
        return self._find_rows(self.rows_source, self.data_name)

    @cached_property
    def eval_sets(self) -> dict[str, Artifact]:
        """The prepared rows of the named evaluation sets; raises `StaleError` when they are not there."""
        return {
            name: self._find_rows(source, f"eval.sets.{name}") for name, source in self.eval_sources.items()
        }

    def _find_rows(self, source: RowsSource, what: str) -> Artifact:
        rows = find_rows(*source)
        if rows is None:
            raise self._no_rows(what)
        return rows

    def _no_rows(self, what: str) -> StaleError:
        return StaleError(
            f"The rows of {what} with these settings are not in {self.context.store.root}. Make them with: {self.context.command('prepare')}"
        )

    @cached_property
    def job_without_reference(self) -> Job:
        """What a training run computes with, but not what it starts from and is compared to."""
        config = self.config
        return Job(
            self.rows, self.policy_source, {}, None, config.loss, config.train, self.compute, config.adapter
        )

    @cached_property
    def job(self) -> Job:
        """What a training run is made from; raises `StaleError` where a part is missing."""
        settings, job = self.config.train, self.job_without_reference
        start = reference_identity(self.policy_source, self.compute)
        return replace(
            job,
            start=start,
            reference=self._reference(start) if self.config.loss.needs_reference else None,
            eval_sets=self.eval_sets,
            origin=None if settings.resume is None else open_origin(settings.resume, self.context),
            pool=None if settings.sample_steps is None else self._pool,
        )

    def _reference(self, start: dict[str, Any]) -> RefLogps:
        """The reference's log-probs; `start` identifies the policy before training."""
        name, revision = self.config.reference_model
        is_start = (name, revision) == (self.config.policy.model, self.config.policy.revision)
        reference = open_reference(name, revision, self.compute, self.context, check_files=not is_start)
        if is_start:  # the content of the weights is known, which says more than their dates
            check_same_model(reference, start, self.context)
        return reference

    @property
    def _pool(self) -> PromptPool:
        """What is sampled while training: prompts and ways of the block sample."""
        job = SampleJob.of({}, self.rows, self.template, self.config.sample, self.compute)
        settings = self.config.train
        return PromptPool(job.prompts, settings.sample_prompts, settings.sample_strategy, job.sampling)

    @property
    def policy(self) -> ModelSource:
        """The policy that this configuration has trained."""
        return ModelSource(self.policy_artifact.path.name, self.policy_artifact.path)

    @cached_property
    def policy_artifact(self) -> Artifact:
        """The policy that this configuration has trained; raises `StaleError` when it is not there."""
        policy = find_policy(self.job, self.context)
        if policy is None:
            raise StaleError(
                f"The policy of this configuration is not in {self.context.store.root}. Train it with: {self.context.command('train')}"
            )
        return policy

    @cached_property
    def sample_job(self) -> SampleJob:
        """What is to be sampled from which models."""
        config = self.config
        models = {}
        if config.sample.model is not None:
            models["model"] = self.model(config.sample.model, None, or_adapter=True)
        else:
            models["policy"] = self.policy
        if config.sample.compare:
            if config.sample.model is not None:
                raise UsageError(
                    "sample.compare compares the trained policy with its reference; leave sample.model out."
                )
            models["reference"] = self.model(*config.reference_model)
        return SampleJob.of(models, self.rows, self.template, config.sample, self.compute)

    @property
    def evaluated(self) -> ModelSource:
        """The model that `align eval` measures: the one named, or the policy."""
        name = self.config.eval.model
        return self.policy if name is None else self.model(name, None, or_adapter=True)

    @property
    def needs_quickstart(self) -> bool:
        """Whether the embedded model or data is asked for and not built yet."""
        asked = self.is_quickstart or self.config.policy.model == QUICKSTART
        return asked and not quickstart.folder_of(self.context.store.root).is_dir()
