"""The list of losses: `SingleLoss` below is the only one, and everything else derives from it.

`AnyLoss` is the type of the configuration block `loss:` (a union tagged by `name`), `LOSSES` maps names to classes,
and `parse_loss` turns a mapping into a loss or raises a `UsageError` of one line. To add a loss, write its class in
the file of its family and put the class into `SingleLoss`.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_args

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cache.errors import UsageError
from stages.losses.anchored import NCA, SPPO, APODown, APOZero, CalDPO
from stages.losses.contract import Batch, Loss, LossOutput, Rows, Step
from stages.losses.listwise import QRPO, EXORw, InfoNCA, PlackettLuce
from stages.losses.mixture import Mixture, Part
from stages.losses.pairwise import CDPO, DPO, DPOP, EXO, IPO, RDPO, ChiPO, DiscoPOP, DPONorm, Hinge
from stages.losses.reference_free import CPO, ORPO, SFT, AlphaPO, SimPER, SimPO
from stages.losses.transport import AOT, AOTUnpaired
from stages.losses.unpaired import BCO, KTO, APOZeroUnpaired
from stages.losses.weighted import ODPO, RPO, WPO

SingleLoss = Annotated[
    DPO
    | CDPO
    | RDPO
    | DPONorm
    | DPOP
    | IPO
    | ODPO
    | RPO
    | Hinge
    | EXO
    | ChiPO
    | NCA
    | SPPO
    | CalDPO
    | AOT
    | AOTUnpaired
    | APOZero
    | APODown
    | DiscoPOP
    | WPO
    | PlackettLuce
    | InfoNCA
    | EXORw
    | QRPO
    | KTO
    | APOZeroUnpaired
    | BCO
    | SimPO
    | SimPER
    | ORPO
    | CPO
    | AlphaPO
    | SFT,
    Field(discriminator="name"),
]
# The parts of a mixture are single losses, so its fields can be built only after the list above.
Part.model_rebuild()
Mixture.model_rebuild(force=True)

AnyLoss = Annotated[SingleLoss | Mixture, Field(discriminator="name")]

LOSSES: dict[str, type[Loss]] = {
    cls.model_fields["name"].default: cls for cls in (*get_args(get_args(SingleLoss)[0]), Mixture)
}

_ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyLoss)


def parse_loss(mapping: Mapping[str, Any]) -> Loss:
    """The loss that a `loss:` block describes; raises `UsageError` in one line when the block is not valid."""
    try:
        return _ADAPTER.validate_python(dict(mapping))
    except ValidationError as error:
        complaints = [_complaint(detail) for detail in error.errors(include_url=False)]
        raise UsageError("; ".join(complaints)) from None


def _complaint(detail: ErrorDetails) -> str:
    """One sentence for an error of pydantic: the key, its value, and what is expected."""
    path, owner, fields = _place(detail["loc"])
    value = detail["input"]
    match detail["type"]:
        case "union_tag_invalid":
            name = str(value["name"])
            known = _part_names() if detail["loc"] else LOSSES
            return f"{path}.name: unknown loss '{name}'. Known losses: {', '.join(known)}.{_nearest(name, known)}"
        case "union_tag_not_found":
            known = _part_names() if detail["loc"] else LOSSES
            return f"{path}.name is missing. Known losses: {', '.join(known)}."
        case "extra_forbidden":
            key = path.rpartition(".")[2]
            return f"{path} is not a field of {owner} (fields: {', '.join(fields)}).{_nearest(key, fields)}"
        case "missing":
            return f"{path} is missing ({owner} needs it)"
        case "value_error":
            # The message of a validator of the whole loss begins with the name of a field.
            joint = "." if detail["loc"][-1] == owner else " "
            return f"{path}{joint}{detail['msg'].removeprefix('Value error, ')}"
        case _:
            return f"{path} is {value!r}, but {detail['msg'].replace('Input', 'it', 1)}"


def _place(loc: tuple[int | str, ...]) -> tuple[str, str, list[str]]:
    """The key as the user wrote it, the loss that has or should have this key, and the fields of that loss.

    Pydantic puts the tag of a union into the location: at the beginning, and after each key `loss` of a part.
    """
    path, owner, fields = ["loss"], "", []
    previous = "loss"
    for item in loc:
        if previous == "loss" and item in LOSSES:
            owner, fields = item, [key for key in LOSSES[item].model_fields if key != "name"]
        elif isinstance(previous, int):
            path.append(str(item))
            owner, fields = "a part", list(Part.model_fields)
        else:
            path.append(str(item))
        previous = item
    return ".".join(path), owner, fields


def _part_names() -> list[str]:
    return [name for name, cls in LOSSES.items() if cls is not Mixture]


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


__all__ = ["LOSSES", "AnyLoss", "Batch", "Loss", "LossOutput", "Rows", "SingleLoss", "Step", "parse_loss"]
