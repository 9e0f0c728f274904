"""The curves of a sweep as one picture: a colour for each setting, its seeds drawn alike."""

from cache.files import write_bytes
from pipeline.sweep.sweep import Sweep
from stages.curves.charts import MAIN
from stages.curves.draw import DrawnRun, png
from stages.train.monitoring.metrics_log import METRICS, read_metrics


def draw(found: Sweep) -> None:
    """Write `curves.png` into the folder of the sweep."""
    order = {setting.name: place for place, setting in enumerate(found.ranking.settings)}
    runs = [
        DrawnRun(
            one.member.setting or "the configuration",
            read_metrics(one.policy.path / METRICS),
            one.heldout,
            order.get(one.member.setting, 0),
        )
        for one in found.outcomes
        if one.policy is not None
    ]
    if runs:
        write_bytes(found.folder / "curves.png", png(MAIN, runs))
