"""What goes into the viewer's page: lines read and refused, packed, chosen; the verb."""

import io
import json
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from compare.errors import CompareError
from compare.trajectory_files import TrajectoryFile, find_file, read_lines
from compare.viewer import CHUNK_BYTES, deflate, is_right, marks, n_calls, pack, utf16_length
from compare.viewer_choice import Choice, parse_steps, read_file, read_files
from configs.schema import load_config
from launch.cli import main
from tests.compare.episode_lines import line, run_of, turn, write_lines
from train.trajectories import image_hash
from train.worlds import load_eval_questions, load_train_questions


def packed_of(rows, folder="run", **settings):
    return pack([TrajectoryFile(Path(folder) / "trajectories.jsonl", rows)], **settings)


def episodes_of(packed):
    """Every episode as the page would put it together, in the order of the index."""
    found = []
    for n, chunk in zip(packed.index["chunks"], packed.chunks, strict=True):
        content = json.loads(chunk)
        assert len(content["episodes"]) == n
        for body in content["episodes"]:
            texts = content["texts"]
            turns = [{**t, "text": texts[t["text"]]} for t in body["turns"]]
            found.append({**body, "prompt": texts[body["prompt"]], "turns": turns})
    return found


# ---------------------------------------------------------------- packing


def test_episodes_of_a_question_lie_together_evaluations_first_by_run_and_step():
    rows = [
        line(5, "b", 0, 1), line(0, "a", 0, 0), line(5, "a", 0, 1),
        line(3, "a", 0, 1, phase="train"), line(0, "a", 0, 1), line(5, "a", 0, 0),
    ]  # fmt: skip
    column = packed_of(rows).index["columns"]
    order = list(
        zip(column["question"], column["is_training"], column["run"], column["step"], strict=True)
    )
    # runs are numbered as they come, and so are questions: b, a; two/1, two/0
    assert order == [
        (0, 0, 0, 5), (0, 0, 1, 0), (0, 0, 1, 5), (0, 1, 1, 3), (1, 0, 1, 0), (1, 0, 1, 5),
    ]  # fmt: skip


def test_every_text_stands_once_in_a_chunk_and_every_word_comes_back():
    rows = run_of(40, range(0, 50, 10))
    packed = packed_of(rows)
    assert packed.n_episodes == 200
    content = json.loads(packed.chunks[0])
    assert len(content["texts"]) == len(set(content["texts"]))
    by_key = {(row["question_id"], row["step"]): row for row in rows}
    column, questions = packed.index["columns"], packed.index["questions"]
    for place, episode in enumerate(episodes_of(packed)):
        row = by_key[questions[column["question"][place]]["id"], column["step"][place]]
        assert episode["prompt"] == row["prompt"]
        for packed_turn, full in zip(episode["turns"], row["turns"], strict=True):
            assert packed_turn["text"] == "".join(full["tokens"])
            assert packed_turn["logprobs"] == [round(1000 * p) for p in full["logprobs"]]
            assert packed_turn["calls"] == [full["action"]]


def test_chunks_are_of_bounded_size_and_inflate_to_what_was_packed():
    packed = packed_of(run_of(200, range(0, 60, 10)))
    assert len(packed.chunks) > 1
    assert sum(packed.index["chunks"]) == 1200
    assert max(map(len, packed.chunks)) < 2 * CHUNK_BYTES
    small = deflate(packed.chunks[0])
    assert len(small) < len(packed.chunks[0]) / 8
    assert zlib.decompress(small, -zlib.MAX_WBITS) == packed.chunks[0]


def test_pieces_are_counted_as_a_browser_counts():
    assert [utf16_length(text) for text in ("", "ab", "é", "日本", "😀", "\ud800")] == [
        0, 2, 1, 2, 2, 1,
    ]  # fmt: skip


