"""Settings: what loads, what is refused, and what the messages say."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from configs.reader import parse_yaml, write_yaml
from configs.schema import (
    SHIPPED_DIALECTS,
    Config,
    ConfigError,
    Environment,
    Merge,
    Models,
    describe,
    dump_config,
    load_config,
    resolve_model,
    shipped_config,
)
from configs.sections import Benchmark, Conflict, OwnReward, TensorRule

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    """Writes a settings file and returns its path."""

    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---------------------------------------------------------------- what loads


def test_a_file_with_only_output_gives_the_defaults(write):
    config = load_config(write("output: runs/x"))
    assert config == Config(output="runs/x")
    assert (config.merge.method, config.merge.density) == ("obm", 0.5)
    assert (config.rewards.accuracy, config.rewards.search_penalty) == (1.0, 0.1)


def test_precedence_is_default_parent_file_command_line(write):
    write("output: runs/parent\nseed: 1\nmerge: {density: 0.3, seed: 5}", "parent.yaml")
    child = write("inherits: parent.yaml\nseed: 2\nmerge: {density: 0.4}")
    config = load_config(child, ["seed=3"])
    assert config.output == "runs/parent"  # from the parent
    assert config.merge.seed == 5  # the parent's, beside the child's density
    assert config.merge.density == 0.4  # from the child
    assert config.seed == 3  # from the command line
    assert config.merge.combine == "sum"  # default


def test_inherits_is_relative_to_the_file_and_chains(write, monkeypatch, tmp_path):
    write("output: a\nseed: 7", "base/root.yaml")
    write("inherits: ../base/root.yaml\noutput: b", "mid/mid.yaml")
    leaf = write("inherits: mid/mid.yaml", "leaf.yaml")
    monkeypatch.chdir("/")
    config = load_config(leaf)
    assert (config.output, config.seed) == ("b", 7)


def test_partial_weights_and_scope_keep_the_other_defaults(write):
    config = load_config(write("output: x\nmerge: {weights: {agent: 2}, scope: {embedding: base}}"))
    assert config.merge.weights == {"vlm": 1.0, "agent": 2.0}
    assert config.merge.scope == {
        "linear": "method",
        "norm_bias": "task_arithmetic",
        "embedding": "base",
    }


def test_defaults_are_not_shared_between_configs(write):
    path = write("output: x")
    first = load_config(path)
    first.merge.weights["agent"] = 9.0
    first.environment.kinds.append("look")
    first.grpo["x"] = 1
    assert load_config(path) == Config(output="x")


def test_lists_of_a_child_replace_those_of_the_parent(write):
    write("output: x\nenvironment: {kinds: [look, image]}", "parent.yaml")
    child = write("inherits: parent.yaml\nenvironment: {kinds: [two]}")
    assert load_config(child).environment.kinds == ["two"]


def test_grpo_merges_deeply_and_is_otherwise_untouched(write):
    write("output: x\ngrpo: {beta: 0.1, model_init_kwargs: {a: 1}}", "parent.yaml")
    child = write("inherits: parent.yaml\ngrpo: {learning_rate: 2e-6, model_init_kwargs: {b: 2}}")
    assert load_config(child, ["grpo.anything.new=[1, 2]"]).grpo == {
        "beta": 0.1,
        "learning_rate": 2e-6,
        "model_init_kwargs": {"a": 1, "b": 2},
        "anything": {"new": [1, 2]},
    }


def test_an_empty_section_means_its_defaults(write):
    write("output: x\nmerge: {density: 0.2}", "parent.yaml")
    assert load_config(write("output: x\nmerge:\n")).merge == Merge()
    assert load_config(write("inherits: parent.yaml\nmerge:\n")).merge.density == 0.2


def test_an_override_can_set_a_key_to_nothing(write):
    path = write("output: x\ntracking: {group: night}\nmodels: {init: atlas://vlm}")
    assert load_config(path, ["tracking.group=null"]).tracking.group is None
    assert load_config(path, ["models.init="]).models == Models()


def test_an_override_may_hold_equals_signs_and_lists(write):
    config = load_config(
        write("output: x"), ["tracking.group='a=b'", "environment.kinds=[two, three]"]
    )
    assert config.tracking.group == "a=b"
    assert config.environment.kinds == ["two", "three"]


def test_whole_numbers_pass_for_numbers(write):
    config = load_config(write("output: x\nmerge: {density: 1}\nenvironment: {timeout_s: 3}"))
    assert isinstance(config.merge.density, float)
    assert isinstance(config.environment.timeout_s, float)


def test_the_deepspeed_key_takes_presets_files_and_none(write):
    path = write("output: x")
    assert load_config(path, ["deepspeed=none"]).deepspeed is None
    assert load_config(path, ["deepspeed=zero3"]).deepspeed == "zero3"
    assert load_config(path, ["deepspeed=my/ds.json"]).deepspeed == "my/ds.json"
    assert "zero1, zero2, zero3, zero2_offload, zero3_offload, none" in message(
        path, "deepspeed=zero4"
    )


def test_the_arm_is_named_after_the_starting_point():
    assert Config(output="x", models=Models(init="runs/demo/obm/")).arm_name == "obm"
    assert Config(output="x", models=Models(init="atlas://vlm")).arm_name == "vlm"
    named = Config(output="x", models=Models(init="atlas://vlm"))
    named.tracking.arm = "plain"
    assert named.arm_name == "plain"


def test_episode_settings_are_what_the_environment_takes():
    from environments.episode import SearchEnvironment

    settings = Environment(max_turns=2, invalid_ends=False).episode_settings()
    environment = SearchEnvironment(None, None, **settings)
    episode = environment.start({"question": "q"})
    assert episode.max_turns == 2
    assert episode.invalid_ends is False
    assert episode.timeout_s == 10.0


# ---------------------------------------------------------------- dump


def test_a_dump_loads_back_equal(write):
    path = write(
        "output: runs/x\ngrpo: {learning_rate: 2e-6, name: '2e-6', on: 'yes', n: '010', d: '~'}\n"
        "merge: {weights: {agent: 1.5}}\nmodels: {init: 'no'}\ntracking: {group: 'é: #1'}"
    )
    config = load_config(path)
    assert load_config(write(dump_config(config), "again.yaml")) == config


def test_a_dump_keeps_the_order_of_the_sections():
    keys = [line.split(":")[0] for line in dump_config(Config(output="x")).splitlines()]
    top = [key for key in keys if not key.startswith((" ", "-"))]
    assert top[:4] == ["output", "seed", "models", "calibration"]


def test_a_dump_means_the_same_to_a_plain_yaml_reader(write):
    config = load_config(write("output: x\ngrpo: {learning_rate: 2e-6, name: 'on', t: '1:30'}"))
    assert yaml.safe_load(dump_config(config))["grpo"] == config.grpo


@pytest.mark.parametrize("value", ["2e-6", "yes", "null", "010", "1:30", "", " a ", "2024-01-01"])
def test_text_stays_text_through_dump_and_load(value):
    assert parse_yaml(write_yaml({"key": value}), "test") == {"key": value}


# ---------------------------------------------------------------- YAML traps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-6", 2e-6),  # text to YAML 1.1
        ("1E5", 1e5),
        (".5", 0.5),
        ("no", "no"),  # false to YAML 1.1
        ("off", "off"),
        ("1:30", "1:30"),  # 90 to YAML 1.1
        ("010", 10),  # 8 to YAML 1.1
        ("0x10", 16),
        ("-3", -3),
        ("true", True),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("1_000", "1_000"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_repeated_key_is_an_error(write):
    path = write("output: x\nseed: 1\nseed: 2")
    assert message(path).startswith(f"{path}: key 'seed' appears twice (line 3)")


def test_broken_yaml_names_file_and_line(write):
    path = write("output: x\nmerge: {density: 0.5\n")
    assert str(path) in message(path)
    assert "line" in message(path)


def test_a_file_without_keys_is_an_error(write):
    assert "expected keys and values" in message(write("- a\n- b"))


def test_objects_cannot_be_built_from_yaml(write):
    assert "could not determine a constructor" in message(
        write("output: !!python/object/apply:os.getcwd []")
    )


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", "sed: unknown key; did you mean 'seed'?"),
        ("merge.densty=1", "merge.densty: unknown key; did you mean 'density'?"),
        ("merge.weights.agnt=1", "merge.weights.agnt: no model of this name is merged; did you"),
        ("merge.scope.linaer=obm", "did you mean 'linear'?"),
        ("merge.method=obn", "did you mean 'obm'?"),
        ("merge.scope.embedding=obm", "'obm' is not one of linear, task_arithmetic"),
        ("merge.density=1.5", "out of range; use a number from 0 to 1"),
        ("merge.weights.vlm=-1", "out of range; use a number of 0 or more"),
        ("environment.timeout_s=0", "use a number above 0"),
        ("environment.max_turns=0", "use a number of 1 or more"),
        ("environment.kinds=[]", "the list is empty"),
        ("environment.kinds=two", "expected a list, got str 'two'; write [two]"),
        ("calibration.streaming=1", "calibration.streaming: '1' is not one of auto, True, False"),
        ("environment.kinds=[two, tree]", "environment.kinds[1]: 'tree' is not one of"),
        ("environment.relations=[1]", "environment.relations[0]: expected text"),
        ("seed=1.5", "expected a whole number"),
        ("seed=true", "expected a whole number, got bool True"),
        ("seed=null", "expected a whole number, got nothing"),
        ("merge.density=.nan", "not a finite number"),
        ("merge.density=true", "expected a number"),
        ("environment.thumbnails=1", "write true or false"),
        ("tracking.group=7", 'write "7" in quotes'),
        ("merge=3", "merge: expected a section, got int 3"),
        ("seed.x=1", "seed: expected a whole number"),
        ("grpo=3", "grpo: expected a section"),
        ("seed", "not an override; write key=value"),
        ("=1", "not an override; write key=value"),
        ("a..b=1", "not an override; write key=value"),
        ("seed=[1", "command line:seed"),
    ],
)
def test_a_bad_override_names_place_reason_and_fix(write, override, expected):
    text = message(write("output: x"), override)
    assert text.startswith("command line:")
    assert expected in text


def test_the_message_names_the_file_that_set_the_key(write):
    parent = write("output: x\nmerge: {densty: 1}\nenvironment: {kinds: [tow]}", "parent.yaml")
    child = write("inherits: parent.yaml\nmerge: {density: 3}")
    assert message(child).startswith(f"{parent}:merge.densty")
    assert message(parent, "merge.density=3").startswith(f"{parent}:merge.densty")
    write("output: x", "parent.yaml")
    assert message(child).startswith(f"{child}:merge.density")
    write("output: x\nenvironment: {kinds: [tow]}", "parent.yaml")
    assert message(write("inherits: parent.yaml")).startswith(f"{parent}:environment.kinds[0]")


def test_output_is_required(write):
    path = write("seed: 1")
    assert message(path) == f"{path}:output: missing; add 'output: ...'"


def test_inheriting_in_a_circle_is_an_error(write):
    write("inherits: run.yaml", "other.yaml")
    assert "circle" in message(write("inherits: other.yaml"))


def test_a_missing_file_or_parent_is_named(write, tmp_path):
    assert "nowhere.yaml" in message(tmp_path / "nowhere.yaml")
    assert "gone.yaml" in message(write("inherits: gone.yaml"))
    assert "inherits: expected a file name" in message(write("inherits: [a, b]"))
    assert "cannot read" in message(tmp_path)


def test_errors_ask_for_exit_code_2():
    assert ConfigError.exit_code == 2


# ---------------------------------------------------------------- models and shipped files


def test_a_folder_resolves_against_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "runs" / "obm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("runs/obm") == str(tmp_path / "runs" / "obm")
    assert resolve_model("./runs/obm") == str(tmp_path / "runs" / "obm")


def test_a_hub_id_passes_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ref in ("Qwen/Qwen2.5-VL-7B-Instruct", "org/name@v1.0", "org/name@refs/pr/3"):
        assert resolve_model(ref) == ref


@pytest.mark.parametrize(
    "ref",
    ["runs/obn", "./x", "/no/where", "a/b/c", "merged", "here/x", "here/x@main", "a/b@", "a@b/c",
     "~nobody-of-this-name/x"],
)  # fmt: skip
def test_a_missing_folder_is_no_hub_id(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        resolve_model(ref)


def test_paths_below_home_are_there(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("output: ~/run\nenvironment: {cache: ~/cache}", "above.yaml")
    path = write(
        """
        inherits: ~/above.yaml
        deepspeed: ~/own.json
        calibration: {output: ~/stats}
        live: {image_host: ~/www}
        rewards: {judge_cache: ~/judge.jsonl}
        rollout: {sync_dir: ~/sync}
        algorithm: {anchor_stats: [~/stats, x]}
        conflict: {keep_benchmark: {name: table, images: ~/c}}
        environment:
          train_benchmark: {name: table, images: ~/a}
          eval_benchmark: {name: table, images: ~nobody-of-this-name/b}
        """,
        "sub/run.yaml",
    )
    config = load_config(path, ["environment.cache=~/other"])
    here = str(tmp_path)
    assert config.output == f"{here}/run"
    assert config.deepspeed == f"{here}/own.json"
    assert config.calibration.output == f"{here}/stats"
    assert config.live.image_host == f"{here}/www"
    assert config.rewards.judge_cache == f"{here}/judge.jsonl"
    assert config.rollout.sync_dir == f"{here}/sync"
    assert config.algorithm.anchor_stats == [f"{here}/stats", "x"]
    assert config.environment.cache == f"{here}/other"
    asked = (
        config.environment.train_benchmark,
        config.environment.eval_benchmark,
        config.conflict.keep_benchmark,
    )
    images = [one.images for one in asked if one is not None]
    assert images == [f"{here}/a", "~nobody-of-this-name/b", f"{here}/c"]


def test_an_unknown_shipped_checkpoint_is_an_error():
    with pytest.raises(ConfigError, match="no shipped checkpoint 'atlas://vln'"):
        resolve_model("atlas://vln")


def test_every_shipped_file_loads_and_dumps(tmp_path):
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = load_config(path)
        again = tmp_path / path.name
        again.write_text(dump_config(config))
        assert load_config(again) == config, path
        assert shipped_config(path.stem) == shipped_config(path.name) == path


def test_an_unknown_shipped_file_is_an_error():
    with pytest.raises(ConfigError, match="no shipped configuration 'nope'"):
        shipped_config("nope")


def test_settings_do_not_import_torch():
    code = "import sys, configs.schema; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---------------------------------------------------------------- documentation


def test_the_committed_page_is_up_to_date():
    assert (ROOT / "docs" / "configuration.md").read_text() == describe()


def test_every_key_is_documented_with_its_default():
    page = describe()
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| `")}
    asked = Environment(train_benchmark=Benchmark(), eval_benchmark=Benchmark())
    conflict = Conflict(keep_benchmark=Benchmark())
    plain = yaml.safe_load(dump_config(Config(output="x", environment=asked, conflict=conflict)))
    # sections that may be null have a row of their own, too; so have lists of sections
    optional = {
        "environment.train_benchmark", "environment.eval_benchmark", "conflict.keep_benchmark",
    }  # fmt: skip
    listed = {
        f"{key}[].{item.name}"
        for key, section in (("merge.rules", TensorRule), ("reward_functions", OwnReward))
        for item in fields(section)
    }

    def leaves(value, key=""):
        for name, inner in value.items():
            dotted = f"{key}.{name}" if key else name
            # the names under weights are the user's own
            if isinstance(inner, dict) and inner and dotted != "merge.weights":
                yield from leaves(inner, dotted)
            else:
                yield dotted

    assert {f"| `{key}`" for key in {*leaves(plain), *optional, *listed}} == set(rows)
    assert "| `0.5` |" in rows["| `merge.density`"]
    assert "number from 0 to 1" in rows["| `merge.density`"]
    assert all(len(line.split(" | ")) == 4 for line in rows.values())


def test_a_dialect_is_a_shipped_one_or_a_file(write):
    from environments.dialects import DIALECTS

    path = write("output: x")
    assert tuple(DIALECTS) == SHIPPED_DIALECTS
    for name in (*SHIPPED_DIALECTS, "my_dialect.yaml"):
        assert load_config(path, [f"environment.dialect={name}"]).environment.dialect == name
    text = message(path, "environment.dialect=serch_r1")
    assert text.endswith("there is no dialect 'serch_r1'; did you mean 'search_r1'?")
    text = message(path, "environment.dialect=my_dialect.json")
    assert "use search_r1, search_r1_full, mmsearch_r1, hermes, the path of a .yaml file" in text


def test_reward_functions_are_a_list_with_weights(write):
    path = write("output: x\nreward_functions:\n  - {function: mine.py:brevity, weight: -1}")
    assert load_config(path).reward_functions == [OwnReward("mine.py:brevity", -1.0)]
    assert "reward_functions[0].wieght" in message(
        path, "reward_functions=[{function: mine.py:brevity, wieght: 1}]"
    )
    assert "expected a section" in message(path, "reward_functions=['mine.py:brevity']")


@pytest.mark.parametrize(
    "key", ["environment.train_benchmark", "environment.eval_benchmark", "conflict.keep_benchmark"]
)
def test_what_the_atlas_would_not_read_of_a_benchmark_is_refused(write, key):
    path = write("output: x")
    assert f"{key}.limit: not read where the atlas asks" in message(path, f"{key}.limit=20")
    assert f"{key}.kinds: not read" in message(path, f"{key}.kinds=[two]", f"{key}.name=atlas")
    load_config(path, [f"{key}.name=atlas"])
    load_config(path, [f"{key}.name=mmsearch", f"{key}.limit=20"])


def test_a_judge_needs_a_model_and_its_address_holds_no_key(write):
    path = write("output: x\nrewards: {judge: 'http://127.0.0.1:8000/v1', judge_model: m}")
    assert load_config(path).rewards.judge_model == "m"
    assert "rewards.judge_model: nobody is named" in message(path, "rewards.judge_model=''")
    for address in ("http://user:secret@host/v1", "http://host/v1?key=secret"):
        text = message(path, f"rewards.judge={address}")
        assert "rewards.judge: an address must not hold a key" in text
        assert "secret" not in text
    for address in ("http://[::1", "127.0.0.1:8000", "http://host:99999"):
        assert "is no address of a service; write it as" in message(
            path, f"rewards.judge='{address}'"
        )


@pytest.mark.parametrize(
    "address",
    ["notaurl", "http://host:99999", "http://host:x", "http://[::1", "ftp://host", "http://",
     "http://a b", " http://host"],
)  # fmt: skip
def test_a_search_server_needs_an_address(write, address):
    text = message(write(f"output: x\nenvironment: {{retrieval: '{address}'}}"))
    assert "run.yaml:environment.retrieval: " in text
    assert "is no address of a service; write it as http://host:port" in text


def test_the_address_of_a_search_server_holds_no_key(write):
    path = write("output: x")
    for address in ("http://user:secret@host", "http://host?key=secret"):
        text = message(path, f"environment.retrieval={address}")
        assert "an address must not hold a key; put it into the environment variable" in text
        assert "secret" not in text
    for address in ("http://127.0.0.1:8000", "https://host/path", "http://[::1]:80/", ""):
        config = load_config(path, [f"environment.retrieval='{address}'"])
        assert config.environment.retrieval == address


@pytest.mark.parametrize("name", ["base", "vlm", "agent"])
def test_a_donor_does_not_take_the_name_of_another_model(write, name):
    text = message(write(f"output: x\nmodels: {{donors: {{{name}: owner/model}}}}"))
    assert f"run.yaml:models.donors.{name}: '{name}' is a model of its own, not a donor" in text
    assert text.endswith(f"; set models.{name}, or rename the donor")


@pytest.mark.parametrize("name", ["qwen2.5-math", "org/math", "a b"])
def test_a_donors_name_is_one_word(write, name):
    text = message(write(f"output: x\nmodels: {{donors: {{'{name}': owner/model}}}}"))
    assert f"'{name}' has other signs than letters, digits, _ and -; rename the donor" in text


def test_a_donor_does_not_take_the_name_of_a_method(write):
    text = message(write("output: x\nmodels: {donors: {ties: owner/model}}"))
    reason = "'ties' is the name of a merge method; rename the donor"
    assert text.endswith(f"run.yaml:models.donors.ties: {reason}")


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_number_too_large_for_a_float_is_not_finite(write, sign):
    text = message(write("output: x"), f"rewards.accuracy={sign}{'9' * 400}")
    assert text == f"command line:rewards.accuracy: {sign}inf is not a finite number; give a number"


@pytest.mark.parametrize("seed", [-1, 2**32, int("9" * 400)])
def test_a_seed_is_one_that_numpy_takes(write, seed):
    path = write("output: x")
    text = message(path, f"seed={seed}")
    assert text.startswith("command line:seed: ")
    assert text.endswith(" is out of range; use a whole number from 0 to 4294967295")
    assert load_config(path, ["seed=4294967295"]).seed == 2**32 - 1


def test_an_unknown_key_need_not_be_text_to_be_refused(write):
    assert "a key must be text; put it in quotes" in message(write("output: x\nmerge: {3: 4}"))


def test_a_parent_with_a_name_that_no_file_can_have_is_one_error(write):
    assert "cannot read the settings" in message(write('output: x\ninherits: "a\\0b"'))
