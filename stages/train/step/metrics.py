"""The metrics of every loss, computed in one place from log-probs, rewards and labels.

In: batches and what the loss returned for them.  Out: means by metric name; the names are those of TRL. Metrics of the
chosen and the rejected side are means over pairs, so a row of a ranked list counts once for each of its pairs; for
unpaired data they are means over rows.
"""

import torch
from torch import Tensor

from stages.losses.contract import Batch, LossOutput
from stages.runtime.distributed import World


class Totals:
    """Running sums and counts by metric name, reduced over ranks once, so a mean does not depend on the split of a step."""

    def __init__(self) -> None:
        """Start empty."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add values of one metric, of any shape."""
        values = values.detach().double()
        self._sums[name] = self._sums[name] + values.sum() if name in self._sums else values.sum()
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def add_batch(self, batch: Batch, output: LossOutput) -> None:
        """Add the metrics of a batch."""
        self.add("loss", output.losses)
        # A micro-batch may hold ranked lists of equal scores alone, which have no pair; unpaired data has no lists.
        paired = len(batch.chosen) > 0 or batch.num_lists < len(batch.desirable)
        chosen = batch.chosen if paired else batch.desirable
        rejected = batch.rejected if paired else ~batch.desirable
        for label, rows in (("chosen", chosen), ("rejected", rejected)):
            self.add(f"rewards/{label}", output.rewards[rows])
            self.add(f"logps/{label}", batch.rows.logps[rows])
            if batch.rows.ref_logps is not None:
                self.add(f"logratios/{label}", batch.rows.logratios[rows])
        if paired:
            self.add("rewards/accuracies", wins(output.rewards[batch.chosen], output.rewards[batch.rejected]))
        for name, values in output.metrics.items():
            self.add(name, values)

    def means(self, world: World, device: torch.device) -> dict[str, float]:
        """The mean of each metric over all values added on all ranks. Every rank calls this."""
        names = self._names(world)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        pairs = [
            torch.stack([self._sums.get(name, zero), torch.full_like(zero, self._counts.get(name, 0))])
            for name in names
        ]
        sums = world.sum_(torch.stack(pairs)).tolist()  # (metrics, 2)
        means = {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def _names(self, world: World) -> list[str]:
        """The names known on any rank, in the same order on all; a rank without micro-batches knows none."""
        own = sorted(self._sums)
        if world.size == 1:
            return own
        gathered: list[list[str]] = [[] for _ in range(world.size)]
        torch.distributed.all_gather_object(gathered, own)
        return sorted({name for names in gathered for name in names})


def wins(preferred: Tensor, other: Tensor) -> Tensor:
    """1 where `preferred` is larger, 0.5 where both are equal, else 0; float32."""
    # One half for a tie: at step 0 policy and reference agree, and the accuracy is 0.5, not 0.
    return (preferred > other).float() + 0.5 * (preferred == other).float()


def ranking_accuracy(batch: Batch, output: LossOutput) -> Tensor:
    """`wins` of every desirable row over every undesirable one: (desirable rows, undesirable rows)."""
    desirable, undesirable = output.rewards[batch.desirable], output.rewards[~batch.desirable]
    return wins(desirable[:, None], undesirable[None, :])
