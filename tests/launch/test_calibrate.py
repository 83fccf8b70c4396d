"""Calibration data from anywhere, and the verb that uses them, on tiny untrained checkpoints."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl
import yaml

from launch.calibration_batches import Batches, Sample, collate, generate_answers, render
from launch.calibration_data import (
    dataset_samples,
    is_trajectories,
    read_rows,
    trajectory_samples,
)
from launch.errors import LaunchError
from merge.stats import open_stats

NO_DATA = {
    "source": None, "subset": None, "split": "train", "prompt": "{question}", "answer": None,
    "images": None, "messages": None,
}  # fmt: skip
ROWS = [{"question": f"What is {i}?", "reply": f"It is {i}."} for i in range(6)]


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """Folders of an untrained base, VLM and agent."""
    from train.tiny import make_tiny_checkpoints

    return make_tiny_checkpoints(tmp_path_factory.mktemp("trio"), seed=0)


@pytest.fixture(scope="module")
def processor(trio):
    from train.policy import load_processor

    return load_processor(trio["vlm"])


@pytest.fixture(scope="module")
def tokenizer(trio):
    from train.policy import load_processor

    return load_processor(trio["agent"])


@pytest.fixture
def settings(trio, tmp_path):
    """Writes a settings file with calibration keys; gives its path."""

    def write(**calibration):
        content = {
            "output": str(tmp_path / "run"),
            "models": trio,
            "calibration": {"samples": 4, "batch_size": 2, **calibration},
            "environment": {"text_searches": 1, "max_turns": 2},
            "grpo": {"max_completion_length": 64, "generation_kwargs": {"max_new_tokens": 8}},
            "tracking": {"wandb": "disabled"},
        }
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**NO_DATA, "source": str(path)}


def own_words(sample, tokenizer):
    """The parent's own words in a sample, as text."""
    pairs = zip(sample.answer_ids, sample.answer_mask, strict=True)
    return tokenizer.decode([token for token, own in pairs if own])


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "split"])
def test_rows_are_read_from_every_kind_of_source(tmp_path, kind):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "folder":
        table.save_to_disk(path)
    elif kind == "split":
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    else:
        {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](path)
    rows = read_rows({**NO_DATA, "source": str(path)}, n=10, seed=0)
    assert [row for _, row in rows] == ROWS


def test_the_choice_of_rows_depends_on_the_seed_alone(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first, again, other = (read_rows(data, n=3, seed=seed) for seed in (0, 0, 3))
    assert first == again != other
    assert all(ROWS[number] == row for number, row in first)


def test_sources_without_rows_are_refused(tmp_path):
    import datasets

    for missing in (str(tmp_path / "none.json"), "~nobody-of-this-name/none.json"):
        assert not is_trajectories(missing)
        with pytest.raises(LaunchError, match=r"none\.json: no such file"):
            read_rows({**NO_DATA, "source": missing}, n=1, seed=0)
    (tmp_path / "rows.txt").touch()
    with pytest.raises(LaunchError, match=r"is none of \.json"):
        read_rows({**NO_DATA, "source": str(tmp_path / "rows.txt")}, n=1, seed=0)
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(LaunchError, match="cannot be read as a data set"):
        read_rows({**NO_DATA, "source": str(tmp_path / "bad.parquet")}, n=1, seed=0)
    (tmp_path / "empty.csv").write_text("question\n")
    with pytest.raises(LaunchError, match="has no rows"):
        read_rows({**NO_DATA, "source": str(tmp_path / "empty.csv")}, n=1, seed=0)
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "dev")
    with pytest.raises(LaunchError, match="has no split 'train'; it has dev"):
        read_rows({**NO_DATA, "source": str(tmp_path / "dev")}, n=1, seed=0)


# ---------------------------------------------------------------- samples


def test_a_template_fills_prompt_and_answer(tokenizer):
    data = {**NO_DATA, "prompt": "Say {{it}}: {question}", "answer": "{reply}"}
    (sample,) = dataset_samples(data, [(0, ROWS[3])], tokenizer)
    assert "Say {it}: What is 3?" in sample.prompt
    assert own_words(sample, tokenizer).startswith("It is 3.")
    assert sample.answer_ids[-1] == tokenizer.eos_token_id
    (first,) = dataset_samples(
        {**data, "prompt": "", "answer": "{many}"}, [(0, {"many": ["one", "two"]})], tokenizer
    )
    assert "one" in own_words(first, tokenizer)
    assert "two" not in own_words(first, tokenizer)


