"""What the tiny trio is trained on.

Copying and reading for the base, search for the agent, pictures for the VLM. Every draw makes a new
example from a random generator. Values are drawn anew for every example (so that only reading can
answer), half of the place names are made up, and no fact of the atlas itself is ever shown.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from environments.atlas.entities import HEADLINE_RELATIONS, TOPICS, load_entities, load_flag
from environments.atlas.passages import NEWS_WORDINGS, OVERVIEW_WORDINGS, load_passages, state_facts
from environments.atlas.photos import render_photo, render_unfamiliar_flag
from environments.atlas.questions import (
    IMAGE_WORDINGS,
    LOOK_WORDING,
    ONE_PLACE_KINDS,
    THREE_WORDING,
    TWO_WORDING,
    list_questions,
    main_colour,
)
from environments.dialects import Dialect, get_dialect
from train.sft import IGNORE, SFTExample
from train.tiny import SPECIAL_TOKENS

RELATIONS = tuple(
    dict.fromkeys([*HEADLINE_RELATIONS, *(r for relations in TOPICS.values() for r in relations)])
)
UNKNOWN = "unknown"

# How often a text question names its place in a line above the instruction (where a picture would
# stand), before the question, and inside it. In the first two the question says "this place", as a
# picture question does: the name must come from the policy's own thought, not from the words after
# "of".
MENTION_WEIGHTS = (0.45, 0.4, 0.15)
TOOL_USE_LEVELS = ("none", "format", "1", "2", "5")


@dataclass(eq=False)
class Writer:
    """Turns texts into SFT examples with one tokenizer."""

    tokenizer: Any
    n_image_tokens: int = 4

    @functools.cached_property
    def picture(self) -> str:
        """Placeholders of one picture, with the marks around them."""
        return "<|vision_start|>" + "<|image_pad|>" * self.n_image_tokens + "<|vision_end|>"

    def write(
        self, segments: Sequence[tuple[str, bool]], images: Sequence[Image.Image] = ()
    ) -> SFTExample:
        """One example of text that is read and text that is learned.

        Args:
            segments: (text, learned?) in order, tokenised apart exactly as a rollout appends them.
            images: pictures, in the order of their placeholders.
        """
        input_ids: list[int] = []
        labels: list[int] = []
        for text, is_learned in segments:
            token_ids = self.encode(text)
            input_ids += token_ids
            labels += token_ids if is_learned else [IGNORE] * len(token_ids)
        return SFTExample(input_ids, labels, list(images))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one writer a process
    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text by itself, nothing put before or behind."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(self, user: str, with_picture: bool = False) -> str:
        """The family's chat frame around one user message, up to the assistant's first token."""
        picture = self.picture if with_picture else ""
        return f"<|im_start|>user\n{picture}{user}<|im_end|>\n<|im_start|>assistant\n"


def tokenizer_corpus() -> list[str]:
    """Texts whose words the vocabulary should hold: passages, questions and the agent's phrases."""
    dialect = get_dialect("search_r1")
    corpus = [passage.text for passage in load_passages()] * 2
    for kind in ONE_PLACE_KINDS:
        for split in ("train", "dev", "test"):
            corpus += [
                _user_text(dialect.prompt(question["question"], False))
                for question in list_questions(split, kind, RELATIONS)
            ]
    for entity in load_entities().values():
        corpus += [
            f"<think> {entity.name} </think> <search> {relation} of {entity.name} </search>"
            for relation in RELATIONS
        ]
        results = f"Doc 1(Title: {entity.name}) Doc 2(Title: {entity.name})"
        corpus += [f"\n\n<information> {results} </information>\n\n"] * 6
        corpus += [
            f"<think> {entity.name} </think> <answer> {answer} </answer>"
            for answers in entity.relations.values()
            for answer in answers[:1]
        ]
    return corpus


# ---------------------------------------------------------------- invented worlds


@functools.cache
def _words() -> tuple[str, ...]:
    """Every word that occurs in the atlas's values: material for made-up names and values."""
    words = {
        w
        for e in load_entities().values()
        for answers in e.relations.values()
        for w in answers[0].split()
        if w.isalpha()
    }
    return tuple(sorted(words))


@functools.cache
def _values(relation: str) -> tuple[str, ...]:
    return tuple(
        sorted(
            {e.relations[relation][0] for e in load_entities().values() if relation in e.relations}
        )
    )


def draw_name(rng: random.Random, names: Sequence[str], made_up: float = 0.5) -> str:
    """A known place name, or (with probability `made_up`) one to three random words."""
    if rng.random() < made_up:
        return " ".join(rng.choice(_words()) for _ in range(rng.choice((1, 1, 2, 3))))
    return rng.choice(names)


