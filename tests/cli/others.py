"""A server that is not ours, and says what a test wants."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

MODELS = b'{"data": [{"id": "m"}]}'


class Other(BaseHTTPRequestHandler):
    """Answers /v1/models, and every POST with the next of `bodies`, which come in turn; 500 where that is None."""

    bodies: ClassVar[tuple[bytes | None, ...]] = ()
    models: ClassVar[bytes] = MODELS
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:  # named by the library
        self.send(self.models)

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        body = self.bodies[(len(self.asked) - 1) % len(self.bodies)]
        if body is None:
            self.send(b'{"error": {"message": "out of order"}}', 500)
        else:
            self.send(body)

    def send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def other(*bodies: bytes | None, models: bytes = MODELS) -> Iterator[tuple[str, type[Other]]]:
    kind = type("Now", (Other,), {"bodies": bodies, "models": models, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
