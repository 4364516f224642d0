"""lmms-eval's own wrappers prune as the environment says, and say what they kept."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from lmms_eval import models as registry
from lmms_eval.api.instance import Instance
from lmms_eval_otprune.models import transformers_models
from lmms_eval_otprune.models.families import wrapper_of
from lmms_eval_otprune.models.token_counts import ImageCount, PromptCount, summary
from loguru import logger
from PIL import Image

from golden import golden_root
from llava.adapters.transformers import active_session
from llava.pruning import PruningConfig
from llava.serve.export_hf import export
from tiny_vlms import can_be_pruned

pytestmark = can_be_pruned
TASK, SPLIT = "colours", "test"
RUNNER, ROWS = "lmms_eval_otprune.runner", 8
VTW = PruningConfig("vtw", layer=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA-1.5 as transformers' own."""
    path = tmp_path_factory.mktemp("exported") / "llava-v1.5-tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden_root() / "llava")
        export("checkpoints/llava-v1.5-tiny", path, conv_mode="vicuna_v1")
    return str(path)


@pytest.fixture
def wrapper():
    """The class that lmms-eval loads for ``llava_hf``."""
    return transformers_models.simple_llava_hf


def switch(monkeypatch, **variables):
    for name in ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def messages(document):
    shown = [{"type": "image", "url": document["image"]}] if document["image"] else []
    return [{"role": "user", "content": [*shown, {"type": "text", "text": "Which colour?"}]}]


def answers(lm, images=3, text_only=0):
    colours = [*("red", "green", "blue")[:images], *[None] * text_only]
    documents = [{"image": colour and Image.new("RGB", (60, 60), colour)} for colour in colours]
    lm.task_dict = {TASK: {SPLIT: documents}}
    settings = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}
    asked = (settings, lambda doc: [doc["image"]]) if lm.is_simple else (messages, settings)
    return lm.generate_until(
        [
            Instance(
                request_type="generate_until",
                arguments=("Which colour?", *asked, number, TASK, SPLIT),
                idx=0,
                metadata={"task": TASK, "doc_id": number, "repeats": 1},
            )
            for number in range(len(documents))
        ]
    )


@pytest.fixture
def log():
    lines: list[str] = []
    handle = logger.add(lambda message: lines.append(message.record["message"]))
    yield lines
    logger.remove(handle)


def load(wrapper, folder):
    return wrapper(pretrained=folder, device="cpu", device_map="cpu", dtype="float32")


def test_wrappers_keep_their_ids_and_exist():
    for manifest in transformers_models.manifests():
        for kind, path in (("simple", manifest.simple_class_path), ("chat", manifest.chat_class_path)):
            known = manifest.model_id in getattr(registry, transformers_models.KINDS[kind])
            assert path == (
                f"lmms_eval_otprune.models.transformers_models.{kind}_{manifest.model_id}" if known else None
            )
    assert {"llava_hf", "qwen2_5_vl", "internvl_hf"} <= {
        manifest.model_id for manifest in transformers_models.manifests()
    }


def test_without_a_switch_nothing_is_attached(wrapper, folder, monkeypatch):
    switch(monkeypatch)
    lm = load(wrapper, folder)
    assert active_session(lm.model) is None and len(answers(lm)) == 3


def test_the_switch_prunes_and_what_is_kept_is_reported(wrapper, folder, monkeypatch, log):
    switch(monkeypatch, BASELINE="OURS", SUBSET_RATIO="0.25")
    lm = load(wrapper, folder)
    found = answers(lm)
    assert len(found) == 3 and lm.model.config.model_type == "llava"
    assert any("llava_hf: otprune keeps 25 %" in line for line in log)
    assert any("kept 4.0 of 16.0 visual tokens per image (25.0 %), 3 images" in line for line in log)


def test_a_wrong_switch_is_refused_before_weights_are_read(wrapper, monkeypatch):
    switch(monkeypatch, BASELINE="OURS", SUBSET_RATIO="2")
    with pytest.raises(ValueError, match="SUBSET_RATIO=2"):
        load(wrapper, "no-such-folder")


def test_an_error_that_the_wrapper_swallows_ends_the_run(wrapper, folder, monkeypatch):
    """lmms-eval's wrapper logs what ``generate`` raises and scores an empty answer."""
    switch(monkeypatch, BASELINE="OURS", SUBSET_RATIO="0.25")
    lm = load(wrapper, folder)
    with torch.no_grad():
        lm.model.model.multi_modal_projector.linear_2.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"llava_hf: .*NaN"):
        answers(lm, images=1)


