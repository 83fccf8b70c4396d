"""Makes tests/compare/benchmarks: a few rows in each published schema, pictures and text our own.

    python tests/compare/make_copies.py

The questions are about the atlas' places, so that its tools can answer them. Columns, their
types and their oddities (a JSON list in a string, texts beside objects, nulls) are those of the
originals.
"""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from environments.atlas.entities import load_flag
from environments.atlas.photos import render_photo

FOLDER = Path(__file__).parent / "benchmarks"
BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(iso: str, kind: str = "JPEG") -> bytes:
    """A photo of a flag as a small file."""
    file = io.BytesIO()
    render_photo(load_flag(iso), 7, 0.3).save(file, kind)
    return file.getvalue()


def image_column(path: str) -> dict[bytes, bytes]:
    """The metadata with which `datasets` marks a column as pictures."""
    features = {"info": {"features": {path: {"_type": "Image"}}}}
    return {b"huggingface": json.dumps(features).encode()}


def write(name: str, rows: list[dict], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), FOLDER / name, compression="zstd")


def make_fvqa() -> None:
    """lmms-lab/FVQA."""
    schema = pa.schema(
        [
            ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
            ("images", pa.list_(BYTES)),
            (
                "reward_model",
                pa.struct(
                    [
                        ("candidate_answers", pa.string()),
                        ("ground_truth", pa.string()),
                        ("style", pa.string()),
                    ]
                ),
            ),
            ("data_source", pa.string()),
            ("image_urls", pa.list_(pa.string())),
            ("data_id", pa.string()),
            ("category", pa.string()),
        ]
    )
    asked = [
        ("fr", "What is the capital of this place?", "Paris", ["Paris, France"], "search_required"),
        ("jp", "Which place is this?", "Japan", ["JPN", "Nippon", "🇯🇵"], "search_free"),
        ("pe", "What is the currency of this place?", "sol", ["Peruvian sol"], "search_required"),
    ]
    for split in ("train", "test"):
        rows = [
            {
                "prompt": [{"content": question, "role": "user"}],
                "images": [{"bytes": picture(iso), "path": None}],
                "reward_model": {
                    "candidate_answers": json.dumps(aliases, ensure_ascii=False),
                    "ground_truth": answer,
                    "style": "rule",
                },
                "data_source": f"mmsearch_r1/fvqa_{split}",
                "image_urls": None,
                "data_id": f"fvqa_{split}_{i}",
                "category": category,
            }
            for i, (iso, question, answer, aliases, category) in enumerate(asked)
        ]
        write(f"fvqa_{split}.parquet", rows, schema)


