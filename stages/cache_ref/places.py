"""Where a model is: what its name leads to today, found without a network and without reading the model."""

from dataclasses import dataclass
from pathlib import Path

from stages.models.loading import ModelSource


@dataclass(frozen=True)
class Place:
    """The folder of a model on this machine, None if that is gone, and what identifies the place, whoever names it."""

    identity: dict[str, str | None]
    folder: Path | None


def place_of(source: ModelSource) -> Place:
    """Where this model is."""
    return _on_hub(source.name, source.revision, source.folder) if source.is_on_hub else _local(source.folder)


def places_of(name: str, revision: str | None) -> list[Place]:
    """The places that a name may mean today, in the order of `resolve_model`.

    The folder may be gone; then the name may also be one of the hub, whose copy on this machine may be gone, too.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return [_local(folder)]
    from huggingface_hub import snapshot_download

    try:
        copy = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # no copy, or no name of the hub
        copy = None
    return [_local(folder), _on_hub(name, revision, copy)]


def _local(folder: Path) -> Place:
    """The place of a folder itself, with no symbolic link in its path."""
    return Place({"folder": str(folder.resolve())}, folder if folder.is_dir() else None)


def _on_hub(name: str, revision: str | None, folder: Path | None) -> Place:
    return Place({"hub": name, "revision": revision}, folder)
