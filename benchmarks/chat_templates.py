"""Render preferences of many kinds with every chat template of a folder, and compare with transformers' own rendering.

In:  FOLDER of Jinja files (of llama.cpp, vLLM, axolotl, TRL, ...; whoever runs it fetches them).
Out: results/chat_templates.json and .md with --write; exit code 1 where a kept row differs from transformers.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import write_results
from stages.data.messages import messages
from stages.data.source_row import BadRow
from stages.formats.contract import Candidate, Preference
from stages.tokenization.chat_template import GENERATION
from stages.tokenization.jinja_sandbox import DATE
from stages.tokenization.template import Template

# What ends an assistant's turn in the templates of these collections, by the documentation of their models.
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "</s>",
    "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "[EOS]", "<|end_of_text|>",
    "<|end_of_role|>", "[e~[", "<|assistant_end|>", "<seed:eos>", "<|message_sep|>", "<|im_sep|>", "<eos>", "[|endofturn|]",
    "<|end_of_turn|>", "<|end_of_msg|>", "<SPECIAL_12>", "<|endofuserprompt|>", "<|eos|>", "<|eom|>", "<|user|>",
)  # fmt: skip
SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|\[/?[A-Z][A-Z_]+\]|</?s>|<(?:start|end)_of_turn>|<\|?turn\|?>|<seed:\w+>|\]~!?b\]|\[e~\[|<SPECIAL_\d+>|<eos>|<bos>|\[\|\w+\|\]"
)
CLOSING = r"(</[\w:]+>|\[/THINK\]|<\|END_THINKING\|>|<\|inner_suffix\|>|<channel\|>|\[BEGIN FINAL RESPONSE\]|◁/think▷)"
# What stands in front of an assistant's turn, which no model has to write.
HEADER = re.compile(
    r"\s*(<\|(im_start|start|start_header_id|header_start|assistant|START_OF_TURN_TOKEN)\|>|<start_of_turn>|<\|turn>|assistant\b)"
)
ASK, ANSWER = (
    {"role": "user", "content": "Is it raining in Oslo?"},
    {"role": "assistant", "content": "Yes, it is."},
)
MORE, SYSTEM = {"role": "user", "content": "And in Lima?"}, {"role": "system", "content": "Be brief, friend."}
LAST = {"role": "assistant", "content": "No, never."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": {"town": "Bergen"}},
        }
    ],
}
AS_TEXT = {
    **CALL,
    "tool_calls": [
        {**CALL["tool_calls"][0], "function": {"name": "weather", "arguments": '{"town": "Bergen"}'}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": "rain, 9 C"}
WEATHER = {
    "name": "weather",
    "description": "Weather of a town",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string", "description": "its name"}},
        "required": ["town"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
THOUGHT = "I look outside."
# Prompt, completion, tools.
KINDS: dict[str, tuple[list[dict], list[dict], list[dict] | None]] = {
    "one turn": ([ASK], [ANSWER], None),
    "system": ([SYSTEM, ASK], [ANSWER], None),
    "several turns": ([ASK, ANSWER, MORE], [LAST], None),
    "system, several turns": ([SYSTEM, ASK, ANSWER, MORE], [LAST], None),
    "two answers": ([ASK], [ANSWER, MORE, LAST], None),
    "reasoning_content": ([ASK], [{**ANSWER, "reasoning_content": THOUGHT}], None),
    "<think> in the text": ([ASK], [{**ANSWER, "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER['content']}"}], None),
    "reasoning in the prompt": ([ASK, {**ANSWER, "reasoning_content": THOUGHT}, MORE], [LAST], None),
    "answers with tools": ([ASK], [ANSWER], TOOLS),
    "a call": ([ASK], [CALL], TOOLS),
    "a call as text": ([ASK], [AS_TEXT], TOOLS),
    "after a result": ([ASK, CALL, RESULT], [ANSWER], TOOLS),
    "call, result, answer": ([ASK], [CALL, RESULT, ANSWER], TOOLS),
}  # fmt: skip
NOTES = """right: the prompt's ids are those of `apply_chat_template(add_generation_prompt=True)`, and the trained text is what transformers' rendering has
behind them (with `{% generation %}` blocks: what its assistant mask marks), to the first end token. counted: kept, and a note of
the report names what is left out. unshown: refused, because the template drops a text or the tools. neither: transformers renders the row with an error. refused: one line with the reason.
different: kept, and not as transformers has it. Where the rendering does not go on from the prompt (thinking blocks) and for
completions of several assistant turns, right means: one trained stretch for each assistant turn with its answer or call, found in
transformers' rendering, without the words of others or the mark in front of a turn. Each template has a synthetic tokenizer with its
special tokens. share: (right + counted) of the rows that the template shows."""


def tokenizer_for(source: str) -> Any:
    """A byte-level tokenizer with the template's special tokens; its end of sequence is the first known end in the template."""
    from transformers import PreTrainedTokenizerFast

    from tests.conftest import byte_level_bpe

    found = list(dict.fromkeys(SPECIAL.findall(source)))
    ends = [token for token in ENDS if token in source]
    eos = next((token for token in ("<|return|>", *ends) if token in source), "</s>")
    bos = next(
        (
            token
            for token in ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>")
            if token in source
        ),
        "<s>",
    )
    tokens = list(dict.fromkeys([bos, eos, *found]))
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(tokens),
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[token for token in tokens if token not in (bos, eos)],
        chat_template=source,
        clean_up_tokenization_spaces=False,
    )


