"""How the drill spoils files: each function copies sound inputs, damages one, names the command.

The pickles here leave a file behind (`CANARY`) when anyone opens them.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.drill_process import obm
from launch.drill_tasks import TRAINING

CANARY = "opened"
NESTED = 100_000
"""brackets within brackets"""


@dataclass(frozen=True)
class Place:
    """Where a case works, and what sound inputs it may copy."""

    folder: Path
    base: Path
    dice: random.Random

    @property
    def output(self) -> Path:
        """What the command would write."""
        return self.folder / "output"

    @property
    def canary(self) -> Path:
        """Appears when a pickle is opened."""
        return self.folder / CANARY

    def checkpoint(self, role: str) -> Path:
        """A copy of one of the trio; files are links until they are replaced."""
        from configs.schema import resolve_model

        target = self.folder / role
        shutil.copytree(resolve_model(f"atlas://{role}"), target, copy_function=os.link)
        return target

    def copy(self, name: str) -> Path:
        """A copy of what the drill's preparation has made: calibration, start."""
        return Path(shutil.copytree(self.base / name, self.folder / name))

    def write(self, path: Path, content: bytes | str) -> None:
        """Replaces a file; a linked one stays as it is elsewhere."""
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def pickle(self) -> bytes:
        """A pickle that leaves the canary when it is opened."""
        return pickle.dumps(_Hostile(self.canary))

    def merge(self, *settings: str) -> list[str]:
        """The merge command with statistics of the preparation."""
        statistics = f"calibration.output={self.base / 'calibration'}"
        return obm("merge", statistics, *settings, "--output", self.output)

    def evaluate(self, name: str) -> list[str]:
        """An evaluation of a checkpoint in this folder."""
        size = "environment.eval_size=2"
        return obm("eval", self.folder / name, size, "--output", self.output)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self._path,)


# ---------------------------------------------------------------- safetensors


def shard(spoil: Callable[[bytes, random.Random], bytes]) -> Callable[[Place], list[str]]:
    """A VLM whose only shard is spoiled."""

    def make(place: Place) -> list[str]:
        path = place.checkpoint("vlm") / "model.safetensors"
        place.write(path, spoil(path.read_bytes(), place.dice))
        return place.merge(f"models.vlm={path.parent}")

    return make


def truncated(content: bytes, dice: random.Random) -> bytes:
    """The content up to a random byte."""
    return content[: dice.randrange(len(content))]


def flipped(content: bytes, dice: random.Random) -> bytes:
    """One bit of the header's JSON, where tensors are described."""
    n_header = struct.unpack("<Q", content[:8])[0]
    found = bytearray(content)
    found[8 + dice.randrange(n_header - 8)] ^= 1 << dice.randrange(8)
    return bytes(found)


def misspelt(content: bytes, dice: random.Random) -> bytes:
    """What a flipped bit can do to a name that no merge knows."""
    return content.replace(b"visual.blocks.1.attn.qkv.weight", b"visual.blocks.1.attn.qkw.weight")


def huge(content: bytes, dice: random.Random) -> bytes:
    """A header that says of itself that it has 2^60 bytes."""
    return struct.pack("<Q", 2**60) + content[8:]


def deep(content: bytes, dice: random.Random) -> bytes:
    """A header of nothing but nested brackets."""
    header = b"[" * NESTED + b"]" * NESTED
    return struct.pack("<Q", len(header)) + header + content[8:]


def overlapping(content: bytes, dice: random.Random) -> bytes:
    """Two tensors that claim the same bytes."""
    n_header = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + n_header])
    names = [name for name in header if name != "__metadata__"]
    one, two = dice.sample(names, 2)
    header[two]["data_offsets"] = header[one]["data_offsets"]
    header[two]["shape"], header[two]["dtype"] = header[one]["shape"], header[one]["dtype"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + n_header :]


# ---------------------------------------------------------------- checkpoints


def index_json(weight_map: dict[str, object]) -> Callable[[Place], list[str]]:
    """An agent whose shard index says this of its tensors."""

    def make(place: Place) -> list[str]:
        folder = place.checkpoint("agent")
        # beside the one file, which wins, an index is left of shards that were there before
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        content = json.dumps({"metadata": {}, "weight_map": weight_map})
        place.write(folder / "model.safetensors.index.json", content)
        return place.merge(f"models.agent={folder}")

    return make


def other_sizes(place: Place) -> list[str]:
    """A million rows of vocabulary where the weights have some hundreds."""
    folder = place.checkpoint("vlm")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["vocab_size"] = 2**20
    place.write(folder / "config.json", json.dumps(settings))
    return place.evaluate("vlm")


def config_json(
    content: str | dict[str, object], verb: str = "merge"
) -> Callable[[Place], list[str]]:
    """A VLM with another config.json; a dict is laid over the real one."""

    def make(place: Place) -> list[str]:
        folder = place.checkpoint("vlm")
        path = folder / "config.json"
        text = content
        if isinstance(content, dict):
            text = json.dumps({**json.loads(path.read_text()), **content})
            code = f"from pathlib import Path; Path({str(place.canary)!r}).touch()\n"
            place.write(folder / "evil.py", code)
        place.write(path, str(text))
        if verb == "eval":
            return place.evaluate("vlm")
        return place.merge(f"models.vlm={folder}")

    return make


