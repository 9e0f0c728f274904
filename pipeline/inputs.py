"""Resolves a configuration to the inputs of the stages: data, models, artifacts and jobs, each on first use.

In: a `RunConfig` and a `Context`. Out: the arguments that stages take. A missing artifact is a `StaleError` that
names the command that makes it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cache.artifacts import Artifact
from cache.errors import StaleError, UsageError
from cache.fingerprint import fingerprint
from cache.ref_logps import RefLogps
from pipeline import quickstart
from pipeline.config import RunConfig
from stages.cache_ref.store_lookup import open_reference, open_start
from stages.data.mixing import sources_of
from stages.data.rows import SPLITS, RowSet, distinct_ids
from stages.models.adapters import base_of, is_adapter
from stages.models.chat_files import declared_ends
from stages.models.identity import reference_identity
from stages.models.loading import ModelSource, load_tokenizer, open_config, resolve_model
from stages.models.vocabulary import TokensInUse
from stages.prepare.stage import NOTHING_FILTERED, find_rows
from stages.runtime.compute import Compute, resolve_compute, set_up_process
from stages.runtime.context import Context
from stages.sample.job import SampleJob
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.tokenization.render import RenderOptions
from stages.tokenization.template import Template
from stages.train.checkpoints import check_model_files
from stages.train.job import Job, find_policy, find_policy_of_other_eval_sets
from stages.train.resume import open_origin
from stages.train.samples import PromptPool

QUICKSTART = "quickstart"
# What trainings on the same rows and models have in common.
SHARED = ("compute", "data", "policy_source", "template", "rows", "eval_sets", "_start")


class RowsSource(NamedTuple):
    """The arguments of `find_rows` and `prepare`."""

    data: DataSettings
    settings: PrepareSettings
    template: Template
    context: Context
    filter_: FilterSettings


class Inputs:
    """The inputs of one configuration in one store."""

    def __init__(self, config: RunConfig, context: Context) -> None:
        """Nothing is loaded yet. `found_rows` will have, by name, the rows that a command looked up or made.

        `show` is called with the result of each part of a command that runs others, as it ends.
        """
        self.config, self.context = config, context
        self.show: Callable[[Any], None] | None = None
        self.found_rows: dict[str, Artifact] = {}

    def with_training(self, config: RunConfig) -> "Inputs":
        """The inputs of a configuration with the same data and models; it shares what is loaded of them.

        Everything but the blocks loss, adapter, train and those after training has to be the same.
        """
        other = Inputs(config, replace(self.context, config_text=config.to_yaml()))
        for name in SHARED:
            other.__dict__[name] = getattr(self, name)
        return other

    @property
    def is_quickstart(self) -> bool:
        """Whether the data is the embedded dataset."""
        return self.config.data.path == QUICKSTART and not self.config.data.sources

    @property
    def data_name(self) -> str:
        """The names of the data sources, for messages."""
        return " + ".join(source.name for source in sources_of(self.config.data))

    @property
    def loss_name(self) -> str:
        """The name of the loss in YAML."""
        return self.config.loss.model_dump()["name"]

    @cached_property
    def compute(self) -> Compute:
        """Where and in what arithmetic models run; this process is set up for it."""
        compute = resolve_compute(self.config.compute)
        set_up_process(compute, self.context.log)
        return compute

    @cached_property
    def _quickstart(self) -> quickstart.Quickstart:
        return quickstart.build(self.context.store.root, self.context.log)

    def model(self, name: str, revision: str | None, or_adapter: bool = False) -> ModelSource:
        """Resolve a model by name; `or_adapter` also accepts a folder of adapter weights."""
        if name == QUICKSTART:
            return ModelSource(QUICKSTART, self._quickstart.model)
        if revision is not None and Path(name).expanduser().is_dir():
            raise UsageError(
                f"{name} is a folder, which has no revision {revision!r}. Leave the revision out, or name a hub model."
            )
        source = resolve_model(name, revision, or_adapter, self.config.compute.trust_remote_code)
        check_model_files(source.folder)
        if is_adapter(source.folder):
            check_model_files(base_of(source).folder)
        return source

    @cached_property
    def data(self) -> DataSettings:
        """The data block; for the embedded dataset, with the path of its file."""
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
        """The policy's tokenizer and the chat template."""
        settings = self.config.prepare
        quick = settings.tokenizer == "fastokens"
        open_config(self.policy_source)  # rows for a model that cannot be opened are of no use
        options = RenderOptions(
            settings.thinking,
            settings.chat_template_kwargs,
            settings.system,
            declared_ends(self.policy_source),
        )
        tokenizer = load_tokenizer(self.policy_source)
        return Template(tokenizer, settings.template, settings.append_eos, quick, options)

    @property
    def rows_source(self) -> RowsSource:
        """The source of the training and held-out rows."""
        return RowsSource(self.data, self.config.prepare, self.template, self.context, self.config.filter)

    @property
    def eval_sources(self) -> dict[str, RowsSource]:
        """The sources of the named evaluation sets; their rows are neither held out nor filtered."""
        settings = self.config.prepare.model_copy(update={"heldout_fraction": 0.0})
        return {
            name: RowsSource(data, settings, self.template, self.context, NOTHING_FILTERED)
            for name, data in self.config.eval.sets.items()
        }

    @cached_property
    def rows(self) -> Artifact:
        """The prepared rows; raises `StaleError` if they are missing."""
        if self.needs_quickstart:  # looking for its rows would build it
            raise self._no_rows(self.data_name)
        return self._find_rows(self.rows_source, self.data_name)

    @cached_property
    def eval_sets(self) -> dict[str, Artifact]:
        """The prepared rows of the named evaluation sets; raises `StaleError` if some are missing."""
        return {
            name: self._find_rows(source, f"eval.sets.{name}") for name, source in self.eval_sources.items()
        }

    def _find_rows(self, source: RowsSource, what: str) -> Artifact:
        rows = find_rows(*source)
        if rows is None:
            raise self._no_rows(what)
        self.found_rows[what] = rows
        return rows

    def _no_rows(self, what: str) -> StaleError:
        return StaleError(
            f"The rows of {what} with these settings are not in {self.context.store.root}. Make them with: {self.context.command('prepare')}"
        )

    @cached_property
    def job_without_reference(self) -> Job:
        """The job without the parts that need a store of reference log-probs; enough for `align plan`."""
        config = self.config
        return Job(
            self.rows, self.policy_source, {}, None, config.loss, config.train, self.compute, config.adapter
        )

    @cached_property
    def job(self) -> Job:
        """The inputs of a training run; raises `StaleError` if one is missing."""
        settings, job, start = self.config.train, self.job_without_reference, self._start
        return replace(
            job,
            start=start,
            reference=self._reference(start) if self.config.loss.needs_reference else None,
            eval_sets=self.eval_sets,
            origin=None if settings.resume is None else open_origin(settings.resume, self.context),
            beginning=None
            if settings.begin_from is None
            else open_origin(settings.begin_from, self.context, "train.begin_from"),
            pool=None if settings.sample_steps is None else self._pool,
        )

    @cached_property
    def _start(self) -> dict[str, Any]:
        """Identifies the policy before training. All weights are read."""
        return reference_identity(self.policy_source, self.compute)

    def _reference(self, start: dict[str, Any]) -> RefLogps:
        """The store of reference log-probs; `start` identifies the policy before training."""
        name, revision = self.config.reference_model
        if (name, revision) == (self.config.policy.model, self.config.policy.revision):
            return open_start(self.policy_source, start, self.compute, self.context)
        if name == QUICKSTART:
            name = str(self._quickstart.model)
        used = TokensInUse(self.template.tokenizer, lambda: distinct_ids(self._row_sets()))
        return open_reference(name, revision, used, self.compute, self.context)

    def _row_sets(self) -> list[RowSet]:
        artifacts = (self.rows, *self.eval_sets.values())
        return [RowSet.of(artifact, split) for artifact in artifacts for split in SPLITS]

    @property
    def _pool(self) -> PromptPool:
        """The prompts and sampling settings for `train.sample_steps`, from the block `sample`."""
        job = SampleJob.of({}, self.rows, self.template, self.config.sample, self.compute)
        settings = self.config.train
        pool = PromptPool(job.prompts, settings.sample_prompts, settings.sample_strategy, job.sampling)
        return pool if self.config.judge.function is None else _judged(pool, self.config.judge.function)

    @property
    def policy(self) -> ModelSource:
        """The policy that this configuration trained."""
        path = self.policy_artifact.path
        return ModelSource(path.name, path, runs_code=self.config.compute.trust_remote_code)

    @cached_property
    def policy_artifact(self) -> Artifact:
        """The artifact of the policy that this configuration trained; raises `StaleError` if it is missing."""
        policy = find_policy(self.job, self.context)
        if policy is not None:
            return policy
        other = find_policy_of_other_eval_sets(self.job, self.context)
        if other is not None:
            raise StaleError(
                f"{other} was trained with these settings but for eval.sets, which are part of a training run. "
                f"Name it: align eval with --set eval.model={other}, align sample with --set sample.model={other}"
            )
        raise StaleError(
            f"The policy of this configuration is not in {self.context.store.root}. Train it with: {self.context.command('train')}"
        )

    @cached_property
    def sample_job(self) -> SampleJob:
        """Models, prompts and settings of `align sample`."""
        return self._sample_job(self.config.sample.compare)

    @cached_property
    def sample_job_with_reference(self) -> SampleJob:
        """The same where `align sample` also samples from the reference."""
        return self.sample_job if self.config.sample.compare else self._sample_job(True)

    def _sample_job(self, compare: bool) -> SampleJob:
        config = self.config
        models = {}
        if config.sample.model is not None:
            models["model"] = self.model(config.sample.model, None, or_adapter=True)
        else:
            models["policy"] = self.policy
        if compare:
            models["reference"] = self.model(*config.reference_model)
        job = SampleJob.of(models, self.rows, self.template, config.sample, self.compute)
        job.check_tokens(self.template.tokenizer, self.context.log)
        return job

    @property
    def evaluated(self) -> ModelSource:
        """The model that `align eval` evaluates: `eval.model` or the policy."""
        name = self.config.eval.model
        return self.policy if name is None else self.model(name, None, or_adapter=True)

    @property
    def needs_quickstart(self) -> bool:
        """Whether the configuration uses the embedded model or data and these are not built yet."""
        used = self.is_quickstart or self.config.policy.model == QUICKSTART
        return used and not quickstart.folder_of(self.context.store.root).is_dir()


def _judged(pool: PromptPool, function: str) -> PromptPool:
    """The pool with the scores of a function judge."""
    from stages.judge.function import FunctionJudge

    judge = FunctionJudge.of(function)
    return replace(pool, score=judge.score, judge=fingerprint(judge.identity))
