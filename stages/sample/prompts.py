"""The prompts to sample: those of the held-out rows, or those of a file, rendered with the same template.

In: a rows artifact or a path, and the policy's template. Out: `Prompt`s with token ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact
from cache.errors import DataError
from stages.data.messages import Message, check_prompt, template_kwargs_of, tools_of
from stages.data.prompt_rows import asked
from stages.data.readers import read_source
from stages.data.rows import RowSet
from stages.data.source_row import BadRow
from stages.formats.contract import Preference, Tokens, assembled
from stages.generation.requests import Prompt
from stages.settings.data import DataSettings
from stages.tokenization.encode import Text
from stages.tokenization.template import Template


def heldout_prompts(rows: Artifact, template: Template) -> list[Prompt]:
    """Each different held-out prompt once, in the order of the rows."""
    heldout = RowSet.of(rows, "heldout")
    prompts: dict[tuple[int, ...], Prompt] = {}
    for start in heldout.starts:
        ids = heldout.prompt(start).tolist()
        if tuple(ids) not in prompts:
            text = template.tokenizer.decode(ids, skip_special_tokens=True)
            prompts[tuple(ids)] = Prompt(heldout.example_ids[start], text, ids)
    return list(prompts.values())


def file_prompts(path: str, template: Template) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file, and what is wrong with rows that have none; raises `DataError` where no row has one."""
    if not Path(path).expanduser().is_file():
        raise DataError(
            f"No such file of prompts: {path}. Give a .jsonl or .json file with --set sample.prompts=FILE."
        )
    found, texts, problems = [], [], []
    for row in read_source(DataSettings(path=path)):
        try:
            if row.value is None:
                raise BadRow(row.problem)
            content, tools = prompt_of_row(row.value)
            arguments = template_kwargs_of(row.value)
            texts.append(_text_of(Preference(content, [], tools, False, arguments), template))
            found.append((row.location, content))
        except BadRow as problem:
            problems.append(f"{row.location}: {problem}")
    if not found:
        raise DataError(
            f"{problems[0] if problems else path + ' is empty'}. No row of {path} has a prompt to sample."
        )
    encoded = template.encoder.encode_texts(texts)
    prompts = [
        Prompt(location, content, ids.tolist())
        for (location, content), ids in zip(found, encoded, strict=True)
    ]
    return prompts, problems


def _text_of(preference: Preference, template: Template) -> Text:
    """The rendered prompt with its generation prompt."""
    rendered = template.renderer.render(preference)
    if rendered.escape:
        raise BadRow("the text spells a special token, with which a prompt could forge a turn")
    return Text(rendered.prompt, rendered.is_plain)


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
