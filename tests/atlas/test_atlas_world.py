"""The atlas: splits, photos, passages, questions, and the recall that both indexes must reach."""

import numpy as np
import pytest
from PIL import Image

from environments import retrieval
from environments.atlas.distortions import DISTORTIONS
from environments.atlas.entities import HEADLINE_RELATIONS, SPLITS, TOPICS, load_entities, load_flag
from environments.atlas.passages import load_passages, passage_id
from environments.atlas.photos import render_photo, render_two_flags, render_unfamiliar_flag
from environments.atlas.questions import KINDS, list_questions, load_questions, main_colour
from environments.atlas.recall import INDEXES, measure_images, recall
from environments.atlas.world import (
    draw_views,
    load_image_index,
    load_text_index,
    measure_retrieval,
)
from environments.errors import EnvironmentSetupError
from environments.retrieval import BM25TextIndex, ColourImageIndex, cut_snippet
from environments.tools import Hit


def test_chains_never_cross_a_split():
    entities = load_entities()
    for question in (q for split in SPLITS for q in list_questions(split, "three")):
        gold_iso = question["gold_passages"][0].split("/")[0]
        assert entities[gold_iso].split == question["split"]


def test_two_thirds_of_every_split_are_seen():
    entities = load_entities().values()
    for split in SPLITS:
        members = [e for e in entities if e.split == split]
        assert sum(e.seen for e in members) == round(2 / 3 * len(members))


def test_every_fact_stands_in_its_gold_passage_and_overviews_state_none():
    passages = {passage.id: passage for passage in load_passages()}
    for entity in load_entities().values():
        for relation, answers in entity.relations.items():
            assert f"{relation} {answers[0]}" in passages[passage_id(entity.iso, relation)].text
        assert passages[f"{entity.iso}/overview"].facts == ()
    assert {r for relations in TOPICS.values() for r in relations} >= set(HEADLINE_RELATIONS)


def test_photos_are_deterministic_by_seed_and_differ_between_seeds():
    flag = load_flag("fr")
    first, again, other = (np.asarray(render_photo(flag, seed, 0.5)) for seed in (3, 3, 4))
    assert first.shape == (56, 56, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_strength_moves_a_photo_away_from_the_flat_flag():
    flat = np.asarray(render_photo(load_flag("jp"), 1, 0.0), dtype=float)
    gentle, hard = (
        np.abs(np.asarray(render_photo(load_flag("jp"), 1, s), dtype=float) - flat).mean()
        for s in (0.3, 1.0)
    )
    assert 0 < gentle < hard


def test_a_scene_of_two_flags_holds_both_side_by_side():
    scene = render_two_flags(load_flag("fr"), load_flag("jp"), seed=5)
    left = load_image_index().search([scene.crop((0, 0, 56, 56))], 1)[0][0].id
    right = load_image_index().search([scene.crop((56, 0, 112, 56))], 1)[0][0].id
    assert (left, right) == ("fr", "jp")


def test_made_up_flags_are_deterministic_and_not_constant():
    assert np.array_equal(render_unfamiliar_flag(9), render_unfamiliar_flag(9))
    assert not np.array_equal(render_unfamiliar_flag(9), render_unfamiliar_flag(10))


@pytest.mark.parametrize(("iso", "colour"), [("cn", "red"), ("sa", "green")])
def test_main_colour_reads_the_pixels(iso, colour):
    assert main_colour(load_flag(iso)) == colour


def test_main_colour_of_an_even_mixture_is_none():
    thirds = np.zeros((30, 30, 3), dtype=np.uint8)
    thirds[:10], thirds[10:20], thirds[20:] = (200, 30, 45), (20, 60, 150), (255, 255, 255)
    assert main_colour(thirds) is None


def test_recall_by_hand():
    found = [[Hit(i, "") for i in ids] for ids in ("ab", "cab", "bcda")]
    # a is first, second, and fourth
    assert recall(found, ["a", "a", "a"]) == {"recall@1": 0.333, "recall@3": 0.667}


def test_recall_reaches_the_stated_floor():
    rows = {row["query"]: row for row in measure_retrieval(strengths=(0.5,))}
    assert rows["text: REL of NAME"]["recall@3"] >= 0.95
    assert rows["image: photo at strength 0.5"]["recall@1"] >= 0.93
    assert rows["text: NAME alone"]["recall@1"] < 0.1  # a bare name must not answer for the agent
    assert rows["text: question without the entity"]["recall@3"] < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_questions_have_every_column_and_an_answer(kind):
    question = load_questions("dev", [kind], n=3, seed=1)[0]
    columns = (
        "id kind split entity entity_names relation question answers gold_passages seen hops image"
    )
    assert set(question) - {"scene"} == set(columns.split())
    assert ("scene" in question) == (kind == "pair")
    assert question["answers"]
    assert all(question["answers"])
    assert (question["image"] is None) == (kind == "text")


def test_picture_questions_do_not_name_the_place():
    for split in SPLITS:
        for kind in ("look", "image", "two", "three", "pair"):
            for question in list_questions(split, kind):
                assert question["entity_names"][0] not in question["question"]


def test_the_same_seed_asks_the_same_questions_with_the_same_photos():
    first, again = (load_questions("train", ["two"], n=5, seed=2) for _ in range(2))
    assert [q["id"] for q in first] == [q["id"] for q in again]
    for one, same in zip(first, again, strict=True):
        assert one["image"].tobytes() == same["image"].tobytes()
    other = load_questions("train", ["two"], n=5, seed=3)
    assert [q["id"] for q in other] != [q["id"] for q in first]


def test_more_questions_than_exist_come_with_new_photos():
    n = len(list(list_questions("dev", "image")))
    questions = load_questions("dev", ["image"], n=2 * n, seed=0)
    assert len({q["id"] for q in questions}) == 2 * n
    one, other = [q for q in questions if q["entity"] == "lt"]
    assert one["image"].tobytes() != other["image"].tobytes()


@pytest.mark.parametrize(("split", "kinds"), [("holdout", ["two"]), ("dev", ["four"])])
def test_an_unknown_split_or_kind_is_named(split, kinds):
    with pytest.raises(EnvironmentSetupError, match=r"holdout|four"):
        load_questions(split, kinds)


def test_the_title_lifts_a_passage_over_one_that_only_mentions_the_name():
    index = BM25TextIndex(
        ["a", "b"],
        ["Spain", "France"],
        ["The neighbour France has a capital city.", "The capital Paris."],
    )
    assert [hit.id for hit in index.search(["capital of France"], 2)[0]] == ["b", "a"]
    assert index.search(["zebra"], 2) == [[]]


def test_a_snippet_keeps_the_sentences_that_match_the_query():
    text = "One two three. The capital Paris. Four five six."
    assert cut_snippet(text, "capital", n_words=3) == "The capital Paris."
    assert cut_snippet(text, "zebra", n_words=100) == text


def test_text_hits_are_cut_to_forty_words():
    hits = load_text_index().search(["capital of Guyana"], 5)[0]
    assert len(hits) == 5
    assert all(len(hit.text.split()) <= 40 for hit in hits)


def test_a_repeated_picture_gives_the_same_hits_and_is_looked_at_once(monkeypatch):
    colours = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}
    pictures = {name: Image.new("RGB", (8, 8), colour) for name, colour in colours.items()}
    index = ColourImageIndex(list(pictures), list(pictures), list(pictures.values()))
    looked_at = []

    def count(image, features=retrieval.colour_features):
        looked_at.append(image)
        return features(image)

    monkeypatch.setattr(retrieval, "colour_features", count)
    monkeypatch.setattr(retrieval, "REMEMBERED_PICTURES", 2)
    red = Image.new("RGB", (8, 8), (190, 30, 25))
    first, second = index.search([red, red.copy()], 3)
    assert first == second == index.search([red], 3)[0]
    assert first[0].id == "red"
    assert index.search([red], 1) == [first[:1]]
    assert len(looked_at) == 1
    # same bytes in another shape are another picture, and only two are remembered
    index.search([red.resize((4, 16))], 3)
    assert len(looked_at) == 2
    index.search([pictures["blue"]], 3)
    assert index.search([red], 3)[0] == first
    assert len(looked_at) == 4


