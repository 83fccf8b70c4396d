"""Benchmarks: every published schema is read, and a bad row is one clear error."""

import base64
import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from compare.benchmarks import (
    BENCHMARKS,
    BenchmarkError,
    Selection,
    count_questions,
    iterate_benchmark,
    load_benchmark,
    official_figures,
    scoring_part,
)
from configs.schema import load_config
from configs.sections import Benchmark
from environments.benchmarks.pictures import (
    PictureError,
    check_picture_file,
    decode_picture,
    find_picture,
)
from environments.fetch import Fetched, SafeFetcher
from rewards.metrics import METRICS
from tests.environments.fake_services import FakeServices
from train.worlds import load_eval_questions, load_train_questions

COPIES = Path(__file__).parent / "benchmarks"
OVEN = str(COPIES / "infoseek" / "oven_images")
FILES = [
    ("fvqa_train", "fvqa_train.parquet"),
    ("fvqa_test", "fvqa_test.parquet"),
    ("infoseek", "infoseek/infoseek_val.jsonl"),
    ("mmsearch", "mmsearch.parquet"),
    ("livevqa", "livevqa.json"),
    ("livevqa", "livevqa_flat.parquet"),
    ("nq_hotpotqa_train", "nq_hotpotqa.parquet"),
    ("nq_hotpotqa_test", "nq_hotpotqa.parquet"),
]


def images_of(name):
    return OVEN if name == "infoseek" else None


def read_copy(name, file, **chosen):
    return load_benchmark(name, source=str(COPIES / file), images=images_of(name), **chosen)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def published(file):
    """The rows of a copy as they lie in it."""
    path = COPIES / file
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pq.read_table(path).to_pylist()


@pytest.fixture
def broken(tmp_path):
    """Loads a text copy of a benchmark's first two rows after `change` has been at the second."""

    def load(name, file, change, **chosen):
        rows = published(file)[:2]
        for row in rows:
            for key in ("images", "query_image"):
                row.pop(key, None)  # bytes are no JSON
        change(rows[1])
        source = write_rows(tmp_path / "rows.jsonl", rows)
        questions = load_benchmark(name, source=source, images=images_of(name), **chosen)
        return [question["image"] for question in questions]

    return load


# ---------------------------------------------------------------- schemas


@pytest.mark.parametrize(("name", "file"), FILES)
def test_every_copy_gives_whole_questions(name, file):
    questions = read_copy(name, file)
    assert len({question["id"] for question in questions}) == len(questions) >= 2
    for question in questions:
        assert question["question"]
        assert question["answers"]
        assert question["kind"]
        assert question["benchmark"] == name
        assert set(question["metrics"]) <= set(METRICS)
        image = question["image"]
        assert image is None or (image.mode == "RGB" and image.size == (56, 56))
    has_pictures = [question["image"] is not None for question in questions]
    assert any(has_pictures) == (not name.startswith("nq_"))


@pytest.mark.parametrize(("name", "file"), FILES)
def test_the_gold_answer_of_every_copy_scores_one_and_another_zero(name, file):
    for question in read_copy(name, file):
        for answer, expected in ((question["answers"][0], 1.0), ("nothing of the kind", 0.0)):
            turn = {
                "text": f"<think> x </think> <answer> {answer} </answer>",
                "action": {"type": "answer", "text": answer},
            }
            figures = official_figures([{"turns": [turn]}], [scoring_part(question)])
            # the first metric is the official one; the reward of MMSearch-R1 counts the format, too
            main = question["metrics"][0]
            assert figures[f"official/{main}"] == expected
            assert figures[f"strict/{main}"] == expected


def test_a_strict_score_does_not_pay_for_the_questions_own_words():
    question = {
        "id": "q", "question": "Who made the red one?", "answers": ["red"],
        "metrics": ["mmsearch"],
    }  # fmt: skip
    turn = {"text": f"<think> x </think> <answer> {question['question']} </answer>"}
    turn["action"] = {"type": "answer", "text": question["question"]}
    figures = official_figures([{"turns": [turn]}], [scoring_part(question)])
    assert figures["strict/mmsearch"] == 0.0 < figures["official/mmsearch"]


