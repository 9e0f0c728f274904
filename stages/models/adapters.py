"""Low-rank adapters through peft: LoRA, DoRA, and QLoRA over a base in 4 bits.

In: a loaded model and the block `adapter`.  Out: the same model with small trainable matrices besides its frozen ones,
and on disk a folder in peft's format that names its base model. The matrix B starts at 0, so a new adapter changes no
log-prob, and the reference log-probs of its base are its own at step 0, to the bit.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError, UsageError
from cache.safetensors import tensors_fingerprint, weights_fingerprint
from stages.models.loading import ModelSource, load_model, resolve_model
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Keys of adapter_config.json that change a forward pass.
IDENTITY_KEYS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules")


def check_adapter(settings: AdapterSettings, source: ModelSource) -> None:
    """Raise `MachineError` if peft is missing, `UsageError` if the model lacks a target module; loads no weights."""
    if settings.name == "none":
        return
    require_peft()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.folder))
    try:
        attach_adapter(model, settings, 0, source)
    except ValueError as error:
        linear = sorted(
            {
                name.split(".")[-1]
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        )
        raise UsageError(
            f"adapter.target_modules: {str(error).splitlines()[0][:200]} The modules of {source.name}: {', '.join(linear)}."
        ) from error


def attach_adapter(model: Any, settings: AdapterSettings, seed: int, source: ModelSource) -> Any:
    """Put a new adapter into `model`, freeze all other weights, and return peft's wrapper around the same modules.

    A is drawn from `seed`, B is 0. Raises `ValueError` if no module has a name in `target_modules`.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=settings.name == "dora",
        use_rslora=settings.use_rslora,
        lora_dropout=0.0,  # with dropout, neither step 0 nor a resumed run would be exact
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
    written = adapted.peft_config["default"]
    written.base_model_name_or_path = source.name if source.is_on_hub else str(source.folder.resolve())
    written.revision = source.revision
    return adapted


def save_adapter(adapted: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; `state` replaces the tensors of the model."""
    # `save_embedding_layers` False, because "auto" would query the hub about the base model.
    adapted.save_pretrained(folder, save_embedding_layers=False, **({"state_dict": state} if state else {}))
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty template
    (folder / CONFIG).write_text(_sorted_targets((folder / CONFIG).read_text()), encoding="utf-8")


def load_adapter(model: Any, folder: Path) -> Any:
    """Put a saved adapter into its loaded base model and return peft's wrapper."""
    require_peft()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def load_any(source: ModelSource, compute: Compute) -> Any:
    """The model of a model folder; for the folder of an adapter its base with the adapter in it."""
    if not is_adapter(source.folder):
        return load_model(source, compute)
    return load_adapter(load_model(base_of(source.folder), compute), source.folder).get_base_model()


def load_adapter_weights(adapted: Any, folder: Path) -> None:
    """Load the tensors of a saved adapter into one of the same shape that is already attached."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))


def halve_frozen_weights(model: Any) -> None:
    """Store the frozen linear layers in bfloat16: half of the memory, and under bfloat16 autocast the same results to the bit.

    Embeddings, and an output layer tied to them, stay float32, because they are read outside of autocast.
    """
    import torch

    embedded = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if type(module) is torch.nn.Linear and id(module.weight) not in embedded:
            for parameter in module.parameters():
                if not parameter.requires_grad and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json; raises `DataError` if it is not JSON."""
    try:
        return json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise DataError(f"{folder / CONFIG} is not JSON ({error}). Save the adapter again.") from error


def base_of(folder: Path) -> ModelSource:
    """The base model that an adapter names; raises `AlignError` if it is not found."""
    config = adapter_config(folder)
    try:
        return resolve_model(config["base_model_name_or_path"], config.get("revision"))
    except DataError as error:
        raise DataError(
            f"The adapter in {folder} was trained on {config['base_model_name_or_path']}, which does not exist. "
            f"Put the model back, or correct base_model_name_or_path in {folder / CONFIG}."
        ) from error


def model_identity(folder: Path) -> Any:
    """Digest of the weights in a model folder; for an adapter, those of its base and its own, and its configuration."""
    if not is_adapter(folder):
        return weights_fingerprint(folder)
    config = adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise DataError(f"{folder} holds no {WEIGHTS}. Save the adapter again, as safetensors.")
    return {
        "base": weights_fingerprint(base_of(folder).folder),
        "adapter": tensors_fingerprint([folder / WEIGHTS]),
        "config": {key: config.get(key) for key in IDENTITY_KEYS},
    }


def require_peft() -> None:
    """Raise `MachineError` if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MachineError(
            "Adapters need peft, which is not installed. Install it with: pip install -e '.[peft]'"
        )


def _sorted_targets(text: str) -> str:
    """The text of adapter_config.json with `target_modules` sorted: peft writes a set, in an order that varies."""
    config = json.loads(text)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
