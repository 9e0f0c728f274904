"""What identifies a model: everything that its log-probs and completions depend on, and nothing else."""

import hashlib
from pathlib import Path
from typing import Any

from cache.artifacts import MANIFEST, open_artifact
from cache.errors import DataError, StaleError
from cache.files import read_json
from cache.fingerprint import differing_fields
from cache.safetensors import CONFIG, tensors_fingerprint, weights_fingerprint
from stages.models.adapters import WEIGHTS, adapter_config, base_of, is_adapter
from stages.models.loading import ModelSource, read_config
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
# Keys of adapter_config.json that do not change a forward pass.
ADAPTER_PROVENANCE = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "auto_mapping",
    "lora_dropout",
    "init_lora_weights",
)
# Beside the weights in a checkpoint of a run.
TRAINING_STATE = "state.json"


def architecture(source: ModelSource) -> dict[str, Any]:
    """The part of config.json that changes a forward pass; with the digest of the model's own code if that may run."""
    config = read_config(source.folder)
    found = {
        key: value
        for key, value in config.items()
        if key not in PROVENANCE_KEYS and not key.endswith("_token_id")
    }
    if source.runs_code and "auto_map" in config:
        found["code"] = _code_sha256(source.folder, config["auto_map"])
    return found


def reference_identity(source: ModelSource, compute: Compute) -> dict[str, Any]:
    """All that a reference log-prob depends on besides the token ids of its row. Reads and hashes all weights."""
    return {
        "weights": weights_fingerprint(source.folder),
        "architecture": architecture(source),
        "dtype": compute.arithmetic,
        "scorer_version": SCORER_VERSION,
    }


def model_identity(source: ModelSource) -> dict[str, Any]:
    """What the logits of a model depend on; for an adapter that of its base, its own weights, and its configuration.

    Raises `StaleError` for an adapter whose base is not the one that it was trained on.
    """
    if not is_adapter(source.folder):
        return {"weights": weights_fingerprint(source.folder), "architecture": architecture(source)}
    base = model_identity(base_of(source))
    _compare_base(source, base)
    if not (source.folder / WEIGHTS).is_file():
        raise DataError(f"{source.folder} holds no {WEIGHTS}. Save the adapter again, as safetensors.")
    config = adapter_config(source.folder)
    return {
        "base": base,
        "adapter": tensors_fingerprint([source.folder / WEIGHTS]),
        "config": {key: value for key, value in config.items() if key not in ADAPTER_PROVENANCE},
    }


def check_base(source: ModelSource) -> None:
    """Raise `StaleError` for an adapter whose base is not the one that it was trained on."""
    if is_adapter(source.folder) and _start(source.folder) is not None:
        _compare_base(source, model_identity(base_of(source)))


def _compare_base(adapter: ModelSource, base: dict[str, Any]) -> None:
    start = _start(adapter.folder)
    fields = differing_fields({name: start.get(name) for name in base}, base) if start else []
    if fields:
        raise StaleError(
            f"{adapter.folder} was trained on {base_of(adapter).name}, which has changed since: {'; '.join(fields)}. "
            f"Put that model back, or train the adapter again."
        )


def _start(folder: Path) -> dict[str, Any] | None:
    """The identity of the weights that the policy or checkpoint in a folder was trained from; None in other folders."""
    if (folder / MANIFEST).is_file():
        return open_artifact(folder).manifest["identity"].get("start")
    state = read_json(folder / TRAINING_STATE) if (folder / TRAINING_STATE).is_file() else {}
    return (state.get("identity") or {}).get("start")


def _code_sha256(folder: Path, auto_map: Any) -> str:
    if "--" in str(auto_map):
        raise DataError(
            f"{folder / CONFIG}: auto_map names code in another repository, which may change there. Copy that code into "
            f"{folder}, and leave the repository and -- out of auto_map."
        )
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(
            hashlib.sha256(path.name.encode()).digest() + hashlib.sha256(path.read_bytes()).digest()
        )
    return digest.hexdigest()