def test_fvqa_reads_the_json_list_of_aliases_and_the_split():
    japan = read_copy("fvqa_test", "fvqa_test.parquet")[1]
    assert japan["answers"] == ["Japan", "JPN", "Nippon", "🇯🇵"]
    assert (japan["id"], japan["kind"], japan["split"]) == ("fvqa_test_1", "search_free", "test")


def test_infoseek_keeps_ranges_splits_and_question_types():
    capital, area, year = read_copy("infoseek", "infoseek/infoseek_val.jsonl")
    assert capital["entity_names"] == ["Norway"]
    assert capital["split"] == "val_unseen_question"
    assert area["range"] == [14922.0, 18238.0]
    assert area["answer_kind"] == "number"
    assert year["question_type"] == "Time"
    assert year["answers"] == ["1960", "1959", "1961"]


def test_infoseek_joins_the_files_beside_it_and_does_without(tmp_path):
    folder = load_benchmark("infoseek", source=str(COPIES / "infoseek"), images=OVEN)
    file = read_copy("infoseek", "infoseek/infoseek_val.jsonl")
    assert [dict(question) for question in folder] == [dict(question) for question in file]
    shutil.copy(COPIES / "infoseek" / "infoseek_val.jsonl", tmp_path)
    alone = load_benchmark("infoseek", source=str(tmp_path), images=OVEN)
    assert [question["kind"] for question in alone] == ["String", "Numerical", "String"]
    assert [question["answers"] for question in alone] == [q["answers"] for q in file]


def test_mmsearch_asks_with_and_without_a_picture():
    both = read_copy("mmsearch", "mmsearch.parquet")
    assert [question["image"] is None for question in both] == [False, True]
    assert len(read_copy("mmsearch", "mmsearch.parquet", pictured=True)) == 1


def test_to_choose_pictured_questions_opens_no_picture(monkeypatch):
    monkeypatch.setattr("environments.benchmarks.rows.decode_picture", None)
    assert len(read_copy("mmsearch", "mmsearch.parquet", pictured=True)) == 1


def test_both_forms_of_livevqa_ask_the_same():
    nested, flat = (
        read_copy("livevqa", "livevqa.json"),
        read_copy("livevqa", "livevqa_flat.parquet"),
    )
    for one, other in zip(nested, flat, strict=True):
        for key in ("question", "answers", "kind", "options", "choice"):
            assert one[key] == other[key]
        assert one["image"].tobytes() == other["image"].tobytes()


def test_search_r1_ids_name_their_source():
    questions = read_copy("nq_hotpotqa_train", "nq_hotpotqa.parquet")
    assert [question["id"] for question in questions] == ["nq/train_0", "hotpotqa/train_1"]


def test_the_atlas_is_read_like_any_other():
    questions = load_benchmark("atlas", split="dev", kinds=["image"], limit=3)
    assert [question["kind"] for question in questions] == ["image"] * 3
    assert all(question["benchmark"] == "atlas" for question in questions)
    assert all(question["image"] is not None for question in questions)


def test_of_the_atlas_too_a_part_is_taken_before_the_first_so_many():
    def ids(**chosen):
        questions = load_benchmark("atlas", kinds=["look", "text"], **chosen)
        return [question["id"] for question in questions]

    every = ids(split="dev")
    assert ids(split="dev[5:]", limit=2) == every[5:7]
    assert ids(split="dev[:50%]", limit=10**6) == every[: round(len(every) / 2)]
    pictured = [name for name in every if name.startswith("look")]
    assert ids(split="dev", pictured=True, limit=4) == pictured[:4]
    assert ids(split="dev", limit=4) == every[:4]


