"""`align merge`: merges a trained adapter into its base model."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline import tables
from pipeline.commands.command import Command, Intent, StageResult, found_or_made

if TYPE_CHECKING:
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Merged(StageResult):
    """The merged model."""

    def show(self, console: Console) -> None:
        """Print by how much its log-probs differ from those of base model and adapter."""
        counts = self.artifact.counts
        what = (
            f"log-probs of {counts['tokens_compared']:,} tokens agree with base model and adapter to "
            f"{counts['max_abs_diff']:.1g} nats"
        )
        tables.headline(console, "merge", what, self.artifact.path, self.reused)


def merge(inputs: "Inputs") -> Merged:
    """Merge a trained adapter into its base model.

    Writes a Hugging Face folder after comparing its log-probs with those of base model and adapter.
    """
    from stages.merge import find_merged
    from stages.merge import merge as make_model

    policy, context = inputs.policy_artifact, inputs.context
    found = find_merged(policy, context)
    make = partial(make_model, policy, inputs.policy_source, inputs.rows, inputs.compute, context)
    return Merged(*found_or_made("merge", found, make, context.log))


def would_merge(inputs: "Inputs") -> Intent:
    """Look whether the merged model exists."""
    from stages.merge import find_merged

    policy = inputs.policy_artifact
    return Intent("reuse" if find_merged(policy, inputs.context) else "merge", {"policy": str(policy.path)})


MERGE = Command("merge", merge, examples=("align merge -c configs/lora.yaml",), intent=would_merge)