def test_hostile_numbers_and_texts_pack_to_plain_json():
    hostile = "</script>\x00\u2028\u202e\ud800<img src=x onerror=alert(1)>"
    row = line(answer=hostile, rewards={"total": float("nan"), "accuracy": None})
    row["turns"][0] = turn("x", {"type": "invalid", "reason": hostile}, pieces=["x", hostile])
    row["turns"][0]["logprobs"] = [float("-inf"), -0.25]
    packed = packed_of([row])
    assert packed.index["columns"]["reward"] == [None]
    assert packed.index["columns"]["right"] == [None]
    (episode,) = episodes_of(packed)
    assert episode["turns"][0]["logprobs"] == [-1_000_000, -250]
    assert episode["turns"][0]["text"] == "x" + hostile
    assert packed.chunks[0].isascii()


def test_right_is_what_was_measured_or_else_the_reward_for_accuracy():
    assert is_right({"rewards": {"accuracy": 0.5}, "measured": {"accuracy": True}}) == 1
    assert is_right({"rewards": {"accuracy": 1.0}}) == 1
    assert is_right({"rewards": {"accuracy": 0.99}}) == 0
    assert is_right({"rewards": {"total": None}}) is None


def test_marks_and_calls_count_calls_side_by_side_and_three_failures_in_a_row():
    search = {"type": "search", "query": "q"}
    both = {"type": "parallel", "calls": [search, {"type": "visit", "url": "u"}]}
    turns = [
        {"action": both, "fault": "infrastructure", "observation": "x", "n_observation_tokens": 3},
        {"action": search, "fault": "infrastructure", "observation": "x"},
        {"action": {"type": "answer", "text": "a"}, "fault": None, "observation": None},
    ]
    row = {"turns": turns}
    assert n_calls(row) == 3
    assert marks(row) == 2  # infrastructure
    turns[2]["fault"] = "infrastructure"
    assert marks({**row, "masked_from": 0}) == 2 + 4 + 8  # and fatal, and without loss
    turns[2] |= {"fault": "model", "observation": "long", "n_observation_tokens": 0}
    assert marks(row) == 1 + 2 + 16  # the policy's own, and a result that did not fit


def test_runs_of_equal_name_get_their_folders():
    files = [
        TrajectoryFile(Path(folder) / "trajectories.jsonl", [line(arm=arm)])
        for folder, arm in (("one", "obm"), ("two", "obm"), ("three", "vlm"), ("x/two", "obm"))
    ]
    names = [run["name"] for run in pack(files).index["runs"]]
    assert names == ["obm-s0 (one)", "obm-s0 (two)", "vlm-s0", "obm-s0 (two) #2"]


def test_version_1_has_texts_and_no_pieces():
    row = line(schema_version=1)
    for each in row["turns"]:
        del each["tokens"], each["logprobs"]
    del row["gold"]
    (episode,) = episodes_of(packed_of([row]))
    assert episode["turns"][0]["text"] == row["turns"][0]["text"]
    assert "pieces" not in episode["turns"][0]


# ---------------------------------------------------------------- pictures


def test_a_picture_is_taken_once_and_missing_or_broken_ones_are_counted(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8), "red").save(pictures / "aa.webp")
    (pictures / "bb.webp").write_bytes(b"RIFF torn")
    rows = [
        line(step, images=[key])
        for step, key in enumerate(["aa", "aa", "bb", "cc", "../pictures/aa"])
    ]
    file = TrajectoryFile(tmp_path / "trajectories.jsonl", rows)
    packed = pack([file])
    assert packed.index["pictures"] == [True, False, False, False]
    assert packed.pictures[0] == (pictures / "aa.webp").read_bytes()
    assert packed.n_missing == 3
    assert packed.index["columns"]["picture"] == [0, 0, 1, 2, 3]
    without = pack([file], with_pictures=False)
    assert without.pictures == []
    assert episodes_of(without)[0]["images"] == [-1]


