"""Lines of trajectories.jsonl in the shape of a real run's, scripted: any number, any arms."""

import json
import random
from pathlib import Path

PLACES = ("Peru", "Japan", "Mali", "Norway", "Zürich", "日本", "Côte d'Ivoire", "Peru 🇵🇪")
RELATIONS = ("capital", "currency", "longest border", "national anthem")
PROMPT = (
    "Think, then search with <search> query </search> or <search> <img> </search> if you need, "
    "then <answer>.\nQuestion: "
)


def turn(text, action, *, observation=None, hits=(), random=None, pieces=None, **extra):
    """One turn; its tokens are words with the space before them."""
    pieces = pieces or [f" {word}" for word in text.split(" ")]
    random = random or __import__("random").Random(text)
    logprobs = [round(-(random.random() ** 6) * 4, 3) + 0.0 for _ in pieces]
    return {
        "text": text, "n_tokens": len(pieces), "logprob": round(sum(logprobs), 4), "entropy": 0.21,
        "action": action, "observation": observation,
        "n_observation_tokens": len((observation or "").split()), "images": [], "hits": list(hits),
        "is_error": False, "fault": None, "seconds": 0.0004 if observation else 0.0, "retries": 0,
        "tokens": pieces, "logprobs": logprobs, **extra,
    }  # fmt: skip


def line(step=0, arm="obm", seed=0, question=0, *, is_right=True, phase="eval", **extra):
    """An episode of two turns: a search, then an answer."""
    place, relation = PLACES[question % len(PLACES)], RELATIONS[question % len(RELATIONS)]
    generator = random.Random(f"{step} {arm} {seed} {question} {phase}")
    gold = f"{place.lower()}/{question}"
    answer = f"{relation} of {place}" if is_right else f"{relation} of nobody, step {step // 20}"
    query = f"{relation} of {place}" if is_right else f"{relation} of flag {step // 10}"
    observation = (
        f"\n\n<information> Doc 1(Title: {place}) The {relation} of {place} is well known, page "
        f"{question}. Doc 2(Title: other) Nothing is known of {place}. </information>\n\n"
    )
    turns = [
        turn(f"<think> {place} </think> <search> {query} </search>",
             {"type": "search", "query": query}, observation=observation,
             hits=[gold, "other/news"] if is_right else ["other/news"], random=generator),
        turn(f"<think> {relation} </think> <answer> {answer} </answer>",
             {"type": "answer", "text": answer}, random=generator),
    ]  # fmt: skip
    return {
        "schema_version": 2, "step": step, "phase": phase, "arm": arm, "seed": seed,
        "question_id": f"two/{question}", "kind": ("two", "image")[question % 2],
        "seen": question % 3 == 0, "n_prompt_tokens": 58, "images": [], "turns": turns,
        "prompt": f"{PROMPT}What is the {relation} of place {question}?",
        "stop_reason": "answer", "answer": answer,
        "rewards": {"accuracy": float(is_right), "format": 1.0, "search_penalty": 0.1,
                    "total": 1.0 if is_right else 0.1},
        "gold": {"answers": [f"{relation} of {place}"], "hits": [gold]}, **extra,
    }  # fmt: skip


def run_of(n_questions, steps, arm="obm", seed=0):
    """A run's evaluations: the later, the more answers are right."""
    order = random.Random(f"{arm} {seed}")
    hardness = [order.random() for _ in range(n_questions)]
    return [
        line(step, arm, seed, question, is_right=hardness[question] < 0.2 + n / len(steps) / 2)
        for n, step in enumerate(steps)
        for question in range(n_questions)
    ]


def write_lines(folder, rows, end=""):
    """Writes trajectories.jsonl as a run does; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + end
    (folder / "trajectories.jsonl").write_text(text, encoding="utf-8")
    return folder
