"""A table of one's own questions: what is read, and what every mistake is called."""

import base64
import difflib
import io
import json

import pytest
from PIL import Image

from environments.benchmarks.registry import load_benchmark, read_split
from environments.benchmarks.rows import BenchmarkError
from environments.benchmarks.table import ANSWER_KINDS, TAKEN
from rewards.answer import KINDS, correctness

COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown", "orange", "gold"]


@pytest.fixture
def rows(tmp_path):
    """Ten questions with pictures in a folder of their own."""
    (tmp_path / "pictures").mkdir()
    made = []
    for number, colour in enumerate(COLOURS):
        name = f"pictures/{colour}.{'png' if number % 2 else 'jpg'}"
        Image.new("RGB", (56, 56), colour).save(tmp_path / name)
        made.append({"question": f"Which colour is {number}?", "answers": [colour], "image": name})
    return made


@pytest.fixture
def write(tmp_path):
    def _write(rows, name="mine.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return _write


def load(source, **chosen):
    return load_benchmark("table", source=source, **chosen)


def test_ten_rows_with_pictures_are_ten_questions(rows, write):
    questions = load(write(rows))
    assert [question["id"] for question in questions] == [str(n) for n in range(1, 11)]
    assert [question["answers"] for question in questions] == [[colour] for colour in COLOURS]
    assert {(q["kind"], q["split"], *q["metrics"]) for q in questions} == {("all", "all", "em")}
    assert questions[4]["image"].getpixel((5, 5)) == (0, 0, 0)
    assert questions[4].get("image").size == (56, 56)


def test_a_spreadsheet_is_read_as_the_lines_of_a_file_are(rows, write, tmp_path):
    rows[0] |= {"answers": ["red", "crimson"], "kind": "warm", "note": "a, b"}
    rows[1] |= {"answers": ["green"], "kind": "cold", "note": ""}
    lines = ["question,answers,image,kind,note"]
    lines.append('Which colour is 0?,red | crimson,pictures/red.jpg,warm,"a, b"')
    lines.append("Which colour is 1?,green,pictures/green.png,cold,")
    (tmp_path / "mine.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    ours, sheet = load(write(rows[:2])), load(str(tmp_path / "mine.csv"))
    assert [q.pop("id") for q in sheet] == ["2", "3"]  # as a spreadsheet numbers its rows
    assert [q.pop("id") for q in ours] == ["1", "2"]
    assert [dict(q) for q in sheet] == [dict(q) for q in ours]
    assert sheet[0]["note"] == "a, b"


def test_rows_of_several_files_are_counted_on(rows, write, tmp_path):
    (tmp_path / "tables").mkdir()
    for row in rows:
        row["image"] = f"../{row['image']}"
    write(rows[:2], "tables/a.jsonl")
    (tmp_path / "tables" / "b.csv").write_text("question,answers\nWho?,Ann\n")
    write(rows[2:3], "tables/c.jsonl")
    questions = load(str(tmp_path / "tables"))
    # a's rows are 1 and 2; b's first is 2, as a spreadsheet has it; c's is 1
    assert [question["id"] for question in questions] == ["1", "2", "4", "5"]


def test_columns_of_ones_own_travel_with_the_question(rows, write):
    rows[0] |= {"difficulty": 3, "source": {"page": 7}, "id": "first"}
    [question] = load(write(rows[:1]))
    assert (question["id"], question["difficulty"]) == ("first", 3)
    assert question["source"] == {"page": 7}


def test_numbers_that_the_rewards_read_are_numbers_in_a_spreadsheet_too(rows, write, tmp_path):
    rows[0] |= {"tolerance": 0.5, "best_calls": None, "hops": 2, "range": [1, 2.5]}
    rows[1] |= {"tolerance": "", "range": ""}
    lines = ["question,answers,tolerance,best_calls,hops,range", "a,b,0.5,,2,1 | 2.5", "c,d,,,,"]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    columns = ("tolerance", "best_calls", "hops", "range")
    first, second = ([q[c] for c in columns] for q in load(str(tmp_path / "mine.csv")))
    assert (first, second) == ([0.5, None, 2, [1, 2.5]], [None] * 4)
    ours = load(write(rows[:3]))
    assert [ours[0][column] for column in columns] == first
    assert (ours[1]["tolerance"], ours[1]["range"]) == (None, None)
    assert not set(columns) & set(ours[2])


def test_whole_numbers_that_pandas_made_floats_are_whole_again(rows, write):
    rows[0] |= {"answers": 1889.0, "id": 17.0}
    rows[1] |= {"answers": [1889.0, 2.5, "1889.0", 1e300], "id": 18.5}
    first, second = load(write(rows[:2]))
    assert (first["id"], first["answers"]) == ("17", ["1889"])
    assert (second["id"], second["answers"]) == ("18.5", ["1889", "2.5", "1889.0", "1e+300"])


def test_a_tolerance_in_years_and_a_unit_are_read(rows, write):
    rows[0] |= {"answers": ["1889"], "tolerance": 2, "unit": ""}
    rows[1] |= {"answers": ["10"], "answer_kind": "number", "tolerance": 1, "unit": " km "}
    year, length = load(write(rows[:2]))
    assert (year["unit"], length["unit"]) == (None, "km")
    assert correctness("1891", year, "typed") == correctness("15 km", length, "typed") == 1.0
    assert correctness("1892", year, "typed") == correctness("15 kg", length, "typed") == 0.0


def test_lists_that_the_rewards_read_are_lists_in_a_spreadsheet_too(rows, write, tmp_path):
    lines = ["question,answers,answer_kind,items,choices", "a,red|blue,list,red | blue,"]
    lines += ["c,B,choice,,Paris | Rome", "d,B,choice,,"]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    first, second, third = load(str(tmp_path / "mine.csv"))
    assert (first["items"], first["choices"]) == (["red", "blue"], None)
    assert (second["items"], second["choices"]) == (None, ["Paris", "Rome"])
    assert correctness("blue, red", first, "typed") == 1.0
    assert correctness("Rome", second, "typed") == correctness("(b)", third, "typed") == 1.0

    rows[0] |= {"items": [["red", "crimson"], 7], "choices": {"A": "Paris", "B": None}}
    rows[1] |= {"items": [], "choices": ""}
    ours = load(write(rows[:3]))
    assert (ours[0]["items"], ours[0]["choices"]) == ([["red", "crimson"], "7"], {"A": "Paris"})
    assert correctness("7; crimson", ours[0], "typed") == 1.0
    assert (ours[1]["items"], ours[1]["choices"]) == (None, None)
    assert not {"items", "choices"} & set(ours[2])


def test_a_question_may_have_no_picture(rows, write):
    del rows[0]["image"]
    rows[1]["image"] = None
    rows[2]["image"] = ""
    questions = load(write(rows))
    assert [question["image"] is None for question in questions] == [True] * 3 + [False] * 7
    assert len(load(write(rows), pictured=True)) == 7


def test_gold_passages_and_names_make_the_search_measurable(rows, write):
    rows[0] |= {"entity_names": "France | République", "gold_passages": ["p1"]}
    [question] = load(write(rows[:1]))
    assert question["entity_names"] == ["France", "République"]
    assert question["gold_passages"] == ["p1"]


# ---------------------------------------------------------------- splits


def test_a_column_or_a_fraction_tells_training_from_evaluation(rows, write):
    for number, row in enumerate(rows):
        row["split"] = "train" if number < 6 else "test"
    source = write(rows)
    assert [q["answers"][0] for q in load(source, split="test")] == COLOURS[6:]
    # 80 % of the six rows of train are 4.8, rounded 5
    assert [q["answers"][0] for q in load(source, split="train[:80%]")] == COLOURS[:5]
    assert [q["answers"][0] for q in load(source, split="train[80%:]")] == COLOURS[5:6]
    assert [q["answers"][0] for q in load(source, split="[:80%]")] == COLOURS[:8]
    assert [q["answers"][0] for q in load(source, split="[80%:]")] == COLOURS[8:]
    assert [q["answers"][0] for q in load(source, split="[2:4]", limit=1)] == COLOURS[2:3]


@pytest.mark.parametrize(
    "text", ["train[", "[80%]", "[a:b]", "train[:80%]x", "[-1:]", "[:" + "9" * 5000 + "]"]
)
def test_a_part_of_a_split_that_cannot_be_read_is_refused(text):
    with pytest.raises(BenchmarkError, match="not a part of a split; write"):
        read_split(text)


def test_a_split_that_holds_nothing_is_refused(rows, write):
    with pytest.raises(BenchmarkError, match="no question fits"):
        load(write(rows), split="train")


@pytest.mark.parametrize(
    ("asked", "loaded", "answers"),
    [("train", "train", ["t"]), ("train[:1]", "train", ["t"]), ("held", "all", ["h"])],
)
def test_a_split_of_a_data_set_on_the_hub_is_loaded_or_is_a_column(
    monkeypatch, asked, loaded, answers
):
    import datasets

    def load_dataset(source, split, streaming):
        assert (source, split, streaming) == ("me/mine", loaded, True)
        rows = [{"question": "?", "answers": "t", "split": None}]
        if split == "all":  # which is all of the hub's splits one after another
            rows.append({"question": "?", "answers": "h", "split": "held"})
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: ["train", "dev"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [q["answers"] for q in load("me/mine", split=asked)] == [answers]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"image": "pictures/none.png"},
            "row 3, column 'image': no picture 'pictures/none.png'",
        ),
        ({"image": "text.txt"}, "row 3, column 'image': .*text.txt is no picture; store it as jpg"),
        ({"image": "x_" * 200 + ".png"}, "row 3, column 'image': no picture 'x_x_"),
        ({"image": 7}, "row 3, column 'image': expected a file name, got int 7"),
        (
            {"image": "https://example.org/a.png"},
            "row 3, column 'image': .* is an address",
        ),
        ({"answers": []}, "row 3, column 'answers': no usable answer"),
        ({"answers": " | "}, "row 3, column 'answers': no usable answer"),
        ({"answers": None}, "row 3, column 'answers': missing"),
        ({"answers": {"a": 1}}, "row 3, column 'answers': expected texts"),
        ({"answers": float("nan")}, "row 3, column 'answers': expected texts, got float nan; mend"),
        ({"answers": ["a", float("inf")]}, "row 3, column 'answers': expected texts"),
        ({"answer_kind": "nosuch"}, "column 'answer_kind': no kind str 'nosuch'; choose one of te"),
        ({"answer_kind": ["number"]}, "row 3, column 'answer_kind': expected text, got list"),
        ({"kind": float("nan")}, "row 3, column 'kind': expected text, got float nan"),
        ({"id": {}}, "row 3, column 'id': expected text, got dict {}; write a text, or leave it"),
        ({"question": "  "}, "row 3, column 'question': is empty"),
        ({"id": "1"}, "row 3, column 'id': '1' stands in .*row 1 already"),
        ({"tolerance": "5 %"}, "row 3, column 'tolerance': expected a number of 0 or more"),
        (
            {"tolerance": 5, "answer_kind": "number"},
            "row 3, column 'tolerance': int 5 is more .*; of a number it is a share: write 0.05",
        ),
        ({"unit": 7}, "row 3, column 'unit': expected text, got int 7; write one, as km"),
        ({"unit": float("nan")}, "row 3, column 'unit': expected text, got float nan"),
        ({"hops": -1}, "column 'hops': expected a number of 0 or more, got int -1; write one"),
        ({"best_calls": True}, "row 3, column 'best_calls': expected a number of 0 or more"),
        ({"range": "9-12"}, r"column 'range': expected two numbers, got str '9-12'; write \["),
        ({"items": 7.5}, "row 3, column 'items': expected a list of texts, got float 7.5"),
        ({"items": [{"a": 1}]}, "row 3, column 'items': expected a list of texts, got list"),
        ({"items": [[]]}, "row 3, column 'items': expected a list of texts, got list"),
        ({"choices": {"A": ["x"]}}, "row 3, column 'choices': expected a list of texts, got dict"),
        ({"choices": [["x"]]}, "row 3, column 'choices': expected a list of texts, got list"),
        ({"range": [1, None, 2]}, "row 3, column 'range': expected two numbers, got list"),
    ],
)
def test_a_bad_cell_is_named_with_its_row(rows, write, tmp_path, change, words):
    (tmp_path / "text.txt").write_text("no picture")
    rows[2] |= change
    with pytest.raises(BenchmarkError, match=words):
        load(write(rows))


