"""What is refused inside vLLM, in one sentence each, before any weight is read."""

from __future__ import annotations

from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from transformers import LlavaConfig

from llava.adapters.vllm import models
from llava.adapters.vllm.model import PrunedModel, PrunedMRopeModel
from llava.adapters.vllm.processor import PrunedProcessor


@pytest.fixture
def switch(monkeypatch):
    monkeypatch.setenv("BASELINE", "OURS")
    monkeypatch.setenv("SUBSET_RATIO", "0.1")
    return monkeypatch


def vllm_config(lora: bool = False, video: float = 0.0) -> SimpleNamespace:
    """As much of vLLM's configuration as is looked at before a model is built."""
    text = SimpleNamespace(hidden_size=64)
    settings = SimpleNamespace(video_pruning_rate=video)
    whole = SimpleNamespace(model_type="tiny", vision_config=SimpleNamespace(model_type="tiny_vision"))
    model_config = SimpleNamespace(hf_config=whole, hf_text_config=text, multimodal_config=settings)
    adapters = SimpleNamespace(enable_tower_connector_lora=True) if lora else None
    return SimpleNamespace(lora_config=adapters, model_config=model_config)


def test_the_installed_entry_point_refuses_what_cannot_be_served(switch):
    (point,) = entry_points(group="vllm.general_plugins", name="otprune")
    switch.setenv("BASELINE", "FASTV")
    with pytest.raises(ValueError, match="fastv drops tokens inside the decoder, and a paged KV cache"):
        point.load()()


@pytest.mark.parametrize(
    ("kind", "config", "environ", "sentence"),
    [
        (PrunedModel, vllm_config(lora=True), {}, "LoRA on the vision tower or the connector"),
        (PrunedModel, vllm_config(), {"OTPRUNE_POSITION_IDS": "original"}, "vLLM has compact positions here"),
        (PrunedMRopeModel, vllm_config(), {"OTPRUNE_POSITION_IDS": "compact"}, "vLLM has original positions here"),
        (PrunedMRopeModel, vllm_config(video=0.5), {}, "--video-pruning-rate and BASELINE cannot be used together"),
    ],
)
def test_settings_that_do_not_go_together(switch, kind, config, environ, sentence):
    for name, value in environ.items():
        switch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        kind(vllm_config=config)


def test_the_vision_encoder_of_a_family_that_cannot_be_looked_into(switch):
    switch.setenv("BASELINE", "HIPRUNE")
    with pytest.raises(
        ValueError, match="hiprune looks at the vision encoder, which is not available for tiny in vLLM"
    ):
        models.Qwen2_5_VLForConditionalGeneration(vllm_config=vllm_config())


def test_checkpoints_with_pixtrals_tower():
    config = LlavaConfig(vision_config={"model_type": "pixtral"})
    factories = models.LlavaForConditionalGeneration._processor_factory
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration with a vision tower of type pixtral"):
        factories.info(SimpleNamespace(get_hf_config=lambda *_: config))


def test_a_ratio_among_the_servers_own_processor_settings():
    settings = SimpleNamespace(mm_processor_kwargs={"visual_token_ratio": 0.5})
    info = SimpleNamespace(ctx=SimpleNamespace(get_mm_config=lambda: settings))
    with pytest.raises(ValueError, match="visual_token_ratio is for requests"):
        PrunedProcessor(info)
