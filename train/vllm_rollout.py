"""Multi-turn search episodes whose tokens a vLLM server draws.

Every row is a chain of requests: the context's token ids go out, a turn's token ids come back, the
episode answers, its observation is appended, and so on. Rows run side by side; the server's prefix
cache takes the place of the live cache that `train.rollout` keeps. Nothing is tokenised twice: of a
reply only the ids count, and where a turn ends is decided here, by the same rule as in process.

Exact: log-probs are those of the full distribution at the temperature (see `read_reply`), turns end
at the same token as in process, truncation and budget are the same code. Different: which tokens
are drawn (the server has its own random numbers), and entropies, which the server does not tell.
What stands in for the entropy of a position is minus the log-prob of the token drawn there; its
expectation is the entropy.

Randomness: the server draws turn t of row r of rollout number n with a seed made of
(seed, n, r, t), so a rollout can be repeated, by any number of processes, as far as the server
computes the same logits again.
"""

from __future__ import annotations

import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.episodes import EpisodeEngine
from train.leash import is_alive, name_myself
from train.trajectories import Trajectory, Turn
from train.vision import EncodedImage
from train.vllm_client import Reply, Sampling, ServerImage, VLLMClient, VLLMError
from train.weights import weight_bytes, write_weights

MAX_REQUESTS = 64
"""Requests under way at a time; the server queues what it cannot batch."""


@dataclass
class _Row:
    """One episode under way."""

    number: int
    """among all processes' rows: part of the seed"""
    question: dict[str, Any]
    episode: Any
    trajectory: Trajectory
    pictures: list[EncodedImage]
    """of the context, in order"""
    context: list[int] = field(default_factory=list)
    """prompt, turns and observations so far"""
    room: int = 0
    """tokens left in the episode's budget"""