def test_selection_by_kind_and_number_and_the_count():
    chosen = Selection(source=str(COPIES / "fvqa_train.parquet"), kinds=["search_required"])
    assert count_questions(iterate_benchmark("fvqa_train", chosen)) == {
        "questions": 2, "pictures": 2, "split/train": 2, "kind/search_required": 2,
    }  # fmt: skip
    assert len(read_copy("fvqa_train", "fvqa_train.parquet", limit=1)) == 1
    with pytest.raises(BenchmarkError, match="no question fits"):
        read_copy("fvqa_train", "fvqa_train.parquet", kinds=["none"])


def test_a_picture_is_decoded_when_it_is_read(tmp_path):
    rows = published("fvqa_train.parquet")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    rows[1]["images"][0]["bytes"] = b"no picture"
    table = pq.read_table(COPIES / "fvqa_train.parquet")
    pq.write_table(table.from_pylist(rows, table.schema), tmp_path / "rows.parquet")
    first, second, _ = load_benchmark("fvqa_train", source=str(tmp_path / "rows.parquet"))
    assert first["image"].size == (56, 56)
    with pytest.raises(BenchmarkError, match=r"rows.parquet, row 2, column 'images': 10 bytes"):
        second.get("image")


# ---------------------------------------------------------------- bad rows


def drop(column):
    return lambda row: row.pop(column)


def put(column, value):
    return lambda row: row.update({column: value})


INFOSEEK, FVQA, MMSEARCH, NQ = (
    ("infoseek", "infoseek/infoseek_val.jsonl"),
    ("fvqa_train", "fvqa_train.parquet"),
    ("mmsearch", "mmsearch.parquet"),
    ("nq_hotpotqa_train", "nq_hotpotqa.parquet"),
)
CASES = [
    (INFOSEEK, drop("question"), "'question': missing"),
    (INFOSEEK, put("question", "  "), "'question': is empty"),
    (INFOSEEK, put("question", ["a"]), "'question': expected text, got list"),
    (INFOSEEK, drop("data_id"), "'data_id': missing"),
    (INFOSEEK, put("data_id", "infoseek_val_00000000"), "stands in .*row 1 already"),
    (INFOSEEK, lambda row: row.update(answer=[" "], answer_eval=[]), "no usable answer"),
    (INFOSEEK, put("answer_eval", [{"wikidata": 3.0}]), "'answer_eval': no range"),
    (
        INFOSEEK,
        lambda row: row.update(answer_eval=["16580"], question_type="Numerical"),
        "no range of a numerical answer",
    ),
    (INFOSEEK, put("image_id", "oven_1"), "'image_id': no picture 'oven_1' in .*; name the folder"),
    (FVQA, put("prompt", []), "'prompt': no message of the user"),
    (FVQA, put("prompt", [{"role": "user", "content": "<image>"}]), "the question is empty"),
    (FVQA, put("reward_model", {"candidate_answers": "[", "ground_truth": "x"}), "not JSON"),
    (FVQA, put("reward_model", {"candidate_answers": "{}", "ground_truth": "x"}), "not a list"),
    (FVQA, put("reward_model", {"candidate_answers": "[]", "ground_truth": ""}), "no usable"),
    (FVQA, put("reward_model", {}), "'reward_model.ground_truth': no usable answer"),
    (FVQA, put("images", ["a.png", "b.png"]), "'images': 2 pictures"),
    (FVQA, put("images", ["https://example.org/a.png"]), "an address .*set `fetch: true`"),
    (FVQA, put("images", ["data:image/png;base64,AAAA"]), "base64 text; allow it"),
    (FVQA, put("images", [{"bytes": None, "path": None}]), "neither bytes nor path"),
    (FVQA, put("images", [7]), r"no picture \(got int\)"),
    (MMSEARCH, put("gt_answer", None), "'gt_answer': no usable answer"),
    (MMSEARCH, put("alternative_gt_answers", [["x"]]), "expected texts"),
    (NQ, lambda row: row.update(reward_model=None, golden_answers=[]), "no usable answer"),
]  # fmt: skip


