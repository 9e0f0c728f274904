"""The layers: imports go down only, between packages and between folders, and every file is named for one idea."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("cache", "stages", "pipeline")
# Folders, and files that stand alone in `stages`, from the lowest level up: each may import from the levels below its own.
LEVELS = (
    ("cache",),
    ("stages/settings", "stages/losses"),
    ("stages/runtime", "stages/data"),
    ("stages/formats", "stages/models", "stages/engine"),
    ("stages/tokenization", "stages/generation", "stages/train/step", "stages/train/monitoring"),
    ("stages/compare", "stages/curves"),
    ("stages/prepare", "stages/cache_ref", "stages/train", "stages/sample", "stages/judge"),
    ("stages/plan", "stages/evaluate.py", "stages/merge.py", "stages/verify.py"),
    ("stages/sharing.py",),
    ("pipeline",),
)
STAGES = ("stages/prepare", "stages/cache_ref", "stages/train", "stages/sample", "stages/judge")
EMPTY_NAMES = ("utils", "util", "helpers", "helper", "common", "base", "misc")


@cache
def import_statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a file, at its top or inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_modules(path: Path) -> list[str]:
    """Every module a file imports."""
    found = []
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        else:
            found.append("." * node.level + (node.module or ""))
    return found


def upward_imports(root: Path) -> list[str]:
    """`file imports module` for each import of a higher layer, or relative import (which hides its layer)."""
    wrong = []
    for height, layer in enumerate(LAYERS):
        for path in sorted((root / layer).rglob("*.py")):
            for module in imported_modules(path):
                if module.split(".")[0] in LAYERS[height + 1 :] or module.startswith("."):
                    wrong.append(f"{path.relative_to(root)} imports {module}")
    return wrong


def modules(root: Path) -> dict[str, Path]:
    """Every module of the three layers by its dotted name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for layer in LAYERS
        for path in sorted((root / layer).rglob("*.py"))
    }


def folder_of(root: Path, path: Path) -> str:
    """The folder of a file; a file that stands alone in `stages` counts as a folder, all of `pipeline` as one."""
    name = path.relative_to(root)
    if name.parts[0] == "pipeline":
        return "pipeline"
    return str(name if name.parent == Path("stages") and name.stem != "__init__" else name.parent)


def arrows(root: Path) -> dict[str, set[str]]:
    """From each folder to the folders that its files import, at the top or inside functions."""
    files, found = modules(root), {}
    for path in files.values():
        folder = folder_of(root, path)
        targets = {folder_of(root, files[name]) for name in imported_names(path) if name in files}
        found.setdefault(folder, set()).update(targets - {folder, "stages"})
    return found


def against_the_order(root: Path) -> list[str]:
    """`folder imports folder` for each arrow that does not go to a lower level."""
    level = {folder: height for height, folders in enumerate(LEVELS) for folder in folders}
    return [
        f"{folder} imports {target}"
        for folder, targets in sorted(arrows(root).items())
        for target in sorted(targets)
        if level[target] >= level[folder]
    ]


def between_stages(root: Path) -> list[str]:
    """`folder imports folder` for each arrow from one stage into another, or into a folder of another."""

    def stage_of(folder: str) -> str | None:
        return next((stage for stage in STAGES if f"{folder}/".startswith(f"{stage}/")), None)

    return [
        f"{folder} imports {target}"
        for folder, targets in sorted(arrows(root).items())
        for target in sorted(targets)
        if stage_of(folder) and stage_of(target) and stage_of(folder) != stage_of(target)
    ]


def circles(root: Path) -> list[str]:
    """Files that import each other in a circle, at any depth and inside functions, too."""
    targets = {}
    files = modules(root)
    for name, path in files.items():
        found = {module for module in imported_names(path) if module in files}
        targets[name] = {other for other in found if other != name and not name.startswith(f"{other}.")}
    return in_a_circle(targets)


def in_a_circle(targets: dict[str, set[str]]) -> list[str]:
    """The names from which a path of arrows leads back to themselves."""

    def reach(name: str) -> set[str]:
        seen, todo = set(), [name]
        while todo:
            new = targets.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    return sorted(name for name in targets if name in reach(name))


def imported_names(path: Path) -> set[str]:
    """Modules a file imports, and `package.name` for `from package import name`, which may be one."""
    modules = set(imported_modules(path))
    for node in import_statements(path):
        if isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def badly_named(root: Path) -> list[str]:
    """Files whose name says nothing of what they hold."""
    paths = [path for layer in (*LAYERS, "tests", "benchmarks") for path in (root / layer).rglob("*.py")]
    return sorted(str(path.relative_to(root)) for path in paths if path.stem in EMPTY_NAMES)


def test_imports_go_down_only():
    assert upward_imports(ROOT) == []


def test_no_files_import_each_other_in_a_circle():
    assert circles(ROOT) == []


