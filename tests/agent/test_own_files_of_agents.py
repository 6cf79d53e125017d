"""Which files are an agent's own, and that daemon, workers and the relay's calls leave them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.collections import Collections, Marks
from agent.config.exposure import exposures, own_places, unusable
from agent.config.keys import AgentConfig, CollectionConfig
from agent.policy import Policy
from agent.transfer.processes.channel import Common, WorkerCollection
from agent.transfer.tasks.local_node import LocalNode
from agent.transfer.worker import _root_of
from protocol.errors import NeedsPerson
from protocol.identity import NodeKey
from protocol.ticket import RelayRoot, TicketVerifier
from tests.agent.link_scene import READ_WRITE, Link, at
from tests.agent.own_home import home, names, own

__all__ = ["home", "own"]


@pytest.mark.parametrize("below", ["", "tasks"])
def test_a_root_among_them_cannot_be_used(home: Path, own: tuple[str, ...], below: str) -> None:
    place = Path(own[0]) / below
    place.mkdir(exist_ok=True)
    config = CollectionConfig(id="c", name="Bad", root=str(place))
    with pytest.raises(NeedsPerson) as caught, Collections(Marks(None), own).using(config):
        pass
    assert caught.value.code == "COLLECTION_UNAVAILABLE"
    assert "belongs to the agent itself" in caught.value.sentence


def test_daemon_and_workers_open_roots_without_them(home: Path, own: tuple[str, ...]) -> None:
    with Collections(Marks(None), own).using(CollectionConfig(id="c", name="Home", root=str(home))) as root:
        assert names(root, b"conf") == {b"mine"}
    common = Common(node_id="n", node_key=b"", relay_id="r", relay_root="", collections=[], own_places=own)
    with _root_of(common, WorkerCollection(id="c", root=str(home), read_only=False)) as root:
        assert names(root, b"conf") == {b"mine"}


def test_what_is_the_agents_own_follows_from_its_configuration(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    collection = CollectionConfig(id="c", name="Home", root=str(home))
    found = AgentConfig(state_dir=home / "state", collections=(collection,))
    assert set(own_places(found, home / "a.yaml")) == {
        str(home / name) for name in ("state", "a.yaml", "a.overlay.yaml", ".a.overlay.yaml.lock", ".config/towpath")
    }
    sentences = [sentence for _, sentence in exposures(found, home / "a.yaml")]
    assert len(sentences) == 2
    assert all("neither sees nor changes it" in sentence for sentence in sentences)
    assert not list(unusable(found))
    inside = AgentConfig(state_dir=home, collections=(collection,))
    assert not list(exposures(inside, tmp_path / "a.yaml"))
    ((refused, sentence),) = unusable(inside)
    assert (refused, "cannot be used" in sentence) == (collection, True)


async def test_a_relay_finds_none_and_makes_and_moves_none(tmp_path: Path) -> None:
    link = Link(tmp_path)
    own = tmp_path / "rw/sub/own"
    own.mkdir()
    (own / "key").write_text("secret")
    link.collections._own = (str(own),)

    async def post(operation: str, **body: str) -> tuple[int, str]:
        return await link.code("POST", at(READ_WRITE, operation), body)

    for operation in ("ls", "stat"):
        assert await link.code("GET", at(READ_WRITE, operation), path="/sub/own") == (404, "NOT_FOUND")
    assert (await link.ask("GET", at(READ_WRITE, "ls"), path="/sub")).json()["entries"] == []
    assert await post("mkdir", path="/sub/own") == (403, "PERMISSION_DENIED")
    assert await post("symlink", path="/sub/own", symlink_target="x") == (403, "PERMISSION_DENIED")
    assert await post("rename", old_path="/sub/own", new_path="/x") == (404, "NOT_FOUND")
    assert await post("rename", old_path="/file", new_path="/sub/own") == (403, "PERMISSION_DENIED")
    answer = await link.ask("POST", at(READ_WRITE, "rename"), {"old_path": "/sub", "new_path": "/x"})
    assert (answer.status_code, answer.json()["code"], answer.json()["subject"]) == (409, "NOT_EMPTY", "/sub")
    assert (own / "key").read_text() == "secret"


def test_every_worker_is_told_of_them(tmp_path: Path) -> None:
    identity = NodeKey.generate()
    verifier = TicketVerifier("r", RelayRoot.generate().public_pem)
    config = AgentConfig(state_dir=tmp_path)
    node = LocalNode(tmp_path, config, identity, "n", verifier, Policy([]), "", own_places=("/own",))
    try:
        assert node.common().own_places == ("/own",)
    finally:
        node.store.close()
