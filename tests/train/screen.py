"""A terminal for tests: the escape codes that the live view and rich use, on a grid of characters.

Anything else in the stream is an error, so that a test sees codes that were not meant.
"""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable

CODE = re.compile(r"\x1b(?:\[(\??[\d;]*)([A-Za-z])|([78D]))")


class Screen:
    """rows x columns; `scrolled` holds what left the region at its top, when it began at row 1."""

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self.cells = [[" "] * columns for _ in range(rows)]
        self.row = self.column = 0
        self.saved = (0, 0)
        self.top, self.bottom = 0, rows - 1
        self.scrolled: list[str] = []
        self.colours: set[str] = set()

    @property
    def region(self) -> tuple[int, int]:
        return self.top, self.bottom

    def text(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.cells]

    def feed(self, text: str) -> None:
        position = 0
        while position < len(text):
            code = CODE.match(text, position)
            if code:
                self._code(code)
                position = code.end()
                continue
            self._put(text[position])
            position += 1

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._down()
        else:
            assert char.isprintable(), f"unexpected {char!r}"
            if self.column == self.columns:  # the wrap was pending
                self.column = 0
                self._down()
            self.cells[self.row][self.column] = char
            self.column += 1

    def _down(self) -> None:
        if self.row == self.bottom:
            gone = "".join(self.cells.pop(self.top)).rstrip()
            if self.top == 0:
                self.scrolled.append(gone)
            self.cells.insert(self.bottom, [" "] * self.columns)
        elif self.row < self.rows - 1:
            self.row += 1

    def _code(self, code: re.Match) -> None:
        numbers, letter, short = code.groups()
        if short == "7":
            self.saved = (self.row, self.column)
        elif short == "8":
            self.row, self.column = self.saved
        elif short == "D":
            self._down()
        elif letter == "m":
            self.colours.add(numbers)
        elif letter == "H":
            row, column = (int(n or 1) for n in (numbers or ";").split(";"))
            self.row, self.column = row - 1, column - 1
        elif letter == "A":
            self.row = max(0, self.row - int(numbers or 1))
        elif letter == "r":
            top, bottom = (int(n) for n in numbers.split(";")) if numbers else (1, self.rows)
            assert 1 <= top < bottom <= self.rows
            self.top, self.bottom, self.row, self.column = top - 1, bottom - 1, 0, 0
        elif letter == "J":
            assert numbers in ("", "0")
            self.cells[self.row][self.column :] = [" "] * (self.columns - self.column)
            for row in range(self.row + 1, self.rows):
                self.cells[row] = [" "] * self.columns
        elif letter == "K":
            start = {"": self.column, "2": 0}[numbers]
            self.cells[self.row][start:] = [" "] * (self.columns - start)
        elif letter in "hl":
            assert numbers in ("?25", "?1049")
        else:
            raise AssertionError(f"unexpected code {code.group()!r}")


class Terminal:
    """A pseudo-terminal with a program on it, and the screen that it makes."""

    def __init__(self, command: list[str], columns: int = 100, rows: int = 30, **variables: str):
        self.screen = Screen(columns, rows)
        self.stream = b""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        environment |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | variables

        def own_terminal() -> None:
            # a shell that starts pytest in the background has its children ignore Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment,
            preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(slave)

    def read_until(self, is_there: Callable[[Screen], bool], timeout_s: float = 120.0) -> Screen:
        """Feeds the screen until it shows what is asked for; fails when it never does."""
        end = time.monotonic() + timeout_s
        while not is_there(self.screen):
            shown = "\n".join(self.screen.text())
            assert time.monotonic() < end, f"not within {timeout_s} s:\n{shown}"
            self._read(0.2)
        return self.screen

    def read_to_end(self, timeout_s: float = 120.0) -> Screen:
        """Feeds the screen until the program has ended; the screen then."""
        end = time.monotonic() + timeout_s
        while self._read(0.2) or self.process.poll() is None:
            assert time.monotonic() < end, "\n".join(self.screen.text())
        self.process.wait()
        return self.screen

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    def _read(self, wait_s: float) -> bool:
        if not select.select([self.master], [], [], wait_s)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # nobody has the other end open any more
            return False
        self.stream += data
        # a character or code that a read cuts in two is kept for the next
        whole, rest = data_until_code(self._rest + data)
        self._rest = rest
        self.screen.feed(whole.decode("utf-8"))
        return bool(data)

    _rest = b""


def data_until_code(data: bytes) -> tuple[bytes, bytes]:
    """The part that ends in a whole character and a whole escape code, and what is left."""
    escape = data.rfind(b"\x1b")
    cut = len(data)
    if escape >= 0 and not CODE.match(data[escape:].decode("latin-1")):
        cut = escape
    while cut:
        try:
            data[:cut].decode("utf-8")
            break
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise
            cut = error.start
    return data[:cut], data[cut:]
