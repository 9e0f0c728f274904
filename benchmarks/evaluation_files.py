"""Are the files of `align sample` what evaluation tools read? Each is loaded by that tool's own loader.

In: a folder with `eval/mt_bench_question.jsonl` and `eval/ifeval_input_data.jsonl`, and a model in
`models/stories260K-hf-hd32`. Installs pinned versions of the tools into a temporary folder, samples a few prompts of each set,
and loads the files: AlpacaEval's and FastChat's loaders, the joins of IFEval's script (by prompt), `datasets`. Out:
`results/evaluation_files.json` and `.md`. Run from the repository root:

    python benchmarks/evaluation_files.py --data FOLDER
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import write_results
from benchmarks.stories import stories
from pipeline.config import build_config
from pipeline.session import Session

TOOLS = (
    "alpaca_eval==0.6.6",
    "fschat==0.2.36",
    "fire==0.7.1",
    "termcolor==3.1.0",
    "patsy==1.0.2",
    "python-dotenv==1.1.1",
)
ALPACA = """
import sys
from alpaca_eval.utils import load_or_convert_to_dataframe
frame = load_or_convert_to_dataframe(sys.argv[1])
print(sorted(set(frame.columns) & {"instruction", "output", "generator", "dataset"}), frame["generator"].unique().tolist(), len(frame))
"""
FASTCHAT = """
import sys
from fastchat.llm_judge.common import load_model_answers
[(model, answers)] = load_model_answers(sys.argv[1]).items()
print(model, len(answers), sorted({len(answer["choices"][0]["turns"]) for answer in answers.values()}))
"""
# Google's instruction_following_eval (not on PyPI) reads so: evaluation_lib.read_prompt_to_response_dict.
IFEVAL = """
import json, sys
answers = {}
with open(sys.argv[1]) as lines:
    for line in lines:
        example = json.loads(line)
        answers[example["prompt"]] = example["response"]
asked = [json.loads(line)["prompt"] for line in open(sys.argv[2])][: len(answers)]
print(len(answers), all(prompt in answers for prompt in asked))
"""
DATASETS = """
import sys, datasets
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
print(len(rows), sorted(rows.column_names))
"""


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    data = options.parse_args().data
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install(folder / "tools")
        rows = [
            *check(data, folder, "AlpacaEval", alpaca_file(folder), "alpaca_eval.json", ALPACA),
            *check(
                data, folder, "MT-bench", data / "eval" / "mt_bench_question.jsonl", "model_answer", FASTCHAT
            ),
            *check(
                data,
                folder,
                "IFEval",
                data / "eval" / "ifeval_input_data.jsonl",
                "ifeval.jsonl",
                IFEVAL,
                str(data / "eval" / "ifeval_input_data.jsonl"),
            ),
        ]
    notes = (
        "Four prompts of each set, sampled from stories260K; `found` is what the tool's own loader returned (IFEval's script is not on PyPI: "
        f"its reader is repeated here). Tools: {', '.join(TOOLS[:2])}."
    )
    write_results("evaluation_files", rows, "Files for evaluation tools, read by these tools", notes)


def install(target: Path) -> None:
    """Without dependencies: what they need besides is in this environment."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "-q",
        "--python",
        sys.executable,
        "--no-deps",
        "--target",
    ]
    subprocess.run([*command, str(target), *TOOLS], check=True)


def alpaca_file(folder: Path) -> Path:
    """Prompts in the layout of AlpacaEval's evaluation set."""
    path = folder / "alpaca.jsonl"
    rows = [
        {
            "instruction": f"Tell me about number {number}.\n",
            "output": "",
            "generator": "x",
            "dataset": "helpful_base",
        }
        for number in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(
    data: Path, folder: Path, name: str, prompts: Path, file: str, script: str, *arguments: str
) -> list[dict[str, Any]]:
    """Sample prompts and load the files; one row for the tool and one for `datasets`."""
    tree = stories(data) | {
        "sample": {
            "model": str(data / "models" / "stories260K-hf-hd32"),
            "prompts": str(prompts),
            "num_prompts": 4,
            "max_tokens": 16,
            "engine": "transformers",
        }
    }
    session = Session(build_config(tree), folder / "store")
    session.run("prepare")
    [made] = session.run("sample").as_json()["completions"].values()
    made_in = Path(made["artifact"])
    found = [("its tool", script, [str(made_in / file), *arguments])]
    found += [("datasets", DATASETS, [str(made_in / "completions.jsonl"), str(folder / "hf")])]
    rows = []
    for reader, code, given in found:
        done = subprocess.run(
            [sys.executable, "-c", code, *given],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(folder / "tools"), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
            check=False,
        )
        result = done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
        rows.append(
            {
                "name": name,
                "file": file if reader == "its tool" else "completions.jsonl",
                "reader": reader,
                "found": result,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
