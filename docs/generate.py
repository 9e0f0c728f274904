"""Writes the lists that the documents repeat from the code: `python docs/generate.py`, or `make docs`.

A block lies between `<!-- NAME: written by docs/generate.py -->` and `<!-- end of NAME -->`; `BLOCKS` has its
function. In configs/reference.yaml the names of the formats and of the losses are written. A test fails when a
document is not what this script would write.
"""

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import reference_pages  # noqa: E402
import typer.main  # noqa: E402
from markdown_tables import escaped, summary, table  # noqa: E402

import cache.errors  # noqa: E402
from cache.errors import AlignError  # noqa: E402
from pipeline.cli import app  # noqa: E402
from pipeline.config import RunConfig, load_config  # noqa: E402
from stages.formats import FAMILIES, FORMATS  # noqa: E402
from stages.losses import LOSSES  # noqa: E402
from stages.losses.contract import Loss  # noqa: E402
from stages.losses.mixture import Mixture  # noqa: E402

REFERENCE = ROOT / "configs" / "reference.yaml"
BLOCK = re.compile(r"(<!-- ([\w-]+): written by docs/generate.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
COMMENT_WIDTH = 106


def documents() -> list[Path]:
    """The files that may hold a block, and the one YAML file."""
    return [*sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.md")}), REFERENCE]


def rewritten(path: Path) -> str:
    """The text of a document with every block as the code has it now."""
    text = path.read_text(encoding="utf-8")
    if path == REFERENCE:
        return _named(
            _named(text, "format", "known: ", FORMATS_LIST, ";"), "name", "which loss: ", LOSSES_LIST, "."
        )
    return BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]]()}\n\n{match[3]}", text)


FORMATS_LIST = ", ".join(entry.name for entry in FORMATS)
LOSSES_LIST = ", ".join(LOSSES)


def _named(text: str, key: str, start: str, names: str, end: str) -> str:
    """The comment above `key` with `names` between `start` and `end`."""
    comment = next(
        match[0]
        for match in re.finditer(rf"(?:^  # .*\n)+(?=  {key}:)", text, re.MULTILINE)
        if start[:-1] in match[0]
    )
    words = " ".join(line.removeprefix("  # ") for line in comment.splitlines())
    before, rest = words.split(start, 1)
    words = f"{before}{start}{names}{end}{rest.split(end, 1)[1]}"
    lines = textwrap.wrap(words, COMMENT_WIDTH, break_long_words=False, break_on_hyphens=False)
    return text.replace(comment, "".join(f"  # {line}\n" for line in lines))


def losses() -> str:
    """Every loss with what it needs; the words are the summary line of its docstring."""
    return table(
        ["loss", "idea", "reference", "data", "paper"],
        [
            [f"[{name}](loss-formulas.md#{name})", _idea(cls), _reference(cls), _data(cls), _paper(cls)]
            for name, cls in LOSSES.items()
        ],
    )


def _idea(cls: type[Loss]) -> str:
    return summary(cls).rstrip(".")


def _reference(cls: type[Loss]) -> str:
    if cls is Mixture:
        return "if a part does"
    return "yes" if cls().needs_reference else "no"


def _data(cls: type[Loss]) -> str:
    if cls is Mixture:
        return "pairs"
    loss = cls()
    data = {"pair": "pairs", "row": "unpaired or pairs", "list": "ranked lists or pairs"}[loss.unit]
    return (
        data
        + (" with scores" if "scores" in loss.needs else "")
        + (", mismatched rows" if "kl" in loss.needs else "")
    )


def _paper(cls: type[Loss]) -> str:
    words = " ".join((inspect.getdoc(cls) or "").split())
    if number := re.search(r"arXiv (\d{4}\.\d{5})", words):
        return f"[{number[1]}](https://arxiv.org/abs/{number[1]})"
    source = re.search(r"Source: (.*?\(\d{4}\))", words)
    return source[1] if source else ""


def runs() -> str:
    """The run of each loss: what its file says of the loss, and the learning rate."""
    rows = []
    for name in LOSSES:
        config = load_config([ROOT / "configs" / f"{name}.yaml"], [], None)
        rows.append([f"[{name}.yaml]({name}.yaml)", ", ".join(_loss_fields(config)), _rate(config)])
    return table(["file", "loss fields", "learning rate"], rows)


def recipes() -> str:
    """Each recipe: model and values from its keys, what is published and the memory from its first lines."""
    rows = []
    for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml")):
        if path.stem.startswith("shared-"):
            continue
        config, said = load_config([path], [], None), _said(path)
        loss = " ".join([config.loss.model_dump()["name"], ", ".join(_loss_fields(config))]).strip()
        file = f"[{path.stem}]({path.name})"
        memory = said["Memory"].split(",")[0]
        rows.append(
            [file, loss, _rate(config), str(config.train.batch_size), memory, said["Published"].rstrip(".")]
        )
    return table(["recipe", "loss", "learning rate", "batch", "memory", "published"], rows)


def _said(path: Path) -> dict[str, str]:
    """The parts of a recipe's first lines by the word that each begins with."""
    lines = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    words = " ".join(lines[0].replace("# ", "").split()) if lines else ""
    parts = re.split(r"\b(Source|Published|Note|Memory): ", words)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _loss_fields(config: RunConfig) -> list[str]:
    fields = config.loss.model_dump(exclude_unset=True)
    shown = [f"{part['loss']['name']} {part['weight']:g}" for part in fields.pop("parts", [])]
    return shown + [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in fields.items()
        if key != "name"
    ]


