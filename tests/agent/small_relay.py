"""Just enough of a relay to set an agent up: two routes over real TLS, in a thread, with faults on demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import ssl
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import trustme

from protocol.identity import public_key_of_certificate_untrusted
from protocol.ticket import RelayRoot


@dataclass
class SmallRelay:
    """``shown_ca`` is what it claims its authority to be; ``lose_answers`` breaks the connection after redeeming."""

    url: str
    ca_pem: str
    relay_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    root_pem: str = field(default_factory=lambda: RelayRoot.generate().public_pem)
    shown_ca: str | None = None
    lose_answers: int = 0
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, tuple[str, str]] = field(default_factory=dict)

    def new_key(self, name: str = "Data", *, fingerprint: str | None = "right") -> str:
        if fingerprint == "right":
            fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.ca_pem)).hexdigest()
        text = json.dumps([self.url, fingerprint, uuid.uuid4().hex]).encode()
        key = "twp-" + base64.urlsafe_b64encode(text).decode().rstrip("=")
        self.keys[key] = f"{name}|{uuid.uuid4()}"
        return key

    def about(self) -> dict[str, Any]:
        return {
            "relay_id": self.relay_id,
            "version": "0",
            "ca_certificate": self.shown_ca or self.ca_pem,
            "relay_root": self.root_pem,
        }

    def enrol(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        public_key = public_key_of_certificate_untrusted(request["certificate"])
        proof = jwt.decode(request["proof"], public_key, algorithms=["EdDSA"], audience="towpath-enrol")
        assert proof["sub"] == hashlib.sha256(request["setup_key"].encode()).hexdigest()
        key, certificate = request["setup_key"], request["certificate"]
        if self.used.setdefault(key, certificate) != certificate or key not in self.keys:
            return 403, {"code": "SetupKeyInvalid", "message": "This setup key was already used."}
        new = (str(uuid.uuid4()), str(uuid.uuid4()))
        node_id, endpoint_id = self.nodes.setdefault(certificate, new)
        assert request["node_id"] in (None, node_id)
        name, _, collection_id = self.keys[key].partition("|")
        return 201, {
            "endpoint_id": endpoint_id,
            "node_id": node_id,
            "collection_id": collection_id,
            "display_name": name,
            "owner": "ada@example.org",
            "owner_id": str(uuid.uuid4()),
            "relay_id": self.relay_id,
            "relay_root": self.root_pem,
        }


@contextlib.contextmanager
def small_relay() -> Iterator[SmallRelay]:
    """A relay on a free port of this machine, for the length of a block."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(200, relay.about())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            relay.requests.append((self.path, request))
            status, document = relay.enrol(request)
            if relay.lose_answers:
                relay.lose_answers -= 1
                self.close_connection = True
                return
            self.answer(status, document)

        def answer(self, status: int, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = False

        def handle_error(self, *_: object) -> None:
            # Clients that break off their handshake are what some tests are about.
            pass

        def finish_request(self, request: Any, client_address: Any) -> None:
            with context.wrap_socket(request, server_side=True) as secured:
                super().finish_request(secured, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    relay = SmallRelay(url=f"https://127.0.0.1:{server.server_address[1]}", ca_pem=authority.cert_pem.bytes().decode())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield relay
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
