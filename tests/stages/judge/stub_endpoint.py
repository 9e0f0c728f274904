"""An OpenAI-compatible server of the test, in threads of this process, which fails in the ways that real ones do."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Stub", dict[str, Any]], "Response"]


class Response:
    """What the server sends: a status, a body, headers; with `cut` it closes the connection in the middle of the body."""

    def __init__(self, status=200, body=b"", headers=None, content_type="application/json", cut=False):
        self.status, self.headers, self.content_type, self.cut = status, headers or {}, content_type, cut
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def says(text, finish_reason="stop", prompt_tokens=10, completion_tokens=5):
    """A chat completion."""
    return Response(
        body={
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "stub",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": finish_reason,
                    "message": {"role": "assistant", "content": text},
                }
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    )


def fails(status, **headers):
    """An error with headers such as Retry_After_Ms."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, {"error": {"message": f"status {status} of the stub", "type": "x"}}, named)


class Stub:
    """The server's address, and the requests that it received; `reply` decides what it sends."""

    def __init__(self, reply: Reply):
        self.reply, self.requests, self.keys, self.lock = reply, [], [], threading.Lock()
        self.url = ""

    @property
    def questions(self):
        """The user message of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def seen_before(self, request):
        """How often the same question came before."""
        return self.questions.count(request["messages"][-1]["content"]) - 1


@contextmanager
def stub_endpoint(reply: Reply) -> Iterator[Stub]:
    """Serve until the block ends."""
    stub = Stub(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open
        wbufsize = -1  # headers and body in one packet

        def do_GET(self):
            self._send(Response(body={"object": "list", "data": [{"id": "stub", "object": "model"}]}))

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.requests.append(request)
                stub.keys.append(self.headers["Authorization"])
                response = stub.reply(stub, request)
            self._send(response)

        def _send(self, response):
            self.send_response(response.status)
            self.send_header("Content-Type", response.content_type)
            self.send_header("Content-Length", str(len(response.body)))
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(response.body[: len(response.body) // 2] if response.cut else response.body)
            if response.cut:
                self.close_connection = True

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
