"""One training run per work directory."""

import os
import re
import socket
import subprocess
import sys

import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.run import lock
from imgclf_jax.run.workdir import Workdir

HOLD = """
import pathlib, sys
from imgclf_jax.run import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print(1, flush=True)
    sys.stdin.read()
"""


def test_the_other_is_told_who_holds_it(tmp_path):
    """Host, process and time; once the holder is killed, the lock is free."""
    file = tmp_path / "run" / "lock"
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"1\n"
        who = f"host {socket.gethostname()}, process {holder.pid}, since 20"
        with pytest.raises(UserError, match=re.escape(f"{tmp_path}/run is in use by another training run ({who}")):
            Workdir(tmp_path / "run").held().__enter__()
        holder.kill()
    assert file.exists()
    with lock.held(file):
        assert f"process {os.getpid()}, " in file.read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with lock.held(tmp_path / "lock"):
        assert "cannot be locked" in caplog.text


def test_a_lock_that_its_last_holder_removes(tmp_path, monkeypatch):
    """While the next one waits for it, which then held a file without a name, and a third one another."""
    file = tmp_path / "lock"

    def removed(handle, how):
        monkeypatch.undo()
        file.unlink()
        file.touch()
        lock.fcntl.flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", removed)
    with lock.held(file):
        assert lock.is_held(file)


def test_to_look_at_a_lock_takes_none(tmp_path):
    file = tmp_path / "lock"
    file.touch(mode=0o444)  # as another user's
    with file.open() as other:
        lock.fcntl.flock(other, lock.fcntl.LOCK_SH)
        assert not lock.is_held(file)
    with lock.held(file):
        assert lock.is_held(file)
