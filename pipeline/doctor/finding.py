"""What `align doctor` found about one thing."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line: a thing, its state, what was found, and what to type about it.

    A note restricts what can be done, or how fast; with a problem a stage cannot run.
    """

    topic: str
    name: str
    state: State
    found: str
    advice: str = ""
