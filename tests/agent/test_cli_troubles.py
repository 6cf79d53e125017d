"""What people read when a command cannot do what they asked: what happened, and who can mend it, said once."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import trustme
from globus_sdk import AuthAPIError

from agent import local_socket
from agent.cli.failures import explained, network_sentence
from agent.cli.output import CommandFailed, person
from agent.cli.profile import Profile, Tokens
from agent.config.layers import load_config
from agent.doctor.network import check_relay
from agent.doctor.registry import Examination
from agent.local_socket import ADDRESS_FILE, NotRunning
from protocol.interception import certificate_sentence
from tests.agent.cli_scene import Run, relay, towpath
from tests.agent.fake_relay import ALPHA, CLIENT, FakeRelay, Refusal

__all__ = ["relay", "towpath"]

LISTING = f"/v0.10/operation/endpoint/{ALPHA}/ls"


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def strange_relay(certificate: trustme.LeafCert | None = None) -> Iterator[int]:
    """Somebody who speaks TLS, with a certificate that nobody here knows if none is given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (certificate or trustme.CA().issue_cert("127.0.0.1")).configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        context.wrap_socket(connection, server_side=True).close()
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.fixture
def nobody(towpath: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line of somebody who has not signed in yet."""
    for name in ("TOWPATH_RELAY_URL", "TOWPATH_CLIENT_ID", "TOWPATH_CLIENT_SECRET"):
        monkeypatch.delenv(name)
    return towpath


# --- the relay --------------------------------------------------------------------------------------------------


def test_signing_in_where_nobody_listens(nobody: Run) -> None:
    code, _, said = nobody("login", "--relay", f"https://127.0.0.1:{closed_port()}", "--no-browser")
    assert code == 1
    assert "Nothing answers at https://127.0.0.1:" in said
    assert "operator" in said
    assert "Errno" not in said


def test_signing_in_to_a_relay_with_a_certificate_of_its_own_making(nobody: Run) -> None:
    with strange_relay() as port:
        code, _, said = nobody("login", "--relay", f"https://127.0.0.1:{port}", "--no-browser")
    assert code == 1
    assert "is not trusted" in said
    assert "--ca-file" in said
    assert "sign in first (a hotel, a train)" in said
    assert "_ssl.c" not in said


def test_a_proxy_that_is_in_the_way_is_named_and_not_the_relay(nobody: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was said that nothing answers at the relay, or that its name is not known."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    command, proxy = ["login", "--relay", "https://relay.invalid", "--no-browser"], f"127.0.0.1:{closed_port()}"
    monkeypatch.setenv("HTTPS_PROXY", f"http://ada:hidden@{proxy}")
    code, _, said = nobody(*command)
    assert code == 1
    assert f"The way to https://relay.invalid leads through the proxy {proxy}, and nothing answers there." in said
    assert "hidden" not in said
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    assert "proxy.invalid:3128, and its name is not known" in nobody(*command)[2]
    refused = requests.exceptions.ProxyError("Tunnel connection failed: 407 Proxy Authentication Required")
    said = network_sentence(refused, "https://relay.invalid", None)
    assert "does not let this through (Tunnel connection failed: 407 Proxy Authentication Required)" in said
    monkeypatch.setenv("NO_PROXY", "relay.invalid")
    assert "proxy" not in nobody(*command)[2]


def test_a_certificate_that_does_not_hold_now_leads_to_the_clock() -> None:
    error = ssl.SSLCertVerificationError("no")
    error.verify_message, error.verify_code = "certificate is not yet valid", 9
    for said in (network_sentence(error, "https://relay.example", None), certificate_sentence("relay.example", error)):
        assert "clock is right" in said
        assert "proxy" not in said
        assert "--ca-file" not in said
    error.verify_message, error.verify_code = "self-signed certificate", 18
    assert "sign in first" in certificate_sentence("relay.example", error)


def test_a_name_that_does_not_exist(nobody: Run) -> None:
    code, _, said = nobody("login", "--relay", "https://relay.invalid", "--no-browser")
    assert code == 1
    assert "The name in https://relay.invalid is not known to this machine" in said


@pytest.mark.parametrize("person", [True, False])
def test_a_sign_in_that_has_ended_is_told_from_a_wrong_secret(person: bool) -> None:
    tokens = {"transfer.api.globus.org": Tokens("a", "r", 1.0)} if person else None
    profile = Profile("https://relay.example", CLIENT, "s", tokens=tokens)
    answer = requests.Response()
    answer.status_code = 401
    answer._content = json.dumps({"error": "invalid_grant"}).encode()
    answer.headers["Content-Type"] = "application/json"
    answer.request = requests.Request("POST", "https://relay.example/v2/oauth2/token").prepare()
    with pytest.raises(CommandFailed) as failed, explained(profile):
        raise AuthAPIError(answer)
    said = str(failed.value)
    assert "`towpath login`" in said
    assert ("has ended" in said, "client id" in said) == (person, not person)


# --- what an agent or the relay refuses ---------------------------------------------------------------------------


def test_an_agent_that_is_away_is_to_be_started_once(towpath: Run, relay: FakeRelay) -> None:
    message = "The agent of “alpha” is not connected; start it on its machine and try again."
    relay.refusals[LISTING] = Refusal(502, "ExternalError.DirListingFailed.GCDisconnected", message)
    _, _, said = towpath("ls", f"{ALPHA}:/x")
    sentence = "The agent of “alpha” is not connected; start it on its machine (`towpath start`) and try again."
    assert said == f"towpath: {sentence}\n"


def test_a_collection_without_an_agent_is_not_one_whose_agent_is_away(towpath: Run, relay: FakeRelay) -> None:
    message = "No agent has been set up for “alpha”; its owner does that with the collection's setup key."
    relay.refusals[LISTING] = Refusal(502, "ExternalError.DirListingFailed.GCDisconnected", message)
    assert towpath("ls", f"{ALPHA}:/x")[2] == f"towpath: {message}\n"


@pytest.mark.parametrize(
    "words", [("task",), ("config",), ("share",), ("watch",), ("endpoint",), ("service",), ("update",), ("bookmark",)]
)
def test_help_tells_what_each_command_does_in_a_whole_sentence(towpath: Run, words: tuple[str, ...]) -> None:
    code, said, _ = towpath(*words, "--help")
    assert code == 0
    assert "..." not in said.partition("Commands:")[2]
    assert len(said.partition("Commands:")[2].split()) > 10


@pytest.mark.parametrize(("who", "said"), [("destination owner", "the destination's owner"), ("you", "you"), ("", "")])
def test_who_can_mend_something_is_named_as_people_do(who: str, said: str) -> None:
    assert person(who) == said


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lst", "did you mean `towpath ls`?"),
        ("transfr", "did you mean `towpath transfer`?"),
        ("log", "`towpath logs`"),
        ("cp", "did you mean `towpath transfer`?"),
        ("cancel", "did you mean `towpath task cancel`?"),
        ("zzz", "No such command 'zzz'."),
    ],
)
def test_a_command_that_there_is_not_is_answered_with_what_was_meant(towpath: Run, word: str, meant: str) -> None:
    code, _, said = towpath(word, "x")
    assert code == 2
    assert meant in said


def test_what_an_agent_refuses_has_one_code(towpath: Run, relay: FakeRelay) -> None:
    message = "/x does not exist (endpoint “alpha”, NOT_FOUND)"
    relay.refusals[LISTING] = Refusal(404, "ClientError.NotFound", message)
    assert towpath("ls", f"{ALPHA}:/x")[2] == f"towpath: {message}\n"
    relay.refusals[LISTING] = Refusal(400, "ClientError.BadRequest", "path: no")
    assert towpath("ls", f"{ALPHA}:/x")[2] == "towpath: path: no. (ClientError.BadRequest)\n"


@pytest.mark.parametrize(
    ("new", "sent"),
    [
        ("alpha:/b", "/b"),
        (f"{ALPHA}:/b", "/b"),
        ("/b", "/b"),
        ("sub/beta:x", "sub/beta:x"),
        ("12:30.txt", "12:30.txt"),
        ("./beta:x", "./beta:x"),
        ("beta:/b", None),
        ("beta:b", None),
    ],
)
def test_renaming_into_another_collection_makes_no_file_of_its_name(
    towpath: Run, relay: FakeRelay, new: str, sent: str | None
) -> None:
    code, _, said = towpath("rename", "alpha:/a", new)
    requests_made = relay.sent("POST", f"/v0.10/operation/endpoint/{ALPHA}/rename")
    if sent is None:
        assert (code, requests_made) == (2, [])
        assert "'beta' is another collection" in said
        assert "towpath transfer" in said
    else:
        assert (code, [request.document["new_path"] for request in requests_made]) == (0, [sent])


# --- this machine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True])
def test_without_an_agent_one_is_told_how_to_start_it(tmp_path: Path, killed: bool) -> None:
    if killed:
        place = tmp_path / "run"
        place.mkdir(mode=0o700)
        (tmp_path / ADDRESS_FILE).write_text(str(place / "agent.sock"))
    with pytest.raises(NotRunning) as failed:
        local_socket.ask(tmp_path, "GET", "/status")
    assert failed.value.sentence.startswith("No agent runs here; `towpath start` starts it.")
    assert str(tmp_path) in failed.value.sentence


def test_the_doctor_asks_for_the_relay_and_not_for_a_firewall_where_nothing_listens(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(f"relay:\n  url: https://127.0.0.1:{closed_port()}\n  proxy: none\n")
    found = list(check_relay(Examination(config_file=file, config=load_config(file), status=None, now=time.time())))
    (finding,) = found
    assert finding.level == "failure"
    assert finding.sentence.endswith(": Connection refused.")
    assert "ask the relay's operator whether it is running" in finding.advice


@pytest.mark.parametrize(
    ("names", "days", "advice"),
    [
        (("127.0.0.1",), (-20, -1), "the relay's operator has to renew the certificate"),
        (("127.0.0.1",), (1, 20), "clock, which seems to be behind"),
        (("192.0.2.1",), (-1, 1), "Compare `relay.url`"),
        (("relay.example.org",), (-1, 1), "Compare `relay.url`"),
        (None, (-1, 1), "sign in first"),
    ],
)
def test_the_doctor_tells_what_is_wrong_with_a_certificate(
    tmp_path: Path, names: tuple[str, ...] | None, days: tuple[int, int], advice: str
) -> None:
    authority, file = trustme.CA(), tmp_path / "agent.yaml"
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    start, end = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=day) for day in days)
    certificate = None if names is None else authority.issue_cert(*names, not_before=start, not_after=end)
    with strange_relay(certificate) as port:
        file.write_text(f"relay: {{url: 'https://127.0.0.1:{port}', ca_file: ca.pem, proxy: none}}\n")
        found = list(check_relay(Examination(config_file=file, config=load_config(file), status=None, now=time.time())))
    assert [finding.level for finding in found] == ["ok", "failure"]
    assert advice in found[-1].advice


@pytest.mark.parametrize("command", [["setup"], ["collection", "add"], ["collection", "update"]])
def test_sharing_is_told_as_what_it_does(towpath: Run, command: list[str]) -> None:
    """There are no guest collections; access rules open folders."""
    _, told, _ = towpath(*command, "--help")
    assert "access rules" in " ".join(told.split())
    assert "guest" not in told


@pytest.mark.parametrize(
    "written", ["/data/file", "./file", "~/file", "results/file", "C:\\file", "..", "\\\\server\\file"]
)
def test_a_path_of_this_machine_is_not_looked_for_among_the_names(towpath: Run, written: str) -> None:
    code, _, said = towpath("transfer", written, "alpha:/file")
    assert code == 1
    assert "is a path of this machine; write COLLECTION:PATH" in said


def test_a_name_that_is_no_text_is_refused_in_a_sentence(towpath: Run) -> None:
    code, _, said = towpath("ls", "\udcff:/")
    assert code == 2
    assert "name the collection by its id" in said
