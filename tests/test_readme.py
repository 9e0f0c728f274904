"""What the documents say: commands parse, links lead somewhere, tables are what the code does."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main

from cache.errors import AlignError, CorruptError, DataError, MachineError, StaleError, UsageError
from pipeline.cli import EXAMPLES, app
from pipeline.config import RunConfig, load_config
from stages.formats import FORMATS
from stages.losses import LOSSES
from stages.prepare.truncation import fit
from stages.settings.data import PrepareSettings

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "configs").glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"(?:align|torchrun [^`;#\n]*-m pipeline) (?:prepare|cache-ref|train|sample|eval|run|merge|plan|inspect)\b[^`;#\n]*"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(read(path)) if found == language]


def section(title: str) -> str:
    """The text of a README section, up to the next heading."""
    return re.split(r"^#+ ", read(README).split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str) -> list[list[str]]:
    """Cells of a Markdown table's body."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def commands() -> list[str]:
    """Every command line in the documents and in the help texts, with loop variables filled in."""
    found = [line for examples in EXAMPLES.values() for line in examples]
    for path in DOCUMENTS:
        found += [match.rstrip() for match in COMMAND.findall(read(path))]
    return sorted({line.replace("$loss", "kto").replace("$beta", "0.1") for line in found})


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with configs/ and the README's own files, as its reader would have them."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yaml").write_text(blocks(README, "yaml")[0])
    (tmp_path / "pairs.jsonl").write_text(blocks(README, "jsonl")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_parses_and_its_configuration_loads(project, line):
    stage, *arguments = shlex.split(re.split(r"align |-m pipeline ", line, maxsplit=1)[1])
    command = typer.main.get_command(app).commands[stage]  # type: ignore[attr-defined]
    values = command.make_context(stage, arguments).params
    config = load_config(values["config"] or [], values["set_"] or [], values.get("loss"))
    assert isinstance(config, RunConfig)


def test_the_documents_hold_commands_of_every_stage():
    lines = "\n".join(commands())
    assert [name for name in EXAMPLES if f"align {name} -c mine.yaml" not in lines] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path):
    targets = [link.split("#")[0] for link in LINK.findall(read(path)) if "://" not in link]
    assert [target for target in targets if target and not (path.parent / target).exists()] == []


def test_the_tree_names_every_folder_of_code_and_no_other():
    tree = next(body for body in blocks(README, "") if body.startswith("cache/"))
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    folders = {
        str(path.parent.relative_to(ROOT))
        for floor in ("cache", "stages", "pipeline")
        for path in (ROOT / floor).rglob("__init__.py")
    }
    inner = {"stages", "stages/train/step", "stages/train/monitoring"}
    assert named == folders - inner


def test_the_table_of_losses_is_the_list_in_the_code():
    rows = table(section("Losses"))
    assert [re.findall(r"\[(\w+)\]", row[0])[0] for row in rows] == list(LOSSES)
    for name, _, reference, learns_from, _ in rows:
        cls = LOSSES[re.findall(r"\[(\w+)\]", name)[0]]
        if cls.__name__ == "Mixture":
            continue
        assert reference == ("yes" if "ref_logps" in cls.always_needs else "no")
        assert ("scores" in learns_from) == ("scores" in cls.always_needs)
        assert ("unpaired" in learns_from) == (cls.unit == "row")
        assert ("mismatched" in learns_from) == ("kl" in cls.always_needs)


def test_the_papers_linked_are_those_of_the_docstrings():
    for name, *_, paper in table(section("Losses")):
        number = re.search(r"abs/(\d+\.\d+)", paper)
        if number:
            assert number[1] in (LOSSES[re.findall(r"\[(\w+)\]", name)[0]].__doc__ or "")


def test_the_readme_names_every_format():
    cells = " ".join(row[1] for row in table(section("Formats")))
    assert [name for name in re.findall(r"`(\w+)`", cells) if name in {f.name for f in FORMATS}] == [
        format_.name for format_ in FORMATS
    ]


TRUNCATION = read(ROOT / "docs" / "truncation.md").split("# An example of three parts")[1].split("\n## ")[0]


@pytest.mark.parametrize("row", table(TRUNCATION), ids=lambda row: row[0])
def test_the_truncation_table_is_what_happens(row):
    settings = dict(pair.split(": ") for pair in re.findall(r"`([^`]*)`", row[0]))
    limits = PrepareSettings(
        **{key: int(value) if value.isdigit() else value for key, value in settings.items()}  # type: ignore[arg-type]
    )
    sides = [(np.array(list(text)), np.ones(len(text), bool)) for text in ("12345", "xy")]
    fitted = fit(np.array(list("abcdef")), sides, limits)
    cells = [cell.strip("`").replace(" ", "") for cell in row[1:]]
    if fitted is None:
        assert cells == ["dropped", "", ""]
    else:
        assert cells == ["".join(ids) for ids in (fitted.prompt_ids, *(ids for ids, _ in fitted.completions))]


def test_the_exit_codes_are_those_of_the_errors():
    documented = {int(code) for row in table(section("Exit codes")) for code in row[0].split(", ")}
    errors = (AlignError, UsageError, DataError, StaleError, CorruptError, MachineError)
    assert documented == {0, 130, 143} | {error.exit_code for error in errors}


def test_the_table_of_runs_is_what_the_files_say():
    rows = table(read(ROOT / "configs/README.md").split("## A run for each loss")[1])
    assert [re.findall(r"\[(\w+)\.yaml\]", row[0])[0] for row in rows] == list(LOSSES)
    for name, shown, rate, _ in rows:
        config = load_config([ROOT / "configs" / re.findall(r"\(([\w.]+)\)", name)[0]], [], None)
        assert float(rate) == config.train.learning_rate
        values = config.loss.model_dump()
        if "parts" in values or shown == "-":
            continue
        for entry in shown.split(", "):
            key, value = entry.split(" ")
            assert str(values[key]) == value or float(values[key]) == float(value)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_command_line_says_what_it_would_do_and_writes_nothing(project):
    before = sorted(project.rglob("*"))
    done = run("run", "--dry-run", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["prepare", "cache-ref", "train", "sample"]
    assert sorted(project.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", EXAMPLES)
def test_help_shows_examples(project, stage):
    done = run(stage, "--help", cwd=project)
    assert done.returncode == 0
    assert "Examples" in done.stdout
    assert EXAMPLES[stage][0] in done.stdout


@pytest.mark.slow
def test_a_mistake_is_one_line_and_its_exit_code(project):
    for arguments, code in (
        (["train", "--loss", "kt0"], 2),
        (["prepare", "--nope"], 2),
        (["prepare", "--set", "data.path=nope.jsonl", "--set", "policy.model=./nope"], 3),
    ):
        done = run(*arguments, cwd=project)
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith("align: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
