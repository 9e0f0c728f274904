"""Gradient checkpointing without dropout: a policy scored with noise has no exact step 0, and no exact resume.

transformers checkpoints a layer only while it is in training mode, in which dropout is on. So only the layers
themselves are put into that mode, not the modules in them, and every dropout that they may apply is 0.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the modules to 0, functional ones and layer drop too."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if _is_dropout(name, value)]:
            setattr(module, name, 0.0)


def enable_checkpointing(model: Any) -> None:
    """Keep only the inputs of layers for the backward pass, in which each layer runs again as it did before.

    Raises `ValueError` for an architecture that has no checkpoints.
    """
    config = model.config.get_text_config()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _attending(model, config._attn_implementation)

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    for layer in _layers(model):
        layer.training = True
        if any(_is_dropout(*item) for item in vars(getattr(layer, "config", layer)).items()):
            layer.config = _without_dropout(layer.config)


def disable_checkpointing(model: Any) -> None:
    """Undo `enable_checkpointing`."""
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()


@contextmanager
def _attending(model: Any, name: str) -> Iterator[None]:
    """Within it the model attends as in its forward pass, since when it may have scored another pack another way."""
    now = model.config.get_text_config()._attn_implementation
    if name == now:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(now)


def _layers(model: nn.Module) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return layers or [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def _is_dropout(name: str, value: Any) -> bool:
    return "drop" in name and isinstance(value, float) and value > 0


def _without_dropout(config: Any) -> Any:
    """A copy for one layer: the model's own configuration is published with the policy."""
    quiet = copy.copy(config)
    for name, value in vars(config).items():
        if _is_dropout(name, value):
            setattr(quiet, name, 0.0)
    return quiet