class TestRows:
    """In the runner's hands: one row after another, answers on the disk."""

    @pytest.fixture
    def lm(self, folder, monkeypatch):
        switch(monkeypatch)
        return transformers_models.load("llava_hf", folder, "cpu", "float32", batch_size=1)

    def test_a_row_s_answers_are_on_the_disk_and_are_not_asked_for_again(self, lm, tmp_path, monkeypatch):
        lm.set_pruning(PruningConfig("random", 0.25))
        lm.start_run(str(tmp_path))
        found = answers(lm, text_only=1)
        lines = [json.loads(line) for line in (tmp_path / "answers_rank0.jsonl").read_text().splitlines()]
        assert [line["text"] for line in lines] == found
        assert lm.visual_tokens.pop(TASK) == lm.visual_tokens.default_factory(
            {PromptCount(lines[0]["input_tokens"] - 4, (ImageCount(16, ((3, 4),)),)): 3}
            | {PromptCount(lines[3]["input_tokens"], ()): 1}
        )
        monkeypatch.setattr(lm.model, "forward", lambda *_, **__: pytest.fail("asked again"))
        lm.start_run(str(tmp_path))
        assert answers(lm, text_only=1) == found

    def test_rows_are_pruned_apart_and_the_unpruned_one_is_the_wrapper_s_own(self, lm, wrapper, folder, tmp_path):
        given = {}
        for name, config in {"pruned": PruningConfig("random", 0.25), "unpruned": None, "inside": VTW}.items():
            lm.set_pruning(config)
            lm.start_run(str(tmp_path))
            given[name] = answers(lm)
            [count] = {prompt.images for prompt in lm.visual_tokens.pop(TASK)}
            assert count[0].per_layer == {"pruned": [4] * 3, "unpruned": [16] * 3, "inside": [16, 0, 0]}[name]
        chat = transformers_models.chat_llava_hf.wrapped
        assert given["unpruned"] == [one.text for one in answers(load(chat, folder))]

    def test_what_a_row_cost_is_counted(self, lm, tmp_path):
        shares = {}
        for name, config in {"before": PruningConfig("uniform", 0.25), "inside": VTW, "unpruned": None}.items():
            lm.set_pruning(config)
            lm.start_run(str(tmp_path))
            answers(lm)
            shares[name] = summary(lm.visual_tokens.pop(TASK), lm.model_shape())["flops_ratio"]
        assert shares["unpruned"] == {"literature": 1, "exact": 1}
        for share in (shares["before"], shares["inside"]):
            assert share["literature"] < share["exact"] < 1  # the tower is in the exact count

    def test_an_error_is_not_scored_as_an_empty_answer(self, lm, tmp_path, monkeypatch):
        lm.set_pruning(None)
        lm.start_run(str(tmp_path))
        monkeypatch.setattr(type(lm.model), "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answers(lm)

    @pytest.mark.parametrize(
        ("config", "name"),
        [
            ({"model_type": "qwen2_5_vl", "vision_config": {}}, "qwen2_5_vl"),
            ({"model_type": "llava_next", "vision_config": {}}, "llava_hf"),
            ({"model_type": "idefics3", "vision_config": {}}, "huggingface"),
            ({"model_type": "llava", "mm_vision_tower": "openai/clip"}, None),
        ],
    )
    def test_the_configuration_chooses_the_wrapper(self, config, name):
        assert wrapper_of(config) == name


def test_a_run_that_was_killed_goes_on_where_it_was(folder, workplace, start, run):
    """The runner's row of such a model: a finished task stays as it is, and its next one's answers are reused."""
    arguments = [RUNNER, "paper", "--model", folder, "--tasks", "gqa,pope", "--ratio", "0.25", "--device", "cpu"]
    arguments += ["--no-unpruned", "--no-report", "--batch-size", "1", "--output", "killed-hf"]
    row = workplace / "killed-hf" / Path(folder).name / "otprune-0.25"
    log, scored = row / "answers-published" / "answers_rank0.jsonl", row / "tasks" / "gqa" / "result.json"
    process = start(workplace, arguments)
    while not (scored.exists() and len(log.read_text().splitlines()) >= ROWS + 2):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # the worker's pipe closes when it is gone as well
    answered, score = log.read_text().splitlines(), scored.stat()
    assert len(answered) < 2 * ROWS and not (row / "tasks" / "pope" / "result.json").exists()

    status, printed = run(workplace, arguments)
    assert status == 0, printed
    lines = log.read_text().splitlines()
    assert lines[: len(answered)] == answered and len(lines) == 2 * ROWS
    assert scored.stat().st_mtime_ns == score.st_mtime_ns
    [samples] = (row / "tasks" / "pope").glob("*/*_samples_pope.jsonl")
    scores = {
        one["doc_id"]: "".join(one["filtered_resps"]) for one in map(json.loads, samples.read_text().splitlines())
    }
    assert scores == {one["doc_id"]: one["text"] for one in map(json.loads, lines[ROWS:])}
    kept = json.loads((row / "results.json").read_text())["visual_tokens"]["kept"]
    assert (kept["min"], kept["max"]) == (4, 4)
