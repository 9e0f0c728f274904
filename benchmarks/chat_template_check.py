"""What became of a row that was rendered with a chat template, in comparison with transformers' own rendering.

In: `Template`s with a synthetic tokenizer each, and rows of `chat_template_rows.py`. Out: right, counted, refused, different,
unshown or neither, and why.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from benchmarks.chat_template_rows import ANSWER, AS_TEXT, ASK, CALL, LAST, THOUGHT
from stages.data.messages import messages
from stages.data.source_row import BadRow
from stages.formats.contract import Candidate, Preference
from stages.tokenization.chat_template import GENERATION
from stages.tokenization.jinja_sandbox import DATE
from stages.tokenization.prefill import CONTINUED
from stages.tokenization.template import Template

# What ends an assistant's turn in the templates of these collections, by the documentation of their models.
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "</s>",
    "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "[EOS]", "<|end_of_text|>",
    "<|end_of_role|>", "[e~[", "<|assistant_end|>", "<seed:eos>", "<|message_sep|>", "<|im_sep|>", "<eos>", "[|endofturn|]",
    "<|end_of_turn|>", "<|end_of_msg|>", "<SPECIAL_12>", "<|endofuserprompt|>", "<|EOT|>", "<|stop|>", "<|eos|>", "<|eom|>", "<|user|>",
)  # fmt: skip
SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|\[/?[A-Z][A-Z_]+\]|</?s>|<(?:start|end)_of_turn>|<\|?turn\|?>|<seed:\w+>|\]~!?b\]|\[e~\[|<SPECIAL_\d+>|<eos>|<bos>|\[\|\w+\|\]"
)
CLOSING = r"(</[\w:]+>|\[/THINK\]|<\|END_THINKING\|>|<\|inner_suffix\|>|<channel\|>|\[BEGIN FINAL RESPONSE\]|◁/think▷)"
# What stands in front of an assistant's turn, which no model has to write.
HEADER = re.compile(
    r"\s*(<\|(im_start|start|start_header_id|header_start|assistant|START_OF_TURN_TOKEN)\|>|<start_of_turn>|<\|turn>|assistant\b)"
)


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
    left_out = sorted(rendered.notes - {CONTINUED})
    return ("counted", ", ".join(left_out)) if left_out else ("right", "")


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
            *before, last = self.prompt
            how, turns = {"add_generation_prompt": True}, self.prompt + side
            if last["role"] == "assistant":
                how = {"continue_final_message": True}
                turns = [*before, {**side[0], "content": last["content"] + side[0]["content"]}, *side[1:]]
            found = self.render(self.prompt, tokenize=True, **how)
            self.prompt_ids = list(found["input_ids"])
            self.head = self.render(self.prompt, tokenize=False, **how)
            self.turns, self.whole = turns, self.render(turns, tokenize=False)
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
            self.turns,
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
