"""The policy while it is trained: all its weights or an adapter, whole on every rank or sharded over them.

In: a `Job`.  Out: a `Trainable`, which the loop trains without knowing which of these it is: it has
parameters, it scores packs, its gradients are summed and clipped, and it is written as a Hugging Face or
peft folder with the same files in every case.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache.errors import StaleError
from stages.models.adapters import attach_adapter, halve_frozen_weights, load_adapter_weights, save_adapter
from stages.models.loading import ModelSource, load_model, load_tokenizer
from stages.runtime.compute import Compute
from stages.runtime.distributed import World
from stages.train.fsdp import are_shards, full_state, load_sharded, load_shards, save_shards
from stages.train.job import Job

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer

OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class Trainable:
    """A policy in training. `adapted` is peft's wrapper around `model`, or None where all weights are trained."""

    source: ModelSource
    model: Any
    adapted: Any | None
    scorer: "Scorer"
    parameters: list[torch.nn.Parameter]
    world: World

    def sum_gradients(self) -> None:
        """Add the gradients over all ranks; a sharded model has done so in its backward pass."""
        if not self.world.sharded:
            self.world.sum_gradients(self.parameters)

    def clip_gradients(self, max_norm: float) -> float:
        """Norm of the whole gradient before it is clipped to `max_norm` (0: not clipped); the same on every rank."""
        from torch.distributed.tensor import DTensor

        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def save(self, folder: Path) -> None:
        """Write the policy and its tokenizer; every rank calls this, the first one writes."""
        state = full_state(self.scorer, trained_only=self.adapted is not None) if self.world.sharded else None
        if not self.world.is_main:
            return
        if self.adapted is not None:
            named = (
                None
                if state is None
                else {f"base_model.model.{name}": value for name, value in state.items()}
            )
            save_adapter(self.adapted, folder, named)
        elif state is None:
            self.model.save_pretrained(folder)
        else:
            _whole(self.model.config, state).save_pretrained(folder)
        load_tokenizer(self.source).save_pretrained(folder)

    def save_state(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Write weights and optimizer into a checkpoint's folder: all that `load_state` needs. All ranks call.

        Weights are written as by `save`, so every checkpoint opens as a model. A sharded run is continued from its
        shards of weights and optimizer beside them, in torch's distributed format: no rank reads more than its own.
        """
        self.save(folder)
        if self.world.sharded:
            save_shards(self.scorer, optimizer, folder, trained_only=self.adapted is not None)
        elif self.world.is_main:
            torch.save(optimizer.state_dict(), folder / OPTIMIZER)

    def load_state(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Put weights and optimizer back exactly as `save_state` found them; all ranks call.

        Raises `StaleError` for a checkpoint of the other `train.parallel`.
        """
        if are_shards(folder) != self.world.sharded:
            written, wanted = ("fsdp", "ddp") if are_shards(folder) else ("ddp", "fsdp")
            raise StaleError(
                f"{folder} was written with train.parallel={written}, this run has {wanted}. Continue it with "
                f"--set train.parallel={written}, on any number of ranks."
            )
        if self.world.sharded:
            load_shards(self.scorer, optimizer, folder, trained_only=self.adapted is not None)
            return
        if self.adapted is not None:
            load_adapter_weights(self.adapted, folder)
        else:
            on_cpu = Compute(torch.device("cpu"), torch.float32, self.scorer.compute.tokens_per_batch)
            self.model.load_state_dict(load_model(ModelSource(str(folder), folder), on_cpu).state_dict())
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))


def load_trainable(job: Job, world: World, say: Callable[[str], None]) -> Trainable:
    """Load the starting weights, with a fresh adapter where one is asked for, ready to be trained."""
    from stages.engine.scorer import Scorer  # brings transformers' modelling code

    adapted = None
    if world.sharded:
        model, adapted, scorer = load_sharded(job, world, say)
    else:
        model = load_model(job.source, job.compute)
        if job.adapter.name != "none":
            adapted = attach_adapter(model, job.adapter, job.settings.seed, job.source)
        settings = job.settings
        scorer = Scorer(model, job.compute, say, settings.gradient_checkpointing, settings.activation_offload)
        if adapted is not None and job.compute.dtype == torch.bfloat16:
            halve_frozen_weights(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trainable(job.source, model, adapted, scorer, parameters, world)


def _whole(config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A model on the CPU around gathered tensors, so that it is saved as an unsharded one is."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # A copy: the attention that is named here is written into the configuration, which the policy lives by.
        model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="sdpa")
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model
