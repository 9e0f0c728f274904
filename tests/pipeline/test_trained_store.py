"""A store with trainings, completions and verdicts, as reports, lists and names show it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from cache.errors import UsageError
from pipeline.report.page import page
from pipeline.report.runs import open_runs
from stages.curves.charts import points
from stages.train.monitoring.metrics_log import read_metrics
from tests.pipeline.small_run import run, session, settings

pytestmark = pytest.mark.slow
STORED = "artifacts"


def tree_of(model: Path, data: Path, loss: dict, **train) -> dict:
    return settings(
        model,
        data,
        prepare={"mismatched": False},
        loss=loss,
        train={"max_steps": 4, "sample_steps": None, "model_card": True, **train},
        sample={"engine": "transformers", "num_prompts": 3, "max_tokens": 8, "compare": True},
        judge={"function": "pipeline.quickstart_world:politeness"},
    )


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """A folder with dpo.yaml, simpo.yaml and the store `artifacts`: rows, log-probs, two policies, completions, verdicts."""
    from tests.conftest import write_preferences

    folder = tmp_path_factory.mktemp("trained")
    data = write_preferences(folder / "preferences.jsonl")
    trees = {
        "dpo": tree_of(tiny_model, data, {"name": "dpo", "beta": 0.2}),
        "simpo": tree_of(tiny_model, data, {"name": "simpo"}, seed=3),
    }
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    run(trees["dpo"], folder / STORED, "prepare", "cache-ref", "train", "sample", "judge")
    run(trees["simpo"], folder / STORED, "train")
    return folder


@pytest.fixture(scope="module")
def policies(folder) -> dict[str, Path]:
    """The policies by loss."""
    found = [path for path in (folder / STORED / "policy").iterdir() if not path.name.startswith(".")]
    return {name: path for path in found for name in ("dpo", "simpo") if f"-{name}-" in path.name}


@pytest.fixture(scope="module")
def html(policies) -> str:
    return page(open_runs(list(policies.values()), None), "align report A B")


class Tags(HTMLParser):
    """Checks that every tag that is opened is closed in its place, and collects attributes that load something."""

    VOID = ("meta", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open, self.loaded, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"


def test_the_page_is_whole_and_loads_nothing(html):
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.loaded == []
    assert "<script" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    checks = [name for name in tags.ids if name.startswith("show-")]
    assert checks == ["show-0", "show-1"]


def test_the_page_shows_what_was_measured(html, policies):
    for path in policies.values():
        counts = json.loads((path / "manifest.json").read_text())["counts"]
        assert f">{counts['final']['rewards/margins']:.4f}<" in html
        assert f">{counts['final']['logps/chosen'] - counts['step0']['logps/chosen']:.4f}<" in html
    for title in (
        "held-out accuracy",
        "chosen log-ratio",
        "rejected log-ratio",
        "gradient norm",
        "learning rate",
    ):
        assert f"<h3>{title}" in html
    assert html.count("var(--run-1)") > 5
    assert "24 of 24" in html
    assert "judged by politeness" in html
    assert "<code>loss.name</code></td><td>dpo</td><td>simpo" in html or "<td>simpo</td><td>dpo" in html
    assert "0 nats a token" in html
    assert "Where does the" in html


def test_the_log_ratio_of_a_loss_without_reference_is_the_change_of_its_log_probs(policies):
    """For dpo, whose policy starts as the reference, both are logged, and they are equal."""
    lines = read_metrics(policies["dpo"] / "metrics.jsonl")
    for side in ("chosen", "rejected"):
        assert points(lines, f"logps_change/{side}")[1] == pytest.approx(points(lines, f"eval/logratios/{side}")[1], abs=1e-5)  # fmt: skip
    assert points(read_metrics(policies["simpo"] / "metrics.jsonl"), "logps_change/chosen")[1][0] == 0


def test_texts_of_models_and_people_are_no_html(policies, tmp_path):
    copy = tmp_path / "artifacts" / "policy" / policies["dpo"].name
    shutil.copytree(policies["dpo"], copy)
    bad = "<script>alert(1)</script>"
    (copy / "samples.jsonl").write_text(
        json.dumps({"step": 4, "prompt": bad, "completion": f"{bad} & more"}) + "\n"
    )
    text = page(open_runs([copy], None), f"align report {bad}")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)") == 3


def test_the_command_writes_page_and_picture_and_draws_in_the_terminal(align, folder, policies, monkeypatch):
    monkeypatch.chdir(folder)
    code, out, err = align("report", *policies.values(), "--terminal", "--png", "curves.png")
    assert code == 0, err
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "report.html").exists()
    assert "held-out accuracy" in out
    assert re.search("[⠀-⣿]", out)
    assert max(map(len, out.splitlines())) <= 120
    code, _, err = align("report", "-c", "dpo.yaml")
    assert code == 0, err
    assert policies["dpo"].name in (folder / "report.html").read_text()


def test_a_folder_that_is_no_run_and_a_key_that_no_run_has_are_refused(folder, policies):
    with pytest.raises(UsageError, match=r"has no metrics\.jsonl"):
        open_runs([folder], None)
    with pytest.raises(UsageError, match=r"loss\.bta"):
        open_runs(list(policies.values()), "loss.bta")


def test_an_unfinished_training_is_shown(policies, tmp_path):
    working = tmp_path / "artifacts" / "policy" / ".tmp-run-1"
    working.mkdir(parents=True)
    lines = (policies["dpo"] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (working / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    text = page(open_runs([working, policies["dpo"]], None), "align report")
    assert "is not finished" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page with")
def test_a_browser_opens_the_page_without_a_complaint(html, tmp_path):
    """A probe added to a copy writes into its title: that it fits into the window, and that a checkbox hides its run."""
    probe = (
        "<script>document.querySelector('#show-1').click(); document.title = [document.documentElement.scrollWidth"
        " <= innerWidth, getComputedStyle(document.querySelector('.run-1')).display,"
        " getComputedStyle(document.querySelector('.run-0')).display].join()</script></body>"
    )
    (tmp_path / "page.html").write_text(html.replace("</body>", probe))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         "--window-size=500,900", f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert re.search(r"<title>true,none,inline</title>", done.stdout)


def test_the_session_finds_the_policy_of_a_report_without_arguments(folder):
    tree = yaml.safe_load((folder / "dpo.yaml").read_text())
    result = session(tree, folder / STORED).run("report", png=folder / "own.png")
    assert [Path(one["run"]).name.startswith("tiny-dpo") for one in result["runs"]] == [True]


# The store, seen


def listing(align, folder: Path, *arguments: str) -> dict:
    code, out, err = align(*arguments, "--store", folder / STORED, "--json")
    assert code == 0, err
    return json.loads(out)


def test_ls_names_what_each_artifact_was_made_from(align, folder, policies):
    found = {f"{one['kind']}/{one['name']}": one for one in listing(align, folder, "ls")["artifacts"]}
    kinds = [place.partition("/")[0] for place in found]
    assert kinds == ["rows", "ref-logps", "policy", "policy", "completions", "completions", "verdicts"]
    by_kind = {kind: [place for place in found if place.startswith(f"{kind}/")] for kind in kinds}
    (rows,), (logps,) = by_kind["rows"], by_kind["ref-logps"]
    assert found[rows]["data"] == [str(folder / "preferences.jsonl")]
    assert found[rows]["made_from"] == found[logps]["made_from"] == []
    assert found[f"policy/{policies['dpo'].name}"]["made_from"] == [rows, logps]
    assert found[f"policy/{policies['simpo'].name}"]["made_from"] == [rows]
    made = {place: found[place]["made_from"] for place in by_kind["completions"]}
    (sampled,) = [place for place, inputs in made.items() if inputs]
    assert made[sampled] == [f"policy/{policies['dpo'].name}"]
    (verdicts,) = by_kind["verdicts"]
    assert set(found[verdicts]["made_from"]) == set(made)
    assert [
        place for place in listing(align, folder, "ls", "policy")["artifacts"] if place["kind"] != "policy"
    ] == []
    size = sum(path.stat().st_size for path in policies["dpo"].iterdir())
    assert found[f"policy/{policies['dpo'].name}"]["bytes"] == size


def test_show_leads_from_the_data_to_the_completions(align, folder, policies):
    code, out, err = align("show", policies["dpo"].name[:-6], "--store", folder / STORED)
    assert code == 0, err
    for part in ("preferences.jsonl", "rows/", "ref-logps/", "completions/tiny-dpo-", "beta: 0.2"):
        assert part in out
    shown = listing(align, folder, "show", "policy/latest")
    assert Path(shown["path"]) == policies["simpo"]
    assert shown["used_by"] == []


def test_diff_has_what_differs_and_nothing_else(align, folder, policies):
    found = listing(align, folder, "diff", policies["dpo"], policies["simpo"])
    assert found["settings"]["loss.name"] == ["dpo", "simpo"]
    assert found["settings"]["train.seed"] == [0, 3]
    assert "train.batch_size" not in found["settings"]
    counts = [
        json.loads((policies[name] / "manifest.json").read_text())["counts"] for name in ("dpo", "simpo")
    ]
    assert found["results"]["final.loss"] == [one["final"]["loss"] for one in counts]
    same = listing(align, folder, "diff", policies["dpo"], policies["dpo"])
    assert [same[part] for part in ("settings", "identity", "results")] == [{}, {}, {}]


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    shutil.copytree(folder / STORED, tmp_path / STORED)
    return tmp_path


def test_gc_takes_what_nothing_was_made_from_and_only_when_told(align, copy):
    assert listing(align, copy, "gc") == {"deleted": False, "unused": []}
    (dpo,) = [path for path in (copy / STORED / "policy").iterdir() if "-dpo-" in path.name]
    shutil.rmtree(dpo)
    leftover = copy / STORED / "rows" / ".tmp-rows-1.host.7.abc"
    leftover.mkdir()
    unused = listing(align, copy, "gc")
    assert {one["kind"] for one in unused["unused"]} == {"ref-logps", "rows"}
    assert {Path(one["path"]).name for one in unused["unused"] if one["kind"] == "rows"} == {leftover.name}
    assert leftover.is_dir()
    assert listing(align, copy, "gc", "--yes")["deleted"]
    assert not leftover.exists()
    assert [path.name for path in (copy / STORED / "ref-logps").iterdir()] == ["by-place"]
    assert list((copy / STORED / "ref-logps/by-place").iterdir()) == []
    assert listing(align, copy, "gc")["unused"] == []
    assert len(list((copy / STORED / "rows").iterdir())) == 1


def test_gc_keeps_what_an_interrupted_training_needs_and_waits_for_a_running_one(align, copy):
    from cache.ownership import claim

    policies = copy / STORED / "policy"
    (dpo,) = [path for path in policies.iterdir() if "-dpo-" in path.name]
    identity = json.loads((dpo / "manifest.json").read_text())["identity"]
    working = policies / f".tmp-{dpo.name}"
    (working / "checkpoint-2").mkdir(parents=True)
    (working / "checkpoint-2/state.json").write_text(json.dumps({"step": 2, "identity": identity}))
    shutil.rmtree(dpo)
    assert listing(align, copy, "gc")["unused"] == []
    assert listing(align, copy, "ls")["unfinished"][0]["checkpoint_step"] == 2
    held = claim(working)
    try:
        code, _, err = align("gc", "--yes", "--store", copy / STORED)
        assert code == 7
        assert "A process is writing" in err
    finally:
        held.release()


def test_names_lead_to_folders(align, folder, copy):
    """A run trained under a name; its completions are found under it too; the name changes no identity."""
    from pipeline.catalogue.names import folder_of

    tree = yaml.safe_load((folder / "dpo.yaml").read_text())
    tree["train"] |= {"name": "first try", "seed": 9}
    store = copy / STORED
    trained = Path(run(tree, store, "train")["artifact"])
    tree["train"]["name"] = "second"
    assert Path(run(tree, store, "train")["artifact"]) == trained
    assert folder_of(store, "first try") == trained
    assert folder_of(store, "latest", ("policy",)) == trained
    assert folder_of(store, trained.name[-12:-4]) == trained  # digits of its fingerprint
    assert folder_of(store, trained) == trained
    tree["train"]["name"] = "first try"
    tree["sample"] |= {"model": "first try", "compare": False}
    sampled = session(tree, store).run("sample")["completions"]["model"]
    assert Path(sampled["artifact"]).name.startswith(trained.name)
    assert folder_of(store, "first try", ("completions",)) == Path(sampled["artifact"])
    config = yaml.safe_load((Path(sampled["artifact"]) / "config.yaml").read_text())
    assert config["sample"]["model"] == str(trained)
    with pytest.raises(UsageError, match="may mean 3 artifacts"):
        folder_of(store, "tiny-", ("policy",))
    with pytest.raises(UsageError, match="Did you mean first try"):
        folder_of(store, "frist try")


def test_a_beginning_of_a_name_on_the_hub_leads_to_no_artifact(folder):
    from pipeline.catalogue.names import with_folders
    from pipeline.config import build_config

    config = build_config({"eval": {"model": "tiny"}, "sample": {"model": "latest"}})
    found = with_folders(config, folder / STORED)
    assert found.eval.model == "tiny"
    assert Path(found.sample.model or "").name.startswith("tiny-simpo")


# The model card


def test_a_policy_has_a_card_with_what_was_measured_and_no_path_of_this_machine(policies, folder):
    from huggingface_hub import ModelCard
    from PIL import Image

    for name, path in policies.items():
        card = ModelCard.load(path / "README.md")
        counts = json.loads((path / "manifest.json").read_text())["counts"]
        assert card.data.tags == ["align", "preference-optimization", name]
        assert card.data.library_name == "transformers"
        assert card.data.eval_results[0].metric_value == counts["final"]["rewards/accuracies"]
        before, after = (counts[part]["rewards/margins"] for part in ("step0", "final"))
        assert f"| margin | {before:.4f} | {after:.4f} |" in card.text
        assert "preferences.jsonl" in card.text
        assert str(folder.parent.parent) not in card.content
        assert "![held-out accuracy" in card.text
        assert Image.open(path / "curves.png").width > 500
        listed = {one["name"] for one in json.loads((path / "manifest.json").read_text())["files"]}
        assert {"README.md", "curves.png"} <= listed
    assert "| loss | name dpo, beta 0.2," in ModelCard.load(policies["dpo"] / "README.md").text
