"""A relay in a few lines, over plain http on the loopback address, for tests of the commands that speak to one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ALPHA = "aaaaaaaa-0000-4000-8000-000000000001"
BETA = "bbbbbbbb-0000-4000-8000-000000000002"
CLIENT = "cccccccc-0000-4000-8000-000000000003"
TASK = "dddddddd-0000-4000-8000-000000000004"
BOOKMARK = "eeeeeeee-0000-4000-8000-000000000005"
SUBMISSION = "ffffffff-0000-4000-8000-000000000006"
SECRET = "not-to-be-seen"
SCOPES = {
    "auth.globus.org": "openid profile email",
    "transfer.api.globus.org": "urn:globus:auth:scope:transfer.api.globus.org:all",
}


def collection(identifier: str, name: str) -> dict[str, Any]:
    return {
        "DATA_TYPE": "endpoint",
        "id": identifier,
        "display_name": name,
        "canonical_name": f"u_x#{identifier}",
        "owner_string": "ada@example.org",
        "owner_id": CLIENT,
        "entity_type": "GCP_mapped_collection",
        "gcp_connected": True,
        "my_effective_roles": ["administrator"],
    }


def entry(name: str, kind: str = "file", **more: Any) -> dict[str, Any]:
    return {
        "DATA_TYPE": "file",
        "name": name,
        "type": kind,
        "size": 5,
        "permissions": "0644",
        "user": "ada",
        "group": "staff",
        "last_modified": "2026-01-02 03:04:05+00:00",
        "link_target": None,
        **more,
    }


def task(status: str = "ACTIVE", **more: Any) -> dict[str, Any]:
    return {
        "DATA_TYPE": "task",
        "task_id": TASK,
        "type": "TRANSFER",
        "status": status,
        "label": None,
        "nice_status": "OK",
        "nice_status_details": None,
        "is_paused": False,
        "fatal_error": None,
        "completion_time": None,
        "request_time": "2026-01-02T03:04:05.000006+00:00",
        "source_endpoint_display_name": "alpha",
        "destination_endpoint_display_name": "beta",
        "files": 2,
        "files_transferred": 1,
        "files_skipped": 0,
        "bytes_transferred": 512,
        "effective_bytes_per_second": 100,
        "subtasks_skipped_errors": 0,
        "faults": 0,
        "towpath": {"bytes_total": 1024, "scan_complete": True, "who": "", "bytes_sent_again": 0},
        **more,
    }


class Refusal(Exception):
    """Answer with this status and error document."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.document = {"code": code, "message": message, "request_id": "r", "resource": "/"}


def _asked_for(person: dict[str, Any], query: dict[str, list[str]]) -> bool:
    wanted = ",".join(query.get("ids", []) + query.get("usernames", [])).split(",")
    return person["id"] in wanted or person["username"] in wanted


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    document: Any


