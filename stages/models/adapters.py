"""Low-rank adapters through peft: LoRA, DoRA, and over a 4-bit base QLoRA.

In: a loaded model and the `adapter` block.  Out: the same model with small trainable matrices beside its
frozen ones, and on disk a folder in peft's own format that names its base model.

The matrices are put into the model itself, so the scoring engine sees the model it always sees. B starts
at zero, so a fresh adapter changes no log-prob: it has the reference store of its base, to the bit. There
is no dropout: a policy scored with noise has neither an exact step 0 nor an exact resume.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError, UsageError
from cache.safetensors import weights_fingerprint
from stages.models.loading import ModelSource, load_model, resolve_model
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Of adapter_config.json, what changes a forward pass.
IDENTITY_KEYS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules")


def check_adapter(settings: AdapterSettings, source: ModelSource) -> None:
    """Raise before anything is loaded: `MachineError` without peft, `UsageError` for modules that are not there."""
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
            f"adapter.target_modules: {str(error).splitlines()[0][:200]} The matrices of {source.name}: {', '.join(linear)}."
        ) from error


def attach_adapter(model: Any, settings: AdapterSettings, seed: int, source: ModelSource) -> Any:
    """Put a fresh adapter into `model`, freeze the rest, and return peft's wrapper around the same modules.

    A is drawn from `seed`, B is zero. Raises `ValueError` when no module has a wanted name.
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
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
    written = adapted.peft_config["default"]
    written.base_model_name_or_path = source.name if source.is_on_hub else str(source.folder.resolve())
    written.revision = source.revision
    return adapted


def save_adapter(adapted: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; `state` replaces the model's own tensors."""
    # False: "auto" would ask the hub about the base model.
    adapted.save_pretrained(folder, save_embedding_layers=False, **({"state_dict": state} if state else {}))
    (folder / "README.md").unlink(missing_ok=True)  # peft's card is a form to fill in
    (folder / CONFIG).write_text(_sorted_targets((folder / CONFIG).read_text()), encoding="utf-8")


def load_adapter(model: Any, folder: Path) -> Any:
    """Put a saved adapter into its loaded base model and return peft's wrapper."""
    require_peft()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def load_any(source: ModelSource, compute: Compute) -> Any:
    """A model folder's model, or an adapter's base with the adapter in it."""
    if not is_adapter(source.folder):
        return load_model(source, compute)
    return load_adapter(load_model(base_of(source.folder), compute), source.folder).get_base_model()


def load_adapter_weights(adapted: Any, folder: Path) -> None:
    """Put the tensors of a saved adapter into one of the same shape that is attached already."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))


def halve_frozen_weights(model: Any) -> None:
    """Store frozen linear layers in bfloat16: under bfloat16 autocast the same numbers to the bit, half the memory.

    Embeddings, and an output layer tied to them, stay float32: they are read outside autocast.
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
    """What peft wrote about an adapter; raises `DataError` when that is not readable."""
    try:
        return json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise DataError(
            f"{folder / CONFIG} is not readable JSON ({error}); save the adapter again."
        ) from error


def base_of(folder: Path) -> ModelSource:
    """The base model that an adapter names; raises `AlignError` when it is nowhere to be found."""
    config = adapter_config(folder)
    try:
        return resolve_model(config["base_model_name_or_path"], config.get("revision"))
    except DataError as error:
        raise DataError(
            f"The adapter in {folder} was trained on {config['base_model_name_or_path']}, which is not there. "
            f"Put the model back, or mend base_model_name_or_path in {folder / CONFIG}."
        ) from error


def model_identity(folder: Path) -> Any:
    """Content of a model folder; for an adapter that of its base, its own weights and their scaling."""
    if not is_adapter(folder):
        return weights_fingerprint(folder)
    config = adapter_config(folder)
    return {
        "base": weights_fingerprint(base_of(folder).folder),
        "adapter": weights_fingerprint(folder),
        "config": {key: config.get(key) for key in IDENTITY_KEYS},
    }


def require_peft() -> None:
    """Raise `MachineError` where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MachineError(
            "Adapters need peft, which is not installed. Install it with: pip install -e '.[peft]'"
        )


def _sorted_targets(text: str) -> str:
    """peft keeps `target_modules` as a set, whose order changes from process to process."""
    config = json.loads(text)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