def test_in_chat_messages_the_assistants_turns_are_its_own_words(tokenizer):
    messages = [
        {"role": "user", "content": "red?"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "green?"},
        {"role": "assistant", "content": "black"},
    ]
    data = {**NO_DATA, "messages": "talk"}
    (sample,) = dataset_samples(data, [(0, {"talk": messages})], tokenizer)
    own = own_words(sample, tokenizer)
    assert "blue" in own
    assert "black" in own
    assert "green" not in own
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*prompt, *sample.answer_ids]) == whole


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3"])
def test_a_text_models_own_template_gets_the_prompt_as_one_string(tokenizer, template):
    path = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    text_model = copy.deepcopy(tokenizer)
    text_model.chat_template = path.read_text(encoding="utf-8")
    text_model.bos_token = text_model.eos_token  # Llama's template begins with one
    (sample,) = dataset_samples({**NO_DATA, "answer": "{reply}"}, [(0, ROWS[3])], text_model)
    assert "What is 3?" in sample.prompt
    assert "'type'" not in sample.prompt


def test_joined_parts_change_no_byte_where_a_template_takes_both(tokenizer, processor):
    text = [{"type": "text", "text": "red "}, {"type": "text", "text": "or blue?"}]
    pictured = [{"type": "image"}, *text]
    for owner, content in ((tokenizer, text), (tokenizer, pictured), (processor, pictured)):
        messages = [{"role": "user", "content": content}]
        direct = owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(messages, owner) == direct


def test_faulty_rows_are_named(tokenizer):
    data = {**NO_DATA, "source": "rows.json", "prompt": "{questoin}"}
    with pytest.raises(LaunchError, match=r"row 7: has no column 'questoin'; it has question, re"):
        dataset_samples(data, [(7, ROWS[0])], tokenizer)
    with pytest.raises(LaunchError, match="row 2: column 'question' is empty"):
        dataset_samples({**data, "prompt": "{question}"}, [(2, {"question": None})], tokenizer)
    with pytest.raises(LaunchError, match="column 'question' holds a dict, not text"):
        dataset_samples({**data, "prompt": "{question}"}, [(2, {"question": {}})], tokenizer)
    with pytest.raises(LaunchError, match="'question' is no list of messages"):
        dataset_samples({**data, "messages": "question"}, [(2, ROWS[0])], tokenizer)


def test_pictures_come_as_files_or_bytes_and_a_bad_one_is_named_with_its_row(tmp_path, processor):
    from PIL import Image

    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    data = {**NO_DATA, "source": str(tmp_path / "rows.json"), "images": ["photo"]}
    rows = [
        (0, {"question": "a", "photo": "red.png"}),
        (1, {"question": "b", "photo": {"bytes": content, "path": None}}),
        (2, {"question": "c", "photo": [content, str(tmp_path / "red.png")]}),
    ]
    samples = dataset_samples(data, rows, processor)
    assert [len(sample.images) for sample in samples] == [1, 1, 2]
    assert {image.getpixel((0, 0)) for s in samples for image in s.images} == {(255, 0, 0)}
    batch = collate(samples[:2], processor)
    assert batch["pixel_values"].shape[0] == int(batch["image_grid_thw"].prod(-1).sum())
    (tmp_path / "bad.png").write_bytes(content[:60])
    for photo in ("bad.png", "none.png", b"no picture"):
        with pytest.raises(LaunchError, match="row 5, column 'photo': the picture cannot be read"):
            dataset_samples(data, [(5, {"question": "a", "photo": photo})], processor)
    with pytest.raises(LaunchError, match="row 5, column 'photo': holds no picture"):
        dataset_samples(data, [(5, {"question": "a", "photo": []})], processor)


