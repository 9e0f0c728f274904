"""The three layers: imports go down only, and every file is named for one idea."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("cache", "stages", "pipeline")
EMPTY_NAMES = ("utils", "util", "helpers", "helper", "common", "base", "misc")


def imported_modules(path: Path) -> list[str]:
    """Every module a file imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
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


def circles(root: Path) -> list[str]:
    """Files that import each other in a circle, at any depth and inside functions, too."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for layer in LAYERS
        for path in (root / layer).rglob("*.py")
    }
    targets = {}
    for name, path in files.items():
        found = {module for module in imported_names(path) if module in files}
        targets[name] = {other for other in found if other != name and not name.startswith(f"{other}.")}

    def reach(name: str) -> set[str]:
        seen, todo = set(), [name]
        while todo:
            new = targets[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return sorted(name for name in files if name in reach(name))


def imported_names(path: Path) -> set[str]:
    """Modules a file imports, and `package.name` for `from package import name`, which may be one."""
    modules = set(imported_modules(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
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
