"""The audit log: every deed has its entry, no entry holds a secret, and no change goes unnoticed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import sqlalchemy.exc
import trio
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from relay.audit import trail
from relay.audit.recorder import STRANGERS
from relay.audit.trail import Entry
from relay.auth.public_clients import TOWPATH_CLI
from relay.auth.scopes import AUTH_SERVER, MANAGE_PROJECTS, TRANSFER_ALL
from relay.cli import cli
from tests.canary.sitecustomize import CANARIES
from tests.relay.sign_in_world import Application, Person, add_person, forms_of
from tests.relay.transfer_world import TransferWorld, open_world, transfer_document


@pytest.fixture
async def relay(world: Any) -> AsyncIterator[TransferWorld]:
    async with open_world(world, run=False) as made:
        yield made


async def log(relay: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in await relay.store.read(lambda connection: list(trail.lines(connection)))]


async def test_deeds_are_recorded_with_who_when_where_and_how_they_ended(relay: TransferWorld) -> None:
    alice, bob = await relay.person("alice"), await relay.person("bob")
    endpoint, _ = await relay.collection(alice, "Disk")
    second, _ = await relay.collection(alice, "Other")
    role = {"DATA_TYPE": "role", "principal": bob.id, "role": "activity_monitor"}
    made = await alice.post(f"/endpoint/{endpoint}/role", role, status=201)
    await bob.refused("DELETE", f"/endpoint/{endpoint}/role/{made['id']}", 403, "PermissionDenied")
    await alice.delete(f"/endpoint/{endpoint}/role/{made['id']}")
    task = await alice.post("/transfer", transfer_document(endpoint, second), status=202)
    await alice.get("/task_list")
    rows = [row for row in await log(relay) if row["action"] != "token"]
    assert [(row["action"], row["who"], row["outcome"]) for row in rows] == [
        ("create_role", alice.id, "done"),
        ("delete_role", bob.id, "refused"),
        ("delete_role", alice.id, "done"),
        ("submit_transfer", alice.id, "done"),
    ]
    granted = rows[0]
    assert granted["facts"]["principal"] == bob.id
    assert (granted["facts"]["role"], granted["facts"]["endpoint_id"]) == ("activity_monitor", endpoint)
    assert granted["time"].startswith("2027-01-15T08:00:00")
    assert granted["request"]
    assert rows[3]["facts"]["task_id"] == task["task_id"]
    assert all(row["origin"] for row in rows)


async def test_no_secret_reaches_the_log(relay: TransferWorld) -> None:
    """Canaries in every place where a request can carry a secret."""
    client_id, secret = await relay.base.client()
    canary = "canary-7f3b1c"
    canaries = [canary, secret]
    form = {"grant_type": "client_credentials", "scope": f"{MANAGE_PROJECTS} openid"}
    tokens = (await relay.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))).json()
    canaries += [tokens["access_token"], *(other["access_token"] for other in tokens["other_tokens"])]
    await relay.http.post("/v2/oauth2/token", data=form, auth=(client_id, canary))
    await relay.http.post("/v2/oauth2/token", data={**form, "client_id": client_id, "client_secret": canary})
    await relay.http.post("/v2/oauth2/token", data={"grant_type": canary}, auth=(client_id, secret))
    await relay.http.post("/v2/oauth2/token/revoke", data={"token": canary, "client_id": client_id})
    await relay.http.post(f"/v0.10/transfer?access_token={canary}", headers={"Authorization": f"Bearer {canary}"})
    await relay.http.post("/towpath/v1/enrol", json={"setup_key": canary, "proof": canary, "certificate": canary})
    await relay.http.post("/sign-in", data={"username": "a", "password": canary}, headers={"Cookie": f"x={canary}"})
    person = await relay.base.user("dev@example.org")
    issued = await relay.base.tokens(person.id, client_id, {AUTH_SERVER: [MANAGE_PROJECTS]})
    headers = {"Authorization": f"Bearer {issued[AUTH_SERVER].access_token}"}
    body = {"project": {"display_name": "P", "contact_email": "p@example.org"}}
    project = (await relay.http.post("/v2/api/projects", json=body, headers=headers)).json()["project"]["id"]
    body = {"client": {"name": "C", "project": project, "client_type": "confidential_client"}}
    client = (await relay.http.post("/v2/api/clients", json=body, headers=headers)).json()["client"]["id"]
    where = f"/v2/api/clients/{client}/credentials"
    made = (await relay.http.post(where, json={"credential": {"name": "n"}}, headers=headers)).json()["credential"]
    canaries.append(made["secret"])
    rows = await log(relay)
    assert {"token", "create_project", "create_client", "create_credential", "enrol"} <= {row["action"] for row in rows}
    whole = json.dumps(rows)
    assert [one for one in canaries if one in whole] == []


async def test_the_database_itself_refuses_to_change_or_delete_an_entry(world: Any) -> None:
    await world.store.write(lambda connection: trail.append(connection, [Entry(time=1.0, action="a", outcome="done")]))
    for statement in ("UPDATE audit_log SET entry = '{}'", "DELETE FROM audit_log"):
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            await world.store.write(lambda connection, one=statement: connection.execute(text(one)))
    verdict = await world.store.read(trail.verify)
    assert (verdict.entries, verdict.broken) == (1, None)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6), st.sampled_from(["change", "remove", "swap", "insert"]), st.data())
def test_whatever_is_done_to_the_log_shows(count: int, how: str, data: st.DataObject) -> None:
    with memory_log() as connection:
        trail.append(connection, [Entry(time=float(i), action=f"a{i}", outcome="done") for i in range(count)])
        assert trail.verify(connection).broken is None
        before = trail.verify(connection)
        victim = data.draw(st.integers(1, count))
        _harm(connection, how, victim, count)
        after = trail.verify(connection)
        # A cut-off end is the one thing that shows only beside the last hash kept elsewhere.
        assert after.broken is not None or after.head != before.head


def test_a_moment_that_was_changed_hides_no_entry() -> None:
    """It stands beside what the hashes cover, for looking things up."""
    with memory_log() as connection:
        trail.append(connection, [Entry(time=float(i), action=f"a{i}", outcome="done") for i in range(3)])
        before = trail.verify(connection)
        connection.execute(text("UPDATE audit_log SET time = -1 WHERE n = 3"))
        assert trail.verify(connection) == before
        assert len(list(trail.lines(connection))) == 3


@contextlib.contextmanager
def memory_log() -> Iterator[Connection]:
    """A database of its own with nothing in it but an empty log."""
    engine = sqlalchemy.create_engine("sqlite://")
    try:
        trail.audit_log.metadata.create_all(engine, tables=[trail.audit_log])
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _harm(connection: Connection, how: str, victim: int, count: int) -> None:
    if how == "change":
        connection.execute(
            text("UPDATE audit_log SET entry = replace(entry, 'done', 'gone') WHERE n = :n"), {"n": victim}
        )
    elif how == "remove":
        connection.execute(text("DELETE FROM audit_log WHERE n = :n"), {"n": victim})
    elif how == "swap":
        connection.execute(text("UPDATE audit_log SET entry = entry || ' ', hash = hash WHERE n = :n"), {"n": victim})
    else:
        row = {"n": count + 1, "t": 1.0, "e": "{}", "h": "0" * 64}
        connection.execute(text("INSERT INTO audit_log (n, time, entry, hash) VALUES (:n, :t, :e, :h)"), row)


async def test_many_entries_at_once_are_all_there_in_one_chain(world: Any) -> None:
    recorder = world.relay.services.audit
    async with trio.open_nursery() as nursery:
        for n in range(200):
            nursery.start_soon(recorder.record, Entry(time=1.0, action=f"deed {n}", outcome="done"))
    verdict = await world.store.read(trail.verify)
    assert (verdict.entries, verdict.broken) == (200, None)
    assert recorder.statistics().written == 200


async def test_strangers_cannot_fill_the_disk(relay: TransferWorld) -> None:
    for _ in range(STRANGERS + 40):
        await relay.http.post("/v0.10/transfer", json={})
    assert len(await log(relay)) == STRANGERS
    relay.base.clock.now += 61
    await relay.http.post("/v0.10/transfer", json={})
    assert (await log(relay))[-1]["facts"]["only_counted"] == "40"


async def test_strangers_cannot_fill_the_disk_with_what_changes_nothing(relay: TransferWorld) -> None:
    """What succeeds without anybody having said who they are is no more worth telling than what is refused."""
    for n in range(STRANGERS + 40):
        answer = await relay.http.post("/v2/oauth2/token/revoke", data={"token": f"made-up-{n}"})
        assert answer.status_code == 200
    assert len(await log(relay)) == STRANGERS
    # What does happen is always told, whoever did it, with whom it concerns.
    ada = await relay.person("ada")
    token = ada.headers["Authorization"].partition(" ")[2]
    await relay.http.post("/v2/oauth2/token/revoke", data={"token": token})
    last = (await log(relay))[-1]
    assert (last["action"], last["outcome"], last["facts"]["identity"]) == ("end", "done", ada.id)
    relay.base.clock.now += 61
    await relay.http.post("/v2/oauth2/token/revoke", data={"token": "made up again"})
    assert (await log(relay))[-1]["facts"]["only_counted"] == "40"


async def test_what_strangers_begin_is_told_once_and_counted_once(relay: TransferWorld) -> None:
    """Its entry is written with its row, and looked at again when it is answered."""
    form = {"client_id": TOWPATH_CLI, "scope": "openid"}
    for _ in range(10):
        answer = await relay.http.post("/v2/oauth2/device_authorization", data=form)
        assert answer.status_code == 200, answer.text
    assert len(await log(relay)) == 10
    assert relay.services.audit.statistics().suppressed == 0
    for _ in range(STRANGERS - 10):
        await relay.http.post("/v0.10/transfer", json={})
    assert len(await log(relay)) == STRANGERS


async def test_what_is_done_and_its_entry_are_one(relay: TransferWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done that cannot be recorded; and what is done is recorded though everything after it goes wrong."""
    alice = await relay.person("alice")
    endpoint, _ = await relay.collection(alice, "Disk")
    bob = await relay.person("bob")
    role = {"DATA_TYPE": "role", "principal": bob.id, "role": "activity_monitor"}
    before = len(await log(relay))

    def full(*_: Any) -> None:
        raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("the disk is full"))

    with monkeypatch.context() as broken:
        broken.setattr("relay.audit.recorder.trail.append", full)
        answer = await relay.http.post(f"/v0.10/endpoint/{endpoint}/role", json=role, headers=alice.headers)
        assert answer.status_code == 500
    assert len(await log(relay)) == before
    assert len((await alice.get(f"/endpoint/{endpoint}/role_list"))["DATA"]) == 1

    with monkeypatch.context() as broken:
        # After the transaction there is no more chance to record anything.
        broken.setattr("relay.audit.recorder.Recorder.record", full)
        made = await alice.post(f"/endpoint/{endpoint}/role", role, status=201)
    (row,) = (await log(relay))[before:]
    assert (row["action"], row["who"], row["outcome"]) == ("create_role", alice.id, "done")
    assert row["facts"]["role_id"] == made["id"]


