"""The commands that the documents show: each parses against the real command line, and each is run by a test or says what it needs."""

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from pipeline.cli import app
from pipeline.commands import COMMANDS
from pipeline.config import RunConfig, load_config
from tests.conftest import made_once

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "configs").rglob("*.md"), *DOCS.glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
SHELL = ("", "bash", "sh", "console")
COMMAND = re.compile(r"\b(?:align|torchrun [^`;#\n]*-m pipeline) [a-z][a-z-]*\b(?![/.])[^`;#>|&\n]*")
MAKE = re.compile(r"\bmake ([a-z]+)\b")
SCRIPT = re.compile(r"(?:python |^)((?:docs|benchmarks|tests)/\S+\.(?:py|sh))")

NETWORK = "needs the network"
GPUS = "needs several GPUs"
# Which test runs a command, on small data and a tiny model; or what the machine of the tests lacks. The first pattern that a
# command begins with counts.
COVERED = {
    r"train .*--push-to-hub": NETWORK,
    r"\S+ .*s3://": NETWORK,
    r"\S+ .*-c configs/(recipes/.*|\w+)\.yaml(?<!quickstart\.yaml)": f"{NETWORK}: models and data of the hub",
    r"sweep .*sweep\.devices": GPUS,
    r"torchrun train": "pipeline/test_distributed.py::test_under_torchrun_a_killed_rank_ends_all_and_the_same_command_continues",
    r"torchrun cache-ref": "pipeline/test_distributed.py::test_two_sharded_ranks_train_like_one_process",
    r"run .*-c thumbs\.yaml": "test_documented_commands.py::test_the_csv_of_thumbs_is_read",
    r"run": "pipeline/test_cli.py::test_run_shows_each_stage_as_it_ends",
    r"(prepare|cache-ref|sweep) .*--on ray": "pipeline/test_on_ray.py::test_tasks_make_the_bytes_of_one_process_though_a_worker_is_killed",
    r"prepare .*--(shard|join)": "stages/prepare/test_shares.py::test_the_command_makes_shares_of_rows_and_of_evaluation_sets_and_joins_them",
    r"prepare": "pipeline/test_cli.py::test_json_is_one_object_on_stdout_and_a_second_run_does_nothing",
    r"cache-ref .*--shard": "pipeline/test_cli.py::test_a_dry_run_of_a_share_counts_its_own_rows",
    r"cache-ref": "pipeline/test_four_stages.py::test_more_data_scores_only_the_new_rows",
    r"train .*adapter\.name": "pipeline/test_adapters.py::test_an_adapter_shares_the_store_of_full_training_and_starts_from_it_exactly",
    r"train": "pipeline/test_four_stages.py::test_one_reference_pass_serves_every_loss_seed_and_learning_rate",
    r"sample": "pipeline/test_vllm.py::test_the_quickstart_learns_its_preference_and_both_engines_agree",
    r"sweep .*--list": "pipeline/sweep/test_sweep.py::test_the_list_is_one_command_a_line_and_writes_nothing",
    r"sweep": "pipeline/sweep/test_sweep.py::test_finished_trainings_are_kept_and_one_that_diverges_is_named",
    r"judge": "pipeline/test_compare.py::test_the_completions_of_a_configuration_are_judged_once",
    r"compare artifacts/verdicts": "pipeline/test_compare.py::test_folders_of_verdicts_are_compared_without_asking_again",
    r"compare .*--html": "pipeline/test_compare.py::test_the_page_shows_both_texts_escaped_with_the_verdict_and_loads_nothing",
    r"compare": "pipeline/test_compare.py::test_every_model_is_compared_with_the_first",
    r"report": "pipeline/test_trained_store.py::test_the_command_writes_page_and_picture_and_draws_in_the_terminal",
    r"online": "pipeline/online/test_online.py::test_an_interrupted_run_ends_in_the_same_weights",
    r"eval": "pipeline/test_adapters.py::test_eval_gives_the_held_out_metrics_that_training_ended_with",
    r"merge": "pipeline/test_adapters.py::test_a_merged_model_is_base_and_adapter",
    r"plan .*--measure": "pipeline/test_plan.py::test_a_measured_plan_has_time_and_peak",
    r"plan": "pipeline/test_plan.py::test_steps_and_tokens_are_those_of_the_run",
    r"inspect .*--html": "pipeline/test_inspect.py::test_the_page_shows_the_same_text_and_fetches_nothing",
    r"inspect .*--(longest|random)": "pipeline/test_inspect.py::test_the_choice_of_rows",
    r"inspect": "pipeline/test_inspect.py::test_the_terminal_shows_the_same_text",
    r"ls": "pipeline/test_trained_store.py::test_ls_names_what_each_artifact_was_made_from",
    r"show": "pipeline/test_trained_store.py::test_show_leads_from_the_data_to_the_completions",
    r"diff": "pipeline/test_trained_store.py::test_diff_has_what_differs_and_nothing_else",
    r"gc": "pipeline/test_trained_store.py::test_gc_takes_what_nothing_was_made_from_and_only_when_told",
    r"verify .*--rescore": "pipeline/test_verify.py::test_rescoring_finds_what_no_digest_can",
    r"verify .*--expect-digest": "pipeline/test_verify.py::test_a_pinned_manifest",
    r"verify": "pipeline/test_verify.py::test_a_store_as_it_was_written_is_right_and_stays_as_it_is",
    r"(export|import)": "pipeline/test_sharing.py::test_export_and_import_and_import_again",
    r"init": "pipeline/test_init.py::test_the_file_means_what_would_be_detected",
    r"doctor": "pipeline/test_doctor.py::test_logins_are_found_and_never_shown",
}
TARGETS = {
    "demo": "pipeline/test_vllm.py::test_the_quickstart_learns_its_preference_and_both_engines_agree",
    "docs": "runs in .ci/run",
    "install": "runs in .ci/run",
    "test": "runs in .ci/run",
    "check": "runs in .ci/run",
    "fast": "a part of make test",
    "style": "a tool of the developers",
    "clean": "a tool of the developers",
    "reliability": "its cases are tests",
    "bench": "needs TRL and real data",
}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def shell_text(path: Path) -> list[str]:
    """What a document shows as code: the blocks that may be typed, with continued lines joined, and the spans of its sentences."""
    text = read(path)
    blocks = [body.replace("\\\n", " ") for language, body in FENCE.findall(text) if language in SHELL]
    return blocks + SPAN.findall(FENCE.sub("", text))