def test_pictures_of_chat_messages_need_a_place_each(tmp_path, processor):
    from PIL import Image

    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    data = {**NO_DATA, "source": str(tmp_path / "rows.json"), "images": ["photo"],
            "messages": "talk"}  # fmt: skip

    def samples(content):
        talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
        return dataset_samples(data, [(4, {"talk": talk, "photo": "red.png"})], processor)

    parts = [{"type": "image"}, {"type": "text", "text": "Colour?"}]
    for content in (parts, "<|vision_start|><|image_pad|><|vision_end|>Colour?"):
        assert [len(sample.images) for sample in samples(content)] == [1]
    with pytest.raises(LaunchError, match="row 4: 1 pictures for 0 places before the first answer"):
        samples("Colour?")


@pytest.mark.parametrize("is_list", [False, True])
def test_a_damaged_picture_inside_a_data_set_is_named_with_its_row(tmp_path, processor, is_list):
    import datasets
    from PIL import Image

    photos = [Image.new("RGB", (56, 56)), {"bytes": b"broken", "path": None}]
    feature = datasets.Image()
    if is_list:
        photos, feature = [[photo] for photo in photos], datasets.Sequence(feature)
    table = datasets.Dataset.from_dict(
        {"question": ["a", "b"], "photo": photos},
        features=datasets.Features(question=datasets.Value("string"), photo=feature),
    )
    table.save_to_disk(tmp_path / "photos")
    data = {**NO_DATA, "source": str(tmp_path / "photos"), "images": ["photo"]}
    before = sorted((tmp_path / "photos").iterdir())
    with pytest.raises(LaunchError, match="row 1, column 'photo': the picture cannot be read"):
        dataset_samples(data, read_rows(data, n=2, seed=0), processor)
    # reading leaves the user's folder as it was
    assert sorted((tmp_path / "photos").iterdir()) == before


def test_recorded_episodes_count_the_policys_turns_and_not_the_observations(tmp_path, tokenizer):
    from train.trajectories import Trajectory, Turn

    turn = Turn("<search> red </search>", [], [], {"type": "search"}, observation=" blue things ")
    last = Turn("<answer> green </answer>", [], [], {"type": "answer"})
    episode = Trajectory("q1", "text", True, "Question: why?", [], [], [turn, last])
    row = episode.to_dict(step=1)
    pictured = {**row, "images": ["hash"]}
    path = tmp_path / "trajectories.jsonl"
    write_jsonl(path, [row, pictured])
    assert is_trajectories(str(path))
    (sample,) = trajectory_samples(str(path), n=5, seed=0, processor=tokenizer)
    assert "Question: why?" in sample.prompt
    own = own_words(sample, tokenizer)
    assert "red" in own
    assert "green" in own
    assert "blue" not in own
    assert "blue" in tokenizer.decode(sample.answer_ids)
    write_jsonl(path, [pictured])
    with pytest.raises(LaunchError, match="no episodes without pictures"):
        trajectory_samples(str(path), n=5, seed=0, processor=tokenizer)
    path.write_text(json.dumps(row) + "\n{}\n")
    with pytest.raises(LaunchError, match="line 2 is no recorded episode"):
        trajectory_samples(str(path), n=5, seed=0, processor=tokenizer)
    assert not is_trajectories(write_jsonl(tmp_path / "rows.jsonl", ROWS)["source"])


# ---------------------------------------------------------------- batches


def test_a_batch_pads_prompts_on_the_left_and_answers_on_the_right(tokenizer):
    samples = [Sample([5, 6, 7], [], [8], [1]), Sample([9], [], [10, 11, 12], [1, 0, 1])]
    batch = collate(samples, tokenizer, tokens="answer")
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, pad, pad], [pad, pad, 9, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert batch["calibration_mask"].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1]]
    assert "calibration_mask" not in collate(samples, tokenizer)


def test_long_samples_are_cut_and_batches_can_be_read_again(tokenizer):
    samples = [Sample([5, 6, 7], [], [8, 9], [1, 1]), Sample([5] * 9, [], [8], [1])]
    batches = Batches(samples, 1, tokenizer, tokens="answer", max_tokens=4)
    assert len(batches) == 2
    for _ in range(2):
        first, second = batches
        assert first["input_ids"].tolist() == [[5, 6, 7, 8]]
        assert second["input_ids"].tolist() == [[5] * 4]


