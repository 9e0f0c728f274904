"""Text to tokens: the prompt is a prefix, the mask covers the assistant's words and ends, data forges nothing."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel as PreTokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from cache.errors import DataError
from stages.data.source_row import BadRow, Flagged
from stages.formats import Candidate, Preference
from stages.tokenization.template import Template
from tests.stages.tokenization.encoded import encode_all

BOS, EOS = "<|begin|>", "<|end|>"
texts = st.text(
    st.sampled_from("ab zé東🦊\n\t\u200b\u00a0.:5'") | st.characters(codec="utf-8", exclude_characters="<"),
    max_size=8,
)
words = texts.filter(str.strip)


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def encode(template, prompt, *completions):
    """Ids of the prompt, and (ids, mask) of each completion; raises the `BadRow` of the row."""
    candidates = [Candidate(completion, "chosen") for completion in completions]
    [encoded] = encode_all(template, Preference(prompt, candidates))
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded.prompt_ids, encoded.completions


def decode(template, *parts):
    return template.tokenizer.decode(
        [int(value) for ids in parts for value in ids], clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def chat(chat_tokenizer):
    return Template(chat_tokenizer, "auto", append_eos=True)


@pytest.fixture(scope="module")
def trimmed(chat_tokenizer):
    """As Llama 3's: the offsets of tokens leave out spaces."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return Template(tokenizer, "auto", append_eos=True)


@pytest.fixture(scope="module")
def base(base_tokenizer):
    return Template(base_tokenizer, "auto", append_eos=True)


@st.composite
def conversations(draw):
    """A prompt that ends with a question, and a completion of one to three assistant turns with others between."""
    head = draw(st.lists(st.tuples(texts, texts), max_size=2))
    prompt = [message("system", draw(texts))] if draw(st.booleans()) else []
    for question, answer in head:
        prompt += [message("user", question), message("assistant", answer)]
    prompt.append(message("user", draw(texts)))
    completion = [message("assistant", draw(texts))]
    for _ in range(draw(st.integers(0, 2))):
        completion += [message("user", draw(texts)), message("assistant", draw(texts))]
    return prompt, completion


def chatml_like(turns):
    return "".join(f"<|{turn['role']}|>{turn['content']}{EOS}\n" for turn in turns)


@pytest.mark.slow
@given(conversation=conversations())
@pytest.mark.parametrize("which", ["chat", "trimmed"])
def test_any_conversation_keeps_its_text_and_trains_exactly_the_assistants(request, which, conversation):
    """The rendered text is written out here; what is trained is each assistant text of the completion and its end."""
    template = request.getfixturevalue(which)
    prompt, completion = conversation
    prompt_ids, [(ids, mask)] = encode(template, prompt, completion)
    assert decode(template, prompt_ids) == chatml_like(prompt) + "<|assistant|>"
    assert decode(template, prompt_ids, ids) == chatml_like(prompt + completion).removesuffix("\n")
    spoken = [turn["content"] + EOS for turn in completion if turn["role"] == "assistant"]
    assert decode(template, ids[mask]) == "".join(spoken)


@pytest.mark.slow
@given(conversation=conversations())
def test_any_conversation_of_a_base_model_keeps_its_text_and_trains_exactly_the_assistants(
    base, conversation
):
    prompt, completion = conversation
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    ends = {"assistant": EOS}
    whole = BOS + "".join(
        f"\n\n{names[turn['role']]}: {turn['content']}{ends.get(turn['role'], '')}"
        for turn in prompt + completion
    )
    prompt_ids, [(ids, mask)] = encode(base, prompt, completion)
    assert decode(base, prompt_ids, ids) == whole
    spoken = [f" {turn['content']}{EOS}" for turn in completion if turn["role"] == "assistant"]
    assert decode(base, ids[mask]) == "".join(spoken)


@given(prompt=texts, first=words, second=words)
def test_plain_text_is_joined_as_it_is_with_one_beginning_and_one_end(base, prompt, first, second):
    prompt_ids, completions = encode(base, prompt, first, second)
    eos = base.tokenizer.eos_token_id
    for text, (ids, mask) in zip((first, second), completions, strict=True):
        assert decode(base, prompt_ids, ids) == BOS + prompt + text + EOS
        assert mask.all()
        assert ids.tolist().count(eos) == 1


def test_a_string_prompt_becomes_a_user_turn_where_there_is_a_chat_template(chat):
    assert (
        encode(chat, "q", "a")[0].tolist()
        == encode(chat, [message("user", "q")], [message("assistant", "a")])[0].tolist()
    )
    prompt_ids, [(ids, _)] = encode(chat, "q", "a")
    assert decode(chat, prompt_ids, ids) == "<|user|>q<|end|>\n<|assistant|>a<|end|>"


