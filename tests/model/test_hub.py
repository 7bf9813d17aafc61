"""Checkpoints by name: a server on this machine speaks the hub's protocol."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download

from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, Processor
from pg_kernels.model.checkpoints.hub import local_path
from pg_kernels.model.checkpoints.layout import COMPANIONS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-paligemma"
SAMPLE = EMBEDDED_CHECKPOINT / "samples" / "banana_and_owl.png"


class Hub(ThreadingHTTPServer):
    """A hub with the files of the built-in model as `NAME`, one gated repository, and a count of requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in EMBEDDED_CHECKPOINT.iterdir() if path.is_file()}
        self.files |= {"pytorch_model.bin": b"never", "flax_model.msgpack": b"never", "README.md": b"never"}
        self.requests: list[tuple[str, str, str | None]] = []
        self.stall = False
        """Whether weights stop after a third of their bytes."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloaded(self) -> set[str]:
        """Return the names of the files that were sent."""
        return {path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        match = re.match(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)/?(.*))?$", path)
        name, what, revision, file = match.groups() if match else ("", "", "", "")
        if name == "someone/gated":
            self.fail(403, "GatedRepo", "Access to model someone/gated is restricted")
        elif name == "someone/broken":
            self.fail(500, "", "the hub has a bad day")
        elif name != NAME:
            self.fail(401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT):
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "revision":
            files = [{"rfilename": name} for name in self.server.files]
            self.send(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": files, "tags": []}).encode())
        elif what == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.send(200, json.dumps(entries).encode())
        else:
            self.send_file(file)

    def fail(self, code: int, kind: str, message: str) -> None:
        self.send(code, json.dumps({"error": message}).encode(), {"X-Error-Code": kind, "X-Error-Message": message})

    def send_file(self, file: str) -> None:
        data = self.server.files[file]
        first = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        part = data[first:]
        if self.server.stall and self.command == "GET" and file.endswith(".safetensors"):
            self.send(206 if first else 200, part, headers, sent=len(part) // 3)
            time.sleep(60)
        else:
            self.send(206 if first else 200, part, headers)

    def send(self, code: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
            self.wfile.flush()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    url = server.url + template[template.index("/{repo_id}") :]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()


def test_a_name_loads_the_files_that_are_needed_once(hub: Hub, tmp_path: Path) -> None:
    processor = Processor.from_pretrained(NAME)
    assert {"config.json", "tokenizer.model"} <= hub.downloaded() and "model.safetensors" not in hub.downloaded()
    model = PaliGemma.from_pretrained(NAME, revision=COMMIT)
    assert hub.downloaded() == {
        path.name
        for path in EMBEDDED_CHECKPOINT.iterdir()
        if path.suffix in (".json", ".model", ".safetensors", ".npz") and not path.name.startswith("scores")
    }
    expected = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert processor(SAMPLE, "caption en")["input_ids"].shape[0] == 1
    assert (local_path(NAME, weights=True) / "model.safetensors").is_symlink()
    hub.shutdown()
    hub.server_close()
    PaliGemma.from_pretrained(NAME)  # without a network
    sent = len(hub.requests)
    PaliGemma.from_pretrained(NAME, local_files_only=True)
    assert len(hub.requests) == sent


def test_a_path_comes_before_a_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    PaliGemma.from_pretrained(NAME)
    Processor.from_pretrained(Path(NAME))
    assert hub.requests == []
    with pytest.raises(ValueError, match=f"^revision: {NAME} is a path"):
        PaliGemma.from_pretrained(NAME, revision="main")


@pytest.mark.parametrize(
    "path", ["nowhere", "a/b/c", "/a/b", "./a/b", "../b", "a/b.npz", "a/b.safetensors", "~/b", "a/"]
)
def test_other_paths_are_not_asked_for(hub: Hub, path: str) -> None:
    with pytest.raises(FileNotFoundError):
        PaliGemma.from_pretrained(path)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "someone/gated",
            {},
            PermissionError,
            "the repository is gated; accept its licence at http.*/someone/gated and log in",
        ),
        ("someone/missing", {}, FileNotFoundError, "neither a path on this machine nor a repository on the hub"),
        (NAME, {"revision": "v9"}, FileNotFoundError, "the repository has no revision 'v9'"),
        (
            NAME,
            {"local_files_only": True},
            FileNotFoundError,
            ".* not complete in the cache .*, and the hub was not asked",
        ),
        ("someone/broken", {}, OSError, ".*, and the hub answers 500; check"),
    ],
)
def test_errors_say_what_to_do(hub: Hub, name: str, options: dict, error: type[OSError], message: str) -> None:
    for load in (PaliGemma.from_pretrained, Processor.from_pretrained):
        with pytest.raises(error, match=f"^{name}: {message}") as caught:
            load(name, **options)
        assert "\n" not in str(caught.value)


def test_no_network(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(FileNotFoundError, match=f"^{NAME}: no path on this machine, .*, and the hub cannot be reached"):
        PaliGemma.from_pretrained(NAME)


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match=f"^{NAME}: the disk of the cache .* is full; HF_HUB_CACHE moves the cache"):
        PaliGemma.from_pretrained(NAME)


def test_a_killed_download_goes_on_with_the_next_file(hub: Hub, tmp_path: Path) -> None:
    """By `pg-kernels run`, which then also answers offline."""
    words = [sys.executable, "-m", "pg_kernels", "run", SAMPLE, "caption en", "--checkpoint", NAME]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    hub.stall = True
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    small = {path.name for path in EMBEDDED_CHECKPOINT.iterdir() if path.name in ("config.json", *COMPANIONS)}
    wait_for(lambda: small | {"model.safetensors"} <= hub.downloaded())
    wait_for(lambda: small <= {path.name for path in tmp_path.rglob("snapshots/*/*")})
    process.kill()
    process.wait()
    hub.stall = False
    hub.requests.clear()
    for offline in ("0", "1"):
        done = subprocess.run(words, env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "a banana and an owl\n"), done.stderr
    assert hub.downloaded() == {"model.safetensors"}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