def test_a_parent_answers_what_has_no_answer(trio, tokenizer):
    from launch.models import load_for_inference

    model, _ = load_for_inference(trio["agent"], "cpu")
    samples = [Sample([5, 6, 7]), Sample([9], [], [3], [1])]
    generate_answers(samples, model, tokenizer, size=2, max_new_tokens=4)
    assert 0 < len(samples[0].answer_ids) <= 4
    assert set(samples[0].answer_mask) == {1}
    assert samples[1].answer_ids == [3]


def test_a_checkpoints_own_penalty_does_not_change_what_it_answers(trio, tokenizer):
    from launch.models import load_for_inference

    model, _ = load_for_inference(trio["agent"], "cpu")
    answers = []
    for penalty in (1.0, 5.0):
        model.generation_config.repetition_penalty = penalty
        samples = [Sample([5, 6, 7])]
        generate_answers(samples, model, tokenizer, size=1, max_new_tokens=8)
        answers.append(samples[0].answer_ids)
    assert len(set(answers[0])) < len(answers[0])  # it repeats itself, which a penalty would stop
    assert answers[0] == answers[1]


def test_a_parent_answers_as_much_of_a_prompt_as_is_measured(tokenizer):
    asked = []

    class Model:
        device = "cpu"
        generation_config = SimpleNamespace(eos_token_id=None)

        def generate(self, input_ids, **_):
            asked.append(input_ids.tolist())
            return torch.cat([input_ids, torch.tensor([[8]])], dim=1)

    samples = [Sample([5] * 9)]
    generate_answers(samples, Model(), tokenizer, size=1, max_new_tokens=1, max_tokens=4)
    assert asked == [[[5] * 4]]
    assert samples[0].answer_ids == [8]


@pytest.mark.parametrize("end", [2, [1, 2]])
@pytest.mark.parametrize("pad", [None, 2, 3])
def test_an_answer_goes_up_to_its_end_whatever_token_pads_it(end, pad):
    # without a padding token 0 pads, which is a word; 2 pads and ends, as in many tokenizers
    fill = pad or 0
    words = [[0, 7, 2, fill, fill], [7, 0, 7, 0, 0]]

    class Model:
        device = "cpu"
        generation_config = SimpleNamespace(eos_token_id=end)

        def generate(self, input_ids, **_):
            return torch.cat([input_ids, torch.tensor(words)], dim=1)

    samples = [Sample([5]), Sample([6])]
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=2)
    generate_answers(samples, Model(), tokenizer, size=2, max_new_tokens=5)
    assert samples[0].answer_ids == [0, 7, 2]
    assert samples[1].answer_ids == words[1]


# ---------------------------------------------------------------- the verb


def test_every_kind_is_made_from_a_data_set(settings, obm, tmp_path, trio):
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)["source"]
    kinds = ["diagonal", "inverse", "gram", "fisher"]
    data = {"source": source, "answer": "{reply}"}
    config = settings(kinds=kinds, tokens="answer", agent_data=data)
    code, _, err = obm("calibrate", "--config", config, "--parent", "agent")
    assert code == 0, err
    folder = tmp_path / "run" / "calibration" / "agent"
    assert sorted(path.name for path in folder.iterdir()) == [
        "cost.json", "fisher.safetensors", "gram.safetensors", "inverse.safetensors",
        "stats.safetensors",
    ]  # fmt: skip
    stats = {kind: open_stats(folder, kind) for kind in kinds}
    name = "model.layers.0.mlp.down_proj.weight"
    diagonal = stats["diagonal"].vector(name)
    # both are sums of the same fp32 rows, in another order
    np.testing.assert_allclose(np.diag(stats["gram"].gram(name)), diagonal, rtol=1e-5)
    assert (stats["inverse"].vector(name) <= 1.02 * diagonal + 0.02 * diagonal.mean()).all()
    assert stats["fisher"].metadata["sequences"] == "4"
    assert stats["diagonal"].metadata["mask_rule"] == "attention_mask and calibration_mask"
    from merge.checkpoint import Checkpoint

    assert stats["fisher"].weights[name] == Checkpoint(trio["agent"], "agent").checksum(name)