@cache
def commands() -> list[str]:
    """Every command line in the documents and in the help texts, with loop variables filled in."""
    found = [line for command in COMMANDS.values() for line in command.examples]
    for path in DOCUMENTS:
        found += [match.strip() for code in shell_text(path) for match in COMMAND.findall(code)]
    lines = {line.replace("$loss", "kto").replace("$beta", "0.1") for line in found}
    return sorted(lines - {"align init"})  # the table of commands has it without the options that it needs


def typed(line: str) -> str:
    """A command line without `align`, or with `torchrun` in its place."""
    launched, name = re.fullmatch(r"(align|torchrun .*-m pipeline) (.*)", line).groups()  # type: ignore[union-attr]
    return name if launched == "align" else f"torchrun {name}"


def parsed(line: str) -> RunConfig:
    """The configuration that a command line selects; raises what a person would get who types it."""
    name, *arguments = shlex.split(typed(line).removeprefix("torchrun "))
    command = made_once(app).commands[name]
    values = command.make_context(name, arguments).params
    return load_config(values.get("config") or [], values.get("set_") or [], values.get("loss"))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with configs/ and the files that the documents show, as its reader would have them."""

    def shown(path: Path, language: str) -> str:
        return next(body for found, body in FENCE.findall(read(path)) if found == language)

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yaml").write_text(shown(README, "yaml"))
    (tmp_path / "pairs.jsonl").write_text(shown(README, "jsonl"))
    (tmp_path / "thumbs.yaml").write_text(shown(DOCS / "thumbs.md", "yaml"))
    (tmp_path / "feedback.csv").write_text(shown(DOCS / "thumbs.md", "csv"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_parses_and_its_configuration_loads(project, line):
    assert isinstance(parsed(line), RunConfig)


@pytest.mark.parametrize(
    "line",
    [
        "align trian -c mine.yaml",
        "align train -c mine.yaml --losss kto",
        "align train -c mine.yaml --loss kt0",
        "align train -c mine.yaml --set train.lerning_rate=1e-6",
        "align train -c mine.yaml --set compute.dtype=float31",
        "align train -c mien.yaml",
        "align report -c mine.yaml --teminal",
    ],
)
def test_a_misspelt_one_in_a_document_would_be_found(project, line):
    document = project / "page.md"
    document.write_text(f"```\n{line}\n```\n")
    [found] = [match.strip() for code in shell_text(document) for match in COMMAND.findall(code)]
    assert found == line
    with pytest.raises(Exception, match=r"trian|No such option|kt0|lerning_rate|float31|mien"):
        parsed(found)


def test_every_documented_command_is_run_by_a_test_or_says_what_it_needs():
    lines = [typed(line) for line in commands()]
    assert [line for line in lines if not any(re.match(rf"{key}\b", line) for key in COVERED)] == []


def test_every_entry_of_the_table_covers_a_command_and_names_a_test():
    lines = [typed(line) for line in commands()]
    taken = [next(key for key in COVERED if re.match(rf"{key}\b", line)) for line in lines]
    assert [pattern for pattern in COVERED if pattern not in taken] == []
    named = [test for test in (*COVERED.values(), *TARGETS.values()) if "::" in test]
    missing = [
        test
        for test in named
        if f"\ndef {test.partition('::')[2]}(" not in read(ROOT / "tests" / test.partition("::")[0])
    ]
    assert missing == []


def test_make_targets_and_scripts_that_are_named_exist():
    code = [part for path in DOCUMENTS for part in shell_text(path)]
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.MULTILINE))
    assert targets == set(TARGETS) | {"help"}
    assert {name for part in code for name in MAKE.findall(part)} <= targets
    scripts = {name for part in code for name in SCRIPT.findall(part)}
    assert len(scripts) > 3
    assert [name for name in scripts if not (ROOT / name).is_file()] == []


def test_the_documents_hold_commands_of_every_stage():
    lines = "\n".join(commands())
    without_config = {
        "ls": "",
        "show": "",
        "diff": "",
        "gc": "",
        "export": "artifacts",
        "import": "reference.tar",
        "doctor": "",
        "init": "--model",
    }
    assert [name for name, end in without_config.items() if f"align {name} {end}" not in lines] == []
    others = [name for name in COMMANDS if name not in without_config]
    assert [name for name in others if f"align {name} -c mine.yaml" not in lines] == []


def test_the_csv_of_thumbs_is_read(align, project, tiny_model):
    code, out, err = align("prepare", "-c", "thumbs.yaml", "--set", f"policy.model={tiny_model}", "--json")
    assert code == 0, err
    counts = json.loads(out)
    assert counts["rows_kept"] == counts["rows_in"] == 4
    assert "up is desirable, down undesirable" in err


def test_the_command_line_says_what_it_would_do_and_writes_nothing(align, project):
    before = sorted(project.rglob("*"))
    code, out, err = align("run", "--dry-run", "--json")
    assert code == 0, err
    assert list(json.loads(out)) == ["prepare", "cache-ref", "train", "sample"]
    assert sorted(project.rglob("*")) == before
