"""The files of a model folder that say how to talk to it: tokenizer, chat template, generation configuration.

In: the model that training started from, and the rows that were trained on. Out: files with which the folder writes a
conversation as the rows did and stops where they stopped: `generate()` of transformers and vLLM read the list of end tokens
in generation_config.json, llama.cpp the end-of-sequence token of the tokenizer.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cache.artifacts import Artifact
from cache.files import read_json, write_json
from stages.models.loading import ModelSource, load_tokenizer

CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class ChatFormat:
    """How rows were written: the chat template, None if none was used, and the ids that can end a completion."""

    template: str | None
    end_ids: tuple[int, ...]

    @classmethod
    def of(cls, rows: Artifact) -> "ChatFormat":
        """That of prepared rows."""
        path = rows.path / CHAT_TEMPLATE
        template = path.read_text(encoding="utf-8") if path.is_file() else None
        return cls(template, tuple(rows.counts["turn_end_ids"]))


def write_chat_files(source: ModelSource, chat: ChatFormat, folder: Path) -> None:
    """Write the tokenizer into `folder`, and the generation configuration where it holds a whole model.

    Both are those of `source`, with the chat template and the end tokens of the rows.
    """
    ChatFiles(source, chat).write(folder)


class ChatFiles:
    """The chat files of a policy, for each of its checkpoints: transformers writes them once, then they are copied.

    Opening and writing a large tokenizer takes seconds, and the folder it came from may be gone by the next checkpoint.
    """

    def __init__(self, source: ModelSource, chat: ChatFormat) -> None:
        """Nothing is read yet."""
        self._source, self._chat = source, chat
        self._files: dict[Path, bytes] = {}

    def write(self, folder: Path) -> None:
        """Write the files into the folder of a saved model; all models are saved with the same files."""
        if not self._files:
            self._files = self._read(folder)
        for place, content in self._files.items():
            (folder / place).parent.mkdir(exist_ok=True)
            (folder / place).write_bytes(content)

    def _read(self, model: Path) -> dict[Path, bytes]:
        # In a folder of their own: other ranks write their shards into that of the model at the same time.
        with TemporaryDirectory() as name:
            folder = Path(name)
            _save(self._source, self._chat, model, folder)
            return {
                path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }


def _save(source: ModelSource, chat: ChatFormat, model: Path, folder: Path) -> None:
    """Save the chat files into `folder`, as they belong to the saved model or adapter in `model`."""
    tokenizer, generation = load_tokenizer(source), _generation_config(source.folder, model)
    ends = _ids(generation.get("eos_token_id"))
    # An end of turn that nothing in the folder declares becomes the end-of-sequence token.
    undeclared = [token for token in chat.end_ids if token not in (*ends, tokenizer.eos_token_id)]
    if undeclared:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(undeclared[0])
    if chat.template is not None:
        tokenizer.chat_template = chat.template
    tokenizer.save_pretrained(folder)
    if (model / "config.json").is_file():
        ends += [token for token in chat.end_ids if token not in ends]
        declared = ends[0] if len(ends) == 1 else ends or None
        write_json(folder / GENERATION_CONFIG, {**generation, "eos_token_id": declared})


def declared_ends(source: ModelSource) -> list[int]:
    """The ids at which the model's generation stops, as its folder declares them."""
    return _ids(_generation_config(source.folder, source.folder).get("eos_token_id"))


def _generation_config(source: Path, model: Path) -> dict[str, Any]:
    """The generation configuration of the source, else the one that was saved with the model, else the end tokens alone."""
    for path in (source / GENERATION_CONFIG, model / GENERATION_CONFIG):
        if path.is_file():
            return {key: value for key, value in read_json(path).items() if key != "_from_model_config"}
    return {"eos_token_id": read_json(source / "config.json").get("eos_token_id")}


def _ids(value: Any) -> list[int]:
    """End tokens, which a configuration gives as a list, a number or null."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]
