"""Errors as a person at a terminal sees them: one line that says what to do, and an exit code."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cache.artifacts import open_artifact
from cache.errors import DataError
from pipeline.commands import COMMANDS
from pipeline.config import load_config
from tests.forking_python import forking_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path, tiny_model, preferences):
    """A configuration file over the tiny model and the 24 pairs."""
    tree = {
        "data": {"path": str(preferences)},
        "policy": {"model": str(tiny_model)},
        "prepare": {"max_length": 128, "heldout_fraction": 0.25},
        "compute": {"device": "cpu", "tokens_per_batch": 1024},
        "train": {"model_card": False},  # which takes longer than such a training
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def refused(result, code, *parts):
    """The command ended with this code, said one line on stderr that holds `parts`, and nothing on stdout."""
    found, out, err = result
    assert found == code, err
    assert out == ""
    err = re.sub(r"\Adetected: .*\n", "", err)  # what was found before the row that could not be used
    assert err.startswith("align: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


USAGE = [
    (["nope"], ["No such command 'nope'", "align --help"]),
    (["train", "--nope"], ["No such option: --nope", "align train --help"]),
    (["run", "extra"], ["unexpected extra argument(s) (extra). Type `", "align run --help"]),
    (["train", "extra"], ["'extra': expected block.key=value"]),
    (["trian"], ["Did you mean 'train'? Type `", "align --help"]),
    (["prepare", "--loss", "dpo"], ["No such option: --loss", "align prepare --help"]),
    (["plan", "--dry-run"], ["No such option: --dry-run", "align plan --help"]),
    (["inspect", "--row", "1", "--longest"], ["--row, --random and --longest exclude each other"]),
    (["train", "--loss", "kt0"], ["unknown loss 'kt0'", "Did you mean 'kto'?"]),
    (["train", "--set", "loss.name=simp"], ["unknown loss 'simp'", "Did you mean 'simpo'?"]),
    (["train", "--set", "loss.bta=1"], ["loss.bta is not a field of dpo", "beta"]),
    (["train", "--set", "loss.beta=-1"], ["loss.beta is -1", "greater than 0"]),
    (["train", "--set", "train.learning_rat=1"], ["'train.learning_rat'", "Did you mean train.learning_rate?"]),
    (["train", "--set", "trian.seed=1"], ["'trian'", "Did you mean train?"]),
    (["train", "--set", "seed=1"], ["expected block.key=value"]),
    (["train", "--set", "nonsense"], ["expected block.key=value"]),
    (["train", "--set", "train.seed=1.5"], ["train.seed", "valid integer", "1.5"]),
    (["train", "--set", "train.seed=true"], ["train.seed", "valid integer", "True"]),
    (["train", "--set", "train.batch_size=0"], ["train.batch_size", "greater than 0"]),
    (["train", "--set", "train.learning_rate=nan"], ["train.learning_rate", "finite number"]),
    (["train", "--set", "train.learning_rate=inf"], ["train.learning_rate", "finite number"]),
    (["train", "--set", "prepare.append_eos=2"], ["prepare.append_eos", "valid boolean"]),
    (["prepare", "--set", "data.on_bad_row=ignore"], ["data.on_bad_row", "'error' or 'skip'", "ignore"]),
    (["prepare", "--set", "data.path=7"], ["data.path", "valid string", "7"]),
    (["prepare", "--set", "data.path=["], ["--set 'data.path=['", "not valid YAML"]),
    (["prepare", "--set", "data.path=" + "[" * 2000], ["not valid YAML"]),
    (["prepare", "--set", "data.max_samples=!!int x"], ["not valid YAML"]),
    (["train", "--set", "track.wandb_api_key=x"], ["secrets do not belong in a configuration"]),
    (["train", "--set", "track.token=x"], ["secrets do not belong in a configuration"]),
    (["train", "-c", "nope.yaml"], ["No such configuration file: nope.yaml"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "parts"), USAGE, ids=[" ".join(line)[:50] for line, _ in USAGE])
def test_a_command_line_that_cannot_be_carried_out_ends_with_2(align, arguments, parts, tmp_path):
    refused(align(*arguments), 2, *parts)
    assert list(tmp_path.iterdir()) == []


YAML = [
    ("train: {seed: 1, seed: 2}", "key 'seed' appears twice near line 1"),
    ("data: &a {path: x}\npolicy: *a", "aliases (*a) are not allowed"),
    ("- 1", "expected keys and values, found list"),
    ("a: [1", "not valid YAML"),
    ("a: 1\n---\nb: 2", "not valid YAML"),
    ("data: !!python/object/apply:os.system ['touch executed']", "not valid YAML"),
    ("[" * 2000, "not valid YAML"),
    ("data:", "data: expected a block of keys (path,"),
    ("? [1, 2]\n: 3", "not valid YAML"),
    ("1: 2", "Unknown configuration key '1'"),
    ("loss: dpo", "loss: expected a block with a name"),
    ("# " + "x" * (1 << 20), "is larger than 1048576 bytes"),
]


@pytest.mark.parametrize(("content", "problem"), YAML, ids=[problem[:30] for _, problem in YAML])
def test_a_configuration_that_is_none_ends_with_2(align, tmp_path, content, problem):
    (tmp_path / "bad.yaml").write_text(content)
    refused(align("train", "-c", "bad.yaml"), 2, "bad.yaml" if "YAML" in problem else problem, problem)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("5e-06", 5e-6), ("1.0e-5", 1e-5), (".5", 0.5), ("3", 3.0)]
)
def test_numbers_are_read_as_written(tmp_path, text, value):
    """PyYAML alone reads 1e-5 as a string."""
    (tmp_path / "run.yaml").write_text(f"train: {{learning_rate: {text}}}")
    assert load_config([tmp_path / "run.yaml"], [], None).train.learning_rate == value
    assert load_config([], [f"train.learning_rate={text}"], None).train.learning_rate == value


@pytest.mark.parametrize("text", ["no", "1:30", "2020-01-01", "off", "~x"])
def test_text_stays_text(text):
    """YAML 1.1 would make of these false, 90, a date and false."""
    assert load_config([], [f"data.split={text}"], None).data.split == text


def test_later_files_win_over_earlier_and_assignments_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {seed: 1, num_epochs: 2}\nloss: {name: ipo, beta: 0.3}")
    (tmp_path / "b.yaml").write_text("train: {seed: 5}")
    config = load_config([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["train.num_epochs=7"], None)
    assert (config.train.seed, config.train.num_epochs) == (5, 7)
    assert config.loss.model_dump()["beta"] == 0.3
    replaced = load_config([tmp_path / "a.yaml"], [], "ipo").loss.model_dump()
    assert replaced["beta"] != 0.3  # --loss takes that loss's own defaults
    assert load_config([tmp_path / "a.yaml"], ["loss.beta=0.7"], "ipo").loss.model_dump()["beta"] == 0.7


def test_the_resolved_configuration_gives_the_same_run(tmp_path):
    config = load_config([], ["data.path=x.jsonl", "train.learning_rate=3e-7"], "kto")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    loaded = load_config([tmp_path / "config.yaml"], [], None)
    assert loaded.train.batch_size == config.loss.batch_size
    assert loaded == config.model_copy(update={"train": loaded.train})


@pytest.mark.slow
def test_data_that_cannot_be_used_ends_with_3(align, config, preferences, tmp_path):
    prepare = ("prepare", "-c", config)
    refused(
        align(*prepare, "--set", "data.path=missing.jsonl"),
        3,
        "No such file: missing.jsonl",
        "--set data.path=PATH",
    )
    refused(
        align(*prepare, "--set", "data.format=dpo"),
        3,
        "Unknown data.format 'dpo'",
        "Known formats: preference",
    )
    refused(
        align(*prepare, "--set", "policy.model=./missing"),
        3,
        "The model folder ./missing does not exist",
        "policy.model",
    )
    refused(align(*prepare, "--set", f"policy.model={tmp_path}"), 3, "is not a model folder", "config.json")
    preferences.write_text(preferences.read_text() + '{"prompt": "q\n')
    refused(align(*prepare), 3, "preferences.jsonl:25: ", "--set data.on_bad_row=skip")
    preferences.write_text('{"question": "q"}\n')
    refused(align(*prepare), 3, "preferences.jsonl:1: a row with columns question", "--set data.format=NAME")
    preferences.write_text("")
    refused(align(*prepare), 3, "holds no rows")
    assert [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("stage", "missing"), [("cache-ref", "prepare"), ("train", "prepare"), ("sample", "prepare")]
)
def test_a_missing_input_ends_with_4_and_the_very_command_that_makes_it(
    align, config, tmp_path, stage, missing
):
    given = ["-c", str(config), "--set", "prepare.max_length=99", "--store", "my store"]
    refused(
        align(stage, *given), 4, f"align {missing} -c {config} --set prepare.max_length=99 --store 'my store'"
    )
    assert not (tmp_path / "my store").exists()


def test_train_without_reference_log_probs_ends_with_4_and_names_cache_ref(align, config):
    assert align("prepare", "-c", config)[0] == 0
    refused(align("train", "-c", config), 4, f"align cache-ref -c {config}")


def test_a_damaged_artifact_ends_with_5_and_says_what_to_delete(align, config, tmp_path):
    assert align("prepare", "-c", config)[0] == 0
    [shard] = (tmp_path / "artifacts").rglob("train-*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(
        align("cache-ref", "-c", config),
        5,
        "is damaged",
        f"Delete {shard.parent.relative_to(tmp_path)}",
        "align prepare",
    )


def test_a_store_that_cannot_be_written_ends_with_6(align, config, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        align("prepare", "-c", config, "--store", "file/store"), 6, "Cannot write file/store", "--store DIR"
    )


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_130(tmp_path):
    """A real SIGINT while the quickstart's model is trained."""
    with forking_python(tmp_path) as python:
        process = subprocess.Popen(
            [python, "-m", "pipeline", "prepare", "--store", str(tmp_path / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Building the quickstart")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, err) == (
        "",
        "align: Interrupted. Finished work is kept; the same command continues it.\n",
    )


def test_the_quickstart_is_not_built_to_say_that_its_rows_are_missing(align, tmp_path):
    for stage in ("cache-ref", "train", "sample", "eval", "merge", "plan", "inspect"):
        refused(align(stage), 4, "The rows of quickstart", "Make them with: align prepare")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_it_happened(align, config):
    with pytest.raises(DataError, match="No such file"):
        align("prepare", "--debug", "-c", config, "--set", "data.path=missing.jsonl")


def test_json_is_one_object_on_stdout_and_a_second_run_does_nothing(align, config, tmp_path):
    code, out, err = align("prepare", "--json", "-c", config)
    first = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert (first["reused"], first["rows_in"], first["rows_kept"], first["dropped"]) == (False, 24, 24, {})
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "artifacts").rglob("*"))
    code, out, err = align("prepare", "--json", "-c", config)
    again = json.loads(out)
    assert (code, again.pop("reused")) == (0, True)
    assert again == {key: value for key, value in first.items() if key != "reused"}
    assert err.count("\n") == 1
    assert "already" in err
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "artifacts").rglob("*"))


