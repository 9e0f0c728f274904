"""`align verify`: checks every byte of a store."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cache.errors import AlignError, CorruptError
from pipeline import tables
from pipeline.commands.command import Command

if TYPE_CHECKING:
    from pipeline.inputs import Inputs
    from stages.verify import Checked


@dataclass(frozen=True)
class Rescored:
    """Rows that were scored again: the largest differences to the stored log-probs, of a token and of a row's sum.

    `tolerance` is what the arithmetic may move a token, in nats.
    """

    rows: int
    token: float
    row: float
    tolerance: float


@dataclass(frozen=True)
class Verified:
    """What was checked. `failure` is the error that the command ends with."""

    checked: "Sequence[Checked]"
    rescored: Rescored | None = None
    failure: AlignError | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "ok": self.failure is None,
            "rescored": None if self.rescored is None else vars(self.rescored),
            "artifacts": [
                {
                    "path": str(one.path),
                    "files": one.num_files,
                    "bytes": one.num_bytes,
                    "rows": one.num_rows,
                    "problems": [str(problem) for problem in one.problems],
                    "notes": one.notes,
                }
                for one in self.checked
            ],
        }

    def show(self, console: Console) -> None:
        """Print a line for each artifact, its problems and its notes."""
        for one in self.checked:
            size = f"{one.num_files:,} files, {one.num_bytes / tables.MIB:,.1f} MiB"
            rows = f", {one.num_rows:,} rows" if one.num_rows else ""
            state = ("DAMAGED", "bold red") if one.problems else ("ok", "green")
            console.print(Text.assemble(state, f"  {one.kind}/{one.path.name}  {size}{rows}"), soft_wrap=True)
            for problem in one.problems:
                console.print(Text(f"  {problem}", style="red"), soft_wrap=True)
            for note in one.notes:
                console.print(Text(f"  {note}", style="dim"), soft_wrap=True)
        if self.rescored is not None:
            found = self.rescored
            console.print(
                f"rescored {found.rows:,} rows: largest difference {found.token:.2g} nats a token, {found.row:.2g} nats a row"
            )


def verify(
    inputs: "Inputs",
    path: Annotated[
        Path | None,
        typer.Argument(help="A store, a folder of it, or one artifact. Default: the store."),
    ] = None,
    rescore: Annotated[
        int | None,
        typer.Option(
            "--rescore",
            metavar="K",
            min=1,
            help="Also score K random rows of the configuration again with the reference model.",
        ),
    ] = None,
    expect_digest: Annotated[
        str | None,
        typer.Option(
            "--expect-digest",
            metavar="SHA256",
            help="Fail unless manifest.json of the one artifact named has this sha256.",
        ),
    ] = None,
) -> Verified:
    """Check every file, key and value of a store, and that its artifacts fit together. Writes nothing.

    Ends with 4 if something is missing or stale, with 5 if something is damaged.
    """
    from pipeline.catalogue.names import folder_or_path
    from stages.runtime.context import progress
    from stages.verify import artifacts_in
    from stages.verify import verify as check

    root = inputs.context.store.root
    if path is None:
        inputs.context.store.bring_all()
    where = root if path is None else folder_or_path(root, path)
    with progress("verify", len(list(artifacts_in(where))), "artifacts") as advance:
        checked = check(where, advance)
    problems = [problem for one in checked for problem in one.problems]
    if expect_digest is not None:
        problems += _digest_problem([one.path for one in checked], expect_digest)
    again = None if rescore is None else _rescored(inputs, rescore)
    if again is not None and not again.token <= again.tolerance:
        problems.append(
            CorruptError(
                f"Stored log-probs differ from those of the reference by up to {again.token:.3g} nats a token. Delete the store's "
                f"folder in ref-logps/ and run `align cache-ref` again."
            )
        )
    return Verified(checked, again, _failure(problems))


def _failure(problems: Sequence[AlignError]) -> AlignError | None:
    """The worst problem, damage before what is missing, with the number of all."""
    if not problems:
        return None
    worst = max(problems, key=lambda problem: problem.exit_code)
    more = f"{len(problems)} problems, the worst: " if len(problems) > 1 else ""
    return type(worst)(f"{more}{worst}")


def _digest_problem(folders: Sequence[Path], expected: str) -> list[AlignError]:
    from cache.files import sha256_file

    if len(folders) != 1:
        return [
            CorruptError(
                f"--expect-digest is about one artifact, and {len(folders)} were checked. Name its folder."
            )
        ]
    found = sha256_file(folders[0] / "manifest.json")
    if found == expected.lower():
        return []
    return [
        CorruptError(
            f"{folders[0]}/manifest.json has sha256 {found}, expected {expected}. It is another artifact than the one pinned."
        )
    ]


def _rescored(inputs: "Inputs", number: int) -> Rescored:
    """Score random rows of the configuration again; the order of the draw is fixed."""
    import numpy as np
    import torch

    from stages.cache_ref.store_lookup import store_of
    from stages.data.rows import SPLITS, RowSet
    from stages.engine.pack_check import TOLERANCES
    from stages.engine.row_logps import score_groups
    from stages.engine.scorer import Scorer
    from stages.models.loading import load_model

    source = inputs.model(*inputs.config.reference_model)
    store = store_of(source, inputs.compute, inputs.context)
    row_sets = [RowSet.of(inputs.rows, split) for split in SPLITS]
    places = [
        (which, row)
        for which, rows in enumerate(row_sets)
        for row in range(len(rows))
        if rows.keys[row] in store
    ]
    drawn = random.Random(0).sample(places, min(number, len(places)))
    if not drawn:
        inputs.job  # noqa: B018  raises the error that says how to make the store
    scorer = Scorer(load_model(source, inputs.compute), inputs.compute, inputs.context.log)
    token = whole = 0.0
    with torch.inference_mode():
        for which, rows in enumerate(row_sets):
            groups = [np.array([row]) for found, row in sorted(drawn) if found == which]
            scored, _ = score_groups(scorer, rows, groups) if groups else ({}, 0)
            for row, values in scored.items():
                difference = values.astype(np.float64) - store.get(rows.keys[row])
                token = max(token, float(np.abs(difference).max(initial=0.0)))
                whole = max(whole, abs(float(difference.sum())))
    return Rescored(len(drawn), token, whole, TOLERANCES[inputs.compute.dtype])


VERIFY = Command(
    "verify",
    verify,
    examples=("align verify", "align verify artifacts/ref-logps/NAME --rescore 100"),
    takes_loss=False,
)