class VLLMRolloutEngine(EpisodeEngine):
    """Rolls out search episodes with a policy on a vLLM server.

    Args:
        model: the policy in this process: gives token ids, and the weights to send.
        processor: see `EpisodeEngine`.
        environment: see there.
        client: the server.
        sync_folder: where weights are handed over; the server must see it under the same path.
            None = shared memory, for a server on this machine.
        settings: keyword arguments of `EpisodeEngine`; `max_rows` bounds the requests under way.

    Raises:
        VLLMError: the server is not there, or was started without an option that is needed.
        ValueError: a nucleus: the server would report its log-probs, not those of the policy.
    """

    is_remote = True

    def __init__(
        self,
        model: Any,
        processor: Any,
        environment: Any,
        *,
        client: VLLMClient,
        sync_folder: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, processor, environment, **settings)
        if self.top_p < 1.0:
            raise ValueError(
                f"top_p {self.top_p} does not go with a vLLM server, which then reports log-probs "
                "of the nucleus instead of the policy's; set grpo.top_p to 1.0"
            )
        self.client = client
        self.server = client.check(n_barred=len(self._suppressed))
        self.sync_folder = sync_folder
        self._server_version: str | None = None
        self._encoded: dict[str, Future[ServerImage]] = {}

    # ---------------------------------------------------------------- the server's policy

    def send_policy(self, model: Any, version: int) -> None:
        """Writes the weights and has the server load them; one process does this for all.

        Args:
            model: the policy, adapters included; see `train.weights.write_weights`.
            version: optimizer step that the weights are of.

        Raises:
            VLLMError: no room for the weights, or the server does not take them.
        """
        with _handover_folder(self.sync_folder) as folder:
            _require_room(folder.parent, weight_bytes(model))
            write_weights(model, folder)
            # a name of its own, so that no other trainer's weights are taken for ours
            self.client.update_policy(str(folder), f"{secrets.token_hex(4)}-{version}")
        self.confirm_policy(version)

    def confirm_policy(self, version: int) -> None:
        """Notes which weights the server has; every process calls it after an update."""
        super().confirm_policy(version)
        self.client.forget_images()
        self._server_version = self.client.policy_version()

    def wake(self) -> None:
        """Has the server take its GPU memory back."""
        self.client.wake()

    def sleep(self) -> None:
        """Has the server give its GPU memory back until the next rollout."""
        self.client.sleep()

    def release_images(self) -> None:
        """Forgets the pictures of past rollouts."""
        super().release_images()
        self.client.forget_images()
        self._encoded.clear()

    # ---------------------------------------------------------------- rollout

    def rollout_rows(
        self,
        questions: Sequence[dict[str, Any]],
        *,
        greedy: bool = False,
        first_row: int = 0,
        number: int | None = None,
    ) -> list[Trajectory]:
        """One episode per row; see `EpisodeEngine.rollout_rows`.

        Raises:
            VLLMError: no valid answer, a context longer than the server's, or other weights than
                those that were sent.
        """
        number, prompts = self._begin(questions, number)
        if self.policy_version is None:
            self.send_policy(self.model, 0)
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        if longest + self.max_completion_tokens > self.server.max_tokens:
            raise VLLMError(
                f"rollout.url: {self.client.url} takes {self.server.max_tokens} tokens, an episode "
                f"may have {longest} of prompt and {self.max_completion_tokens} of completion; "
                "start it with a larger --max-model-len, or lower grpo.max_completion_length"
            )
        rows = []
        for i, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            episode, trajectory = self._start(question, prompt)
            pictures, context = list(prompt.pictures), list(prompt.token_ids)
            room = self.max_completion_tokens
            row = _Row(first_row + i, question, episode, trajectory, pictures, context, room)
            rows.append(row)
        n_threads = max(1, min(len(rows), self.max_rows, MAX_REQUESTS))
        requests = ThreadPoolExecutor(n_threads)
        tools = ThreadPoolExecutor(self.tool_workers) if self.tool_workers else None
        try:
            self._run(rows, requests, tools, number, greedy)
        finally:
            for pool in (requests, tools):
                if pool is not None:
                    pool.shutdown(cancel_futures=True)
        return [row.trajectory for row in rows]

    def _run(
        self,
        rows: list[_Row],
        requests: ThreadPoolExecutor,
        tools: ThreadPoolExecutor | None,
        number: int,
        greedy: bool,
    ) -> None:
        """Runs all episodes to their end; only requests and tools leave this thread."""
        speaking: dict[Future[Reply], _Row] = {}
        searching: dict[Future[Any], _Row] = {}

        def open_turn(row: _Row) -> None:
            for picture in row.pictures:
                if picture.key not in self._encoded:
                    # queued before the turn that waits for it
                    self._encoded[picture.key] = requests.submit(self._encode, picture)
            script = self._scripted_ids(row.question, len(row.trajectory.turns))
            speaking[requests.submit(self._say, row, script, number, greedy)] = row

        for row in rows:
            open_turn(row)
        while speaking or searching:
            with self.timed("decode"):
                done, _ = wait([*speaking, *searching], return_when=FIRST_COMPLETED)
            for future in done:
                if future in speaking:
                    row = speaking.pop(future)
                    text, is_complete = self._end_turn(row, future.result())
                    if tools is not None:
                        step = tools.submit(row.episode.step, text, truncated=not is_complete)
                        searching[step] = row
                        continue
                    with self.timed("tools"):
                        step = row.episode.step(text, truncated=not is_complete)
                else:
                    row = searching.pop(future)
                    step = future.result()
                with self.timed("observe"):
                    pictures = self._apply(row.episode, row.trajectory, step, row.room)
                    if pictures is None:
                        continue
                    observation = row.trajectory.turns[-1].observation_ids
                    row.context += observation
                    row.room -= len(observation)
                    row.pictures += pictures
                open_turn(row)

    def _end_turn(self, row: _Row, reply: Reply) -> tuple[str, bool]:
        """Writes what was said into the trajectory; its text, and whether it came to an end."""
        ids = reply.token_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        surprise = [-logprob for logprob in reply.logprobs]
        row.trajectory.turns.append(Turn(text, ids, reply.logprobs, {}, surprise))
        row.context += ids
        row.room -= len(ids)
        return text, self._is_complete(ids)

    # ---------------------------------------------------------------- in the request threads

    def _say(self, row: _Row, script: list[int] | None, number: int, greedy: bool) -> Reply:
        """One turn of a row, up to its stop, its end token or its limit.

        The server looks for a stop anywhere in the text, we at its end: where the last token goes
        on behind the tag, the turn is asked on.
        """
        limit = min(self.max_new_tokens_per_turn, row.room)
        images = [self._encoded[picture.key].result() for picture in row.pictures]
        said, part = Reply([], []), 0
        while len(said.token_ids) < limit:
            n_said = len(said.token_ids)
            forced = script[n_said] if script is not None and n_said < len(script) else None
            key = [self.seed, number, row.number, len(row.trajectory.turns), part]
            sampling = Sampling(
                max_tokens=1 if forced is not None else limit - n_said,
                temperature=0.0 if greedy else self.temperature,
                seed=int(np.random.SeedSequence(key).generate_state(1)[0]),
                stop=self._stops,
                stop_token_ids=tuple(sorted(self._end_ids)),
                barred=tuple(self._suppressed),
                watched=() if forced is None else (forced,),
            )
            context = row.context + said.token_ids
            reply = self.client.generate(context, images, sampling, self.image_token_id)
            if reply.version != self._server_version and reply.version is not None:
                raise VLLMError(
                    f"rollout.url: {self.client.url} answers with the weights {reply.version}, not "
                    f"with {self._server_version} that it was sent; is it restarted, or used by "
                    "another run? Give every run a server of its own"
                )
            drawn = zip(reply.token_ids, reply.logprobs, strict=True)
            if forced is not None:
                drawn = zip([forced], [reply.watched[0][forced]], strict=True)
            for token, logprob in drawn:
                said.token_ids.append(token)
                said.logprobs.append(logprob)
                if self._is_complete(said.token_ids):
                    return said
            part += 1
        return said

    def _encode(self, picture: EncodedImage) -> ServerImage:
        """The server's features of a picture; it gets the pixels that the policy saw."""
        assert self.images is not None
        image = self.client.encode(self.images.pixels(picture))
        if image.n_tokens != picture.n_tokens:
            raise VLLMError(
                f"rollout.url: {self.client.url} makes {image.n_tokens} tokens of a picture of "
                f"which the policy makes {picture.n_tokens}; serve the checkpoint that is trained, "
                "with its preprocessor"
            )
        return image


