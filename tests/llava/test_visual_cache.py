"""Images are encoded once: same answers, fewer encodings, a bounded memory, in one process or in several."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors import SafetensorError

from llava.model.multimodal_encoder.observations import encoder_outputs
from llava.model.visual_cache import (
    VisualCache,
    VisualStore,
    content_keys,
    encoder_fingerprint,
    identify,
    image_keys,
)
from llava.pruning import PruningConfig, pruning
from llava.pruning.signals import content_key
from tiny_llava import build, pad_rows, pixels, prompt, save_tower

KINDS = ["memory", "files"]


@pytest.fixture(params=KINDS)
def make_cache(request, tmp_path):
    """Caches of ``max_bytes``; those in files share a folder."""
    return VisualCache if request.param == "memory" else lambda max_bytes: VisualStore(tmp_path, max_bytes)


def entry(n: int, value: float = 0.0, name: str = "features") -> dict[str, torch.Tensor]:
    return {name: torch.full((n, 4), value)}


SIZE = entry(3)["features"].nbytes


class TestCache:
    def test_what_was_put_is_there(self, make_cache):
        cache = make_cache(10**6)
        cache.put("a", entry(3, 1.5))
        assert cache.get("a", ["features"])["features"].equal(torch.full((3, 4), 1.5))
        assert cache.get("b", ["features"]) is None

    def test_an_output_that_was_not_asked_for_before_is_added(self, make_cache):
        cache = make_cache(10**6)
        cache.put("a", entry(3, 1.5))
        assert cache.get("a", ["features", "attention"]) is None
        cache.put("a", entry(3, 2.5, "attention"))
        both = cache.get("a", ["features", "attention"])
        assert (both["features"][0, 0], both["attention"][0, 0]) == (1.5, 2.5)
        assert cache.nbytes == 2 * SIZE

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_every_bit_comes_back(self, make_cache, dtype):
        values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        cache = make_cache(10**6)
        cache.put("a", {"features": values})
        found = cache.get("a", ["features"])["features"]
        assert found.dtype == dtype and found.equal(values)

    def test_bytes_are_never_exceeded(self, make_cache):
        """Also by two that share a folder; and what is there is what was put."""
        drawn = random.Random(0)
        caches = [make_cache(500), make_cache(500)]
        for _ in range(200):
            cache, key = drawn.choice(caches), drawn.randrange(20)
            if (found := cache.get(key, ["features"])) is None:
                cache.put(key, entry(1 + key % 9, key))
            else:
                assert found["features"].equal(entry(1 + key % 9, key)["features"])
            assert cache.nbytes <= 500
        caches[0].put("large", entry(100))
        assert caches[0].get("large", ["features"]) is None

    def test_less_than_nothing_is_refused(self, make_cache):
        with pytest.raises(ValueError, match="cannot hold -1 bytes"):
            make_cache(-1)


class TestMemory:
    def test_the_least_recently_used_leaves(self):
        cache = VisualCache(2 * SIZE)
        cache.put("a", entry(3))
        cache.put("b", entry(3))
        cache.get("a", ["features"])
        cache.put("c", entry(3))
        assert [cache.get(key, ["features"]) is None for key in "abc"] == [False, True, False]
        assert cache.nbytes == 2 * SIZE

    def test_a_key_put_twice_counts_once(self):
        cache = VisualCache(10**6)
        cache.put("a", entry(3))
        cache.put("a", entry(5))
        assert len(cache) == 1 and cache.nbytes == entry(5)["features"].nbytes
        cache.clear()
        assert len(cache) == 0 and cache.nbytes == 0

    def test_a_row_does_not_keep_its_batch_alive(self):
        cache = VisualCache(10**6)
        batch = torch.zeros(8, 3, 4)
        cache.put("a", {"features": batch[2]})
        assert cache.get("a", ["features"])["features"].untyped_storage().nbytes() == batch[2].nbytes


class TestFiles:
    def test_what_is_full_keeps_what_it_has(self, tmp_path):
        """Rows ask in the same order: what was thrown out last would be wanted first."""
        store = VisualStore(tmp_path, 2 * SIZE)
        for key in "abc":
            store.put(key, entry(3))
        assert [store.get(key, ["features"]) is None for key in "abc"] == [False, False, True]

    def test_a_torn_file_is_an_image_that_is_not_there(self, tmp_path):
        VisualStore(tmp_path, 10**6).put("a", entry(3))
        [file] = tmp_path.rglob("*.safetensors")
        file.write_bytes(file.read_bytes()[:20])
        assert VisualStore(tmp_path, 10**6).get("a", ["features"]) is None

    def test_a_disk_that_is_full_stops_nothing(self, tmp_path, monkeypatch, caplog):
        def full(*_):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("llava.model.visual_cache.save_file", full)
        store = VisualStore(tmp_path, 10**6)
        store.put("a", entry(3))
        store.put("b", entry(3))
        assert store.get("a", ["features"]) is None
        assert [record.message for record in caplog.records] == [
            "encoded images are not stored any more: I/O error: No space left on device (os error 28)"
        ]

    def test_a_stand_in_has_the_outputs_of_the_images_that_it_stands_for(self, tmp_path):
        store, images = VisualStore(tmp_path, 10**6), pixels(2)
        keys = identify(images)
        assert keys == image_keys(images) and content_keys(images) == [content_key(image) for image in images]
        assert store.stand_in(keys, ["features"]) is None
        encoded = store.outputs(images, ["features"], lambda images: {"features": images.mean(-1)})
        again = store.stand_in([keys[1], keys[0], keys[1]], ["features"])
        assert (again.shape[1:], again.dtype) == (images.shape[1:], images.dtype) and again.isnan().all()
        assert content_keys(again) == [keys[i][0] for i in (1, 0, 1)]
        found = store.outputs(again, ["features"], lambda images: pytest.fail("encoded again"))
        assert found["features"].equal(encoded["features"][[1, 0, 1]])
        assert store.stand_in(keys, ["features", "attention"]) is None
        with pytest.raises(ValueError, match="a part of a stand-in"):
            store.outputs(again[:1], ["features"], lambda images: {"features": images.mean(-1)})


@pytest.fixture
def model(tower):
    model = build(tower)
    model.encoded = 0
    encode = type(model.get_vision_tower()).hidden_state

    def counting(images, *more):
        model.encoded += len(images)
        return encode(model.get_vision_tower(), images, *more)

    model.get_vision_tower().hidden_state = counting
    return model


def pruner_of(method: str, **options):
    return PruningConfig(method, 0.3, options=options).build_pruner()


def answers(model, rows, images):
    ids, mask = pad_rows(rows)
    return model.generate(ids, images=images, attention_mask=mask, max_new_tokens=4, do_sample=False).tolist()


def ask(model):
    """Five questions about two images, one of them in a row of two."""
    images = pixels(2)
    rows = [prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2), prompt(2, 8, seed=3)]
    batch = torch.cat([images[:1], images, images[1:]])
    return [answers(model, rows, batch), answers(model, rows[:1], images[1:])]


METHODS = [None, "otprune", "random", "visionzip", "prumerge", "vispruner", "fastv"]


def test_answers_are_the_same_and_all_methods_share_an_image(model, make_cache):
    """What a method asks of the encoder beside the features costs one encoding more, once for all that ask it."""
    switches = [None if method is None else {"method": method, "ratio": 0.3} for method in METHODS]
    switches += [
        {"method": "otprune", "ratio": 0.5, "layer": 1},
        {"method": "hiprune", "ratio": 0.3, "object_layer": 1},
        {"method": "hiprune", "ratio": 0.3, "object_layer": 2},
    ]

    def ask_all():
        found = []
        for switch in switches:
            if switch is None:
                found.append(ask(model))
                continue
            with pruning(model, **switch):
                found.append(ask(model))
        return found

    plain = ask_all()
    model.visual_cache = make_cache(10**7)
    model.encoded = 0
    assert ask_all() == plain
    # Two images: features; attention of [CLS] and keys; final keys; encoder features; two maps of received attention.
    assert model.encoded == model.visual_cache.misses == 2 * 6
    assert ask_all() == plain
    assert model.encoded == 2 * 6
    model.visual_cache = make_cache(10**7)
    assert ask_all() == plain and (model.encoded == 2 * 6) == isinstance(model.visual_cache, VisualStore)


def test_answers_are_the_same_from_projected_features(model, make_cache):
    plain = ask(model)
    model.visual_cache, projections = make_cache(10**7), []
    model.visual_cache.holds_projected = True
    model.get_model().mm_projector.register_forward_hook(lambda *_: projections.append(1))
    assert [ask(model), ask(model)] == [plain, plain] and len(projections) == 1


def test_what_later_methods_want_is_remembered_with_the_first(model, make_cache):
    later = [pruner_of("visionzip"), pruner_of("hiprune", object_layer=1), pruner_of("hiprune", object_layer=2)]
    model.visual_cache = make_cache(10**7)
    model.visual_cache.expected = tuple(
        output for pruner in later for outputs in encoder_outputs(pruner).values() for output in outputs
    )
    model.encoded = 0
    ask(model)
    for switch in ({"method": "visionzip"}, {"method": "hiprune", "object_layer": 2}):
        with pruning(model, ratio=0.3, **switch):
            ask(model)
    assert model.encoded == 2


def test_crops_of_anyres_images_are_remembered(tower, make_cache):
    model = build(
        tower,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[112, 112]],
        mm_patch_merge_type="spatial_unpad",
    )
    asked = {"images": pixels(1, 5), "image_sizes": [(112, 60)], "max_new_tokens": 4, "do_sample": False}
    for switch in ({"method": "otprune", "ratio": 0.3}, {"method": "visionzip", "ratio": 0.3}):
        with pruning(model, **switch):
            model.visual_cache = None
            plain = model.generate(prompt(3, 9)[None], **asked)
            model.visual_cache = make_cache(10**7)
            for _ in range(2):
                assert model.generate(prompt(3, 9)[None], **asked).equal(plain)
        assert model.visual_cache.hits >= 5


def test_gradients_reach_the_projector_all_the_same(model):
    model.visual_cache = VisualCache(10**7)
    ids = prompt(3, 9)[None]
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids.where(ids > 0, -100), images=pixels(1)).loss.backward()
        assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0
    assert len(model.visual_cache) == 0


def test_what_an_encoding_depends_on_is_in_the_fingerprint(tower, tmp_path):
    def fingerprint(change=lambda tower: None, folder: str = tower) -> str:
        loaded = build(folder).get_vision_tower()
        change(loaded)
        return encoder_fingerprint(loaded)

    def another_weight(loaded):
        next(loaded.parameters()).data.flatten()[-1] += 1e-3

    found = {
        fingerprint(),
        fingerprint(another_weight),
        fingerprint(lambda loaded: loaded.half()),
        fingerprint(lambda loaded: setattr(loaded, "select_layer", -1)),
        fingerprint(lambda loaded: setattr(loaded, "select_feature", "cls_patch")),
        fingerprint(lambda loaded: setattr(loaded.config, "_attn_implementation", "eager")),
        fingerprint(folder=save_tower(tmp_path / "larger", 112)),
    }
    assert len(found) == 7 and fingerprint() in found
    projectors = [build(tower).get_model().mm_projector, torch.nn.Identity()]
    tower = build(tower).get_vision_tower()
    assert len({encoder_fingerprint(tower, projector) for projector in (None, *projectors)}) == 3
