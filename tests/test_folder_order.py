"""The folders of `stages` stand in an order: a folder imports only folders before it, and no stage imports another."""

from pathlib import Path

import pytest

from tests.test_layering import ROOT, imported_names

# Folders on one line do not import each other.
ORDER = (
    ("settings", "losses"),
    ("runtime", "data"),
    ("formats", "models", "engine"),
    ("tokenization", "generation", "train/step", "train/monitoring"),
    ("prepare", "cache_ref", "train", "sample"),
    ("plan", "evaluate.py", "merge.py"),
)
PLACE = {folder: place for place, folders in enumerate(ORDER) for folder in folders}
STAGES = ("prepare", "cache_ref", "train", "sample")


def folder_of(path: Path, root: Path) -> str:
    """The folder of `ORDER` that a file of `stages` lies in, or its name where it lies in none."""
    parts = path.relative_to(root / "stages").parts
    inner = "/".join(parts[:2])
    return inner if inner in PLACE else parts[0]


def arrows(root: Path) -> dict[str, set[str]]:
    """For each folder of `stages`, the other folders that its files import."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (root / "stages").rglob("*.py")
        if path != root / "stages" / "__init__.py"
    }
    found: dict[str, set[str]] = {folder_of(path, root): set() for path in files.values()}
    for path in files.values():
        here = folder_of(path, root)
        found[here] |= {folder_of(files[name], root) for name in imported_names(path) & files.keys()} - {here}
    return found


def wrong_arrows(root: Path) -> list[str]:
    """Arrows that do not lead to an earlier line of `ORDER`."""
    return sorted(
        f"{folder} -> {other}"
        for folder, others in arrows(root).items()
        for other in others
        if PLACE[other] >= PLACE[folder]
    )


def arrows_between_stages(root: Path) -> list[str]:
    """Arrows from one stage into another, or into a folder of another."""
    return sorted(
        f"{folder} -> {other}"
        for folder, others in arrows(root).items()
        for other in others
        if {folder.split("/")[0], other.split("/")[0]} <= set(STAGES)
        and folder.split("/")[0] != other.split("/")[0]
    )


def test_no_stage_imports_another():
    assert arrows_between_stages(ROOT) == []


def test_every_folder_imports_only_folders_before_it():
    """Prints the arrows between folders (`pytest -s`). As each leads to an earlier line, folders form no circle."""
    found = arrows(ROOT)
    for folder in sorted(found, key=lambda name: (PLACE[name], name)):
        print(f"{folder} -> {', '.join(sorted(found[folder])) or '(none)'}")
    assert set(found) == set(PLACE)
    assert wrong_arrows(ROOT) == []


def test_the_order_is_the_one_that_contributing_shows():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The layout")[1].split("```")[1]
    shown = [tuple(line.split(", ")) for line in " ".join(text.split()).split(" < ")]
    assert shown == [tuple(line) for line in ORDER]


@pytest.mark.parametrize(
    ("file", "line", "wrong", "between_stages"),
    [
        ("train/a.py", "from stages.sample.b import f", ["train -> sample"], ["train -> sample"]),
        ("engine/a.py", "def f():\n    import stages.train.step.c", ["engine -> train/step"], []),
        ("train/step/a.py", "from stages.train.d import f", ["train/step -> train"], []),
        ("train/a.py", "from stages.train.step.c import f", [], []),
        ("sample/a.py", "from stages.train.step.c import f", [], ["sample -> train/step"]),
        ("evaluate.py", "import stages.train.d\nimport cache.files", [], []),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, file, line, wrong, between_stages):
    for name in (file, "sample/b.py", "train/step/c.py", "train/d.py"):
        (tmp_path / "stages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stages" / name).touch()
    (tmp_path / "stages" / file).write_text(line + "\n")
    assert wrong_arrows(tmp_path) == wrong
    assert arrows_between_stages(tmp_path) == between_stages
