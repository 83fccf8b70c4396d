"""A disk that takes no more: one error that names the file, whichever library was writing.

Python says it by an errno; safetensors and torch, which write by themselves, only in words.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TAKES_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
IN_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Read-only file system"
    r"|Input/output error|PytorchStreamWriter failed|inline_container"
)


class DiskError(RuntimeError):
    """A file that cannot be written; the message names it, the reason and the fix."""

    exit_code = 2


def disk_reason(error: BaseException) -> str | None:
    """What the disk says, if it is the disk that an error is about; None otherwise."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror if error.errno in TAKES_NO_MORE else None
    found = IN_WORDS.search(str(error))
    if found is None:
        return None
    # torch's writer does not say why
    is_torch = found[0].startswith(("Pytorch", "inline"))
    return "the disk takes no more" if is_torch else found[0]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is written within belongs to a file or folder; a full disk is an error that names it.

    Raises:
        DiskError: the disk took no more. Other errors stay what they are.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise DiskError(
            f"{path}: cannot be written ({reason}); free space, then run the same command again"
        ) from error
