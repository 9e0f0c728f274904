"""A trained adapter and its base model -> one Hugging Face folder that needs neither peft nor the base.

Before the merged model is published, its log-probs of held-out rows are compared with those of base and adapter. Run it
with `align merge`.
"""

from typing import Any

import numpy as np
import torch

from cache.artifacts import Artifact
from cache.errors import CorruptError, UsageError
from stages.data.rows import RowSet
from stages.engine.packs import build_pack
from stages.models.adapters import is_adapter, load_adapter
from stages.models.chat_files import ChatFormat, write_chat_files
from stages.models.fit import check_can_be_saved
from stages.models.loading import ModelSource, load_model
from stages.runtime.compute import Compute
from stages.runtime.context import Context

STAGE_VERSION = 1
NUM_EXAMPLES = 8
# Nats per token, float32. W + BA is rounded once for each weight, Wx + BAx once for each product.
TOLERANCE = 1e-3


def find_merged(policy: Artifact, context: Context) -> Artifact | None:
    """The merged model of this policy if it exists; raises `UsageError` if the policy is not an adapter."""
    if not is_adapter(policy.path):
        raise UsageError(f"{policy.path} is a whole model, not an adapter, so there is nothing to merge.")
    return context.store.find("merged", _name(policy), _identity(policy))


def merge(
    policy: Artifact, base: ModelSource, rows: Artifact, compute: Compute, context: Context
) -> Artifact:
    """Merge an adapter into its base and publish the result; raises `CorruptError` if its log-probs differ."""
    from stages.engine.scorer import Scorer

    policy.check_files()
    check_can_be_saved(base)
    exact = Compute(compute.device, torch.float32, compute.tokens_per_batch)
    adapted = load_adapter(load_model(base, exact), policy.path)
    sample = _sample(rows)
    before = _score(Scorer(adapted.get_base_model(), exact, context.log), sample)
    merged = adapted.merge_and_unload(safe_merge=True)
    after = _score(Scorer(merged, exact, context.log), sample)
    difference = float((after - before).abs().max()) if len(before) else 0.0
    if not difference <= TOLERANCE:
        raise CorruptError(
            f"The log-probs of the merged model differ from those of base and adapter by {difference:.3g} nats per token, "
            f"more than {TOLERANCE:g}. Nothing was written; sample from the adapter instead."
        )
    merged.set_attn_implementation("sdpa")
    draft = context.store.draft("merged", _name(policy), "merge", _identity(policy))
    try:
        merged.save_pretrained(draft.path)
        write_chat_files(base, ChatFormat.of(rows), draft.path)
        counts = {"max_abs_diff": difference, "tokens_compared": len(before)}
        return context.store.publish(draft, counts, {"policy": policy.path.name}, context.config_text)
    finally:
        draft.discard()


def _sample(rows: Artifact) -> tuple[RowSet, list[np.ndarray]]:
    """The row numbers of a few examples: held-out ones, or training examples if there are none."""
    found = RowSet.of(rows, "heldout")
    found = found if found.num_examples else RowSet.of(rows, "train")
    return found, [
        np.arange(found.starts[example], found.ends[example])
        for example in range(min(NUM_EXAMPLES, found.num_examples))
    ]


@torch.no_grad()
def _score(scorer: Any, sample: tuple[RowSet, list[np.ndarray]]) -> torch.Tensor:
    rows, groups = sample
    return torch.cat([scorer(build_pack(rows, [group])).completion_logps for group in groups])


def _name(policy: Artifact) -> str:
    return policy.path.name.rsplit("-", 1)[0]


def _identity(policy: Artifact) -> dict[str, Any]:
    return {"stage_version": STAGE_VERSION, "policy": policy.fingerprint}
