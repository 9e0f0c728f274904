"""Uploading a policy: what huggingface_hub's own client sends, to a server in this process that answers as the hub does."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cache.errors import MachineError, UsageError
from pipeline.hub import check_repository, push


class Hub:
    """A hub with no repository yet. `files` are those committed, `created` the bodies of the requests that make one."""

    def __init__(self, refuses: int | None = None):
        self.refuses, self.created, self.files, self.address = refuses, [], {}, ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        if self.refuses:
            return self.refuses, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.address}/owner/policy", "name": "owner/policy"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}  # fmt: skip
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "commitUrl": f"{self.address}/owner/policy/commit/{'1' * 40}",
                "commitOid": "1" * 40,
                "success": True,
            }
        if path.startswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        return 404, {"error": f"not here: {path}"}


@pytest.fixture
def serve(monkeypatch) -> Iterator:
    servers = []

    def start(hub: Hub) -> Hub:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                code, reply = hub.answer(self.path, body)
                text = json.dumps(reply).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        hub.address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
        return hub

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture
def policy(tmp_path):
    folder = tmp_path / "tiny-dpo-0123"
    (folder / "checkpoint-4").mkdir(parents=True)
    for name in (
        "README.md",
        "model.safetensors",
        "manifest.json",
        ".checked.json",
        "checkpoint-4/optimizer.pt",
    ):
        (folder / name).write_text("---\ntags: [align]\n---\n" if name == "README.md" else name)
    return folder


def test_a_policy_is_uploaded_without_its_checkpoints_into_a_private_repository(serve, policy):
    hub = serve(Hub())
    push(policy, "owner/policy")
    assert [(one["name"], one["organization"], one["visibility"]) for one in hub.created] == [
        ("policy", "owner", "private")
    ]
    assert sorted(hub.files) == ["README.md", "manifest.json", "model.safetensors"]
    assert hub.files["model.safetensors"] == b"model.safetensors"


def test_a_refusal_is_one_line_that_says_how_to_log_in(serve, policy):
    serve(Hub(refuses=401))
    with pytest.raises(MachineError, match="hf auth login") as caught:
        push(policy, "owner/policy")
    assert "\n" not in str(caught.value)
    assert "hf_0123456789" not in str(caught.value)


def test_a_name_that_no_repository_can_have_is_refused_before_the_training(align):
    with pytest.raises(UsageError, match=re.escape("--push-to-hub a/b/c")):
        check_repository("a/b/c")
    code, _, err = align("train", "--push-to-hub", "a/b/c")
    assert code == 2
    assert "--push-to-hub" in err
