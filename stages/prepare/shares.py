"""Shares of the work of `align prepare`: where each of the independent jobs leaves its own, and where the join finds all.

<store>/row-shares/<name>-<fingerprint of the rows>-<i>-of-<N>-<fingerprint>/    with the files of `share_files.py`
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache.artifacts import Artifact
from cache.errors import StaleError
from cache.fingerprint import fingerprint, short
from stages.runtime.context import Context
from stages.runtime.shares import Worker

KIND = "row-shares"
LAYOUT_VERSION = 1
LISTED = 5


@dataclass(frozen=True)
class Share:
    """Share `worker` of the rows of this identity, whose artifact is called `name`."""

    name: str
    rows: Mapping[str, Any]
    worker: Worker

    @property
    def label(self) -> str:
        """As `--shard` takes it."""
        return f"{self.worker.index + 1}/{self.worker.count}"

    @property
    def place(self) -> tuple[str, str, dict[str, Any]]:
        """Kind, name and identity of its artifact."""
        identity = {"rows": dict(self.rows), "share": self.label, "layout_version": LAYOUT_VERSION}
        return KIND, f"{_stem(self.name, self.rows)}-{self.label.replace('/', '-of-')}", identity

    @property
    def stage(self) -> str:
        """The command that makes it, as its manifest names it."""
        return f"prepare --shard {self.label}"


def find_shares(name: str, rows: Mapping[str, Any], context: Context) -> list[Artifact]:
    """All shares of these rows, in order, of the smallest number of jobs whose shares are complete.

    Raises `StaleError` where some are missing or are not what their names say, and `CorruptError` where one is damaged.
    """
    stem = _stem(name, rows)
    context.store.bring(KIND, f"{stem}-*-of-*")
    folders = (context.store.root / KIND).glob(f"{stem}-*-of-*")
    found = (re.fullmatch(r"-\d+-of-(\d+)-[0-9a-f]+", folder.name.removeprefix(stem)) for folder in folders)
    missing: list[str] = []
    for count in sorted({int(match[1]) for match in found if match}):
        shares = [Share(name, rows, Worker(index, count)) for index in range(count)]
        artifacts = {share.label: context.store.find(*share.place) for share in shares}
        there = [artifact for artifact in artifacts.values() if artifact is not None]
        if len(there) == count:
            return there
        missing = [label for label, artifact in artifacts.items() if artifact is None]
    raise StaleError(_missing(name, missing, context))


def _stem(name: str, rows: Mapping[str, Any]) -> str:
    return f"{name}-{short(fingerprint(rows))}"


def _missing(name: str, labels: Sequence[str], context: Context) -> str:
    where = f"the rows of {name} with these settings"
    if not labels:
        command = context.command("prepare", "--shard 1/4")
        return f"No shares of {where} are in {context.store.root}. Make those of four jobs, for example, with: {command} ... --shard 4/4"
    more = f" and {len(labels) - LISTED:,} more" if len(labels) > LISTED else ""
    return (
        f"Shares of {where} are missing in {context.store.root}: {', '.join(labels[:LISTED])}{more}. "
        f"Make each with its own number, the first with: {context.command('prepare', f'--shard {labels[0]}')}"
    )