def pickled_weights(role: str) -> Callable[[Place], list[str]]:
    """One of the trio with pickled weights alone: an agent to merge, or a VLM to evaluate."""

    def make(place: Place) -> list[str]:
        folder = place.checkpoint(role)
        (folder / "model.safetensors").unlink()
        place.write(folder / "pytorch_model.bin", place.pickle())
        return place.evaluate(role) if role == "vlm" else place.merge(f"models.{role}={folder}")

    return make


def statistics(spoil: Callable[[Place, bytes], bytes]) -> Callable[[Place], list[str]]:
    """A calibration whose statistics of the agent are spoiled."""

    def make(place: Place) -> list[str]:
        path = place.copy("calibration") / "agent" / "stats.safetensors"
        place.write(path, spoil(place, path.read_bytes()))
        statistics = f"calibration.output={path.parents[1]}"
        return obm("merge", statistics, "--output", place.output)

    return make


def not_a_number(content: bytes) -> bytes:
    """The last float32 of the content is a NaN."""
    return content[:-4] + struct.pack("<f", float("nan"))


def train_from(start: Path, output: Path, *more: str) -> list[str]:
    """Trains a start into an output."""
    settings = (f"models.init={start}", f"output={output}", *more)
    rows = "grpo.per_device_train_batch_size=16"
    return obm("train", *TRAINING, rows, *settings)


def cut_start(place: Place) -> list[str]:
    """A merged start that lacks its end, trained."""
    path = place.copy("start") / "model.safetensors"
    place.write(path, truncated(path.read_bytes(), place.dice))
    return train_from(path.parent, place.output)


def hostile_record(place: Place) -> list[str]:
    """A merged start whose merge.json is nothing but brackets, trained."""
    path = place.copy("start") / "merge.json"
    place.write(path, "[" * NESTED)
    return train_from(path.parent, place.output)


def checkpoint_of(place: Place, name: str, content: Callable[[bytes], bytes]) -> list[str]:
    """A run that was trained before, a file of its checkpoint spoiled; it shall go on."""
    run_folder = Path(shutil.copytree(place.base / "run", place.folder / "output"))
    (run_folder / "done.json").unlink(missing_ok=True)
    found = sorted(run_folder.glob(f"checkpoints/*/{name}"))[-1]
    place.write(found, content(found.read_bytes()))
    return train_from(place.base / "start", run_folder, "--resume")


def hostile_optimizer(place: Place) -> list[str]:
    """What DeepSpeed would load, replaced by what runs code; its size is recorded as right."""
    import torch

    command = checkpoint_of(place, "global_step*/mp_rank_00_model_states.pt", lambda content: b"")
    path = sorted(place.output.glob("checkpoints/*/global_step*/mp_rank_00_model_states.pt"))[-1]
    torch.save({"module": _Hostile(place.canary)}, path)
    record = path.parents[1] / "rollout.json"
    content = json.loads(record.read_text())
    content["files"][str(path.relative_to(record.parent))] = path.stat().st_size
    place.write(record, json.dumps(content))
    return command


# ---------------------------------------------------------------- settings, questions, indexes


def settings_file(text: str, *more: str) -> Callable[[Place], list[str]]:
    """A merge whose settings are this text; CANARY stands for the canary's path."""

    def make(place: Place) -> list[str]:
        path = place.folder / "hostile.yaml"
        place.write(path, text.replace("CANARY", str(place.canary)))
        return place.merge("--config", str(path), *more)

    return make


def questions(
    rows: Sequence[object], *, raw: bytes = b"", are_asked: bool = False
) -> Callable[[Place], list[str]]:
    """An evaluation on a table of these rows, and of bytes behind them; CANARY as above.

    Args:
        rows: of the table; a text is a line as it is.
        raw: bytes behind them.
        are_asked: the model answers; without, they are read alone.
    """

    def make(place: Place) -> list[str]:
        path = place.folder / "questions.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        text = "".join(f"{line}\n" for line in lines).replace("CANARY", str(place.canary))
        place.write(path, text.encode() + raw)
        where = f"environment.eval_benchmark.source={path}"
        name = "environment.eval_benchmark.name=table"
        how = [] if are_asked else ["--dry-run"]
        return obm("eval", "atlas://vlm", name, where, *how, "--output", place.output)

    return make


def search_index(spoil: Callable[[Place, Path], None]) -> Callable[[Place], list[str]]:
    """`obm serve` of an index that was spoiled."""

    def make(place: Place) -> list[str]:
        folder = place.copy("index")
        spoil(place, folder)
        return obm("serve", "--text", folder, "--images", "none", "--port", "0")

    return make


def cut_file(name: str) -> Callable[[Place, Path], None]:
    """The second half of a file is missing."""

    def spoil(place: Place, folder: Path) -> None:
        content = (folder / name).read_bytes()
        place.write(folder / name, content[: len(content) // 2])

    return spoil


def pickled_array(place: Place, folder: Path) -> None:
    """An array of objects is a pickle inside."""
    import numpy as np

    array = np.empty(1, dtype=object)
    array[0] = _Hostile(place.canary)
    np.save(folder / "most.npy", array, allow_pickle=True)
    record = json.loads((folder / "index.json").read_text())
    record["files"]["most.npy"] = (folder / "most.npy").stat().st_size
    place.write(folder / "index.json", json.dumps(record))


def pickle_named_safetensors(place: Place) -> list[str]:
    """An agent whose model.safetensors is a pickle."""
    folder = place.checkpoint("agent")
    place.write(folder / "model.safetensors", place.pickle())
    return place.merge(f"models.agent={folder}")