async def test_a_request_is_recorded_once_with_all_its_facts(relay: TransferWorld) -> None:
    alice = await relay.person("alice")
    before = len(await log(relay))
    first, _ = await relay.collection(alice, "Disk")
    second, _ = await relay.collection(alice, "Other")
    task = await alice.post("/transfer", transfer_document(first, second), status=202)
    rows = (await log(relay))[before:]
    assert [row["outcome"] for row in rows if row["request"]].count("done") == len(rows)
    assert len({row["request"] for row in rows}) == len(rows)
    assert rows[-1]["facts"]["task_id"] == task["task_id"]
    assert rows[-1]["facts"]["source_id"] == first


async def test_consents_tell_which_application_and_what(world: Any) -> None:
    ada = await add_person(world, "ada")
    person = Person(world)
    await person.sign_in("ada")
    application = Application(scope=f"openid {TRANSFER_ALL}")
    await application.redeem(world, await application.code(person))
    page = await person.get(application.url())
    await person.post(forms_of(page.text)[0], decision="refuse")
    page = await person.get("/account/applications")
    await person.post(next(form for form in forms_of(page.text) if "client" in form.fields))
    rows = {row["action"]: row for row in await log(world)}
    assert rows["sign_in"]["who"] == ada.id
    given = rows["consent"]
    assert (given["who"], given["outcome"]) == (ada.id, "done")
    assert given["facts"]["application"] == application.client_id
    assert given["facts"]["scope"] == f"openid {TRANSFER_ALL}"
    assert given["facts"]["lasting"] == "yes"
    assert rows["refuse_consent"]["facts"]["application"] == application.client_id
    assert rows["withdraw_consent"]["facts"]["application"] == application.client_id