@pytest.mark.parametrize(("copy", "change", "message"), CASES)
def test_a_bad_row_is_named_with_file_number_column_and_reason(broken, copy, change, message):
    with pytest.raises(BenchmarkError, match=rf"rows\.jsonl, row 2, column .*{message}") as caught:
        broken(*copy, change)
    assert ";" in str(caught.value)  # the fix
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"data_id": 1}\n{"data_id":\n')
    with pytest.raises(BenchmarkError, match=r"row 1, column 'question': missing; .* file"):
        load_benchmark("infoseek", source=str(path))
    path.write_text("[1, 2]\n")
    with pytest.raises(BenchmarkError, match="row 1: expected columns, got list"):
        load_benchmark("infoseek", source=str(path))
    path.write_text("{")
    with pytest.raises(BenchmarkError, match="row 1: not JSON"):
        load_benchmark("infoseek", source=str(path))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(BenchmarkError, match="not readable as parquet"):
        load_benchmark("mmsearch", source=str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="expected a list of rows"):
        load_benchmark("livevqa", source=str(tmp_path / "rows.json"))


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match="no file or folder"):
        load_benchmark("mmsearch", source="not/there.parquet")
    with pytest.raises(BenchmarkError, match="not on the hub; set `source`"):
        load_benchmark("infoseek")
    with pytest.raises(BenchmarkError, match="no benchmark 'okvqa'; choose one of atlas"):
        load_benchmark("okvqa")
    with pytest.raises(BenchmarkError, match="no file that ends in"):
        load_benchmark("mmsearch", source=str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    import datasets

    asked = []

    def load_dataset(source, **arguments):
        asked.append((source, arguments))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BenchmarkError, match="CaraJ/MMSearch cannot be read from the hub"):
        load_benchmark("mmsearch")
    with pytest.raises(BenchmarkError, match="no network"):
        load_benchmark("fvqa_test")
    assert asked[0][1] == {"split": "end2end", "streaming": True, "name": "end2end"}
    assert asked[1][1]["data_files"] == "fvqa_test.parquet"


@pytest.mark.parametrize(
    ("name", "file"), [("mmsearch", "mmsearch.parquet"), ("fvqa_test", "fvqa_test.parquet")]
)
def test_rows_of_the_hub_are_those_of_a_copy(monkeypatch, name, file):
    import datasets

    load_dataset = datasets.load_dataset

    def from_copy(source, **arguments):
        assert source == BENCHMARKS[name].source
        assert arguments["streaming"]
        # with pictures as a feature, which the hub's viewer would decode
        rows = load_dataset("parquet", data_files=str(COPIES / file), split="train", streaming=True)
        if name == "mmsearch":
            rows = rows.cast_column("query_image", datasets.Image())
        return rows

    monkeypatch.setattr(datasets, "load_dataset", from_copy)
    from_hub = load_benchmark(name)
    monkeypatch.undo()
    for one, other in zip(from_hub, read_copy(name, file), strict=True):
        assert {**one, "image": None} == {**other, "image": None}
        assert (one["image"] is None) == (other["image"] is None)
        assert one["image"] is None or one["image"].tobytes() == other["image"].tobytes()


def test_a_folder_is_read_file_by_file(tmp_path):
    for name in ("fvqa_train.parquet", "fvqa_test.parquet"):
        shutil.copy(COPIES / name, tmp_path / f"my_{name}")
    questions = load_benchmark("fvqa_train", source=str(tmp_path))
    assert [question["split"] for question in questions] == ["test"] * 3 + ["train"] * 3


def test_of_a_copy_of_the_hubs_folder_only_the_benchmarks_own_file_is_read(tmp_path):
    for name in ("fvqa_train.parquet", "fvqa_test.parquet"):
        shutil.copy(COPIES / name, tmp_path)
    for name, split in (("fvqa_train", "train"), ("fvqa_test", "test")):
        questions = load_benchmark(name, source=str(tmp_path))
        assert [question["split"] for question in questions] == [split] * 3


# ---------------------------------------------------------------- pictures


def png_bytes(size=(6, 4), mode="RGBA"):
    file = io.BytesIO()
    Image.new(mode, size, 7 if mode == "L" else (1, 2, 3, 255)).save(file, "PNG")
    return file.getvalue()


