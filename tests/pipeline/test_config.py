"""Configurations: the files in configs/, who overrides whom, what YAML means, and what is refused."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from cache.errors import UsageError
from pipeline.commands import COMMANDS
from pipeline.config import RunConfig, build_config, load_config
from pipeline.config_sources import CONFIGS, MAX_YAML_BYTES
from stages.formats import FORMATS
from stages.losses import LOSSES, parse_loss
from stages.train.job import resolve_run

REFERENCE = CONFIGS / "reference.yaml"
SEED_RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem in LOSSES)


def load(text: str, tmp_path: Path, *assignments: str, loss: str | None = None) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config([path], assignments, loss)


def refusal(text: str, tmp_path: Path, *assignments: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(text, tmp_path, *assignments)
    return str(caught.value)


# configs/reference.yaml


def commented_keys(text: str) -> dict[str, tuple[str, str]]:
    """For each `block.key` of a two-level YAML file: the comment above it, in one line, and its value."""
    found, comment, block = {}, [], ""
    for line in text.splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
            continue
        key, _, value = line.partition(":")
        if line.startswith("  "):
            found[f"{block}.{key.strip()}"] = (" ".join(comment), value.strip())
        elif line:
            block = key
            found[block] = (" ".join(comment), value.strip())
        comment = []
    return found


def fields() -> Iterator[tuple[str, str, str]]:
    """Every key with its description and its allowed values, from the models the code uses."""
    config = RunConfig()  # its loss is dpo
    for block in RunConfig.model_fields:
        settings: BaseModel = getattr(config, block)
        properties = type(settings).model_json_schema()["properties"]
        for key, part in sorted(properties.items(), key=lambda item: item[0] != "name"):
            yield f"{block}.{key}", part.get("description", ""), allowed(part)


def allowed(part: dict[str, Any]) -> str:
    """The values of a key as the reference writes them, from its JSON schema."""
    if "anyOf" in part:
        return ", or ".join(allowed(choice) for choice in part["anyOf"])
    if "enum" in part:
        return " | ".join(part["enum"])
    if "const" in part:
        return "any loss" if part["const"] in LOSSES else part["const"]
    if part["type"] == "boolean":
        return "true | false"
    if part["type"] in ("integer", "number"):
        above = f"> {part['exclusiveMinimum']:g}" if "exclusiveMinimum" in part else ""
        from_ = f">= {part['minimum']:g}" if "minimum" in part else ""
        to = f"<= {part['maximum']:g}" if "maximum" in part else ""
        below = f"< {part['exclusiveMaximum']:g}" if "exclusiveMaximum" in part else ""
        bounds = " and ".join(bound for bound in (above, from_, to, below) if bound)
        return f"{part['type']} {bounds}".strip()
    if part["type"] == "array":
        return "list of " + ("blocks" if "$ref" in part["items"] else allowed(part["items"]))
    return {"string": "text", "null": "null", "object": "names and values"}[part["type"]]


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[str, str]]:
    return commented_keys(REFERENCE.read_text(encoding="utf-8"))


def test_the_reference_holds_the_defaults():
    assert load_config([REFERENCE], [], None) == RunConfig()


def test_the_reference_lists_every_key_once_in_the_order_of_the_code(reference):
    keys = [key for key in reference if "." in key]
    assert keys == [key for key, _, _ in fields()]
    assert [key for key in reference if "." not in key] == list(RunConfig.model_fields)


@pytest.mark.parametrize(("key", "description", "values"), list(fields()), ids=lambda value: str(value)[:40])
def test_a_reference_comment_is_the_description_in_the_code(reference, key, description, values):
    comment, _ = reference[key]
    assert comment.startswith(description), f"configs/reference.yaml, {key}: begin with: {description}"
    assert comment.endswith(f"[{values}]"), f"configs/reference.yaml, {key}: end with: [{values}]"
    assert len(comment) > len(values) + 2


def test_the_reference_names_every_format_and_every_loss(reference):
    formats, losses = reference["data.format"][0], reference["loss.name"][0]
    assert [format_.name for format_ in FORMATS if format_.name not in formats] == []
    assert [name for name in LOSSES if not re.search(rf"\b{name}\b", losses)] == []


# The other files in configs/


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_says_what_it_is(path):
    load_config([path], [], None)
    assert path.read_text(encoding="utf-8").startswith("# ")


RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_where_it_is_from_what_is_published_and_what_it_needs(path):
    text = path.read_text(encoding="utf-8")
    wanted = ["Source: "] if path.stem.startswith("shared-") else ["Source: ", "# Published: ", "# Memory: "]
    assert [word for word in wanted if word not in text] == []
    config = load_config([path], [], None)
    assert config.loss.model_dump()["name"] in path.stem or path.stem.startswith("shared-")


def test_the_table_of_recipes_lists_every_file():
    table = (CONFIGS / "recipes" / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\]\(([\w.-]+\.yaml)\)", table))) == [path.name for path in RECIPES]


def test_there_is_a_configuration_for_every_loss():
    assert [path.stem for path in SEED_RUNS] == sorted(LOSSES)


@pytest.mark.parametrize("path", SEED_RUNS, ids=lambda path: path.stem)
def test_runs_of_the_losses_differ_in_nothing_but_the_loss(path):
    """And the optimizer where the authors' is another, and data with lists where the loss reads lists."""
    config = load_config([path], [], None)
    dpo = load_config([CONFIGS / "dpo.yaml"], [], None)
    assert config.loss.model_dump()["name"] == path.stem
    assert config.data.max_samples == (12_800 if path.stem in ("simpo", "simper", "orpo") else 6_400)
    same, train = {"data": dpo.data, "loss": dpo.loss}, dpo.train
    if LOSSES[path.stem].unit == "list":
        same["prepare"] = config.prepare.model_copy(update={"graded": "best_worst"})
        train = train.model_copy(update={"pairs": "all"})
    if path.stem in ("sppo", "cal_dpo"):
        train = train.model_copy(update={"optimizer": "rmsprop"})
    assert config.train == train.model_copy(update={"learning_rate": config.train.learning_rate})
    assert config.model_copy(update={**same, "train": dpo.train}) == dpo


