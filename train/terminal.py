"""The last rows of a terminal, kept for a status while everything else scrolls above.

The terminal itself scrolls only the rows above (DECSTBM, as apt's progress bar has it). So whatever
is printed, by other ranks, by the launcher, by a native library, stays whole and is never written
over; nothing is captured. A small shell waits beside us and gives the rows back if this process is
killed.
"""

from __future__ import annotations

import os
import subprocess
import termios
import unicodedata
from collections.abc import Sequence
from contextlib import suppress

SAVE, RESTORE = "\x1b7", "\x1b8"  # cursor
DOWN = "\x1bD"  # one row down in the same column, scrolling at the end
ERASE_BELOW, ERASE_LINE = "\x1b[J", "\x1b[2K"
ALL_ROWS = "\x1b[r"
GIVE_BACK = f"{SAVE}{ALL_ROWS}{RESTORE}{ERASE_BELOW}"
"""Everything scrolls again, and what stood below the cursor is gone."""
LEAST_ROWS = 4
"""Rows that are left to everything else."""


def is_terminal(descriptor: int) -> bool:
    """Whether rows of it can be kept: a terminal that understands escape codes."""
    dumb = os.environ.get("TERM", "dumb") in ("", "dumb", "unknown")
    return os.name == "posix" and not dumb and os.isatty(descriptor)


def spelt_out(text: str) -> str:
    """The text with what does not print as its escape: a stranger's words cannot steer a terminal,
    and what hides in a name is seen."""
    # tabs, wide and no-break spaces are not printable to Python, but harmless
    return "".join(
        letter
        if letter.isprintable() or letter == "\t" or unicodedata.category(letter) == "Zs"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


class BottomRows:
    """Keeps rows at the bottom of a terminal; `draw` fills them, `close` gives them back.

    Args:
        descriptor: of the terminal, open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = (0, 0)
        self._n_rows = 0
        self._guard = _start_guard(descriptor)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal; 80 by 24 where it does not say."""
        try:
            columns, rows = os.get_terminal_size(self._descriptor)
        except OSError:
            return 80, 24
        return columns or 80, rows or 24

    def draw(self, lines: Sequence[str]) -> None:
        """Shows these lines, each no wider than the terminal, in as many rows.

        One write for the whole, which a terminal takes without anything in between.
        """
        size = self.size
        height = size[1]
        lines = lines[: max(0, height - LEAST_ROWS)]
        out = []
        if size != self._size or len(lines) != self._n_rows:
            out.append(self._make_room(len(lines), height))
            self._size, self._n_rows = size, len(lines)
        out.append(SAVE)
        first = height - len(lines) + 1
        for row, line in enumerate(lines, start=first):
            # erased before, not after: behind a full line erasing would take its last character
            out.append(f"\x1b[{row};1H{ERASE_LINE}{line}")
        out.append(RESTORE)
        self._write("".join(out))

    def close(self) -> None:
        """Gives the rows back, empty; may be called twice."""
        if self._guard is None and self._n_rows == 0:
            return
        self._write(GIVE_BACK)
        self._n_rows = 0
        if self._guard is not None and self._guard.stdin is not None:
            with suppress(OSError):
                self._guard.stdin.write(b"closed\n")
                self._guard.stdin.close()
            self._guard.wait()
            self._guard = None

    def _make_room(self, n_rows: int, height: int) -> str:
        """Keeps `n_rows` rows; the cursor stays with its line, which moves up where it must."""
        up = f"\x1b[{n_rows}A" if n_rows else ""
        room = f"{SAVE}{ALL_ROWS}{RESTORE}{ERASE_BELOW}{DOWN * n_rows}{up}"
        return f"{room}{SAVE}\x1b[1;{height - n_rows}r{RESTORE}"

    def _write(self, text: str) -> None:
        # a terminal that was closed (a lost connection) must not end a training
        with suppress(OSError):
            data = text.encode("utf-8", "replace")
            while data:
                data = data[os.write(self._descriptor, data) :]


def _start_guard(descriptor: int) -> subprocess.Popen[bytes] | None:
    """A shell that writes GIVE_BACK when our end of its input closes without a last word.

    It has a session of its own: Ctrl-C is not for it.
    """
    octal = GIVE_BACK.replace("\x1b", r"\033")
    script = f"trap '' INT TERM HUP; read -r word || printf '{octal}'"
    try:
        return subprocess.Popen(
            ["sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=descriptor,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None


class Keys:
    """Single keys from a terminal's input, without waiting for Enter; use in a `with` block.

    Args:
        descriptor: of the input; where it is no terminal there are no keys.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._before: list[object] | None = None

    def __enter__(self) -> Keys:
        if os.isatty(self._descriptor):
            import tty

            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]

    def wait(self, seconds: float) -> str:
        """The key pressed within that time, or ''."""
        import select
        import time

        if self._before is None:
            time.sleep(seconds)
            return ""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return ""
        return os.read(self._descriptor, 1).decode("latin-1")
