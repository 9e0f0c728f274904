"""Memory does not grow with the data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Peak memory of preparing a small file, and then a large one, in a process of its own.
SCRIPT = """
import resource, sys, transformers
from pathlib import Path
from cache.artifacts import Store
from stages.runtime.context import Context
from stages.prepare.stage import prepare
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.template import Template
template = Template(transformers.AutoTokenizer.from_pretrained(sys.argv[1]), "auto", True)
settings, context = PrepareSettings(mismatched=False), Context(Store(Path(sys.argv[2])))
for path in sys.argv[3:]:
    prepare(DataSettings(path=path), settings, template, context)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def pair(number, count):
    return {"prompt": f"q {number} " * 8, "chosen": "yes " * 8, "rejected": "no " * 8}


def scored(number, count):
    """One of two responses to a prompt, which stand half the file apart."""
    second = number >= count
    prompt = f"q {number % count} " * 8
    return {"prompt": prompt, "response": "no " * 8 if second else "yes " * 8, "score": 1.0 - second}


@pytest.mark.slow
@pytest.mark.parametrize(("row", "rows_of_a_prompt"), [(pair, 1), (scored, 2)])
def test_four_times_the_rows_take_no_more_memory(tmp_path, tiny_model, row, rows_of_a_prompt):
    paths = []
    for count in (3_000, 12_000):
        paths.append(tmp_path / f"{count}.jsonl")
        with open(paths[-1], "w") as handle:
            for number in range(count * rows_of_a_prompt):
                handle.write(json.dumps(row(number, count)) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_model), str(tmp_path / "store"), *map(str, paths)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    small, large = map(int, done.stdout.split())
    # What is made of 9,000 more rows, if it were kept: 21 to 23 MB.
    assert large - small < 12e6, (small, large)
