"""Loading: what a broken checkpoint, tower or switch is answered with, and that dtype and device mean what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from golden import golden_root
from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMptConfig
from llava.model.builder import load_pretrained_model, resolve_model_path
from llava.model.language_model import llava_mpt
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, CLIPVisionTowerS2
from llava.model.utils import auto_upgrade
from weight_names import weight_names

ROOT = golden_root() / "llava"
NAME = "llava-v1.5-tiny"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A writable copy of a v1.5 checkpoint with its tower inside."""
    folder = tmp_path / NAME
    shutil.copytree(ROOT / "checkpoints" / NAME, folder, copy_function=shutil.copyfile)
    shutil.copytree(
        ROOT / "openai" / "clip-vit-tiny-patch14-56",
        folder / "openai" / "clip-vit-tiny-patch14-56",
        copy_function=shutil.copyfile,
    )
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def load(folder, **kwargs):
    return load_pretrained_model(str(folder), None, NAME, device="cpu", **kwargs)


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_tower_inside_the_checkpoint_is_found_from_any_folder(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, model, processor, _ = load(checkpoint)
    assert model.get_vision_tower().is_loaded and processor.crop_size["height"] == 56


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float32", "torch.bfloat16"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_every_weight(checkpoint, name, dtype):
    _, model, _, _ = load(checkpoint, **{name: dtype})
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.split(".")[-1])
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, None])
def test_a_device_overrules_the_device_map(checkpoint, device_map):
    _, model, _, _ = load(checkpoint, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_what_evaluation_harnesses_pass_is_taken(checkpoint):
    _, model, _, _ = load(checkpoint, multimodal=True, customized_config=None, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_a_saved_checkpoint_loads_again(checkpoint, tmp_path):
    tokenizer, model, _, _ = load(checkpoint, dtype=torch.float32)
    again = tmp_path / "llava-again"
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    shutil.copytree(checkpoint / "openai", again / "openai")
    _, reloaded, _, _ = load(again, dtype=torch.float32)
    ids, images = torch.tensor([[1, 5, -200, 7]]), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, images=images).logits, reloaded(input_ids=ids, images=images).logits)


def test_what_is_written_has_the_published_names(checkpoint, tmp_path):
    """The published LLaVA leaves a weight whose name it does not know at random values, and says nothing."""
    load(checkpoint)[1].save_pretrained(tmp_path / "again")
    decoder, tower = weight_names(checkpoint), weight_names(checkpoint / "openai" / "clip-vit-tiny-patch14-56")
    assert weight_names(tmp_path / "again") == decoder | {f"model.vision_tower.vision_tower.{name}" for name in tower}


def test_the_embedded_model_has_the_published_names(checkpoint):
    embedded = Path(resolve_model_path("llava-mini"))
    assert weight_names(embedded) == weight_names(checkpoint)
    assert weight_names(embedded / "vision_tower") == weight_names(checkpoint / "openai" / "clip-vit-tiny-patch14-56")


def test_the_embedded_model_is_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_model_path("llava-mini")).parts[-2:] == ("mini", "checkpoint")
    assert resolve_model_path("liuhaotian/llava-v1.5-7b") == "liuhaotian/llava-v1.5-7b"


@pytest.mark.parametrize("dtype", ["float99", "int8", torch.int64, 7])
def test_a_wrong_dtype_is_named(checkpoint, dtype):
    with pytest.raises(ValueError, match="dtype must be a floating type"):
        load(checkpoint, dtype=dtype)


@pytest.mark.parametrize(("device", "said"), [("bogus", "not 'bogus'"), ("cuda:77", "'cuda:77' is not there")])
def test_a_wrong_device_is_named(checkpoint, device, said):
    with pytest.raises(ValueError, match=said):
        load_pretrained_model(str(checkpoint), None, NAME, device=device)


def test_8_and_4_bit_exclude_each_other(checkpoint):
    with pytest.raises(ValueError, match="exclude each other"):
        load(checkpoint, load_8bit=True, load_4bit=True)


