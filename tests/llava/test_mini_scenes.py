"""The embedded world: what a scene promises, and that its image and labels keep it."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from llava.mini.font import FONT
from llava.mini.scenes import (
    BACKGROUNDS,
    CHARACTERS,
    COLORS,
    IMAGE_SIZE,
    PATCH_SIZE,
    PLACES,
    SHAPES,
    SIGN,
    SIZES,
    SPLITS,
    TEXTS,
    TEXTURES,
    Scene,
    SceneObject,
    render,
    sample_scene,
)
from llava.mini.seeded_random import SeededRandom
from mini_training.tower import patch_labels


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed, "train") for seed in range(400)]


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene))


def test_images_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for seed in range(40):
        digest.update(pixels(sample_scene(seed, "validation")).tobytes())
    assert digest.hexdigest() == "7a1580dca6f2dac4c172d849cb6a3e44d3e040a5a4ca09a2118e1d43c5fa9e08"


def test_dice_roll_the_same_everywhere():
    rng = SeededRandom("a key", 7)
    assert [rng.below(1000) for _ in range(5)] == [722, 923, 396, 192, 166]
    assert SeededRandom(1).shuffled("abcdef") == ["c", "a", "d", "f", "e", "b"]


def test_no_two_splits_share_a_scene():
    shown = {split: {sample_scene(seed, split).objects for seed in range(30)} for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        assert not shown[first] & shown[second]


@pytest.mark.parametrize(("seed", "split", "named"), [(0, "test", "'test'"), (-1, "train", "-1")])
def test_unknown_splits_and_negative_seeds_are_refused(seed, split, named):
    with pytest.raises(ValueError, match=named):
        sample_scene(seed, split)


def test_objects_lie_in_the_image_and_apart(scenes):
    for scene in scenes:
        assert 1 <= len(scene.objects) <= 8
        for o in scene.objects:
            assert o.left >= 0 and o.left + o.width <= IMAGE_SIZE
            assert o.top >= 0 and o.top + o.height <= IMAGE_SIZE
        for a, b in combinations(scene.objects, 2):
            beside = a.left + a.width < b.left or b.left + b.width < a.left
            over = a.top + a.height < b.top or b.top + b.height < a.top
            assert beside or over, (scene.seed, a, b)


def test_the_world_is_varied(scenes):
    objects = [o for scene in scenes for o in scene.objects]
    assert {o.shape for o in objects} == {*SHAPES, SIGN}
    assert {o.color for o in objects} == set(COLORS)
    assert {o.place for o in objects} == set(PLACES)
    assert {o.text for o in objects if o.is_sign} == set(TEXTS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.texture for scene in scenes} == set(TEXTURES)
    assert {len(scene.objects) for scene in scenes} == set(range(1, 9))
    assert any(len({(o.shape, o.color) for o in scene.shapes}) < len(scene.shapes) for scene in scenes)


def test_colors_are_clearly_distinct():
    tones = [np.array(rgb) for rgb in (*COLORS.values(), *BACKGROUNDS.values())]
    assert min(np.abs(a - b).max() for a, b in combinations(tones, 2)) >= 40


def test_objects_are_in_reading_order(scenes):
    for scene in scenes:
        rows = [PLACES.index(o.place) // 3 for o in scene.objects]
        assert rows == sorted(rows)


def test_shapes_are_painted_in_their_color_where_they_are(scenes):
    for scene in scenes[:60]:
        image = pixels(scene)
        for o in scene.shapes:
            box = image[o.top : o.top + o.height, o.left : o.left + o.width]
            painted = (box == o.rgb).all(-1)
            # The thinnest shape, the star, covers more than a quarter of its box.
            assert 0.25 < painted.mean() <= 1
            assert painted.any(0).mean() > 0.8 and painted.any(1).mean() > 0.8


def test_no_two_shapes_look_alike():
    def drawn(shape: str) -> np.ndarray:
        thing = SceneObject(shape, "red", "medium", 100, 100, 50, 50, (200, 0, 0))
        scene = Scene("train", 0, "gray", "plain", 8, (0, 0), (thing,), ())
        return (pixels(scene)[100:150, 100:150] == (200, 0, 0)).all(-1)

    masks = {shape: drawn(shape) for shape in SHAPES}
    for a, b in combinations(SHAPES, 2):
        assert (masks[a] != masks[b]).mean() > 0.1, (a, b)


def test_signs_show_ink_on_their_plate(scenes):
    for scene in scenes[:60]:
        image = pixels(scene)
        for o in scene.signs:
            box = image[o.top : o.top + o.height, o.left : o.left + o.width].astype(int)
            ink = (np.abs(box - o.rgb).max(-1) > 60).sum()
            dots = sum(bin(row).count("1") for character in o.text for row in FONT[character])
            assert ink == dots * o.scale**2


def test_every_object_owns_a_patch_that_describes_it(scenes):
    for scene in scenes[:100]:
        labels = patch_labels(scene)
        for number, o in enumerate(scene.objects, start=1):
            own = labels["instance"] == number
            assert own.any()
            assert set(labels["shape"][own]) == {1 + (*SHAPES, SIGN).index(o.shape)}
            assert set(labels["color"][own]) == {1 + tuple(COLORS).index(o.color)}
            assert set(labels["size"][own]) == {1 + tuple(SIZES).index(o.size)}
            assert set(labels["word"][own]) == {1 + TEXTS.index(o.text) if o.is_sign else 0}


def test_labels_agree_with_the_pixels(scenes):
    for scene in scenes[:60]:
        image, labels = pixels(scene), patch_labels(scene)
        for row, column in np.argwhere(labels["instance"] > 0):
            o = scene.objects[labels["instance"][row, column] - 1]
            patch = image[row * PATCH_SIZE :, column * PATCH_SIZE :][:PATCH_SIZE, :PATCH_SIZE]
            assert (patch == o.rgb).all(-1).any()


def test_the_letters_of_a_sign_stand_in_its_patches(scenes):
    read = Counter()
    for scene in scenes[:100]:
        labels = patch_labels(scene)
        for number, o in enumerate(scene.objects, start=1):
            # Letters two patches high or more: each one fills some patch more than its neighbours do.
            if o.is_sign and o.scale >= 4:
                seen = {CHARACTERS[i - 1] for i in labels["character"][labels["instance"] == number] if i}
                read[seen == set(o.text)] += 1
    assert read[True] > 20 and not read[False]