def cell(template: Template, prompt: list[dict], completion: list[dict], tools: Any) -> tuple[str, str]:
    """What became of one row: right, counted, refused, different, unshown or neither, and why."""
    tokenizer = template.tokenizer
    theirs = Theirs(tokenizer, prompt, completion, tools)
    try:
        row = {"prompt": prompt, "completion": completion}
        candidates = [Candidate(messages(row, "completion"), "chosen")]
        rendered = template.renderer.render(Preference(messages(row, "prompt"), candidates, tools))
        batch = template.encoder.texts_of([rendered])
        [encoded] = template.encoder.encoded(batch, template.encoder.tokenize(batch.texts))
        if isinstance(encoded, BadRow):
            raise encoded
    except BadRow as problem:
        if theirs.problem:
            return "neither", theirs.problem
        shown = shows_all(prompt + completion, tools, theirs.whole)
        return "refused" if shown else "unshown", str(problem)
    if theirs.problem:
        return "different", f"kept, where transformers has {theirs.problem}"
    if encoded.prompt_ids.tolist() != theirs.prompt_ids:
        return "different", "prompt ids"
    [(ids, mask)] = encoded.completions
    trained = tokenizer.decode(ids[mask])
    texts = theirs.completions()
    if any("generation_does_not_stop" in note for note in rendered.notes):
        texts += [text.removesuffix(tokenizer.eos_token) for text in texts]
    if texts and not any(same(trained, text) for text in texts):
        return "different", f"trained {trained!r}, expected {texts}"
    if not texts and not each_turn_is_trained(tokenizer, completion, ids, mask, theirs.whole):
        return "different", f"trained {trained!r}"
    return ("counted", ", ".join(sorted(rendered.notes))) if rendered.notes else ("right", "")