def test_a_wrong_switch_is_named_before_anything_is_read(monkeypatch):
    monkeypatch.setenv("BASELINE", "OURS")
    monkeypatch.setenv("SUBSET_RATIO", "1.5")
    with pytest.raises(ValueError, match=r"SUBSET_RATIO=1\.5"):
        load("/nowhere/llava")


def test_a_layer_beyond_the_decoder_is_named_before_the_weights(checkpoint, monkeypatch):
    for file in checkpoint.glob("pytorch_model*"):
        file.unlink()
    monkeypatch.setenv("BASELINE", "OURS")
    monkeypatch.setenv("SUBSET_RATIO", "0.1")
    monkeypatch.setenv("LAYER_INDEX", "99")
    with pytest.raises(ValueError, match=r"LAYER_INDEX=99.*3 layers"):
        load(checkpoint)


def test_the_active_method_is_announced_once(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("BASELINE", "OURS")
    monkeypatch.setenv("SUBSET_RATIO", "0.098")
    load(checkpoint)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava:")]
    assert said == ["llava: otprune keeps 9.8 % of the visual tokens before the decoder (gamma=40.96, compat=False)"]


def test_a_missing_folder_is_named():
    with pytest.raises(OSError, match="There is no checkpoint folder /nowhere/llava"):
        load("/nowhere/llava")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(OSError, match=r"no config\.json"):
        load(tmp_path)


def test_a_configuration_that_is_no_json_is_named(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(checkpoint)


@pytest.mark.parametrize("model_type", ["bert", "mpt"])
def test_another_architecture_is_named(checkpoint, model_type):
    edit_config(checkpoint, model_type=model_type, architectures=["BertModel"])
    with pytest.raises(ValueError, match=r"(not|is) supported"):
        load(checkpoint)


def test_a_missing_tower_is_named(checkpoint):
    edit_config(checkpoint, mm_vision_tower="somewhere/else")
    with pytest.raises(ValueError, match="Unknown vision tower: somewhere/else"):
        load(checkpoint)


def test_a_tower_without_weights_is_named(checkpoint):
    (checkpoint / "openai" / "clip-vit-tiny-patch14-56" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="Cannot load the vision tower"):
        load(checkpoint)


def as_safetensors(folder: Path) -> Path:
    if (folder / "model.safetensors").exists():
        return folder / "model.safetensors"
    weights = {}
    for file in sorted(folder.glob("pytorch_model-*.bin")):
        weights |= torch.load(file, weights_only=True)
        file.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def test_missing_weights_are_named(checkpoint):
    file = as_safetensors(checkpoint)
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold all weights.*layers\.1\.mlp\.up_proj"):
        load(checkpoint)


def test_a_projector_only_checkpoint_without_its_base_is_named(checkpoint):
    file = as_safetensors(checkpoint)
    save_file({k: v for k, v in load_file(file).items() if "mm_projector" in k}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="needs model_base"):
        load(checkpoint)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_weights_are_named(checkpoint, layout, keep):
    file = as_safetensors(checkpoint) if layout == "safetensors" else sorted(checkpoint.glob("pytorch_model-*"))[0]
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(OSError, match="Cannot read the weights in"):
        load(checkpoint)


def test_weights_of_another_shape_are_named(checkpoint):
    edit_config(checkpoint, intermediate_size=128)
    with pytest.raises((ValueError, OSError), match=r"size|shape"):
        load(checkpoint)


VOCABULARY_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")


def adapters_on(base: Path, folder: Path, added_tokens: int = 0, extras: tuple[str, ...] = ()) -> Path:
    """A LoRA checkpoint on ``base`` whose vocabulary is larger, with the named weights beside the adapters."""
    model = load(base, dtype=torch.float32)[1]
    adapters = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, adapters).save_pretrained(folder)
    shutil.copy(base / "config.json", folder)
    edit_config(folder, vocab_size=model.config.vocab_size + added_tokens, mm_use_im_start_end=True)
    shutil.copytree(base / "openai", folder / "openai")
    weights = load_file(as_safetensors(base))
    larger = {name: torch.nn.functional.pad(weights[name], (0, 0, 0, added_tokens), value=0.5) for name in extras}
    torch.save({f"base_model.model.{name}": w for name, w in larger.items()}, folder / "non_lora_trainables.bin")
    return folder


def adapters_alone(base: Path, folder: Path) -> Path:
    """What peft itself writes: adapters, here of weights that change every answer, and no configuration of a model."""
    model = get_peft_model(
        load(base, dtype=torch.float32)[1], LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    )
    model.save_pretrained(folder)
    return folder


def projector_alone(base: Path, folder: Path) -> Path:
    """A pretraining stage's result: projector and configuration."""
    folder.mkdir()
    weights = load_file(as_safetensors(base))
    torch.save({name: value for name, value in weights.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    shutil.copy(base / "config.json", folder)
    return folder


class TestWhatACheckpointIs:
    """Its files say, whatever its name says."""

    @pytest.mark.parametrize("name", ["my-finetune", "llava-lora"])
    def test_adapters(self, checkpoint, tmp_path, name):
        folder = adapters_on(checkpoint, tmp_path / name, 2, VOCABULARY_WEIGHTS)
        _, model, _, _ = load_pretrained_model(str(folder), str(checkpoint), name, device="cpu")
        assert model.config.vocab_size == 1002 and model.config.name_or_path == str(folder)

    def test_adapters_without_a_configuration_are_those_of_their_base(self, checkpoint, tmp_path):
        folder = adapters_alone(checkpoint, tmp_path / "adapters")
        merged = load_pretrained_model(str(folder), str(checkpoint), "x", device="cpu", dtype=torch.float32)[1]
        before = load(checkpoint, dtype=torch.float32)[1].state_dict()
        changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)}

    @pytest.mark.parametrize("name", ["my-finetune", "llava-pretrain"])
    def test_a_projector(self, checkpoint, tmp_path, name):
        whole = load(checkpoint)[1].model.mm_projector[0].weight
        folder = projector_alone(checkpoint, tmp_path / name)
        _, model, _, _ = load_pretrained_model(str(folder), str(checkpoint), name, device="cpu")
        assert torch.equal(model.model.mm_projector[0].weight, whole)

    def test_a_whole_model_named_after_its_adapters(self, checkpoint, recwarn):
        _, model, _, _ = load_pretrained_model(str(checkpoint), None, "llava-lora-merged", device="cpu")
        assert type(model) is LlavaLlamaForCausalLM and not recwarn.list

    def test_a_language_model_named_llava(self, checkpoint):
        plain = {key: None for key in json.loads((checkpoint / "config.json").read_text()) if "mm_" in key}
        edit_config(checkpoint, **plain, model_type="llama", architectures=["LlamaForCausalLM"])
        assert load(checkpoint)[2] is None
        with pytest.raises(ValueError, match="is a language model without vision: give a LLaVA, such as llava-mini"):
            load(checkpoint, multimodal=True)

    def test_a_tower_beside_the_adapters_is_found(self, checkpoint, tmp_path):
        folder = adapters_on(checkpoint, tmp_path / "lora", 0, VOCABULARY_WEIGHTS)
        shutil.rmtree(checkpoint / "openai")
        _, model, _, _ = load_pretrained_model(str(folder), str(checkpoint), "x", device="cpu")
        assert model.get_vision_tower().vision_tower_name == str(folder / "openai" / "clip-vit-tiny-patch14-56")

    @pytest.mark.parametrize(
        ("make", "with_base", "error", "said"),
        [
            (adapters_alone, False, ValueError, "adapters alone: give the model they were trained on as model_base"),
            (projector_alone, False, ValueError, "projector alone: give the language model it was trained with as mo"),
            (lambda base, _: base, True, ValueError, "holds all its weights, neither adapters nor a projector"),
        ],
        ids=["adapters", "projector", "whole"],
    )
    def test_a_base_too_few_or_too_many_is_named(self, checkpoint, tmp_path, make, with_base, error, said):
        folder = make(checkpoint, tmp_path / "made")
        if not (folder / "config.json").exists():
            shutil.copy(checkpoint / "config.json", folder)
        with pytest.raises(error, match=said):
            load_pretrained_model(str(folder), str(checkpoint) if with_base else None, NAME, device="cpu")

    def test_the_base_that_adapters_name_is_told(self, checkpoint, tmp_path):
        folder = adapters_on(checkpoint, tmp_path / "lora")
        with pytest.raises(ValueError, match=rf"\(adapter_config.json says {checkpoint}\)"):
            load_pretrained_model(str(folder), None, "x", device="cpu")

    def test_no_weights_at_all(self, checkpoint):
        as_safetensors(checkpoint).unlink()
        with pytest.raises(
            OSError, match=r"holds no weights: no model.safetensors, pytorch_model.bin, mm_projector.bin"
        ):
            load(checkpoint)

    def test_adapters_on_a_language_model_bring_the_projector(self, checkpoint, tmp_path):
        folder = adapters_on(checkpoint, tmp_path / "lora")
        (folder / "non_lora_trainables.bin").unlink()
        file = checkpoint / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "mm_" not in k}, file, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"mm_projector.* missing \(neither model_base nor non_lora_trainables.bin"
        ):
            load_pretrained_model(str(folder), str(checkpoint), "x", device="cpu")

    @pytest.mark.parametrize("model_type", ["llava", "llava_next"])
    def test_the_layout_of_transformers_itself(self, checkpoint, model_type):
        own = {"model_type": model_type, "text_config": {"model_type": "llama"}, "vision_config": {}}
        edit_config(checkpoint, mm_vision_tower=None, **own)
        with pytest.raises(ValueError, match=rf"transformers' own layout \({model_type}\).*liuhaotian/llava-v1.5-7b"):
            load(checkpoint)

    @pytest.mark.parametrize(
        "name",
        ["pytorch_model-00001-of-00002.bin", "tokenizer.model", "openai/clip-vit-tiny-patch14-56/model.safetensors"],
    )
    def test_a_note_of_git_lfs(self, checkpoint, name):
        note = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"
        (checkpoint / name).write_text(note)
        with pytest.raises((OSError, ValueError), match=rf"{name} is a git-LFS pointer.*run 'git lfs pull' in "):
            load(checkpoint)


