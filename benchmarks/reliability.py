"""The promises of the cache and the stages, each with the tests that try it: cases tried, cases held.

In: nothing. Out: `results/reliability.json` and `.md`, and exit code 1 if a case did not hold. A test that loops over fault points, bytes or races
says how many cases it tried; any other test is one case. Here they try every case (ALIGN_EVERY_CASE), in `make test` a part. Five minutes on two
cores. Run from the repository root:

    python benchmarks/reliability.py
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import write_results

ROUNDS = "25"  # of each race
PYTEST = (sys.executable, "-m", "pytest")


class Promise(NamedTuple):
    """A promise, and the tests that try it: parts of names as pytest writes them, `FILE::TEST[CASE]`."""

    text: str
    tests: tuple[str, ...]


FAULTS, CONCURRENT, MIRROR = "cache/test_faults.py", "cache/test_concurrent.py", "cache/test_mirror.py"
PROMISES = (
    Promise(
        "Killed at any change to the disk, what is read is old or new, and the same command completes it",
        (f"{FAULTS}::test_a_kill_at_any_change",),
    ),
    Promise(
        "The same after a loss of power that takes all that was not synced, bytes or names",
        (f"{FAULTS}::test_a_loss_of_power",),
    ),
    Promise(
        "These tests fail without the protection: in place, or without one kind of fsync",
        (f"{FAULTS}::test_a_file_written_in_place", f"{FAULTS}::test_without_one_kind_of_fsync"),
    ),
    Promise(
        "Disk full, quota, I/O error, too many open files, read-only: one line, no half file, resumable",
        (
            f"{FAULTS}::test_an_error_at_any_change",
            "cache/test_files.py::test_a_full_disk",
            "pipeline/test_resume.py::test_a_full_disk",
            "runtime/test_limits.py::test_a_full_disk",
        ),
    ),
    Promise(
        "prepare, sample, online and training, killed or interrupted, end in the bytes of an uninterrupted run",
        (
            "pipeline/test_resume.py::test_killed",
            "pipeline/test_prepare_interrupted.py::",
            "sample/test_stage.py::test_an_interrupted_run",
            "online/test_online.py::test_an_interrupted_run",
        ),
    ),
    Promise(
        "A signal ends a run in a state that continues",
        (
            "pipeline/test_resume.py::test_a_signal",
            "pipeline/test_resume.py::test_a_second_signal",
            "test_cli.py::test_ctrl_c",
        ),
    ),
    Promise(
        "A flipped bit, a cut, an exchange or a stray file is found before it is used",
        (
            "cache/test_ref_logps.py::test_a_bit",
            "cache/test_ref_logps.py::test_a_shard",
            "cache/test_ref_logps.py::test_two_shards",
            "cache/test_ref_logps.py::test_a_stray",
            "cache/test_ref_logps.py::test_a_manifest",
            "cache/test_artifacts.py::test_damage",
            "cache/test_artifacts.py::test_a_flip",
            "cache/test_artifacts.py::test_swapped",
            "cache/test_files.py::test_a_bit",
            "cache/test_safetensors.py::test_a_damaged",
            "pipeline/test_damaged_policy.py::",
            "pipeline/test_verify.py::",
        ),
    ),
    Promise(
        "The newest checkpoint is damaged: the one before is used, and it is said",
        ("test_resume.py::test_a_damaged", "test_resume.py::test_a_run_goes_on_from_the_older"),
    ),
    Promise(
        "NaN, infinities and positive values never become log-probs",
        ("cache/test_ref_logps.py::test_a_scorer_that_gives", "cache/test_ref_logps.py::test_rounding"),
    ),
    Promise(
        "The audit stops log-probs of another revision, model or dtype, exchanged ones, and one value off by 0.01 nats in a row that it reads",
        (
            "train/test_audit.py::",
            "test_four_stages.py::test_the_audit",
            "pipeline/test_verify.py::test_rescoring",
        ),
    ),
    Promise(
        "A changed key changes the identities that it should, by name, and no others",
        (
            "pipeline/test_identity_fields.py::",
            "test_store_lookup.py::test_a_reference_that_differs",
            "test_without_effect.py::",
        ),
    ),
    Promise(
        "One reference pass serves every loss, seed, rate and batch",
        ("test_four_stages.py::test_one_reference_pass",),
    ),
    Promise(
        "Weights that changed under the same path are noticed",
        (
            "test_four_stages.py::test_a_model_edited",
            "test_store_lookup.py::test_files_that_were_swapped",
            "sample/test_identity.py::",
        ),
    ),
    Promise("Training opens no file of the reference", ("test_four_stages.py::test_training_never_opens",)),
    Promise(
        "The bytes do not depend on the number of workers, shares and ranks",
        (
            "prepare/test_shares.py::",
            "cache_ref/test_work_units.py::",
            "prepare/test_stage.py::test_any_number_of_processes",
            "cache/test_archive.py::test_the_bytes",
        ),
    ),
    Promise(
        "Writers at once, with locks and without, give one valid store; readers see old or new",
        (
            f"{CONCURRENT}::test_writers",
            f"{CONCURRENT}::test_publishers",
            f"{CONCURRENT}::test_a_file",
            f"{CONCURRENT}::test_answers",
        ),
    ),
    Promise(
        "Of two identical runs the second is told process, machine and time; a dead one blocks nobody",
        (
            f"{CONCURRENT}::test_a_second_owner",
            f"{CONCURRENT}::test_without_the_look",
            "cache/test_ownership.py::",
            "test_resume.py::test_the_second_of_two",
        ),
    ),
    Promise("A killed rank ends all, and the same command continues", ("pipeline/test_distributed.py::",)),
    Promise(
        "A store on object storage (S3 server of moto, fsspec's memory, HTTP): whole, verified, never mixed",
        (f"{MIRROR}::", "test_sharing.py::test_stages_on_three"),
    ),
    Promise(
        "An archive is verified, keeps inside of the store, and is refused by name when it is of another version",
        ("cache/test_archive.py::", "pipeline/test_sharing.py::"),
    ),
    Promise(
        "Hostile rows are kept as they say or dropped for a reason, and none is lost",
        ("prepare/test_hostile_rows.py::", "data/test_readers.py::", "formats/test_formats.py::"),
    ),
    Promise(
        "Hostile configurations are one line",
        (
            "pipeline/test_config.py::test_what_is_no",
            "pipeline/test_config.py::test_a_missing_file",
            "pipeline/test_config.py::test_a_wrong_key",
            "pipeline/test_config.py::test_any",
            "pipeline/test_config.py::test_the_name_of_a_run",
            "test_cli.py::test_a_configuration_that_is_none",
        ),
    ),
    Promise(
        "Nothing runs from data, stores, checkpoints, archives, model folders or templates",
        (
            "pipeline/test_no_code_runs.py::",
            "prepare/test_stage.py::test_nothing_in_the_data",
            "train/test_shards.py::test_a_pickle",
            "models/test_foreign_models.py::test_code",
            "tokenization/test_render.py::test_a_template_cannot",
            "tokenization/test_render.py::test_a_template_that",
        ),
    ),
    Promise(
        "Data forges no turn",
        (
            "tokenization/test_template.py::test_data_forges",
            "tokenization/test_template.py::test_text_that_spells",
            "tokenization/test_render.py::test_text_that_spells",
        ),
    ),
    Promise(
        "No secret reaches a file",
        (
            "test_tracking.py::test_secrets",
            "test_tracking.py::test_a_secret",
            "judge/test_endpoint.py::test_the_key",
        ),
    ),
    Promise("--offline reaches no other machine, and local stages ask none", ("pipeline/test_offline.py::",)),
    Promise(
        "Version 1 of the formats is read, also by other tools; another is refused by name",
        ("cache/test_golden.py::", "cache/test_artifacts.py::test_a_manifest_of_another"),
    ),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report, selected = Path(folder) / "report.xml", Path(folder) / "selected"
        selected.write_text("\n".join(collect()) + "\n")
        command = [*PYTEST, "-n", "2", "--dist", "loadfile", f"--junitxml={report}", f"@{selected}"]
        environment = {**os.environ, "ALIGN_ROUNDS": ROUNDS, "ALIGN_EVERY_CASE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        found = read(report)
    rows = [counted(promise, found) for promise in PROMISES]
    notes = (
        f"What each promise means: docs/reliability.md. A case is one fault point, byte, cut, race or test. Races run {ROUNDS} rounds. Tests that need "
        f"what this machine lacks (a GPU, real data beside the checkout) are not counted."
    )
    write_results("reliability", rows, "Promises tried and held", notes)
    show(rows)
    sys.exit(any(row["held"] < row["tried"] or not row["tried"] for row in rows))


def collect() -> list[str]:
    """The test functions of all promises."""
    listed = subprocess.run([*PYTEST, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = dict.fromkeys(line.split("[")[0] for line in listed.stdout.splitlines() if "::" in line)
    return [name for name in names if any(part in name for promise in PROMISES for part in promise.tests)]


def read(report: Path) -> dict[str, tuple[int, bool]]:
    """Cases and outcome of each test by `FILE::TEST[CASE]`; tests that were skipped are left out."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        held = case.find("failure") is None and case.find("error") is None
        told = [one.get("value") for one in case.iter("property") if one.get("name") == "cases"]
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        found[name] = (int(told[0] or 1) if told else 1, held)
    return found


def counted(promise: Promise, found: dict[str, tuple[int, bool]]) -> dict[str, Any]:
    cases = [outcome for name, outcome in found.items() if any(part in name for part in promise.tests)]
    return {
        "name": promise.text,
        "tests": len(cases),
        "tried": sum(number for number, _ in cases),
        "held": sum(number for number, held in cases if held),
    }


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    table.add_column("promise", overflow="fold")
    for name in ("tests", "tried", "held"):
        table.add_column(name, justify="right")
    for row in rows:
        style = "" if row["held"] == row["tried"] > 0 else "bold red"
        table.add_row(row["name"], *(f"{row[key]:,}" for key in ("tests", "tried", "held")), style=style)
    Console().print(table)


if __name__ == "__main__":
    main()