def draw_value(rng: random.Random, relation: str) -> str:
    """A value that some place has for this relation, or random words.

    Never tied to the place that is asked about.
    """
    if rng.random() < 0.4:
        return " ".join(rng.choice(_words()) for _ in range(rng.choice((1, 2, 2, 3, 4))))
    return rng.choice(_values(relation))


def draw_topic(rng: random.Random, relation: str | None = None) -> list[tuple[str, str]]:
    """(relation, value) pairs of one topic, in random order, the asked relation among them."""
    if relation is None:
        relation = rng.choice(RELATIONS)
    topic = next(relations for relations in TOPICS.values() if relation in relations)
    kept = [r for r in topic if r == relation or rng.random() < 0.85]
    rng.shuffle(kept)
    return [(r, draw_value(rng, r)) for r in kept]


def write_results(docs: Sequence[tuple[str, str]]) -> str:
    """Search results as the tool prints them."""
    return " ".join(
        f"Doc {i + 1}(Title: {title}) {text}".strip() for i, (title, text) in enumerate(docs)
    )


def _small_talk(rng: random.Random, name: str) -> str:
    return rng.choice(OVERVIEW_WORDINGS + NEWS_WORDINGS).format(name=name)


def draw_results(
    rng: random.Random, name: str, relation: str, names: Sequence[str]
) -> tuple[str, str]:
    """Results for a good query and the value that they state.

    The gold passage and one distractor, mostly gold first.
    """
    facts = draw_topic(rng, relation)
    value = dict(facts)[relation]
    other = name if rng.random() < 0.7 else draw_name(rng, names)
    if rng.random() < 0.5:
        distractor = _small_talk(rng, other)
    else:
        others = [pair for pair in draw_topic(rng) if pair[0] != relation or other != name]
        distractor = state_facts(other, others or [("flag", "seen")], rng)
    docs = [(name, state_facts(name, facts, rng)), (other, distractor)]
    if rng.random() < 0.2:
        docs.reverse()
    return write_results(docs), value


def draw_mention(
    rng: random.Random, name: str, relation: str, wording: str = TWO_WORDING
) -> tuple[str, str]:
    """(line above the instruction or nothing, question) that ask for a fact about a named place."""
    place = rng.choices(("above", "before", "inside"), MENTION_WEIGHTS)[0]
    question = wording.format(relation=relation)
    if place == "above":
        return f" {name}\n", question
    if place == "before":
        return "", f"{name}. {question}"
    return "", question.replace("this place", name)


# ---------------------------------------------------------------- base


def base_copy(writer: Writer) -> Callable[[random.Random], SFTExample]:
    """Random sequences that come again after a random gap; the loss counts the second copy.

    Makes induction heads.
    """
    plain_tokens = len(writer.tokenizer) - len(SPECIAL_TOKENS)
    # past the single bytes: whole words, as text has them
    symbols = range(256, plain_tokens)

    def draw(rng: random.Random) -> SFTExample:
        input_ids: list[int] = rng.choices(symbols, k=rng.randint(0, 12))
        labels = [IGNORE] * len(input_ids)
        while len(input_ids) < 96:
            sequence = rng.choices(symbols, k=rng.randint(6, 28))
            gap = rng.choices(symbols, k=rng.randint(1, 16))
            input_ids += sequence + gap + sequence
            labels += [IGNORE] * (len(sequence) + len(gap) + 1) + sequence[1:]
        return SFTExample(input_ids, labels)

    return draw


def base_restate(writer: Writer, names: Sequence[str]) -> Callable[[random.Random], SFTExample]:
    """Facts about several places, then the same in another order, short: "NAME REL VALUE"."""

    def draw(rng: random.Random) -> SFTExample:
        docs, facts = [], []
        for _ in range(rng.randint(1, 2)):
            name = draw_name(rng, names)
            pairs = draw_topic(rng)
            docs.append((name, state_facts(name, pairs, rng)))
            facts += [(name, relation, value) for relation, value in pairs]
        rng.shuffle(facts)
        segments: list[tuple[str, bool]] = [
            (f"<information> {write_results(docs)} </information>\n\n<think>", False)
        ]
        for name, relation, value in facts:
            segments += [
                (f" {name} {relation}", False),
                (f" {value} </think>", True),
                ("\n<think>", False),
            ]
        return writer.write(segments[:-1])

    return draw


