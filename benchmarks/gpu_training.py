"""Training on a GPU: memory of each cell of batch and length, tokens per second, model FLOPs utilisation.

In: a device and a shape with random weights; bfloat16 autocast over float32 masters, AdamW, full training and gradient
checkpointing. Out: a row for each cell, a step over so many pairs of that length (prompt and completion together, half
of it prompt), with the memory that `align plan` predicts. Run it with `benchmarks/gpu.sh`.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_shape import OLMO2_1B, TINY, peak_flops
from stages.engine.scorer import Scorer
from stages.models.loading import ModelSource
from stages.plan.memory import LayerwiseShapes, pairs_pack
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings, TrainSettings
from stages.train.optimizers import make_optimizer

BATCHES, LENGTHS = (1, 2, 4, 8, 16), (512, 1024, 2048, 4096)
TIMED_STEPS = 5


TITLE = "Training a 1B OLMo-2 shape"
NOTES = (
    "A 1B OLMo-2 shape with random weights, bfloat16 autocast over float32 masters, AdamW, full training and gradient "
    "checkpointing. A cell is a step over so many pairs of that length, half of it prompt. Memory is "
    "`torch.cuda.max_memory_allocated`; predictions are those of `align plan`. MFU counts 6 FLOPs for each weight outside "
    "the embedding and each position, and 12 for each layer, hidden unit and attended position, without recomputation."
)


CELLS = sorted(
    ((batch, length) for batch in BATCHES for length in LENGTHS), key=lambda cell: cell[0] * cell[1]
)
SETTINGS = TrainSettings(gradient_checkpointing=True)


def unmeasured(why: str) -> list[dict[str, Any]]:
    """The rows without a GPU: the predictions alone."""
    with tempfile.TemporaryDirectory() as folder:
        predict = _Predictions(_save_shape(Path(folder), OLMO2_1B), _compute(torch.device("cuda")))
        return [_row(cell, predict(cell), None, why) for cell in CELLS]


def measured(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for each cell, the cheapest first."""
    with tempfile.TemporaryDirectory() as folder:
        source, compute = _save_shape(Path(folder), TINY if tiny else OLMO2_1B), _compute(device)
        predict, trainer = _Predictions(source, compute), _Trainer(source, compute, SETTINGS)
        for cell in [(2, 64), (1, 128)] if tiny else CELLS:
            yield _row(cell, predict(cell), *trainer.measure(cell))


def _compute(device: torch.device) -> Compute:
    # A CPU without bfloat16 products takes a hundred times as long for them.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Compute(device, dtype, max(BATCHES) * max(LENGTHS) * 2)


class _Predictions:
    """Bytes of a cell by `align plan`."""

    def __init__(self, source: ModelSource, compute: Compute) -> None:
        self._shapes = LayerwiseShapes(source, SETTINGS, AdapterSettings(), compute)
        self._vocabulary = json.loads((source.folder / "config.json").read_text())["vocab_size"]

    def __call__(self, cell: tuple[int, int]) -> int:
        return self._shapes.predict(pairs_pack(*cell, self._vocabulary)).total


class _Trainer:
    """One model for all cells."""

    def __init__(self, source: ModelSource, compute: Compute, settings: TrainSettings) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(compute.device):
            self.model: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(source.folder), attn_implementation="sdpa", dtype=torch.float32
            )
        self.device = compute.device
        self.scorer = Scorer(self.model, compute, print, settings.gradient_checkpointing)
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(self.parameters, settings)

    def measure(self, cell: tuple[int, int]) -> tuple[dict[str, float] | None, str]:
        """Figures of a cell, or None and the reason."""
        try:
            return self._measure(cell), ""
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return None, "out of memory"

    def _measure(self, cell: tuple[int, int]) -> dict[str, float]:
        pack = pairs_pack(*cell, self.model.config.vocab_size)
        self._step(pack)
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        for _ in range(TIMED_STEPS):
            self._step(pack)
        self._wait()
        seconds = (time.monotonic() - started) / TIMED_STEPS
        positions = pack.input_ids.shape[1]
        figures = {"tokens_per_second": positions / seconds, "step_seconds": seconds}
        if self.device.type == "cuda":
            figures["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if peak := peak_flops(torch.cuda.get_device_name()):
                figures["mfu"] = self._flops(cell, positions) / seconds / peak
        return figures

    def _flops(self, cell: tuple[int, int], positions: int) -> float:
        """Forward and backward FLOPs of the model itself; attention is causal, so half of the square."""
        batch, length = cell
        config = self.model.config
        weights = (
            sum(parameter.numel() for parameter in self.parameters)
            - self.model.get_input_embeddings().weight.numel()
        )
        prompt, completion = length // 2, length - length // 2
        attended = batch * (prompt**2 / 2 + 2 * (completion * prompt + completion**2 / 2))
        return 6.0 * weights * positions + 12.0 * config.num_hidden_layers * config.hidden_size * attended

    def _step(self, pack: Any) -> None:
        with self.scorer.weights_cast_once():
            self.scorer(pack).completion_logps.sum().mul(1e-6).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _save_shape(folder: Path, shape: dict[str, Any]) -> ModelSource:
    from transformers import Olmo2Config

    Olmo2Config(**shape).save_pretrained(folder)
    return ModelSource("olmo2-1b-shape", folder)


def _row(
    cell: tuple[int, int], predicted: int, figures: dict[str, float] | None, note: str = ""
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": _name(cell), "batch": cell[0], "length": cell[1]}
    row["predicted_gib"] = round(predicted / 2**30, 2)
    columns = ("memory_gib", "tokens_per_second", "mfu", "step_seconds")
    row |= {column: (figures or {}).get(column) for column in columns}
    return {**row, "note": note}


def _name(cell: tuple[int, int]) -> str:
    return f"batch_{cell[0]}_length_{cell[1]}"
