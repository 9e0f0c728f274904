"""Memory does not grow with the data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Peak memory of preparing a file that warms up, a small one, and then a large one, for each folder in a fork of its own.
SCRIPT = """
import os, resource, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast  # AutoTokenizer imports ten times as much
from cache.artifacts import Store
from stages.runtime.context import Context
from stages.prepare.stage import prepare
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.template import Template
template = Template(PreTrainedTokenizerFast.from_pretrained(sys.argv[1]), "auto", True)
settings = PrepareSettings(mismatched=False)
for folder in map(Path, sys.argv[2:]):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    for name in ("warm", "small", "large"):
        prepare(DataSettings(path=str(folder / name) + ".jsonl"), settings, template, Context(Store(folder / "store")))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
    os._exit(0)
"""
# Prompts. What is made of the 9,000 more that the large file has, if it were kept: 21 to 23 MB.
SMALL, LARGE = 3_000, 12_000


def pair(number, count):
    return {"prompt": f"q {number} " * 8, "chosen": "yes " * 8, "rejected": "no " * 8}


def scored(number, count):
    """One of two responses to a prompt, which stand half the file apart."""
    second = number >= count
    prompt = f"q {number % count} " * 8
    return {"prompt": prompt, "response": "no " * 8 if second else "yes " * 8, "score": 1.0 - second}


@pytest.mark.slow
def test_four_times_the_rows_take_no_more_memory(tmp_path, tiny_model):
    folders = []
    for row, rows_of_a_prompt in ((pair, 1), (scored, 2)):
        folders.append(tmp_path / row.__name__)
        folders[-1].mkdir()
        for name, count in (("warm", SMALL - 1), ("small", SMALL), ("large", LARGE)):
            lines = [json.dumps(row(number, count)) + "\n" for number in range(count * rows_of_a_prompt)]
            (folders[-1] / f"{name}.jsonl").write_text("".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_model), *map(str, folders)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peaks = list(map(int, done.stdout.split()))
    grown = {folder.name: peaks[3 * i + 2] - peaks[3 * i + 1] for i, folder in enumerate(folders)}
    assert all(number < 12e6 for number in grown.values()), grown
