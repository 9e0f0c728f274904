"""Refuses what no configuration may hold: unknown keys, secrets, a reference that changes during training."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from pydantic import BaseModel

from cache.errors import UsageError
from stages.settings.fields import Settings

SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_key)(_|$)", re.IGNORECASE)
# In a URL: a user and password; over http anything before an @ (hosts take a token there); a parameter named as a secret.
URL_WITH_SECRET = re.compile(
    r"://[^/?#\s]*:[^/?#\s]*@"
    r"|https?://[^/?#\s]+@"
    r"|://\S*[?&#]([\w.-]*(token|secret|password|passwd|api[_-]?key|credential|signature)[\w.-]*|key|sig|auth)=[^&#\s]",
    re.IGNORECASE,
)
# Keys and names by which other trainers select a reference that follows the policy (TR-DPO).
MOVING_REFERENCE = (
    "sync_ref_model",
    "ref_model_sync_steps",
    "ref_model_mixup_alpha",
    "tr_dpo",
    "trdpo",
    "tr-dpo",
)


def refuse(tree: Mapping[str, Any], schema: type[BaseModel]) -> None:
    """Raise `UsageError` for the first key or value of `tree` that `schema` does not allow."""
    _refuse_urls_with_secrets(tree, "")
    _refuse_moving_reference(tree)
    _refuse_unknown_keys(tree, schema, "")


def _refuse_urls_with_secrets(value: Any, name: str) -> None:
    """The message leaves the value out, so that the secret does not reach a log."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _refuse_urls_with_secrets(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _refuse_urls_with_secrets(part, f"{name}[{number}]")
    elif isinstance(value, str):
        refuse_url_with_secret(value, name)


def refuse_url_with_secret(value: str, name: str) -> None:
    """Raise `UsageError` for a URL with a password or a token in it, which is not repeated."""
    if URL_WITH_SECRET.search(value):
        raise UsageError(
            f"{name}: the URL contains a password or a token, which would be saved with every artifact. Remove it and log "
            f"in with `hf auth login`, or set HF_TOKEN."
        )


def _refuse_moving_reference(tree: Mapping[str, Any]) -> None:
    blocks = [block for block in tree.values() if isinstance(block, Mapping)]
    names = [str(block["name"]) for block in blocks if isinstance(block.get("name"), str)]
    keys = [str(key) for block in (tree, *blocks) for key in block]
    found = next((word for word in keys + names if word.lower() in MOVING_REFERENCE), None)
    if found is not None:
        raise UsageError(
            f"{found}: a reference that follows the policy during training (TR-DPO, arXiv 2404.09656) has no log-probs "
            f"that could be cached. Update it between runs instead: train, then run align prepare, cache-ref and train "
            f"with --set policy.model=POLICY; the reference follows unless reference.model is set."
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
            from stages.losses import LOSSES  # imports torch

            raise UsageError(
                f"loss: expected a block with a name (one of {', '.join(LOSSES)}), found {value!r}."
            )


def _unknown_key(key: str, schema: type[BaseModel], prefix: str) -> UsageError:
    """The error for an unknown key: it names the nearest key or, for a secret, where that belongs."""
    if SECRET_KEY.search(key):
        return UsageError(
            f"{prefix}{key}: secrets do not belong in a configuration, which is saved with every artifact. Log in with `hf auth login` or `wandb login`, "
            f"or set HF_TOKEN or WANDB_API_KEY."
        )
    known = list(schema.model_fields) if prefix else _dotted_keys(schema)
    same = [] if prefix else [name for name in known if name.split(".")[-1] == key]
    near = [f"{prefix}{name}" for name in difflib.get_close_matches(key, known, n=1, cutoff=0.6)]
    meant = same or near
    hint = (
        f"Did you mean {' or '.join(meant)}?" if meant else f"Known keys: {', '.join(schema.model_fields)}."
    )
    return UsageError(f"Unknown configuration key {prefix + key!r}. {hint}")


def _dotted_keys(schema: type[BaseModel]) -> list[str]:
    """Names of blocks, and `block.key` for each key in them."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(name)
        if _is_block(field.annotation):
            keys += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    return keys


def _is_block(kind: Any) -> TypeGuard[type[Settings]]:
    return isinstance(kind, type) and issubclass(kind, Settings)
