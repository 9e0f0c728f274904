"""Finds, identifies and loads models and tokenizers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError, UsageError
from cache.safetensors import weights_fingerprint
from stages.runtime.compute import SCORER_VERSION, Compute

# Keys of config.json that do not change a forward pass; those that end in `_token_id` do not either.
PROVENANCE_KEYS = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "architectures",
    "_attn_implementation",
)


@dataclass(frozen=True)
class Place:
    """Where a model is: its folder on this machine, None if that is gone, and what identifies the place, whoever names it."""

    identity: dict[str, str | None]
    folder: Path | None


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine, the user's name for it, and the revision if it is from the hub."""

    name: str
    folder: Path
    is_on_hub: bool = False
    revision: str | None = None

    @property
    def short_name(self) -> str:
        """The last part of the name, for folder names."""
        return self.name.rstrip("/").split("/")[-1]

    @property
    def place(self) -> Place:
        """Where this model is today."""
        return _on_hub(self.name, self.revision, self.folder) if self.is_on_hub else _local(self.folder)


def resolve_model(name: str, revision: str | None, or_adapter: bool = False) -> ModelSource:
    """Find a local model folder, or download a hub model; raises `AlignError` if neither exists.

    With `or_adapter`, the folder of an adapter is accepted too.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
            if or_adapter:
                return ModelSource(name, path)
            raise UsageError(
                f"{path} holds an adapter, not a model. Merge it with its base by `align merge` and the configuration "
                f"that trained it, and give the folder that the command names."
            )
        if not (path / "config.json").is_file():
            raise DataError(
                f"{path} is not a model folder: config.json is missing. Give a folder written by save_pretrained."
            )
        return ModelSource(name, path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(
            f"The model folder {name} does not exist. Give a folder or a hub name with --set policy.model=NAME."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        return ModelSource(name, folder, is_on_hub=True, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MachineError(
            f"Model {name!r} is neither a local folder nor reachable on the hub ({reason}). "
            f"Check the name, the network and `hf auth login`, or give a folder."
        ) from error


def places_of(name: str, revision: str | None) -> list[Place]:
    """The places that a name may mean today, as `resolve_model` finds them, but without a network.

    The folder may be gone; then the name may also be one of the hub, whose copy on this machine may be gone, too.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return [_local(folder)]
    from huggingface_hub import snapshot_download

    try:
        copy = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # no copy, or no name of the hub
        copy = None
    return [_local(folder), _on_hub(name, revision, copy)]


def _local(folder: Path) -> Place:
    """The place of a folder itself, with no symbolic link in its path."""
    return Place({"folder": str(folder.resolve())}, folder if folder.is_dir() else None)


def _on_hub(name: str, revision: str | None, folder: Path | None) -> Place:
    return Place({"hub": name, "revision": revision}, folder)


def architecture(folder: Path) -> dict[str, Any]:
    """The part of config.json that changes a forward pass."""
    config = json.loads((folder / "config.json").read_bytes())
    return {
        key: value
        for key, value in config.items()
        if key not in PROVENANCE_KEYS and not key.endswith("_token_id")
    }


def reference_identity(source: ModelSource, compute: Compute) -> dict[str, Any]:
    """All that a reference log-prob depends on besides the token ids of its row. Reads and hashes all weights."""
    return {
        "weights": weights_fingerprint(source.folder),
        "architecture": architecture(source.folder),
        "dtype": compute.arithmetic,
        "scorer_version": SCORER_VERSION,
    }


def load_tokenizer(source: ModelSource) -> Any:
    """The fast tokenizer of the model; raises `DataError` if the folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{source.folder} has no usable tokenizer ({str(error).splitlines()[0]}). Write one there by save_pretrained."
        ) from error


def load_model(source: ModelSource, compute: Compute) -> Any:
    """The causal language model on the device, with float32 weights; autocast makes its forward pass bfloat16.

    With `compute.load_in_4bit` all linear layers but the output layer are frozen in 4 bits.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if compute.load_in_4bit:
        return _load_in_4bit(source, compute)
    logging.disable_progress_bar()  # align shows a progress bar of its own
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=torch.float32, attn_implementation="sdpa"
        )
    except (ValueError, ImportError):
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    except OSError as error:
        raise DataError(f"{source.folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    torch.nn.Module.to(model, compute.device)
    return model


def _load_in_4bit(source: ModelSource, compute: Compute) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute.dtype,
        ),
        device_map={"": compute.device},
    )
    for module in model.modules():
        # On a CPU, bitsandbytes 0.50 repacks the weights of a layer at its first call without gradients. The kernel for
        # repacked weights computes in bfloat16 and passes wrong gradients to an adapter behind it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - Module declares its attributes as tensors
    return model


def check_length(folder: Path, longest: int) -> None:
    """Raise `UsageError` if the longest row, in tokens, exceeds the positions of the model."""
    limit = architecture(folder).get("max_position_embeddings")
    if isinstance(limit, int) and longest > limit:
        raise UsageError(
            f"The longest row has {longest} tokens, and {folder.name} has {limit} positions. "
            f"Prepare again with --set prepare.max_length={limit}."
        )