def write_lines(ending: str, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path = FOLDER / "infoseek" / f"infoseek_val{ending}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def make_infoseek() -> None:
    """infoseek_val.jsonl, question types and entities in files of their own, OVEN's pictures."""
    rows = [
        {
            "data_id": "infoseek_val_00000000", "image_id": "oven_90000001",
            "question": "What is the capital of this place?", "answer": ["Oslo"],
            "answer_eval": ["Oslo", "Christiania"], "data_split": "val_unseen_question",
            "question_type": "String", "entity_id": "Q20", "entity_text": "Norway",
        },
        {
            "data_id": "infoseek_val_00000001", "image_id": "oven_90000002",
            "question": "What is the area of this place in square kilometres?",
            "answer": ["16580"],
            "answer_eval": [{"wikidata": 16580.0, "range": [14922.0, 18238.0]}],
            "data_split": "val_unseen_entity", "question_type": "Numerical",
        },
        {
            "data_id": "infoseek_val_00000002", "image_id": "oven_90000003",
            "question": "In which year did this place become independent?",
            "answer": ["1960"], "answer_eval": ["1960", "1959", "1961"],
            "data_split": "val_unseen_entity", "question_type": "Time",
        },
    ]  # fmt: skip
    apart = {"_qtype": ["question_type"], "_withkb": ["entity_id", "entity_text"]}
    moved = {name for names in apart.values() for name in names}
    write_lines("", [{k: v for k, v in row.items() if k not in moved} for row in rows])
    for ending, names in apart.items():
        there = [row for row in rows if names[0] in row]
        write_lines(ending, [{k: row[k] for k in ("data_id", *names)} for row in there])
    pictures = FOLDER / "infoseek" / "oven_images" / "09"
    pictures.mkdir(parents=True, exist_ok=True)
    for row, iso in zip(rows, ("no", "jp", "ng"), strict=True):
        (pictures / f"{row['image_id']}.jpg").write_bytes(picture(iso))


def make_mmsearch() -> None:
    """CaraJ/MMSearch, subset end2end; the second question has no picture."""
    names = ["sample_id", "query", "area", "subfield", "timestamp", "gt_requery", "gt_answer"]
    schema = pa.schema(
        [
            *((name, pa.string()) for name in names),
            ("query_image", BYTES),
            ("image_search_result", BYTES),
            ("alternative_gt_answers", pa.list_(pa.string())),
        ],
        metadata=image_column("query_image"),
    )
    rows = [
        {
            "sample_id": "knowledge_geo_0", "query": "What is the currency of this place?",
            "query_image": {"bytes": picture("ke", "PNG"), "path": "image0.png"},
            "image_search_result": None, "area": "knowledge", "subfield": "geography",
            "timestamp": "2024-08-01", "gt_requery": "currency of Kenya",
            "gt_answer": "Kenyan shilling", "alternative_gt_answers": ["shilling"],
        },
        {
            "sample_id": "news_1", "query": "What is the capital of Peru?", "query_image": None,
            "image_search_result": None, "area": "news", "subfield": "politics",
            "timestamp": "2024-08-02", "gt_requery": "capital of Peru", "gt_answer": "Lima",
            "alternative_gt_answers": None,
        },
    ]  # fmt: skip
    write("mmsearch.parquet", rows, schema)


def make_livevqa() -> None:
    """benchmark.json of LiveVQA's repository, and the flat form of LiveVQA-new."""

    def asked(question: str, kind: str, answers: list[str], others: list[str]) -> dict:
        texts = [answers[0], *others]
        options = [f"{letter}. {text}" for letter, text in zip("ABC", texts, strict=True)]
        return {
            "question": question, "question_type": kind, "options": options, "Ground_Truth": "A",
            "Ground_Truth_List": answers, "img_path": "live_0001.jpg",
            "img_url": "https://example.org/live_0001.jpg",
        }  # fmt: skip

    first = asked("Which place is this?", "location", ["Italy"], ["France", "Spain"])
    second = asked(
        "What is the capital of this place?", "location", ["Rome", "Roma"], ["Paris", "Madrid"]
    )
    row = {
        "id": "0_20250101000000000001", "img_path": "live_0001.jpg", "level1_qa": first,
        "level2_qa": second, "source": "Test News", "time": "2025-01-01T00:00:00Z",
    }  # fmt: skip
    text = json.dumps([row], ensure_ascii=False, indent=2) + "\n"
    (FOLDER / "livevqa.json").write_text(text, encoding="utf-8")
    (FOLDER / "live_0001.jpg").write_bytes(picture("it"))
    flat = [
        {"id": f"live_{level}", "level": f"Level {level}", "topic": "world", **one}
        for level, one in ((1, first), (2, second))
    ]
    texts = ["id", "level", "topic", "question", "question_type", "Ground_Truth", "img_path"]
    lists = ["options", "Ground_Truth_List"]
    schema = pa.schema(
        [*((n, pa.string()) for n in texts), *((n, pa.list_(pa.string())) for n in lists)]
    )
    write("livevqa_flat.parquet", flat, schema)


def make_search_r1() -> None:
    """PeterJinGo/nq_hotpotqa_train."""
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("question", pa.string()),
            ("golden_answers", pa.list_(pa.string())),
            ("data_source", pa.string()),
            ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
            ("ability", pa.string()),
            (
                "reward_model",
                pa.struct(
                    [
                        ("ground_truth", pa.struct([("target", pa.list_(pa.string()))])),
                        ("style", pa.string()),
                    ]
                ),
            ),
            ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
        ]
    )
    asked = [
        ("nq", "what is the capital of france?", ["Paris"]),
        ("hotpotqa", "What is the currency of the place whose capital is Lima?", ["sol"]),
    ]
    rows = [
        {
            "id": f"train_{i}", "question": question, "golden_answers": answers,
            "data_source": source, "ability": "fact-reasoning",
            "prompt": [{"content": f"Answer the question. Question: {question}\n", "role": "user"}],
            "reward_model": {"ground_truth": {"target": answers}, "style": "rule"},
            "extra_info": {"index": i, "split": "train"},
        }
        for i, (source, question, answers) in enumerate(asked)
    ]  # fmt: skip
    write("nq_hotpotqa.parquet", rows, schema)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    make_fvqa()
    make_infoseek()
    make_mmsearch()
    make_livevqa()
    make_search_r1()
