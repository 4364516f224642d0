"""lmms-eval's own wrappers prune as the environment says, and say what they kept."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
import transformers
from lmms_eval import models as registry
from lmms_eval.api.instance import Instance
from lmms_eval_otprune.models import transformers_models
from loguru import logger
from PIL import Image

from golden import golden_root
from llava.adapters.transformers import active_session
from llava.serve.export_hf import export

pytestmark = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18), reason="transformers 5.18 encodes images apart"
)
TASK, SPLIT = "colours", "test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA-1.5 as transformers' own."""
    path = tmp_path_factory.mktemp("exported") / "llava-v1.5-tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden_root() / "llava")
        export("checkpoints/llava-v1.5-tiny", path, conv_mode="vicuna_v1")
    return str(path)


@pytest.fixture
def wrapper(monkeypatch):
    """The class that lmms-eval loads for ``llava_hf``; decord, which it imports for videos, may be missing."""
    if importlib.util.find_spec("decord") is None:
        monkeypatch.setitem(sys.modules, "decord", types.SimpleNamespace(VideoReader=None, cpu=None))
    transformers_models.pruned_wrapper.cache_clear()
    return transformers_models.simple_llava_hf


def switch(monkeypatch, **variables):
    for name in ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def answers(lm, images=3):
    documents = [{"image": Image.new("RGB", (60, 60), colour)} for colour in ("red", "green", "blue")[:images]]
    lm.task_dict = {TASK: {SPLIT: documents}}
    settings = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}
    return lm.generate_until(
        [
            Instance(
                request_type="generate_until",
                arguments=("Which colour?", settings, lambda doc: [doc["image"]], number, TASK, SPLIT),
                idx=0,
                metadata={"task": TASK, "doc_id": number, "repeats": 1},
            )
            for number in range(images)
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
