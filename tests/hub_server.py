"""A Hub on this machine, as far as pushing and pulling a model needs one: `huggingface_hub` talks to it for real."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
# To be run before anything else in a process that has imported `huggingface_hub` already, perhaps to be offline.
CONNECT = """
import os
from huggingface_hub import constants

os.environ["HF_TOKEN"] = "{token}"
constants.ENDPOINT = "{url}"
constants.HUGGINGFACE_CO_URL_TEMPLATE = "{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
constants.HF_HUB_OFFLINE = False
constants.HF_HUB_DISABLE_XET = True
"""


class HubServer(ThreadingHTTPServer):
    """Holds the files of each repository, by its name; `url` is where it answers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}

    def connect(self, token: str = TOKEN) -> str:
        """Code that makes a process talk to this Hub."""
        return CONNECT.format(token=token, url=self.url)


@contextmanager
def serve():
    """A Hub that answers meanwhile."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def _commit(files: dict[str, bytes]) -> str:
    """What names this state of a repository."""
    content = "".join(f"{name}:{hashlib.sha1(files[name]).hexdigest()};" for name in sorted(files))
    return hashlib.sha1(content.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, repositories = unquote(urlsplit(self.path).path), self.server.repositories
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, status=401)
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content['organization']}/{content['name']}" if content.get("organization") else content["name"]
            name = name if "/" in name else f"me/{name}"
            repositories.setdefault(name, {})
            return self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not match or match[1] not in repositories:
            return self._missing()
        if match[2] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        files = repositories[match[1]]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = _commit(files)
        return self._answer({"commitUrl": f"{self.server.url}/{match[1]}/commit/{commit}", "commitOid": commit})

    def do_HEAD(self):  # noqa: N802
        self.do_GET()

    def do_GET(self):  # noqa: N802
        path, repositories = unquote(urlsplit(self.path).path), self.server.repositories
        if path == "/api/whoami-v2":
            return self._answer({"name": "me", "type": "user", "orgs": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            if match[1] not in repositories:
                return self._missing()
            files = repositories[match[1]]
            siblings = [{"rfilename": name} for name in files]
            return self._answer({"id": match[1], "sha": _commit(files), "siblings": siblings, "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            prefix = f"{match[2]}/" if match[2] else ""
            names = [name for name in repositories.get(match[1], {}) if name.startswith(prefix)]
            if not names:
                return self._missing("EntryNotFound")
            files = repositories[match[1]]
            return self._answer([{"type": "file", "path": n, "size": len(files[n]), "oid": "0" * 40} for n in names])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            files = repositories.get(match[1])
            if files is None or match[2] not in files:
                return self._missing("EntryNotFound" if files is not None else "RepoNotFound")
            content = files[match[2]]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": _commit(files)}
            return self._send(content, headers | {"Content-Type": "application/octet-stream"})
        return self._missing()

    def _missing(self, code: str = "RepoNotFound"):
        self._answer({"error": "not found"}, 404, {"X-Error-Code": code})

    def _answer(self, content, status: int = 200, headers: dict | None = None):
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}), status)

    def _send(self, content: bytes, headers: dict, status: int = 200):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
