"""Calibration samples of a parent: from any data set, from recorded rollouts, or from the world.

    read_rows            hub, files, folders -> rows, with the numbers they had
    dataset_samples      rows -> samples, by template or from chat messages
    trajectory_samples   lines of a run's trajectories.jsonl -> samples

`calibration_batches` turns samples into inputs of the model, `commands.calibrate` asks the world.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.calibration_batches import Sample, answer_tokens, render
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.sections import CalibrationData

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


# ---------------------------------------------------------------- rows


def is_trajectories(source: str) -> bool:
    """Whether a file holds rollouts that a run of ours recorded."""
    path = Path(os.path.expanduser(source))
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and {"schema_version", "turns", "prompt"} <= set(first)


def read_rows(data: CalibrationData, n: int, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """Reads rows of a data set, drawn at random; pictures are not decoded yet.

    Args:
        data: source, subset and split are used.
        n: how many; fewer if the data set has fewer.
        seed: of the choice.

    Returns:
        (row number in the data set, row), by row number.

    Raises:
        LaunchError: nothing there, unreadable, or no rows.
    """
    with _refuse_unreadable(str(data["source"])):
        table = _open_table(data)
        if not len(table):
            raise LaunchError(f"{data['source']}: has no rows; check source and split")
        numbers = range(len(table))
        chosen = sorted(random.Random(seed).sample(numbers, n)) if n < len(table) else numbers
        return list(zip(chosen, _without_decoding(table.select(chosen)), strict=True))


def _without_decoding(table: Any) -> Any:
    """Pictures as bytes: one that cannot be read is then reported with its row."""
    features = table.features.copy()
    for column, feature in table.features.items():
        if _is_image(feature):
            features[column] = replace(feature, decode=False)
        elif _is_image(getattr(feature, "feature", None)):
            features[column] = replace(feature, feature=replace(feature.feature, decode=False))
    if features == table.features:
        return table
    # on disk it would lie in the user's folder
    return table.cast(features, keep_in_memory=True)


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"  # without importing `datasets` here


@contextmanager
def _refuse_unreadable(source: str) -> Iterator[None]:
    try:
        yield
    except LaunchError:
        raise
    except Exception as error:  # the readers behind `datasets` have no error class in common
        reason = (str(error).strip().split("\n") or [""])[0][:200]
        if "corresponds to no data" in reason:
            raise LaunchError(f"{source}: has no rows; check source and split") from error
        raise LaunchError(
            f"{source}: cannot be read as a data set ({type(error).__name__}: {reason}); "
            "check source, subset and split"
        ) from error


def _open_table(data: CalibrationData) -> Any:
    import datasets

    source, split = str(data["source"]), data["split"]
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise LaunchError(
                    f"{source}: has no split '{split}'; it has {', '.join(map(str, table))}"
                )
            table = table[split]
        return table
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise LaunchError(f"{source}: is none of {', '.join(FILE_TYPES)}; convert it")
        files = {"train": str(path)}
        return datasets.load_dataset(FILE_TYPES[path.suffix], data_files=files, split="train")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) is None or path.suffix in FILE_TYPES:
        raise LaunchError(f"{source}: no such file or folder; check the path")
    return datasets.load_dataset(source, data["subset"], split=split)


# ---------------------------------------------------------------- samples


def dataset_samples(
    data: CalibrationData, rows: Sequence[tuple[int, dict[str, Any]]], processor: Any
) -> list[Sample]:
    """Turns rows into samples, by template or from chat messages.

    Args:
        data: prompt, answer, images and messages are used.
        rows: see `read_rows`.
        processor: of the parent, or its tokenizer.

    Raises:
        LaunchError: a column is missing or empty, or a picture cannot be read.
    """
    return [_dataset_sample(data, number, row, processor) for number, row in rows]


def _dataset_sample(
    data: CalibrationData, number: int, row: Mapping[str, Any], processor: Any
) -> Sample:
    where = f"{data['source']}: row {number}"
    images = [
        image
        for column in data["images"] or []
        for image in _read_images(_value(row, column, where), data, f"{where}, column '{column}'")
    ]
    if data["messages"] is not None:
        messages = _value(row, data["messages"], where)
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and {"role", "content"} <= set(message)
            for message in messages
        ):
            raise LaunchError(
                f"{where}: column '{data['messages']}' is no list of messages with role and content"
            )
        _check_places(messages, images, processor, where)
        return _chat_sample(messages, images, processor, where)
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": _fill(data["prompt"], row, where)})
    sample = Sample(render([{"role": "user", "content": content}], processor), images)
    answer = _fill(data["answer"] or "", row, where)
    if answer:
        sample.say(answer_tokens(answer, processor), True)
    return sample


def _check_places(
    messages: list[dict[str, Any]], images: list[Any], processor: Any, where: str
) -> None:
    """Each picture has its place before the first answer: all that is not the prompt is text."""
    roles = [message["role"] for message in messages]
    n_prompt = roles.index("assistant") if "assistant" in roles else len(roles)
    # Gemma's pictures begin with a token of their own
    mark = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    n_places = 0
    for message in messages[:n_prompt]:
        content = message["content"]
        if isinstance(content, list):
            n_places += sum(isinstance(p, dict) and p.get("type") == "image" for p in content)
        elif mark and isinstance(content, str):
            n_places += content.count(mark)
    if n_places != len(images):
        raise LaunchError(
            f"{where}: {len(images)} pictures for {n_places} places before the first answer; give "
            "each picture a part {'type': 'image'} in the content of a message"
        )


def _chat_sample(
    messages: list[dict[str, Any]], images: list[Any], processor: Any, where: str
) -> Sample:
    """The assistant's turns are its own words; what lies between them is not."""
    tokenizer = getattr(processor, "tokenizer", processor)
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        return Sample(render(messages, processor), images)
    prompt = render(messages[: spoken[0]], processor)
    sample, said = Sample(prompt, images), prompt
    for i in spoken:
        before = render(messages[:i], processor)
        after = render(messages[: i + 1], processor, is_answered=True)
        if not before.startswith(said) or not after.startswith(before):
            raise LaunchError(
                f"{where}: the chat template rewrites earlier turns; use prompt and answer"
            )
        for text, is_own in ((before[len(said) :], False), (after[len(before) :], True)):
            sample.say(tokenizer(text, add_special_tokens=False)["input_ids"], is_own)
        said = after
    return sample


