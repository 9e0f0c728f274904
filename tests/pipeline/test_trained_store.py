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
        train={"max_steps": 4, "sample_steps": None, **train},
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


@pytest.fixture
def policies(folder) -> dict[str, Path]:
    """The policies by loss."""
    found = [path for path in (folder / STORED / "policy").iterdir() if not path.name.startswith(".")]
    return {name: path for path in found for name in ("dpo", "simpo") if f"-{name}-" in path.name}


@pytest.fixture
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
