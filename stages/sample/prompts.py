"""The prompts to sample: held-out rows, rows that `prepare` has made of other data, or a file of prompts.

In: an artifact of rows or a path, and the policy's template. Out: `Prompts` with token ids.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact, is_artifact, open_artifact
from cache.errors import DataError, UsageError
from stages.data.messages import Message, check_prompt, prompt_column, template_kwargs_of, tools_of
from stages.data.prompt_rows import asked
from stages.data.readers import read_source
from stages.data.rows import SPLITS, RowSet
from stages.data.source_row import BadRow, SourceRow
from stages.formats import Unusable, detect_format
from stages.formats.contract import Preference, Tokens, assembled
from stages.generation.requests import Prompt
from stages.sample.prompt_sets import PromptSet, set_of
from stages.settings.data import DataSettings
from stages.tokenization.encode import Text
from stages.tokenization.template import Template


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their source, the set they belong to, and what is wrong with rows that have none."""

    prompts: list[Prompt]
    set: type[PromptSet] = PromptSet
    problems: tuple[str, ...] = ()


def prompts_of(path: str | None, rows: Artifact, template: Template, number: int | None) -> Prompts:
    """The first `number` prompts of `sample.prompts`, or the held-out prompts of `rows`."""
    if path is None:
        return Prompts(row_prompts(rows, ("heldout",), template)[:number])
    folder = Path(path).expanduser()
    if folder.is_dir() and is_artifact(folder):
        return Prompts(row_prompts(_own_rows(open_artifact(folder), template), SPLITS, template)[:number])
    return file_prompts(path, template, number)


def _own_rows(rows: Artifact, template: Template) -> Artifact:
    """Rows that the policy's tokenizer made; raises `UsageError` for others."""
    if rows.manifest["stage"] != "prepare":
        raise UsageError(
            f"sample.prompts={rows.path} is an artifact of `align {rows.manifest['stage']}`. Name one of `align prepare`, or a "
            f"file of prompts."
        )
    made, own = rows.manifest["identity"]["template"], template.identity()
    if made["tokenizer"] != own["tokenizer"]:
        raise UsageError(
            f"sample.prompts={rows.path} was prepared with another tokenizer than that of the policy: sha256 "
            f"{made['tokenizer'][:12]}, expected {own['tokenizer'][:12]}. Prepare it with --set policy.model=MODEL of this policy."
        )
    return rows


def row_prompts(rows: Artifact, splits: Iterable[str], template: Template) -> list[Prompt]:
    """Each different prompt of the splits once, in the order of the rows.

    Rows hold ids. A prompt of one user turn is a message again; others are their text without special tokens.
    """
    prompts: dict[tuple[int, ...], Prompt] = {}
    around = _around_a_question(template)
    for row_set in (RowSet.of(rows, split) for split in splits):
        for start in row_set.starts:
            ids = row_set.prompt(start).tolist()
            if tuple(ids) not in prompts:
                prompts[tuple(ids)] = Prompt(row_set.example_ids[start], _content(ids, template, around), ids)
    return list(prompts.values())


def _around_a_question(template: Template) -> tuple[str, str] | None:
    """What the chat template writes before and behind the text of one user turn; None for plain text."""
    if not template.renderer.uses_chat:
        return None
    marker = "a question"
    text = text_of(Preference([{"role": "user", "content": marker}], []), template).text
    before, _, behind = text.partition(marker)
    return before, behind


def _content(ids: list[int], template: Template, around: tuple[str, str] | None) -> str | list[Message]:
    tokenizer = template.tokenizer
    if around is not None:
        before, behind = around
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if whole.startswith(before) and whole.endswith(behind) and len(whole) > len(before) + len(behind):
            asked: list[Message] = [
                {"role": "user", "content": whole[len(before) : len(whole) - len(behind)]}
            ]
            with suppress(BadRow):
                [again] = template.encoder.encode_texts([text_of(Preference(asked, []), template)])
                if again.tolist() == ids:  # the text of several turns lies between the marks, too
                    return asked
    return tokenizer.decode(ids, skip_special_tokens=True)