def trajectory_samples(source: str, n: int, seed: int, processor: Any) -> list[Sample]:
    """Reads search episodes that a run recorded; observations are not the policy's words.

    Episodes with pictures are left out: a record holds their hashes only.

    Raises:
        LaunchError: a line is damaged, or no episode is left.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    episodes = []
    path = Path(os.path.expanduser(source))
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                turns = [(turn["text"], turn["observation"] or "") for turn in row["turns"]]
                has_images = row["images"] or any(turn["images"] for turn in row["turns"])
                prompt = str(row["prompt"])
            except (ValueError, KeyError, TypeError) as error:
                raise LaunchError(
                    f"{source}: line {number} is no recorded episode; remove it"
                ) from error
            if not has_images:
                episodes.append((prompt, turns))
    if not episodes:
        raise LaunchError(f"{source}: has no episodes without pictures; give another file")
    if n < len(episodes):
        chosen = sorted(random.Random(seed).sample(range(len(episodes)), n))
        episodes = [episodes[i] for i in chosen]
    samples = []
    for prompt, turns in episodes:
        message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
        sample = Sample(render([message], processor))
        for text, observation in turns:
            for piece, is_own in ((text, True), (observation, False)):
                sample.say(tokenizer(piece, add_special_tokens=False)["input_ids"], is_own)
        samples.append(sample)
    return samples


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise LaunchError(f"{where}: has no column '{column}'; it has {', '.join(row)}")
    if row[column] is None:
        raise LaunchError(f"{where}: column '{column}' is empty; remove the row or fill it")
    return row[column]


def _fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """Puts a row's values into `{column}`; `{{` and `}}` stand for braces."""

    def fill(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value = _value(row, match[1], where)
        if isinstance(value, list) and value:  # several right answers: the first
            value = value[0]
        if not isinstance(value, str | int | float):
            raise LaunchError(
                f"{where}: column '{match[1]}' holds a {type(value).__name__}, not text"
            )
        return str(value)

    return _PLACE.sub(fill, template)


def _read_images(value: Any, data: CalibrationData, where: str) -> list[Any]:
    from PIL import Image, UnidentifiedImageError

    from environments.pixels import to_rgb

    images = []
    for item in value if isinstance(value, list) else [value]:
        content = item
        if isinstance(item, dict):
            content = item.get("bytes") or item.get("path")
        try:
            if isinstance(content, Image.Image):
                image = content
            elif isinstance(content, bytes):
                image = Image.open(io.BytesIO(content))
            elif isinstance(content, str):
                # a file's own pictures lie beside it
                folder = Path(os.path.expanduser(str(data["source"]))).parent
                image = Image.open(folder / os.path.expanduser(content))
            else:
                raise LaunchError(f"{where}: holds a {type(item).__name__}, not a picture")
            images.append(to_rgb(image))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise LaunchError(
                f"{where}: the picture cannot be read ({error}); remove the row or repair the file"
            ) from error
    if not images:
        raise LaunchError(f"{where}: holds no picture; remove the row")
    return images
