"""Prepare every file of a folder of real data with nothing but its path, and say what became of every row.

In:  --data FOLDER with pairs/, graded/, kto/, models/ and tokenizers/.
Out: results/prepare_every_file.json and .md; exit code 1 when a file is refused.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import write_results
from cache.artifacts import Store
from cache.errors import DataError
from stages.prepare.stage import prepare
from stages.runtime.context import Context
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.template import Template

REFUSED = "refused"
NOTES = """Every file with its path and no other option (`max_length` 1024 tokens, the default). rows in = kept + dropped. One response a row (`scored_rows`, `prometheus`) is gathered into a list for
each prompt, so rows in are lists there. `gpt2` and `stories260K` have no chat template: `auto` is their `plain`.

What is dropped, and why:

- hh: 5 pairs whose transcripts share no prompt (`prompts_differ`), 4 with an empty chosen reply (`empty_completion`).
- oasst_rm_zh: 3 lists whose best and worst answer are the same text (`identical_completions`).
- PandaLM: 105 rows without a majority among the three votes (`tie`), 52 of the rest with an empty response
  (`empty_completion`), and 6 rows whose response is the JSON value true or false (`not_text`).
- odpo_tldr: 3 posts with one summary (`fewer_than_two_responses`), 2 whose summaries all have one score (`tie`).
- odpo_imdb: 3 openings whose best or worst continuation is blank (`empty_completion`). Three of the 252
  openings have 20 or 30 continuations, in several places of the file: its 2,560 rows are 252 lists.
- prometheus: 6 questions whose four answers have the same mean score (`tie`).
- kto_en_demo: 1 row whose text spells `</s>`, which the tokenizer of stories260K cannot encode as text with certainty
  (`spells_special_token`); for olmo2_dolma2 1 row that spells `<|user|>`, which its template writes with ordinary tokens, so that
  nothing would tell them apart (`spells_turn_mark`). Elsewhere special tokens that a text spells are text.
- torchtitan_test has no ids for spaces, line breaks and nearly all Chinese characters. The column `notes` counts the kept rows
  that lose some, which is all; of the Chinese ones, answers that differ become equal token ids (`identical_tokens`)."""


def tokenizers(folder: Path) -> list[tuple[str, Any]]:
    from transformers import AutoTokenizer

    found = [("stories260K", AutoTokenizer.from_pretrained(folder / "models" / "stories260K-hf-hd32"))]
    for path in sorted((folder / "tokenizers").iterdir()):
        if path.is_dir():
            found.append((path.name, AutoTokenizer.from_pretrained(path)))
    return found


def prepared(path: Path, template: Template, folder: str) -> dict[str, Any]:
    """What became of one file with no option but its path."""
    settings, context = PrepareSettings(max_length=1024), Context(Store(Path(folder)), log=lambda _: None)
    try:
        artifact = prepare(DataSettings(path=str(path)), settings, template, context)
    except DataError as error:
        return {"format": f"{REFUSED}: {str(error)[:160]}"}
    counts = artifact.counts
    rejected = artifact.path / "rejected.jsonl"
    why: Counter[str] = Counter()
    if rejected.exists():
        for line in rejected.read_text().splitlines():
            why[json.loads(line)["problem"].split(", found")[0].split(", w")[0]] += 1
    return {
        "format": counts["format"],
        "rows_in": counts["rows_in"],
        "kept": counts["rows_kept"],
        "dropped": ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items()) or "0",
        "prompts_cut": counts["prompts_cut"],
        "completions_cut": counts["completions_cut"],
        "tokens_cut": counts["tokens_cut"],
        "notes": ", ".join(f"{n} {note}" for note, n in counts["notes"].items()),
        "listed in rejected.jsonl": "; ".join(f"{n} {problem}" for problem, n in why.most_common()),
    }


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
                    result = prepared(path, template, store)
                label = name if choice == "auto" else f"{name}, {choice}"
                rows.append({"name": f"{path.parent.name}/{path.name}", "tokenizer": label, **result})
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    write_results("prepare_every_file", rows, "Every file of real data, prepared", NOTES)
    sys.exit(int(any(row["format"].startswith(REFUSED) for row in rows)))


if __name__ == "__main__":
    main()
