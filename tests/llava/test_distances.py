"""Distances of methods on pictures, measured with a model."""

from __future__ import annotations

import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from llava.eval import distances
from llava.eval.distances import measure
from llava.eval.encoder import Encoder, image_configs, images_of_folder
from llava.eval.results.rows import Row, row_of
from llava.eval.results.runs import Run
from llava.eval.transport import gaussian_distance, objective, wasserstein
from llava.pruning import PruningConfig, select
from noise_images import noise
from run_folders import job, write_job
from tiny_llava import build, save_tower

pytest.importorskip("ot")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    tower = save_tower(tmp_path_factory.mktemp("tower"))
    model = build(tower)
    return Encoder(model, CLIPImageProcessor.from_pretrained(tower))


@pytest.fixture
def picture():
    return noise(56, 56)


def row(folder, **settings):
    return row_of(Run(write_job(folder, **job({"mini_gqa": [True]}, **settings))))


def test_are_those_between_all_tokens_and_the_selected_ones(encoder, picture):
    config = PruningConfig("otprune", 0.25)
    found = measure(encoder, picture, config)
    features = encoder.encode(picture, config).features
    kept = select(features, ratio=0.25)
    assert (len(features), found.kept) == (16, 4)
    assert found.wasserstein == pytest.approx(wasserstein(features, features[kept]))
    assert found.gaussian == pytest.approx(gaussian_distance(features, features[kept]))
    assert found.log_det == pytest.approx(objective(features, kept))


def test_leave_the_model_s_own_pruning_as_it_was(encoder, picture):
    measure(encoder, picture, PruningConfig("visionzip", 0.25))
    assert encoder.model.pruning is None


def test_methods_that_differ_in_an_encoder_layer_see_their_own(encoder, picture):
    """HiPrune asks for attention of one name whatever its layers are."""
    configs = [PruningConfig("hiprune", 0.25, options={"object_layer": layer}) for layer in (1, 2)]
    first, second = (encoder.encode(picture, config).signals["received_attention"] for config in configs)
    assert not first[:, 0].equal(second[:, 0])
    assert first[:, 1].equal(second[:, 1])  # the deepest layer's is the same


def test_are_measured_of_rows_that_only_need_the_picture(tmp_path):
    otprune = PruningConfig("otprune", 0.098, options={"gamma": 0.01})
    assert image_configs(row(tmp_path / "a", method="otprune")) == [otprune]
    assert len(image_configs(row(tmp_path / "b", method="visionzip"))) == 1
    assert image_configs(row(tmp_path / "c", method="fastv", layer=2)) == []
    folded = Row("llava-mini", "random (mean of 2 seeds)", 0.1, {})
    assert [config.options["seed"] for config in image_configs(folded)] == [0, 1]
    assert image_configs(Row("llava-mini", "otprune (gamma 0.01)", 0.098, {})) == [otprune]
    assert image_configs(row(tmp_path / "d", method="otprune", layer=2)) == []
    assert image_configs(row(tmp_path / "e")) == []


def test_of_a_folder_take_its_first_pictures_by_name(tmp_path):
    for name in ("b.png", "a.png", "notes.txt"):
        if name.endswith("png"):
            Image.new("RGB", (8, 8), "blue" if name == "a.png" else "red").save(tmp_path / name)
        else:
            (tmp_path / name).write_text("x")
    [first] = images_of_folder(tmp_path, 1)
    assert first.getpixel((0, 0)) == (0, 0, 255)


class TestCommand:
    def test_prints_a_line_a_method_and_the_guarantee(self, encoder, picture, tmp_path, monkeypatch, capsys):
        picture.save(tmp_path / "noise.png")
        monkeypatch.setattr(Encoder, "load", classmethod(lambda cls, path, device: encoder))
        given = ["--image", str(tmp_path / "noise.png"), "--method", "otprune,uniform", "--ratio", "0.25"]
        assert distances.main(given) == 0
        printed = capsys.readouterr().out
        assert "16 visual tokens, kept ratio 0.25" in printed
        assert [line.split()[1] for line in printed.splitlines() if line.startswith(("otprune", "uniform"))] == [
            "4",
            "4",
        ]
        assert "greedy: log det" in printed