async def test_a_stolen_code_that_ends_tokens_is_recorded_as_refused(world: Any) -> None:
    person, ada = Person(world), await add_person(world, "ada")
    await person.arrive(ada)
    application = Application()
    code = await application.code(person)
    await application.redeem(world, code)
    assert (await application.redeem(world, code)).status_code == 401
    rows = [row for row in await log(world) if row["action"] == "token"]
    assert [row["outcome"] for row in rows] == ["done", "refused"]
    # Who let the program have it is said of the one that was given.
    assert [(row["who"], row["client"]) for row in rows] == [
        (ada.id, application.client_id),
        (None, None),
    ]


def test_commands_that_failed_and_those_about_files_are_recorded(relay_directory: Any, tmp_path: Any) -> None:
    run = CliRunner()
    config = ["--config", str(relay_directory / "relay.yaml")]
    assert run.invoke(cli, [*config, "user", "close", "nobody"]).exit_code != 0
    assert run.invoke(cli, [*config, "client", "remove-secret", "x", "y"]).exit_code != 0
    password = tmp_path / "password"
    password.write_text("canary 7f3b1c canary")
    made = run.invoke(cli, [*config, "user", "add", "ada", "--password-file", str(password), "--json"])
    assert made.exit_code == 0, made.output
    link = json.loads(run.invoke(cli, [*config, "user", "add", "bob", "--json"]).output)["link"]
    assert run.invoke(cli, [*config, "root", "certify"]).exit_code == 0
    exported = run.invoke(cli, [*config, "audit", "export"]).output
    rows = [json.loads(line) for line in exported.splitlines()]
    assert [(row["action"], row["outcome"]) for row in rows] == [
        ("user close", "failed"),
        ("client remove-secret", "failed"),
        ("user add", "done"),
        ("user add", "done"),
        ("root certify", "begun"),
        ("root certify", "done"),
    ]
    assert "no user" in rows[0]["facts"]["reason"]
    assert rows[2]["facts"]["password_file"] == str(password)
    assert "canary" not in exported
    assert link.rpartition("=")[2] not in exported
    assert CANARIES.search(exported) is None