def test_photos_of_the_atlas_are_made_again_where_a_run_kept_none(tmp_path):
    settings = tmp_path / "config.yaml"
    settings.write_text(
        "output: x\nenvironment: {eval_size: 4, train_size: 4, eval_kinds: [two], kinds: [image]}\n"
    )
    config = load_config(settings)
    asked, trained = load_eval_questions(config)[2], load_train_questions(config)[1]
    keys = [image_hash(question["image"]) for question in (asked, trained)]
    rows = [line(n, images=[key]) for n, key in enumerate([*keys, "ab" * 32])]
    packed = pack([TrajectoryFile(tmp_path / "trajectories.jsonl", rows)])
    assert packed.index["pictures"] == [True, True, False]  # no photo has the last hash
    for picture, question in zip(packed.pictures, (asked, trained), strict=False):
        with Image.open(io.BytesIO(picture)) as again:
            difference = ImageStat.Stat(
                ImageChops.difference(again.convert("RGB"), question["image"].convert("RGB"))
            )
        assert max(difference.mean) < 12  # grey levels of 255; the copy is compressed
    settings.write_text("output: x\nenvironment: {no_such_key: 1}\n")
    assert pack([TrajectoryFile(tmp_path / "trajectories.jsonl", rows)]).n_missing == 3


# ---------------------------------------------------------------- reading


