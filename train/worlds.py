"""The world that a settings file describes: environment, questions and a rollout engine in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from train.settings import episode_lengths, resolved_grpo

if TYPE_CHECKING:
    from configs.schema import Config
    from configs.sections import Environment
    from environments.atlas.editions import Edition
    from train.episodes import Engine


def load_environment(config: Config) -> Any:
    """The search environment of `config.environment`."""
    section = config.environment
    if section.name != "atlas":
        raise ConfigError(f"environment.name: no world '{section.name}'; write atlas")
    from environments.episode import SearchEnvironment
    from environments.live import live_tools

    back_ends = live_tools(section, config.live, *_indexes(section))
    return SearchEnvironment(*back_ends, **section.episode_settings())


def _indexes(section: Any) -> tuple[Any, Any]:
    """The world's own text and image index, here or on a search server."""
    if section.retrieval and section.cache and section.cache_mode == "offline":
        from environments.remote import RemoteImageIndex, RemoteTextIndex, SearchServer

        server = SearchServer(section.retrieval)  # it may be gone: the cache answers for it
        far_text = RemoteTextIndex(server, section.snippet_words)
        return far_text, RemoteImageIndex(server, section.thumbnails)
    if section.retrieval:
        from environments.remote import connect as connect_search

        return connect_search(
            section.retrieval, timeout_s=section.timeout_s, thumbnails=section.thumbnails,
            snippet_words=section.snippet_words,
        )  # fmt: skip
    from environments.atlas.world import load_image_index, load_text_index

    edition, domains = _edition(section), section.domains()
    text_index = load_text_index(edition, section.snippet_words)
    return text_index, load_image_index(domains=domains)


def load_questions(
    config: Config,
    split: str,
    kinds: Sequence[str],
    n: int,
    seed: int | None = None,
    domain: str | None = None,
) -> list[dict[str, Any]]:
    """Questions of a split, with photos; the same for every arm that has the same data seed.

    Args:
        config: gives strength, relations, edition and, where not given, data seed and domain.
        split: train, dev or test.
        kinds: question kinds.
        n: how many.
        seed: of choice and photos.
        domain: what the photos show.
    """
    from environments.atlas.questions import load_questions as load_atlas_questions

    section = config.environment
    return load_atlas_questions(
        split,
        list(kinds),
        n,
        seed=section.data_seed if seed is None else seed,
        strength=section.strength,
        relations=section.relations,
        edition=_edition(section),
        domain=domain or section.domain,
    )


def load_train_questions(config: Config) -> list[dict[str, Any]]:
    """What training asks."""
    section = config.environment
    if is_benchmark(section.train_benchmark):
        return load_benchmark(section.train_benchmark)
    return load_questions(config, "train", section.kinds, section.train_size)


def load_eval_questions(config: Config) -> list[dict[str, Any]]:
    """What the held-out evaluation asks."""
    section = config.environment
    if is_benchmark(section.eval_benchmark):
        return load_benchmark(section.eval_benchmark)
    return load_questions(
        config,
        section.eval_split,
        section.eval_kinds,
        section.eval_size,
        domain=section.eval_domain,
    )


def count_shared(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> int:
    """How many of the evaluation's questions are training questions, too, by id and words."""
    trained = {(question["id"], question["question"]) for question in train}
    return sum((question["id"], question["question"]) in trained for question in held_out)


def _edition(section: Environment) -> Edition:
    """Which facts hold in the world of `environment:`."""
    from environments.atlas.editions import Edition

    return Edition(section.counterfactual, section.news)


def is_benchmark(section: Any) -> bool:
    """Whether the settings name a benchmark other than the atlas."""
    return section is not None and section.name != "atlas"


def load_benchmark(section: Any) -> list[dict[str, Any]]:
    """Questions of a benchmark, as a section `Benchmark` of the settings chooses them.

    Raises:
        BenchmarkError: names the first bad row.
    """
    from environments.benchmarks.registry import load_benchmark as load
    from environments.benchmarks.registry import selection_of

    return list(load(section.name, selection_of(section)))


def build_engine(config: Config, model: Any, processor: Any, **settings: Any) -> Engine:
    """A rollout engine with the limits that training would use.

    Args:
        config: environment and `grpo:` section.
        model: policy.
        processor: its processor or tokenizer.
        settings: laid over, e.g. `environment` or `script`; `rollout=None` for a model that is not
            the policy, and so must not go to a server; `make_engine` for another class of engine.
    """
    grpo = resolved_grpo(config)
    lengths = episode_lengths(grpo)
    options: dict[str, Any] = {
        "max_new_tokens_per_turn": lengths["max_new_tokens"],
        "max_completion_tokens": lengths["max_completion_length"],
        "temperature": grpo["temperature"],
        "top_p": grpo.get("top_p", 1.0),
        "seed": config.seed,
        "tool_workers": config.rollout.tool_workers,
        "fits_memory": True,
        **settings,
    }
    environment = options.pop("environment", None) or load_environment(config)
    of_backend = engine_class(options.pop("rollout", config.rollout))
    make_engine = options.pop("make_engine", of_backend)
    return make_engine(model, processor, environment, **options)


def engine_class(rollout: Any = None) -> Callable[..., Engine]:
    """What makes the engine of a back end, with the arguments of `EpisodeEngine`.

    Args:
        rollout: the section `rollout` of the settings; None = in process.
    """
    if rollout is None or rollout.backend == "in_process":
        from train.rollout import RolloutEngine

        return RolloutEngine
    from train.vllm_rollout import VLLMRolloutEngine

    return partial(VLLMRolloutEngine, client=connect(rollout), sync_folder=rollout.sync_dir)


def connect(rollout: Any) -> Any:
    """Client of the server that `rollout.url` names; nothing is sent yet."""
    from train.vllm_client import VLLMClient

    return VLLMClient(rollout.url, timeout_s=rollout.timeout_s, retries=rollout.retries)
