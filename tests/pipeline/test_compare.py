"""`align judge` and `align compare`, from the command line to the table and the page."""

import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import StaleError, UsageError
from pipeline.comparison.page import marked, page
from stages.compare.comparison import Compared, Comparison
from stages.compare.completions import Completed
from stages.compare.verdicts import Verdict
from tests.conftest import save_tiny_llama
from tests.pipeline.small_run import run, session, settings

RULES = "def polite(prompt, completion): return completion.lower().count('please')\n"
FUNCTION = ("--set", "judge.function=polite_rules:polite")


def write_completions(path, model, texts):
    rows = [
        {"prompt": f"Question {n}?", "completion": text, "model": model, "sample_index": 0}
        for n, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rules(tmp_path, monkeypatch):
    (tmp_path / "polite_rules.py").write_text(RULES)
    monkeypatch.delitem(__import__("sys").modules, "polite_rules", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])


@pytest.fixture
def files(tmp_path, rules):
    texts = {
        "base": ["Yes.", "No.", "Please."],
        "kind": ["Please: yes.", "No.", "Please."],
        "rude": ["Yes!", "No!", "Never!"],
    }
    return [write_completions(tmp_path / f"{name}.jsonl", name, own) for name, own in texts.items()]


@pytest.mark.slow
def test_every_model_is_compared_with_the_first(align, files):
    code, out, err = align("compare", *files, *FUNCTION, "--json")
    assert (code, err.count("judges 3 pairs")) == (0, 2)
    kind, rude = json.loads(out)["models"]
    assert (kind["name"], kind["win_rate"]["wins"], kind["win_rate"]["ties"]) == ("kind", 1, 2)
    assert (rude["name"], rude["win_rate"]["losses"], rude["win_rate"]["rate"]) == ("rude", 1, 1 / 3)
    assert kind["length_controlled"]["problem"] == "fewer than 10 pairs have a verdict"
    assert json.loads(out)["baseline"]["texts"]["mean_characters"] == 14 / 3


@pytest.mark.slow
def test_the_table_has_a_column_for_each_model(align, files):
    code, out, _ = align("compare", *files, *FUNCTION)
    assert code == 0
    first, heads, rate = out.splitlines()[:3]
    assert first == "compare  with base as the baseline, judged by polite"
    assert heads.split() == ["base", "(baseline)", "kind", "rude"]
    assert rate.split("win-rate")[1].split("%")[0].strip() == "66.7"
    assert "kind: no length-controlled win-rate: fewer than 10 pairs have a verdict" in out


def test_without_a_judge_the_figures_of_the_texts_remain(align, files):
    code, out, _ = align("compare", *files[:2])
    assert code == 0
    assert "not judged: name a judge to see who wins" in out
    assert "win-rate" not in out
    assert "distinct-1" in out


@pytest.mark.slow
def test_folders_of_verdicts_are_compared_without_asking_again(align, files, tmp_path):
    align("compare", *files, *FUNCTION)
    folders = sorted((tmp_path / "artifacts" / "verdicts").iterdir())
    (tmp_path / "polite_rules.py").unlink()
    code, out, _ = align("compare", *folders, "--json")
    assert code == 0
    found = {model["name"]: model["win_rate"]["rate"] for model in json.loads(out)["models"]}
    assert found == {"kind": pytest.approx(2 / 3), "rude": pytest.approx(1 / 3)}


@pytest.mark.slow
def test_arguments_that_cannot_be_compared_are_named(align, files, tmp_path):
    align("compare", *files[:2], *FUNCTION)
    [folder] = (tmp_path / "artifacts" / "verdicts").iterdir()
    for arguments, message in (
        ([files[0]], "Give the baseline first"),
        ([folder, files[0]], "Give folders of verdicts alone, or completions alone"),
        ([files[0], tmp_path / "none"], "No such file or folder of completions"),
        ([files[0], tmp_path], "has no completions.jsonl"),
    ):
        code, _, err = align("compare", *arguments)
        assert code in (2, 3)
        assert message in err


def test_models_of_one_name_are_told_apart_by_their_files(align, tmp_path, rules):
    paths = [write_completions(tmp_path / f"{name}.jsonl", "same", ["Yes."]) for name in ("cold", "hot")]
    _, out, _ = align("compare", *paths, "--json")
    assert [json.loads(out)["baseline"]["name"], json.loads(out)["models"][0]["name"]] == [
        "cold.jsonl",
        "hot.jsonl",
    ]


@pytest.fixture
def sampled(tmp_path, tiny_model, chat_tokenizer, preferences, rules):
    """A configuration whose named model and reference have been sampled on the held-out prompts."""
    other = save_tiny_llama(tmp_path / "other", chat_tokenizer, seed=5)
    sample = {"model": str(other), "engine": "transformers", "max_tokens": 8, "compare": True}
    tree = settings(tiny_model, preferences, sample=sample, judge={"function": "polite_rules:polite"})
    store = tmp_path / "artifacts"
    run(tree, store, "prepare", "sample")
    return tree, store


