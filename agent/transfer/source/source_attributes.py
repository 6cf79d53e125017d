"""What the source answers about extended attributes and access lists: read with the version of their file."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from agent.storage.access_lists import REFUSED, FoundLists
from agent.storage.attributes import Found
from agent.storage.base import Root
from agent.storage.faults import fault
from agent.storage.node import version_of
from protocol import session
from protocol.errors import ItemFailed, ProtocolError, TowpathError
from protocol.names import CollectionPath

# Seconds after which an answer has what was read by then: a file server that does not answer takes its time for each
# file, and the destination does not wait for hundreds of them (`source_session.ANSWER_TIMEOUT`).
ANSWER_WITHIN = 10.0


def read_attributes(
    root: Root, request: session.ReadAttributes, allowed: Callable[[bytes], CollectionPath]
) -> session.Attributes:
    """The answer to a request, or its beginning. ``allowed`` checks a path (`TowpathError`). Blocks.

    What cannot be read, or is another version by now, has its attributes left out: reading the content says why, unless
    it is a fault that may have passed by then, which is told here.
    """
    if not 0 < len(request.files) <= session.MAX_ATTRIBUTE_FILES:
        raise ProtocolError("Attributes of an impossible number of files were asked for.")
    found = []
    size = 0
    enough = time.monotonic() + ANSWER_WITHIN
    for asked in request.files:
        try:
            file = _attributes_of(root, asked, allowed(asked.path), request)
        except ProtocolError:
            raise
        except OSError as error:
            lasts = error.errno in REFUSED
            file = _unread(request, None if lasts else fault(error, "source", asked.path))
        except TowpathError as error:
            file = _unread(request, error)
        found.append(file)
        size += sum(len(name) + len(value) for name, value in file.attributes) + len(file.access) + len(file.default)
        if size >= session.ATTRIBUTE_BYTES or time.monotonic() >= enough:
            break
    return session.Attributes(request.r, found)


def _unread(request: session.ReadAttributes, error: TowpathError | None = None) -> session.FileAttributes:
    # Destinations of before know only that something is left out.
    document = None if error is None or isinstance(error, ItemFailed) else error.to_document()
    return session.FileAttributes([], int(request.attributes), lists_left_out=int(request.lists), error=document)


def _attributes_of(
    root: Root, asked: session.AttributesOf, path: CollectionPath, request: session.ReadAttributes
) -> session.FileAttributes:
    with ExitStack() as stack:
        if asked.version is None:
            handle = stack.enter_context(root.open_directory(path)).fileno()
            if handle is None:
                return session.FileAttributes([])
        else:
            parent, name = root.open_parent(path)
            with parent:
                handle = parent.open_read(name, follow=request.follow)
            stack.callback(root.close_file, handle)
        found = root.get_attributes(handle) if request.attributes else Found()
        lists = root.get_access_lists(handle) if request.lists else FoundLists()
        if asked.version is not None and version_of(root.fstat(handle)) != tuple(asked.version):
            return _unread(request)
    rights = found.rights - found.lists if request.lists else found.rights
    return session.FileAttributes(found.attributes, found.left_out, rights, lists.access, lists.default, lists.left_out)
