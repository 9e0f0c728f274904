"""Low-rank adapters through peft: LoRA, DoRA, and QLoRA over a base in 4 bits.

In: a loaded model and the block `adapter`.  Out: the same model with small trainable matrices besides its frozen ones,
and on disk a folder in peft's format that names its base model. The matrix B starts at 0, so a new adapter changes no
log-prob, and the reference log-probs of its base are its own at step 0, to the bit.
"""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError, UsageError
from stages.models.loading import ModelSource, load_model, model_of_shapes, resolve_model
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def check_adapter(settings: AdapterSettings, source: ModelSource) -> None:
    """Raise `MachineError` if peft is missing, `UsageError` if the model lacks a target module; loads no weights."""
    if settings.name == "none":
        return
    require_peft()
    import torch

    model = model_of_shapes(source)
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

    A is drawn from `seed`, B is 0. Raises `ValueError` if no module has a name in `target_modules`, and `UsageError` for a
    module that shares its weight with another, or that DoRA would divide by zero.
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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")  # refused below
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
    _refuse_shared_weights(model)
    _refuse_rows_of_zeros(adapted)
    written = adapted.peft_config["default"]
    written.base_model_name_or_path = source.name if source.is_on_hub else str(source.folder.resolve())
    written.revision = source.revision
    return adapted


def _refuse_shared_weights(model: Any) -> None:
    """Raise `UsageError` if an adapted module shares its weight: merging would put the update into the other one, too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        if not name.endswith(".base_layer"):
            for parameter in _own(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module):
                holders.setdefault(id(parameter), set()).add(name)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            shared = set().union(*(holders[id(parameter)] for parameter in _own(module.get_base_layer())))
            if len(shared) > 1:
                raise UsageError(
                    f"adapter.target_modules: {' and '.join(sorted(shared))} are one matrix (tie_word_embeddings), so an adapter "
                    f"on one of them cannot be merged: it would change both. Leave {name.split('.')[-1]} out."
                )


def _own(module: Any) -> list[Any]:
    """The parameters of a module itself."""
    return list(module.parameters(recurse=False))


def _refuse_rows_of_zeros(adapted: Any) -> None:
    """Raise `UsageError` where DoRA, which divides each row of a weight by its norm, has a row of zeros."""
    for name, magnitude in adapted.named_parameters():
        layer, is_magnitude, _ = name.partition(".lora_magnitude_vector")
        # At the start the magnitudes are the norms. On the meta device there are none yet.
        zeros = int((magnitude == 0).sum()) if is_magnitude and not magnitude.is_meta else 0
        if zeros:
            raise UsageError(
                f"DoRA divides each row of a weight by its norm, and {layer.removeprefix('base_model.model.')} has {zeros} rows "
                f"of zeros (padded heads or tokens). Use --set adapter.name=lora, or leave that layer out of "
                f"adapter.target_modules."
            )


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
    return load_adapter(load_model(base_of(source), compute), source.folder).get_base_model()


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
    """The content of adapter_config.json; raises `DataError` if it is not an object in JSON."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        if isinstance(config, dict):
            return config
        problem = f"it holds a {type(config).__name__}"
    except ValueError as error:
        problem = str(error)
    raise DataError(
        f"{folder / CONFIG} is not the configuration of an adapter ({problem}). Save the adapter again."
    )


def base_of(adapter: ModelSource) -> ModelSource:
    """The base model that an adapter names; raises `AlignError` if it is not found."""
    config = adapter_config(adapter.folder)
    name = config.get("base_model_name_or_path")
    try:
        return resolve_model(str(name), config.get("revision"), runs_code=adapter.runs_code)
    except DataError as error:
        raise DataError(
            f"The adapter in {adapter.folder} was trained on {name}, which does not exist. "
            f"Put the model back, or correct base_model_name_or_path in {adapter.folder / CONFIG}."
        ) from error


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
