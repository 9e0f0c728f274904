"""OpenAssistant's trees of messages: every message whose replies were ranked is a prompt of its own."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from stages.data.columns import entries, finite_number, mapping, text
from stages.data.messages import Message
from stages.data.source_row import BadRow, SourceRow
from stages.formats.contract import Format, Preference, ranked

ROLES = {"prompter": "user", "assistant": "assistant"}


class OpenAssistant(Format):
    """OpenAssistant's trees: from the root to each message with two ranked replies or more; rank 0 is best.

    Deleted replies and those without a rank are left out: nobody compared them.
    """

    name: ClassVar[str] = "oasst_trees"
    origin: ClassVar[str] = "OpenAssistant †"
    example: ClassVar[str] = (
        r'{"message_tree_id": "m", "prompt": {"role": "prompter", "text": "2+2?", "replies": [{"role": "assistant", "text": "4", "rank": 0, "replies": []}, {"role": "assistant", "text": "5", "rank": 1, "replies": []}]}}'
    )
    columns: ClassVar[str] = (
        "message_tree_id, prompt (role, text, replies with rank, to any depth); one example a node"
    )
    ranked: ClassVar[bool] = True
    has_trees: ClassVar[bool] = True

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        root = row.get("prompt")
        return "message_tree_id" in row and isinstance(root, Mapping) and "replies" in root

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        if "nodes" not in row:
            row = next(nodes_of(row))
        *before, asked = row["nodes"]
        turns = [_turn(node) for node in (*before, asked)]
        replies = _ranked_replies(asked)
        scores = [-finite_number(reply["rank"], "replies.rank") for reply in replies]
        return ranked(row, turns, [[_turn(reply)] for reply in replies], scores)


def spread(rows: Iterable[SourceRow]) -> Iterator[SourceRow]:
    """For each tree a row `{"nodes": [...]}` for every message with ranked replies; a row that could not be read stays one."""
    for row in rows:
        if row.value is None:
            yield row
            continue
        try:
            found = list(nodes_of(row.value))
        except BadRow as problem:
            yield replace(row, value=None, problem=str(problem))
            continue
        for number, node in enumerate(found, 1):
            place = (
                row.location if len(found) == 1 else f"{row.location} (message {number} with ranked replies)"
            )
            yield replace(row, location=place, value=node)


def nodes_of(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The paths to the messages with two ranked replies or more, from the root on; the root alone where there is none."""
    root = mapping(row, "prompt")
    waiting, found = [[root]], False
    while waiting:
        path = waiting.pop()
        if path[-1].get("role") == "prompter" and len(_ranked_replies(path[-1])) > 1:
            found = True
            yield {"nodes": path}
        waiting += [[*path, reply] for reply in reversed(_replies(path[-1]))]
    if not found:
        yield {"nodes": [root]}


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    replies = entries(node, "replies") if node.get("replies") else []
    return [mapping({"replies": reply}, "replies") for reply in replies]


def _ranked_replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [reply for reply in _replies(node) if reply.get("rank") is not None and not reply.get("deleted")]


def _turn(node: Mapping[str, Any]) -> Message:
    role = ROLES.get(str(node.get("role")))
    if role is None:
        raise BadRow(f"role: expected prompter or assistant, found {node.get('role')!r}")
    return {"role": role, "content": text(node, "text")}
