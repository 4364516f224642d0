"""OC-VTP's training: features in shards, a run that resumes bit for bit, and what a pruner costs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava.eval.flops import TowerShape
from llava.fitting.ocvtp import pictures
from llava.fitting.ocvtp.__main__ import main
from llava.fitting.ocvtp.cost import cost, padding_flops, pruner_flops
from llava.fitting.ocvtp.extract import default_layer, extract
from llava.fitting.ocvtp.features import Features, shard_file
from llava.fitting.ocvtp.pictures import find_pictures
from llava.fitting.ocvtp.train import Recipe, split, train
from llava.model.multimodal_encoder.observations import received_attention
from llava.pruning.methods.ocvtp.config import SlotConfig
from llava.pruning.methods.ocvtp.network import SlotPruner, slot_noise
from llava.train.loop import Run, read_log
from tiny_llava import build, save_tower
from tiny_ocvtp import save_pruner, tiny_config

RECIPE = Recipe(slots=4, epochs=3, warmup=1, batch=2, validation=0.2)


def picture(number: int) -> Image.Image:
    values = torch.randint(256, (5 + number, 9, 3), generator=torch.Generator().manual_seed(number))
    return Image.fromarray(values.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for number in range(9):
        picture(number).save(folder / ("more" if number % 2 else "") / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return build(save_tower(tmp_path_factory.mktemp("tower"))).get_vision_tower()


@pytest.fixture(scope="module")
def features(tower, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("features") / "f"
    run_extract(tower, folder, output)
    return output


def run_extract(tower, folder, output, **settings):
    settings = {"layer": 0, "shard": 4, "batch": 3, "quiet": True} | settings
    return extract(tower, "tiny", find_pictures(str(folder)), "pictures", output, **settings)


def sizes(description) -> SlotConfig:
    return tiny_config(description.width, description.layer, description.tokens)


def run_train(features, output, recipe=RECIPE, config=sizes, **settings) -> bool:
    return train(features, config, recipe, Run(output, quiet=True, **settings))


# ---- features


def test_features_are_the_towers_and_lie_in_shards(tower, folder, features):
    found = Features(features)
    assert sorted(file.name for file in features.iterdir()) == [
        *(f"features-0000{number}.safetensors" for number in range(3)),
        "features.json",
    ]
    assert len(found) == 9 and found.description.layer == 0 and found[8].dtype == torch.float16
    source = find_pictures(str(folder))
    assert source.names[:5] == ["0.png", "2.png", "4.png", "6.png", "8.png"] and "more/1.png" in source.names
    for number in (0, 6):
        square = source.open(number).resize((56, 56), Image.Resampling.BICUBIC)
        values = tower.image_processor.preprocess([square], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found[number].float(), tower.layer_output(values, 0)[0], rtol=1e-3, atol=1e-3)


def test_extraction_goes_on_where_it_was(tower, folder, features, tmp_path):
    output = tmp_path / "f"
    run_extract(tower, folder, output)
    kept, lost = shard_file(output, 0), shard_file(output, 2)
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match="holds 2 of 3 shards: run extract again"):
        Features(output)
    run_extract(tower, folder, output)
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content


def test_other_features_do_not_mix_with_those_that_are_there(tower, folder, features):
    with pytest.raises(ValueError, match="holds features with layer 0, not 1"):
        run_extract(tower, folder, features, layer=1)
    with pytest.raises(ValueError, match="--layer 2: 2 layers of this vision tower run, so 0 to 1 are allowed"):
        run_extract(tower, folder, features, layer=2)


def test_the_default_layer_is_the_published_one():
    assert default_layer(23) == 8
    assert [default_layer(depth) for depth in (1, 2, 5)] == [0, 0, 1]


def test_drawn_pictures_are_the_same_every_time():
    found = find_pictures("scenes:2")
    assert len(found) == 2 and found.open(1).size == (336, 336)
    assert found.open(0).tobytes() == find_pictures("scenes:1").open(0).tobytes() != found.open(1).tobytes()


class FakeTask:
    """Four questions about two pictures, one about a film and one about nothing."""

    eval_docs = ("a", "b", "a", "film", "none", "ab")

    def doc_to_visual(self, document):
        shown = {"film": ["film.mp4"], "none": None}
        return shown[document] if document in shown else [picture("ab".index(letter)) for letter in document]


def test_a_task_shows_each_of_its_pictures_once(tower, monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "load_tasks", lambda name: {"one": FakeTask(), "two": FakeTask()})
    found = find_pictures("group")
    assert [name.split()[0] for name in found.names] == ["one", "one", "two", "two"]
    for number in range(4):
        assert found.open(number).tobytes() == picture(number % 2).tobytes()
    run_extract(tower, "group", tmp_path, shard=2)
    assert len(Features(tmp_path)) == 4


def test_an_interrupted_extraction_leaves_whole_shards_and_goes_on(tower, folder, features, tmp_path, monkeypatch):
    whole, opened = pictures.Pictures.open, []

    def until_the_sixth(self, number):
        opened.append(number)
        if len(opened) == 6:
            raise KeyboardInterrupt
        return whole(self, number)

    monkeypatch.setattr(pictures.Pictures, "open", until_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        run_extract(tower, folder, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features-00000.safetensors", "features.json"]
    run_extract(tower, folder, tmp_path)
    assert opened[6:] == [4, 5, 6, 7, 8]
    for file in features.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


# ---- training


def test_a_run_that_was_stopped_ends_in_the_same_weights(features, tmp_path):
    """Stopped after every step; six steps and a validation in each of three epochs."""
    assert run_train(features, tmp_path / "whole")
    stops = 0
    while not run_train(features, tmp_path / "parts", seconds=0, resume=stops > 0):
        stops += 1
    assert stops == 3 * (7 // 2) - 1
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    logs = [[line | {"seconds": 0} for line in read_log(tmp_path / run)] for run in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_the_pruner_says_what_it_was_trained_on_and_how(features, tmp_path):
    run_train(features, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 and line["validation"] > 0 for line in lines)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    told = SlotPruner.from_pretrained(tmp_path).config.trained_on
    best = min(lines, key=lambda line: line["validation"])
    assert told["model"] == "tiny" and told["pictures"] == "pictures" and told["count"] == 9
    assert told["epoch"] == best["epoch"] and told["validation"] == best["validation"]
    assert told["recipe"] == dataclasses.asdict(RECIPE)


def test_training_learns(features, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=12, learning_rate=3e-3, patience=12)
    run_train(features, tmp_path, recipe)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_without_progress_ends(features, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=9, learning_rate=1e-12, patience=2)
    assert run_train(features, tmp_path, recipe)
    # The warm-up rises from 1e-6; after it nothing changes.
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) < 9


def test_the_rate_rises_and_falls_as_published():
    recipe = Recipe()
    assert recipe.rate(0) == 1e-6 and recipe.rate(2) == pytest.approx((1e-3 + 1e-6) / 2)
    assert recipe.rate(15) == pytest.approx(5e-4, rel=1e-3) and recipe.rate(29) < 4e-6
    assert recipe.slot_choices(576) == [16, 32, 64, 128] and recipe.slot_choices(100) == [16, 32, 64]


def test_held_out_pictures_are_not_trained_on():
    training, held_out = split(100, Recipe())
    assert len(held_out) == 5 and sorted(training + held_out) == list(range(100))
    assert split(100, Recipe()) == (training, held_out) != split(100, Recipe(seed=1))


# ---- what does not fit


def test_a_run_is_neither_overwritten_nor_resumed_with_other_features(tower, folder, features, tmp_path):
    run_train(features, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run: give --resume, or another --output"):
        run_train(features, tmp_path / "run")
    run_extract(tower, folder, tmp_path / "f", layer=1)
    with pytest.raises(ValueError, match="was trained with layer 0, not 1"):
        run_train(tmp_path / "f", tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="was trained with batch 2, not 3"):
        run_train(features, tmp_path / "run", dataclasses.replace(RECIPE, batch=3), resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slots": 17}, "--slots 17: the features have 16 tokens a picture"),
        ({"batch": 8}, "9 pictures are too few: 2 are held out, and a step takes --batch-size 8"),
    ],
)
def test_a_recipe_that_does_not_fit_the_features_is_named(features, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        run_train(features, tmp_path, dataclasses.replace(RECIPE, **change))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--features", "{}/none"], "none is no folder of features"),
        (["train", "--features", "{}", "--warmup", "30"], "--warmup 30: must be at least 0 and below --epochs 30"),
        (["extract", "--images", "{}"], "holds no picture"),
        (["extract", "--images", "{}/none"], "There is no folder"),
        (["extract", "--images", "scenes:0"], "scenes:0 holds no picture"),
        (["extract", "--images", "scenes:few"], "scenes:few: the number of scenes must be a whole number"),
        (["extract", "--images", "scenes:1", "--device", "gpu"], "device must be cpu, cuda, cuda:0"),
        (["cost", "--time", "--device", "gpu"], "--device gpu: must be cpu, cuda, cuda:1 or the like"),
        (["cost", "--time", "--device", "mps"], "--device mps: must be cpu, cuda, cuda:1 or the like"),
        (["cost", "--time", "--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["cost", "--model", "1.5-7b", "--checkpoint", "{}/none"], "There is no pruner"),
        (["cost", "--kept", "577"], "--kept 577: 1.5-7b has 576 visual tokens"),
    ],
)
def test_a_wrong_command_ends_with_one_sentence(arguments, said, tmp_path, capsys):
    assert main([text.format(tmp_path) for text in arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and told.startswith("ocvtp: ") and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--slots", "0", "must be a whole number >= 1, not 0"),
        ("--warmup", "-1", "must be a whole number >= 0, not -1"),
        ("--learning-rate", "nan", "must be a number > 0, not nan"),
        ("--learning-rate", "much", "must be a number > 0, not much"),
        ("--minutes", "-1", "must be a number > 0, not -1"),
    ],
)
def test_an_option_that_cannot_be_is_named(option, value, said, capsys):
    with pytest.raises(SystemExit):
        main(["train", option, value])
    assert f"error: argument {option}: {said}" in capsys.readouterr().err


def test_heads_that_do_not_divide_the_width_are_refused(features, tmp_path, capsys):
    arguments = ["train", "--features", str(features), "--output", str(tmp_path), "--decoder-heads", "5"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "ocvtp: the decoder's 5 heads do not divide its width, 32\n"


def test_an_interruption_is_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava.fitting.ocvtp.train.Features", interrupted)
    assert main(["train", "--features", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "ocvtp: interrupted\n"


@pytest.mark.parametrize("content", [b"", b"no state"])
def test_a_damaged_state_is_named(features, tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(OSError, match=r"Cannot read the run in .*state.pt: "):
        run_train(features, tmp_path, resume=True)


def test_an_empty_folder_of_features_says_so(features, tmp_path):
    (tmp_path / "features.json").write_text((features / "features.json").read_text())
    with pytest.raises(ValueError, match="holds no features yet"):
        Features(tmp_path)


def test_a_picture_that_cannot_be_read_is_named(tower, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"Cannot read the picture broken.png"):
        run_extract(tower, tmp_path, tmp_path / "f")


# ---- cost


@pytest.mark.parametrize(("tokens", "slots"), [(16, 4), (9, 9)])
def test_the_count_is_what_torch_counts(tokens, slots):
    config = tiny_config()
    with FlopCounterMode(display=False) as counter:
        SlotPruner(config).eval()(torch.randn(1, tokens, 32), slot_noise(0, slots, 16))
    assert pruner_flops(config, tokens, slots) == counter.get_total_flops()


def test_the_padding_is_counted_as_torch_counts_it():
    vision = CLIPVisionConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, image_size=56, patch_size=14
    )
    tower = TowerShape.of(vision, -1, "patch")
    with FlopCounterMode(display=False) as counter:
        received_attention(CLIPEncoderLayer(vision), torch.randn(1, 17, 32))
    assert padding_flops(tower) == counter.get_total_flops()


def test_the_published_pruner_is_under_one_per_cent_of_a_7b_prefill():
    for model in ("1.5-7b", "1.6-7b"):
        told = cost(model, None, None, 60, "cpu", timed=False).split("The pruner is ")[1]
        alone, padded = (float(share.split()[-1].lstrip("(")) for share in told.split(" %")[:2])
        assert 0 < alone < padded < 1


def test_milliseconds_stand_beside_the_flops():
    told = cost("llava-mini", None, None, 60, "cpu", timed=True).splitlines()
    assert told[0].endswith(("thread", "threads"))
    times = {line[:22].strip(): float(line.split()[-1]) for line in told[3:9] if not line.startswith("projector")}
    assert set(times) == {"pruner", "padding attention", "vision tower", "decoder, unpruned", "decoder, pruned"}
    assert all(time > 0 for time in times.values())
    share = 100 * times["pruner"] / (times["vision tower"] + times["decoder, unpruned"])
    # The table has one decimal.
    assert float(told[-2].split("in FLOPs, ")[1].split()[0]) == pytest.approx(share, rel=0.1)


def test_a_pruner_of_another_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reads features of width 32, but those of 1\.5-7b have 1024"):
        cost("1.5-7b", save_pruner(tmp_path), None, 60, "cpu", timed=False)