class Theirs:
    """transformers' own rendering, on the day that `align` gives to templates which write today's date.

    Arguments that are a text are tried as an object first, as most templates want them.
    """

    def __init__(self, tokenizer: Any, prompt: list[dict], completion: list[dict], tools: Any) -> None:
        """Render the prompt, and the whole; `problem` says why that fails."""
        self.tokenizer, self.prompt, self.tools, self.problem = tokenizer, prompt, tools, "not tried"
        for side in ([CALL if turn == AS_TEXT else turn for turn in completion], completion):
            if self.problem or "{'town': 'Bergen'}" in self.whole:
                self._try(side)

    def _try(self, side: list[dict]) -> None:
        self.completion, self.whole, self.problem = side, "", ""
        try:
            found = self.render(self.prompt, add_generation_prompt=True, tokenize=True)
            self.prompt_ids = list(found["input_ids"])
            self.head = self.render(self.prompt, add_generation_prompt=True, tokenize=False)
            self.whole = self.render(self.prompt + side, tokenize=False)
        except Exception as error:  # whatever a template raises
            self.problem = f"{type(error).__name__}: {error}"

    def render(self, turns: list[dict], **options: Any) -> Any:
        if takes_parts(self.tokenizer):
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        return self.tokenizer.apply_chat_template(
            turns, tools=self.tools, strftime_now=DATE.strftime, **options
        )

    def completions(self) -> list[str]:
        """The texts that a completion of one turn may train: the rendering behind the prompt, to the first end token.

        None where the completion has several turns, or the rendering does not go on from the prompt.
        """
        rest = self.whole[len(self.head) :]
        if len(self.completion) > 1 or not self.whole.startswith(self.head):
            return []
        if GENERATION.search(self.tokenizer.chat_template):
            return self._marked()
        return [] if leaves_open(self.head, rest) else endings(self.tokenizer, rest)

    def _marked(self) -> list[str]:
        marked = self.render(
            self.prompt + self.completion,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        start = len(self.prompt_ids)
        pairs = list(zip(marked["input_ids"], marked["assistant_masks"], strict=True))[start:]
        return endings(
            self.tokenizer, self.tokenizer.decode([token for token, is_marked in pairs if is_marked])
        )


@cache
def takes_parts(tokenizer: Any) -> bool:
    """Whether the template shows a list of parts and not a text, tried with transformers."""
    for content in (ASK["content"], [{"type": "text", "text": ASK["content"]}]):
        try:
            turn = {"role": "user", "content": content}
            text = tokenizer.apply_chat_template([turn], tokenize=False, strftime_now=DATE.strftime)
        except Exception:
            continue
        if ASK["content"] in text:
            return content != ASK["content"]
    return False


def shows_all(turns: list[dict], tools: Any, whole: str) -> bool:
    """Whether transformers' rendering has every text, every call, and every function that is offered."""
    texts = [turn["content"].rpartition("</think>")[2].strip() for turn in turns]
    texts += ["Bergen"] * any("tool_calls" in turn for turn in turns)
    texts += [tool["function"]["description"] for tool in tools or ()]
    return all(text in whole for text in texts)


def same(trained: str, text: str) -> bool:
    return "".join(trained.split()) == "".join(text.split())


def leaves_open(head: str, rest: str) -> bool:
    """Whether the generation prompt opens a block that the rendering does not close."""
    tail = head[-60:]
    opened = re.search(r"<think|\[THINK|:think>|START_THINKING|inner_prefix|thought|reasoning steps", tail)
    return (
        opened is not None and not re.search(CLOSING, tail[opened.start() :]) and not re.search(CLOSING, rest)
    )


def endings(tokenizer: Any, text: str) -> list[str]:
    """The text to its first end token behind the answer, or with one behind it."""
    said = max(0, *(text.rfind(answer) for answer in ("Bergen", ANSWER["content"], LAST["content"])))
    places = [(text.find(end, said), end) for end in (*ENDS, tokenizer.eos_token) if end in text[said:]]
    if not places:
        return [text + tokenizer.eos_token]
    return [text[: place + len(end)] for place, end in sorted(places)[:1]]


def each_turn_is_trained(tokenizer: Any, completion: Sequence[dict], ids: Any, mask: Any, whole: str) -> bool:
    """Whether the trained stretches are as many as the assistant's turns, stand in the rendering, and hold one answer each."""
    answers = [turn for turn in completion if turn["role"] == "assistant"]
    others = [turn["content"] for turn in completion if turn["role"] != "assistant"]
    edges = [0, *(place for place in range(1, len(ids)) if mask[place] != mask[place - 1]), len(ids)]
    runs = [tokenizer.decode(ids[a:b]) for a, b in pairwise(edges) if mask[a]]
    said = [turn["content"].rpartition("</think>")[2].strip() or "Bergen" for turn in answers]
    bare = "".join(whole.split())
    return (
        len(runs) == len(answers)
        and not any(HEADER.match(run) for run in runs)
        and all(
            text in run and not any(other in run for other in others)
            for text, run in zip(said, runs, strict=True)
        )
        and all(written_by_the_template(run, tokenizer) in bare for run in runs)
    )


def written_by_the_template(run: str, tokenizer: Any) -> str:
    """A trained stretch without white space, the reasoning and end of a block at its beginning, and the end of sequence."""
    text = re.sub(rf"^\s*({re.escape(THOUGHT)})?\s*{CLOSING}", "", run.removesuffix(tokenizer.eos_token))
    return "".join(text.split())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="write results/chat_templates.json and .md")
    parser.add_argument("--show", nargs="*", default=["different"], help="outcomes to list, of KINDS or all")
    parser.add_argument("--kind", help="only this kind of row")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    paths, unusable = sorted(options.folder.rglob("*.jinja")), []
    for path in paths:
        try:
            template = Template(tokenizer_for(path.read_text(encoding="utf-8")), "auto", append_eos=True)
        except Exception as error:
            unusable.append(f"{path.name}: {type(error).__name__}: {error}")
            continue
        for kind, (prompt, completion, tools) in KINDS.items():
            if options.kind not in (None, kind):
                continue
            outcome, why = cell(template, prompt, completion, tools)
            counts[kind][outcome] += 1
            if outcome in options.show:
                print(f"{outcome:10}{kind:26}{path.name}: {why[:260]}")
    rows = [as_row(kind, counts[kind]) for kind in KINDS]
    for row in rows:
        print(row)
    print(f"{len(paths)} templates; no template for transformers or align: {unusable}")
    if options.write:
        write_results("chat_templates", rows, f"{len(paths)} chat templates", NOTES)
    return int(any(row["different"] for row in rows))


def as_row(kind: str, found: Counter[str]) -> dict[str, Any]:
    """The counts of one kind of row, and the share that comes in of the rows that transformers renders."""
    rendered = found.total() - found["neither"] - found["unshown"]
    names = ("right", "counted", "refused", "different", "unshown", "neither")
    comes_in = found["right"] + found["counted"]
    return {
        "name": kind,
        **{name: found[name] for name in names},
        "share": round(comes_in / max(rendered, 1), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
