"""Which keys and logins are there. Their values are not kept, shown or sent anywhere."""

import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.doctor.finding import Finding

WANDB_HOST = "api.wandb.ai"


def logins() -> Iterator[Finding]:
    """The hub, Weights & Biases, and endpoints of judges; what is missing is a note."""
    yield _login("hugging face", _hub(), "only public models and data sets", "hf auth login")
    yield _login("wandb", _wandb(), "track.wandb=online does not work", "wandb login")
    yield _login(
        "openai",
        _variable("OPENAI_API_KEY"),
        "judges at api.openai.com do not work",
        "export OPENAI_API_KEY=...",
    )


def _login(name: str, where: str | None, without: str, advice: str) -> Finding:
    if where is None:
        return Finding("logins", name, "note", f"none: {without}", advice)
    return Finding("logins", name, "ok", f"present ({where})")


def _variable(*names: str) -> str | None:
    return next((name for name in names if os.environ.get(name)), None)


def _hub() -> str | None:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    logged_in = path.is_file() and path.stat().st_size > 0
    return _variable("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") or ("hf auth login" if logged_in else None)


def _wandb() -> str | None:
    if name := _variable("WANDB_API_KEY"):
        return name
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    with suppress(OSError, netrc.NetrcParseError):
        if WANDB_HOST in netrc.netrc(path).hosts:
            return "wandb login"
    return None