def _told(config: list[str]) -> list[tuple[str, str]]:
    exported = CliRunner().invoke(cli, [*config, "audit", "export"])
    assert exported.exit_code == 0, exported.output
    rows = [json.loads(line) for line in exported.output.splitlines()]
    return [(row["action"], row["outcome"]) for row in rows]


@pytest.mark.parametrize("words", [("root", "certify"), ("root", "move", "FILE"), ("backup", "FILE")])
def test_a_command_about_files_is_announced_before_it_changes_any(
    relay_directory: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    run, config = CliRunner(), ["--config", str(relay_directory / "relay.yaml")]
    command = [*config, *(str(tmp_path / "file") if word == "FILE" else word for word in words)]
    name = " ".join(word for word in words if word != "FILE")
    keys = {path: path.read_bytes() for path in (relay_directory / "keys").iterdir()}

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    # The process ends before its second entry: the first one is there, so is what was done.
    with monkeypatch.context() as patch:
        patch.setattr("relay.cli.audited._write", killed)
        with pytest.raises(Killed):
            run.invoke(cli, command, catch_exceptions=False)
    assert _told(config) == [(name, "begun")]
    assert (tmp_path / "file").exists() or keys != {path: path.read_bytes() for path in keys}

    # What cannot be announced is not done.
    def full(*_: Any, **__: Any) -> None:
        raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))

    keys = {path: path.read_bytes() for path in (relay_directory / "keys").iterdir()}
    (tmp_path / "file").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr("relay.audit.trail.append", full)
        refused = run.invoke(cli, command)
    assert refused.exit_code != 0
    assert not (tmp_path / "file").exists()
    assert keys == {path: path.read_bytes() for path in (relay_directory / "keys").iterdir()}


