"""A lock on a folder: one process at a time writes into it."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from mod_jax.config import ConfigError

NAME = "lock.json"
BEAT = 20.0  # seconds between two signs of life
# Seconds without a sign of life after which a process on another host counts as ended.
SILENCE = 120.0


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a folder, in its file lock.json, which is removed at the end.

    The system frees the lock of a process that was killed. Not every network file system shares
    locks among hosts, so the process that holds one also touches the file every `BEAT` seconds;
    another host's file is respected until it has been silent for `SILENCE` seconds.

    Args:
      folder: An existing local folder.
    Raises:
      ConfigError: If another process holds it, naming its host, number and time.
    """
    with _acquire(folder) as file:
        ended = threading.Event()
        beating = threading.Thread(target=_beat, args=(file, ended), daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            (folder / NAME).unlink(missing_ok=True)


def _acquire(folder: pathlib.Path) -> TextIO:
    """Opens the lock file, locks it and writes who holds it."""
    path = folder / NAME
    file = path.open("a+")
    try:
        file.seek(0)
        owner = _parse(file.read())
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder, owner) from None
        silent_for = time.time() - os.fstat(file.fileno()).st_mtime
        if owner and owner["host"] != socket.gethostname() and silent_for < SILENCE:
            raise _in_use(folder, owner)
        # Its last holder may have removed the file since it was opened; then the lock is void.
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise _in_use(folder, owner)
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": now}, file)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _beat(file: TextIO, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        os.utime(file.fileno())


def _parse(owner: str) -> dict | None:
    """Returns who holds a lock; None if the file is empty, or was written in part."""
    try:
        fields = json.loads(owner)
        return {key: fields[key] for key in ("host", "process", "since")}
    except (ValueError, KeyError, TypeError):
        return None


def _in_use(folder: pathlib.Path, owner: dict | None) -> ConfigError:
    who = "process {process} on {host} (since {since})".format(**owner) if owner else "another one"
    return ConfigError(
        f"--workdir = {str(folder)!r}: expected a folder that no other process writes to, but "
        f"{who} does. Wait for it, end it, or use another --workdir."
    )
