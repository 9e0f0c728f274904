"""`--offline` reaches no other machine; and without it nothing does that was not asked to."""

import os
import socket
from collections.abc import Iterator

import pytest
import yaml

from stages.runtime.offline import go_offline
from tests.forked import in_child
from tests.pipeline.small_run import run, settings


@pytest.fixture
def offline() -> Iterator[None]:
    before = dict(os.environ)
    go_offline()
    yield
    os.environ.clear()
    os.environ.update(before)


def listening() -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0))
    server.listen(5)  # the system answers, nobody has to accept
    return server


# Addresses for documentation (RFC 5737, RFC 3849) and a name that is none (RFC 2606).
ATTEMPTS = {
    "tcp": lambda: socket.create_connection(("203.0.113.1", 80), timeout=1),
    "tcp6": lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("203.0.113.1", 53)),
    "name": lambda: socket.getaddrinfo("example.invalid", 80),
    "old name": lambda: socket.gethostbyname("example.invalid"),
    "bytes": lambda: socket.getaddrinfo(b"example.invalid", 80),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_no_other_machine_is_reached(attempt, offline):
    with pytest.raises(OSError, match="--offline keeps this process from reaching"):
        ATTEMPTS[attempt]()


def test_this_machine_is(offline, tmp_path):
    with listening() as server:
        socket.create_connection(server.getsockname(), timeout=10).close()
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=10).close()
    here = socket.socket(socket.AF_UNIX)
    with pytest.raises(FileNotFoundError):
        here.connect(str(tmp_path / "nobody"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prepare", "--set", "policy.model=someone/a-model"], 6, "neither a local folder nor reachable"),
        (["import", "https://example.invalid/a.tar"], 3, "cannot be reached"),
        (["prepare", "--store", "s3://bucket/store"], 2, "is on another machine"),
        (["train", "--set", "track.wandb=online"], 2, "track.wandb=offline"),
    ],
)
def test_what_needs_another_machine_is_one_line(align, offline, preferences, arguments, code, words):
    more = ["--set", f"data.path={preferences}"] if arguments[0] == "prepare" else []
    ended, _, err = align(*arguments, *more, "--offline")
    assert (ended, err.count("\n")) == (code, 1)
    assert words in err


@pytest.mark.slow
def test_the_stages_of_local_data_and_models_ask_no_other_machine(tiny_model, shared_preferences, tmp_path):
    """Without `--offline`, in a process of its own, because a hook cannot be removed."""
    import sys

    seen = tmp_path / "seen"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tiny_model, shared_preferences)))

    def work() -> None:
        def hook(event: str, arguments: tuple) -> None:
            if event.startswith(
                ("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto")
            ):
                with seen.open("a") as file:
                    file.write(f"{event} {arguments}\n")

        sys.addaudithook(hook)
        run(
            settings(tiny_model, shared_preferences, train={"max_steps": 1}),
            tmp_path / "store",
            "prepare",
            "cache-ref",
            "train",
        )

    assert in_child(work, tmp_path / "errors") == 0, (tmp_path / "errors").read_text()
    assert not seen.exists(), seen.read_text()
