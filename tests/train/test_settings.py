"""What `grpo:` takes is known without TRL: a wrong value is one line before anything starts."""

import subprocess
import sys
from dataclasses import fields

import pytest
from transformers.trainer_utils import SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from configs.errors import ConfigError
from configs.schema import load_config, shipped_config
from train.live import new_status
from train.settings import (
    GRPO_DEFAULTS,
    KINDS,
    build_grpo_config,
    check_rollout_address,
    describe_step,
    resolved_grpo,
)


def config_with(*overrides):
    return load_config(shipped_config("demo"), overrides)


WRONG = [
    ("learning_rate=.nan", "nan is not a finite number"),
    ("learning_rate=.inf", "inf is not a finite number"),
    ("learning_rate=-1e-6", "out of range; use a number of 0 or more"),
    ("learning_rate='1e-6'", "expected a number, got str"),
    ("max_steps=-1", "-1 is out of range; use a number from 1 to"),
    ("max_steps=0", "0 is out of range"),
    ("max_steps=10000000000000000000000000", "out of range"),
    ("max_steps=abc", "expected a whole number, got str 'abc'; give a whole number"),
    ("max_steps=null", "expected a whole number, got nothing"),
    ("max_steps=true", "expected a whole number, got bool True"),
    ("max_steps=4.0", "expected a whole number, got float 4.0"),
    ("beta=[1]", "expected a number, got list"),
    ("beta=abc", "expected a number, got str 'abc'"),
    ("beta=-0.1", "out of range"),
    ("temperature=abc", "expected a number, got str 'abc'"),
    ("temperature=-1", "out of range; use a number above 0"),
    ("temperature=0", "out of range"),
    ("top_p=abc", "expected a number"),
    ("top_p=1.5", "out of range"),
    ("bf16=maybe", "expected true or false, got str 'maybe'; write true or false"),
    ("loss_type=nosuch", "'nosuch' is not one of grpo, bnpo"),
    ("loss_type=[grpo]", "is not one of grpo"),
    ("lr_scheduler_type=nosuch", "'nosuch' is not one of linear"),
    ("lr_scheduler_type=cosin", "did you mean 'cosine'?"),
    ("optim=adam_torch", "did you mean 'adamw_torch'?"),
    ("optim=nosuch", "'nosuch' is not one of adamw_torch"),
    ("top_k=5", "samples with temperature, top_p and generation_kwargs.max_new_tokens"),
    ("min_p=0.1", "not read by the search rollout"),
    ("num_train_epochs=3", "set `grpo.max_steps`"),
    ("sync_ref_model=true", "no checkpoint holds one that moves"),
    ("vllm_importance_sampling_mode=sequence_mask", "set the section `rollout`"),
    ("chat_template_kwargs={enable_thinking: false}", "change the template"),
    ("repetition_penalty=1.2", "remove it"),
    ("save_strategy=never", "is not one of no, steps"),
    ("scale_rewards=groups", "did you mean 'group'?"),
    ("importance_sampling_level=word", "is not one of token, sequence"),
    ("per_device_train_batch_size=0", "out of range"),
    ("per_device_train_batch_size=-8", "out of range"),
    ("per_device_train_batch_size=[8]", "expected a whole number, got list"),
    ("gradient_accumulation_steps=0", "out of range"),
    ("steps_per_generation=[1]", "expected a whole number, got list"),
    ("steps_per_generation=0", "out of range"),
    ("generation_batch_size=abc", "expected a whole number, got str"),
    ("num_generations=0", "out of range; use a number from 2"),
    ("num_generations=1", "out of range"),
    ("num_generations='8'", "expected a whole number, got str '8'"),
    ("num_iterations=0", "out of range"),
    ("max_completion_length=-3", "out of range"),
    ("max_completion_length=abc", "expected a whole number"),
    ("save_steps=0", "out of range"),
    ("logging_steps=0", "out of range"),
    ("adam_beta2=1", "out of range"),
    ("report_to=5", "expected text"),
    ("report_to=[5]", "expected text"),
    ("generation_kwargs=5", "expected a section, got int 5"),
    ("generation_kwargs=[]", "expected a section, got list"),
    ("generation_kwargs.max_new_tokens=-4", "out of range"),
    ("generation_kwargs.max_new_tokens=abc", "expected a whole number"),
    ("generation_kwargs.max_tokens=8", "unknown key; did you mean 'max_new_tokens'?"),
]


