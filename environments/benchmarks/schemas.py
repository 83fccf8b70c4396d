"""Published schemas: from one row of a benchmark to the project's questions.

A question is the plain dict that the atlas yields, too (`environments.atlas.questions`):

    id, kind, split, question, answers, image, entity_names, gold_passages,
    answer_kind   which check of an answer fits (`rewards.answer.KINDS`); None: the gold shows it
    range         [low, high] of a number, where the benchmark gives one
    question_type InfoSeek's: String, Numerical or Time
    options       LiveVQA's choices; they are not shown to the policy

`image` is still the published value here; `registry` decodes it when the question is asked.
Sources of the columns, all read in public: the data set's card or its official script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from environments.benchmarks.rows import PICTURE_COLUMN, Row
from environments.benchmarks.table import read_table

Schema = Callable[[Row, str], list[dict[str, Any]]]
"""(row, split) -> its questions; `split` is used where the row names none."""

_IMAGE_TAG = re.compile(r"<image>")


def read_fvqa(row: Row, split: str) -> list[dict[str, Any]]:
    """FVQA and every test set that MMSearch-R1 publishes in the same form (lmms-lab/FVQA).

    prompt [{role, content}], images [{bytes}], reward_model {ground_truth, candidate_answers,
    style}, data_source, image_urls, data_id, category. `candidate_answers` is a JSON list in a
    string; it may hold an ISO code or a flag emoji beside the name.
    """
    prompt = row.need("prompt")
    contents = [
        message.get("content")
        for message in (prompt if isinstance(prompt, list) else [])
        if isinstance(message, dict) and message.get("role", "user") == "user"
    ]
    if not contents or not isinstance(contents[-1], str):
        row.fail("prompt", "no message of the user", "write [{'role': 'user', 'content': ...}]")
    text = _IMAGE_TAG.sub("", contents[-1]).strip()
    if not text:
        row.fail("prompt", "the question is empty", "fill it in or drop the row")
    images = row.get("images", [])
    if not isinstance(images, list | tuple):
        images = [images]
    if len(images) > 1:
        row.fail("images", f"{len(images)} pictures", "a question takes one; drop the row")
    column = "reward_model.ground_truth"
    aliases = _json_list(row, "reward_model.candidate_answers")
    return [
        _question(
            row.text("data_id"),
            row.get("category") or row.get("data_source") or "all",
            _split_of(str(row.get("data_source", "")), split),
            text,
            row.answers(column, row.texts(column), aliases),
            images[0] if images else None,
            "images",
        )
    ]


def read_infoseek(row: Row, split: str) -> list[dict[str, Any]]:
    """InfoSeek's annotation files (infoseek_val.jsonl and its kin), pictures from OVEN.

    data_id, image_id, question, answer [text], answer_eval [text or {wikidata, range}], data_split;
    from the files infoseek_val_qtype.jsonl and infoseek_val_withkb.jsonl beside it, where they are
    there: question_type, entity_id, entity_text.
    """
    evaluated = row.get("answer_eval", [])
    evaluated = evaluated if isinstance(evaluated, list) else [evaluated]
    ranges = [item for item in evaluated if isinstance(item, dict)]
    aliases = [str(item) for item in evaluated if not isinstance(item, dict) and item is not None]
    kind = str(row.get("question_type") or ("Numerical" if ranges else "String"))
    question = _question(
        row.text("data_id"),
        kind,
        str(row.get("data_split", split)),
        row.text("question"),
        row.answers("answer", row.texts("answer"), [a.strip() for a in aliases if a.strip()]),
        row.text("image_id"),
        "image_id",
        answer_kind="number" if ranges else None,
        entity=row.get("entity_id"),
        entity_names=row.texts("entity_text"),
    )
    question["question_type"] = kind
    if ranges:
        question["range"] = _range(row, ranges[0])
    elif kind.lower() == "numerical":
        row.fail("answer_eval", "no range of a numerical answer", "copy the file again")
    return [question]


def read_mmsearch(row: Row, split: str) -> list[dict[str, Any]]:
    """MMSearch, subset end2end (CaraJ/MMSearch): 300 questions, 171 of them with a picture.

    sample_id, query, query_image, image_search_result, area, subfield, timestamp, gt_requery,
    gt_answer, alternative_gt_answers.
    """
    answers = row.answers("gt_answer", row.texts("gt_answer"), row.texts("alternative_gt_answers"))
    question = _question(
        row.text("sample_id"),
        str(row.get("area", "all")),
        split,
        row.text("query"),
        answers,
        row.get("query_image"),
        "query_image",
    )
    return [{**question, "subfield": row.get("subfield"), "timestamp": row.get("timestamp")}]


def read_livevqa(row: Row, split: str) -> list[dict[str, Any]]:
    """LiveVQA, both forms: benchmark.json of its repository, and one row a question (LiveVQA-new).

    id, img_path, level1_qa and level2_qa {question, question_type, options, Ground_Truth (a
    letter), Ground_Truth_List, img_path}, source, time; or id, img_path, level, topic and the same
    columns without nesting. Asked openly, as search agents do, against Ground_Truth_List.
    """
    if row.get("level1_qa") is None and row.get("level2_qa") is None:
        level = row.get("level")
        kind = f"level{level}" if isinstance(level, int) else str(level or "all")
        return [_live_question(row, "", kind.lower().replace(" ", ""), split, row.text("id"))]
    return [
        _live_question(row, f"{level}_qa.", level, split, f"{row.text('id')}/{level}")
        for level in ("level1", "level2")
        if row.get(f"{level}_qa") is not None
    ]


def read_search_r1(row: Row, split: str) -> list[dict[str, Any]]:
    """NQ and HotpotQA as Search-R1 publishes them (PeterJinGo/nq_hotpotqa_train).

    id, question, golden_answers, data_source, prompt, ability, reward_model {style, ground_truth
    {target}}, extra_info {split, index}.
    """
    number = row.get("extra_info.index", row.number_of_source - 1)
    source = str(row.get("data_source", "all"))
    column = "reward_model.ground_truth.target"
    return [
        _question(
            f"{source}/{row.get('id', number)}",
            source,
            str(row.get("extra_info.split", split)),
            row.text("question"),
            row.answers(column, row.texts(column), row.texts("golden_answers")),
            None,
            "",
        )
    ]


SCHEMAS: dict[str, Schema] = {
    "fvqa": read_fvqa,
    "infoseek": read_infoseek,
    "mmsearch": read_mmsearch,
    "livevqa": read_livevqa,
    "search_r1": read_search_r1,
    "table": read_table,
}


def _question(
    identity: str,
    kind: Any,
    split: str,
    text: str,
    answers: list[str],
    image: Any,
    column: str,
    *,
    answer_kind: str | None = None,
    entity: Any = None,
    entity_names: list[str] | None = None,
) -> dict[str, Any]:
    return {
        "id": identity,
        "kind": str(kind),
        "split": split,
        "entity": entity,
        "entity_names": entity_names or [],
        "question": text,
        "answers": answers,
        "gold_passages": [],
        "answer_kind": answer_kind,
        "image": image,
        PICTURE_COLUMN: column,
    }


def _live_question(row: Row, prefix: str, level: str, split: str, identity: str) -> dict[str, Any]:
    options = row.texts(f"{prefix}options")
    answers = row.answers(f"{prefix}Ground_Truth_List", row.texts(f"{prefix}Ground_Truth_List"))
    inner, outer = f"{prefix}img_path", "img_path"
    column = inner if row.get(inner) is not None else outer
    question = _question(
        identity,
        level,
        split,
        row.text(f"{prefix}question"),
        answers,
        row.get("image", row.get(column)),
        column,
    )
    if question["image"] is None:
        row.fail(column, "missing", "every question of LiveVQA has a picture")
    return {**question, "options": options, "choice": row.get(f"{prefix}Ground_Truth")}


def _range(row: Row, value: dict[str, Any]) -> list[float]:
    try:
        low, high = (float(bound) for bound in value.get("range") or ())
    except (TypeError, ValueError):
        row.fail("answer_eval", f"no range in {value}", "write {'wikidata': v, 'range': [lo, hi]}")
    return [min(low, high), max(low, high)]


def _json_list(row: Row, column: str) -> list[str]:
    value = row.get(column, [])
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except json.JSONDecodeError as error:
            row.fail(column, f"not JSON ({error})", 'write a JSON list, such as ["a", "b"]')
    if not isinstance(value, list) or not all(isinstance(v, str | int | float) for v in value):
        row.fail(column, "not a list of texts", 'write a JSON list, such as ["a", "b"]')
    return [str(item).strip() for item in value if str(item).strip()]


def _split_of(data_source: str, split: str) -> str:
    """FVQA's data_source ends in its split: `mmsearch_r1/fvqa_train`."""
    last = data_source.rpartition("_")[2]
    return last if last in ("train", "test") else split
