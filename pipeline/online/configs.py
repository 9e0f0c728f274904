"""The configurations under which a round trains and is measured, made of the one that the user wrote.

In: the configuration, a file of token ids, a policy. Out: a `RunConfig` for the stages.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, build_config
from stages.models.loading import ModelSource


@dataclass(frozen=True)
class Policy:
    """A model to sample, and the checkpoint that the next round begins from; None for the model of the configuration."""

    source: ModelSource
    checkpoint: Path | None = None


def round_config(config: RunConfig, pairs: Path, policy: Policy) -> RunConfig:
    """For training: the pairs are all its data, and its weights and optimizer go on from the round before."""
    tree = _on_token_ids(config, "kl" in config.loss.needs)
    if config.online.reference == "previous" and policy.checkpoint is not None:
        tree["reference"] = {"model": str(policy.source.folder)}
    tree["data"] = {"path": str(pairs), "format": "tokenized"}
    tree["train"] |= {
        "begin_from": None if policy.checkpoint is None else str(policy.checkpoint),
        "keep_last": max(1, config.train.keep_last),
    }
    return build_config(tree)


def distance_config(config: RunConfig, completions: Path, policy: Policy) -> RunConfig:
    """For the distance of a policy to the reference: a loss of single completions, whose metrics have their log-ratios."""
    tree = _on_token_ids(config, mismatched=False)
    tree["data"] = {"path": str(completions), "format": "tokenized_unpaired"}
    tree["loss"] = {"name": "apo_zero_unpaired"}
    model = config.policy.model if policy.checkpoint is None else str(policy.source.folder)
    tree["eval"] = {"sets": {"completions": tree["data"]}, "model": model}
    return build_config(tree)


def _on_token_ids(config: RunConfig, mismatched: bool) -> dict[str, Any]:
    """The blocks without what belongs to the user's own data."""
    tree = config.model_dump(mode="json")
    prepare = {"heldout_fraction": 0.0, "mismatched": config.prepare.mismatched and mismatched}
    return tree | {"filter": {}, "eval": {}, "judge": {}, "online": {}, "prepare": tree["prepare"] | prepare}
