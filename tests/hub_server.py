"""A small server on the loopback interface that speaks as much of the Hub's HTTP interface as the real client needs."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_NotARealTokenButNobodyMaySeeIt"


class HubServer(ThreadingHTTPServer):
    """Keeps repositories in memory.

    Args:
        failures: (method, pattern of the path) -> status to answer with, "gone" to hang up without an answer.
    """

    daemon_threads = True

    def __init__(self, failures: dict[tuple[str, str], int | str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failures = failures or {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        path = self.path.partition("?")[0]
        for (method, pattern), failure in self.server.failures.items():
            if method == self.command and re.search(pattern, path):
                if failure == "gone":
                    self.close_connection = True
                    return
                return self._json({"error": "as the test asks for"}, int(failure))
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, body, *match.groups())
        self._json({"error": f"no route for {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        headers = {"X_Error_Code": "RepoNotFound"} if status == 404 else {}
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json({"error": "log in first"}, 401)
        return False

    # ---- Routes ----

    def create(self, body: bytes) -> None:
        if self._allowed():
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization") or "me", asked["name"]) if part)
            self.server.files.setdefault(name, {})
            self._json({"url": f"{self.server.endpoint}/{name}", "id": name, "name": name})

    def who(self, body: bytes) -> None:
        if self._allowed():
            self._json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def valid_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        self._json({})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if repo not in self.server.files:
            return self._json({"error": "Repository not found"}, 404)
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files[repo].items()]
        self._json({"id": repo, "modelId": repo, "sha": self._commit(repo), "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        self._json([self._entry(name, data) for name, data in self.server.files[repo].items()])

    def paths(self, body: bytes, repo: str, revision: str) -> None:
        asked = json.loads(body)["paths"]
        self._json([self._entry(name, data) for name, data in self.server.files[repo].items() if name in asked])

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith((".safetensors", ".png")) else "regular" for name in names}
        self._json({"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.server.endpoint}/upload/{one['oid']}"}}
            objects.append({**one, **({} if one["oid"] in self.server.objects else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._send(b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._allowed():
            return
        files = dict(self.server.files[repo])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.server.files[repo] = files
        url = f"{self.server.endpoint}/{repo}/commit/{self._commit(repo)}"
        self._json({"success": True, "commitOid": self._commit(repo), "commitUrl": url, "hookOutput": ""})

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        files = self.server.files.get(repo)
        if files is None or name not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self._send(b"", 404, X_Error_Code=code, X_Repo_Commit=self._commit(repo))
        data, status, headers = files[name], 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and self.command == "GET":
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers = {"Content_Range": f"bytes {start}-{end}/{len(data)}"}
            data, status = data[start : end + 1], 206
        tag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        self._send(data, status, ETag=tag, X_Repo_Commit=self._commit(repo), Accept_Ranges="bytes", **headers)

    def _commit(self, repo: str) -> str:
        digest = hashlib.sha1(repo.encode())
        for name, data in sorted(self.server.files.get(repo, {}).items()):
            digest.update(name.encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
        entry["oid"] = hashlib.sha1(data).hexdigest()
        if name.endswith((".safetensors", ".png")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("GET",), "/api/whoami-v2", _Handler.who),
    (("POST",), "/api/validate-yaml", _Handler.valid_yaml),
    (("POST",), rf"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (("POST",), rf"/api/models/{_REPO}/paths-info/(.+)", _Handler.paths),
    (("GET",), rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    (("GET",), rf"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}", _Handler.info),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/upload/(\w+)", _Handler.put),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
