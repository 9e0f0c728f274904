"""Work on tensors that have shapes and no data (`align plan`): what repeats itself takes no other memory, so once is enough."""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Item = TypeVar("Item")


def of_shapes(tensor: Tensor) -> bool:
    """Whether the tensor has no data."""
    return isinstance(tensor, FakeTensor)


def one_of_each(items: Iterable[Item], shape: Callable[[Item], Hashable]) -> list[Item]:
    """The first item of each shape."""
    found: dict[Hashable, Item] = {}
    for item in items:
        found.setdefault(shape(item), item)
    return list(found.values())
