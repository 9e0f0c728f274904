"""The parts of the reference that only repeat the code: every key, the formula of every loss, the Python interface.

In: configs/reference.yaml (which tests keep equal to the schema), the docstrings of the losses and of `pipeline.notebook`. Out:
Markdown for the blocks of docs/generate.py.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown_tables import escaped, summary, table

from pipeline import notebook
from stages.losses import LOSSES
from stages.losses.contract import Loss

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"((?:^#.*\n)+)^(\w+):\n((?:^  .*\n?)+)", re.MULTILINE)
KEY = re.compile(r"((?:^  #.*\n)+)^  (\w+):(.*)$", re.MULTILINE)
ARXIV = re.compile(r"arXiv\s+(\d{4}\.\d{5})")


def configuration() -> str:
    """Every block with its keys: default, allowed values, meaning."""
    text = (ROOT / "configs" / "reference.yaml").read_text(encoding="utf-8")
    return "\n\n".join(
        f"## {name}\n\n{_uncommented(comment)}\n\n{table(['key', 'default', 'values', 'meaning'], _keys(name, body))}"
        for comment, name, body in BLOCK.findall(text)
    )


def _keys(block: str, body: str) -> list[list[str]]:
    rows = []
    for comment, key, default in KEY.findall(body):
        meaning, _, values = _uncommented(comment).removesuffix("]").rpartition("[")
        rows.append([f"`{block}.{key}`", f"`{default.strip()}`", escaped(values), escaped(meaning.strip())])
    return rows


def _uncommented(comment: str) -> str:
    return " ".join(line.strip().removeprefix("#").strip() for line in comment.splitlines())


def loss_formulas() -> str:
    """Every loss: its docstring, and its fields with their defaults."""
    return "\n\n".join(_loss(name, cls) for name, cls in LOSSES.items())


def _loss(name: str, cls: type[Loss]) -> str:
    source = Path(inspect.getfile(cls)).relative_to(ROOT)
    words = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", inspect.getdoc(cls) or "")
    words = words.replace("\nValues:", "\n\nValues:")
    rows = [
        [f"`{field}`", f"`{_as_yaml(value.default)}`", escaped(_constraint(value))]
        for field, value in cls.model_fields.items()
        if field not in ("name", "parts")
    ]
    fields = table(["field", "default", "allowed"], rows) if rows else "It has no fields of its own."
    return f"## {name}\n\n{words}\n\n{fields}\n\nCode: [{source}](../{source})"


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _constraint(field: Any) -> str:
    """The bounds or the values of a field, as its annotation has them."""
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(rule, name, None) is not None
    ]
    values = re.findall(r"'(\w+)'", str(field.annotation))
    return " and ".join(bounds) or " | ".join(values) or ("true | false" if field.annotation is bool else "")


def python_interface() -> str:
    """The classes of the Python interface, with what each method or property returns."""
    parts = []
    for cls in (notebook.Session, notebook.Made, notebook.Rows, notebook.Policy, notebook.Picture,
                notebook.Completions, notebook.Verdicts):  # fmt: skip
        members = [
            [f"`{_signature(name, member)}`", escaped(summary(member))]
            for name, member in vars(cls).items()
            if inspect.getdoc(member) and not name.startswith("_") and not inspect.isclass(member)
        ]
        heads = [f"### {cls.__name__}", summary(cls)]
        if cls is notebook.Session:
            words = inspect.getdoc(cls.__init__) or ""
            heads += [f"`{_signature('Session', cls.__init__)}`", words]
        parts += heads + ([table(["", ""], members)] if members else [])
    return "\n\n".join(parts)


def _signature(name: str, member: Any) -> str:
    if isinstance(member, property):
        return name
    parameters = list(inspect.signature(member).parameters.values())[1:]
    shown = [
        str(parameter.replace(annotation=inspect.Parameter.empty)).replace("'", '"')
        for parameter in parameters
    ]
    return f"{name}({', '.join(shown)})"


BLOCKS: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "loss-formulas": loss_formulas,
    "python": python_interface,
}
