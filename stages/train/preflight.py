"""Training settings that cannot work together, or not on this machine: refused before anything is loaded."""

from cache.errors import MachineError, UsageError
from stages.models.adapters import check_adapter
from stages.runtime.compute import require_bitsandbytes
from stages.train.job import Job
from stages.train.optimizers import NEEDS_BITSANDBYTES, NOT_SHARDED


def check_feasible(job: Job) -> None:
    """Raise `UsageError` or `MachineError` with what to change."""
    settings, compute = job.settings, job.compute
    sharded = settings.parallel == "fsdp"
    if compute.load_in_4bit and job.adapter.name == "none":
        raise UsageError(
            "compute.load_in_4bit freezes the model's own weights, so there is nothing to train. "
            "Train an adapter with --set adapter.name=lora, or leave the weights whole."
        )
    if sharded and compute.load_in_4bit:
        raise UsageError(
            "train.parallel=fsdp cannot shard 4-bit weights. Use --set train.parallel=ddp: the 4-bit model is small."
        )
    if settings.optimizer in NEEDS_BITSANDBYTES:
        require_bitsandbytes(f"train.optimizer={settings.optimizer}")
    if sharded and settings.optimizer in NOT_SHARDED:
        raise UsageError(
            f"train.optimizer={settings.optimizer} cannot keep sharded state. With train.parallel=fsdp use adamw or "
            f"adamw_bf16."
        )
    if settings.optimizer == "paged_adamw_8bit" and compute.device.type != "cuda":
        raise MachineError(
            "train.optimizer=paged_adamw_8bit pages between a GPU and the host, and there is no GPU. Use adamw_8bit."
        )
    if settings.activation_offload and compute.device.type != "cuda":
        raise MachineError(
            f"train.activation_offload moves activations off a GPU, and compute.device is {compute.device.type}. "
            f"Leave it out."
        )
    check_adapter(job.adapter, job.source)
