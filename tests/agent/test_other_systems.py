"""The agent on systems that this is not: as far as a faked platform can tell, its modules can be imported there.

A process of its own takes away what Windows' Python lacks, and imports everything of ours anew.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.storage import handles
from agent.storage.posix import open_root
from protocol.errors import NeedsPerson

WINDOWS = """
import importlib, os, pkgutil, signal, socket, subprocess, sys, types
import agent, protocol
names = [m.name for p in (agent, protocol) for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.')]
# The demonstration and the worker processes are POSIX programs, and the tray needs a screen.
left_out = ('agent.demo', 'agent.__main__', 'agent.desktop.tray')
names = [name for name in names if not name.startswith(left_out)]
for name in names:
    importlib.import_module(name)
for name in [name for name in sys.modules if name.split('.')[0] in ('agent', 'protocol')]:
    del sys.modules[name]
for name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'):
    sys.modules[name] = None
msvcrt = sys.modules['msvcrt'] = types.ModuleType('msvcrt')
msvcrt.LK_NBLCK = 2
signal.SIGBREAK, subprocess.DETACHED_PROCESS, subprocess.CREATE_NEW_PROCESS_GROUP = 21, 8, 512
for name in ('SIGHUP', 'SIGKILL', 'SIGUSR1'):
    delattr(signal, name)
for name in ('AF_UNIX', 'CMSG_LEN', 'CMSG_SPACE', 'SCM_RIGHTS', 'SO_PEERCRED', 'recv_fds', 'send_fds'):
    delattr(socket, name)
for name in dir(os):
    if name.startswith('O_') and name[2:] not in ('RDONLY', 'WRONLY', 'RDWR', 'CREAT', 'EXCL', 'TRUNC', 'APPEND'):
        delattr(os, name)
for name in ('fdatasync', 'fchmod', 'fchown', 'geteuid', 'getuid', 'getxattr', 'killpg', 'memfd_create', 'nice',
             'pread', 'preadv', 'pwrite', 'pwritev', 'posix_fadvise', 'sendfile', 'setsid', 'setxattr', 'statvfs'):
    delattr(os, name)
os.supports_dir_fd = set()
sys.platform = 'win32'
for name in names:
    importlib.import_module(name)
from agent.system import accounts, files, limits, processes
from agent.storage import handles
assert processes.detached() == {'creationflags': 520}
assert processes.RELOADING == () and limits.raise_open_files(99) == limits.open_files() == 8192
assert accounts.own_number() == 0 and files.NOFOLLOW == 0 and not handles.USABLE
print('imported', len(names))
"""


def test_everything_can_be_imported_without_what_windows_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 150


def test_nothing_is_offered_where_files_cannot_be_opened_safely(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "USABLE", False)
    with pytest.raises(NeedsPerson, match="operating system"):
        open_root(str(tmp_path))


def test_texts_are_read_and_written_as_utf_8_whatever_the_system_likes() -> None:
    """`towpath setup` for a second collection read the configuration in the encoding of the system (cp1252, say)
    and wrote it as UTF-8: names with accents were another text afterwards."""
    without = [
        f"{path.name}:{number}"
        for room in ("agent", "protocol", "relay")
        for path in sorted((Path(__file__).parents[2] / room).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\.(read|write)_text\(", line) and not re.search(r"encoding=|.utf-8|def ", line)
    ]
    assert without == []
