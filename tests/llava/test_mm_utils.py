"""Images to pixel values, prompts to token ids, keywords that stop generation; against the original's outputs."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import CLIPImageProcessorPil

from golden import golden_root
from llava import mm_utils
from llava.conversation import conv_templates
from llava.mm_utils import (
    AnswerEnd,
    KeywordsStoppingCriteria,
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    get_model_name_from_path,
    images_to,
    process_anyres_image,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.model.tokenizer import load_tokenizer
from noise_images import encoded, noise

ROOT = golden_root() / "llava"
MANIFEST = json.loads((ROOT / "manifest.json").read_text())
SMALL = "openai/clip-vit-tiny-patch14-56"
GRID = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def golden(name: str, absent=None):
    """A file of expected results; ``absent`` (or a skipped test) where the small copy of the golden data lacks it."""
    file = ROOT / "mm_utils" / name
    if file.exists():
        return json.loads(file.read_text())
    return pytest.skip(f"the small copy of the golden data has no {name}") if absent is None else absent


def image(name: str) -> Image.Image:
    return Image.open(ROOT / "images" / MANIFEST["images"][name])


def processor(folder: str = SMALL) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil.from_pretrained(ROOT / folder)


def config(aspect_ratio: str | None) -> SimpleNamespace:
    return SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=GRID)


def test_best_resolution():
    data = golden("anyres.json")
    grids = data["grids"]
    grids["string"] = [list(pair) for pair in mm_utils._pinpoints(grids["string"])]
    for case in data["best_resolution"]:
        assert list(select_best_resolution(case["size"], grids[case["grid"]])) == case["best"], case


def test_best_resolution_of_nothing_is_none():
    assert select_best_resolution((10, 10), []) is None


def test_grid_shape():
    data = golden("anyres.json")
    for case in data["grid_shape"]:
        grid = data["grids"][case["grid"]]
        assert list(get_anyres_image_grid_shape(case["size"], grid, case["patch_size"])) == case["shape"], case


def test_grid_may_be_tuples():
    assert get_anyres_image_grid_shape((100, 50), ((56, 112), (112, 56)), 56) == (2, 1)


@pytest.mark.parametrize("grid", ["(1x1),...,(6x6)", "336", [], 5, [[1, 2, 3]]], ids=str)
def test_a_grid_that_is_none_is_refused_by_name(grid):
    with pytest.raises(ValueError, match="image_grid_pinpoints must be a list"):
        get_anyres_image_grid_shape((10, 10), grid, 56)


@pytest.mark.parametrize("case", [pytest.param(case, id=case["key"]) for case in golden("pixels.json", absent=[])])
def test_pixels(case):
    expected = np.load(ROOT / "mm_utils/pixels.npz")[case["key"]]
    picture = image(case["image"])
    if case["op"] == "resize_and_pad_image":
        result = np.asarray(resize_and_pad_image(picture, tuple(case["target"])))
    elif case["op"] == "divide_to_patches":
        if case["resized_to"]:
            picture = resize_and_pad_image(picture, tuple(case["resized_to"]))
        result = np.stack([np.asarray(patch) for patch in divide_to_patches(picture, case["patch_size"])])
    else:
        square = expand2square(picture, tuple(case["color"]))
        assert (square is picture) == case["same_object"]
        assert square.mode == case["mode"]
        result = np.asarray(square)
    np.testing.assert_array_equal(result, expected)


PROCESS_CASES = [
    pytest.param(case, id=case["id"].split("/")[1])
    for case in MANIFEST["cases"]
    if case["kind"] == "process_images" and ("file" not in case or (ROOT / case["file"]).exists())
]


@pytest.mark.parametrize("case", PROCESS_CASES)
def test_process_images(case):
    images = [image(name) for name in case["images"]]
    if case["convert_rgb"]:
        images = [picture.convert("RGB") for picture in images]
    cfg = SimpleNamespace(image_grid_pinpoints=case["image_grid_pinpoints"])
    if case["image_aspect_ratio"] != "ABSENT":
        cfg.image_aspect_ratio = case["image_aspect_ratio"]
    result = process_images(images, processor(case["processor"]), cfg)
    if "raises" in case:
        assert not case["strict"]
        as_rgb = process_images([picture.convert("RGB") for picture in images], processor(case["processor"]), cfg)
        assert torch.equal(result, as_rgb)
        return
    assert isinstance(result, list) == (case["returns"] == "list")
    tensors = result if isinstance(result, list) else [result]
    assert [list(tensor.shape) for tensor in tensors] == case["full_shapes"]
    data, stride = np.load(ROOT / case["file"]), case["stride"]
    for index, tensor in enumerate(tensors):
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(
            tensor[..., ::stride, ::stride].numpy(),
            data[f"out_{index}"],
            rtol=0,
            **MANIFEST["tolerances"]["pixel_values"],
        )


def test_one_image_counts_as_a_list_of_one():
    picture = image("im2")
    assert torch.equal(
        process_images(picture, processor(), config("pad")), process_images([picture], processor(), config("pad"))
    )


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        process_images([], processor(), config("pad"))


def test_process_anyres_image_takes_the_grid_as_text():
    picture = image("im2").convert("RGB")
    text = str([tuple(pair) for pair in GRID])
    assert torch.equal(
        process_anyres_image(picture, processor(), text), process_anyres_image(picture, processor(), GRID)
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P"])
def test_process_anyres_image_takes_every_mode(mode):
    picture = noise(70, 30).convert("L" if mode == "LA" else "RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(noise(70, 30, "L"))
    expected = process_anyres_image(picture.convert("RGB"), processor(), GRID)
    assert torch.equal(process_anyres_image(picture, processor(), GRID), expected)


EXTREME = pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 100), (1, 5000), (5000, 1)], ids=str)


@EXTREME
@pytest.mark.parametrize("aspect_ratio", ["square", "anyres"])
def test_pictures_of_extreme_shape_keep_their_colour(size, aspect_ratio):
    colour = (200, 30, 90)
    result = process_images([Image.new("RGB", size, colour)], processor(), config(aspect_ratio))
    view = result[0, 0] if aspect_ratio == "anyres" else result[0]
    expected = processor()(Image.new("RGB", (56, 56), colour), return_tensors="pt")["pixel_values"][0]
    # One grey level is 1 / 255 / std, 0.015.
    torch.testing.assert_close(view, expected, rtol=0, atol=0.016)


@EXTREME
def test_pictures_of_extreme_shape_are_padded_with_the_mean_colour(size):
    result = process_images([Image.new("RGB", size, (200, 30, 90))], processor(), config("pad"))
    assert result.shape == (1, 3, 56, 56) and torch.isfinite(result).all()
    if max(size) > 4 * min(size):
        # int(mean * 255) instead of the mean itself: less than one grey level away from zero.
        assert result[0, :, 0, 0].abs().max() < 0.016


def test_an_image_that_padding_would_make_enormous_is_padded_small(monkeypatch):
    """As a canvas of 60000 x 60000 pixels it takes 14 GB."""
    expected = process_images([Image.new("RGB", (6000, 2), (200, 30, 90))], processor(), config("pad"))
    monkeypatch.setattr("llava.images.expand2square", lambda *_: pytest.fail("the canvas is built"))
    for size in ((60000, 20), (20, 60000)):
        result = process_images([Image.new("RGB", size, (200, 30, 90))], processor(), config("pad"))
        result = result if size[0] > size[1] else result.transpose(2, 3)
        torch.testing.assert_close(result, expected, rtol=0, atol=0.016)  # a grey level


@pytest.mark.parametrize("size", [(1, 700), (701, 1), (2, 1301), (5, 3000)], ids=str)
def test_cutting_the_ends_off_a_very_long_picture_changes_nothing(size):
    picture = noise(*size)
    whole = processor()([picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(process_images([picture], processor(), config("square")), whole)


def test_a_truncated_image_object_is_refused_where_it_is_processed(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    data = encoded(noise(64, 48), "PNG")
    with pytest.raises(ValueError, match="the 64x48 PNG image is truncated"):
        process_images([Image.open(io.BytesIO(data[: len(data) // 2]))], processor(), config("pad"))


def test_images_to_moves_tensors_and_lists():
    half = images_to(torch.zeros(1, 3, 2, 2), "cpu", torch.float16)
    assert half.dtype == torch.float16
    assert [one.dtype for one in images_to([torch.zeros(2), torch.zeros(3)], "cpu", torch.bfloat16)] == [
        torch.bfloat16
    ] * 2


TOKEN_CASES = golden("tokenizer_image_token.json")


def tokenizer(checkpoint: str):
    if not (ROOT / "checkpoints" / checkpoint / "tokenizer.model").exists():
        pytest.skip(f"the small copy of the golden data has no tokenizer of {checkpoint}")
    return load_tokenizer(ROOT / "checkpoints" / checkpoint)


@pytest.mark.parametrize("checkpoint", sorted({case["checkpoint"] for case in TOKEN_CASES["cases"]}))
def test_tokenizer_image_token(checkpoint):
    loaded = tokenizer(checkpoint)
    for case in TOKEN_CASES["cases"]:
        if case["checkpoint"] != checkpoint:
            continue
        ids = tokenizer_image_token(case["prompt"], loaded, case["image_token_index"])
        assert ids == case["input_ids"], case["prompt"]
        tensor = tokenizer_image_token(case["prompt"], loaded, case["image_token_index"], return_tensors="pt")
        assert tensor.dtype == torch.int64 and tensor.tolist() == ids


def test_unknown_tensor_type():
    expected = TOKEN_CASES["raises"]
    with pytest.raises(ValueError) as caught:
        tokenizer_image_token("a", tokenizer("llava-v1.5-tiny"), return_tensors=expected["return_tensors"])
    assert str(caught.value) == expected["message"]


def test_a_tokenizer_without_bos_loses_no_token():
    def letters(text):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    letters.bos_token_id = None
    assert tokenizer_image_token("ab<image>c", letters) == [97, 98, -200, 99]
    assert tokenizer_image_token("<image>c", letters) == [-200, 99]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["path"] or "empty") for case in golden("model_name.json", absent=[])]
)
def test_model_name(case):
    if "raises" in case:
        with pytest.raises(IndexError, match=case["path"]):
            get_model_name_from_path(case["path"])
    else:
        assert get_model_name_from_path(case["path"]) == case["name"]


def criteria(case: dict, **options) -> KeywordsStoppingCriteria:
    prompt = torch.zeros(1, case["input_len"], dtype=torch.long)
    return KeywordsStoppingCriteria(case["keywords"], tokenizer(case["checkpoint"]), prompt, **options)


KEYWORD_CASES = golden("keywords.json", absent=[])


@pytest.mark.parametrize("index", range(len(KEYWORD_CASES)))
def test_keywords(index):
    case = KEYWORD_CASES[index]
    stop = criteria(case)
    assert [ids.tolist() for ids in stop.keyword_ids] == case["keyword_ids"]
    assert (stop.max_keyword_len, stop.start_len) == (case["max_keyword_len"], case["start_len"])
    for call in case["calls"]:
        result = stop(torch.tensor(call["output_ids"]), None)
        assert isinstance(result, bool)
        if case["regime"] == "full_sequence" or call["stop"]:
            # In the other regime the original misses matches by text, which is a defect.
            assert result == call["stop"], call


@pytest.mark.parametrize("index", range(len(KEYWORD_CASES)))
def test_keywords_per_row_say_of_each_row_what_it_gives_alone(index):
    case = KEYWORD_CASES[index]
    stop, alone = criteria(case, per_row=True), criteria(case)
    for call in case["calls"]:
        rows = stop(torch.tensor(call["output_ids"]), None)
        assert rows.dtype == torch.bool
        assert rows.tolist() == [alone(torch.tensor([row]), None) for row in call["output_ids"]]


class Letters:
    """One token a letter, so that a keyword can be split over tokens in any way."""

    bos_token_id = 0

    def __call__(self, text):
        return SimpleNamespace(input_ids=[0, *map(ord, text)])

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids)).replace("~", "")


def test_without_the_prompt_text_matches_are_found_from_the_first_token_on():
    stop = KeywordsStoppingCriteria(["ab"], Letters(), torch.zeros(1, 6, dtype=torch.long))
    # "~" decodes to nothing, so "a~b" ends with the keyword's text but not with its ids: only two tokens are looked at.
    written = "xa"
    assert stop(torch.tensor([list(map(ord, written))])) is False
    assert stop(torch.tensor([list(map(ord, written + "b"))])) is True


def test_growing_past_the_length_of_the_prompt_does_not_blind_the_criteria():
    class Merging(Letters):
        def decode(self, ids, skip_special_tokens):
            return super().decode(ids, skip_special_tokens).replace("!", "cd")

    stop = KeywordsStoppingCriteria(["bcd"], Merging(), torch.zeros(1, 4, dtype=torch.long))
    text = "xxxb!"
    results = [stop(torch.tensor([list(map(ord, text[:length]))])) for length in range(1, 6)]
    assert results == [False, False, False, False, True]


def test_image_marks_in_the_ids_are_skipped():
    stop = KeywordsStoppingCriteria(["zz"], Letters(), torch.zeros(1, 3, dtype=torch.long))
    assert stop(torch.tensor([[97, -200, 98]])) is False


@pytest.mark.parametrize(
    ("template", "text"),
    [("llava_v1", ""), ("mistral_instruct", ""), ("v0", "###"), ("llava_v0", "###"), ("mpt", "<|im_end|>")],
)
def test_an_answer_ends_as_the_templates_turns_do(template, text):
    tokenizer = SimpleNamespace(eos_token="</s>")
    assert AnswerEnd.of(conv_templates[template], tokenizer).text == text
    assert AnswerEnd(text, tokenizer).cut(" yes.###Human <|im_end|>") == {
        "": " yes.###Human <|im_end|>", "###": "yes.", "<|im_end|>": "yes.###Human",
    }[text]  # fmt: skip


def test_generation_ends_each_row_at_its_own_keyword():
    from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    prompt = torch.tensor([[5, 6], [7, 8]])
    free = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 2:]
    first = int(free[0, 2])
    rows = [row.tolist() for row in free]

    class Ids(Letters):
        def __call__(self, text):
            return SimpleNamespace(input_ids=[first])

        def decode(self, ids, skip_special_tokens):
            return ""

    stop = KeywordsStoppingCriteria(["x"], Ids(), prompt, per_row=True)
    out = model.generate(
        prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, stopping_criteria=StoppingCriteriaList([stop])
    )[:, 2:].tolist()
    for row, full in zip(out, rows, strict=True):
        end = full.index(first) + 1 if first in full else len(full)
        assert row[:end] == full[:end]
        assert set(row[end:]) <= {0}
