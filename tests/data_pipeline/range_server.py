"""An http server with range requests that fails as told."""

import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class Server:
    """A server of `folder` on this machine.

    refuse, break_off: how many times a path answers 503 or breaks off half-way before it works.
    drip: what is sent a byte at a time. ranges_left: how many requests for ranges are answered
    before all others get 503; None for all. length: said in place of a body's own.
    """

    folder: Path
    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    refuse: Counter[str] = field(default_factory=Counter)
    break_off: Counter[str] = field(default_factory=Counter)
    drip: Literal["", "body", "headers"] = ""
    ranges_left: int | None = None
    length: str = ""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder until the block ends."""
    state = Server(folder)
    lock = threading.Lock()
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/").partition("?")[0]
            wanted = self.headers.get("Range")
            file = state.folder / name
            with lock:
                state.requests[name] += 1
                refused = state.refuse[name] > 0 or (wanted is not None and state.ranges_left == 0)
                state.refuse[name] -= state.refuse[name] > 0
                if wanted and state.ranges_left:
                    state.ranges_left -= 1
            if refused or not file.exists():
                self.send_error(503 if file.exists() else 404)
                return
            content = file.read_bytes()
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                content = content[int(first) : int(last) + 1 if last else None]
            if state.drip == "headers":
                self.drip(b"HTTP/1.0 200 OK\r\nX-A: " + b"x" * 10_000)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", state.length or str(len(content)))
            self.end_headers()
            if state.drip == "body":
                self.drip(content)
                return
            if state.break_off[name]:
                state.break_off[name] -= 1
                content = content[: len(content) // 2]
            self.wfile.write(content)
            state.sent[name] += len(content)

        def drip(self, content: bytes) -> None:
            for byte in content:
                if ended.is_set() or not state.drip:
                    return
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:
                    return
                time.sleep(0.02)

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{running.server_address[1]}"
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        ended.set()
        running.shutdown()
        thread.join()
        running.server_close()
