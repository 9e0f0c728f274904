"""Training on a GPU: memory of each cell of batch and length, tokens per second, model FLOPs utilisation.

A 1B OLMo-2 shape with random weights, bfloat16 autocast over float32 masters, AdamW, full training and
gradient checkpointing. A cell is a step over so many pairs of that length (prompt and completion together,
half of it prompt). Where there is no CUDA device every row says so; `--smoke` runs the same code with a
tiny shape on the CPU and writes nothing.

    python benchmarks/gpu_training.py [--smoke]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu_shape import OLMO2_1B, TINY, peak_flops
from benchmarks.record import write_results
from stages.engine.scorer import Scorer
from stages.models.loading import ModelSource
from stages.plan.memory import LayerwiseShapes, pairs_pack
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings, TrainSettings
from stages.train.optimizers import make_optimizer

BATCHES, LENGTHS = (1, 2, 4, 8, 16), (512, 1024, 2048, 4096)
TIMED_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on the CPU; writes nothing")
    smoke = parser.parse_args().smoke
    device = torch.device("cpu" if smoke or not torch.cuda.is_available() else "cuda")
    settings = TrainSettings(gradient_checkpointing=True)
    with tempfile.TemporaryDirectory() as folder:
        source = _save_shape(Path(folder), TINY if smoke else OLMO2_1B)
        compute = Compute(device, torch.bfloat16, max(BATCHES) * max(LENGTHS) * 2)
        cells = [(2, 64), (1, 128)] if smoke else [(batch, length) for batch in BATCHES for length in LENGTHS]
        shapes = LayerwiseShapes(source, settings, AdapterSettings(), compute)
        vocabulary = TINY["vocab_size"]
        predicted = {cell: shapes.predict(pairs_pack(*cell, vocabulary)).total for cell in cells}
        if device.type == "cpu" and not smoke:
            rows = [_row(cell, predicted[cell], None, "not measured: no CUDA device here") for cell in cells]
        else:
            trainer = _Trainer(source, compute, settings)
            rows = [_row(cell, predicted[cell], *trainer.measure(cell)) for cell in cells]
    if smoke:
        for row in rows:
            print(row)
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    write_results(
        "gpu_training",
        rows,
        "Training a 1B OLMo-2 shape",
        f"{name}. {__doc__.split(chr(10) * 2)[1].replace(chr(10), ' ')} Memory is `torch.cuda.max_memory_allocated`; "
        f"predictions are those of `align plan`. MFU counts 6 FLOPs for each weight outside the embedding and each "
        f"position, and 12 for each layer, hidden unit and attended position, without recomputation.",
    )


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
    row: dict[str, Any] = {"name": f"batch_{cell[0]}_length_{cell[1]}", "batch": cell[0], "length": cell[1]}
    row["predicted_gib"] = round(predicted / 2**30, 2)
    columns = ("memory_gib", "tokens_per_second", "mfu", "step_seconds")
    row |= {column: (figures or {}).get(column) for column in columns}
    return {**row, "note": note}


if __name__ == "__main__":
    main()