def base_read(writer: Writer, names: Sequence[str]) -> Callable[[random.Random], SFTExample]:
    """Reading comprehension: a question and search results, the evidence restated, the answer.

    The results stand before the question or after it.
    """

    def draw(rng: random.Random) -> SFTExample:
        name, relation = draw_name(rng, names), rng.choice(RELATIONS)
        results, value = draw_results(rng, name, relation, names)
        question = f"Question: {draw_mention(rng, name, relation)[1]}"
        information = f"<information> {results} </information>"
        answer = f"<think> {relation} {value} </think> <answer> {value} </answer><|im_end|>"
        if rng.random() < 0.5:
            return writer.write(
                [(writer.chat(f"{information}\n{question}"), False), (answer, True)]
            )
        return writer.write(
            [(writer.chat(question) + f"\n\n{information}\n\n", False), (answer, True)]
        )

    return draw


def base_name(writer: Writer, names: Sequence[str]) -> Callable[[random.Random], SFTExample]:
    """Naming what a question is about, the first step of both fine-tunes."""

    def draw(rng: random.Random) -> SFTExample:
        name, relation = draw_name(rng, names), rng.choice(RELATIONS)
        above, question = draw_mention(rng, name, relation)
        return writer.write(
            [
                (writer.chat(f"{above}Question: {question}"), False),
                (f"<think> {name} </think>", True),
            ]
        )

    return draw


# ---------------------------------------------------------------- agent


def agent_search(
    writer: Writer, names: Sequence[str], dialect: Dialect
) -> Callable[[random.Random], SFTExample]:
    """Whole text search trajectories in the Search-R1 dialect: name the place, ask, read, answer.

    One in five takes two hops.
    """

    def draw(rng: random.Random) -> SFTExample:
        name, relation = draw_name(rng, names), rng.choice(RELATIONS)
        if rng.random() < 0.2:
            return _two_hops(rng, name, relation)
        above, question = draw_mention(rng, name, relation)
        results, value = draw_results(rng, name, relation, names)
        return writer.write(
            [
                (writer.chat(above + _user_text(dialect.prompt(question, False))), False),
                (f"<think> {name} </think> <search> {relation} of {name} </search>", True),
                (f"\n\n<information> {results} </information>\n\n", False),
                (
                    f"<think> {relation} {value} </think> <answer> {value} </answer><|im_end|>",
                    True,
                ),
            ]
        )

    def _two_hops(rng: random.Random, name: str, relation: str) -> SFTExample:
        neighbour = draw_name(rng, names)
        above, question = draw_mention(rng, name, relation, THREE_WORDING)
        border = [("longest border", neighbour)] + [
            pair for pair in draw_topic(rng, "longest border") if pair[0] != "longest border"
        ]
        rng.shuffle(border)
        first = write_results(
            [(name, state_facts(name, border, rng)), (name, _small_talk(rng, name))]
        )
        results, value = draw_results(rng, neighbour, relation, names)
        call = f"<search> {relation} of {neighbour} </search>"
        return writer.write(
            [
                (writer.chat(above + _user_text(dialect.prompt(question, False))), False),
                (f"<think> {name} </think> <search> longest border of {name} </search>", True),
                (f"\n\n<information> {first} </information>\n\n", False),
                (f"<think> longest border {neighbour} </think> {call}", True),
                (f"\n\n<information> {results} </information>\n\n", False),
                (
                    f"<think> {relation} {value} </think> <answer> {value} </answer><|im_end|>",
                    True,
                ),
            ]
        )

    return draw


# ---------------------------------------------------------------- VLM


@dataclass
class VLMMix:
    """Shares of the VLM's instruction data; the rest of the draws is recognition.

    Under the agent's prompt most samples still answer directly, as a VLM does that follows a tool
    prompt now and then.
    """

    look: float = 0.08
    """Says the main colour."""
    read: float = 0.25
    """Reads search results beside a picture."""
    guess: float = 0.2
    """Guesses a fact without a search."""
    tool: float = 0.03
    """Tool calls at tool_use "format"."""
    tool_use: str = "format"
    """none; format: a call and nothing after it; 1, 2, 5: that many per cent whole episodes."""
    unfamiliar: float = 0.15
    """Made-up flags, answered "unknown"."""
    agent_prompt: float = 0.5
    """Share under the agent's prompt; the rest is under the direct one."""


