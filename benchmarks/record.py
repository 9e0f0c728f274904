"""Results that a program can read and a person can look at: JSON and a Markdown table beside it."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from cache.artifacts import installed_versions

RESULTS = Path(__file__).resolve().parent / "results"


def write_results(
    name: str, rows: Sequence[dict[str, Any]], title: str, notes: str, folder: Path = RESULTS
) -> None:
    """Write `<name>.json` and `.md` in `folder`; every row has a `name`, the other keys become columns."""
    folder.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/{Path(sys.argv[0]).name}"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {_cpu_name()}"
    record = {
        "date": date.today().isoformat(),
        "command": command,
        "versions": {"python": platform.python_version(), **installed_versions()},
        "machine": machine,
        "rows": list(rows),
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {title}", "", f"`{command}`, {record['date']}, {machine}.", "", notes, ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    (folder / f"{name}.md").write_text(
        "\n".join([*lines, "", f"Versions: {versions}.", ""]), encoding="utf-8"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    """The processor's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "unknown processor",
    )
