"""OC-VTP's training: features in shards, a run that resumes bit for bit, and what a pruner costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from llava.fitting import data
from llava.fitting.data import Source, find_images
from llava.fitting.ocvtp.__main__ import main
from llava.fitting.ocvtp.cost import cost
from llava.fitting.ocvtp.features import Features, default_layer, extract
from llava.fitting.ocvtp.train import Recipe, split, train
from llava.pruning.methods.ocvtp.network import SlotConfig, SlotPruner
from llava.train.loop import Run, read_log
from tiny_llava import build, save_tower
from tiny_ocvtp import save_pruner, tiny_config

RECIPE = Recipe(slots=4, epochs=8, warmup=1, batch=2, learning_rate=3e-3, patience=8, validation=0.2)


def drawn(number: int) -> Image.Image:
    values = torch.randint(256, (5 + number, 9, 3), generator=torch.Generator().manual_seed(number))
    return Image.fromarray(values.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for number in range(9):
        drawn(number).save(folder / ("more" if number % 2 else "") / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return build(save_tower(tmp_path_factory.mktemp("tower"))).get_vision_tower()


@pytest.fixture(scope="module")
def features(tower, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("features") / "f"
    run_extract(tower, folder, output)
    return output


@pytest.fixture(scope="module")
def trained(features, tmp_path_factory):
    """The folder of a whole run: three steps and a validation in each of eight epochs."""
    output = tmp_path_factory.mktemp("run")
    assert run_train(features, output)
    return output


def run_extract(tower, source, output, **settings):
    settings = {"layer": 0, "shard": 4, "batch": 3} | settings
    images = source if isinstance(source, Source) else find_images(str(source))
    return extract(tower, "tiny", images, output, **settings)


def run_train(features, output, recipe=RECIPE, **settings) -> bool:
    def sizes(description) -> SlotConfig:
        return tiny_config(description.width, description.layer, description.tokens)

    return train(features, sizes, recipe, Run(output, **settings))


# ---- features


def test_features_are_the_towers_and_lie_in_shards(tower, folder, features):
    found = Features(features)
    assert sorted(file.name for file in features.iterdir()) == [
        *(f"features-0000{number}.safetensors" for number in range(3)),
        "features.json",
    ]
    assert len(found) == 9 and found.description.layer == 0 and found[8].dtype == torch.float16
    source = find_images(str(folder))
    assert source.names[:5] == ["0.png", "2.png", "4.png", "6.png", "8.png"] and "more/1.png" in source.names
    for number in (0, 6):
        square = source.open(number)[0].resize((56, 56), Image.Resampling.BICUBIC)
        values = tower.image_processor.preprocess([square], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found[number].float(), tower.layer_output(values, 0)[0], rtol=1e-3, atol=1e-3)


def test_an_interrupted_extraction_leaves_whole_shards_and_continues(tower, folder, features, tmp_path):
    whole, opened = find_images(str(folder)), []

    def until_the_sixth(number):
        opened.append(number)
        if len(opened) == 6:
            raise KeyboardInterrupt
        return whole.opener(number)

    source = dataclasses.replace(whole, opener=until_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        run_extract(tower, source, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features-00000.safetensors", "features.json"]
    with pytest.raises(ValueError, match="holds 1 of 3 shards: run extract again"):
        Features(tmp_path)
    run_extract(tower, source, tmp_path)
    assert opened[6:] == [4, 5, 6, 7, 8]
    for file in features.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_other_features_do_not_mix_with_those_that_are_there(tower, folder, features):
    with pytest.raises(ValueError, match="holds features with layer 0, not 1"):
        run_extract(tower, folder, features, layer=1)
    with pytest.raises(ValueError, match="--layer 2: 2 layers of this vision tower run, so 0 to 1 are allowed"):
        run_extract(tower, folder, features, layer=2)
    other = find_images(str(folder))
    other = dataclasses.replace(other, names=other.names[::-1])
    with pytest.raises(ValueError, match="holds features of other images"):
        run_extract(tower, other, features)


class FakeTask:
    """Four questions about two images, one about a film and one about nothing."""

    eval_docs = ("a", "b", "a", "film", "none", "ab")

    def doc_to_visual(self, document):
        shown = {"film": ["film.mp4"], "none": None}
        return shown[document] if document in shown else [drawn("ab".index(letter)) for letter in document]


def test_a_task_shows_each_of_its_images_once(tower, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "load_tasks", lambda name: {"one": FakeTask(), "two": FakeTask()})
    found = find_images("group")
    assert [name.split()[0] for name in found.names] == ["one", "one", "two", "two"]
    for number in range(4):
        assert found.open(number)[0].tobytes() == drawn(number % 2).tobytes()


def test_an_image_that_cannot_be_read_is_named(tower, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"Cannot read the image broken.png"):
        run_extract(tower, tmp_path, tmp_path / "f")


# ---- training


def test_a_run_that_was_stopped_ends_in_the_same_weights(features, trained, tmp_path):
    for last_step in (1, 3, 4, 12, 17):
        assert not run_train(features, tmp_path, last_step=last_step, resume=True)
    assert run_train(features, tmp_path, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name
    logs = [[line | {"seconds": 0} for line in read_log(folder)] for folder in (trained, tmp_path)]
    assert logs[0] == logs[1]


def test_training_learns_and_the_pruner_states_what_it_was_trained_on(trained):
    lines = read_log(trained)
    assert [line["epoch"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"] and all(line["validation"] > 0 for line in lines)
    told = SlotPruner.from_pretrained(trained).config.trained_on
    best = min(lines, key=lambda line: line["validation"])
    assert told["model"] == "tiny" and told["count"] == 9
    assert told["epoch"] == best["epoch"] and told["validation"] == best["validation"]
    assert told["recipe"] == dataclasses.asdict(RECIPE)


def test_a_run_without_progress_ends_and_stays_ended(features, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=9, learning_rate=1e-12, patience=2)
    assert run_train(features, tmp_path, recipe)
    # The warm-up rises from 1e-6; after it nothing changes.
    epochs = len(read_log(tmp_path))
    assert epochs < 9
    assert run_train(features, tmp_path, recipe, resume=True) and len(read_log(tmp_path)) == epochs


def test_the_rate_rises_and_falls_as_published():
    recipe = Recipe()
    assert recipe.rate(0) == 1e-6 and recipe.rate(2) == pytest.approx((1e-3 + 1e-6) / 2)
    assert recipe.rate(15) == pytest.approx(5e-4, rel=1e-3) and recipe.rate(29) < 4e-6
    assert recipe.slot_choices(576) == [16, 32, 64, 128] and recipe.slot_choices(100) == [16, 32, 64]


def test_held_out_images_are_not_trained_on():
    training, held_out = split(100, Recipe())
    assert len(held_out) == 5 and sorted(training + held_out) == list(range(100))
    assert split(100, Recipe()) == (training, held_out) != split(100, Recipe(seed=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slots": 17}, "--slots 17: the features have 16 tokens per image"),
        ({"batch": 8}, "9 images are too few: 2 are held out, and a step takes --batch-size 8"),
        ({"seed": 1}, "was trained with seed 42, not 1"),
    ],
)
def test_a_recipe_that_does_not_fit_the_features_or_the_run_is_named(features, trained, change, said):
    with pytest.raises(ValueError, match=said):
        run_train(features, trained, dataclasses.replace(RECIPE, **change), resume=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--features", "{}/none"], "none is no folder of features"),
        (["train", "--features", "{}", "--warmup", "30"], "--warmup 30: must be at least 0 and below --epochs 30"),
        (["extract", "--images", "{}"], "holds no image"),
        (["extract", "--images", "{}/none"], "There is no folder"),
        (["extract", "--images", "scenes:0"], "scenes:0 holds no image"),
        (["extract", "--images", "scenes:few"], "scenes:few: the number of scenes must be a whole number"),
        (["cost", "--model", "1.5-7b", "--checkpoint", "{}/none"], "There is no pruner"),
        (["cost", "--kept", "577"], "--kept 577: 1.5-7b has 576 visual tokens"),
    ],
)
def test_a_wrong_command_ends_with_one_sentence(arguments, said, tmp_path, capsys):
    assert main([text.format(tmp_path) for text in arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and told.startswith("python -m llava.fitting.ocvtp: ") and len(told.splitlines()) == 1


# ---- cost


def test_a_tower_is_read_at_the_published_depth():
    assert [default_layer(depth) for depth in (1, 2, 5, 23)] == [0, 0, 1, 8]


def test_the_published_pruner_is_under_one_per_cent_of_a_7b_prefill():
    for model in ("1.5-7b", "1.6-7b"):
        told = cost(model, None, None, 60).split("The pruner is ")[1]
        alone, padded = (float(share.split()[-1].lstrip("(")) for share in told.split(" %")[:2])
        assert 0 < alone < padded < 1


def test_a_pruner_of_another_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reads features of width 32, but those of 1\.5-7b have 1024"):
        cost("1.5-7b", save_pruner(tmp_path), None, 60)
