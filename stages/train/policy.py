"""The policy in training: all weights or an adapter, whole on every rank (DDP) or sharded over the ranks (FSDP).

In: a `Job`.  Out: a `Trainable`, which hides these four cases from the training loop: it has parameters, it scores
packs, its gradients are summed and clipped, and it is written as a Hugging Face or peft folder with the same files in
each case.
"""

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache.errors import CorruptError, StaleError
from stages.models.adapters import attach_adapter, halve_frozen_weights, load_adapter_weights, save_adapter
from stages.models.chat_files import ChatFiles, ChatFormat
from stages.models.loading import ModelSource, first_line, load_model, model_of_shapes
from stages.runtime.compute import Compute
from stages.runtime.distributed import World
from stages.train.fsdp import full_state, load_sharded, load_shards, save_shards
from stages.train.job import Job
from stages.train.shards import are_shards

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer

OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class Trainable:
    """A policy in training. `adapted` is peft's wrapper around `model`; None if all weights are trained.

    `chat_files` say how the rows were written; they are published with the policy.
    """

    source: ModelSource
    chat_files: ChatFiles
    model: Any
    adapted: Any | None
    scorer: "Scorer"
    parameters: list[torch.nn.Parameter]
    world: World

    def sum_gradients(self) -> None:
        """Sum the gradients over all ranks."""
        # A sharded model has done so in its backward pass.
        if not self.world.sharded:
            self.world.sum_gradients(self.parameters)

    def clip_gradients(self, max_norm: float) -> float:
        """Clip the gradient to `max_norm` (0: do not clip); return its norm before, which is the same on every rank."""
        from torch.distributed.tensor import DTensor

        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def save(self, folder: Path) -> None:
        """Write the policy and its tokenizer. Every rank calls this; the first rank writes."""
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
            _unsharded(self.source, self.model.config, state).save_pretrained(folder)
        self.chat_files.write(folder)

    def save_state(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Write weights and optimizer into the folder of a checkpoint, for `load_state`. Every rank calls this.

        Weights are written as by `save`, so a checkpoint is also a model folder. A sharded policy writes its shards of
        weights and optimizer besides, so that each rank reads only its own part.
        """
        self.save(folder)
        if self.world.sharded:
            save_shards(self.scorer, optimizer, folder, self.adapted is not None, self.world)
        elif self.world.is_main:
            torch.save(optimizer.state_dict(), folder / OPTIMIZER)

    def load_state(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Load weights and optimizer as `save_state` wrote them. Every rank calls this.

        Raises `StaleError` for a checkpoint that was written with the other `train.parallel`.
        """
        if (sharded := are_shards(folder)) != self.world.sharded:
            written, wanted = ("fsdp", "ddp") if sharded else ("ddp", "fsdp")
            raise StaleError(
                f"{folder} was written with train.parallel={written}, and this run has {wanted}. Continue it with "
                f"--set train.parallel={written}, on any number of ranks."
            )
        with _own_hyperparameters(optimizer):
            self._load(folder, optimizer)

    def _load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        if self.world.sharded:
            load_shards(self.scorer, optimizer, folder, self.adapted is not None, self.world)
            return
        if self.adapted is not None:
            load_adapter_weights(self.adapted, folder)
        else:
            on_cpu = Compute(torch.device("cpu"), torch.float32, self.scorer.compute.tokens_per_batch)
            self.model.load_state_dict(load_model(replace(self.source, folder=folder), on_cpu).state_dict())
        optimizer.load_state_dict(_numbers(folder / OPTIMIZER))


def _numbers(path: Path) -> dict[str, Any]:
    """The state of an optimizer; raises `CorruptError` for a file that holds anything but tensors and numbers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CorruptError(
            f"{path} is not the state of an optimizer ({first_line(error)[:120]}). Delete that checkpoint's folder."
        ) from error


@contextmanager
def _own_hyperparameters(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the context the optimizer may take over the state of another run, but not its weight decay, betas and so on.

    They are settings, and with `train.resume_override` they may differ from those of the run that is continued.
    """
    own = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    yield
    for group, hyperparameters in zip(optimizer.param_groups, own, strict=True):
        group.update(hyperparameters)


def load_trainable(job: Job, world: World, log: Callable[[str], None]) -> Trainable:
    """Load the starting weights, with a new adapter if the job has one."""
    from stages.engine.scorer import Scorer  # imports transformers' modelling code

    adapted = None
    if world.sharded:
        model, adapted, scorer = load_sharded(job, world, log)
    else:
        model = load_model(job.source, job.compute)
        if job.adapter.name != "none":
            adapted = attach_adapter(model, job.adapter, job.settings.seed, job.source)
        settings = job.settings
        scorer = Scorer(model, job.compute, log, settings.gradient_checkpointing, settings.activation_offload)
        if adapted is not None and job.compute.dtype == torch.bfloat16:
            halve_frozen_weights(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chat_files = ChatFiles(job.source, ChatFormat.of(job.rows))
    return Trainable(job.source, chat_files, model, adapted, scorer, parameters, world)


def _unsharded(source: ModelSource, config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A model on the CPU with the gathered tensors, which is saved as one that was never sharded."""
    # A copy, because `attn_implementation` is written into the configuration, which the policy shares.
    model = model_of_shapes(source, deepcopy(config), attn_implementation="sdpa")
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model
