"""The first prepared rows as a table, so that a wrong prompt or mask is seen before training.

In: a rows artifact and its tokenizer. Out: the end of each prompt, the completion, and where what is trained ends.
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from cache.artifacts import Artifact
from pipeline.inspect.terminal import MASKED, PROMPT, TRAINED, TRAINED_OTHERS
from pipeline.inspect.token_text import Token, TokenTexts

EXAMPLES = 3
PROMPT_TOKENS, COMPLETION_START, COMPLETION_END = 24, 32, 12
END_MARK = " ◀ end"


def first_rows(artifact: Artifact, tokenizer: Any) -> Table:
    """The rows of the first training examples; mismatched rows, which repeat others, are left out."""
    texts = TokenTexts(tokenizer)
    table = Table(box=None, padding=(0, 2), title="first rows", title_justify="left", title_style="bold")
    for name in ("row", "end of the prompt", "completion"):
        table.add_column(name, style="dim" if name == "row" else "", overflow="fold")
    name = next(file["name"] for file in artifact.manifest["files"] if file["name"].startswith("train-"))
    [shard] = artifact.shards(name)
    rows = shard.slice(0, 8 * EXAMPLES).to_pylist()
    sources = list(dict.fromkeys(row["source"] for row in rows))[:EXAMPLES]
    for row in rows:
        if row["source"] in sources and row["role"] != "mismatched":
            table.add_row(
                f"{row['source']} {row['role']}", _prompt(texts, row["prompt_ids"]), _completion(texts, row)
            )
    return table


def _prompt(texts: TokenTexts, ids: Sequence[int]) -> Text:
    text = Text("… " if len(ids) > PROMPT_TOKENS else "", MASKED)
    _add(text, texts.of(ids[-PROMPT_TOKENS:]), PROMPT)
    return text


def _completion(texts: TokenTexts, row: dict[str, Any]) -> Text:
    """Its first and last tokens, what is masked in another style, and a mark behind the last token that is trained."""
    ids, mask = row["completion_ids"], row["completion_mask"]
    last = max((place for place, trained in enumerate(mask) if trained), default=-1)
    is_long = len(ids) > COMPLETION_START + COMPLETION_END
    parts = [(0, COMPLETION_START), (len(ids) - COMPLETION_END, len(ids))] if is_long else [(0, len(ids))]
    text = Text()
    for start, end in parts:
        text.append(" … " if start else "", MASKED)
        at = start
        for token in texts.of(ids[start:end]):
            at += len(token.ids)
            style = TRAINED.get(row["role"], TRAINED_OTHERS) if mask[at - 1] else MASKED
            _add(text, [token], style)
            if at - 1 == last:
                text.append(END_MARK, "bold")
    return text


def _add(text: Text, tokens: Sequence[Token], style: str) -> None:
    for token in tokens:
        shown = token.text.replace("\n", "↵").replace("\t", "→")
        text.append(shown, f"{style} reverse" if token.is_special else style)
