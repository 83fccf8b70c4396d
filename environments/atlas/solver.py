"""A solver of the atlas's questions: it knows the graph, and says only what the tools have shown.

It asks as the trio's agent was taught to: name the place (by an image search where the VLM has
not seen its picture), search for the fact, read, answer. What it answers it has found: where a
search does not return the passage or the name, it gives up, so that its episodes teach no guesses.
"""

from __future__ import annotations

from typing import Any

from environments.actions import Answer, ImageSearch, Search
from environments.atlas.entities import TOPIC_OF, load_entities
from environments.episode import Episode
from environments.errors import EnvironmentSetupError

UNKNOWN = "unknown"
"""What the solver thinks of a picture that it has to search for; the trio's VLM says so, too."""
BORDER = "longest border"


def next_turn(episode: Episode) -> str | None:
    """The solver's next turn in a running episode, in the episode's dialect.

    Args:
        episode: of one of the atlas's questions.

    Returns:
        The turn's text; None where the evidence is missing or a budget does not reach.

    Raises:
        EnvironmentSetupError: a question of another world.
    """
    question, write = episode.question, episode.dialect.write
    if "entity" not in question or "gold_passages" not in question:
        raise EnvironmentSetupError(
            f"question {question.get('id')!r} is none of the atlas; its solver cannot answer it"
        )
    kind, name = question["kind"], question["entity_names"][0]
    answer = question["answers"][0]
    if kind == "look":
        return write(answer, Answer(answer))
    if kind != "text" and not question["seen"]:
        if episode.n_image == 0:
            is_offered = episode.image_searches > 0 and episode.image_index is not None
            return write(UNKNOWN, ImageSearch(_region(question))) if is_offered else None
        if not episode.queries and name not in _titles(episode):
            return None
    if kind == "image":
        return write(name, Answer(name))
    hops = _hops(question)
    n_done = len(episode.queries)
    if len(hops) > episode.text_searches or (n_done and hops[n_done - 1][2] not in _hits(episode)):
        return None
    if n_done == len(hops):
        return write(f"{question['relation']} {answer}", Answer(answer))
    place, relation, _ = hops[n_done]
    thought = f"{BORDER} {place}" if n_done else place
    return write(thought, Search(f"{relation} of {place}"))


def _hops(question: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(place, relation, passage that states it) of every text search that the question needs."""
    gold = question["gold_passages"][0]
    name = question["entity_names"][0]
    if question["kind"] != "three":
        return [(name, question["relation"], gold)]
    iso, _, page = gold.partition("/")
    _, dated, year = page.partition("@")
    border = f"{question['entity']}/{TOPIC_OF[BORDER]}{dated}{year}"
    return [(name, BORDER, border), (load_entities()[iso].name, question["relation"], gold)]


def _region(question: dict[str, Any]) -> str:
    """Which part of the picture shows the place."""
    scene = question.get("scene")
    return "full" if scene is None else ("left", "right")[scene.index(question["entity"])]


def _hits(episode: Episode) -> list[str]:
    result = episode.results[-1]
    return [] if result is None else list(result.hits)


def _titles(episode: Episode) -> list[str]:
    result = episode.results[-1]
    return [] if result is None else [hit.title for hit in result.documents]