def test_a_restored_database_tells_who_put_it_there(relay_directory: Any, tmp_path: Any) -> None:
    run, config = CliRunner(), ["--config", str(relay_directory / "relay.yaml")]
    archive = tmp_path / "backup"
    assert run.invoke(cli, [*config, "backup", str(archive)]).exit_code == 0
    assert run.invoke(cli, [*config, "restore", str(archive)]).exit_code != 0
    done = run.invoke(cli, [*config, "restore", str(archive), "--force"])
    assert done.exit_code == 0, done.output
    assert _told(config) == [("backup", "begun"), ("restore", "done")]
    assert "whole" in run.invoke(cli, [*config, "audit", "verify"]).output
    # What was there before says the same.
    (aside,) = relay_directory.glob("replaced-*")
    before = tmp_path / "before"
    shutil.copytree(relay_directory, before)
    shutil.copyfile(aside / "relay.sqlite", before / "relay.sqlite")
    config = ["--config", str(before / "relay.yaml")]
    assert _told(config) == [
        ("backup", "begun"),
        ("backup", "done"),
        *[("restore", word) for word in ("begun", "failed", "begun")],
    ]


@pytest.mark.parametrize("name", ["relay.sqlite", "relay.yaml"])
@pytest.mark.parametrize("content", ["a: [", "no such\n" * 10_000], ids=["short", "long"])
def test_a_relay_that_is_damaged_is_replaced_by_its_backup(
    relay_directory: Any, tmp_path: Any, name: str, content: str
) -> None:
    """It cannot be announced there, which is told; the relay itself advises to restore in that case."""
    run, config = CliRunner(), ["--config", str(relay_directory / "relay.yaml")]
    archive = tmp_path / "backup"
    assert run.invoke(cli, [*config, "backup", str(archive)]).exit_code == 0
    (relay_directory / name).write_text(content)
    refused = run.invoke(cli, [*config, "restore", str(archive)])
    assert "--force moves it aside" in str(refused.exception)
    assert (relay_directory / name).read_text() == content
    done = run.invoke(cli, [*config, "restore", str(archive), "--force"])
    assert done.exit_code == 0, done.output
    assert "cannot tell of this in its audit log" in done.stderr
    assert _told(config) == [("backup", "begun"), ("restore", "done")]
    (aside,) = relay_directory.glob("replaced-*")
    assert (aside / name).read_text() == content


def test_the_operators_own_deeds_and_the_export(relay_directory: Any) -> None:
    run = CliRunner()
    config = ["--config", str(relay_directory / "relay.yaml")]
    made = run.invoke(cli, [*config, "client", "add", "hub", "--json"])
    assert made.exit_code == 0, made.output
    assert run.invoke(cli, [*config, "client", "list"]).exit_code == 0
    exported = run.invoke(cli, [*config, "audit", "export"])
    rows = [json.loads(line) for line in exported.output.splitlines()]
    assert [(row["action"], row["facts"]["name"]) for row in rows] == [("client add", "hub")]
    assert json.loads(made.output)["client_secret"] not in exported.output
    assert "1 entries, whole" in run.invoke(cli, [*config, "audit", "verify"]).output
