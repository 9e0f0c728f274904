"""Which settings name which artifact: each key of a configuration changes the identities that it is listed with, and no other.

The keys are those of the settings models, so a new one has to be put into the table, with what it identifies. `rows`: prepared rows.
`reference`: stored log-probs. `policy`: a training run, the rows aside. `completions`: what is sampled, the model aside. Keys
that change nothing (`-`) are execution: what exists is used again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cache.artifacts import Store
from cache.errors import AlignError
from cache.fingerprint import differing_fields, fingerprint
from cache.ref_logps import RefLogps
from pipeline.config import RunConfig, build_config
from pipeline.inputs import Inputs
from stages.losses import LOSSES, parse_loss
from stages.losses.mixture import Mixture
from stages.models.identity import reference_identity
from stages.prepare.stage import prepare, rows_identity
from stages.runtime.context import Context
from stages.sample.job import SampleJob
from tests.pipeline.small_run import settings

REFUSED = "refused"


class Key(NamedTuple):
    """What another `value` of a key identifies, next to the keys `beside` without which it means nothing."""

    identifies: str
    value: Any
    beside: dict[str, Any] = {}  # noqa: RUF012


DROP = object()
TWO = [{"path": "DATA", "weight": 1.0}, {"path": "OTHER", "weight": 1.0}]
SOURCES = {"data.path": DROP, "data.sources": TWO}
TABLE = {
    "data.path": Key("rows", "OTHER"),
    "data.format": Key("rows", "trl_conversational"),
    "data.columns": Key("rows", {"extra": "score_chosen"}),
    "data.ignore": Key("-", ["extra"]),
    "data.labels": Key("rows", {"yes": True}),
    "data.ties": Key("rows", "half"),
    "data.threshold": Key("rows", 0.5),
    "data.config": Key(REFUSED, "other"),
    "data.split": Key(REFUSED, "other"),
    "data.revision": Key(REFUSED, "other"),
    "data.sources": Key("rows", TWO, {"data.path": DROP, "data.sources": TWO[:1]}),
    "data.seed": Key("rows", 1, SOURCES),
    "data.max_samples": Key("rows", 20),
    "data.on_bad_row": Key("rows", "skip"),
    "filter.min_prompt_tokens": Key("rows", 2),
    "filter.max_prompt_tokens": Key("rows", 99),
    "filter.min_completion_tokens": Key("rows", 2),
    "filter.max_completion_tokens": Key("rows", 99),
    "filter.min_score_gap": Key("rows", 0.5),
    "filter.language": Key("rows", "en"),
    "filter.language_column": Key("rows", "lang", {"filter.language": "en"}),
    "filter.drop_pattern": Key("rows", "x+"),
    "filter.duplicates": Key("rows", "exact"),
    "filter.near_duplicate_similarity": Key("rows", 0.7, {"filter.duplicates": "near"}),
    "filter.decontaminate": Key("rows", ["OTHER"]),
    "filter.decontaminate_words": Key("rows", 8, {"filter.decontaminate": ["OTHER"]}),
    "policy.model": Key("reference policy", "MODEL"),
    "policy.revision": Key(REFUSED, "other"),
    "reference.model": Key("reference policy", "MODEL"),
    "reference.revision": Key(REFUSED, "other", {"reference.model": "MODEL"}),
    "prepare.template": Key("rows", "chatml"),
    "prepare.thinking": Key("rows", "off"),
    "prepare.chat_template_kwargs": Key("rows", {"a": 1}),
    "prepare.system": Key("rows", "fold"),
    "prepare.append_eos": Key("rows", False, {"prepare.template": "chatml"}),
    "prepare.max_length": Key("rows", 100),
    "prepare.max_prompt_length": Key("rows", 50),
    "prepare.max_completion_length": Key("rows", 50),
    "prepare.truncation_mode": Key("rows", "keep_start"),
    "prepare.heldout_fraction": Key("rows", 0.5),
    "prepare.mismatched": Key("rows", False),
    "prepare.graded": Key("rows", "ranked"),
    "prepare.tokenizer": Key("-", "fastokens"),
    "prepare.num_workers": Key("-", 2),
    "compute.device": Key("-", "auto"),
    "compute.dtype": Key("reference policy completions", "bfloat16"),
    "compute.tokens_per_batch": Key("-", 64),
    "compute.compile": Key("-", True),
    "compute.trust_remote_code": Key("-", True),
    "compute.load_in_4bit": Key("reference policy", True),
    "loss.name": Key("policy", "ipo"),
    "adapter.name": Key("policy", "lora"),
    "adapter.r": Key("policy", 8, {"adapter.name": "lora"}),
    "adapter.lora_alpha": Key("policy", 8, {"adapter.name": "lora"}),
    "adapter.target_modules": Key("policy", ["q_proj"], {"adapter.name": "lora"}),
    "adapter.use_rslora": Key("policy", True, {"adapter.name": "lora"}),
    "train.learning_rate": Key("policy", 2e-3),
    "train.batch_size": Key("policy", 2),
    "train.keep_together": Key("policy", "conversation"),
    "train.pairs": Key("policy", "adjacent"),
    "train.num_epochs": Key("policy", 3),
    "train.max_steps": Key("policy", 2),
    "train.lr_scheduler_type": Key("policy", "cosine"),
    "train.lr_scheduler_kwargs": Key("policy", {"power": 2.0}, {"train.lr_scheduler_type": "polynomial"}),
    "train.warmup_ratio": Key("policy", 0.5),
    "train.optimizer": Key("policy", "rmsprop"),
    "train.weight_decay": Key("policy", 0.1),
    "train.adam_beta1": Key("policy", 0.8),
    "train.adam_beta2": Key("policy", 0.9),
    "train.adam_epsilon": Key("policy", 1e-6),
    "train.max_grad_norm": Key("policy", 2.0),
    "train.gradient_checkpointing": Key("-", True),
    "train.activation_offload": Key("-", True),
    "train.parallel": Key("-", "fsdp"),
    "train.seed": Key("policy", 1),
    "train.eval_steps": Key("policy", 3),
    "train.eval_samples": Key("policy", 2),
    "train.save_steps": Key("-", 3),
    "train.keep_last": Key("-", 1),
    "train.best_metric": Key("policy", "loss"),
    "train.save_best": Key("policy", True, {"train.best_metric": "loss"}),
    "train.early_stopping_metric": Key("policy", "loss"),
    "train.early_stopping_patience": Key("policy", 2, {"train.early_stopping_metric": "loss"}),
    "train.sample_steps": Key("policy", 2),
    "train.sample_prompts": Key("policy", 2, {"train.sample_steps": 2}),
    "train.sample_strategy": Key("policy", "random", {"train.sample_steps": 2}),
    "train.on_nonfinite": Key("policy", "skip"),
    "train.name": Key("-", "other"),
    "train.model_card": Key("-", False),
    "train.resume": Key("-", "checkpoint"),
    "train.begin_from": Key("-", "checkpoint"),
    "train.resume_override": Key("-", ["seed"]),
    "eval.sets": Key("-", {"more": {"path": "OTHER"}}),
    "eval.model": Key("-", "MODEL"),
    "sample.model": Key("-", "MODEL"),
    "sample.engine": Key("completions", "vllm"),
    "sample.prompts": Key("completions", "OTHER"),
    "sample.num_prompts": Key("completions", 2),
    "sample.num_samples": Key("completions", 2),
    "sample.temperature": Key("completions", 0.5),
    "sample.top_p": Key("completions", 0.5),
    "sample.top_k": Key("completions", 5),
    "sample.max_tokens": Key("completions", 9),
    "sample.seed": Key("completions", 1),
    "sample.compare": Key("-", True),
    "sample.on_bad_prompt": Key("-", "error"),
    "sample.tensor_parallel": Key("-", 2),
    "sample.data_parallel": Key("-", 2),
}
# Blocks without a part in these four; verdicts and rounds have identities and tests of their own.
BLOCKS_OF_OTHERS = ("judge", "online", "sweep", "track")


def keys_of(config: type[RunConfig]) -> set[str]:
    """Every key of the blocks; of the loss its name, whose fields are all part of the identity of a policy."""
    found = {"loss.name"}
    for block, field in config.model_fields.items():
        if block not in (*BLOCKS_OF_OTHERS, "loss"):
            found |= {f"{block}.{key}" for key in field.annotation.model_fields}  # type: ignore[union-attr]
    return found


def test_every_key_is_in_the_table():
    assert keys_of(RunConfig) == set(TABLE)


class World:
    """A prepared set, and what the paths of the table stand for."""

    source: Any
    template: Any

    def __init__(self, root: Path, model: Path, other_model: Path, data: Path) -> None:
        self.known: dict[str, dict[str, dict]] = {}
        self.other = root / "other.jsonl"
        self.other.write_text("".join(data.read_text().splitlines(keepends=True)[:20]))
        self.paths = {"DATA": str(data), "OTHER": str(self.other), "MODEL": str(other_model)}
        self.tree = settings(model, data, loss={"name": "dpo"}, sample={"engine": "transformers"})
        self.context = Context(Store(root / "store"), log=lambda _: None)
        inputs = Inputs(build_config(self.tree), self.context)
        self.rows = prepare(*inputs.rows_source)
        self.reference = RefLogps(
            root / "reference", reference_identity(inputs.policy_source, inputs.compute)
        )

    def before(self, beside: dict[str, Any]) -> dict[str, dict]:
        """The four identities without the key, computed once for all keys that stand beside the same."""
        known = self.known.setdefault(str(beside), {})
        if not known:
            known.update(self.identities(beside))
        return known

    def identities(self, changes: dict[str, Any]) -> dict[str, dict]:
        """The four identities under a configuration, each with its own inputs as they were."""
        tree = {block: dict(values) for block, values in self.tree.items()}
        for name, value in changes.items():
            block, key = name.split(".")
            tree.setdefault(block, {})[key] = self._with_paths(value)
            if value is DROP:
                del tree[block][key]
        inputs = Inputs(build_config(tree), self.context)
        data, prepared, template, _, filter_ = inputs.rows_source
        reference = reference_identity(inputs.model(*inputs.config.reference_model), inputs.compute)
        inputs.rows = self.rows
        job = replace(
            inputs.job_without_reference,
            start=reference_identity(inputs.policy_source, inputs.compute),
            reference=RefLogps(self.reference.folder.with_name(fingerprint(reference)[:12]), reference),
            pool=None if inputs.config.train.sample_steps is None else inputs._pool,
        )
        sample = inputs.config.sample
        sampled = SampleJob.of({"model": self.source}, self.rows, self.template, sample, inputs.compute)
        return {
            "rows": rows_identity(data, prepared, template, filter_),
            "reference": reference,
            "policy": job.own_identity,
            "completions": sampled.identity("model", sample.engine),  # type: ignore[arg-type]
        }

    def _with_paths(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._with_paths(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._with_paths(part) for part in value]
        return self.paths.get(value, value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, chat_tokenizer, shared_preferences) -> World:
    from tests.conftest import save_tiny_llama

    root = tmp_path_factory.mktemp("identity")
    made = World(
        root, tiny_model, save_tiny_llama(root / "model", chat_tokenizer, seed=9), shared_preferences
    )
    inputs = Inputs(build_config(made.tree), made.context)
    made.source, made.template = inputs.policy_source, inputs.template
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_key_changes_the_identities_that_it_is_listed_with_and_no_other(name, world):
    key = TABLE[name]
    before = world.before(key.beside)
    if key.identifies == REFUSED:
        with pytest.raises(AlignError, match="other"):
            world.identities({**key.beside, name: key.value})
        return
    after = world.identities({**key.beside, name: key.value})
    changed = {kind for kind in before if fingerprint(before[kind]) != fingerprint(after[kind])}
    assert changed == set(key.identifies.replace("-", "").split())
    for kind in changed:
        assert differing_fields(before[kind], after[kind])


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss is not Mixture])
def test_the_identity_of_a_run_holds_every_field_of_its_loss(name):
    loss = parse_loss({"name": name})
    assert set(loss.model_dump()) == set(type(loss).model_fields)
