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
    return {"prompt": f"q {number} " * 40, "chosen": "yes " * 40, "rejected": "no " * 40}


def scored(number, count):
    """One of two responses to a prompt, which stand half the file apart."""
    second = number >= count
    prompt = f"q {number % count} " * 40
    return {"prompt": prompt, "response": "no " * 40 if second else "yes " * 40, "score": 1.0 - second}


@pytest.mark.slow
@pytest.mark.parametrize(("row", "rows_of_a_prompt"), [(pair, 1), (scored, 2)])
def test_four_times_the_rows_take_no_more_memory(tmp_path, tiny_model, row, rows_of_a_prompt):
    paths = []
    for count in (6_000, 24_000):
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
    # The ids and masks of 18,000 more rows are 30 MB, and Python's objects for their text more than that.
    assert large - small < 20e6, (small, large)
