"""What a loss needs of the data, checked before anything is loaded."""

from cache.artifacts import Artifact
from cache.errors import DataError, StaleError, UsageError
from stages.losses import LOSSES
from stages.losses.contract import Loss
from stages.runtime.context import Context
from stages.settings.train import PairStrategy


def check_needs(loss: Loss, rows: Artifact, pairs: PairStrategy, context: Context) -> None:
    """Raise an `AlignError` naming what the data lacks for this loss and the command that adds it."""
    roles = rows.counts["rows_by_role"]
    name = loss.model_dump()["name"]
    if loss.unit == "pair" and not roles.get("chosen") and not roles.get("ranked"):
        others = [other for other, cls in LOSSES.items() if cls.unit == "row"]
        raise UsageError(
            f"Loss {name} is computed on pairs of a chosen and a rejected completion, and {rows.path} has none. "
            f"Losses for unpaired data: {', '.join(others)}."
        )
    if "kl" in loss.needs and not roles.get("mismatched"):
        extra = "--set prepare.mismatched=true"
        raise StaleError(
            f"Loss {name} needs mismatched rows, and {rows.path} has none. "
            f"Run: {context.command('prepare', extra)}, then cache-ref with the same option."
        )
    unscored = (
        sum(count for role, count in roles.items() if role != "mismatched") - rows.counts["scored_rows"]
    )
    if "scores" in loss.needs and unscored:
        raise DataError(
            f"Loss {name} needs a score for each completion, and {unscored} in {rows.path} have none. "
            f"Use data with columns score_chosen and score_rejected, or graded responses."
        )
    if rows.counts["weighted_rows"] and "weights" not in loss.needs:
        others = [other for other, cls in LOSSES.items() if "weights" in cls.always_needs]
        raise UsageError(
            f"Loss {name} takes no weights, and {rows.counts['weighted_rows']:,} rows in {rows.path} have one other than 1. "
            f"Losses that do: {', '.join(others)}. Or prepare the data without them (data.ties=drop; no weight columns)."
        )
    if "density_ratios" in loss.needs and (roles.get("chosen") or roles.get("ranked")):
        raise UsageError(
            f"Loss {name} with udm weights undesirable completions by how their prompts differ from those of desirable "
            f"ones, and in {rows.path} both have the same prompts. Leave udm out, or use unpaired data."
        )
    if pairs != "best_worst":
        _check_strategy(loss, name, rows, pairs)


def _check_strategy(loss: Loss, name: str, rows: Artifact, pairs: PairStrategy) -> None:
    """Other strategies than best_worst want ranked lists, and losses for which a row may be in many pairs."""
    if not rows.counts["rows_by_role"].get("ranked"):
        raise UsageError(
            f"train.pairs={pairs} forms pairs from ranked lists, and {rows.path} has none. "
            f"Use --set train.pairs=best_worst, or keep the lists of graded data with --set prepare.graded=ranked."
        )
    if "desirable" in loss.needs:
        raise UsageError(
            f"Loss {name} takes each completion as desirable or not, which of a ranked list only the best and the "
            f"worst are, and train.pairs is {pairs}. Use --set train.pairs=best_worst."
        )
    if "shared_logps" in loss.needs:
        raise UsageError(
            f"Loss {name} with ld_alpha cuts a completion to the length of the one it is compared with; "
            f"with train.pairs={pairs} there are several. Use --set train.pairs=best_worst, or leave ld_alpha out."
        )