def test_every_stored_form_of_a_picture_is_the_same(tmp_path):
    content = png_bytes()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.png").write_bytes(content)
    encoded = base64.b64encode(content).decode()
    forms = [
        content,
        Image.open(io.BytesIO(content)),
        {"bytes": content, "path": "x.png"},
        {"bytes": None, "path": str(tmp_path / "below" / "a.png")},
        "below/a.png",
        "a",  # without its ending, in a folder below
        f"data:image/png;base64,{encoded}",
    ]
    pictures = [decode_picture(form, tmp_path, fetch=True) for form in forms]
    assert {picture.mode for picture in pictures} == {"RGB"}
    assert {picture.tobytes() for picture in pictures} == {bytes((1, 2, 3)) * 24}


@pytest.mark.parametrize(
    ("files", "name", "found"),
    [
        (["oven_1.JPEG"], "oven_1", "oven_1.JPEG"),
        (["a/x.png", "b/x.png"], "data/b/x.png", "b/x.png"),
        (["part1/a/x.png", "part1/b/x.png"], "b/x.png", "part1/b/x.png"),
        (["x.png", "c/x.png"], "b/x", "x.png"),
        (["a/Q1.png"], "Q1.jpg", "a/Q1.png"),  # a copy of another format
        (["a/Q1.png"], "Q1.TIFF", "a/Q1.png"),
        (["a/Q1.png", "a/Q1.5.png"], "Q1.5", "a/Q1.5.png"),
    ],
)
def test_of_pictures_of_one_name_the_one_whose_path_ends_alike_is_taken(
    tmp_path, files, name, found
):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert find_picture(tmp_path, name) == tmp_path / found


def test_a_picture_that_is_missing_is_not_another_of_its_name(tmp_path):
    for year in ("2023", "2024"):
        (tmp_path / year).mkdir()
    (tmp_path / "2024" / "cover.jpg").write_bytes(png_bytes())
    with pytest.raises(PictureError, match=r"no picture '2023/cover.jpg'"):
        decode_picture("2023/cover.jpg", tmp_path)


def test_a_number_after_a_dot_is_no_format(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "Q1.png").write_bytes(png_bytes())
    assert find_picture(tmp_path, "Q1.5") is None
    with pytest.raises(PictureError, match=r"no picture 'Q1.5'"):
        decode_picture("Q1.5", tmp_path)


def test_a_picture_that_may_be_several_is_refused(tmp_path):
    for year in ("2023", "2024"):
        (tmp_path / year).mkdir()
        (tmp_path / year / "cover.jpg").write_bytes(png_bytes())
    words = r"2 pictures in .* may be 'cover', such as 2023/cover.jpg and 2024/cover.jpg; name it"
    with pytest.raises(PictureError, match=words):
        decode_picture("cover", tmp_path)


def test_an_address_is_fetched_only_where_that_is_allowed(tmp_path, monkeypatch):
    asked = []

    def fetch(fetcher, url, types):
        asked.append(url)
        return Fetched(url, "image/png", "", png_bytes())

    monkeypatch.setattr(SafeFetcher, "fetch", fetch)
    with pytest.raises(PictureError, match="address"):
        decode_picture("https://example.org/a.png", tmp_path)
    assert not asked
    assert decode_picture("https://example.org/a.png", tmp_path, fetch=True).size == (6, 4)
    assert asked == ["https://example.org/a.png"]


@pytest.mark.parametrize("kind", ["image/png", "image/jpg", "image/tiff", ""])
def test_what_a_server_calls_a_picture_does_not_decide_whether_it_is_one(
    tmp_path, monkeypatch, kind
):
    local = partial(SafeFetcher, allow_loopback=True)
    monkeypatch.setattr("environments.fetch.SafeFetcher", local)
    with FakeServices() as fake:
        fake.page("/a", png_bytes(), kind)
        fake.page("/b", b"<html>", kind)
        fake.page("/c", png_bytes(), "text/html")
        assert decode_picture(f"{fake.url}/a", tmp_path, fetch=True).size == (6, 4)
        with pytest.raises(PictureError, match="that are no picture"):
            decode_picture(f"{fake.url}/b", tmp_path, fetch=True)
        with pytest.raises(PictureError, match="of a kind that cannot be read"):
            decode_picture(f"{fake.url}/c", tmp_path, fetch=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "intranet"])
