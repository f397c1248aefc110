"""Serve files by HTTP on loopback, fail on request, and count the requests."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class FlakyServer(ThreadingHTTPServer):
    """Serve the files of `root`, and index.json for a folder.

    A file's GETs fail as `failures[name]` says in turn, then as `forever[name]` says.

    A failure is a status ("503"), or one of
    "cut": half the body, then the connection is closed; "cut unseen": the same without Content-Length;
    "short": half the body, and a Content-Length that fits; "long": the body and 100 bytes more;
    "corrupt": one bit flipped; "silent": half the body, then nothing for `pause_s`;
    "trickle": 10 bytes, again and again; "slow": all, in 16 pieces over `pause_s`.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.failures: dict[str, deque[str]] = defaultdict(deque)
        self.forever: dict[str, str] = {}
        self.gets: Counter[str] = Counter()
        self.targets: list[str] = []  # as they came: with query
        self.pause_s = 2.0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """Ignore errors of clients that go away: the tests cause them."""


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, name = self.server, self.path.partition("?")[0].lstrip("/")
        server.gets[name] += 1
        server.targets.append(self.path)
        failure = server.failures[name].popleft() if server.failures[name] else server.forever.get(name, "")
        path = server.root / name
        path = path / "index.json" if path.is_dir() else path
        if failure.isdigit() or not path.is_file():
            self.send_response(int(failure or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        half = len(content) // 2
        body = {
            "cut": content[:half],
            "cut unseen": content[:half],
            "short": content[:half],
            "long": content + bytes(100),
            "corrupt": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
            "silent": content[:half],
        }.get(failure, content)
        self.send_response(200)
        if failure != "cut unseen":
            self.send_header("Content-Length", str(len(body if failure in ("short", "long") else content)))
        self.end_headers()
        with suppress(ConnectionError):
            if failure == "slow":
                for piece in range(16):
                    self.wfile.write(content[len(content) * piece // 16 : len(content) * (piece + 1) // 16])
                    time.sleep(server.pause_s / 16)
            elif failure == "trickle":
                for begin in range(0, len(content), 10):
                    self.wfile.write(content[begin : begin + 10])
                    time.sleep(0.01)
            else:
                self.wfile.write(body)
        if failure == "silent":
            self.wfile.flush()
            time.sleep(server.pause_s)
        self.close_connection = self.close_connection or failure in ("cut", "cut unseen", "silent")


@contextmanager
def serve(root: Path) -> Iterator[FlakyServer]:
    with FlakyServer(root) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
