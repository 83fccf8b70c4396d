"""From a settings file to the world that it describes."""

from types import SimpleNamespace

import pytest

from configs.schema import load_config
from train.worlds import load_environment


def test_every_setting_of_an_episode_reaches_the_environment(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\n"
        "environment: {invalid_ends: false, max_turns: 2, timeout_s: 3.0}\n"
    )
    episode = load_environment(load_config(path)).start({"question": "q"})
    assert episode.invalid_ends is False
    assert episode.max_turns == 2
    assert episode.timeout_s == 3.0


def test_a_revision_of_a_hub_id_reaches_the_hub(monkeypatch):
    from train import policy

    asked = []

    def from_pretrained(**arguments):
        asked.append(arguments)
        raise OSError("no hub here")

    monkeypatch.setattr(policy, "load_config", lambda folder: SimpleNamespace(model_type="qwen2"))
    monkeypatch.setattr(policy.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(policy.PolicyLoadError, match="owner/name@v1"):
        policy.load_processor("owner/name@v1")
    assert asked[0]["pretrained_model_name_or_path"] == "owner/name"
    assert asked[0]["revision"] == "v1"


def test_every_setting_of_the_world_reaches_questions_and_indexes(tmp_path, monkeypatch):
    from environments.atlas.editions import Edition
    from train.worlds import load_eval_questions, load_train_questions

    asked = []
    monkeypatch.setattr(
        "environments.atlas.world.load_text_index", lambda *settings: asked.append(settings)
    )
    monkeypatch.setattr(
        "environments.atlas.world.load_image_index", lambda domains: asked.append(domains)
    )
    monkeypatch.setattr(
        "environments.atlas.questions.load_questions",
        lambda *_, edition, domain, **settings: asked.append((edition, domain)),
    )
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\n"
        "environment: {eval_domain: maps, counterfactual: 3, news: both, "
        "snippet_words: 100}\n"
    )
    config = load_config(path)
    load_environment(config)
    load_train_questions(config)
    load_eval_questions(config)
    edition = Edition(3, "both")
    assert asked == [(edition, 100), ("flags", "maps"), (edition, "flags"), (edition, "maps")]