def test_a_dry_run_writes_nothing(align, config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for stage in ("prepare", "cache-ref", "train", "sample", "merge", "eval", "run"):
        code, out, _ = align(stage, "--dry-run", "--json", "-c", config)
        assert code == 0
        assert "would" in out
        assert isinstance(json.loads(out), dict)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_dry_run_of_a_share_counts_its_own_rows(align, config):
    assert align("prepare", "-c", config)[0] == 0

    def needed(*share: str) -> int:
        _, out, _ = align("cache-ref", "--dry-run", "--json", "-c", config, *share)
        return json.loads(out)["cache-ref"]["rows_needed"]

    assert sum(needed("--shard", f"{i}/2") for i in (1, 2)) == needed()
    refused(align("cache-ref", "--dry-run", "-c", config, "--shard", "3/2"), 2, "--shard 3/2")


@pytest.mark.parametrize("stage", COMMANDS)
def test_help_shows_examples(align, stage):
    code, out, _ = align(stage, "--help")
    assert code == 0
    assert f"align {stage}" in out
    assert "Examples" in out
    assert COMMANDS[stage].examples[0] in out


def test_no_command_is_help_and_2(align):
    code, out, err = align()
    assert code == 2
    assert "cache-ref" in out
    assert err.count("\n") == 1


@pytest.mark.slow
def test_help_and_errors_do_not_wait_for_heavy_imports():
    """In a fresh interpreter: help and errors of the configuration, and none of the slow packages."""
    script = (
        "import contextlib, io, sys\n"
        "from pipeline.cli import main\n"
        "lines = ['--help', '--version', 'prepare --help', 'train --help', 'run --help', 'nope']\n"
        "lines += ['train --set train.lerning_rate=1', 'train --set train.learning_rate=x', 'train -c nope.yaml']\n"
        "for line in lines:\n"
        "    sys.argv = ['align', *line.split()]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()\n"
        "slow = {'torch', 'transformers', 'datasets', 'vllm', 'wandb', 'pyarrow', 'numpy'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
        "sys.argv = ['align', 'run', '--set', 'data.path=missing.jsonl']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print(sorted((slow - {'pyarrow', 'numpy'}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n[]\n"
    assert done.stderr.endswith("Give a file or a hub dataset with --set data.path=PATH.\n")


@pytest.mark.slow
def test_the_module_ends_the_process_with_the_same_code_and_no_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "prepare",
        "--set",
        "data.path=missing.jsonl",
        "--store",
        str(tmp_path),
    ]
    command += ["--set", f"policy.model={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("align: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_was_cut_is_the_last_line_of_every_report(align, config, preferences):
    """The numbers are those of the column `prompt_cut`, one of each example."""
    given = ["-c", config, "--set", "prepare.max_length=40", "--set", f"eval.sets.more={preferences}"]
    code, out, err = align("prepare", *given, "--json")
    assert code == 0, err
    artifact = open_artifact(Path(json.loads(out)["artifact"]))
    shards = [*artifact.shards("train"), *artifact.shards("heldout")]
    rows = [row for shard in shards for row in shard.select(["role", "prompt_cut"]).to_pylist()]
    cut = sorted(row["prompt_cut"] for row in rows if row["role"] == "chosen" and row["prompt_cut"])
    said = f"{len(cut)} prompts lost {sum(cut)} tokens (median {cut[(len(cut) - 1) // 2]}, at most {cut[-1]})"
    for stage, last in (("prepare", -2), ("cache-ref", -2), ("plan", -1)):
        code, out, err = align(stage, *given)
        assert code == 0, err
        assert out.splitlines()[last] == f"CUT: in preferences.jsonl, {said}, by prepare.max_length=40"
        assert out.splitlines()[-1].startswith("CUT: in ")
    assert "CUT" not in align("prepare", "-c", config)[1]


@pytest.mark.slow
def test_a_new_evaluation_set_is_no_reason_to_train_again(align, config, preferences, tmp_path):
    once = ["-c", config, "--set", "train.max_steps=1", "--loss", "simpo"]
    assert align("prepare", *once[:4])[0] == 0
    code, out, _ = align("train", *once, "--json")
    assert code == 0
    policy = json.loads(out)["artifact"]
    more = [*once, "--set", f"eval.sets.more={preferences}"]
    assert align("prepare", *more[:4], *more[6:])[0] == 0
    refused(
        align("eval", *more),
        4,
        f"{policy} was trained with these settings but for eval.sets",
        f"align eval with --set eval.model={policy}",
    )
    code, out, err = align("eval", *more, "--set", f"eval.model={policy}", "--json")
    assert (code, list(json.loads(out)["sets"])) == (0, ["heldout", "more"]), err
    refused(align("eval", *more, "--set", "train.seed=5"), 4, "Train it with: align train")


@pytest.mark.slow
def test_run_shows_each_stage_as_it_ends(align, config, tmp_path):
    """A stage that fails leaves what was printed of those before it."""
    few = [
        "--set",
        "train.max_steps=1",
        "--set",
        "sample.engine=transformers",
        "--set",
        "sample.max_tokens=4",
    ]
    missing = ["--set", f"sample.prompts={tmp_path / 'missing.jsonl'}"]
    code, out, err = align("run", "-c", config, *few, *missing)
    assert (code, err.splitlines()[-1].split(":")[1]) == (3, " No such file of prompts")
    shown = [line.split()[0] for line in out.splitlines() if line.endswith("(done)")]
    assert shown == ["prepare", "cache-ref", "train"]
    code, out, err = align("run", "-c", config, *few)
    assert code == 0, err
    shown = [line.split()[0] for line in out.splitlines() if line.endswith(("(done)", "(reused)"))]
    assert shown == ["prepare", "cache-ref", "train", "sample"]
