"""A small hub that speaks the real one's protocol to huggingface_hub."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


class Hub(ThreadingHTTPServer):
    """Serves folders as the hub serves repositories, remembers which files were fetched, and takes uploads.

    Uploads need the token "hf_write" and a repository of the owner "me". They land in the folder `uploads`.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folders: dict[str, dict[str, Path]] = {}  # repository -> revision -> folder
        self.gated: set[str] = set()
        self.fetched: set[str] = set()
        self.uploads = Path()
        self.created: dict[str, bool] = {}  # repository -> whether it is private
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def put(self, repo: str, folder: Path, revision: str = "main") -> str:
        """Returns the commit."""
        commit = hashlib.sha1(str(folder).encode()).hexdigest()
        self.folders.setdefault(repo, {}).update({revision: folder, commit: folder})
        return commit

    def be_asked(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Have huggingface_hub ask this hub, with this folder as its cache."""
        url = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def switch_off(self) -> None:
        self.shutdown()
        self.server_close()


class HubRequest(BaseHTTPRequestHandler):
    """[api/models/|api/datasets/|datasets/]OWNER/NAME/revision|tree|resolve/REVISION[/FILE].

    The slashes of a revision are escaped.
    """

    server: Hub

    def do_GET(self) -> None:
        path = re.sub(r"^/(api/models|api/datasets|datasets)/", "", urlsplit(self.path).path).strip("/")
        if path == "api/whoami-v2":
            if self._token() not in ("hf_write", "hf_read"):
                return self._send(401, {})
            return self._send_json({"name": "me", "auth": {"accessToken": {"role": self._token()[3:]}}})
        if path.count("/") < 3:  # no question about a repository
            return self._send(404, {})
        owner, name, verb, revision, *file = map(unquote, path.split("/"))
        repo = f"{owner}/{name}"
        revisions = self.server.folders.get(repo)
        if revisions is None:
            return self._send(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in revisions:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        folder = revisions[revision]
        commit = self.server.put(repo, folder, revision)
        if verb == "revision":
            return self._send_json({"id": repo, "sha": commit})
        if verb == "tree":
            paths = [path for path in folder.rglob("*") if path.is_file()]
            entry = {"type": "file", "size": 1}
            return self._send_json([entry | {"path": str(p.relative_to(folder)), "oid": digest(p)} for p in paths])
        if repo in self.server.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        path = folder.joinpath(*file)
        if not path.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if self.command == "GET":
            self.server.fetched.add("/".join(file))
        self._send(200, {"ETag": f'"{digest(path)}"', "X-Repo-Commit": commit}, path.read_bytes())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path = urlsplit(self.path).path.removeprefix("/api/")
        if path == "repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if self._token() != "hf_write" or asked["organization"] != "me":
                return self._send(403, {"X-Error-Message": "You don't have the rights to create a model"})
            self.server.created[repo] = asked["visibility"] == "private"
            folder = self.server.uploads / repo
            folder.mkdir(parents=True)
            self.server.put(repo, folder)
            return self._send_json({"url": f"{self.server.url}/{repo}"})
        if path == "validate-yaml":  # of the card
            return self._send_json({"errors": [], "warnings": []})
        repo, verb = re.fullmatch(r"models/(.+)/(preupload|commit)/main", path).groups()
        folder = self.server.uploads / repo
        if verb == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = {"uploadMode": "regular", "shouldIgnore": False}
            return self._send_json({"files": [answer | {"path": path} for path in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                target = folder / line["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
        self._send_json({"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1" * 40})

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def log_message(self, *_: object) -> None:
        pass

    def _send_json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def digest(path: Path) -> str:
    """Differs even for equal files, which the hub's library would fetch but once."""
    return hashlib.sha1(str(path).encode() + path.read_bytes()).hexdigest()