def test_the_folders_keep_their_order():
    """Prints the arrows between folders (`pytest -s`)."""
    found = arrows(ROOT)
    for folders in LEVELS:
        for folder in folders:
            targets = sorted(found[folder], key=[name for level in LEVELS for name in level].index)
            print(f"{folder:25} -> {', '.join(target.removeprefix('stages/') for target in targets)}")
    assert sorted(found.keys() - {"stages"}) == sorted(folder for folders in LEVELS for folder in folders)
    assert against_the_order(ROOT) == []


def test_the_order_is_the_one_that_contributing_shows():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The layout")[1].split("```")[1]
    shown = [tuple(line.split(", ")) for line in " ".join(text.split()).split(" < ")]
    assert shown == [tuple(folder.removeprefix("stages/") for folder in folders) for folders in LEVELS[1:-1]]


def test_no_folders_import_each_other_in_a_circle():
    assert in_a_circle(arrows(ROOT)) == []


def test_no_stage_imports_another():
    assert between_stages(ROOT) == []


def test_no_file_has_a_name_that_says_nothing():
    assert badly_named(ROOT) == []


def test_the_lowest_layer_knows_no_language_model():
    known = {"torch", "transformers", "vllm", "datasets", "tokenizers"}
    wrong = [
        f"{path.name} imports {module}"
        for path in (ROOT / "cache").glob("*.py")
        for module in imported_modules(path)
        if module.split(".")[0] in known
    ]
    assert wrong == []


def tree(root, files):
    """A toy tree of files with these lines."""
    for file, line in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(line + "\n")


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("cache/a.py", "import stages.data.rows", "imports stages.data.rows"),
        ("cache/a.py", "from pipeline import cli", "imports pipeline"),
        ("cache/a.py", "def f():\n    from stages.data.rows import Row", "imports stages.data.rows"),
        ("stages/losses/a.py", "from pipeline.config import RunConfig", "imports pipeline.config"),
        ("stages/a.py", "from ..pipeline import run", "imports ..pipeline"),
        ("stages/a.py", "import cache.files\nimport stagesque\nfrom pipelines import x", None),
        ("pipeline/a.py", "import cache.files, stages.data.rows", None),
    ],
)
def test_a_violation_is_found(tmp_path, file, line, wrong):
    tree(tmp_path, {file: line})
    assert upward_imports(tmp_path) == ([f"{file} {wrong}"] if wrong else [])


def test_a_name_that_says_nothing_is_found(tmp_path):
    (tmp_path / "stages/losses").mkdir(parents=True)
    (tmp_path / "stages/losses/base.py").touch()
    (tmp_path / "stages/baseline.py").touch()
    assert badly_named(tmp_path) == ["stages/losses/base.py"]


def test_a_circle_is_found(tmp_path):
    (tmp_path / "stages/losses").mkdir(parents=True)
    (tmp_path / "stages/losses/__init__.py").write_text("from stages import b\n")
    (tmp_path / "stages/b.py").write_text("def f():\n    from stages.c import g\n")
    (tmp_path / "stages/c.py").write_text("import stages.losses\n")
    (tmp_path / "stages/d.py").write_text("from stages.c import f\n")
    assert circles(tmp_path) == ["stages.b", "stages.c", "stages.losses"]


TOY = {
    "cache/files.py": "",
    "stages/data/rows.py": "from cache import files",
    "stages/evaluate.py": "from stages.train import stage",
    "stages/prepare/stage.py": "import stages.data.rows",
    "stages/train/stage.py": "from stages.data.rows import Row\nfrom stages.train.step import step",
    "stages/train/step/step.py": "import stages.data.rows",
}


@pytest.mark.parametrize(
    ("file", "line", "order", "stages"),
    [
        ("stages/data/pairs.py", "import stages.data.rows", [], []),
        ("stages/data/pairs.py", "def f():\n    import stages.prepare.stage", ["stages/data imports stages/prepare"], []),
        ("stages/train/step/loss.py", "import stages.train.stage", ["stages/train/step imports stages/train"], []),
        ("stages/train/loop.py", "import stages.evaluate", ["stages/train imports stages/evaluate.py"], []),
        ("stages/train/loop.py", "from stages.prepare import stage", ["stages/train imports stages/prepare"], ["stages/train imports stages/prepare"]),
        ("stages/prepare/loss.py", "import stages.train.step.step", [], ["stages/prepare imports stages/train/step"]),
    ],
)  # fmt: skip
def test_an_arrow_against_the_rules_is_found(tmp_path, file, line, order, stages):
    tree(tmp_path, TOY | {file: line})
    assert against_the_order(tmp_path) == order
    assert between_stages(tmp_path) == stages


def test_a_circle_of_folders_is_found_though_no_files_form_one(tmp_path):
    tree(tmp_path, TOY)
    assert in_a_circle(arrows(tmp_path)) == []
    tree(
        tmp_path,
        {
            "stages/data/pairs.py": "import stages.models.loading",
            "stages/models/loading.py": "import stages.data.rows",
        },
    )
    assert circles(tmp_path) == []
    assert in_a_circle(arrows(tmp_path)) == ["stages/data", "stages/models"]
