"""Prepare every file of a folder of real data with nothing but its path, and say what became of every row.

In:  --data FOLDER with pairs/, graded/, kto/, models/ and tokenizers/.
Out: results/prepare_every_file.json and .md. A file that a malformed row stops is prepared again with
`data.on_bad_row=skip`, which the table says.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from record import write_results

from cache.artifacts import Store
from cache.errors import AlignError, DataError
from stages.context import Context
from stages.prepare import prepare
from stages.settings import DataSettings, PrepareSettings
from stages.templates import Template

NOTES = """Every file with its path and no other option (`max_length` 1024 tokens, as by default). A file in which a
malformed row stopped the stage was prepared again with `--set data.on_bad_row=skip`, and `skip` says so. rows in = kept +
dropped. One response a row (`scored_rows`, `prometheus`) is gathered into a list for each prompt, so rows in are lists."""


def tokenizers(folder: Path) -> list[tuple[str, Any]]:
    from transformers import AutoTokenizer

    found = [("stories260K", AutoTokenizer.from_pretrained(folder / "models" / "stories260K-hf-hd32"))]
    for path in sorted((folder / "tokenizers").iterdir()):
        if path.is_dir():
            found.append((path.name, AutoTokenizer.from_pretrained(path)))
    return found


def prepared(path: Path, template: Template, folder: str) -> dict[str, Any]:
    settings = PrepareSettings(max_length=1024)
    row: dict[str, Any] = {"skip": ""}
    for policy in ("error", "skip"):
        context = Context(Store(Path(folder)), say=lambda _: None)
        try:
            artifact = prepare(DataSettings(path=str(path), on_bad_row=policy), settings, template, context)
        except DataError as error:
            row["skip"] = str(error).split(". Mend")[0][:100]
            if policy == "skip":
                return {**row, "format": f"refused: {str(error)[:160]}"}
            continue
        counts = artifact.counts
        rejected = artifact.path / "rejected.jsonl"
        why: Counter[str] = Counter()
        if rejected.exists():
            for line in rejected.read_text().splitlines():
                why[json.loads(line)["problem"].split(", found")[0][:70]] += 1
        return {
            "format": counts["format"],
            "rows_in": counts["rows_in"],
            "kept": counts["rows_kept"],
            "dropped": ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items()) or "0",
            "prompts_cut": counts["prompts_cut"],
            "completions_cut": counts["completions_cut"],
            "tokens_cut": counts["tokens_cut"],
            "skip": "; ".join(f"{n} {problem}" for problem, n in why.most_common()),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data
    files = [path for part in ("pairs", "graded", "kto") for path in sorted((folder / part).iterdir())]
    rows = []
    for name, tokenizer in tokenizers(folder):
        for choice in ("auto",) if tokenizer.chat_template or name == "stories260K" else ("auto", "chatml"):
            template = Template(tokenizer, choice, append_eos=True)
            for path in files:
                with tempfile.TemporaryDirectory() as store:
                    try:
                        result = prepared(path, template, store)
                    except AlignError as error:
                        result = {"format": f"refused: {str(error)[:160]}"}
                label = name if choice == "auto" else f"{name}, {choice}"
                rows.append({"name": f"{path.parent.name}/{path.name}", "tokenizer": label, **result})
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    write_results("prepare_every_file", rows, "Every file of real data, prepared", NOTES)


if __name__ == "__main__":
    main()