@pytest.mark.parametrize("backend", ["in_process", "vllm"])
@pytest.mark.parametrize(("setting", "words"), WRONG)
def test_a_wrong_value_names_key_reason_and_fix(setting, words, backend):
    config = config_with(f"grpo.{setting}", f"rollout.backend={backend}")
    key = setting.partition("=")[0]
    for read in (resolved_grpo, lambda config: describe_step(config, 1), new_status):
        with pytest.raises(ConfigError) as caught:
            read(config)
        assert str(caught.value).startswith(f"grpo.{key}")
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "learning_rate=0", "learning_rate=1", "warmup_steps=0.1", "warmup_steps=5",
        "save_steps=0.5", "save_total_limit=null", "save_total_limit=0", "bf16=null",
        "scale_rewards=false",
        "scale_rewards=none", "delta=2", "min_p=null",
        "top_k=0", "repetition_penalty=1", "generation_kwargs=null",
        "generation_kwargs={}", "steps_per_generation=null", "report_to=[wandb]", "report_to=null",
        "save_strategy=no", "epsilon_high=0.28", "top_p=1", "entropy_coef=-0.01", "max_grad_norm=0",
    ],
)  # fmt: skip
def test_a_right_value_goes_to_trl_as_it_was_written(setting):
    config = config_with(f"grpo.{setting}")
    name = setting.partition("=")[0]
    given, resolved = config.grpo[name], resolved_grpo(config)[name]
    assert resolved == given
    assert type(resolved) is type(given)


def test_a_checkpoint_that_no_run_can_go_on_from_is_refused():
    with pytest.raises(ConfigError, match=r"grpo\.save_only_model: .*set `grpo\.save_total_limit`"):
        resolved_grpo(config_with("grpo.save_only_model=true"))


def test_a_rollout_with_weights_in_shares_is_refused():
    with pytest.raises(ConfigError, match=r"numbers of turns.*set `rollout\.backend: vllm`"):
        resolved_grpo(config_with("grpo.ds3_gather_for_generation=false"))


def test_the_defaults_are_valid_and_known():
    assert GRPO_DEFAULTS.keys() <= KINDS.keys()
    config = config_with()
    config.grpo = GRPO_DEFAULTS
    assert resolved_grpo(config) == GRPO_DEFAULTS


def test_the_choices_are_those_of_the_libraries():
    enums = {
        "optim": OptimizerNames, "lr_scheduler_type": SchedulerType, "save_strategy": SaveStrategy,
    }  # fmt: skip
    for name, enum in enums.items():
        assert set(KINDS[name].__args__) == {item.value for item in enum}
    help_of = {item.name: item.metadata.get("help", "") for item in fields(GRPOConfig)}
    for name in ("loss_type", "importance_sampling_level"):
        assert all(f"`{choice}`" in help_of[name] or f"'{choice}'" in help_of[name]
                   for choice in KINDS[name].__args__)  # fmt: skip


def test_completions_that_are_no_whole_groups_are_refused_with_their_arithmetic():
    config = config_with(
        "grpo.per_device_train_batch_size=4", "grpo.generation_batch_size=24",
        "grpo.num_generations=16",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"24 completions \(2 processes x 4 x 3\) cannot"):
        describe_step(config, 2)


@pytest.mark.parametrize("setting", ["dataloader_prefetch_factor=abc", "metric_for_best_model=-5"])
def test_what_trl_refuses_by_type_is_a_mistake_too(tmp_path, setting):
    config = config_with("deepspeed=none", f"grpo.{setting}")
    with pytest.raises(ConfigError, match=r"^grpo: "):
        build_grpo_config(config, tmp_path)


def test_a_card_that_only_emulates_bf16_trains_in_fp32(monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr("trl.GRPOConfig", lambda **settings: made.update(settings))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    config = config_with("deepspeed=none")
    config.grpo.pop("bf16", None)
    build_grpo_config(config, tmp_path)
    assert made["bf16"] is False


def test_the_table_needs_no_trl():
    program = (
        "import sys, train.settings as s; from configs.schema import load_config, shipped_config; "
        "s.describe_step(load_config(shipped_config('demo')), 1); "
        "assert not {'trl', 'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------- addresses

NO_ADDRESSES = [
    "notaurl",
    "http://host:99999",
    "http://[::1",
    "ftp://host",
    "http://",
    "http://h:x",
]


@pytest.mark.parametrize("address", NO_ADDRESSES)
@pytest.mark.parametrize(
    ("key", "others"),
    [
        ("environment.retrieval", []),
        ("rewards.judge", ["rewards.judge_model=m"]),
        ("rollout.url", ["rollout.backend=vllm"]),
    ],
)
def test_an_address_that_is_none_is_refused_before_anybody_is_asked(key, others, address):
    with pytest.raises(ConfigError, match=rf"{key}.* is no .*write .*http://"):
        describe_step(config_with(f"{key}='{address}'", *others), 1)


def test_addresses_are_not_asked():
    check_rollout_address(
        config_with(
            "environment.retrieval=http://127.0.0.1:1/path", "rewards.judge=http://[::1]:1/v1",
            "rewards.judge_model=m", "rollout.backend=vllm", "rollout.url=https://nowhere.invalid",
        )
    )  # fmt: skip