def test_a_torn_last_line_is_left_out_even_within_a_character(tmp_path):
    for end in ('{"step": 9, "fol', '{"answer": "日'):
        folder = write_lines(tmp_path, [line(), line(5)])
        path = folder / "trajectories.jsonl"
        path.write_bytes(path.read_bytes() + end.encode()[:-1])
        file = read_file(path, Choice())
        assert [row["step"] for row in file.rows] == [0, 5]
        assert file.is_torn


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path):
    folder = write_lines(tmp_path, [line(answer="a\u2028b\u0085c")])
    ((_, row),) = read_lines(folder / "trajectories.jsonl")
    assert row["answer"] == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{torn", r"trajectories.jsonl:2: not JSON .*restore or remove the line"),
        ("[1]", r"trajectories.jsonl:2: not a JSON object"),
        (json.dumps(line(schema_version=9)), ":2: schema_version 9, and this program reads"),
        (json.dumps(line(step="1")), ":2: 'step' is str"),
        ('{"schema_version": 2}', ":2: 'step' is missing; is this a trajectories.jsonl"),
        (json.dumps(line(turns=[7])), ":2: turn 0 is not a JSON object"),
        (json.dumps(line(turns=[{"text": "x"}])), ":2: turn 0: 'action' is missing"),
        (
            json.dumps(line(turns=[{"text": "x", "action": {}, "tokens": ["x"], "logprobs": []}])),
            "turn 0 has 1 tokens and 0 logprobs",
        ),
        ('{"a":' * 5000, r":2: not read \(maximum recursion depth .*restore or remove the line"),
    ],
)
def test_a_bad_line_is_one_error_with_its_place_and_nothing_is_written(
    tmp_path, capsys, bad, message
):
    write_lines(tmp_path, [line()], end=f"{bad}\n{json.dumps(line(5))}\n")
    with pytest.raises(CompareError, match=message):
        read_file(tmp_path / "trajectories.jsonl", Choice())
    assert main(["view", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["trajectories.jsonl"]


BAD_VALUES = [
    ({"seed": {}}, "'seed' is dict"),
    ({"seed": 10**400}, "'seed' is too large a number"),
    ({"step": True}, "'step' is bool"),
    ({"arm": []}, "'arm' is list"),
    ({"answer": ["a"]}, "'answer' is list"),
    ({"rewards": {"total": "x"}}, "'rewards' holds str"),
    ({"rewards": {"total": 10**400}}, "'rewards' holds too large a number"),
    ({"rewards": None}, "'rewards' is null"),
    ({"images": [{}]}, "'images' holds dict"),
    ({"gold": 3}, "'gold' is int"),
    ({"gold": {"hits": 3}}, "'gold': 'hits' is int"),
    ({"gold": {"answers": "ab"}}, "'gold': 'answers' is str"),
    ({"question": {"answers": 3}}, "'question': 'answers' is int"),
    ({"measured": 3}, "'measured' is int"),
    ({"advantages": 3}, "'advantages' is int"),
    ({"masked_from": float("nan")}, "'masked_from' is float"),
]
BAD_TURNS = [
    ({"hits": 3}, "'hits' is int"),
    ({"tokens": 3}, "'tokens' is int"),
    ({"tokens": ["a"], "logprobs": ["x"]}, "'logprobs' holds str"),
    ({"tokens": ["a"], "logprobs": [1e307]}, "'logprobs' holds too large a number"),
    ({"images": 3}, "'images' is int"),
    ({"fault": {}}, "'fault' is dict"),
    ({"n_tokens": "3"}, "'n_tokens' is str"),
    ({"observation": 3}, "'observation' is int"),
    ({"retries": float("nan")}, "'retries' is float"),
    ({"action": {}}, "'action': 'type' is missing"),
    ({"action": {"type": "search"}}, "'action': 'query' is missing"),
    ({"action": {"type": "parallel", "calls": 3}}, "'action': 'calls' is int"),
    ({"action": {"type": "parallel", "calls": [3]}}, "call 0 is not a JSON object"),
    ({"action": {"type": "parallel", "calls": [{}]}}, "call 0: 'type' is missing"),
    ({"action": {"type": "answer", "text": float("nan")}}, "'action' holds a number that is none"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_VALUES)
def test_a_value_of_another_shape_is_named(tmp_path, bad, message):
    write_lines(tmp_path, [line(), line(5) | bad])
    with pytest.raises(CompareError, match=f"trajectories.jsonl:2: {message}; restore the line"):
        read_file(tmp_path / "trajectories.jsonl", Choice())


@pytest.mark.parametrize(("bad", "message"), BAD_TURNS)
def test_a_turn_of_another_shape_is_named(tmp_path, bad, message):
    turns = [{"text": "x", "action": {"type": "answer", "text": "a"}, **bad}]
    write_lines(tmp_path, [line(), line(5, turns=turns)])
    with pytest.raises(CompareError, match=f"trajectories.jsonl:2: turn 0: {message}"):
        read_file(tmp_path / "trajectories.jsonl", Choice())
    assert main(["view", str(tmp_path)]) == 2
    assert not (tmp_path / "view.html").exists()


def test_what_may_be_missing_may_be_null_and_every_call_of_the_policy_is_read(tmp_path):
    actions = [
        {"type": "image_search", "region": [0, 0, 0.5, 1]}, {"type": "visit", "url": "u"},
        {"type": "invalid", "reason": "r"}, {"type": "of a later version", "boxes": [[1], {}]},
    ]  # fmt: skip
    actions.append({"type": "parallel", "calls": actions[:2]})
    nulls = {"observation": None, "images": None, "hits": None, "tokens": None, "seconds": None}
    turns = [{"text": "", "action": action, **nulls} for action in actions]
    rewards = {"total": None, "accuracy": float("nan"), "format": True}
    row = line(rewards=rewards, turns=turns, gold=None, arm=None, answer=None, advantages=[None])
    write_lines(tmp_path, [row])
    assert main(["view", str(tmp_path)]) == 0


def test_a_file_is_found_by_folder_or_name(tmp_path):
    folder = write_lines(tmp_path / "run", [line()])
    assert find_file(folder) == find_file(folder / "trajectories.jsonl")
    (tmp_path / "empty" / "episodes").mkdir(parents=True)
    with pytest.raises(CompareError, match="the evaluation is not finished"):
        find_file(tmp_path / "empty")
    with pytest.raises(CompareError, match="does not exist"):
        find_file(tmp_path / "none")


# ---------------------------------------------------------------- choosing


def test_steps_are_numbers_and_ranges():
    assert parse_steps("0, 30-60,100-") == ((0, 0), (30, 60), (100, None))
    for bad in ("x", "5-3", "-5", "1--2", "1" * 5000, "1-" + "2" * 5000):
        with pytest.raises(CompareError, match=r"--steps .{1,40}: write steps as"):
            parse_steps(bad)


def test_a_choice_takes_phase_steps_and_patterns_of_questions():
    choice = Choice.parse("eval", "0,10-", ["two/1", "two/2*"], None)
    rows = [line(step, question=q, phase=p) for step, q, p in (
        (0, 1, "eval"), (5, 1, "eval"), (10, 21, "eval"), (10, 1, "train"), (99, 3, "eval"),
    )]  # fmt: skip
    assert [choice.takes(row) for row in rows] == [True, False, True, False, False]


def test_a_limit_leaves_out_whole_questions_alike_for_every_run(tmp_path):
    paths = [
        write_lines(tmp_path / arm, run_of(20, (0, 10), arm=arm)) / "trajectories.jsonl"
        for arm in ("obm", "vlm")
    ]  # 80 episodes, 4 a question

    def kept(limit):
        return [file.rows for file in read_files(paths, Choice(limit=limit))]

    few = kept(10)
    ids = [{row["question_id"] for row in rows} for rows in few]
    assert ids[0] == ids[1]
    assert [len(rows) for rows in few] == [4, 4]  # two questions, two steps each
    assert sum(len(rows) for rows in kept(1)) == 4  # never the last question
    assert ids[0] < {row["question_id"] for row in kept(40)[0]}
    assert [len(rows) for rows in kept(80)] == [40, 40]


def test_a_limit_holds_no_more_lines_in_memory_than_it_lets_through(tmp_path):
    # a megabyte a line; what is parsed is larger
    turns = [{"text": "x", "action": {"type": "answer", "text": "a"}, "n_tokens": 1,
              "observation": "y" * 1_000_000}]  # fmt: skip
    rows = [line(question=number, turns=turns) for number in range(20)]
    path = write_lines(tmp_path, rows) / "trajectories.jsonl"
    del rows
    tracemalloc.start()
    try:
        (file,) = read_files([path], Choice(limit=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(file.rows) == 1
    assert peak < 8_000_000


# ---------------------------------------------------------------- the verb


def test_the_verb_writes_beside_the_run_and_keeps_what_is_there(tmp_path, capsys):
    run = write_lines(tmp_path / "obm-s0", run_of(3, (0, 10)), end='{"torn')
    assert main(["view", str(run)]) == 0
    out = capsys.readouterr().out
    assert "6 episodes of 1 run on 3 questions, 0 pictures" in out
    assert "the last line of" in out
    page = run / "view.html"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<title>Episodes of obm-s0</title>" in text
    page.write_text("mine")
    assert main(["view", str(run)]) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert main(["view", str(run), "--overwrite", "--steps", "10"]) == 0
    assert "3 episodes" in capsys.readouterr().out


def test_names_of_runs_do_not_write_into_the_page(tmp_path):
    arm = "{script}{style}<script>alert(1)</script>"
    run = write_lines(tmp_path / "run", [line(arm=arm)])
    assert main(["view", str(run), "--output", str(tmp_path / "view.html")]) == 0
    text = (tmp_path / "view.html").read_text(encoding="utf-8")
    title = "{script}{style}&lt;script&gt;alert(1)&lt;/script&gt;-s0"
    assert f"<title>Episodes of {title}</title>" in text
    assert "alert(1)</script>" not in text


@pytest.mark.parametrize("output", ["file/x.html", "x" * 300 + ".html", "x" * 250, "/proc/x"])
def test_an_output_that_cannot_be_written_is_said(tmp_path, capsys, output):
    run = write_lines(tmp_path / "run", [line()])
    (tmp_path / "file").write_text("mine")
    assert main(["view", str(run), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {tmp_path / output}: cannot be written (")
    assert error.endswith("; name another file\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "file", "run", "trajectories.jsonl"
    ]  # fmt: skip


def test_a_lone_surrogate_in_a_name_is_written(tmp_path):
    run = write_lines(tmp_path / "run", [])
    text = json.dumps(line() | {"arm": "a\ud800"})
    (run / "trajectories.jsonl").write_text(text + "\n")
    assert main(["view", str(run)]) == 0
    assert "<title>Episodes of a&#55296;-s0</title>" in (run / "view.html").read_text("utf-8")


def test_what_cannot_be_shown_is_said(tmp_path, capsys):
    run = write_lines(tmp_path / "run", [line()])
    empty = write_lines(tmp_path / "empty", [], end='{"torn')
    for arguments, message in (
        ([run, run], "named twice"),
        ([empty], "has no episode yet"),
        ([run, "--steps", "7"], "no episode is as --phase, --steps and --questions ask"),
        ([run, "--limit", "0"], "--limit 0: give a number of 1 or more"),
        ([run, "--output", tmp_path, "--overwrite"], "is a folder; name a file"),
        (["x" * 300], "cannot be read (File name too long); name a run folder"),
    ):
        assert main(["view", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