def test_a_row_cannot_make_this_machine_ask_its_own_network(tmp_path, host):
    with pytest.raises(PictureError, match=rf"http://{host}/a cannot be fetched \(Only public"):
        decode_picture(f"http://{host}/a", tmp_path, fetch=True)


def test_a_picture_that_breaks_off_is_found(tmp_path):
    with pytest.raises(PictureError, match="broken picture"):
        decode_picture(png_bytes((64, 64), "L")[:80], tmp_path)


def test_a_photo_comes_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    assert decode_picture(file.getvalue(), tmp_path).size == (10, 20)


ORIENTED = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
"""EXIF data that turn by a quarter."""


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (ORIENTED, (10, 20)),
        (b"XX" + ORIENTED[2:], (20, 10)),  # SyntaxError
        (ORIENTED[:7], (20, 10)),  # struct.error
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_photo_with_broken_exif_stays_as_it_is(tmp_path, exif, size, kind):
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, kind, exif=b"Exif\0\0" + exif)
    picture = decode_picture(file.getvalue(), tmp_path)
    assert (picture.size, picture.mode) == (size, "RGB")
    assert decode_picture(picture, tmp_path).size == size  # and is not turned again


def test_grey_with_sixteen_bits_keeps_its_shades(tmp_path):
    shades = np.array([[0, 255, 256, 32_768, 65_535]], dtype=np.uint16)
    for kind, values in (("PNG", shades), ("TIFF", shades), ("TIFF", shades.astype(">u2"))):
        file = io.BytesIO()
        Image.fromarray(values).save(file, kind)
        picture = decode_picture(file.getvalue(), tmp_path)
        # the upper eight bits: value // 256
        assert np.asarray(picture)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]
    file = io.BytesIO()
    Image.fromarray(shades).save(file, "PNG", transparency=65_535)
    assert decode_picture(file.getvalue(), tmp_path).getpixel((3, 0)) == (128, 128, 128)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_usual_formats_are_pictures(tmp_path, kind):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a", kind)
    check_picture_file("a", tmp_path)
    assert decode_picture("a", tmp_path).size == (6, 4)


def test_a_program_in_postscript_is_no_picture(tmp_path):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(content)
    assert Image.open(tmp_path / "a.png").format == "EPS"
    with pytest.raises(PictureError, match=r"a\.png is no picture"):
        check_picture_file("a.png", tmp_path)
    with pytest.raises(PictureError, match="that are no picture"):
        decode_picture(content, tmp_path)


# ---------------------------------------------------------------- settings


def test_the_settings_know_every_benchmark():
    assert set(get_args(get_type_hints(Benchmark)["name"])) == set(BENCHMARKS)


def test_training_and_evaluation_may_ask_a_benchmark(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\n"
        "environment:\n"
        "  train_benchmark: {name: fvqa_train, kinds: [search_required]}\n"
    )
    config = load_config(
        path,
        [
            f"environment.train_benchmark.source={COPIES / 'fvqa_train.parquet'}",
            "environment.eval_benchmark.name=mmsearch",
            f"environment.eval_benchmark.source={COPIES / 'mmsearch.parquet'}",
        ],
    )
    assert [q["id"] for q in load_train_questions(config)] == ["fvqa_train_0", "fvqa_train_2"]
    assert [q["id"] for q in load_eval_questions(config)] == ["knowledge_geo_0", "news_1"]
    plain = load_config(path, ["environment.train_benchmark=", "environment.train_size=2"])
    assert [q["kind"] for q in load_train_questions(plain)] == ["two", "two"]
