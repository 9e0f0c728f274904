"""`align cache-ref`: scores every row that training reads with the reference."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cache.errors import UsageError
from pipeline import tables
from pipeline.commands.command import Command, Intent, On, Shard

if TYPE_CHECKING:
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Scored:
    """The store of reference log-probs and what a run added to it; `forwards` counts forward passes."""

    folder: Path
    fingerprint: str
    rows_needed: int
    rows_scored: int
    forwards: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "artifact": str(self.folder),
            "fingerprint": self.fingerprint,
            "reused": self.rows_scored == 0,
            "rows_needed": self.rows_needed,
            "rows_scored": self.rows_scored,
            "forwards": self.forwards,
            "seconds": round(self.seconds, 3),
        }

    def show(self, console: Console) -> None:
        """Print how many rows were scored and what it took."""
        what = (
            f"{self.rows_scored:,} of {self.rows_needed:,} rows scored in {self.seconds:.1f} s, "
            f"{self.forwards:,} forward passes"
        )
        tables.headline(console, "cache-ref", what, self.folder, self.rows_scored == 0)


def cache_ref(inputs: "Inputs", shard: Shard = None, on: On = None) -> Scored:
    """Stage 2: score new rows with the frozen reference and store their log-probs."""
    from stages.cache_ref.stage import cache_ref as score

    row_sets = [inputs.rows, *inputs.eval_sets.values()]
    source = inputs.model(*inputs.config.reference_model)
    if on is not None:
        if shard is not None:
            raise UsageError("--on makes the shares by itself. Leave --shard out.")
        return _cache_ref_on(on, inputs)
    tokenizer = inputs.template.tokenizer
    done = score(row_sets, source, tokenizer, inputs.compute, inputs.context, shard)
    folder = done.reference.folder
    if not done.rows_scored:
        whose = f" of shard {shard}" if shard else ""
        inputs.context.log(f"cache-ref: all {done.rows_needed:,} rows{whose} are already in {folder}")
    return Scored(
        folder, done.reference.fingerprint, done.rows_needed, done.rows_scored, done.forwards, done.seconds
    )


def _cache_ref_on(on: str, inputs: "Inputs") -> Scored:
    from pipeline.on_ray import cluster

    began = time.monotonic()
    with cluster(on) as tasks:
        shares = tasks.run_shares(
            "cache-ref", cache_ref, inputs.context, on_gpus=inputs.config.compute.device != "cpu"
        )
    needed, scored, forwards = (
        sum(share[name] for share in shares) for name in ("rows_needed", "rows_scored", "forwards")
    )
    folder = Path(shares[0]["artifact"])
    return Scored(folder, shares[0]["fingerprint"], needed, scored, forwards, time.monotonic() - began)


def would_cache_ref(inputs: "Inputs", shard: str | None = None, on: str | None = None) -> Intent:
    """Count the rows that are not scored yet."""
    from stages.cache_ref.stage import count_missing

    source = inputs.model(*inputs.config.reference_model)
    row_sets = [inputs.rows, *inputs.eval_sets.values()]
    needed, missing, tokens = count_missing(row_sets, source, inputs.compute, inputs.context, shard)
    return Intent(
        "score" if missing else "reuse", {"rows_needed": needed, "rows_missing": missing, "tokens": tokens}
    )


CACHE_REF = Command(
    "cache-ref",
    cache_ref,
    examples=(
        "align cache-ref",
        "torchrun --nproc-per-node 8 -m pipeline cache-ref -c configs/dpo.yaml",
        "align cache-ref --shard 1/8",
        "align cache-ref --on ray",
    ),
    intent=would_cache_ref,
    takes_loss=False,
)
