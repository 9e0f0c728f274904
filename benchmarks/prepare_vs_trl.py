"""`align prepare` against TRL's own preparation of the same rows: seconds, ids, the tokenizer's share, memory.

In: a folder with `pairs/hh_harmless_base_test.jsonl.gz` and `tokenizers/olmo2_dolma2`. Out:
`benchmarks/results/prepare_vs_trl.json` and a table `.md` beside it; exit code 1 when an id differs. Run from the
repository root:

    python benchmarks/prepare_vs_trl.py --data FOLDER

TRL gets an environment of its own in `.bench-venv`, made on the first run, and both sides run there. What runs
of TRL is `DPOTrainer._prepare_dataset` of the installed package, unchanged, on a data set that is loaded
already. What is timed of ours is the whole stage: reading the file, checking every row, hashing, tokenizing,
writing shards and publishing them. Each measurement is a process of its own, imports not counted; the two
sides alternate, with the same number of processes.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".bench-venv"
REQUIREMENTS = ["torch==2.13.0", "trl==1.16.0", "transformers<5.20", "pydantic>=2.10", "fastokens>=0.3.5"]
COPIES = 20
SIDES = ("ours", "fastokens", "trl")
MAX_LENGTH = 1 << 20  # nothing is cut, so that whole rows are compared


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--copies", type=int, default=COPIES, help="of the data set's 2,303 usable pairs")
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options.add_argument("--cores", type=int, default=os.cpu_count(), help="that both sides may run on")
    options.add_argument("--one", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    if Path(sys.prefix) != VENV:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        sys.exit(
            subprocess.run([str(python), str(Path(__file__).resolve()), *sys.argv[1:]], cwd=ROOT).returncode
        )
    sys.path.insert(0, str(ROOT))
    if chosen.one:
        print(json.dumps(measure(json.loads(chosen.one))))
    else:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: chosen.cores]))
        sys.exit(compare(chosen.data.resolve(), chosen.repetitions, chosen.copies, chosen.processes))


def compare(data: Path, repetitions: int, copies: int, process_counts: list[int]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        rows, quarter = Path(folder) / "rows.jsonl", Path(folder) / "quarter.jsonl"
        count = write_rows(data, rows, copies)
        write_rows(data, quarter, max(1, copies // 4))
        tokenizer = str(data / "tokenizers" / "olmo2_dolma2")
        table = []
        for processes in process_counts:
            job = {"rows": str(rows), "tokenizer": tokenizer, "processes": processes}
            runs: dict[str, list[dict]] = {side: [] for side in SIDES}
            for number in range(repetitions):
                for side in SIDES if number % 2 else reversed(SIDES):
                    runs[side].append(one({**job, "side": side}))
                    print(side, processes, runs[side][-1], flush=True)
            small = one({**job, "side": "ours", "rows": str(quarter)})
            name = f"prepare_{processes}_process_{len(os.sched_getaffinity(0))}_cores"
            ours = row_of(name, runs, "ours", count, processes)
            table += [
                {**ours, "peak_mib_of_a_quarter_of_the_rows": round(small["peak_mib"])},
                row_of(f"{name}_fastokens", runs, "fastokens", count, processes),
            ]
    write(table, count)
    return int(any(entry["different_rows"] for entry in table))


def write(table: list[dict], count: int) -> None:
    """Write the results; rows of an earlier run with other numbers of processes stay."""
    from benchmarks.record import RESULTS, write_results

    earlier = RESULTS / "prepare_vs_trl.json"
    names = {entry["name"] for entry in table}
    if earlier.exists():
        table += [entry for entry in json.loads(earlier.read_text())["rows"] if entry["name"] not in names]
    write_results(
        "prepare_vs_trl",
        sorted(table, key=lambda entry: entry["name"]),
        "align prepare against TRL's preparation",
        f"hh-rlhf harmless-base test, conversations with an explicit prompt, repeated to {count:,} pairs; OLMo 2's "
        f"tokenizer with a chat template; TRL 1.16.0. Medians of alternating runs (`runs`), seconds; `ratio` is TRL's over "
        "ours. Both sides have the same number of processes and may use the same cores, as many as the name says: with "
        "one process and two cores ours works on rows while the tokenizer's own threads work on those before, and TRL's "
        "calls the tokenizer row by row. `fastokens` is `prepare.tokenizer=fastokens`; the default is without it. "
        "`tokenizer_share` is the share of our wall time in which the tokenizer is at work (one process), "
        "`different_rows` how many rows have other ids than TRL's, `peak_mib` the memory that the stage added to a "
        "process with its imports, or that of its largest worker.",
    )


def row_of(name: str, runs: dict[str, list[dict]], own: str, count: int, processes: int) -> dict:
    ours, peer = (statistics.median(run["seconds"] for run in runs[side]) for side in (own, "trl"))
    hashes = [run["hashes"] for side in (own, "trl") for run in runs[side]]
    shares = [run["tokenizer_seconds"] / run["seconds"] for run in runs[own]]
    return {
        "name": name,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "peer_kind": "shipped",
        "dataset": "hh_harmless",
        "unit": "seconds",
        "ratio": round(peer / ours, 2),
        "runs": len(runs[own]),
        "ours_range": spread(runs[own]),
        "peer_range": spread(runs["trl"]),
        "ours_rows_per_second": round(count / ours),
        "tokenizer_share": round(statistics.median(shares), 3) if processes == 1 else None,
        "different_rows": 0 if len(set(hashes)) == 1 else count,
        "peak_mib": round(statistics.median(run["peak_mib"] for run in runs[own])),
    }


def spread(runs: list[dict]) -> str:
    seconds = [run["seconds"] for run in runs]
    return f"{min(seconds):.2f}-{max(seconds):.2f}"


def one(job: dict) -> dict:
    """Run one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--data", ".", "--one", json.dumps(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(data: Path, path: Path, copies: int) -> int:
    """The conversations of the data set with an explicit prompt, so that both sides are given the same."""
    from stages.formats import Transcript, Unusable

    lines = []
    with gzip.open(data / "pairs" / "hh_harmless_base_test.jsonl.gz") as source:
        for line in source:
            try:
                pair = Transcript.convert(json.loads(line))
            except Unusable:
                continue
            chosen, rejected = (candidate.completion for candidate in pair.candidates)
            if all(side[-1]["content"].strip() for side in (chosen, rejected)):
                lines.append(json.dumps({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}))
    path.write_text("\n".join(lines * copies) + "\n")
    return len(lines) * copies