def publish(cache: Path, repository: str, folder: Path, commit: str, branch: str) -> None:
    """Put a folder where a download of that commit would have put it."""
    place = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / branch).write_text(commit)


class TestHub:
    """A hub id, found in a cache folder that only the arguments name."""

    @pytest.fixture
    def cache(self, checkpoint, tmp_path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        tower = checkpoint / "openai"
        publish(tmp_path / "cache", "openai/clip-vit-tiny-patch14-56", next(tower.iterdir()), "0" * 40, "main")
        shutil.rmtree(tower)
        publish(tmp_path / "cache", "owner/name", checkpoint, "a" * 40, "main")
        edit_config(checkpoint, mm_vision_select_layer=-1)
        weights = load_file(as_safetensors(checkpoint))
        weights["lm_head.weight"].zero_()
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((checkpoint / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
        publish(tmp_path / "cache", "owner/name", checkpoint, "b" * 40, "other")
        return tmp_path / "cache"

    def test_a_revision_is_one_of_configuration_tokenizer_and_weights(self, cache):
        for revision, layer, zero in (("main", -2, False), ("other", -1, True), ("b" * 40, -1, True)):
            tokenizer, model, processor, _ = load_pretrained_model(
                "owner/name", None, "x", device="cpu", cache_dir=cache, revision=revision
            )
            assert model.get_vision_tower().select_layer == model.config.mm_vision_select_layer == layer
            assert (tokenizer.model_max_length == 77) is zero is not bool(model.lm_head.weight.any())
            assert processor.crop_size["height"] == 56 and model.config.name_or_path == "owner/name"

    def test_a_revision_is_not_the_bases(self, cache, checkpoint, tmp_path):
        publish(cache, "owner/part", projector_alone(checkpoint, tmp_path / "part"), "c" * 40, "main")
        _, model, _, _ = load_pretrained_model(
            "owner/part", "owner/name", "x", device="cpu", cache_dir=cache, revision="c" * 40
        )
        assert model.lm_head.weight.any()

    def test_what_the_cache_lacks_is_named(self, cache):
        with pytest.raises(OSError, match="owner/name is neither a folder nor a checkpoint that the hub gives") as said:
            load_pretrained_model("owner/name", None, "x", device="cpu", cache_dir=cache.parent / "empty")
        assert "\n" not in str(said.value)

    def test_a_tower_in_a_folder_of_the_checkpoint(self, cache, checkpoint):
        shutil.copytree(cache / "models--openai--clip-vit-tiny-patch14-56/snapshots" / ("0" * 40), checkpoint / "tower")
        edit_config(checkpoint, mm_vision_tower="tower")
        publish(cache, "owner/whole", checkpoint, "d" * 40, "main")
        _, model, _, _ = load_pretrained_model("owner/whole", None, "x", device="cpu", cache_dir=cache)
        assert model.get_vision_tower().is_loaded


def test_tokens_added_in_lora_training_come_with_their_embeddings(checkpoint, tmp_path):
    folder = adapters_on(checkpoint, tmp_path / "lora", 2, VOCABULARY_WEIGHTS)
    tokenizer, model, _, _ = load_pretrained_model(str(folder), str(checkpoint), "llava-lora", device="cpu")
    assert len(tokenizer) == model.config.vocab_size == 1002
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert len(weight) == 1002 and (weight[1000:] == 0.5).all()


def test_a_larger_vocabulary_without_embeddings_is_named(checkpoint, tmp_path):
    folder = adapters_on(checkpoint, tmp_path / "lora", 2, VOCABULARY_WEIGHTS[:1])
    with pytest.raises(ValueError, match=r"does not hold all weights.*lm_head\.weight missing"):
        load_pretrained_model(str(folder), str(checkpoint), "llava-lora", device="cpu")


def test_a_checkpoint_without_a_tower_in_its_configuration_is_named(checkpoint):
    edit_config(checkpoint, mm_vision_tower=None)
    with pytest.raises(ValueError, match=r"names no vision tower \(mm_vision_tower\)"):
        load(checkpoint)


def test_a_tower_at_several_scales_is_refused(checkpoint):
    edit_config(checkpoint, s2=True, s2_scales="56,112")
    with pytest.raises(ValueError, match="s2 is not supported"):
        load(checkpoint)


def test_a_plain_language_model_gets_the_tokenizer_it_was_trained_with(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    plain = {key: value for key, value in config.items() if "mm_" not in key}
    (checkpoint / "config.json").write_text(json.dumps(plain | {"model_type": "llama"}))
    tokenizer, model, processor, context_len = load_pretrained_model(str(checkpoint), None, "vicuna-tiny", device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM" and processor is None and context_len == 2048
    assert tokenizer.tokenize("What") == ["▁What"]


class TestWithoutTheLoader:
    """What a program that calls ``from_pretrained`` and ``load_model`` itself gets."""

    @pytest.fixture
    def own_tower(self, checkpoint, tmp_path) -> Path:
        """A checkpoint with its own vision tower, all ones where the tower's folder has other weights."""
        model = load(checkpoint, dtype=torch.float32)[1]
        for parameter in model.get_vision_tower().parameters():
            parameter.data.fill_(1)
        model.save_pretrained(tmp_path / "own")
        edit_config(tmp_path / "own", mm_vision_tower=str(checkpoint / "openai" / "clip-vit-tiny-patch14-56"))
        return tmp_path / "own"

    def test_a_tower_inside_the_checkpoint_stays(self, own_tower):
        tower = LlavaLlamaForCausalLM.from_pretrained(own_tower).get_vision_tower()
        tower.load_model()
        assert tower.is_loaded and tower.image_processor.crop_size["height"] == 56
        assert all((parameter == 1).all() and not parameter.requires_grad for parameter in tower.parameters())

    def test_a_tower_outside_waits_for_load_model(self, checkpoint):
        model, info = LlavaLlamaForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        assert not model.get_vision_tower().is_loaded and info["missing_keys"]
        model.get_vision_tower().load_model()
        assert model.get_vision_tower().is_loaded

    @pytest.mark.parametrize("unfreeze", [True, False])
    def test_a_tower_that_training_unfroze_is_loaded_at_once(self, checkpoint, unfreeze):
        folder = str(checkpoint / "openai" / "clip-vit-tiny-patch14-56")
        args = SimpleNamespace(mm_vision_select_layer=-2, unfreeze_mm_vision_tower=unfreeze)
        assert CLIPVisionTower(folder, args, delay_load=True).is_loaded is unfreeze


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"]
)
def test_a_pickle_with_code_is_not_run(checkpoint, tmp_path, name):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder, base = checkpoint, None
    if name != "pytorch_model.bin":
        make = projector_alone if name == "mm_projector.bin" else adapters_on
        folder, base = make(checkpoint, tmp_path / "made"), str(checkpoint)
    for file in folder.glob(f"{name.split('.')[0]}*"):
        file.unlink()
    if base is None:
        (folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    torch.save({"model.embed_tokens.weight": Evil()}, folder / name)
    with pytest.raises(OSError, match="they hold more than tensors, which would run as code") as said:
        load_pretrained_model(str(folder), base, NAME, device="cpu")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize("name", ["LlavaMptModel", "LlavaMptForCausalLM"])
def test_mpt_says_that_it_is_not_supported(name):
    with pytest.raises(NotImplementedError, match="not supported"):
        getattr(llava_mpt, name).from_pretrained("anything")


def test_the_class_of_a_tower_at_several_scales_says_that_it_is_not_supported():
    with pytest.raises(NotImplementedError, match="s2 is not supported"):
        CLIPVisionTowerS2("anything", None)


class TestFirstGeneration:
    """A checkpoint whose configuration says "llama"."""

    @pytest.fixture
    def first(self, checkpoint, tmp_path) -> Path:
        edit_config(checkpoint, model_type="llama", architectures=["LlamaForCausalLM"])
        return checkpoint.rename(tmp_path / "my-finetune")

    def test_it_loads_as_it_is(self, first):
        assert type(load(first)[1]) is LlavaLlamaForCausalLM

    def test_upgraded_it_is_found_by_name(self, first, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda question: "Y")
        auto_upgrade(str(first))
        assert isinstance(AutoConfig.from_pretrained(first), LlavaConfig)
        monkeypatch.delattr("builtins.input")
        auto_upgrade(str(first))

    def test_it_is_left_alone_when_the_answer_is_no(self, first, monkeypatch):
        before = (first / "config.json").read_text()
        monkeypatch.setattr("builtins.input", lambda question: "")
        with pytest.raises(SystemExit):
            auto_upgrade(str(first))
        assert (first / "config.json").read_text() == before


def test_a_configuration_of_mpt_can_be_read(tmp_path):
    LlavaMptConfig(d_model=16, n_heads=2, n_layers=1).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LlavaMptConfig)


def test_importing_llava_is_light():
    import subprocess
    import sys

    code = "import sys, llava; print([m for m in ('torch', 'transformers', 'peft', 'flash_attn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