@pytest.mark.slow
def test_the_completions_of_a_configuration_are_judged_once(sampled, said):
    tree, store = sampled
    one = session(tree, store, said)
    assert one.dry_run("judge").as_json()["judge"]["would"] == "judge"
    judged = one.run("judge")
    assert judged["reused"] is False
    assert judged["pairs"] == judged["wins"] + judged["ties"] + judged["losses"]
    assert run(tree, store, "judge", said=said)["reused"] is True
    assert session(tree, store).dry_run("judge").as_json() == {
        "judge": {"would": "reuse", "judge": "polite", "pairs": judged["pairs"], "questions": 0}
    }
    compared = run(tree, store, "compare")
    assert compared["models"][0]["win_rate"] == judged["win_rate"]
    assert compared["baseline"]["name"] == "tiny"


@pytest.mark.slow
def test_a_file_can_be_the_baseline(sampled, tmp_path):
    tree, store = sampled
    [own] = [path for path in (store / "completions").iterdir() if path.name.startswith("other-")]
    rows = [json.loads(line) for line in (own / "completions.jsonl").read_text().splitlines()]
    baseline = tmp_path / "outputs.json"
    baseline.write_text(
        json.dumps(
            [
                {
                    "instruction": row["prompt"]
                    if isinstance(row["prompt"], str)
                    else row["prompt"][-1]["content"],
                    "output": "please",
                    "generator": "gpt",
                }
                for row in rows
                if isinstance(row["prompt"], str) or len(row["prompt"]) == 1
            ]
        )
    )
    tree["judge"] = tree["judge"] | {"baseline": str(baseline)}
    judged = run(tree, store, "judge")
    assert judged["losses"] == judged["pairs"] > 0


@pytest.mark.slow
def test_completions_that_are_not_there_are_named_with_the_command(sampled):
    tree, store = sampled
    tree["sample"] = tree["sample"] | {"seed": 7}
    with pytest.raises(StaleError, match=r"model and reference are not in .* Make them with: align sample"):
        run(tree, store, "judge")


@pytest.mark.slow
def test_one_judge_is_needed(sampled):
    tree, store = sampled
    tree["judge"] = {"function": "a:b", "implicit": True}
    with pytest.raises(UsageError, match="names function and implicit; expected one of them"):
        run(tree, store, "judge")
    tree["judge"] = {}
    with pytest.raises(UsageError, match="names no judge; expected one of function"):
        run(tree, store, "judge")


def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(align, files):
    code, _, err = align("compare", *files, "--set", "judge.api_key_variable=sk-1234abcd")
    assert code == 2
    assert "judge.api_key_variable: String should match pattern" in err
    assert "sk-1234abcd" not in err


# The page


class Text(HTMLParser):
    """The text of a page, and the tags that are open at its end."""

    def __init__(self, html):
        super().__init__()
        self.text, self.open, self.tags = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


TEXTS = st.text(st.sampled_from("ab <&>\"'\n"), max_size=15)


@given(TEXTS, TEXTS)
def test_marking_differences_leaves_the_text_as_it_is(text, other):
    shown = Text(marked(text, other))
    assert shown.text == text
    assert shown.open == []
    assert {tag for tag, _ in shown.tags} <= {"mark"}
    assert "mark" not in [tag for tag, _ in Text(marked(text, text)).tags]


def test_words_that_differ_are_marked():
    assert marked("a big dog", "a small dog") == "a <mark>big</mark> dog"


def pair_of(number, own, other, preference, **fields):
    sides = [
        Completed(str(number), f"<p{number}>", text, 0, name) for text, name in ((own, "m"), (other, "b"))
    ]
    return Verdict(*sides, "j", "0" * 64, preference=preference, **fields)


def test_the_page_shows_both_texts_escaped_with_the_verdict_and_loads_nothing():
    verdicts = [
        pair_of(0, "<script>alert(1)</script>", "x & y", 1.0, score=2.0, baseline_score=1.0),
        pair_of(1, "same", "same", 0.5),
        pair_of(2, "one", "two", None, problem="no <verdict>", order="completion_first", reply="<b>?</b>"),
    ]
    models = Compared.of("m<1>", [verdict.completion for verdict in verdicts], verdicts)
    html = page(Comparison(Compared.of("b", [verdict.baseline for verdict in verdicts]), [models]))
    shown = Text(html)
    assert shown.open == []
    assert "<script" not in html
    for text in ("<script>alert(1)</script>", "x & y", "<p0>", "no <verdict>", "<b>?</b>", "m<1>", "75.0 %"):
        assert text in shown.text
    assert [name for tag, attributes in shown.tags for name in attributes if name in ("src", "href")] == []
    badges = [
        attributes["class"] for tag, attributes in shown.tags if "verdict" in attributes.get("class", "")
    ]
    assert badges == ["verdict wins", "verdict tie", "verdict no verdict"]


def test_a_page_of_many_prompts_says_how_many_it_shows():
    entries = [Completed(str(n), f"Prompt {n}", "x", 0, "m") for n in range(250)]
    html = page(Comparison(Compared.of("b", entries), [Compared.of("m", entries)]))
    assert html.count("<article") == 200
    assert "The first 200 of 250." in html