def file_prompts(path: str, template: Template, number: int | None = None) -> Prompts:
    """The prompts of a file, a folder or a hub dataset; raises `DataError` where no row has one.

    A row has a prompt in a column of its own, or in any layout of preferences that `prepare` reads.
    """
    if Path(path).suffix and not Path(path).expanduser().exists() and path.count("/") != 1:
        raise DataError(f"No such file of prompts: {path}. Give one with --set sample.prompts=FILE.")
    source = read_source(DataSettings(path=path, max_samples=number))
    head = next(source, None)
    if head is None:
        raise DataError(f"{path} is empty. Name a file of prompts with --set sample.prompts=FILE.")
    found, problems = [], []
    kind: type[PromptSet] | None = None
    as_preferences = _format_of(head)
    for row in chain([head], source):
        try:
            if row.value is None:
                raise BadRow(row.problem)
            preference = _asked(row.value) if as_preferences is None else as_preferences(row.value)
            if isinstance(preference.prompt, Tokens):
                raise BadRow("the prompt is token ids. Name the rows that `align prepare` makes of them")
            text = text_of(preference, template)
            kind = kind or set_of(row.value)
            if not kind.matches(row.value):
                raise BadRow(
                    f"expected a row of {kind.name}, as those before, found the columns {', '.join(row.value)}"
                )
            found.append((row, preference.prompt, text))
        except (BadRow, Unusable) as problem:
            problems.append(f"{row.location}: {problem}")
    if not found or kind is None:
        raise DataError(f"{problems[0]}. No row of {path} has a prompt to sample.")
    encoded = template.encoder.encode_texts([text for _, _, text in found])
    prompts = [
        _prompt(row, content, ids.tolist(), kind)
        for (row, content, _), ids in zip(found, encoded, strict=True)
    ]
    return Prompts(prompts, kind, tuple(problems))


def _format_of(head: SourceRow) -> Any:
    """The conversion of the format of a file of preferences, or None for one that has a column with prompts."""
    try:
        if head.value is None or prompt_column(head.value):
            return None
    except BadRow:
        pass
    try:
        return detect_format("auto", [head]).convert
    except DataError:
        return None  # each row says what it lacks


def _prompt(row: SourceRow, content: str | list[Message], ids: list[int], kind: type[PromptSet]) -> Prompt:
    assert row.value is not None
    keys = {key: row.value[key] for key in kind.keys if row.value.get(key) is not None}
    return Prompt(row.location, content, ids, kind.temperature(row.value), kind.next_turns(row.value), keys)


def text_of(preference: Preference, template: Template) -> Text:
    """The rendered prompt with its generation prompt; raises `BadRow`."""
    rendered = template.renderer.render(preference)
    if rendered.escape:
        raise BadRow("the text spells a special token, with which a prompt could forge a turn")
    return Text(rendered.prompt, rendered.is_plain)


def _asked(row: Mapping[str, Any]) -> Preference:
    """The prompt of a row, its tools and template arguments; raises `BadRow`."""
    content, tools = prompt_of_row(row)
    return Preference(content, [], tools, False, template_kwargs_of(row))


def prompt_of_row(row: Mapping[str, Any]) -> tuple[str | list[Message], list[Any] | None]:
    """The prompt of a row and its tools; raises `BadRow`.

    Of MT-bench's `turns` the first question is the prompt. A `messages` column may end with an answer, which is left out.
    """
    column, content = asked(row)
    if column == "turns" and not isinstance(content, str):
        content = content[:1]
    if not isinstance(content, str):
        while (
            column in ("messages", "conversations")
            and len(content) > 1
            and content[-1]["role"] == "assistant"
        ):
            content = content[:-1]
        check_prompt(content, column)
    prompt = assembled(row, content, []).prompt
    return content if isinstance(prompt, Tokens) else prompt, tools_of(row)
