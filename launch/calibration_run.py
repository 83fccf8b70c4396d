"""Calibrates one parent: its data, then its statistics, from a whole model or a layer at a time.

The data come first: what a parent generates on the way must not count as calibration tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import LaunchError
from launch.stages import environment_inputs
from launch.tasks import calibration_inputs, length_inputs

if TYPE_CHECKING:
    from configs.schema import Config
    from launch.calibration_batches import Sample
    from launch.calibration_plan import Estimate

MAX_ANSWER_TOKENS = 48
WHOLE = (0, 1)


class Parent:
    """One checkpoint to calibrate; model and processor are loaded when they are needed."""

    def __init__(self, config: Config, role: str, source: str) -> None:
        from merge.checkpoint import Checkpoint
        from merge.families import get_family

        self.config, self.role = config, role
        self.section = config.calibration
        self.data = self.section.vlm_data if role == "vlm" else self.section.agent_data
        self.checkpoint = Checkpoint(source, role)
        self.folder = str(self.checkpoint.folder)
        self.families = config.merge.families
        model_type = self.checkpoint.config.get("model_type")
        self.family = get_family(model_type, self.folder, self.families)
        self._model: Any = None

    @cached_property
    def estimate(self) -> Estimate:
        """What it takes."""
        from launch.calibration_plan import estimate

        return estimate(self.checkpoint, self.family, self.section.kinds, self.section.dtype)

    @property
    def streams(self) -> bool:
        """Whether statistics of inputs are made a layer at a time."""
        from launch.calibration_plan import must_stream

        section = self.section
        return must_stream(self.estimate, section.kinds, section.streaming, section.device)

    @property
    def streams_fisher(self) -> bool:
        """Whether gradients are made a layer at a time."""
        from launch.calibration_plan import must_stream

        return must_stream(self.estimate, ["fisher"], self.section.streaming, self.section.device)

    @property
    def dtype(self) -> Any:
        """In which it runs; None = as stored."""
        import torch

        return None if self.section.dtype == "auto" else getattr(torch, self.section.dtype)

    @property
    def data_words(self) -> str:
        """Its data, for a person."""
        if self.data["source"] is not None:
            return f"samples of {self.data['source']}"
        return f"questions ({', '.join(self.question_kinds)})"

    @property
    def question_kinds(self) -> Sequence[str]:
        """Kinds of the environment's questions that it is asked; a text model sees no pictures."""
        sees = self.role == "vlm" and self.family.has_vision
        return self.section.vlm_kinds if sees else ["text"]

    @cached_property
    def processor(self) -> Any:
        """Its processor, or its tokenizer."""
        from train.policy import VISION_MODEL_TYPES, load_processor

        if not self.family.has_vision or self.family.model_type in VISION_MODEL_TYPES:
            return load_processor(self.folder, self.config.models.max_pixels)
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.folder)
        processor.tokenizer.padding_side = "left"
        return processor

    def load(self) -> Any:
        """The whole model, in evaluation mode.

        Raises:
            LaunchError: it does not fit into memory.
        """
        if self._model is not None:
            return self._model
        from launch.calibration_plan import fits, free_memory
        from merge.memory import size_words

        if not fits(self.estimate, self.section.device):
            name = "vlm_data" if self.role == "vlm" else "agent_data"
            free = size_words(free_memory(self.section.device))
            raise LaunchError(
                f"{self.role} {self.folder}: needs {size_words(self.estimate.whole)} of memory as "
                f"a whole, {free} are free. A layer at a time it cannot generate: set "
                f"calibration.{name} to samples with answers, and calibration.streaming=true"
            )
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.utils.logging import disable_progress_bar

        from train.policy import check_complete

        disable_progress_bar()
        auto = AutoModelForImageTextToText if self.family.has_vision else AutoModelForCausalLM
        model, found = auto.from_pretrained(
            self.folder, dtype=self.dtype or "auto", use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        check_complete(self.folder, found["missing_keys"])
        self._model = model.to(self.section.device).eval()
        return self._model

    def unload(self) -> None:
        """Gives its memory back."""
        self._model = None

    def samples(self, size: int, shard: tuple[int, int]) -> list[Sample]:
        """Its samples of one shard, with answers.

        Args:
            size: samples a batch; shards take whole batches in turn.
            shard: (rank, world).
        """
        from launch.calibration_batches import generate_answers
        from launch.calibration_data import (
            dataset_samples,
            is_trajectories,
            read_rows,
            trajectory_samples,
        )

        source, section = self.data["source"], self.section
        if source is None:
            return _world_samples(self, size, shard)
        if is_trajectories(source):
            if self.role == "vlm":
                raise LaunchError(
                    f"{source}: recorded episodes hold no pictures; give the VLM another data set"
                )
            found = trajectory_samples(source, section.samples, section.seed, self.processor)
            return own_share(found, size, shard)
        rows = own_share(read_rows(self.data, section.samples, section.seed), size, shard)
        found = dataset_samples(self.data, rows, self.processor)
        if self.data["answer"] is None and self.data["messages"] is None:
            generate_answers(
                found, self.load(), self.processor, size=size, max_new_tokens=MAX_ANSWER_TOKENS,
                max_tokens=section.max_tokens,
            )  # fmt: skip
        return found


def own_share(items: Sequence[Any], size: int, shard: tuple[int, int]) -> list[Any]:
    """The items of every world-th batch from the rank-th on."""
    from launch.calibration_batches import chunks

    rank, world = shard
    return [item for chunk in list(chunks(items, size))[rank::world] for item in chunk]


def _world_samples(parent: Parent, size: int, shard: tuple[int, int]) -> list[Sample]:
    """Questions of the environment, answered by the parent itself.

    `models.vlm` answers at once, from the photo if it sees; the agent searches, and all turns and
    observations of the episode follow the prompt.
    """
    from environments.dialects import get_dialect
    from launch.calibration_batches import Sample, generate_answers, render
    from train.worlds import build_engine, load_questions

    config, section = parent.config, parent.section
    kinds = parent.question_kinds
    questions = own_share(
        load_questions(config, "train", kinds, section.samples, seed=section.seed), size, shard
    )
    if parent.role == "vlm":
        dialect = get_dialect(config.environment.dialect)
        samples = []
        for question in questions:
            images = [] if question["image"] is None else [question["image"]]
            prompt = dialect.direct_prompt(question["question"], bool(images))
            samples.append(Sample(render(prompt, parent.processor), images))
        generate_answers(
            samples, parent.load(), parent.processor, size=size, max_new_tokens=MAX_ANSWER_TOKENS,
            max_tokens=section.max_tokens,
        )  # fmt: skip
        return samples
    engine = build_engine(config, parent.load(), parent.processor, rollout=None)
    return [
        Sample(item.prompt_ids, [], item.completion_ids, item.completion_mask)
        for item in engine.rollout(questions, 1, greedy=True)
    ]


def measure_inputs(
    parent: Parent, kinds: Sequence[str], folder: Path, shard: tuple[int, int]
) -> None:
    """Second moments, their inverse and products, from a whole model or a layer at a time."""
    from launch.calibration_batches import Batches
    from merge.calibration import collect_second_moments, save_stats
    from merge.streaming import stream_statistics
    from merge.sums import shard_name, shard_suffix, weight_checksums

    section = parent.section
    streams = parent.streams  # asked before a model takes memory
    samples = parent.samples(section.batch_size, shard)
    batches = Batches(
        samples, section.batch_size, parent.processor,
        tokens=section.tokens, max_tokens=section.max_tokens,
    )  # fmt: skip
    if streams:
        parent.unload()
        stream_statistics(
            parent.checkpoint, batches, folder, kinds=kinds, dtype=parent.dtype,
            device=section.device, damping=section.damping, shard=shard, families=parent.families,
        )  # fmt: skip
        return
    weights = weight_checksums(parent.checkpoint, parent.family, "diagonal")
    key = _settings_key(parent, weights)
    unfinished = folder / f".unfinished{shard_suffix(shard)}-{key}.safetensors"
    for stale in unfinished_sums(folder, shard):
        if stale != unfinished:
            stale.unlink(missing_ok=True)
    moments = collect_second_moments(
        parent.load(), batches, shard=shard, unfinished=unfinished, families=parent.families
    )
    save_stats(moments, folder / shard_name("diagonal", shard), weights=weights)
    unfinished.unlink(missing_ok=True)


def unfinished_sums(folder: Path, shard: tuple[int, int] = WHOLE) -> list[Path]:
    """Sums that calibrations of these batches have left; not those of other shards."""
    from merge.sums import shard_suffix

    own = re.compile(rf"\.unfinished{shard_suffix(shard)}-[0-9a-f]{{16}}\.safetensors")
    return sorted(path for path in folder.glob(".unfinished*") if own.fullmatch(path.name))


def measure_fisher(parent: Parent, folder: Path, shard: tuple[int, int]) -> None:
    """Squared gradients of the answers alone, a sequence at a time; of a whole model or a layer."""
    from launch.calibration_batches import Batches
    from merge.fisher import collect_fisher, save_fisher
    from merge.fisher_streaming import stream_fisher
    from merge.sums import shard_name, weight_checksums

    streams = parent.streams_fisher  # asked before a model takes memory
    samples = parent.samples(1, shard)
    batches = Batches(
        samples, 1, parent.processor, tokens="answer", max_tokens=parent.section.max_tokens
    )
    if streams:
        parent.unload()
        stream_fisher(
            parent.checkpoint, batches, folder, dtype=parent.dtype, device=parent.section.device,
            shard=shard, families=parent.families,
        )  # fmt: skip
        return
    fisher = collect_fisher(parent.load(), batches, shard=shard, families=parent.families)
    path = folder / shard_name("fisher", shard)
    weights = weight_checksums(parent.checkpoint, parent.family, "fisher")
    save_fisher(fisher, path, weights=weights)


def _settings_key(parent: Parent, weights: dict[str, str]) -> str:
    """Hash of what decides on unfinished sums, so that other settings do not go on with them."""
    config, role = parent.config, parent.role
    environment = environment_inputs(config.environment)
    samples = {**calibration_inputs(config, role), **length_inputs(config, role)}.values()
    settings = [asdict(parent.section), environment, weights, *samples]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
