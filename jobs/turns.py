"""One night at a time: who writes the tables of a lake holds a lock on a file beside its artefacts.

The system lets go of the lock when its holder ends, however it ends, so that a killed night leaves none behind. Publications have a fence
of their own and need no turn: a rollback, or lists merged again, may come in the middle of a night. Only the online store, which knows no
commits, is written by one after the other. Where a file system knows no locks, Delta's check of concurrent writes remains.
"""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from conf.errors import PublishError
from conf.settings import LakeSettings
from jobs.reader import shared_folder

_FILE, _ONLINE_FILE = "_artifacts/night.lock", "_artifacts/online.lock"


@contextmanager
def turn(lake: LakeSettings, who: str) -> Iterator[None]:
    """Hold the lake's lock inside the block.

    Raises:
        PublishError: another night holds it; nothing was written.
    """
    with _lock_file(lake, _FILE) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise PublishError(
                f"another night is writing this lake: {file.read().strip() or 'it has not said which'}. Nothing was written by this one; "
                f"run the same command again once it has ended (lock: {file.name})"
            ) from error
        file.truncate(0)
        file.write(f"{who}, process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def online_turn(lake: LakeSettings, *, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of who writes the lake's online store, as soon as whoever holds it has ended.

    Args:
        lake: whose store.
        say: told if there is somebody to wait for.
    """
    with _lock_file(lake, _ONLINE_FILE) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another publication is writing the online store; this one waits until it has ended")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_file(lake: LakeSettings, name: str) -> IO[str]:
    path = shared_folder(lake) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+", encoding="utf-8")
