"""`align export` and `align import`: artifacts as one portable file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command

if TYPE_CHECKING:
    from cache.arrivals import Arrived
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Exported:
    """The artifacts that were packed into one file."""

    archive: str
    folders: Sequence[Path]
    num_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "archive": self.archive,
            "artifacts": [str(folder) for folder in self.folders],
            "bytes": self.num_bytes,
        }

    def show(self, console: Console) -> None:
        """Print a line for each artifact, and the archive."""
        for folder in self.folders:
            console.print(Text(f"packed  {folder.parent.name}/{folder.name}"), soft_wrap=True)
        console.print(Text(f"{self.archive}  {tables.size(self.num_bytes)}", style="bold"), soft_wrap=True)


@dataclass(frozen=True)
class Imported:
    """The artifacts of an archive, in the store."""

    artifacts: "Sequence[Arrived]"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "artifacts": [
                {"path": str(one.path), "files": one.num_files, "bytes": one.num_bytes, "reused": one.reused}
                for one in self.artifacts
            ]
        }

    def show(self, console: Console) -> None:
        """Print a line for each artifact."""
        for one in self.artifacts:
            state = ("reused  ", "dim") if one.reused else ("imported", "green")
            what = f"  {one.path}  {one.num_files:,} files, {tables.size(one.num_bytes)}"
            console.print(Text.assemble(state, what), soft_wrap=True)


def export(
    inputs: "Inputs",
    path: Annotated[
        Path | None,
        typer.Argument(help="One artifact, or a store to pack whole. Default: the store."),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", metavar="FILE", help="File to write, or a URL such as s3://bucket/name.tar."
        ),
    ] = "",
) -> Exported:
    """Pack artifacts and reference log-probs into one portable file, after checking every byte of them."""
    from cache.errors import UsageError
    from cache.locations import write_whole
    from pipeline.config_refusals import refuse_url_with_secret
    from stages.sharing import export_archive

    if not output:
        raise UsageError("align export writes one file: name it with -o FILE.")
    refuse_url_with_secret(output, "-o")
    if path is None:
        inputs.context.store.bring_all()
    where = path or inputs.context.store.root
    folders, size = write_whole(output, lambda file: export_archive(where, file))
    return Exported(output, folders, size)


def import_(
    inputs: "Inputs",
    archive: Annotated[str, typer.Argument(help="A file of `align export`, or its URL.")] = "",
) -> Imported:
    """Put the artifacts of a file of `align export` into the store, after checking every byte of them."""
    from cache.errors import UsageError
    from cache.locations import open_to_read
    from pipeline.config_refusals import refuse_url_with_secret
    from stages.sharing import import_archive

    if not archive:
        raise UsageError("align import reads one file of `align export`: name it.")
    refuse_url_with_secret(archive, "The archive")
    with open_to_read(archive) as file:
        return Imported(import_archive(file, archive, inputs.context.store))


EXPORT = Command(
    "export",
    export,
    examples=(
        "align export artifacts/ref-logps/NAME -o reference.tar",
        "align export -o s3://bucket/store.tar",
    ),
    takes_loss=False,
)
IMPORT = Command(
    "import",
    import_,
    examples=("align import reference.tar", "align import https://host/reference.tar --store artifacts"),
    takes_loss=False,
)