def test_streaming_and_shards_change_no_byte(settings, obm, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)["source"]
    config = settings(samples=5, agent_data={"source": source, "answer": "{reply}"})
    files = []
    for name, rounds in {
        "whole": [["calibration.streaming=false"]],
        "streamed": [["calibration.streaming=true"]],
        "shards": [["--shard", "0/2"], ["--shard", "1/2"], ["--merge-shards"]],
    }.items():
        for arguments in rounds:
            code, _, err = obm(
                "calibrate", "--config", config, "--parent", "agent", *arguments,
                f"calibration.output={tmp_path / name}",
            )  # fmt: skip
            assert code == 0, err
        files.append((tmp_path / name / "agent" / "stats.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
    assert list((tmp_path / "whole" / "agent").glob(".*")) == []


def test_fisher_a_layer_at_a_time_is_that_of_the_whole_model(settings, obm, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)["source"]
    data = {"source": source, "answer": "{reply}"}
    config = settings(kinds=["fisher"], agent_data=data)
    read = []
    for streaming in ("false", "true"):
        code, out, err = obm(
            "calibrate", "--config", config, "--parent", "agent",
            f"calibration.streaming={streaming}", f"calibration.output={tmp_path / streaming}",
        )  # fmt: skip
        assert code == 0, err
        stats = open_stats(tmp_path / streaming / "agent", "fisher")
        read.append({name: stats.entries(name, 0, 96) for name in stats.names if "mlp" in name})
        assert stats.metadata["sequences"] == "4"
    assert read[0].keys() == read[1].keys()
    for name, values in read[0].items():
        np.testing.assert_allclose(read[1][name], values, rtol=1e-4, atol=1e-12)
    code, out, _ = obm(
        "calibrate", "--config", config, "--parent", "agent", "--dry-run", "--overwrite",
        "calibration.streaming=true",
    )  # fmt: skip
    assert "a layer at a time" in out


def test_the_vlm_is_calibrated_with_pictures_of_a_data_set(settings, obm, tmp_path):
    from PIL import Image

    for color in ("red", "blue"):
        Image.new("RGB", (56, 56), color).save(tmp_path / f"{color}.png")
    rows = [{"q": "Which colour?", "photo": f"{color}.png"} for color in ("red", "blue")]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)["source"]
    # no answer: the VLM gives its own, as a whole, before it is streamed
    data = {"source": source, "prompt": "{q}", "images": ["photo"]}
    config = settings(vlm_data=data, kinds=["diagonal", "inverse"])
    code, _, err = obm("calibrate", "--config", config, "--parent", "vlm")
    assert code == 0, err
    stats = open_stats(tmp_path / "run" / "calibration" / "vlm", "diagonal")
    assert int(stats.metadata["tokens"]) > 0
    assert torch.tensor(stats.vector(stats.names[0])).gt(0).any()


def test_a_text_model_in_the_vlms_place_is_asked_without_pictures(settings, obm, tmp_path, trio):
    config = settings(vlm_kinds=["look", "image"])
    asked = ("calibrate", "--config", config, "--parent", "vlm", f"models.vlm={trio['agent']}")
    code, out, err = obm(*asked, "--dry-run")
    assert code == 0, err
    assert "questions (text)" in out
    code, _, err = obm(*asked)
    assert code == 0, err
    stats = open_stats(tmp_path / "run" / "calibration" / "vlm", "diagonal")
    assert int(stats.metadata["tokens"]) > 0


def test_the_vlm_may_be_asked_questions_without_pictures(settings, obm, tmp_path):
    config = settings(vlm_kinds=["text", "image"])
    code, _, err = obm("calibrate", "--config", config, "--parent", "vlm")
    assert code == 0, err


def test_donors_are_calibrated_as_the_agent_is(settings, obm, tmp_path, trio):
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)["source"]
    config = settings(agent_data={"source": source, "answer": "{reply}"})
    donor = f"models.donors.second={trio['agent']}"
    for role in ("second", "agent"):
        code, _, err = obm("calibrate", "--config", config, "--parent", role, donor)
        assert code == 0, err
    folder = tmp_path / "run" / "calibration"
    first, second = (folder / role / "stats.safetensors" for role in ("agent", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_dry_run_says_what_is_measured_and_what_it_takes(settings, obm, tmp_path):
    config = settings(kinds=["diagonal", "gram"])
    code, out, err = obm("calibrate", "--config", config, "--dry-run", "--shard", "1/3")
    assert code == 0, err
    agent = next(line for line in out.splitlines() if line.startswith("agent: "))
    for words in ("4 questions (text)", "batches 1, 4, ...", "a layer at a time", "of memory",
                  "per 1000 tokens", "gram file", "diagonal file"):  # fmt: skip
        assert words in agent
    assert not (tmp_path / "run").exists()


def test_a_parent_that_does_not_fit_says_how_it_can_be_streamed(settings, obm, monkeypatch):
    import launch.calibration_plan as plan

    monkeypatch.setattr(plan, "free_memory", lambda device: 1000)
    config = settings(streaming="auto")
    code, out, _ = obm("calibrate", "--config", config, "--dry-run")
    assert code == 0
    assert out.count("a layer at a time") == 2
    code, _, err = obm("calibrate", "--config", config, "--parent", "agent")
    assert code == 2
    assert "calibration.agent_data" in err
    assert "0.0 kB" not in err


def test_a_containers_limit_decides_whether_a_parent_fits(monkeypatch):
    import launch.calibration_plan as plan

    monkeypatch.setattr(plan, "available_memory", lambda: 12345)
    assert plan.free_memory("cpu") == 12345


def test_what_torch_keeps_of_the_parent_before_is_free_for_the_next(monkeypatch):
    import torch

    import launch.calibration_plan as plan

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert plan.free_memory("cuda") == 1000 + 700 - 300


def test_the_gpu_is_given_back_after_each_parent(settings, obm, monkeypatch):
    import launch.commands.calibrate as command
    from train import gpu

    done = []
    monkeypatch.setattr(command, "calibrate_parent", lambda config, role, **_: done.append(role))
    monkeypatch.setattr(gpu, "give_back", lambda: done.append("free"))
    code, _, err = obm("calibrate", "--config", settings())
    assert code == 0, err
    assert done == ["vlm", "free", "agent", "free"]


def test_wrong_arguments_are_refused(settings, obm):
    config = settings()
    for arguments, words in (
        (["--parent", "nobody"], "no such parent; choose vlm, agent or all"),
        (["--shard", "2/2"], "write RANK/N"),
        (["--shard", "0/2", "--merge-shards"], "give one of them"),
        (["--merge-shards"], "holds no sums of diagonal"),
        (["models.agent="], "models.agent is not set"),
    ):
        code, _, err = obm("calibrate", "--config", config, *arguments)
        assert code == 2
        assert words in err


def test_the_bench_compares_passes_with_and_without_hooks():
    from launch.bench_calibration import TARGET, bench_calibration

    (row,) = bench_calibration(
        ("float32",), repeats=1, hidden_size=40, intermediate_size=64, num_hidden_layers=1
    )
    assert set(row) == {"name", "value", "target", "met"}
    assert row["target"] == TARGET == 0.05
    assert row["met"] == (row["value"] <= TARGET)


# ---------------------------------------------------------------- broken off, and two at once


def test_a_calibration_that_was_killed_between_its_parents_goes_on(
    settings, obm, tmp_path, monkeypatch
):
    import launch.calibration_run as module

    path = settings(output=str(tmp_path / "stats"))
    measure, seen = module.measure_inputs, []

    def broken(parent, *arguments):
        seen.append(parent.role)
        if parent.role == "agent" and len(seen) == 2:
            raise KeyboardInterrupt  # as a kill: nothing is cleaned up
        return measure(parent, *arguments)

    monkeypatch.setattr(module, "measure_inputs", broken)
    assert obm("calibrate", "--config", path)[0] == 130
    first = tmp_path / "stats" / "vlm" / "stats.safetensors"
    made = first.stat().st_mtime_ns
    # with other settings the first file is not this run's
    code, _, err = obm("calibrate", "--config", path, "calibration.seed=7")
    assert (code, "exists; pass --overwrite" in err) == (2, True)
    assert obm("calibrate", "--config", path)[0] == 0
    assert seen == ["vlm", "agent", "agent"]
    assert first.stat().st_mtime_ns == made
    code, _, err = obm("calibrate", "--config", path)
    assert (code, "vlm/stats.safetensors exists" in err) == (2, True)
    assert not list((tmp_path / "stats").rglob(".begun*"))


def test_a_replacing_calibration_that_was_killed_takes_no_old_file_for_its_own(
    settings, obm, tmp_path, monkeypatch
):
    import launch.calibration_run as module

    path = settings(output=str(tmp_path / "stats"))
    for role in ("vlm", "agent"):
        (tmp_path / "stats" / role).mkdir(parents=True)
        (tmp_path / "stats" / role / "stats.safetensors").write_bytes(b"old")
    measure, seen = module.measure_inputs, []

    def broken(parent, *arguments):
        seen.append(parent.role)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(parent, *arguments)

    monkeypatch.setattr(module, "measure_inputs", broken)
    assert obm("calibrate", "--config", path, "--overwrite")[0] == 130
    assert obm("calibrate", "--config", path)[0] == 2  # the agent's is still the old one
    assert obm("calibrate", "--config", path, "--overwrite")[0] == 0
    assert seen == ["vlm", "agent", "agent"]
    assert open_stats(tmp_path / "stats" / "agent", "diagonal").names


def test_a_note_is_of_the_files_and_services_that_settings_name(settings, tmp_path):
    from configs.schema import load_config
    from launch.calibration_progress import calibration_key

    rows = tmp_path / "rows.jsonl"

    def key(role, *overrides):
        return calibration_key(load_config(settings(), overrides), role, "owner/name")

    given = f"calibration.agent_data.source={rows}"
    rows.write_text("{}\n")
    before = {role: key(role, given) for role in ("vlm", "agent")}
    rows.write_text("{}\n{}\n")
    assert key("agent", given) != before["agent"]
    assert key("vlm", given) == before["vlm"]
    assert key("vlm", "live.country=de") != key("vlm") == key("vlm", "live.retries=5")


def test_unfinished_sums_of_other_settings_go_and_those_of_a_shard_stay(settings, obm, tmp_path):
    folder = tmp_path / "stats" / "agent"
    folder.mkdir(parents=True)
    key = "0123456789abcdef"
    for name in (key, f"0-of-2-{key}"):
        (folder / f".unfinished-{name}.safetensors").touch()
    config = settings(output=str(tmp_path / "stats"))
    code, _, err = obm("calibrate", "--config", config, "--parent", "agent")
    assert code == 0, err
    left = [path.name for path in folder.glob(".unfinished*")]
    assert left == [f".unfinished-0-of-2-{key}.safetensors"]


def test_unfinished_sums_are_of_the_data_and_lengths_they_were_begun_with(settings, tmp_path):
    from configs.schema import load_config
    from launch.calibration_run import Parent, _settings_key

    rows = tmp_path / "rows.jsonl"

    def key(role, *overrides):
        config = load_config(settings(), overrides)
        return _settings_key(Parent(config, role, getattr(config.models, role)), {})

    longer = "grpo.max_completion_length=99"
    assert key("vlm") == key("vlm", longer)
    assert len({key("agent"), key("agent", longer), key("agent", "live.country=de")}) == 3
    from_rows = f"calibration.agent_data.source={rows}"
    rows.write_text("{}\n")
    before = key("agent", from_rows)
    assert key("agent", from_rows, longer) == before
    rows.write_text("{}\n{}\n")
    assert key("agent", from_rows) != before


def test_a_second_calibration_of_the_same_folder_is_told_who_is_there(settings, obm, tmp_path):
    from train.lock import locked

    path = settings(output=str(tmp_path / "stats"))
    with locked(tmp_path / "stats" / "agent"):
        code, _, err = obm("calibrate", "--config", path)
        assert code == 2
        assert "agent is in use by process" in err
        assert "choose another calibration.output=FOLDER" in err
        # a share of the batches has files of its own
        assert obm("calibrate", "--config", path, "--parent", "agent", "--shard", "0/2")[0] == 0
    assert obm("calibrate", "--config", path, "--parent", "agent")[0] == 0