@pytest.mark.parametrize(
    ("column", "wrong"),
    [("answers", "answer"), ("image", "images"), ("image", "imagee"), ("split", "splits")],
)
def test_a_misspelt_column_is_no_column_of_ones_own(rows, write, column, wrong):
    for row in rows:
        row["split"] = "train"
        row[wrong] = row.pop(column)
    with pytest.raises(BenchmarkError, match=f"row 1, column '{wrong}': .* call it '{column}'"):
        load(write(rows))


def test_a_column_is_held_against_the_known_ones_once(rows, write, monkeypatch):
    find, asked = difflib.get_close_matches, []

    def counted(word, *arguments, **options):
        asked.append(word)
        return find(word, *arguments, **options)

    monkeypatch.setattr("environments.benchmarks.table.difflib.get_close_matches", counted)
    assert len(load(write([{**row, "of_ones_own": 1} for row in rows]))) == 10
    assert asked == ["of_ones_own"]


@pytest.mark.parametrize("column", TAKEN)
def test_a_column_that_would_change_the_prompt_or_be_lost_is_refused(rows, write, column):
    rows[2][column] = "x"
    with pytest.raises(BenchmarkError, match=f"row 3, column '{column}': .*; give it another name"):
        load(write(rows))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question;answers\na;b\n", "one column, 'question;answers'; separate columns by commas"),
        ("question,answers\na,b,c\n", "row 2: another number of cells than columns"),
        ("question,answers\na\n", "row 2: another number of cells than columns"),
        ("question,answers,answers\na,b,c\n", "mine.csv: two columns are called 'answers'; rena"),
    ],
)
def test_a_bad_spreadsheet_is_one_clear_error(tmp_path, text, words):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(BenchmarkError, match=words):
        load(str(tmp_path / "mine.csv"))


