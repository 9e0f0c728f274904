"""The completions of a run that is not finished, so that an interrupted one continues where it stopped.

A line for each completion: its turn, prompt and sample, and its token ids. A line that a crash cut short, and what
follows it, is sampled again.
"""

import json
from pathlib import Path
from types import TracebackType

FILE = "progress.jsonl"
Place = tuple[int, int, int]  # turn, prompt index, sample index


class Journal:
    """The file of finished completions in a folder that is being written."""

    def __init__(self, folder: Path) -> None:
        """Read what an earlier run has finished."""
        self.path = folder / FILE
        self.finished: dict[Place, list[int]] = {}
        whole = 0
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    turn, prompt, sample, ids = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.finished[turn, prompt, sample] = ids
                whole += len(line)
        self._file = open(self.path, "ab")  # noqa: SIM115  closed by __exit__
        self._file.truncate(whole)

    def add(self, place: Place, ids: list[int]) -> None:
        """Note a completion."""
        self.finished[place] = ids
        self._file.write(json.dumps([*place, ids]).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "Journal":
        """The journal, open for `add`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; it stays for the next run."""
        self._file.close()
