"""Predicts the memory of a training step by running it on tensors that have shapes and no data.

In: the configuration of a model, the blocks `train`, `adapter` and `compute`, and packs.  Out: bytes by kind.

The scoring engine runs its forward and backward pass under torch's `FakeTensorMode`, and every live storage is
counted, so checkpointing, autocast, chunks of the output layer and adapters are included. Only the optimizer state is
computed from a number of bytes per weight.
"""

import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.packs import Pack, build_pack
from stages.models.adapters import attach_adapter, halve_frozen_weights
from stages.models.loading import ModelSource, model_of_shapes, open_config
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings, TrainSettings
from stages.train.optimizers import STATE_BYTES

# Bytes per weight in NF4 with double quantization: 4 bits, and 8.13 bits for each block of 64 weights.
NF4_BYTES = 0.516


@dataclass(frozen=True)
class Memory:
    """Predicted bytes at the peak of a step; `activations` is everything that the other fields do not count."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    num_parameters: int
    num_trained: int

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return self.weights + self.gradients + self.optimizer + self.activations


class Shapes:
    """A model of shapes, set up for training like the real one."""

    def __init__(
        self,
        source: ModelSource,
        train: TrainSettings,
        adapter: AdapterSettings,
        compute: Compute,
        num_layers: int | None = None,
    ) -> None:
        """With `num_layers`, only the first layers of the model are built."""
        from stages.engine.scorer import Scorer
        from stages.engine.self_check import Way
        from stages.engine.tree_attention import NAME

        config = open_config(source)
        if num_layers is not None:
            _keep_layers(config.get_text_config(), num_layers)

        self._optimizer = STATE_BYTES[train.optimizer]
        # On the CPU whatever the device of the run: the shapes are the same, and no GPU is needed.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        on_cpu = Compute(torch.device("cpu"), compute.dtype, compute.tokens_per_batch)
        model = model_of_shapes(source, config, attn_implementation="sdpa", dtype=torch.float32)
        frozen = _linear_weights(model) if compute.load_in_4bit else []
        if adapter.name != "none":
            attach_adapter(model, adapter, 0, source)
            if compute.dtype == torch.bfloat16:
                halve_frozen_weights(model)
        self._scorer = Scorer(model, on_cpu, print, train.gradient_checkpointing, checked=Way(NAME))
        with self._mode:
            _replace_tensors(model)
        self._parameters = list(model.parameters())
        self._trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        self.weights = sum(parameter.nbytes for parameter in self._parameters)
        self.weights -= sum(int(weight.nbytes - weight.numel() * NF4_BYTES) for weight in frozen)

    def predict(self, pack: Pack) -> Memory:
        """Memory of a step whose largest pack is `pack`; the gradients of earlier packs are allocated already."""
        with self._mode:
            for parameter in self._trained:
                parameter.grad = torch.zeros_like(parameter)
            known = [*self._parameters, *(parameter.grad for parameter in self._trained)]
            with _LiveBytes(known) as live, self._scorer.weights_cast_once():
                self._scorer(pack).completion_logps.sum().backward()
        gradients = sum(parameter.nbytes for parameter in self._trained)
        trained = sum(parameter.numel() for parameter in self._trained)
        for parameter in self._trained:
            parameter.grad = None
        return Memory(
            weights=self.weights,
            gradients=gradients,
            optimizer=int(trained * self._optimizer),
            activations=live.peak,
            num_parameters=sum(parameter.numel() for parameter in self._parameters),
            num_trained=trained,
        )


class LayerwiseShapes:
    """`Shapes` of a model whose layers are all equal, extrapolated from one and two layers, which is much faster."""

    def __init__(
        self, source: ModelSource, train: TrainSettings, adapter: AdapterSettings, compute: Compute
    ) -> None:
        self._more = open_config(source).get_text_config().num_hidden_layers - 1
        self._one, self._two = (Shapes(source, train, adapter, compute, number) for number in (1, 2))

    def predict(self, pack: Pack) -> Memory:
        """As `Shapes.predict`: the memory with one layer, plus the difference between two and one for each further layer."""
        one, two = (asdict(shapes.predict(pack)) for shapes in (self._one, self._two))
        return Memory(**{name: one[name] + self._more * (two[name] - one[name]) for name in one})


def _linear_weights(model: Any) -> list[torch.Tensor]:
    """The weights that are loaded in 4 bits: those of all linear layers but the output layer."""
    output = model.get_output_embeddings()
    return [
        module.weight
        for module in model.modules()
        if type(module) is torch.nn.Linear and module is not output
    ]


def _replace_tensors(model: Any) -> None:
    """Replace meta tensors by fake tensors of the current mode; tied parameters stay tied."""
    fresh: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in fresh:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                fresh[id(parameter)] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = None if parameter is None else fresh[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _keep_layers(config: Any, number: int) -> None:
    """Cut a configuration, and its lists with one entry per layer, to the first layers."""
    before = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:number])
    config.num_hidden_layers = number


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that are made within it: `now`, and their maximum so far, `peak`."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[Any](tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._subtract, size)

    def _subtract(self, size: int) -> None:
        self.now -= size


def pairs_pack(batch: int, length: int, vocab_size: int) -> Pack:
    """A pack of `batch` pairs; prompt and completion have `length` tokens together, half of them in the prompt."""
    random = np.random.default_rng(0)

    def draw(number: int) -> np.ndarray:
        return random.integers(0, vocab_size, number).astype(np.int32)

    prompt, completion = length // 2, length - length // 2
    examples = [
        Example(
            str(number),
            "made",
            draw(prompt),
            [Row(role, draw(completion), np.ones(completion, bool)) for role in ("chosen", "rejected")],
        )
        for number in range(batch)
    ]
    rows = RowSet([to_table(examples, [0] * batch)])
    return build_pack(rows, [np.arange(a, b) for a, b in zip(rows.starts, rows.ends, strict=True)])


def available_bytes(device: torch.device) -> int:
    """Memory of the GPU in bytes; on a CPU the memory that the system reports as available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[1]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