def _rate(config: RunConfig) -> str:
    return f"{config.train.learning_rate:g}".replace("e-0", "e-")


def commands() -> str:
    """Every command, with the first line of its help."""
    return table(
        ["command", ""],
        [[f"`align {name}`", summary(found.callback)] for name, found in _commands().items()],
    )


def options() -> str:
    """Every option, its help, and the commands that take it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, found in _commands().items():
        for option in found.params:
            metavar = option.metavar or ""
            words = f"`{', '.join(option.opts)} {metavar}".strip() + "`"
            if option.param_type_name == "option":
                rows.setdefault((words, option.help), []).append(name)
    return table(
        ["option", "commands", ""], [[words, _of(names), help_] for (words, help_), names in rows.items()]
    )


def _commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _of(names: list[str]) -> str:
    missing = [name for name in _commands() if name not in names]
    if not missing:
        return "all"
    return ", ".join(names) if len(names) <= len(missing) else f"all but {', '.join(missing)}"


def exit_codes() -> str:
    """The exit codes: those of the errors, and five that are no `AlignError`."""
    kinds = [
        kind for kind in vars(cache.errors).values() if inspect.isclass(kind) and issubclass(kind, AlignError)
    ]
    codes = {
        kind.exit_code: re.sub(r" \(exit code \d\)|\.$", "", summary(kind))
        for kind in kinds
        if kind is not AlignError
    }
    return table(
        ["code", "meaning"],
        [
            ["0", "done, or already there"],
            ["1", "a bug: the traceback is shown"],
            *([str(code), codes[code]] for code in sorted(codes)),
            [
                "129, 130, 143",
                "hung up (SIGHUP), interrupted (Ctrl-C) or terminated (SIGTERM): type the same command to continue",
            ],
        ],
    )


def engine() -> str:
    """Times as fast as TRL and share of its memory, from the results of benchmarks/engine.py."""
    results = {(row["name"], row["peer_kind"]): row["ratio"] for row in _results("engine")}
    kinds = ["shipped", "compact", "tuned"]
    rows = []
    for name in dict.fromkeys(name for name, _ in results if not name.startswith("memory_")):
        ratios = [(results.get((name, kind)), results.get((f"memory_{name}", kind))) for kind in kinds]
        cells = ["" if speed is None else f"{speed:.1f} (1/{memory:.1f})" for speed, memory in ratios]
        rows.append([*_parsed_cell(name), *cells])
    return table(["step", "data", "max_length", "vocabulary", "dtype", *kinds], rows)


def _parsed_cell(name: str) -> Sequence[str]:
    match = re.fullmatch(r"(train_dpo|train_kto|cache_ref)_(hh|en_demo)(\d+)_(\d+k)_(\w+)", name)
    assert match is not None, f"benchmarks/engine.py wrote a name of another shape: {name}"
    steps = {"train_dpo": "dpo", "train_kto": "kto", "cache_ref": "reference pass"}
    data = {"hh": "hh-rlhf", "en_demo": "en_demo"}
    return steps[match[1]], data[match[2]], match[3], match[4], match[5]


def prepare() -> str:
    """Preparation beside TRL, from the results of benchmarks/prepare_vs_trl.py."""
    rows = []
    for row in _results("prepare_vs_trl"):
        processes = re.search(r"prepare_(\d)_process", row["name"])
        assert processes is not None
        library = "fastokens" if row["name"].endswith("fastokens") else "tokenizers"
        rows.append(
            [processes[1], library, f"{row['ours']:.1f} s", f"{row['peer']:.1f} s", f"{row['ratio']:.1f}"]
        )
    return table(["processes each", "`prepare.tokenizer`", "align", "TRL", "ratio"], rows)


def memory() -> str:
    """Predicted and measured memory, from the results of benchmarks/memory.py."""
    columns = ["predicted", "measured", "off", "held"]
    return table(
        ["run", *columns],
        [[row["name"], *(str(row[key]).replace("%", " %") for key in columns)] for row in _results("memory")],
    )


def reliability() -> str:
    """The table of promises, from the results of `make reliability`."""
    rows = [(row["name"], f"{row['tried']:,}", f"{row['held']:,}") for row in _results("reliability")]
    return table(("promise", "cases tried", "cases held"), rows)


def formats() -> str:
    """Every format by family: its name, whose layout it is, and its columns."""
    parts = []
    for family, entries in FAMILIES.items():
        rows = [[f"`{entry.name}`", entry.origin, escaped(entry.columns)] for entry in entries]
        parts += [f"## {family}", table(["`data.format`", "from", "columns"], rows)]
        if any(entry.ranked for entry in entries):
            parts.append(RANKED)
    return "\n\n".join(parts)


RANKED = """\
Of these, `prepare` keeps the best response and the worst one as a pair. With `prepare.graded=ranked` it keeps all of them as a
ranked list, of which `train.pairs` forms `best_worst`, `adjacent` or `all` pairs."""


def example_rows() -> str:
    """An example row of each format."""
    return "\n".join(["```jsonl", *(entry.example for entry in FORMATS), "```"])


def _results(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


BLOCKS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "example-rows": example_rows,
    "losses": losses,
    "runs": runs,
    "recipes": recipes,
    "commands": commands,
    "options": options,
    "exit-codes": exit_codes,
    "engine": engine,
    "prepare": prepare,
    "memory": memory,
    "reliability": reliability,
    **reference_pages.BLOCKS,
}


def main() -> None:
    """Write every document that is not up to date."""
    for path in documents():
        text = rewritten(path)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