def test_a_spreadsheet_may_hold_pictures_as_base64(tmp_path):
    file = io.BytesIO()
    Image.effect_noise((500, 500), 100).save(file, "PNG")
    cell = base64.b64encode(file.getvalue()).decode()
    assert len(cell) > 131_072  # where Python's csv stops by itself
    (tmp_path / "mine.csv").write_text(f"question,answers,image\na,b,{cell}\n")
    [question] = load(str(tmp_path / "mine.csv"), fetch=True)
    assert question["image"].size == (500, 500)


def test_empty_columns_of_a_spreadsheet_are_no_mistake(tmp_path):
    (tmp_path / "mine.csv").write_text("question,answers,,\na,b,,\n")
    assert load(str(tmp_path / "mine.csv"))[0]["answers"] == ["b"]


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("mine.jsonl", '{"question": "a", "answers": "b", "answers": "c"}', "mine.jsonl, row 1"),
        ("mine.json", '[{"question": "a", "answers": "b", "answers": "c"}]', "mine.json"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, name, text, place):
    (tmp_path / name).write_text(text)
    with pytest.raises(BenchmarkError, match=f"{place}: .*'answers' stands twice.*; mend"):
        load(str(tmp_path / name))


def test_the_kinds_of_answers_are_those_that_are_scored(rows, write):
    assert ANSWER_KINDS == KINDS
    rows[0]["answer_kind"] = "number"
    assert load(write(rows[:1]))[0]["answer_kind"] == "number"


