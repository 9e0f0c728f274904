"""What `align inspect` shows of prepared rows is what is in them, token by token."""

import json
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from cache.errors import StaleError, UsageError
from pipeline import tables
from pipeline.commands.inspect import Inspected
from pipeline.inspect.first_rows import first_rows
from pipeline.inspect.page import page
from pipeline.inspect.prepared_rows import PreparedRows, open_rows
from stages.prepare.stage import prepare
from stages.settings.data import DataSettings, PrepareSettings
from stages.tokenization.template import Template

TALK = [
    {"role": "assistant", "content": "first 東🦊"},
    {"role": "user", "content": "and\x1b[31m?"},
    {"role": "assistant", "content": "second"},
]


@pytest.fixture
def rows(tmp_path, context, chat_tokenizer):
    """Three examples: a short pair, a long one that is cut, and one whose completion holds a user turn."""
    source = tmp_path / "rows.jsonl"
    entries = [
        {"prompt": "q", "chosen": "a<b>", "rejected": "b"},
        {"prompt": "long " * 60, "chosen": "x" * 40, "rejected": "short"},
        {"prompt": "talk", "chosen": TALK, "rejected": [*TALK[:2], {"role": "assistant", "content": "no"}]},
    ]
    source.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    settings = PrepareSettings(max_length=80, max_completion_length=36, heldout_fraction=0.0)
    template = Template(chat_tokenizer, "auto", append_eos=True)
    return PreparedRows(prepare(DataSettings(path=str(source)), settings, template, context), chat_tokenizer)


def text_of(spans, part):
    return "".join(token.text for span in spans if span.part == part for token in span.tokens)


def test_the_parts_are_the_text_that_was_trained_and_the_rest(rows):
    shown = rows.example(3)
    assert (shown.number, shown.split, shown.source) == (3, "train", "rows.jsonl:3")
    assert text_of([shown.prompt], "prompt") == "<|user|>talk<|end|>\n<|assistant|>"
    chosen, rejected = shown.completions
    assert (chosen.role, rejected.role) == ("chosen", "rejected")
    assert text_of(chosen.spans, "trained") == "first 東🦊<|end|>second<|end|>"
    # A terminal would obey the escape character, so it is shown as its picture.
    assert text_of(chosen.spans, "masked") == "\n<|user|>and␛[31m?<|end|>\n<|assistant|>"
    assert [token.text for token in chosen.spans[0].tokens if token.is_special] == ["<|end|>"]
    assert sum(len(token.ids) for span in chosen.spans for token in span.tokens) == chosen.num_tokens


def test_the_first_rows_show_the_end_of_the_prompt_and_where_training_ends(rows, chat_tokenizer):
    console = Console(width=200, file=StringIO(), force_terminal=False)
    console.print(first_rows(rows.artifact, chat_tokenizer))
    lines = console.file.getvalue().splitlines()
    [short] = [line for line in lines if "rows.jsonl:1 chosen" in line]
    assert re.search(r"<\|user\|>q<\|end\|>↵<\|assistant\|> +a<b><\|end\|> ◀ end", short)
    assert sum("◀ end" in line for line in lines) == 6
    assert sum("chosen" in line for line in lines) == sum("rejected" in line for line in lines) == 3


def test_the_characters_of_several_tokens_are_shown_whole(rows):
    tokens = [token for span in rows.example(3).completions[0].spans for token in span.tokens]
    [fox] = [token for token in tokens if "🦊" in token.text]
    assert len(fox.ids) > 1


def test_what_was_cut_is_counted_where_it_is_missing(rows):
    shown = rows.example(2)
    assert shown.cut_at_start
    assert shown.num_prompt_tokens + max(entry.num_tokens for entry in shown.completions) == 80
    assert shown.prompt_cut > 0
    chosen, rejected = shown.completions
    assert (chosen.cut > 0, rejected.cut) == (True, 0)
    counts = rows.artifact.counts["cuts"]
    assert counts["prompts"] == {**dict.fromkeys(("tokens", "median", "max"), shown.prompt_cut), "cut": 1}
    # Both completions of the third row lose nothing, so all that is cut is this one's.
    assert counts["completions"]["tokens"] == chosen.cut


