"""Lock files. The kernel lets go of a lock when its process ends, however it ends.

What is locked is a file, not the folder that it stands for: network file systems do not lock those.
"""

import errno
import fcntl
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers."""


def open_locked(path: Path, what: str) -> int:
    """Opens and locks the file that has this name; it is made, with its folder, where missing.

    Args:
        path: The file.
        what: What to start one of where the file system has no locks, for the warning.

    Returns:
        A descriptor; closing it lets go of the file.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: It cannot be opened.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its holder has just removed the folder, which stayed empty
        try:
            lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB, what)
            # its holder may have removed it between our two calls
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def lock(descriptor: int, path: Path, how: int, what: str) -> None:
    """Locks an open file, where the file system has locks.

    Args:
        descriptor: Of the file.
        path: Its name, for the warning.
        how: As `fcntl.flock` takes it.
        what: See `open_locked`.

    Raises:
        OSError: Another process holds it, or the lock fails.
    """
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: no locks on this file system; start one %s", path.parent, what)