@pytest.mark.parametrize(
    ("name", "text"),
    [("e.jsonl", ""), ("e.csv", ""), ("e.csv", "question,answers\n"), ("e.json", "[]")],
)
def test_a_file_without_rows_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(BenchmarkError, match=f"no question fits the selection from .*{name}; wi"):
        load(str(tmp_path / name))


@pytest.mark.parametrize("source", ["q/nosuch.jsonl", "x" * 300 + "/a.jsonl", "~nobody7/a.jsonl"])
def test_a_file_that_is_not_there_is_named_with_what_to_do(source):
    with pytest.raises(BenchmarkError, match=r"no file or folder '.*jsonl'; check the path"):
        load(source)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "mine.jsonl").mkdir()
    with pytest.raises(BenchmarkError, match=r"mine.jsonl: cannot be read \(Is a directory\)"):
        load(str(tmp_path))


def test_a_broken_parquet_file_is_one_line(tmp_path, capfd):
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    with pytest.raises(BenchmarkError, match=r"mine.parquet: not readable as parquet .*copy it"):
        load(str(tmp_path / "mine.parquet"))
    assert capfd.readouterr().err == ""


def test_a_spreadsheet_in_another_encoding_is_one_clear_error(tmp_path):
    (tmp_path / "mine.csv").write_bytes("question,answers\nça,là\n".encode("latin-1"))
    with pytest.raises(BenchmarkError, match=r"mine.csv: not a .csv in UTF-8"):
        load(str(tmp_path / "mine.csv"))


def test_a_table_needs_a_source():
    with pytest.raises(BenchmarkError, match=r"set `source` to your copy .*question, answers"):
        load(None)
