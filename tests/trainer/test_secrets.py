"""Passwords and signatures in names of data stay in the files that need them: logs, heartbeats,
locks, trackers and messages may be read by others.
"""

import base64
import importlib.util
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from memshard.data_pipeline import fetch
from memshard.lock import holding
from memshard.redact import shown, without_secrets
from memshard.trainer.watch.rank_log import rank_log
from tests.trainer.test_bad_input import refused
from tests.trainer.tiny_run import train_run

SECRET = "https://user:hunter2@example.com/data?X-Amz-Signature=cafe"


@pytest.mark.parametrize(
    ("text", "public"),
    [
        (SECRET, "https://example.com/data?..."),
        (f"'{SECRET}': x@y.z?", "'https://example.com/data?...': x@y.z?"),
        ("s3://bucket/a b?c", "s3://bucket/a b?c"),
        ("http://a@b@host:80/x, no", "http://host:80/x, no"),
        ("/home/me/data?x", "/home/me/data?x"),
    ],
)
def test_addresses_lose_users_and_queries(text: str, public: str) -> None:
    assert without_secrets(text) == public


def test_nothing_of_a_command_is_shown() -> None:
    assert shown("pipe:curl -u user:hunter2 https://example.com/{file}") == "pipe:..."


def test_a_log_and_a_lock_hold_no_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memshard", "train", f"data.path={SECRET}", "pipe:hunter2"])
    with holding(tmp_path, "wait"):
        lock = (tmp_path / "lock").read_text()
    assert "hunter2" not in lock and "cafe" not in lock and "example.com/data" in lock
    with pytest.raises(ValueError), rank_log(tmp_path, 0, lambda: 1):
        raise ValueError(f"no {SECRET}")
    log = (tmp_path / "log/rank0.log").read_text()
    assert "hunter2" not in log and "cafe" not in log and "no https://example.com/data?..." in log


def test_a_tracker_gets_no_passwords(
    recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("not installed: wandb")
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MEMSHARD_CACHE", str(tmp_path / "cache"))
    name = f"pipe:cat {data}/{{file}}  # hunter2"
    train_run(recipe, tmp_path / "run", "train.steps=1", "train.wandb=tiny", f"data.path={name}")
    wandb.teardown()  # its process writes
    files = [path for path in (tmp_path / "run/wandb").rglob("*") if path.is_file()]
    told = b"".join(path.read_bytes() for path in files)
    assert b"pipe:..." in told and b"hunter2" not in told


@pytest.fixture
def server() -> Iterator[tuple[str, list[str | None]]]:
    """A server without files, and the logins that it was given."""
    logins: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            logins.append(self.headers["Authorization"])
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{listening.server_port}", logins
        listening.shutdown()


def test_a_login_reaches_the_server_and_no_message(
    server: tuple[str, list[str | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """urllib took the password for a port, and said it."""
    host, logins = server
    monkeypatch.setenv("MEMSHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.0)
    message = refused(capfd, "data", "verify", f"http://user:hunt%20er@{host}/data?key=cafe")
    assert (
        f"http://{host}/data?... could not be read, tried" in message
        and "HTTP Error 404" in message
    )
    assert {*logins} == {f"Basic {base64.b64encode(b'user:hunt er').decode()}"}
    message = refused(capfd, "data", "verify", "pipe:false  # hunter2")
    assert "pipe:... could not be read" in message and "ended with code 1" in message
