"""The rollout: the same log-probs as a plain forward, and the same tokens however it is batched."""

import time
from pathlib import Path

import pytest
import torch
import trl

from environments.dialects import MMSEARCH_R1
from environments.episode import SearchEnvironment
from train import rollout
from train.batch import fill_holes
from train.sampling import inverse_cdf, nucleus

# fp32 with sums in another order: about 1e-6 here; 1e-4 is what a position or mask error exceeds
TOLERANCE = 1e-5


def texts(trajectories):
    return [[turn.text for turn in t.turns] for t in trajectories]


def tokens(trajectories):
    return [t.completion_ids for t in trajectories]


# ---------------------------------------------------------------- numbers


def test_logprobs_equal_a_plain_forward_of_the_whole_sequence(make_engine, questions, full_forward):
    engine = make_engine(temperature=0.7)
    trajectories = engine.rollout(questions, group_size=3)
    assert {len(t.turns) for t in trajectories} == {1, 2, 3}
    assert any(t.turns[0].images and t.turns[0].observation_ids for t in trajectories)
    for trajectory in trajectories:
        expected, is_policy = full_forward(engine, trajectory)
        recorded = torch.tensor(trajectory.completion_logprobs)
        assert torch.allclose(recorded[is_policy], expected[is_policy], atol=TOLERANCE)


def test_logprobs_equal_a_plain_forward_for_a_text_model(
    tiny_checkpoints, environment, questions, full_forward
):
    from train.policy import load_policy
    from train.rollout import RolloutEngine

    model, tokenizer = load_policy(tiny_checkpoints["agent"])
    engine = RolloutEngine(model, tokenizer, environment, max_completion_tokens=60)
    trajectories = engine.rollout([{**q, "image": None} for q in questions], group_size=2)
    for trajectory in trajectories:
        expected, is_policy = full_forward(engine, trajectory)
        assert torch.allclose(
            torch.tensor(trajectory.completion_logprobs), expected[is_policy], atol=TOLERANCE
        )


def test_a_text_models_own_template_gets_the_question_as_one_string(
    tiny_checkpoints, environment, questions
):
    from train.policy import load_policy
    from train.rollout import RolloutEngine

    model, tokenizer = load_policy(tiny_checkpoints["agent"])
    path = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    prompt = RolloutEngine(model, tokenizer, environment).prepare({**questions[0], "image": None})
    assert questions[0]["question"] in prompt.text
    assert prompt.text in tokenizer.decode(prompt.token_ids)


def test_mmsearch_observations_come_as_a_new_user_turn(make_engine, questions, full_forward):
    environment = SearchEnvironment(*_indexes(), dialect=MMSEARCH_R1, top_k_image=2)
    turns = ["<reason>a</reason><search><img></search>", "<reason>b</reason><answer>x</answer>"]
    engine = make_engine(
        environment=environment,
        script=lambda q, turn: turns[turn],
        max_new_tokens_per_turn=80,
        max_completion_tokens=1500,
    )
    trajectory = engine.rollout(questions[:1])[0]
    assert trajectory.stop_reason == "answer"
    decoded = engine.tokenizer.decode(trajectory.turns[0].observation_ids)
    assert decoded.startswith("<|im_end|>\n<|im_start|>user\nSearched results:")
    expected, is_policy = full_forward(engine, trajectory)
    recorded = torch.tensor(trajectory.completion_logprobs)
    assert torch.allclose(recorded[is_policy], expected[is_policy], atol=TOLERANCE)


def _indexes():
    from environments.tools import Hit

    class Index:
        in_memory = True

        def search(self, queries, k):
            return [[Hit("fr", "France", "text")] for _ in queries]

    return Index(), Index()


# ---------------------------------------------------------------- episodes


def test_scripted_turns_call_the_tools_and_end_with_the_answer(make_engine, questions):
    trajectory = make_engine().rollout(questions[:1])[0]
    assert [turn.action["type"] for turn in trajectory.turns] == [
        "image_search",
        "search",
        "answer",
    ]
    assert trajectory.stop_reason == "answer"
    assert trajectory.answer == "Paris"
    assert trajectory.turns[1].hits == ["france/capital", "italy/capital"]
    assert len(trajectory.all_images) == 3
    assert trajectory.turns[2].observation is None


def test_completion_is_policy_tokens_and_observations_in_order(make_engine, questions):
    engine = make_engine()
    trajectory = engine.rollout(questions[:1])[0]
    mask = trajectory.completion_mask
    assert len(mask) == len(trajectory.completion_ids) == len(trajectory.completion_logprobs)
    assert sum(mask) == trajectory.n_policy_tokens
    changes = [mask[i] != mask[i + 1] for i in range(len(mask) - 1)]
    assert sum(changes) == 4  # turn, observation, turn, observation, turn
    n_pads = sum(i == engine.image_token_id for i in trajectory.completion_ids)
    # a 56x56 thumbnail is 4 tokens; 112x28 is resized to about as many pixels
    assert n_pads == sum(engine.images.encode(i).n_tokens for i in trajectory.turns[0].images)


