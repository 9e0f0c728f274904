"""FSDP2: a policy whose weights, gradients and optimizer state are sharded over the ranks.

In: a `Job` and several ranks.  Out: the model and its `Scorer`, sharded layer by layer (`fully_shard`).

Shards and reductions are float32; layers compute in the dtype of the configuration. Only the first rank reads the
model, on the CPU; each other rank receives its own shards. Every forward pass takes all ranks, which
`RowScorer.padding_packs` ensures.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cache.errors import UsageError
from stages.data.rows import RowSet
from stages.models.adapters import attach_adapter
from stages.models.loading import load_model, model_of_shapes
from stages.runtime.compute import Compute
from stages.runtime.distributed import World
from stages.train.job import Job
from stages.train.shards import read_shards, write_shards

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer


def load_sharded(job: Job, world: World, log: Callable[[str], None]) -> tuple[Any, Any | None, "Scorer"]:
    """The model, peft's wrapper (or None) and the scorer, with this rank's shards of the starting weights.

    Raises `UsageError` for a model that cannot be scored in packs.
    """
    from stages.engine.scorer import Scorer
    from stages.engine.self_check import Way

    settings = job.settings
    whole, ways = None, [Way()]
    if world.is_main:
        on_cpu = Compute(torch.device("cpu"), torch.float32, job.compute.tokens_per_batch)
        whole, _ = _with_adapter(job, load_model(job.source, on_cpu))
        ways = [Scorer(whole, on_cpu, log, settings.gradient_checkpointing).way]
    dist.broadcast_object_list(ways, src=0)
    way = ways[0]
    if way.backend is None or (way.longest is not None and way.longest < _longest_row(job)):
        raise UsageError(
            f"{job.source.name} is not scored in packs, and ranks cannot score padded batches or single rows in step with each "
            f"other. Use --set train.parallel=ddp."
        )
    shapes = model_of_shapes(job.source, attn_implementation="sdpa", dtype=torch.float32)
    model, adapted = _with_adapter(job, shapes)
    scorer = Scorer(
        model,
        job.compute,
        log,
        settings.gradient_checkpointing,
        settings.activation_offload,
        checked=way,
    )
    _shard(scorer, job.compute)
    scorer.to_empty(device=job.compute.device)
    _receive(scorer, whole, model)
    return model, adapted, scorer


def full_state(scorer: "Scorer", trained_only: bool) -> dict[str, Any]:
    """The gathered tensors by their names in the model, on the first rank's CPU; empty on the others. Every rank calls."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return {
        name.removeprefix("model."): value
        for name, value in get_model_state_dict(scorer, options=options).items()
    }


def save_shards(
    scorer: "Scorer", optimizer: torch.optim.Optimizer, folder: Path, trained_only: bool, world: World
) -> None:
    """Write this rank's shards of weights and optimizer into `folder`."""
    write_shards(_sharded_state(scorer, optimizer, trained_only), folder, world)


def load_shards(
    scorer: "Scorer", optimizer: torch.optim.Optimizer, folder: Path, trained_only: bool, world: World
) -> None:
    """Load weights and optimizer from `folder`; any number of ranks may have written it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state = _sharded_state(scorer, optimizer, trained_only)
    read_shards(state, folder, world)
    set_state_dict(
        scorer,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=not trained_only),
    )


def _sharded_state(scorer: "Scorer", optimizer: torch.optim.Optimizer, trained_only: bool) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optimizer_state = get_state_dict(
        scorer, optimizer, options=StateDictOptions(ignore_frozen_params=trained_only)
    )
    return {"model": model, "optimizer": optimizer_state}


def _longest_row(job: Job) -> int:
    """Tokens of the longest prompt and completion together that this run scores."""
    row_sets = [RowSet.of(job.rows, split) for split in ("train", "heldout")]
    row_sets += [RowSet.of(rows, "train") for rows in job.eval_sets.values()]
    return max(rows.max_length() for rows in row_sets)


def _with_adapter(job: Job, model: Any) -> tuple[Any, Any | None]:
    if job.adapter.name == "none":
        return model, None
    return model, attach_adapter(model, job.adapter, job.settings.seed, job.source)


def _shard(scorer: "Scorer", compute: Compute) -> None:
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    from stages.engine.compiled_layers import decoder_layers

    # Inputs are not cast: the residual stream stays float32 under autocast, as it does without sharding.
    in_layers = MixedPrecisionPolicy(
        param_dtype=compute.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in decoder_layers(scorer.model):
        fully_shard(layer, mp_policy=in_layers)
    # Embedding, last norm and output layer are one group of the scorer itself, so they are whole while the scorer runs:
    # it reads the weight of the output layer outside of that layer's forward.
    fully_shard(scorer, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(scorer, "in_generation_mode")
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the units of the whole step, so gradients are summed over ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has


def _receive(scorer: "Scorer", whole: Any | None, model: Any) -> None:
    """Fill the shards and the buffers with those of `whole`, which the first rank has read."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state = {} if whole is None else {f"model.{name}": value for name, value in whole.state_dict().items()}
    set_model_state_dict(
        scorer, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    model.tie_weights()
    buffers = {} if whole is None else dict(whole.named_buffers())
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
