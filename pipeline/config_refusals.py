"""Keys and values that no configuration may hold: unknown keys, secrets, a reference that moves."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from pydantic import BaseModel

from cache.errors import UsageError
from stages.losses import LOSSES
from stages.settings.fields import Settings

SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_key)(_|$)", re.IGNORECASE)
# User and password, or a token, inside a URL.
URL_WITH_SECRET = re.compile(r"://[^/\s]*:[^/\s]*@")
# What other trainers call a reference that follows the policy (TR-DPO).
MOVING_REFERENCE = (
    "sync_ref_model",
    "ref_model_sync_steps",
    "ref_model_mixup_alpha",
    "tr_dpo",
    "trdpo",
    "tr-dpo",
)


def refuse(tree: Mapping[str, Any], schema: type[BaseModel]) -> None:
    """Raise `UsageError` for the first key or value of `tree` that a configuration of `schema` may not hold."""
    _refuse_urls_with_secrets(tree, "")
    _refuse_moving_reference(tree)
    _refuse_unknown_keys(tree, schema, "")


def _refuse_urls_with_secrets(value: Any, name: str) -> None:
    """The message does not repeat the value."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _refuse_urls_with_secrets(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and URL_WITH_SECRET.search(value):
        raise UsageError(
            f"{name}: a URL with a user and password in it would be saved with every result. Leave them out; log in "
            f"with `hf auth login` or set HF_TOKEN."
        )


def _refuse_moving_reference(tree: Mapping[str, Any]) -> None:
    blocks = [block for block in tree.values() if isinstance(block, Mapping)]
    names = [str(block["name"]) for block in blocks if isinstance(block.get("name"), str)]
    keys = [str(key) for block in (tree, *blocks) for key in block]
    found = next((word for word in keys + names if word.lower() in MOVING_REFERENCE), None)
    if found is not None:
        raise UsageError(
            f"{found}: a reference that follows the policy while it trains (TR-DPO, arXiv 2404.09656) has no log-probs "
            f"that could be cached. Move it between rounds instead: train, then go on from the result with "
            f"--set policy.model=POLICY (reference.model unset follows it), on new samples or the same rows: "
            f"align prepare, cache-ref, train."
        )


def _refuse_unknown_keys(tree: Mapping[str, Any], schema: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in schema.model_fields:
            raise _unknown_key(str(key), schema, prefix)
        kind = schema.model_fields[key].annotation
        if _is_block(kind):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{name}: expected a block of keys ({', '.join(kind.model_fields)}), found {value!r}."
                )
            _refuse_unknown_keys(value, kind, f"{name}.")
        elif key == "loss" and not isinstance(value, Mapping):
            raise UsageError(
                f"loss: expected a block with a name (one of {', '.join(LOSSES)}), found {value!r}."
            )


def _unknown_key(key: str, schema: type[BaseModel], prefix: str) -> UsageError:
    """An error that names the nearest known key; for a key that would hold a secret, where that belongs."""
    if SECRET_KEY.search(key):
        return UsageError(
            f"{prefix}{key}: secrets do not belong in a configuration. Log in with `hf auth login` or `wandb login`, "
            f"or set HF_TOKEN or WANDB_API_KEY."
        )
    known = list(schema.model_fields) if prefix else _dotted_keys(schema)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known keys: {', '.join(schema.model_fields)}."
    return UsageError(f"Unknown configuration key {prefix + key!r}. {hint}")


def _dotted_keys(schema: type[BaseModel]) -> list[str]:
    """Block names and dotted keys."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(name)
        if _is_block(field.annotation):
            keys += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    return keys


def _is_block(kind: Any) -> TypeGuard[type[Settings]]:
    return isinstance(kind, type) and issubclass(kind, Settings)
