"""Downloads, from a hub of the test's own: only what is needed, said in the log, resumed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c" * 40
SCRIPT = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
from librobot_vlm_ros.models import model_info
from librobot_vlm_ros.models.checkpoints import progress
from librobot_vlm_ros.models.checkpoints.hub import find_weights
progress._PERIOD_S = 0.0
for source in sys.argv[1:]:
    print("--", source, file=sys.stderr)
    found = find_weights(model_info("florence-2-base"), source)
names = sorted(path.name for path in found.folder.rglob("*") if path.is_file())
print(json.dumps([found.revision, names]))
"""


class Hub:
    """Serves one repository as the hub does, and remembers what it was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, str, str]] = []
        self.cut_after = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._serve(body=False)

            def do_GET(self) -> None:
                self._serve(body=True)

            def _serve(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                wanted = self.headers.get("Range", "")
                hub.asked.append((self.command, path, wanted))
                file = re.fullmatch(r"/owner/name/resolve/[^/]+/(.+)", path)
                if file and file[1] in hub.files:
                    self._send(hub.files[file[1]], wanted, body)
                elif "/tree/" in path:
                    self._json(hub.tree())
                elif path.startswith("/api/models/owner/name"):
                    names = [{"rfilename": name} for name in hub.files]
                    self._json({"id": "owner/name", "sha": COMMIT, "siblings": names})
                else:
                    self.send_error(404)

            def _json(self, content: object) -> None:
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _send(self, data: bytes, wanted: str, body: bool) -> None:
                begin = int(re.findall(r"\d+", wanted)[0]) if wanted else 0
                part = data[begin:]
                self.send_response(206 if wanted else 200)
                self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(part)))
                if wanted:
                    last = f"bytes {begin}-{len(data) - 1}/{len(data)}"
                    self.send_header("Content-Range", last)
                self.end_headers()
                cut = hub.cut_after if body and len(part) > hub.cut_after else 0
                hub.cut_after = 0 if cut else hub.cut_after
                if body:
                    self.wfile.write(part[:cut] if cut else part)
                self.close_connection = bool(cut)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def tree(self) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": name,
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
            }
            for name, data in self.files.items()
        ]


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(
        {
            "config.json": b"{}",
            "tokenizer.json": b"{}",
            "model.safetensors": os.urandom(25_000_000),
            "pytorch_model.bin": b"a pickle",
            "modeling_florence2.py": b"raise SystemExit('code of a checkpoint ran')",
            "onnx/model.safetensors": b"the same in another format",
            "README.md": b"words",
        }
    )
    yield made
    made.server.shutdown()
    made.server.server_close()


def download(hub: Hub, home: Path, *sources: str) -> tuple[str, list[str], str]:
    """(revision, files that came, log), in a process that knows only this hub."""
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *sources],
        env={**os.environ, **mine},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        return "", [], done.stderr
    revision, names = json.loads(done.stdout.splitlines()[-1])
    return revision, names, done.stderr


def test_only_what_a_model_needs_is_fetched_and_progress_is_logged(
    hub: Hub, tmp_path: Path
) -> None:
    # The second time it is a commit that is here: that needs no network, and none is asked for.
    revision, names, log = download(hub, tmp_path, "owner/name@trial", f"owner/name@{COMMIT}")
    assert revision == COMMIT, log
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "hub" / "models--owner--name").is_dir()  # HF_HOME is honoured
    told = re.findall(r"downloading owner/name: (\d+) of (\d+) MB \((\d+)%\)", log)
    assert told[-1] == ("25", "25", "100"), log
    fetched = [path for command, path, _ in hub.asked if command == "GET"]
    assert sum("/revision/trial" in path for path in fetched) == 1
    assert sum(path.endswith("model.safetensors") for path in fetched) == 1
    assert not any(f"/revision/{COMMIT}" in path for path in fetched)
    assert not any(path.endswith((".py", ".bin")) for _, path, _ in hub.asked)


def test_a_download_that_breaks_off_goes_on_where_it_ended(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 15_000_000
    _, names, log = download(hub, tmp_path, "owner/name@trial")
    assert "model.safetensors" in names, log
    asked = [r for m, path, r in hub.asked if m == "GET" and path.endswith("model.safetensors")]
    assert len(asked) == 2
    assert int(re.findall(r"bytes=(\d+)-", asked[1])[0]) >= 10_000_000
    (blob,) = (tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT).glob("model.*")
    assert blob.read_bytes() == hub.files["model.safetensors"]
