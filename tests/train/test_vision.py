"""Pictures: encoded once, and every token at the position the model itself would give it."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from train.policy import PolicyLoadError, load_processor
from train.vision import ImageStore, encode_pictures, mrope_positions, suppressed_token_ids

GRIDS = [(1, 4, 4), (1, 2, 8)]


def sequence(image_token_id, grids, gaps):
    ids = []
    for gap, (t, h, w) in zip(gaps, grids, strict=False):
        ids += [5] * gap + [image_token_id] * (t * h * w // 4)
    return ids + [6] * gaps[-1]


def test_positions_of_a_whole_sequence_equal_get_rope_index(policy):
    model, _ = policy
    ids = sequence(model.config.image_token_id, GRIDS, gaps=[3, 2, 4])
    tokens = torch.tensor([ids])
    expected, _ = model.model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == model.config.image_token_id).int(),
        image_grid_thw=torch.tensor(GRIDS),
    )
    positions, after = mrope_positions(ids, GRIDS, model.config.image_token_id)
    assert (torch.from_numpy(positions) == expected[:, 0]).all()
    # 3 + max(2, 2) + 2 + max(1, 4) + 4: text counts its tokens, a picture its longer side
    assert after == 15


def test_positions_of_three_pictures_by_hand():
    ids = [1, 9, 9, 2, 9, 3, 9, 9]
    positions, after = mrope_positions(ids, [(1, 1, 2), (1, 1, 1), (1, 1, 2)], 9, merge_size=1)
    # a picture of two columns: one row, columns 1 and 2; behind it the longer side counts
    assert positions.tolist() == [
        [0, 1, 1, 3, 4, 5, 6, 6],
        [0, 1, 1, 3, 4, 5, 6, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert after == 8


def test_text_alone_takes_one_step_a_token():
    for image_token_id in (9, None):
        positions, after = mrope_positions([1, 2], [], image_token_id, start=5)
        assert positions.tolist() == [[5, 6]] * 3
        assert after == 7


def test_positions_can_be_computed_piece_by_piece(policy):
    model, _ = policy
    image_token_id = model.config.image_token_id
    first, second = (
        sequence(image_token_id, GRIDS[:1], [3, 2]),
        sequence(image_token_id, GRIDS[1:], [1, 4]),
    )
    whole, end = mrope_positions(first + second, GRIDS, image_token_id)
    a, middle = mrope_positions(first, GRIDS[:1], image_token_id)
    b, after = mrope_positions(second, GRIDS[1:], image_token_id, start=middle)
    assert (np.concatenate([a, b], axis=1) == whole).all()
    assert after == end


@pytest.mark.parametrize("n_placeholders", [3, 5])
def test_placeholders_that_do_not_match_the_picture_are_an_error(n_placeholders):
    with pytest.raises(ValueError, match=f"{n_placeholders} image placeholders"):
        mrope_positions([1, *[9] * n_placeholders], GRIDS[:1], image_token_id=9)


def test_a_placeholder_without_any_picture_is_an_error():
    with pytest.raises(ValueError, match="no image for it"):
        mrope_positions([1, 9], [], image_token_id=9)


def test_equal_pictures_are_encoded_once(policy):
    from PIL import Image

    model, processor = policy
    store = ImageStore(processor.image_processor)
    red = [store.encode(Image.new("RGB", (56, 56), "red")) for _ in range(2)]
    blue = store.encode(Image.new("RGB", (56, 56), "blue"))
    assert red[0] is red[1]
    assert blue.key != red[0].key
    with torch.no_grad():
        features = encode_pictures(model.model, [red[0], blue, red[1]])
    assert list(features) == [red[0].key, blue.key]
    assert features[blue.key].shape == (blue.n_tokens, model.config.text_config.hidden_size)


def test_a_limit_of_pixels_holds_for_questions_and_is_saved_with_the_policy(
    tiny_checkpoints, tmp_path
):
    start, saved = tmp_path / "start", tmp_path / "saved"
    shutil.copytree(tiny_checkpoints["vlm"], start)
    wide = load_processor(start)
    wide.image_processor.size["longest_edge"] = 12_845_056
    wide.save_pretrained(start)
    shutil.copytree(start, saved)
    photo = Image.new("RGB", (1120, 560))

    def n_tokens(folder, **limit):
        processor = load_processor(folder, **limit)
        processor.save_pretrained(saved)
        return ImageStore(processor.image_processor).encode(photo).n_tokens

    assert n_tokens(start) == 40 * 20
    assert n_tokens(start, max_pixels=200 * 784) == 20 * 10
    assert n_tokens(saved) == 20 * 10
    # a lower limit of the checkpoint stays
    assert n_tokens(saved, max_pixels=1_003_520) == 20 * 10
    with pytest.raises(PolicyLoadError, match=r"models\.max_pixels: 784 is less than the 3136"):
        load_processor(start, max_pixels=784)


def test_every_vision_token_is_suppressed(policy):
    model, processor = policy
    ids = suppressed_token_ids(processor.tokenizer)
    assert model.config.image_token_id in ids
    assert model.config.video_token_id in ids
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("size", "n_pixels"),
    [((123, 77), (3136, 200_704)), ((500, 90), (3136, 12_544)), ((123, 77), (3136, 3136))],
    ids=["rounded", "shrunk", "size not kept"],
)
def test_pixels_give_the_same_features_again(size, n_pixels):
    """Also of a picture that was resized: the copy has its final size already."""
    smallest, largest = n_pixels
    images = ImageStore(
        Qwen2VLImageProcessorPil(min_pixels=smallest, max_pixels=largest, patch_size=14)
    )
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    picture = images.encode(Image.fromarray(noise))
    again = images.encode(images.pixels(picture))
    assert again.grid == picture.grid
    assert torch.equal(again.pixel_values, picture.pixel_values)