def test_tokens_after_a_stop_are_those_of_the_stop(make_engine, questions):
    """A turn ends with the closing tag: nothing sampled behind it is kept."""
    for trajectory in make_engine().rollout(questions, group_size=2):
        for turn in trajectory.turns[:-1]:
            assert turn.text.rstrip().endswith("</search>")


def test_a_turn_that_is_cut_ends_the_episode_as_length(make_engine, questions):
    engine = make_engine(script=None, max_new_tokens_per_turn=5)
    trajectories = engine.rollout(questions, group_size=2)
    reasons = {t.stop_reason for t in trajectories}
    assert reasons <= {"length", "invalid"}
    assert "length" in reasons
    cut = [t for t in trajectories if t.stop_reason == "length"]
    assert all(len(t.completion_ids) == 5 for t in cut)
    assert all(t.turns[-1].action["type"] == "invalid" for t in cut)


def test_an_observation_beyond_the_budget_ends_the_episode_and_is_kept_as_text(
    make_engine, questions
):
    n_turn = len(make_engine().tokenizer("<think> see </think> <search> <img> </search>").input_ids)
    engine = make_engine(max_completion_tokens=n_turn + 8)
    trajectory = engine.rollout(questions[:1])[0]
    assert trajectory.stop_reason == "length"
    assert trajectory.turns[0].observation is not None
    assert trajectory.turns[0].observation_ids == []
    assert trajectory.all_images == trajectory.images
    assert len(trajectory.completion_ids) == n_turn


def test_no_episode_is_longer_than_the_budget(make_engine, questions):
    for budget in (10, 37, 90):
        engine = make_engine(max_completion_tokens=budget)
        lengths = [len(t.completion_ids) for t in engine.rollout(questions, group_size=2)]
        assert max(lengths) <= budget


def test_a_failing_tool_does_not_stop_the_rollout(make_engine, questions):
    class Broken:
        in_memory = True

        def search(self, queries, k):
            raise RuntimeError("no network")

    environment = SearchEnvironment(Broken(), Broken())
    trajectory = make_engine(environment=environment).rollout(questions[:1])[0]
    assert trajectory.turns[0].fault == "infrastructure"
    assert trajectory.stop_reason == "answer"


def test_vision_tokens_are_never_sampled(make_engine, questions):
    engine = make_engine(script=None, temperature=50.0)  # almost uniform over 434 tokens
    trajectories = engine.rollout(questions, group_size=8)
    sampled = {i for t in trajectories for turn in t.turns for i in turn.token_ids}
    assert len(sampled) > 300
    assert not sampled & set(engine._suppressed)


# ---------------------------------------------------------------- randomness and batching


def test_rows_beyond_the_tokenizer_are_never_sampled(make_engine, questions, fresh_policy):
    """Qwen2.5's embeddings have 151,936 rows, its tokenizer 151,665 tokens."""
    model, _ = fresh_policy
    n_tokens = model.config.get_text_config().vocab_size
    model.resize_token_embeddings(n_tokens + 7)
    with torch.no_grad():
        model.get_output_embeddings().weight[n_tokens:] = 3.0 * torch.randn(7, 64)
    engine = make_engine(script=None, max_completion_tokens=40)
    engine = type(engine)(model, engine.processor, engine.environment, max_completion_tokens=40)
    for greedy in (False, True):
        for trajectory in engine.rollout(questions, 4, greedy=greedy):
            assert all(i < n_tokens for turn in trajectory.turns for i in turn.token_ids)


def test_same_seed_same_tokens_other_seed_other_tokens(make_engine, questions):
    first, again = (tokens(make_engine(script=None, seed=3).rollout(questions)) for _ in range(2))
    other = tokens(make_engine(script=None, seed=4).rollout(questions))
    assert first == again
    assert first != other


def test_successive_rollouts_differ(make_engine, questions):
    engine = make_engine(script=None)
    assert tokens(engine.rollout(questions)) != tokens(engine.rollout(questions))


def test_greedy_does_not_depend_on_seed_or_group(make_engine, questions):
    one = texts(make_engine(script=None, seed=1).rollout(questions, greedy=True))
    two = texts(make_engine(script=None, seed=2).rollout(questions, group_size=2, greedy=True))
    assert one == two[::2] == two[1::2]


def test_greedy_says_the_most_likely_token_that_may_be_said(make_engine, questions):
    engine = make_engine(script=None, max_completion_tokens=20)
    [episode] = engine.rollout(questions[4:5], greedy=True)  # without a picture
    ids = torch.tensor([episode.prompt_ids + episode.completion_ids])
    with torch.no_grad():
        logits = engine.model.eval()(input_ids=ids).logits[0, len(episode.prompt_ids) - 1 : -1]
    logits[:, list(engine._suppressed)] = -torch.inf
    [turn] = episode.turns
    assert len(turn.token_ids) > 1
    assert logits.argmax(dim=-1).tolist() == turn.token_ids