def test_the_frame_of_the_runs_is_that_of_rlhf_book():
    """The direct-alignment runs of rlhf-book: lengths, steps, schedule and seeds."""
    config = load_config([CONFIGS / "ultrafeedback.yaml"], [], None)
    train = config.train
    assert (config.prepare.max_length, train.batch_size, train.num_epochs, train.seed) == (2048, 64, 3, 42)
    assert (train.lr_scheduler_type, train.warmup_ratio, train.max_grad_norm) == ("linear", 0.1, 1.0)


@pytest.mark.parametrize("path", SEED_RUNS, ids=lambda path: path.stem)
def test_a_run_takes_its_loss_as_it_is_recommended(path):
    """The fields are the loss's own defaults, but for exo_rw, whose one field is of the scores' size, and a mixture."""
    loss = load_config([path], [], None).loss
    if path.stem == "mixture":
        parts = {part.loss.name: (part.weight, part.loss) for part in loss.parts}  # type: ignore[attr-defined]
        # MPO, arXiv 2411.10442: tests/stages/losses/test_published_numbers.py has its formula.
        assert parts == {"bco": (0.4, LOSSES["bco"]()), "dpo": (0.8, LOSSES["dpo"](sft_weight=1.25))}
    else:
        assert loss == LOSSES[path.stem](**({"score_beta": 0.01} if path.stem == "exo_rw" else {}))


@pytest.mark.slow
def test_a_runs_learning_rate_is_the_recommendation_of_its_loss():
    runs = {path.stem: load_config([path], [], None).train.learning_rate for path in SEED_RUNS}
    assert {name: rate for name, rate in runs.items() if rate != LOSSES[name].learning_rate} == {}


# Defaults < YAML < --set < --loss