def test_a_merge_across_the_cut_is_undone_so_that_the_prompt_is_one_for_all(base):
    """`Whe` and `re` are tokens: `W` + `here` must not become `Whe` + `re` in one completion and not the other."""
    prompt_ids, completions = encode(base, "W", "here", "x")
    assert decode(base, prompt_ids) == BOS + "W"
    assert [decode(base, ids) for ids, _ in completions] == ["here" + EOS, "x" + EOS]
    [encoded] = encode_all(base, Preference("W", [Candidate("here", "chosen"), Candidate("x", "rejected")]))
    assert encoded.num_merged == 1


def test_no_end_is_appended_where_none_is_wanted(base_tokenizer):
    template = Template(base_tokenizer, "plain", append_eos=False)
    prompt_ids, [(ids, _)] = encode(template, "q", " a")
    assert decode(template, prompt_ids, ids) == BOS + "q a"


def test_an_end_is_appended_where_the_chat_template_closes_no_turn(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    for append_eos, end in ((True, EOS), (False, "")):
        template = Template(tokenizer, "chat", append_eos)
        _, [(ids, _)] = encode(template, [message("user", "q")], [message("assistant", "5")])
        assert decode(template, ids) == "5\n" + end


def test_the_space_that_opens_a_turn_is_not_trained_although_its_offset_is_trimmed(trimmed):
    """The generation prompt ends in a space that is a token of its own before `5`."""
    tokenizer = copy.deepcopy(trimmed.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[A] {{ m.content }}<|end|>{% else %}[U] {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[A] {% endif %}"
    )
    template = Template(tokenizer, "chat", append_eos=True)
    completion = [message("assistant", "5"), message("user", "why?"), message("assistant", "5 5")]
    prompt_ids, [(ids, mask)] = encode(template, [message("user", "q")], completion)
    assert decode(template, prompt_ids, ids) == "[U] q\n[A] 5<|end|>[U] why?\n[A] 5 5<|end|>"
    assert decode(template, ids[mask]) == "5<|end|>5 5<|end|>"
    assert decode(template, ids[~mask]) == "[U] why?\n[A] "


@pytest.mark.parametrize(
    "around", [f"{BOS} $A", f"$A {EOS}", f"{BOS} $A {EOS}", f"{BOS} {BOS} $A {EOS} {EOS}"]
)
def test_what_a_tokenizer_adds_at_the_end_of_its_own_accord_is_never_there_twice(base_tokenizer, around):
    tokenizer = copy.deepcopy(base_tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = Sequence(
        [ByteLevel(), TemplateProcessing(single=around, special_tokens=special)]
    )
    template = Template(tokenizer, "auto", append_eos=True)
    prompt_ids, [(ids, mask)] = encode(template, "Where", " here")
    begin = "".join(BOS for token in around.split() if token == BOS)
    assert decode(template, prompt_ids) == begin + "Where"
    assert decode(template, ids) == " here" + EOS
    assert mask.all()
    cut = Template(tokenizer, "auto", append_eos=False)
    assert decode(cut, *[ids for ids, _ in encode(cut, "Where", " here")[1]]) == " here"


def test_truncation_and_padding_left_in_a_tokenizer_file_do_nothing(base_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = copy.deepcopy(base_tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    tokenizer.save_pretrained(tmp_path)
    template = Template(AutoTokenizer.from_pretrained(tmp_path), "auto", append_eos=True)
    for prompt, completion in (("a", "b"), ("a long prompt of many tokens", " and a long answer")):
        prompt_ids, [(ids, _)] = encode(template, prompt, completion)
        assert decode(template, prompt_ids, ids) == BOS + prompt + completion + EOS


def special_ids(template, *parts):
    special = {number for number, token in template.tokenizer.added_tokens_decoder.items() if token.special}
    return [int(value) for ids in parts for value in ids if int(value) in special]


@pytest.mark.parametrize("token", [EOS, "<|assistant|>", "<|pad|>"])
@pytest.mark.parametrize("field", ["content", "system", "completion"])
def test_text_that_spells_a_special_token_stays_text_wherever_it_stands(chat, token, field):
    def encoded(text):
        turns = {"content": "q", "system": "s", "completion": "a", field: text}
        prompt = [message("system", turns["system"]), message("user", turns["content"])]
        prompt_ids, [(ids, mask)] = encode(chat, prompt, [message("assistant", turns["completion"])])
        return prompt_ids, ids, mask

    forged = f"hi{token}<|user|>more"
    plain, kept = encoded("hi"), encoded(forged)
    assert decode(chat, *kept[:2]) == decode(chat, *plain[:2]).replace("hi", forged)
    assert special_ids(chat, *kept[:2]) == special_ids(chat, *plain[:2])
    # All that was said is trained, and what is not is the template's.
    assert decode(chat, kept[1][kept[2]]) == decode(chat, plain[1][plain[2]]).replace("hi", forged)


@pytest.mark.slow
@given(
    texts=st.lists(
        st.sampled_from([EOS, BOS, "<|user|>", "<|assistant|>", "hi", " ", "<|", "a\n"]), min_size=1
    )
)
def test_data_forges_no_turn_whatever_it_spells(chat, texts):
    text = "q" + "".join(texts) + "q"
    prompt_ids, [(ids, _)] = encode(chat, [message("user", text)], [message("assistant", text)])
    expected, [(answer, _)] = encode(chat, [message("user", "q")], [message("assistant", "q")])
    assert special_ids(chat, prompt_ids, ids) == special_ids(chat, expected, answer)
    assert decode(chat, prompt_ids, ids).count(text) == 2


def test_plain_text_that_spells_a_special_token_stays_text_behind_one_beginning(base):
    prompt_ids, [(ids, _)] = encode(base, f"q{BOS}", f" a{EOS}")
    expected, [(answer, _)] = encode(base, "q", " a")
    assert decode(base, prompt_ids, ids) == f"{BOS}q{BOS} a{EOS}{EOS}"
    assert special_ids(base, prompt_ids, ids) == special_ids(base, expected, answer)


def test_a_spelling_that_the_tokenizer_cannot_encode_exactly_is_flagged(base_tokenizer):
    tokenizer = copy.deepcopy(base_tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer(add_prefix_space=True)
    own = Template(tokenizer, "plain", append_eos=True)
    encode(own, "q", " a")
    with pytest.raises(Flagged, match="spells a special token"):
        encode(own, f"q{EOS}", " a")


def test_otherwise_the_data_would_forge_a_turn(chat):
    """What a special token in a text does when it is tokenized as any other text."""
    ids = chat.tokenizer(f"hi{EOS}")["input_ids"]
    assert ids[-1] == chat.tokenizer.eos_token_id


def with_template(tokenizer, source):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = source
    return Template(changed, "auto", append_eos=True)


TURN = "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "the chat template fails: TemplateError: Roles must alternate"),
        ("{% for m in messages %}{{ m.content.nope.nope }}{% endfor %}", "the chat template fails: UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: SecurityError"),
        # Shows only the last turn, as templates that hide earlier reasoning do.
        ("{% for m in messages %}{% if loop.last %}" + TURN + "{% endif %}{% endfor %}" + OPEN, "rewrites earlier turns"),
        # Opens a turn with text that the finished turn does not have.
        ("{% for m in messages %}" + TURN + "{% endfor %}" + OPEN + "{% if add_generation_prompt %}Well, {% endif %}", "rewrites earlier turns"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_rewrites_is_one_line(chat_tokenizer, source, problem):
    with pytest.raises(BadRow, match=problem):
        encode(with_template(chat_tokenizer, source), [message("user", "q")], [message("assistant", "a")])


def test_a_reply_that_would_merge_with_the_generation_prompt_is_tokenized_as_its_continuation(chat_tokenizer):
    """`Whe` and `re` are tokens, so that `...W` + `here` would change the prompt's last id; the mask follows."""
    source = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    )
    template = with_template(chat_tokenizer, source)
    completion = [message("assistant", "here"), message("user", "W"), message("assistant", "here")]
    alone, _ = encode(template, [message("user", "W")])
    prompt_ids, [(ids, mask)] = encode(template, [message("user", "W")], completion)
    assert prompt_ids.tolist() == alone.tolist()
    assert decode(template, prompt_ids, ids) == "Where<|end|>Where<|end|>"
    assert decode(template, ids[mask]).startswith("here<|end|>")


def test_one_bad_row_of_a_batch_spoils_no_other(chat_tokenizer):
    template = Template(chat_tokenizer, "plain", append_eos=True)
    rows = [("x", "y"), ("", "here"), ("u", "v")]
    preferences = [Preference(prompt, [Candidate(text, "chosen")]) for prompt, text in rows]
    first, bad, last = encode_all(template, *preferences)
    assert isinstance(bad, BadRow)
    for encoded, (prompt, text) in ((first, rows[0]), (last, rows[2])):
        assert decode(template, encoded.prompt_ids, encoded.completions[0][0]) == prompt + text + EOS


def test_a_prompt_without_tokens_is_refused(chat_tokenizer):
    with pytest.raises(BadRow, match="the prompt has no tokens"):
        encode(Template(chat_tokenizer, "plain", append_eos=True), "", "a")


def test_of_several_chat_templates_the_default_is_taken(chat, chat_tokenizer):
    several = {"tool_use": "other", "default": chat_tokenizer.chat_template}
    assert with_template(chat_tokenizer, several).identity() == chat.identity()
    with pytest.raises(DataError, match=r"several chat templates and none is named default \(one, two\)"):
        with_template(chat_tokenizer, {"one": "1", "two": "2"})


def test_turn_ends(chat, base):
    assert chat.turn_end_ids() == [chat.tokenizer.eos_token_id]
    assert base.turn_end_ids() == [base.tokenizer.eos_token_id]


def test_a_turn_end_other_than_the_end_of_sequence_is_known(chat_tokenizer):
    template = with_template(chat_tokenizer, "{% for m in messages %}{{ m.content }}<|pad|>\n{% endfor %}")
    ids = template.tokenizer.convert_tokens_to_ids([EOS, "<|pad|>"])
    assert template.turn_end_ids() == sorted(ids)


def test_a_mode_that_cannot_be_had_says_what_to_type(chat_tokenizer, base_tokenizer):
    with pytest.raises(DataError, match=r"has no chat template.*--set prepare\.template=plain"):
        Template(base_tokenizer, "chat", append_eos=True)
    tokenizer = copy.deepcopy(base_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-sequence token.*--set prepare\.append_eos=false"):
        Template(tokenizer, "auto", append_eos=True)


def test_identity_is_what_changes_the_ids_and_nothing_else(chat, chat_tokenizer, base_tokenizer):
    assert Template(chat_tokenizer, "chat", append_eos=True).identity() == chat.identity()
    renamed = copy.deepcopy(chat_tokenizer)
    renamed.name_or_path = "elsewhere"
    assert Template(renamed, "auto", append_eos=True).identity() == chat.identity()
    larger = copy.deepcopy(chat_tokenizer)
    larger.add_tokens(["more"])
    others = [
        Template(chat_tokenizer, "plain", append_eos=True),
        Template(chat_tokenizer, "auto", append_eos=False),
        with_template(chat_tokenizer, chat_tokenizer.chat_template + " "),
        Template(base_tokenizer, "auto", append_eos=True),
        Template(larger, "auto", append_eos=True),
    ]
    found = [str(template.identity()) for template in (chat, *others)]
    assert len(set(found)) == len(found)


CHATS = [
    ([("user", "Hi there, 東京?")], [("assistant", "Hello! 🦊 It is far.")]),
    (
        [("system", "Be kind."), ("user", " q ")],
        [("assistant", "\n\n a  "), ("user", "why?"), ("assistant", "5")],
    ),
    (
        [("user", "q"), ("assistant", "a"), ("user", "and é?")],
        [("assistant", "b"), ("user", "c"), ("assistant", "d\n")],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "olmo2_dolma2", "tulu"])
def test_real_tokenizers_keep_the_text_and_train_the_assistants(shared_data, name):
    from transformers import AutoTokenizer

    folder = shared_data / "tokenizers"
    tokenizer = AutoTokenizer.from_pretrained(folder / ("olmo2_dolma2" if name == "tulu" else name))
    if name == "tulu":
        tokenizer.chat_template = (folder / "tulu_chat_template.jinja").read_text()
    template = Template(tokenizer, "auto", append_eos=True)
    for prompt, completion in CHATS:
        assert_the_text_is_kept_and_the_assistants_trained(template, prompt, completion)


def assert_the_text_is_kept_and_the_assistants_trained(template, prompt, completion):
    tokenizer = template.tokenizer
    turns = [[message(role, content) for role, content in side] for side in (prompt, completion)]
    prompt_ids, [(ids, mask)] = encode(template, *turns)
    rendered = tokenizer.apply_chat_template(
        turns[0] + turns[1], chat_template=template.renderer.chat.source, tokenize=False
    )
    assert rendered.startswith(decode(template, prompt_ids, ids))
    assert rendered.removeprefix(decode(template, prompt_ids, ids)).strip() == ""
    assert int(ids[-1]) in template.turn_end_ids()
    kept = decode(template, ids[mask])
    for end in template.turn_end_ids():
        kept = kept.replace(tokenizer.decode([end]), "|")
    assert [part.strip() for part in kept.split("|")] == [
        *(content.strip() for role, content in completion if role == "assistant"),
        "",
    ]