def test_the_numbers_are_those_of_the_rows(rows):
    overview = rows.overview()
    sides = [entry for number in (1, 2, 3) for entry in rows.example(number).completions]
    prompts = [rows.example(number).num_prompt_tokens for number in (1, 2, 3)]
    assert overview.completion_tokens == sum(entry.num_tokens for entry in sides)
    assert overview.trained_tokens == sum(entry.num_trained for entry in sides)
    assert overview.tokens == overview.completion_tokens + sum(prompts)
    for histogram in overview.histograms:
        assert sum(count for *_, count in histogram.bins) == 3
    by_name = {histogram.name: histogram for histogram in overview.histograms}
    assert (by_name["prompts"].longest, by_name["prompts"].median) == (max(prompts), sorted(prompts)[1])


def test_the_choice_of_rows(rows):
    assert [shown.number for shown in rows.chosen(None, None, longest=True)] == [2]
    assert [shown.number for shown in rows.chosen(None, None, longest=False)] == [1]
    assert sorted(shown.number for shown in rows.chosen(None, 9, longest=False)) == [1, 2, 3]
    with pytest.raises(UsageError, match="has examples 1 to 3"):
        rows.chosen(4, None, longest=False)


class Reader(HTMLParser):
    """Collects what a reader of the page sees, and what the page would fetch."""

    def __init__(self):
        super().__init__()
        self.seen, self.fetched, self.ids = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        self.ids += tag == "t" and any(name == "title" for name, _ in attrs)

    def handle_data(self, data):
        self.seen.append(data)


def test_the_page_shows_the_same_text_and_fetches_nothing(rows):
    overview, examples = rows.overview(), [rows.example(number) for number in (1, 2, 3)]
    reader = Reader()
    reader.feed(page(overview, examples, with_ids=False))
    seen = "".join(reader.seen)
    assert "a<b>" in seen
    assert "first 東🦊<|end|>" in seen
    assert f"✂ {examples[1].prompt_cut} tokens truncated" in seen
    assert reader.fetched == []
    assert not re.search(r"url\(|@import", page(overview, examples, with_ids=False))


def test_the_terminal_shows_the_same_text(rows, capsys):
    shown = [rows.example(number) for number in (1, 2, 3)]
    Inspected(rows.overview(), shown, with_ids=False).show(tables.console())
    out = capsys.readouterr().out
    assert "3 = 3 kept + 0 dropped" in out
    assert f"✂ {shown[1].prompt_cut} tokens truncated" in out
    assert "and␛[31m?" in out
    assert "\x1b[31m" not in out
    Inspected(rows.overview(), shown[:1], with_ids=True).show(tables.console())
    eos = shown[0].completions[0].spans[-1].tokens[-1]
    assert f"<|end|>·{eos.ids[0]}" in capsys.readouterr().out


def test_another_tokenizer_and_another_artifact_are_refused(rows, chat_tokenizer, base_tokenizer, tmp_path):
    with pytest.raises(
        StaleError, match=r"is not the one that .* was made with\. Give that one with --tokenizer"
    ):
        PreparedRows(rows.artifact, base_tokenizer)
    with pytest.raises(UsageError, match="No such artifact"):
        open_rows(tmp_path / "none")
    with pytest.raises(UsageError, match=r"is no artifact: it has no manifest\.json\. Give a folder"):
        open_rows(rows.artifact.path.parent)  # never "delete it"
    with pytest.raises(UsageError, match=r"No tokenizer in .*none: no such folder.*--tokenizer DIR"):
        open_rows(rows.artifact.path, tmp_path / "none")
    chat_tokenizer.save_pretrained(tmp_path / "moved")
    assert open_rows(rows.artifact.path, tmp_path / "moved").example(3) == rows.example(3)