def test_each_source_overrides_the_one_before(tmp_path):
    text = "train:\n  seed: 1\n  num_epochs: 2\n"
    assert RunConfig().train.seed == 0
    assert load(text, tmp_path).train.seed == 1
    changed = load(text, tmp_path, "train.seed=2", "train.seed=3")
    assert (changed.train.seed, changed.train.num_epochs) == (3, 2)


def test_later_files_win_key_by_key(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {seed: 1, num_epochs: 2}\n")
    second.write_text("train: {seed: 5}\n")
    merged = load_config([first, second], [], None)
    assert (merged.train.seed, merged.train.num_epochs) == (5, 2)


def test_without_a_file_the_quickstart_is_meant():
    assert load_config([], [], None) == load_config([CONFIGS / "quickstart.yaml"], [], None)
    changed = load_config([], ["train.seed=3", "data.path=quickstart"], None)
    assert (changed.prepare.max_length, changed.train.seed) == (128, 3)


OTHERS = (
    ["data.path=pairs.jsonl"],
    ["policy.model=./mine"],
    ["data.path=pairs.jsonl", "policy.model=./mine"],
    ["data.sources=[{path: a.jsonl}]", "policy.model=./mine"],
)


@pytest.mark.parametrize("assignments", OTHERS, ids=" ".join)
def test_other_data_or_another_model_has_the_defaults(assignments):
    config = load_config([], assignments, "ipo")
    assert config == load_config([REFERENCE], assignments, "ipo")
    assert (config.prepare.max_length, config.train.learning_rate) == (1024, None)


def test_every_example_of_a_help_text_means_what_it_says():
    """Values of the quickstart for the quickstart alone."""
    for command in COMMANDS.values():
        for line in command.examples:
            words = shlex.split(line)
            given = [word for place, word in enumerate(words) if words[place - 1] == "--set"]
            is_own = any(word.startswith(("data.", "policy.model=")) for word in given)
            if "-c" not in words:
                length = load_config([], given, None).prepare.max_length
                assert length == (1024 if is_own else 128), line


IPO = "loss: {name: ipo, beta: 0.3, normalize: sum}\n"


def test_naming_a_loss_replaces_the_whole_block(tmp_path):
    assert load(IPO, tmp_path, loss="kto").loss == parse_loss({"name": "kto"})
    assert load(IPO, tmp_path, loss="ipo").loss == parse_loss({"name": "ipo"})
    assert load(IPO, tmp_path, "loss.name=kto").loss == parse_loss({"name": "kto"})


def test_a_second_file_that_names_a_loss_replaces_the_block_too(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("loss: {name: cdpo}\n")
    (tmp_path / "ipo.yaml").write_text(IPO)
    assert load_config([tmp_path / "ipo.yaml", other], [], None).loss == parse_loss({"name": "cdpo"})


def test_fields_set_beside_a_named_loss_are_its_fields(tmp_path):
    wanted = parse_loss({"name": "kto", "beta": 0.2})
    assert load(IPO, tmp_path, "loss.beta=0.2", loss="kto").loss == wanted
    assert load(IPO, tmp_path, "loss.name=kto", "loss.beta=0.2").loss == wanted


def test_a_field_without_a_name_changes_the_loss_that_is_there(tmp_path):
    assert load(IPO, tmp_path, "loss.beta=0.2").loss == parse_loss({**IPO_FIELDS, "beta": 0.2})
    assert load("loss: {beta: 0.2}\n", tmp_path).loss == parse_loss({"name": "dpo", "beta": 0.2})


IPO_FIELDS = {"name": "ipo", "normalize": "sum"}


# YAML


@pytest.mark.parametrize(
    ("written", "read"),
    [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("1E-5", 1e-5), (".5", 0.5), ("5.", 5.0), ("+1", 1.0)],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path, written, read):
    assert load(f"train: {{learning_rate: {written}}}\n", tmp_path).train.learning_rate == read
    assert load("", tmp_path, f"train.learning_rate={written}").train.learning_rate == read


@pytest.mark.parametrize("text", ["no", "on", "Off", "yes", "1:30", "2020-01-01", "0x1f", "1_000", "12e"])
def test_words_that_yaml_1_1_rewrites_stay_text(tmp_path, text):
    assert load(f"data: {{split: {text}}}\n", tmp_path).data.split == text
    assert load("", tmp_path, f"data.split={text}").data.split == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: 1}\ntrain: {seed: 2}\n", "key 'train' appears twice near line 1"),
        ("train:\n  seed: 1\n  seed: 2\n", "key 'seed' appears twice near line 2"),
        ("data: &x {path: a}\npolicy: *x\n", "aliases (*x) are not allowed here; write the value out"),
        ("train: {seed: 1}\n---\ntrain: {seed: 2}\n", "expected a single document"),
        ("[" * 2000, "is not valid YAML"),
        ("train: [1\n", "is not valid YAML"),
        ("data: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("- 1\n", "expected keys and values, found list"),
        ("#" * (MAX_YAML_BYTES + 1), f"is larger than {MAX_YAML_BYTES} bytes"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_configuration_is_refused_in_one_line(tmp_path, text, message):
    found = refusal(text, tmp_path)
    assert message in found
    assert "config.yaml" in found
    assert "\n" not in found


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"No such configuration file: .*nope\.yaml"):
        load_config([tmp_path / "nope.yaml"], [], None)
    (tmp_path / "latin.yaml").write_bytes(b"data: {path: \xe9}\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_config([tmp_path / "latin.yaml"], [], None)


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lerning_rate: 1}\n", "'train.lerning_rate'. Did you mean train.learning_rate?"),
        ("learning_rate: 1\n", "'learning_rate'. Did you mean train.learning_rate?"),
        ("trian: {seed: 1}\n", "'trian'. Did you mean train?"),
        (
            "model: x\n",
            "'model'. Did you mean policy.model or reference.model or eval.model or sample.model?",
        ),
        (
            "seed: 1\n",
            "'seed'. Did you mean data.seed or train.seed or sample.seed or online.seed or sweep.seed?",
        ),
        ("data: {flavour: red}\n", "'data.flavour'. Known keys: path, format,"),
        ("loss: {name: kt0}\n", "unknown loss 'kt0'"),
        ("loss: {name: kto, normalize: sum}\n", "loss.normalize is not a field of kto"),
        ("loss: kto\n", "loss: expected a block with a name"),
        ("train:\n", "train: expected a block of keys (name, learning_rate,"),
        ("train: {seed: 1.5}\n", "train.seed: Input should be a valid integer, found 1.5"),
        ("train: {seed: 010}\n", "train.seed: Input should be a valid integer"),
        ("train: {batch_size: 0}\n", "train.batch_size: Input should be greater than 0, found 0"),
        ("train: {learning_rate: .nan}\n", "train.learning_rate: Input should be a valid number"),
        ("train: {learning_rate: nan}\n", "train.learning_rate: Input should be a finite number"),
        ("prepare: {append_eos: 2}\n", "prepare.append_eos: Input should be a valid boolean"),
        ("prepare: {truncation_mode: left}\n", "'keep_end' or 'keep_start', found left"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, text, message):
    found = refusal(text, tmp_path)
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize("key", ["hf_token", "token", "wandb_api_key", "api_key", "password", "MY_SECRET"])
def test_secrets_are_sent_where_they_belong(tmp_path, key):
    for text in (f"{key}: x\n", f"track: {{{key}: x}}\n"):
        found = refusal(text, tmp_path)
        assert "secrets do not belong in a configuration" in found
        assert "HF_TOKEN" in found


SECRET_URLS = (
    "https://user:pass@example.org/x",
    "https://hf_abcdef@huggingface.co/datasets/x",
    "hf://user:pass@datasets/x",
    "https://example.org/x.jsonl?token=abc",
    "https://example.org/x.jsonl?page=1&access_token=abc",
    "https://example.org/x.jsonl?api_key=abc&page=1",
    "https://bucket.s3.amazonaws.com/x.jsonl?X-Amz-Credential=a&X-Amz-Signature=abc",
    "https://account.blob.core.windows.net/x.jsonl?sv=2024&sig=abc",
)


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_url_with_a_secret_is_refused_wherever_it_is(tmp_path, url):
    for text in (
        f"data: {{path: '{url}'}}",
        f"data: {{sources: [{{path: x.jsonl}}, {{path: '{url}'}}]}}",
        f"filter: {{decontaminate: ['{url}']}}",
        f"eval: {{sets: {{mine: '{url}'}}}}",
    ):
        found = refusal(text, tmp_path)
        assert "the URL contains a password or a token" in found
        assert "HF_TOKEN" in found
        assert url not in found


@pytest.mark.parametrize(
    "path",
    [
        "https://example.org/x.jsonl?page=2&tokens=",
        "https://example.org/@user/x.jsonl",
        "ssh://git@example.org/x",
        "s3://bucket/key=3/x.jsonl",
        "rows@2.jsonl",
    ],
)
def test_a_url_without_a_secret_is_none(path):
    assert build_config({"data": {"path": path}}).data.path == path


@pytest.mark.parametrize("key", ["run_name", "project"])
@pytest.mark.parametrize("name", ["../outside", "a/b", "a\\b", "..", "."])
def test_the_name_of_a_run_is_no_path(key, name):
    """TensorBoard and trackio name files by it, which would lie outside of the store."""
    with pytest.raises(UsageError, match=rf"track\.{key}: .*expected a name without /"):
        build_config({"track": {key: name}})


@pytest.mark.parametrize("assignment", ["train", "train.seed", "=3", "train.=2", ".seed=2", "train.seed=["])
def test_an_assignment_says_how_it_is_written(tmp_path, assignment):
    assert f"--set {assignment!r}" in refusal("", tmp_path, assignment)


def test_a_nested_assignment_is_no_traceback(tmp_path):
    assert "not valid YAML" in refusal("", tmp_path, "data.path=" + "[" * 2000)


# Saving


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_saved_configuration_is_the_same_run(tmp_path, path):
    config = load_config([path], [], None)
    loaded = load(config.to_yaml(), tmp_path)
    assert resolve_run(loaded.loss, loaded.train, 1000, loaded.adapter) == resolve_run(
        config.loss, config.train, 1000, config.adapter
    )
    filled = {
        "learning_rate": loaded.train.learning_rate or 0,
        "batch_size": loaded.train.batch_size or 0,
    }
    assert all(filled.values())
    assert loaded == config.model_copy(update={"train": config.train.model_copy(update=filled)})


@pytest.mark.parametrize(
    "text", ["1e-6", "no", "1", "true", "null", "2020-01-01", "1234e56", "~", " x", "é: #"]
)
def test_text_that_looks_like_something_else_survives_saving(tmp_path, text):
    config = build_config({"track": {"run_name": text}})
    assert load(config.to_yaml(), tmp_path).track == config.track
    assert yaml.safe_load(config.to_yaml())["track"]["run_name"] == text


keys = st.sampled_from(sorted(RunConfig.model_fields)) | st.text(max_size=8)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
trees = st.dictionaries(keys, leaves | st.dictionaries(st.text(max_size=8), leaves, max_size=3), max_size=3)


@pytest.mark.slow
@given(st.text(max_size=60) | st.binary(max_size=60) | trees.map(yaml.safe_dump))
def test_any_file_is_a_configuration_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_config([path], [], None), RunConfig)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017


KEYS = [
    "data.path=",
    "data.sources=",
    "policy.model=",
    "loss.beta=",
    "loss.name=",
    "train.seed=",
    "loss=",
    "",
]


@pytest.mark.slow
@given(st.text(max_size=40) | leaves.map(repr), st.sampled_from(KEYS), st.sampled_from([None, "dpo"]))
@example("[]", "data.path=", None)
@example("{a: 1}", "policy.model=", None)
@example("[1]", "loss=", "dpo")
@example("", "loss=", "dpo")
def test_any_assignment_is_read_or_one_line(text, key, loss):
    with suppress(UsageError):
        assert isinstance(load_config([], [f"{key}{text}"], loss), RunConfig)
