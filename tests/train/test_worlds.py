"""From a settings file to the world that it describes."""

from configs.schema import load_config
from environments.episode import SearchEnvironment
from train.worlds import load_environment


def test_every_setting_of_an_episode_reaches_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "environments.atlas.world.load_environment",
        lambda **settings: SearchEnvironment(None, None, **settings),
    )
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\n"
        "environment: {invalid_ends: false, max_turns: 2, timeout_s: 3.0}\n"
    )
    episode = load_environment(load_config(path)).start({"question": "q"})
    assert episode.invalid_ends is False
    assert episode.max_turns == 2
    assert episode.timeout_s == 3.0