@contextmanager
def _handover_folder(parent: str | Path | None) -> Iterator[Path]:
    """A new folder that exists for one handover of weights.

    It is named after this process: what others of this machine left, that were killed in the midst
    of theirs, is removed, since it would fill the memory handover by handover. Containers may share
    the place and the machine's name, but number their processes each for itself: what lies there
    of another's is left alone.
    """
    shared = Path("/dev/shm")
    place = Path(parent or (shared if shared.is_dir() else tempfile.gettempdir()))
    place.mkdir(parents=True, exist_ok=True)
    numbering = Path("/proc/self/ns/pid")
    ours = f"policy-{socket.gethostname()}-"
    ours += f"{numbering.stat().st_ino if numbering.exists() else 0}-"
    for path in place.glob(f"{ours}*"):
        left = re.fullmatch(rf"{re.escape(ours)}(\d+:[\d.]+)-\w+", path.name)
        if left is not None and not is_alive(left[1]):
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{ours}{name_myself()}-", dir=place) as folder:
        Path(folder).chmod(0o755)  # the server may be another user
        yield Path(folder)


def _require_room(place: Path, n_bytes: int) -> None:
    """Refuses a folder that the weights do not fit into: a container's shared memory is 64 MB."""
    free = shutil.disk_usage(place).free
    if n_bytes > free:
        raise VLLMError(
            f"rollout.sync_dir: {place} has {free / 1e9:.2f} GB free, the policy's weights take "
            f"{n_bytes / 1e9:.2f}; name a folder with room that the server sees, too, or start the "
            "container with more shared memory (--shm-size)"
        )