def test_the_robust_index_finds_what_the_default_one_misses_and_loses_nothing():
    isos = list(load_entities())[::14]
    repaired = ("turned by 90 degrees", "upside down", "upper left 60 %", "grey")
    rows = {row["distortion"]: row for row in measure_images(isos, ["as it is", *repaired])}
    for name in repaired:
        plain, robust = (rows[name][f"flag, {index}"]["recall@1"] for index in INDEXES)
        assert robust >= max(0.8, plain + 0.2), name
    assert rows["as it is"]["photo, robust"]["recall@1"] >= 0.95


def test_a_distortion_leaves_a_picture_of_its_colours():
    flag = Image.fromarray(load_flag("fr"))
    for name, distort in DISTORTIONS.items():
        distorted = distort(flag.copy())
        assert (distorted.mode, min(distorted.size) > 10) == ("RGB", True), name
        changed = distorted.size != flag.size or distorted.tobytes() != flag.tobytes()
        assert changed == (name != "as it is"), name


def test_the_default_index_is_that_of_the_shipped_checkpoints():
    """Its features in sum, as they were when these were trained."""
    index = load_image_index()
    assert (len(index), index.views.shape, index.turns) == (223, (892, 380), False)
    # another processor may round a pixel of a photo otherwise
    assert float(index.views.sum(dtype=np.float64)) == pytest.approx(2426.71436493, rel=1e-6)


def test_the_shipped_views_are_those_that_would_be_drawn():
    """JPEG and resizing may round otherwise in another version of Pillow."""
    shipped, drawn = load_image_index().views, draw_views()
    assert shipped.shape == drawn.shape
    np.testing.assert_allclose(shipped, drawn, atol=1e-3)
    assert np.abs(np.diff(shipped, axis=0)).sum(1).min() > 0.01  # what rounds is far below


def test_views_of_another_number_than_their_ids_are_no_index():
    with pytest.raises(ValueError, match="3 ids for 2 views"):
        ColourImageIndex(["a", "b", "c"], ["a", "b", "c"], np.zeros((2, 380), np.float32))
