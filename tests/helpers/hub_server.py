"""Serve one repository's files on loopback, in place of the hub that publishes weights, and count the requests."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serve `files`, by "REPOSITORY/NAME", at /REPOSITORY/resolve/main/NAME; `is_cutting` sends half of each."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.asked: Counter[str] = Counter()  # "GET nvidia/GCViT/NAME" and the like
        self.is_cutting = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        body = self._answer()
        self.wfile.write(body[: len(body) // 2] if self.server.is_cutting else body)
        self.close_connection = self.server.is_cutting

    def _answer(self) -> bytes:
        """Send the head, as the hub's client wants it, and return the body."""
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        name = f"{repository}/{rest.partition('/')[2]}"
        self.server.asked[f"{self.command} {name}"] += 1
        content = self.server.files.get(name)
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        return content or b""


@contextmanager
def serve_hub(files: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer(files) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