def measure(job: dict) -> dict:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    rows, processes = Path(job["rows"]), job["processes"]
    if job["side"] == "trl":
        return trl(tokenizer, rows, processes)
    return ours(tokenizer, rows, processes, quick=job["side"] == "fastokens")


def ours(tokenizer, rows: Path, processes: int, quick: bool) -> dict:
    from cache.artifacts import Store
    from stages.data.rows import RowSet
    from stages.prepare.stage import prepare
    from stages.runtime.context import Context
    from stages.settings.data import DataSettings, PrepareSettings
    from stages.tokenization.template import Template

    template = Template(tokenizer, "chat", append_eos=True, quick=quick)
    backend = Timed(template.encoder.batch_backend)
    template.encoder.batch_backend = backend
    settings = PrepareSettings(
        max_length=MAX_LENGTH, heldout_fraction=0.0, mismatched=False, num_workers=processes
    )
    with tempfile.TemporaryDirectory() as store:
        before, began = peak_mib(), time.perf_counter()
        artifact = prepare(DataSettings(path=str(rows)), settings, template, Context(Store(Path(store))))
        seconds, peak = time.perf_counter() - began, peak_mib() - before
        split = RowSet.of(artifact, "train")
        pairs = (
            (split.prompt(row), split.completion(row), split.completion(row + 1))
            for row in range(0, len(split), 2)
        )
        return {
            "seconds": seconds,
            "tokenizer_seconds": backend.seconds,
            "peak_mib": peak,
            "hashes": digest(pairs),
        }


class Timed:
    """A tokenizer that counts the seconds in which a batch is being encoded."""

    def __init__(self, backend) -> None:
        self.backend, self.seconds = backend, 0.0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, add_special_tokens):
        began = time.perf_counter()
        try:
            return self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        finally:
            self.seconds += time.perf_counter() - began


def trl(tokenizer, rows: Path, processes: int) -> dict:
    import datasets
    from trl import DPOTrainer

    datasets.disable_caching()
    with tempfile.TemporaryDirectory() as cache:
        dataset = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=cache)
        trainer = DPOTrainer.__new__(DPOTrainer)
        trainer._tokenizer = tokenizer
        settings = SimpleNamespace(
            dataset_num_proc=None if processes == 1 else processes,
            max_length=MAX_LENGTH,
            truncation_mode="keep_end",  # keep_start adds a pass that filters nothing here
        )
        before, began = peak_mib(), time.perf_counter()
        prepared = trainer._prepare_dataset(dataset, tokenizer, settings, "train")
        seconds, peak = time.perf_counter() - began, peak_mib() - before
        prepared = prepared.with_format("numpy")
        pairs = ((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in prepared)
        return {"seconds": seconds, "tokenizer_seconds": 0.0, "peak_mib": peak, "hashes": digest(pairs)}


def digest(pairs) -> str:
    """A hash of the ids of all pairs, in order."""
    import hashlib

    import numpy as np

    found = hashlib.sha256()
    for parts in pairs:
        for ids in parts:
            found.update(np.int64(len(ids)).tobytes() + np.asarray(ids, dtype=np.int32).tobytes())
    return found.hexdigest()


def peak_mib() -> float:
    """Peak memory of this process and the largest of its children so far."""
    return (
        max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        / 1024
    )


if __name__ == "__main__":
    main()
