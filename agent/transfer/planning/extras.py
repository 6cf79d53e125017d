"""What a folder of a mirror has at the destination and not at the source: found when the source has listed it to its
end, and noted in the journal, from which `agent.transfer.deleting.mirror` deletes it when everything has arrived."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from enum import Enum
from itertools import chain

from agent.storage.base import Directory, Root
from agent.storage.folding import fold_key
from agent.storage.hiding import is_hidden
from agent.storage.rules import included
from agent.transfer.books.journal import Journal
from agent.transfer.books.spill import Spill
from agent.transfer.planning.filled_places import FilledPlaces
from agent.transfer.planning.source_names import SourceNames
from protocol.control import FilterRule
from protocol.names import CollectionPath
from protocol.session import join_path


class KeptExtra(Enum):
    """Why a mirror leaves something in a folder that the source has not listed."""

    NONE = "nothing stays"
    SHARED = "it may be another item's"
    HIDDEN = "the source shows no names that begin with a dot"
    LINKED = "a link leads out of the mirror"
    CHANGED = "names changed at the source while they were listed"


class Extras:
    """Those of one folder: ``handle``, to which the item that leads to ``top`` has come by ``path``. Methods block;
    raise OSError, and `StateTrouble`, after which nothing of the folder is noted."""

    def __init__(
        self,
        root: Root,
        journal: Journal,
        handle: Directory,
        path: CollectionPath,
        *,
        top: CollectionPath,
        filled: FilledPlaces,
        rules: Sequence[FilterRule],
        folds: bool,
    ) -> None:
        self._root = root
        self._journal = journal
        self._handle = handle
        self._path = path
        self._top = top
        self._filled = filled
        self._rules = rules
        # What may be a name of the source in another spelling is not deleted.
        self._names = SourceNames(journal.path.parent, fold_key if folds else bytes)

    def add(self, names: Iterable[bytes]) -> None:
        """The source has these."""
        self._names.add(names)

    def note(self, *, source_hides: bool, source_changed: bool) -> KeptExtra:
        """After the source's last name, once: remember what it does not have. Why something stays that it has not
        listed either."""
        try:
            return self._compared(source_hides=source_hides, source_changed=source_changed)
        finally:
            # Here, in a thread, since much on disk takes a moment to go.
            self.close()

    def _compared(self, *, source_hides: bool, source_changed: bool) -> KeptExtra:
        path, real = self._path, self._handle.path
        with closing(self._found()) as found:
            first = next(found, None)
            if first is None:
                self._journal.drop_extras(join_path(real))
                return KeptExtra.NONE
            if self._filled.several(path) or self._filled.several(real):
                return KeptExtra.SHARED
            if not self._is_below_top(real):
                return KeptExtra.LINKED
            if source_changed:
                # A file that was given another name meanwhile may have been listed under neither.
                return KeptExtra.CHANGED
            return self._note(chain([first], found), source_hides=source_hides)

    def close(self) -> None:
        """Let the names go. Safe to call twice."""
        self._names.close()

    def _found(self) -> Generator[bytes]:
        others = self._filled.names(self._path) | self._filled.names(self._handle.path)
        return self._names.lacking(
            node.name
            for node in self._handle.scan()
            if fold_key(node.name) not in others and included(self._rules, node.name, node.kind == "dir")
        )

    def _note(self, found: Iterable[bytes], *, source_hides: bool) -> KeptExtra:
        """Into the journal goes all that was found, or nothing."""
        kept = KeptExtra.NONE

        def known() -> Iterator[bytes]:
            nonlocal kept
            for name in found:
                # Nobody here knows whether the source has those.
                if source_hides and is_hidden(name):
                    kept = KeptExtra.HIDDEN
                else:
                    yield name

        with closing(Spill(self._journal.path.parent, bytes)) as spill:
            spill.add(known(), bytes)
            self._put(spill, source_hides=source_hides)
        return kept

    def _put(self, known: Spill[bytes], *, source_hides: bool) -> None:
        # By where the folder is: what has taken its name when they are deleted may be another one.
        place = join_path(self._handle.path)
        self._journal.drop_extras(place)
        try:
            for some in known.read_all():
                if source_hides:
                    self._journal.note_source_hides()
                self._journal.add_extras(place, some)
        except BaseException:
            self._journal.drop_extras(place)
            raise

    def _is_below_top(self, real: CollectionPath) -> bool:
        """Whether the folder is where the item leads to, by whatever links, and no link below that has led elsewhere.
        Raises OSError."""
        if self._path == real:
            return True
        with self._root.open_directory(self._top) as top:
            return real == (*top.path, *self._path[len(self._top) :])
