"""What each checkpoint of the embedded trio can do: recognise, read, answer closed-book, search.

    obm atlas report --checkpoints FOLDER --output docs/results/trio

Reading is measured on invented facts; everything else on the atlas's own questions, through the
search environment.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from environments.atlas.entities import SPLITS, load_entities
from environments.atlas.questions import load_questions
from environments.atlas.world import load_environment
from environments.dialects import get_dialect
from train import trio_data
from train.evaluation import evaluate, summarize
from train.policy import load_policy
from train.rollout import RolloutEngine
from train.sft import IGNORE, SFTCollator, SFTExample


@torch.inference_mode()
def exact_share(
    model: Any, processor: Any, examples: Sequence[SFTExample], batch_size: int = 64
) -> float:
    """Share of examples whose learned tokens are all the model's first choice.

    That is what greedy decoding would say.

    Args:
        model: language model or VLM.
        processor: its tokenizer or processor.
        examples: with the tokens that count in `labels`.
        batch_size: examples a forward.
    """
    collate, right = SFTCollator(processor), 0
    model.eval()
    for start in range(0, len(examples), batch_size):
        batch = collate(list(examples[start : start + batch_size]))
        labels = batch.pop("labels")[:, 1:]
        choice = model(**batch).logits[:, :-1].argmax(-1)
        right += int(((choice == labels) | (labels == IGNORE)).all(1).sum())
    return right / len(examples)


def measure_trio(folders: dict[str, str], n: int = 200, seed: int = 11) -> list[dict[str, Any]]:
    """One row a measurement: checkpoint, skill, share, number of cases.

    Args:
        folders: {"base", "vlm", "agent"} -> checkpoint folder.
        n: cases a measurement, at most.
        seed: of questions, photos and samples.
    """
    rows: list[dict[str, Any]] = []

    def add(checkpoint: str, skill: str, share: float, cases: float) -> None:
        rows.append(_row(checkpoint, skill, share, cases))

    names = [entity.name for entity in load_entities().values() if entity.split != "train"]
    rng = random.Random(seed)
    for checkpoint in ("base", "agent"):
        model, tokenizer = load_policy(folders[checkpoint])
        writer = trio_data.Writer(tokenizer)
        read = trio_data.base_read(writer, names)
        share = exact_share(model, tokenizer, [read(rng) for _ in range(n)])
        add(checkpoint, "reads a passage (held-out names, invented facts)", share, n)
        engine = _engine(model, tokenizer, seed)
        for split in ("dev", "test"):
            metrics, trajectories = evaluate(engine, load_questions(split, ["text"], n, seed))
            for part, skill in (
                ("searched", "searches on text questions"),
                ("passage", "finds the gold passage"),
                ("accuracy", "answers text questions by search"),
            ):
                add(checkpoint, f"{skill}, {split}", metrics[part], len(trajectories))
        direct = _engine(model, tokenizer, seed, is_direct=True)
        metrics, trajectories = evaluate(direct, load_questions("test", ["text"], n, seed))
        add(checkpoint, "answers closed-book, test", metrics["accuracy"], len(trajectories))
    rows += measure_vlm(folders["vlm"], n, seed)
    return rows


def measure_vlm(folder: str, n: int = 200, seed: int = 11) -> list[dict[str, Any]]:
    """Recognition, reading beside a picture, closed-book answers and search rate of a VLM.

    Args:
        folder: checkpoint folder.
        n: cases a measurement, at most; recognition takes every place.
        seed: of questions, photos and samples.

    Returns:
        Rows as in measure_trio.
    """
    rows: list[dict[str, Any]] = []

    def add(skill: str, share: float, cases: float) -> None:
        rows.append(_row("vlm", skill, share, cases))

    model, processor = load_policy(folder)
    direct = _engine(model, processor, seed, is_direct=True)
    for split in SPLITS:
        metrics, _ = evaluate(direct, load_questions(split, ["image"], None, seed))
        for group in ("seen", "unseen"):
            share, cases = metrics[f"{group}/accuracy"], metrics[f"{group}/n"]
            add(f"recognises {group} flags, {split}", share, cases)
    metrics, _ = evaluate(direct, load_questions("test", ["look"], None, seed))
    add("sees the main colour, test", metrics["accuracy"], metrics["n"])
    metrics, _ = evaluate(direct, load_questions("test", ["two"], n, seed))
    add("answers two-hop questions closed-book, test", metrics["accuracy"], metrics["n"])
    mix = trio_data.VLMMix(look=0, read=1, guess=0, tool_use="none", unfamiliar=0)
    names = [entity.name for entity in load_entities().values()]
    writer = trio_data.Writer(processor.tokenizer)
    read = trio_data.vlm_instructions(writer, names, get_dialect("search_r1"), mix)
    rng = random.Random(seed)
    share = exact_share(model, processor, [read(rng) for _ in range(n)])
    add("reads a passage beside a picture", share, n)
    engine = _engine(model, processor, seed)
    questions = load_questions("dev", ["two"], n, seed)
    greedy, _ = evaluate(engine, questions)
    sampled = summarize(
        engine.rollout(questions, group_size=4), [q for q in questions for _ in range(4)]
    )
    for mode, metrics in (("greedy", greedy), ("sampled", sampled)):
        add(f"searches under the agent's prompt, {mode}, dev", metrics["searched"], metrics["n"])
        add(f"finds the gold passage, {mode}, dev", metrics["passage"], metrics["n"])
        add(f"answers two-hop questions by search, {mode}, dev", metrics["accuracy"], metrics["n"])
    return rows


def write_table(rows: Sequence[dict[str, Any]], path: str | Path, title: str, command: str) -> None:
    """Rows of equal keys as a Markdown table with the command that made it."""
    columns = list(rows[0])
    lines = [
        f"# {title}",
        "",
        f"Made by `{command}`.",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
    ]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(checkpoint: str, skill: str, share: float, cases: float) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint,
        "skill": skill,
        "share": round(float(share), 3),
        "n": int(cases),
    }


def _engine(model: Any, processor: Any, seed: int, is_direct: bool = False) -> RolloutEngine:
    environment = load_environment(
        dialect="search_r1",
        image_searches=1,
        text_searches=3,
        max_turns=5,
        top_k_text=2,
        top_k_image=3,
    )
    if is_direct:
        environment.dialect = environment.dialect.without_tools()
    return RolloutEngine(
        model,
        processor,
        environment,
        max_new_tokens_per_turn=48,
        max_completion_tokens=384,
        seed=seed,
    )
