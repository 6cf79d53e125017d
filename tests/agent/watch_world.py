"""Watch rules over a real folder, whose relay is played."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent.collections import Collections, Marks
from agent.config.keys import CollectionConfig, WatchConfig
from agent.policy import Policy
from agent.watch.ledger import Batch, Ledger
from agent.watch.service import RuleRunner
from agent.watch.submitter import Outcome
from tests.agent.watch_scene import HERE, NOW, THERE


class FakeRelay:
    """Takes submissions; the same submission id is the same task."""

    def __init__(self) -> None:
        self.tasks: dict[str, Batch] = {}
        self.trouble: Exception | None = None
        self.outcome = Outcome("ACTIVE", "", 0)
        self.submissions = 0
        self.options: set[tuple[str, ...]] = set()

    async def submit(self, batch: Batch, source: str, folder: str, to: str, options: Sequence[str]) -> str:
        self.submissions += 1
        self.options.add(tuple(options))
        if self.trouble is not None:
            raise self.trouble
        self.tasks[batch.submission] = batch
        return f"task-{batch.submission}"

    async def look(self, task: str) -> Outcome:
        return self.outcome

    @property
    def files(self) -> list[str]:
        return sorted(item.destination for batch in self.tasks.values() for item in batch.items)


class World:
    def __init__(self, tmp_path: Path, **settings: object) -> None:
        self.root = tmp_path / "root"
        (self.root / "in").mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(tmp_path / "ledger")
        self.relay = FakeRelay()
        self.policy = Policy([CollectionConfig(id=HERE, name="Here", root=str(self.root))])
        self.collections = Collections(Marks(None))
        self.rule = WatchConfig(
            **{"name": "r", "collection": HERE, "folder": "/in", "destination": THERE, "settle": 10, **settings}  # type: ignore[arg-type]
        )
        self.now = NOW
        self.runner = self.start()

    def start(self) -> RuleRunner:
        return RuleRunner(self.rule, self.ledger, self.policy, self.collections, self.relay, lambda: self.now)

    def write(self, name: str, text: str = "x") -> Path:
        path = self.root / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    async def after(self, seconds: float) -> float:
        self.now += seconds
        return await self.runner.step()
