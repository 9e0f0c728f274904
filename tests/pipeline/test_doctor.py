"""`align doctor`: metadata, drivers, disks and logins made for the test, and what it says of them."""

import json
from pathlib import Path

import pytest

from pipeline.doctor import accelerator, disk, packages
from pipeline.doctor.finding import Finding

SECRET = "hf_not-to-be-shown"


@pytest.fixture
def distributions(tmp_path, monkeypatch):
    """Makes installed distributions: a name, a version and what it requires."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, version: str, *needs: str) -> Path:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {need}" for need in needs]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        return tmp_path

    return make


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts an nvidia-smi that prints these lines on the path."""

    def make(*lines: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr("platform.system", lambda: "Linux")

    return make


def named(findings, name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


def test_a_package_that_is_too_old_is_a_problem(distributions):
    distributions("align", "0.1.0", "transformers>=5.16.1,<5.20", "tokenizers>=0.22", "not-there>=1")
    distributions("transformers", "4.57.0")
    distributions("tokenizers", "0.23.1")
    found = list(packages.packages())
    [transformers], [tokenizers] = named(found, "transformers"), named(found, "tokenizers")
    assert (transformers.state, transformers.found) == ("problem", "4.57.0, needed is <5.20,>=5.16.1")
    assert transformers.advice == "pip install 'transformers<5.20,>=5.16.1'"
    assert (tokenizers.state, tokenizers.found) == ("ok", "0.23.1")
    [missing] = named(found, "not-there")
    assert (missing.state, missing.found) == ("problem", "not installed")


def test_a_pin_of_vllm_against_the_installed_transformers_is_a_note(distributions):
    distributions("vllm", "0.40.0", "transformers<5.18,>=5.16", "torch>=1", "nowhere==1; extra == 'x'")
    distributions("transformers", "5.19.0")
    clashes = [one.found for one in named(packages.packages(), "clash") if one.found.startswith("vllm 0.40")]
    assert clashes == ["vllm 0.40.0 needs transformers<5.18,>=5.16, installed is 5.19.0"]


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = None", None),
        ("cuda: Optional[str] = '12.8'", "12.8"),
        ("cuda = '13.0'", "13.0"),
    ],
)
def test_the_cuda_of_torch_is_read_without_importing_it(distributions, line, cuda):
    root = distributions("torch", "2.13.0")
    (root / "torch-2.13.0.dist-info" / "RECORD").write_text("torch/version.py,,\n")
    (root / "torch").mkdir()
    (root / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip = None\n")
    assert accelerator.cuda_of_torch() == cuda


@pytest.mark.slow
def test_each_gpu_has_a_line_and_a_torch_without_cuda_is_told(distributions, driver):
    root = distributions("torch", "2.13.0+cpu")
    (root / "torch").mkdir()
    (root / "torch" / "version.py").write_text("cuda = None\n")
    driver("NVIDIA H100, 81559, 80995, 9.0", "Tesla T4, 15360, 15000, 7.5")
    first, second, torch = accelerator.gpus()
    assert (first.state, first.found) == ("ok", "NVIDIA H100, 80 GiB, 79 GiB free, bfloat16")
    assert second.state == "note"
    assert "no bfloat16" in second.found
    assert (torch.state, torch.found) == ("note", "a build without CUDA: it does not use the GPU")


def test_a_machine_without_a_driver_has_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [one.found for one in accelerator.gpus()] == ["none: models run on the CPU"]


def test_the_store_is_tried_and_left_as_it_was(tmp_path):
    found = {one.name: one for one in disk.disk(str(tmp_path / "new" / "store"))}
    assert found["write"].state == "ok"
    assert found["disk"].found.startswith(f"{tmp_path / 'new' / 'store'}, ")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_problem():
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc on this system")
    found = {one.name: one for one in disk.disk("/proc/self/store")}
    assert found["write"].state == "problem"


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\nb {tmp_path}-other xfs rw 0 0\n")
    assert disk.file_system(tmp_path / "store", str(mounts)) == "nfs4"
    assert disk.file_system(Path("/"), str(mounts)) == "ext4"
    assert disk.file_system(tmp_path, str(tmp_path / "none")) == "an unknown file system"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME", "HF_TOKEN_PATH", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no driver, so that no process is started
    return tmp_path


def logins(align) -> dict[str, tuple[str, str]]:
    _, out, err = align("doctor", "--json")
    assert SECRET not in out + err
    findings = json.loads(out)["findings"]
    return {one["name"]: (one["state"], one["found"]) for one in findings if one["topic"] == "logins"}


@pytest.mark.slow
def test_logins_that_are_missing_are_notes(align, home):
    assert {state for state, _ in logins(align).values()} == {"note"}


def test_logins_are_found_and_never_shown(align, home, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    token = home / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text(SECRET)
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (home / ".netrc").chmod(0o600)
    assert logins(align) == {
        "hugging face": ("ok", "present (hf auth login)"),
        "wandb": ("ok", "present (wandb login)"),
        "openai": ("ok", "present (OPENAI_API_KEY)"),
    }
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert [found for _, found in logins(align).values()] == [
        "present (HF_TOKEN)",
        "present (WANDB_API_KEY)",
        "present (OPENAI_API_KEY)",
    ]
    _, out, err = align("doctor")
    assert SECRET not in out + err


@pytest.mark.slow
def test_a_problem_ends_with_exit_code_6(align, home, distributions):
    distributions("pyarrow", "1.0")
    code, out, err = align("doctor")
    assert code == 6
    assert "1.0, needed is >=18  → pip install 'pyarrow>=18'" in out
    assert err == "align: align cannot run like this: pyarrow. Do what stands behind the arrows.\n"
