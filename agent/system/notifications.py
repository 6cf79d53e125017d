"""Hearing from the file system that something has changed, where it can tell."""

from __future__ import annotations

from collections.abc import Iterable

from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from protocol import threads

# What an observer starts: itself, and two for what it hears from.
_THREADS = 3


def observe(handler: FileSystemEventHandler, folders: Iterable[str], *, recursive: bool = False) -> BaseObserver:
    """Have a handler called, in a thread, of what happens in some folders, until `stop` of what this returns. Raises
    OSError where there can be no notifications now. Blocks."""
    # One that cannot start all of its threads may leave behind what hears nothing, also for those that come later.
    threads.check_room(_THREADS)
    observer = Observer()
    try:
        for folder in folders:
            observer.schedule(handler, folder, recursive=recursive)
        threads.start(observer)
    except BaseException as error:
        observer.unschedule_all()
        if isinstance(error, RuntimeError):
            raise threads.NoThread from error
        raise
    return observer


def stop(observer: BaseObserver) -> None:
    """End what `observe` has begun."""
    observer.unschedule_all()
    observer.stop()
