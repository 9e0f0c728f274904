"""Makes the pictures in docs/images: `python docs/screenshots.py`, with chromium on the path; four minutes on two cores.

In: the quickstart, trained with three losses in a temporary folder, or in `--folder`, where what exists is used again. Out: report.png,
inspect.png and compare.png, of the pages that the commands write.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SEEN = ["--set", "sample.engine=transformers"]
JUDGE = ["--set", "judge.function=pipeline.quickstart_world:politeness"]
LOSSES = ("dpo", "kto", "simpo")
WIDTH = 1100
HEIGHTS = {"report": 1500, "inspect": 1000, "compare": 1100}


def main() -> None:
    """Train, write the pages, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, help="the folder of artifacts/; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as pages:
        for name, page in _pages(Path(pages), given.folder or Path(pages)).items():
            _picture(page, IMAGES / f"{name}.png", HEIGHTS[name])


def _pages(target: Path, folder: Path) -> dict[str, Path]:
    """The pages of the quickstart in `target`."""
    pages = {name: target / f"{name}.html" for name in HEIGHTS}
    _align("run", *SEEN, *JUDGE, folder=folder)
    for loss in LOSSES[1:]:
        _align("train", "--loss", loss, folder=folder)
    names = [f"policy/quickstart-{loss}" for loss in LOSSES]
    _align("report", *names, "-o", str(pages["report"]), folder=folder)
    _align("inspect", "--random", "3", "--html", str(pages["inspect"]), folder=folder)
    _align("compare", *SEEN, *JUDGE, "--html", str(pages["compare"]), folder=folder)
    return pages


def _align(*arguments: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pipeline", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def _picture(page: Path, target: Path, height: int) -> None:
    """The upper part of a page, in 256 colours."""
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{height}",
         f"--screenshot={target}", page.as_uri()],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(256).save(target, optimize=True)


if __name__ == "__main__":
    main()
