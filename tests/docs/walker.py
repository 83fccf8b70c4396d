"""Walks a page as a newcomer does: its files are written, its commands run in order, in a scratch.

What a reader's machine takes minutes for is made small: the shipped trio by an untrained one of a
few thousand parameters, settings by SMALL. Verbs run in this process; a training runs without its
launcher, except where the table of the test says otherwise.
"""

from __future__ import annotations

import glob
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from launch.cli import main
from tests.docs.blocks import ROOT, Block, Command, blocks, commands
from tests.docs.programs import check, parse_obm
from train.settings import free_port

SMALL: dict[str, Any] = {
    "calibration": {"samples": 2, "batch_size": 2, "vlm_kinds": ["look"]},
    "environment": {
        "train_size": 4, "eval_size": 2, "max_turns": 2, "text_searches": 1, "image_searches": 1,
    },
    "grpo": {
        "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4, "save_steps": 1,
        "max_completion_length": 40, "generation_kwargs": {"max_new_tokens": 8},
    },
    "deepspeed": "none",
    "tracking": {"wandb": "disabled"},
    "compare": {"eval_every": 1, "smoothing": 1, "bootstrap": 50},
}  # fmt: skip
"""Laid over a settings file that `obm init` wrote."""


class Walker:
    """One page in one scratch folder, which is the current directory.

    Args:
        scratch: folder to work in.
        trio: {"base", "vlm", "agent"} -> folder of a tiny checkpoint.
        launched: beginnings of training commands that go through the DeepSpeed launcher.
    """

    def __init__(
        self, scratch: Path, trio: Mapping[str, str], launched: Sequence[str] = ()
    ) -> None:
        self.scratch, self.trio, self.launched = scratch, trio, launched
        self._servers: list[subprocess.Popen[bytes]] = []
        self._ports: dict[str, str] = {}

    def walk(self, page: str, skip: Sequence[str] = ()) -> set[str]:
        """Runs the page; commands that begin as one of `skip` are checked only.

        Returns:
            Which of `skip` were met.
        """
        met: set[str] = set()
        (self.scratch / "checkpoints").symlink_to(Path(self.trio["base"]).parent)
        for block in blocks(page):
            self._write(block)
            for command in commands(block) if block.language == "bash" else ():
                begins = [prefix for prefix in skip if command.text.startswith(prefix)]
                met.update(begins)
                if begins:
                    check(command)
                else:
                    self.run(command)
        return met

    def close(self) -> None:
        for server in self._servers:
            server.terminate()
            server.wait(timeout=20)

    def _write(self, block: Block) -> None:
        name = block.file_name or {"json": "passages.jsonl"}.get(block.language)
        if name:
            (self.scratch / name).write_text(block.text)

    # ------------------------------------------------------------ one command

    def run(self, command: Command) -> None:
        """Runs a command; raises AssertionError where it fails."""
        words = [found for word in command.words for found in self._put_in(word)]
        start = time.monotonic()
        if command.in_background:
            self._serve(words)
        elif words[0] == "obm":
            self._obm(command, words[1:])
        elif words[0] == "deepspeed":
            self._train(command, words)
        elif words[0] == "python":
            result = subprocess.run(
                [sys.executable, *words[1:]], env=_environment(), capture_output=True, text=True,
                check=False, timeout=100,
            )  # fmt: skip
            assert result.returncode == 0, f"{command}\n{result.stderr[-2000:]}"
        else:
            check(command)
        print(f"{time.monotonic() - start:6.1f} s  {command}", flush=True)

    def _put_in(self, word: str) -> list[str]:
        """The word as this scratch has it: tiny checkpoints, free ports, files that are there."""
        for name, folder in self.trio.items():
            word = word.replace(f"atlas://{name}", folder)
        for port, other in self._ports.items():
            word = word.replace(port, other)
        if "configs/" in word and not Path(word).exists():
            word = word.replace("configs/", f"{ROOT}/configs/")
        return sorted(glob.glob(word)) or [word] if "*" in word else [word]

    def _obm(self, command: Command, words: list[str]) -> None:
        verb = words[0]
        if verb == "train" and "--dry-run" not in words:
            parse_obm(words)
            self._in_process(command, words[1:])
            return
        code = main(words)
        # a machine without a GPU or a login is no broken document
        assert code == 0 or (verb == "doctor" and code == 1), f"{command}: exit code {code}"
        if verb == "init" and "--output" in words:
            self._shrink(Path(words[words.index("--output") + 1]))

    def _shrink(self, path: Path) -> None:
        values = yaml.safe_load(path.read_text())
        values["models"] = {**self.trio, "init": self.trio["vlm"]}
        for key, value in SMALL.items():
            values[key] = {**(values.get(key) or {}), **value} if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(values))

    def _train(self, command: Command, words: list[str]) -> None:
        script = words.index("launch/train.sh")
        if any(command.text.startswith(prefix) for prefix in self.launched):
            ours = ["--master_port", str(free_port()), str(ROOT / "launch/train.sh")]
            where = [*words[1:script], *ours]
            environment = _environment(**dict(v.split("=", 1) for v in command.variables))
            result = subprocess.run(
                ["deepspeed", *where, *words[script + 1 :]], env=environment, capture_output=True,
                text=True, check=False, timeout=560,
            )  # fmt: skip
            assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
            return
        check(command)
        self._in_process(command, words[script + 1 :])

    def _in_process(self, command: Command, arguments: list[str]) -> None:
        from train.run import train

        output = [word for word in arguments if word.startswith("output=")]
        assert train(arguments) == 0, str(command)
        if output:
            assert Path(output[-1].removeprefix("output="), "done.json").is_file(), str(command)

    def _serve(self, words: list[str]) -> None:
        """Starts a server on a free port and waits until something listens there."""
        named = next(word for word in words if word.isdigit() and len(word) == 4)
        port = self._ports[named] = str(free_port())
        words = [port if word == named else word for word in words]
        start = ["-m", "launch.cli", *words[1:]] if words[0] == "obm" else words[1:]
        server = subprocess.Popen(
            [sys.executable, *start], env=_environment(), stdout=subprocess.DEVNULL
        )
        self._servers.append(server)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1):
                return
            time.sleep(0.1)
        raise AssertionError(f"nothing listens: {' '.join(words)}")


def _environment(**variables: str) -> dict[str, str]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here = {"PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **here, **variables}
