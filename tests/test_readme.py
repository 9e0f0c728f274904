"""What the documents say: links lead somewhere, tables and figures are those of the code and of results."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from cache.errors import AlignError, BusyError, CorruptError, DataError, MachineError, StaleError, UsageError
from stages.formats import FORMATS
from stages.losses import LOSSES
from stages.losses.margin import MarginLoss
from stages.losses.mixture import Mixture
from stages.prepare.truncation import truncate
from stages.settings.data import PrepareSettings

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "configs").rglob("*.md"), *DOCS.glob("*.md")])
GENERATE = runpy.run_path(str(DOCS / "generate.py"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(read(path)) if found == language]


def section(path: Path, title: str) -> str:
    """The text under a heading of a document, up to the next heading."""
    return re.split(r"^#+ ", read(path).split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(read(path))
    }


def table(text: str) -> list[list[str]]:
    """Cells of a Markdown table's body."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path):
    broken = []
    for link in LINK.findall(read(path)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", GENERATE["documents"](), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_generated_list_is_what_the_code_has(path):
    assert GENERATE["rewritten"](path) == read(path), "run `make docs`"


def test_every_generated_list_is_in_one_document():
    found = [name for path in DOCUMENTS for _, name, _ in GENERATE["BLOCK"].findall(read(path))]
    assert sorted(found) == sorted(GENERATE["BLOCKS"])


def test_a_stale_list_is_noticed(tmp_path):
    copy = tmp_path / "losses.md"
    copy.write_text(read(DOCS / "losses.md").replace("| [kto]", "| [kta]"), encoding="utf-8")
    assert GENERATE["rewritten"](copy) == read(DOCS / "losses.md")


def test_the_index_links_every_page():
    linked = {link for link in LINK.findall(read(DOCS / "README.md")) if "/" not in link}
    pages = {path.name for kind in ("*.md", "*.ipynb") for path in DOCS.glob(kind)}
    assert linked == pages - {"README.md"}


def test_the_menu_of_the_site_lists_every_page():
    menu = read(ROOT / "mkdocs.yml").partition("nav:")[2]
    pages = [path for kind in ("*.md", "*.ipynb") for path in DOCS.glob(kind)]
    assert [path.name for path in pages if f"docs/{path.name}" not in menu] == []


def test_the_readme_is_one_screen():
    assert len(read(README).splitlines()) <= 160


def test_the_tree_names_every_room_and_no_other():
    """`cache`, `pipeline` and the folders of `stages`; folders inside these belong to them."""
    tree = next(body for body in blocks(README, "") if body.startswith("cache/"))
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    rooms = {f"stages/{path.parent.name}" for path in (ROOT / "stages").glob("*/__init__.py")}
    assert named == rooms | {"cache", "pipeline"}


def test_the_table_of_losses_is_the_list_in_the_code():
    rows = table(section(DOCS / "losses.md", "Losses"))
    assert [re.findall(r"\[(\w+)\]", row[0])[0] for row in rows] == list(LOSSES)
    for name, _, reference, data, paper in rows:
        cls = LOSSES[re.findall(r"\[(\w+)\]", name)[0]]
        assert all(number in (cls.__doc__ or "") for number in re.findall(r"abs/(\d+\.\d+)", paper))
        if cls is Mixture:
            continue
        needs = cls().needs
        assert reference == ("yes" if "ref_logps" in needs else "no")
        assert ("scores" in data) == ("scores" in needs)
        assert ("unpaired" in data) == (cls.unit == "row")
        assert ("mismatched" in data) == ("kl" in needs)


def test_the_options_of_a_margin_are_those_of_the_losses_named():
    text = section(DOCS / "losses.md", "Options")
    named = re.findall(r"\w+", text.split("margin (")[1].split(")")[0])
    assert named == [name for name, cls in LOSSES.items() if issubclass(cls, MarginLoss)]
    own = set(MarginLoss.model_fields) - {"beta", "f_alpha_divergence_coef"}
    assert {row[0].strip("`") for row in table(text)} == own


def results(name: str) -> list[dict]:
    return json.loads(read(ROOT / "benchmarks" / "results" / f"{name}.json"))["rows"]


def test_the_readme_counts_losses_and_formats():
    text = read(README)
    assert f"DPO, KTO, SimPO, {len(LOSSES) - 1 - 3} more losses" in text
    assert f"the {len(FORMATS)} layouts" in text


def test_the_figures_of_the_readme_are_those_of_the_results():
    """Each sentence is put together from the results and has to stand in the section as it is."""
    text = " ".join(section(README, "Measured").split())
    engine = {(row["name"], row["peer_kind"]): row["ratio"] for row in results("engine")}
    cell, kinds = "train_dpo_hh512_32k_float32", ("shipped", "compact", "tuned")
    speed, memory = (
        [f"{engine[f'{prefix}{cell}', kind]:.1f}" for kind in kinds] for prefix in ("", "memory_")
    )
    for number, words in zip(
        speed, ("as fast as TRL's as shipped", "where TRL", "where its data"), strict=True
    ):
        assert f"{number} times {words}" in text
    assert "Its memory above the model is 1/{}, 1/{} and 1/{} of TRL".format(*memory) in text
    one, two = (
        next(
            row["ratio"] for row in results("prepare_vs_trl") if row["name"] == f"prepare_{n}_process_2_cores"
        )
        for n in (1, 2)
    )
    assert f"{one:.1f} times as fast as TRL with one process each, {two:.1f} times with two" in text
    assert f"{sum(row['reference_forwards'] for row in results('learning'))} forward passes" in text
    same = [row for row in results("losses_vs_trl") if row["same_definition"]]
    assert f"at most {max(row['peer_max_abs_diff'] for row in same):.1e} where" in text
    off = max(abs(float(row["off"].rstrip("%"))) for row in results("memory"))
    assert off <= 8
    assert "within 8 % in eleven setups" in text
    assert len(results("memory")) == 11


def test_the_error_messages_shown_are_those_of_the_code():
    """Of each sentence three words in a row stand in the source; the rest are values."""
    source = " ".join(
        " ".join(read(path).replace('"', "").split())
        for layer in ("cache", "stages", "pipeline")
        for path in (ROOT / layer).rglob("*.py")
    )
    messages = [line.removeprefix("align: ") for line in blocks(DOCS / "cache.md", "")[0].splitlines()]
    assert len(messages) > 1
    for sentence in (part for message in messages for part in re.split(r"(?<=[.)]) ", message)):
        words = sentence.split()
        runs = [" ".join(words[start : start + 3]) for start in range(len(words) - 2)]
        assert any(run in source for run in runs), sentence


TRUNCATION = section(DOCS / "truncation.md", "An example")


@pytest.mark.parametrize("row", table(TRUNCATION), ids=lambda row: row[0])
def test_the_truncation_table_is_what_happens(row):
    settings = dict(pair.split(": ") for pair in re.findall(r"`([^`]*)`", row[0]))
    limits = PrepareSettings(
        **{key: int(value) if value.isdigit() else value for key, value in settings.items()}  # type: ignore[arg-type]
    )
    sides = [(np.array(list(text)), np.ones(len(text), bool)) for text in ("12345", "xy")]
    fitted = truncate(np.array(list("abcdef")), sides, limits)
    cells = [cell.strip("`").replace(" ", "") for cell in row[1:]]
    if fitted is None:
        assert cells == ["dropped", "", ""]
    else:
        assert cells == ["".join(ids) for ids in (fitted.prompt_ids, *(ids for ids, _ in fitted.completions))]


def test_the_exit_codes_are_those_of_the_errors():
    documented = {
        int(code)
        for row in table(section(DOCS / "command-line.md", "Exit codes"))
        for code in row[0].split(", ")
    }
    errors = (AlignError, UsageError, DataError, StaleError, CorruptError, MachineError, BusyError)
    assert documented == {0, 129, 130, 143} | {error.exit_code for error in errors}