def test_a_script_may_say_the_first_token_of_the_vocabulary(make_engine, questions):
    engine = make_engine(script=lambda question, turn: "!!", max_new_tokens_per_turn=4)
    [episode] = engine.rollout(questions[4:5])
    ids = engine.processor.tokenizer("!!")["input_ids"]
    assert 0 in ids
    assert episode.turns[0].token_ids[: len(ids)] == ids


def test_waves_give_the_same_tokens_as_one_batch(make_engine, questions):
    whole = tokens(make_engine().rollout(questions, group_size=4))
    waves = tokens(make_engine(max_rows=5).rollout(questions, group_size=4))
    assert waves == whole


def test_no_more_rows_run_together_than_fit_in_a_gpus_free_memory(
    make_engine, questions, monkeypatch
):
    engine = make_engine(fits_memory=True)
    config = engine.model.config.get_text_config()
    longest = max(len(engine.prepare(question).token_ids) for question in questions)
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    # keys and values in fp32, of a prompt, an episode and the spare slot
    row = 2 * config.num_hidden_layers * width * 4 * (longest + engine.max_completion_tokens + 1)
    waves = []
    run = rollout._Wave.run
    monkeypatch.setattr(
        rollout._Wave, "run", lambda wave: waves.append(len(wave.rows)) or run(wave)
    )
    for free, expected in ((2 * 5 * row, [5, 3]), (row, [1] * 8), (None, [8])):
        waves.clear()
        monkeypatch.setattr(rollout, "free_bytes", lambda device, free=free: free)
        engine.rollout(questions)
        assert waves == expected
    waves.clear()
    monkeypatch.setattr(rollout, "free_bytes", lambda device: row)
    make_engine().rollout(questions)  # of a training
    assert waves == [8]


def test_two_processes_draw_the_tokens_of_one(make_engine, questions):
    rows = [question for question in questions for _ in range(4)]
    engine = make_engine(script=None)
    whole = tokens(engine.rollout_rows(rows, number=7))
    halves = [
        tokens(engine.rollout_rows(rows[start : start + 16], first_row=start, number=7))
        for start in (0, 16)
    ]
    assert halves[0] + halves[1] == whole


def test_tool_threads_change_the_order_of_work_but_not_the_episodes(make_engine, questions):
    class Slow(SearchEnvironment):
        def start(self, question):
            episode = super().start(question)
            step = episode.step
            delay = 0.002 * (hash(question.get("id", "")) % 5)

            def slow_step(*args, **kwargs):
                time.sleep(delay)
                return step(*args, **kwargs)

            episode.step = slow_step
            return episode

    base = make_engine()
    whole = tokens(base.rollout(questions, group_size=3))
    environment = base.environment
    slow = Slow(environment.text_index, environment.image_index, top_k_image=2, thumbnails=True)
    threaded = tokens(make_engine(environment=slow, tool_workers=4).rollout(questions, 3))
    assert threaded == whole


def test_no_questions_no_episodes(make_engine):
    assert make_engine().rollout([]) == []


def test_training_mode_and_attention_are_restored(make_engine, questions):
    engine = make_engine()
    engine.model.train()
    engine.rollout(questions[:2])
    assert engine.model.training
    engine.model.eval()


# ---------------------------------------------------------------- small parts


def test_inverse_cdf_picks_the_token_that_owns_the_draw():
    probs = torch.tensor([[0.0, 0.2, 0.3, 0.5, 0.0]]).repeat(5, 1)
    draws = torch.tensor([0.0, 0.19, 0.21, 0.51, 1.0])
    # mass runs 0-0.2 for token 1, 0.2-0.5 for token 2, 0.5-1 for token 3; 4 has none
    assert inverse_cdf(probs, draws).tolist() == [1, 1, 2, 3, 3]


def test_inverse_cdf_frequencies_match_the_probabilities():
    probs = torch.tensor([0.1, 0.6, 0.3]).repeat(20_000, 1)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(inverse_cdf(probs, draws), minlength=3) / 20_000
    # standard error of a share is at most sqrt(0.25 / 20000) = 0.0035
    assert torch.allclose(share, torch.tensor([0.1, 0.6, 0.3]), atol=0.015)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    kept = nucleus(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.65)
    assert kept.tolist() == [[0.0, pytest.approx(0.4), 0.0, pytest.approx(0.3)]]


def test_fill_holes_moves_only_what_lies_outside():
    assert fill_holes([0, 2, 5, 3], 0) == [0, 5, 2, 3]
    assert fill_holes([1, 4], 4) == [4, 1]
    assert fill_holes([], 3) == []