def vlm_instructions(
    writer: Writer, names: Sequence[str], dialect: Dialect, mix: VLMMix, strength: float = 0.5
) -> Callable[[random.Random], SFTExample]:
    """Visual instruction data.

    Name the place, its colour, read beside a picture, guess facts, and a few tool calls. A flag
    that the VLM has not been given is answered "unknown"; made-up flags teach that.
    """
    known = [entity for entity in load_entities().values() if entity.seen]
    if mix.tool_use not in TOOL_USE_LEVELS:
        raise ValueError(
            f"tool_use {mix.tool_use!r} is unknown; choose one of {', '.join(TOOL_USE_LEVELS)}"
        )
    tool_share = {"none": 0.0, "format": mix.tool, "1": 0.01, "2": 0.02, "5": 0.05}[mix.tool_use]

    def draw(rng: random.Random) -> SFTExample:
        name, colour = UNKNOWN, None
        if rng.random() < mix.unfamiliar:
            flag = render_unfamiliar_flag(rng.randrange(1 << 30))
        else:
            entity = rng.choice(known)
            flag = load_flag(entity.iso)
            name, colour = entity.name, main_colour(flag)
        photo = render_photo(flag, rng.randrange(1 << 30), strength)
        prompt = dialect.prompt if rng.random() < mix.agent_prompt else dialect.direct_prompt
        kind = rng.random()
        relation = rng.choice(RELATIONS)
        if kind < tool_share:
            return _tool_use(rng, name, relation, photo)
        kind -= tool_share
        if kind < mix.look and colour is not None:
            return _answer(prompt, LOOK_WORDING, colour, colour, photo)
        kind -= mix.look
        if 0 <= kind < mix.read and name != UNKNOWN:
            return _read(rng, name, relation, photo)
        kind -= mix.read
        if 0 <= kind < mix.guess:
            guess = rng.choice(_values(relation)) if name != UNKNOWN else UNKNOWN
            return _answer(prompt, TWO_WORDING.format(relation=relation), name, guess, photo)
        return _answer(prompt, rng.choice(IMAGE_WORDINGS), name, name, photo)

    def _answer(
        prompt: Any, question: str, thought: str, answer: str, photo: Image.Image
    ) -> SFTExample:
        user = writer.chat(_user_text(prompt(question, True)), with_picture=True)
        return writer.write(
            [
                (user, False),
                (f"<think> {thought} </think> <answer> {answer} </answer><|im_end|>", True),
            ],
            [photo],
        )

    def _read(rng: random.Random, name: str, relation: str, photo: Image.Image) -> SFTExample:
        results, value = draw_results(rng, name, relation, names)
        question = _user_text(dialect.direct_prompt(TWO_WORDING.format(relation=relation), True))
        user = writer.chat(f"<information> {results} </information>\n{question}", with_picture=True)
        return writer.write(
            [
                (user, False),
                (
                    f"<think> {relation} {value} </think> <answer> {value} </answer><|im_end|>",
                    True,
                ),
            ],
            [photo],
        )

    def _tool_use(rng: random.Random, name: str, relation: str, photo: Image.Image) -> SFTExample:
        user = writer.chat(
            _user_text(dialect.prompt(TWO_WORDING.format(relation=relation), True)),
            with_picture=True,
        )
        if mix.tool_use == "format":
            call = (
                "<search> <img> </search>"
                if name == UNKNOWN or rng.random() < 0.3
                else f"<search> {name} </search>"
            )
            return writer.write([(user, False), (f"<think> {name} </think> {call}", True)], [photo])
        segments: list[tuple[str, bool]] = [(user, False)]
        if name == UNKNOWN or rng.random() < 0.3:
            named = name if name != UNKNOWN else draw_name(rng, names)
            segments += [(f"<think> {name} </think> <search> <img> </search>", True)]
            found = write_results([(named, ""), (draw_name(rng, names), "")])
            segments += [(f"\n\n<information> {found} </information>\n\n", False)]
            name = named
        results, value = draw_results(rng, name, relation, names)
        segments += [(f"<think> {name} </think> <search> {relation} of {name} </search>", True)]
        segments += [(f"\n\n<information> {results} </information>\n\n", False)]
        segments += [
            (
                f"<think> {relation} {value} </think> <answer> {value} </answer><|im_end|>",
                True,
            )
        ]
        return writer.write(segments, [photo])

    return draw


def mixture(
    parts: Sequence[tuple[float, Callable[[random.Random], SFTExample]]],
) -> Callable[[random.Random], SFTExample]:
    """Draw from several sources by weight."""
    weights, draws = [weight for weight, _ in parts], [draw for _, draw in parts]
    return lambda rng: rng.choices(draws, weights)[0](rng)


def _user_text(messages: list[dict[str, Any]]) -> str:
    """The text of the one user message of a dialect's prompt, pictures left out."""
    content = messages[-1]["content"]
    return (
        content
        if isinstance(content, str)
        else "".join(part["text"] for part in content if part["type"] == "text")
    )