@dataclass
class FakeRelay:
    """What is there and what was asked. Tests change the fields and read `requests`."""

    url: str = ""
    collections: list[dict[str, Any]] = field(
        default_factory=lambda: [collection(ALPHA, "alpha"), collection(BETA, "beta")]
    )
    listings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # Successive answers to the question about the task; the last one stays.
    task_answers: list[dict[str, Any] | Refusal] = field(default_factory=lambda: [task("SUCCEEDED")])
    bookmarks: list[dict[str, Any]] = field(default_factory=list)
    people: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)

    def sent(self, method: str, path: str) -> list[Request]:
        return [request for request in self.requests if (request.method, request.path) == (method, path)]

    def answer(self, request: Request, headers: Any) -> dict[str, Any]:
        self.requests.append(request)
        path = request.path
        if path in self.refusals:
            raise self.refusals[path]
        if path == "/v2/oauth2/token":
            return self._tokens(request, headers)
        if path == "/v2/oauth2/token/revoke":
            return {"active": False}
        if not str(headers.get("Authorization", "")).startswith("Bearer good-"):
            raise Refusal(401, "ClientError.AuthenticationFailed", "no token")
        if path == "/v2/oauth2/userinfo":
            return {"sub": CLIENT, "preferred_username": "demo@example.org", "name": "Demo", "email": None}
        if path == "/v2/api/identities":
            return {"identities": [row for row in self.people if _asked_for(row, request.query)]}
        return self._transfer(request, path.removeprefix("/v0.10/"))

    def _tokens(self, request: Request, headers: Any) -> dict[str, Any]:
        import base64

        expected = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if headers.get("Authorization") != f"Basic {expected}":
            raise Refusal(401, "invalid_client", "wrong id or secret")
        rest = [
            {
                "access_token": f"good-{server}",
                "scope": scope,
                "expires_in": 172800,
                "token_type": "Bearer",
                "resource_server": server,
            }
            for server, scope in (
                ("auth.globus.org", "openid profile email"),
                ("transfer.api.globus.org", SCOPES["transfer.api.globus.org"]),
            )
            if any(word in request.document["scope"][0].split() for word in scope.split())
        ]
        return {**rest[0], "other_tokens": rest[1:]}

    def _transfer(self, request: Request, path: str) -> dict[str, Any]:
        parts = path.split("/")
        match [request.method, *parts]:
            case ["GET", "endpoint_search"]:
                text = request.query.get("filter_fulltext", [""])[0]
                found = [row for row in self.collections if text in row["display_name"]]
                return {"DATA_TYPE": "endpoint_list", "DATA": found, "has_next_page": False, "offset": 0, "limit": 100}
            case ["GET", "bookmark_list"]:
                return {"DATA_TYPE": "bookmark_list", "DATA": self.bookmarks}
            case ["POST", "bookmark"]:
                return {"id": BOOKMARK, **request.document}
            case ["GET", "submission_id"]:
                return {"DATA_TYPE": "submission_id", "value": SUBMISSION}
            case ["POST", "transfer" | "delete"]:
                return {"code": "Accepted", "message": "Accepted.", "task_id": TASK, "DATA_TYPE": "x"}
            case ["GET", "operation", "endpoint", _, "ls"]:
                return self._listing(request)
            case ["GET", "operation", "endpoint", _, "stat"]:
                return entry(request.query["path"][0].rpartition("/")[2])
            case ["GET", "task_list"]:
                rows = [answer for answer in self.task_answers if not isinstance(answer, Refusal)]
                return {"DATA": rows, "total": len(rows), "offset": 0, "limit": 100, "length": len(rows)}
            case ["GET", "task", _]:
                self.asked.set()
                answer = self.task_answers.pop(0) if len(self.task_answers) > 1 else self.task_answers[0]
                if isinstance(answer, Refusal):
                    raise answer
                return answer
            case ["GET", "task", _, "pause_info"]:
                return {"pause_rules": self.rows.get("pause_rules", []), "source_pause_message": None}
            case ["GET", "task", _, kind]:
                rows = self.rows.get(kind, [])
                return {"DATA": rows, "next_marker": None, "total": len(rows), "offset": 0, "limit": 1000}
            case ["GET", "endpoint", _, "access_list"]:
                return {"DATA_TYPE": "access_list", "DATA": self.rows.get("access_list", [])}
            case ["GET", "endpoint", identifier]:
                return next(row for row in self.collections if row["id"] == identifier)
            case ["POST" | "PUT" | "DELETE", *_]:
                return {"DATA_TYPE": "result", "code": "Done", "message": f"{request.method} done."}
        raise Refusal(404, "NotFound", "no such route")

    def _listing(self, request: Request) -> dict[str, Any]:
        path = request.query.get("path", ["/~/"])[0]
        rows = self.listings.get(path.rstrip("/") or "/", [])
        offset, limit = int(request.query["offset"][0]), min(int(request.query["limit"][0]), 1000)
        page = rows[offset : offset + limit]
        path = path if path.endswith("/") else path + "/"
        return {"DATA_TYPE": "file_list", "path": path, "DATA": page, "total": len(rows), "length": len(page)}


@contextmanager
def fake_relay() -> Iterator[FakeRelay]:
    """A running fake. Its address is in ``url``."""
    relay = FakeRelay()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            form = "urlencoded" in (self.headers.get("Content-Type") or "")
            document = parse_qs(body.decode()) if form else json.loads(body) if body else None
            request = Request(self.command, unquote(parts.path), parse_qs(parts.query), document)
            try:
                status, answer = 200, relay.answer(request, self.headers)
            except Refusal as refusal:
                status, answer = refusal.status, refusal.document
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        relay.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield relay
        finally:
            server.shutdown()
            thread.join()
