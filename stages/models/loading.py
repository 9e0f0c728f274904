"""Finds and loads models and tokenizers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import DataError, MachineError, UsageError
from cache.safetensors import ADAPTER_CONFIG, CONFIG
from stages.runtime.compute import Compute

if TYPE_CHECKING:
    import torch

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
# A folder with none of these gets an empty tokenizer from transformers.
TEKKEN = "tekken.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", TEKKEN)


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine, the user's name for it, and the revision if it is from the hub.

    `runs_code`: whether Python code that the model brings may run (`compute.trust_remote_code`).
    """

    name: str
    folder: Path
    is_on_hub: bool = False
    revision: str | None = None
    runs_code: bool = False

    @property
    def short_name(self) -> str:
        """The last part of the name, for folder names."""
        return self.name.rstrip("/").split("/")[-1]


def resolve_model(
    name: str, revision: str | None, or_adapter: bool = False, runs_code: bool = False
) -> ModelSource:
    """Find a local model folder, or download a hub model; raises `AlignError` if neither exists.

    With `or_adapter`, the folder of an adapter is accepted too.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file() and (path / ADAPTER_CONFIG).is_file():
            if or_adapter:
                return ModelSource(name, path, runs_code=runs_code)
            raise UsageError(
                f"{path} holds an adapter, not a model. Merge it with its base by `align merge` and the configuration "
                f"that trained it, and give the folder that the command names."
            )
        if not (path / CONFIG).is_file():
            raise DataError(
                f"{path} is not a model folder: config.json is missing. Give a folder written by save_pretrained."
            )
        return ModelSource(name, path, runs_code=runs_code)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(
            f"The model folder {name} does not exist. Give a folder or a hub name with --set policy.model=NAME."
        )
    return _download(name, revision, runs_code)


def _download(name: str, revision: str | None, runs_code: bool) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_FILES, *(["*.py"] if runs_code else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        return ModelSource(name, folder, True, revision, runs_code)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error).rstrip(".")
        raise MachineError(
            f"Model {name!r} is neither a local folder nor reachable on the hub ({reason}). "
            f"Check the name, the network and `hf auth login`, or give a folder."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, with NaN and infinities as texts; raises `DataError` if it is not an object in JSON."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes(), parse_constant=str)
        problem = "" if isinstance(config, dict) else f"it holds a {type(config).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        config, problem = {}, first_line(error)
    if problem:
        raise DataError(
            f"{path} is not the configuration of a model ({problem}). Download or save the model again."
        )
    return config


def open_config(source: ModelSource) -> Any:
    """transformers' configuration of a model; raises `DataError` if transformers does not take it."""
    from transformers import AutoConfig

    read_config(source.folder)
    return _opened(source, CONFIG, lambda: AutoConfig.from_pretrained(source.folder, **trust(source)))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))


def load_tokenizer(source: ModelSource) -> Any:
    """The fast tokenizer of the model; raises `DataError` if the folder has none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not has_tokenizer(source.folder):
        raise DataError(
            f"{source.folder} has no usable tokenizer (no tokenizer.json). Write one there by save_pretrained."
        )
    opener: Any = AutoTokenizer
    if (source.folder / TEKKEN).is_file():
        if not (source.folder / "tokenizer.json").is_file():
            raise DataError(
                f"{source.folder} has Mistral's {TEKKEN} and no tokenizer.json, which align reads. Put the tokenizer.json, tokenizer_config.json and chat template of a copy for transformers there."
            )
        # Where mistral-common is installed, AutoTokenizer gives another class, without a chat template.
        opener = PreTrainedTokenizerFast
    return _opened(source, "tokenizer", lambda: opener.from_pretrained(source.folder, **trust(source)))


def model_of_shapes(source: ModelSource, config: Any = None, **options: Any) -> Any:
    """The model on torch's meta device: modules and shapes, without memory or weights. `config` is the source's own, or changed."""
    import torch
    from transformers import AutoModelForCausalLM

    config = open_config(source) if config is None else config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **trust(source), **options)


def load_model(source: ModelSource, compute: Compute) -> Any:
    """The causal language model on the device, with float32 weights; autocast makes its forward pass bfloat16.

    With `compute.load_in_4bit` all linear layers but the output layer are frozen in 4 bits. Raises `DataError` for a
    model that transformers does not load, or of which weights are missing.
    """
    import torch
    from transformers.utils import logging

    open_config(source)
    if compute.load_in_4bit:
        return _load_in_4bit(source, compute)
    logging.disable_progress_bar()  # align shows a progress bar of its own
    model = load_weights(source, torch.float32)
    torch.nn.Module.to(model, compute.device)
    return model


def load_weights(
    source: ModelSource, dtype: "torch.dtype", kind: str = "AutoModelForCausalLM", **options: Any
) -> Any:
    """A model on the CPU with torch's attention, or with its own if it has no other.

    `kind` is the class of transformers that loads it, `options` are further arguments of `from_pretrained`. Raises `DataError` as `load_model` does.
    """
    model, found = _read_weights(source, dtype, kind, options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(
            f"{source.folder} lacks weights that the model has: {', '.join(missing[:3])}{', ...' if missing[3:] else ''} "
            f"({len(missing):,}), which would be random. Download or save the model again."
        )
    return model


def _read_weights(source: ModelSource, dtype: "torch.dtype", kind: str, options: dict[str, Any]) -> Any:
    """The model, and transformers' report on its weights."""
    import transformers
    from safetensors import SafetensorError

    def load(**attention: str) -> Any:
        return getattr(transformers, kind).from_pretrained(
            source.folder,
            dtype=dtype,
            output_loading_info=True,
            **trust(source),
            **options,
            **attention,
        )

    try:
        try:
            return load(attn_implementation="sdpa")
        except (ValueError, ImportError):
            return load()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _unusable(source, "model", error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # such as too little memory
            raise
        raise DataError(
            f"{source.folder} has weights of other shapes than its config.json says. Download or save the model again."
        ) from error


def _load_in_4bit(source: ModelSource, compute: Compute) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute.dtype,
    )
    on_device = {"": compute.device}
    model = load_weights(source, torch.float32, quantization_config=quantization, device_map=on_device)
    for module in model.modules():
        # On a CPU, bitsandbytes 0.50 repacks the weights of a layer at its first call without gradients. The kernel for
        # repacked weights computes in bfloat16 and passes wrong gradients to an adapter behind it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - Module declares its attributes as tensors
    return model


def trust(source: ModelSource) -> dict[str, bool]:
    """The argument of transformers that allows a model's own code, or not; without it transformers asks on stdin."""
    return {"trust_remote_code": source.runs_code}


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _opened(source: ModelSource, what: str, load: Callable[[], Any]) -> Any:
    """What `load` returns; its errors as a `DataError`."""
    try:
        return load()
    except (
        Exception
    ) as error:  # the classes of transformers raise whatever the content of the files makes them raise
        raise _unusable(source, what, error) from error


def _unusable(source: ModelSource, what: str, error: Exception) -> DataError:
    """The error for something in a model folder that transformers refuses, in particular as code is not to run."""
    if "custom code" in str(error) and not source.runs_code:
        return DataError(
            f"{source.name} brings Python code of its own (auto_map), which is not run. Read it in {source.folder}, and "
            f"allow it for this run with --set compute.trust_remote_code=true, or use another model."
        )
    return DataError(
        f"{source.folder} has no usable {what} ({first_line(error)}). Download the model again, or write it there by "
        f"save_pretrained."
    )
