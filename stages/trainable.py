"""The policy while it is trained: what the loop needs of it, and how it is written and read back.

In: a `Job`.  Out: a `Trainable`: parameters, a scorer, gradients that are summed and clipped, a Hugging Face
folder of the policy, and the exact state of training beside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.compute import Compute
from stages.job import Job
from stages.models import ModelSource, load_model, load_tokenizer
from stages.parallel import World

if TYPE_CHECKING:
    from stages.scoring import Scorer

OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class Trainable:
    """A policy in training."""

    source: ModelSource
    model: Any
    scorer: "Scorer"
    parameters: list[torch.nn.Parameter]
    world: World

    def sum_gradients(self) -> None:
        """Add the gradients over all ranks."""
        self.world.sum_gradients(self.parameters)

    def clip_gradients(self, max_norm: float) -> float:
        """Norm of the whole gradient before it is clipped to `max_norm` (0: not clipped); the same on every rank."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf))

    def save(self, folder: Path) -> None:
        """Write the policy and its tokenizer as a Hugging Face folder; all ranks call, the first one writes."""
        if self.world.is_main:
            self.model.save_pretrained(folder)
            load_tokenizer(self.source).save_pretrained(folder)

    def save_state(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Write the policy and, beside it, the optimizer: all that `load_state` needs. All ranks call."""
        self.save(folder)
        if self.world.is_main:
            torch.save(optimizer.state_dict(), folder / OPTIMIZER)

    def load_state(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Put weights and optimizer back exactly as `save_state` found them."""
        on_cpu = Compute(torch.device("cpu"), torch.float32, self.scorer.compute.tokens_per_batch)
        saved = load_model(ModelSource(str(folder), folder), on_cpu)
        self.model.load_state_dict(saved.state_dict())
        del saved
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))


def load_trainable(job: Job, world: World, say: Callable[[str], None]) -> Trainable:
    """Load the starting weights, ready to be trained."""
    from stages.scoring import Scorer  # brings transformers' modelling code

    model = load_model(job.source, job.compute)
    scorer = Scorer(model, job.compute, say, job.settings.gradient_checkpointing)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trainable(job.source, model, scorer, parameters, world)
