"""Transcripts in the published formats of Search-R1, MMSearch-R1 and Qwen's tool calling.

transcripts.json holds, per transcript: the dialect that reads it, whose format it is, whether it is
well-formed, and its turns: what the policy wrote, the action that it is, and, where it says what
the tools found, the observation to the byte.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from environments.dialects import DIALECTS, HERMES, action_dict, strip_end
from environments.episode import SearchEnvironment
from environments.results import Hit, Page
from environments.tool_calls import schemas
from rewards.answer import final_answer

TRANSCRIPTS = json.loads((Path(__file__).parent / "transcripts.json").read_text(encoding="utf-8"))
QUESTION = {
    "question": "Which tower is this, and when was it built?",
    "image": Image.new("RGB", (8, 8)),
}
by_name = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t["name"])


class Web:
    """Returns what the transcript says was found."""

    in_memory = True

    def __init__(self):
        self.found = []

    def search(self, queries, k):
        return [[Hit(title, title, text) for title, text in self.found] for _ in queries]

    def read(self, url, question):
        return Page("t", "x", url)


@by_name
def test_every_turn_is_the_action_it_was_meant_to_be(transcript):
    dialect = DIALECTS[transcript["dialect"]]
    for turn in transcript["turns"]:
        assert action_dict(dialect.parse(turn["policy"])) == turn["action"]


@by_name
def test_only_the_dialects_own_form_is_well_formed(transcript):
    turns = [turn["policy"] for turn in transcript["turns"]]
    assert DIALECTS[transcript["dialect"]].check_format(turns) == transcript["well_formed"]


@by_name
def test_an_episode_goes_the_same_way(transcript):
    web = Web()
    world = SearchEnvironment(
        web, web, web, dialect=transcript["dialect"], visits=1, visit_urls="any", max_turns=9
    )
    episode = world.start(QUESTION)
    for turn in transcript["turns"]:
        web.found = turn.get("result", [["t", "x"]])
        step = episode.step(turn["policy"])
        if "observation" in turn:
            assert step.observation == turn["observation"]
    assert episode.answer == transcript["answer"]
    assert (
        final_answer({"turns": [{"text": t["policy"]} for t in transcript["turns"]]})
        == (transcript["answer"])
    )


def test_a_turn_ends_where_the_policy_said_all_it_wants():
    """No stop sequence stands inside a turn of a transcript that goes on after it."""
    for transcript in TRANSCRIPTS:
        if transcript["well_formed"]:
            for turn in transcript["turns"]:
                text = strip_end(turn["policy"])
                for stop in DIALECTS[transcript["dialect"]].stop_sequences:
                    assert stop not in text or text.index(stop) + len(stop) == len(text)


# ---------------------------------------------------------------- Qwen's templates, as TRL has them


def render(template: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    path = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    if not path.is_file():
        pytest.skip(f"this TRL has no template {path.name}")
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    sandbox.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return sandbox.from_string(path.read_text(encoding="utf-8")).render(
        messages=messages, add_generation_prompt=True, **settings
    )


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_vl"])
@pytest.mark.parametrize("tools", [("text_search",), ("text_search", "image_search", "visit")])
def test_tools_are_offered_as_the_template_offers_them(template, tools):
    system, user = replace(HERMES, tools=tools).prompt("Which city?", has_image=True)
    text = user["content"][-1]["text"]
    plain = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": text},
    ]
    expected = render(template, plain, tools=schemas(tools))
    ours = render(template, [system, {"role": "user", "content": text}])
    assert ours == expected


@pytest.mark.parametrize("template", ["qwen2_5_vl", "qwen3_vl"])
def test_templates_of_the_vlms_show_tools_and_picture_as_they_are(template):
    """Qwen2.5-VL's template knows no tools; the system message does not need it to."""
    system, user = HERMES.prompt("Which city?", has_image=True)
    text = render(template, [system, user])
    assert text.startswith(f"<|im_start|>system\n{system['content']}<|im_end|>\n<|im_start|>user\n")
    assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == 1
    assert text.endswith("Question: Which city?<|im_end|>\n<|im_start|>assistant\n")


def test_image_search_is_offered_only_with_a_picture():
    (system, _) = HERMES.prompt("q", has_image=True)
    assert '"image_search"' in system["content"]
    (system, _) = HERMES.prompt("q", has_image=False)
    assert '"image_search"' not in system["content"]
    assert '"text_search"' in system["content"]
    assert [m["role"] for m in HERMES.without_tools().prompt("q", True)] == ["user"]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_vl"])
@pytest.mark.parametrize("n_results", [1, 2, 3])
def test_results_stand_as_the_template_puts_them(template, n_results):
    call = {"type": "function", "function": {"name": "text_search", "arguments": {"query": "q"}}}
    asked = [
        {"role": "user", "content": "Which city?"},
        {"role": "assistant", "content": "", "tool_calls": [call] * n_results},
    ]
    texts = [f"result {i}" for i in range(n_results)]
    answered = [*asked, *({"role": "tool", "content": text} for text in texts)]
    whole = render(template, answered)
    # what the template has written when the policy's turn ends, its end token not yet
    turn = "\n".join(
        ['<tool_call>\n{"name": "text_search", "arguments": {"query": "q"}}\n</tool_call>']
        * n_results
    )
    before, found, after = whole.rpartition(turn)
    assert found
    assert before.endswith("<|im_start|>assistant\n")
    assert HERMES.frame(texts, "q", "text") == after


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_a_call_as_the_template_writes_it_is_read(template):
    arguments = {"query": 'the "Idiot" – über\nalles'}
    call = {"type": "function", "function": {"name": "text_search", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    text = render(template, messages).removesuffix("<|im_start|>assistant\n")
    turn = text.rpartition("<|im_start|>assistant\n")[2]
    assert action_dict(HERMES.parse(turn)) == {"type": "search", **arguments}
