"""Every method where the model lies on a GPU: nothing is left on the CPU, and the host waits rarely.

Where there is no GPU it is a pretended one, which computes on the CPU and refuses what a GPU would.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from llava.eval.latency import __main__ as command_line
from llava.eval.latency import clock, prefill, select
from llava.eval.latency.__main__ import main
from llava.flops import made_up
from llava.model.visual_cache import VisualCache, content_digests
from llava.pruning import available_methods, deferred_checks, pruning
from llava.pruning.registry import method_class
from llava.pruning.rows import CACHE_NAMES
from pretended_gpu import GPU, GPUS, NAME, pretended_cuda, pretended_gpu
from rehearsal import rehearse
from tiny_llava import build, pad_rows, pixels, prompt
from tiny_methods import OPTIONS, RATIOS
from tiny_trained import trained_networks
from tiny_vlms import can_be_pruned
from tiny_vlms import tiny as tiny_vlm

if torch.version.cuda is None:
    pytest.skip("this PyTorch was built without CUDA", allow_module_level=True)

METHODS = [(name, layer) for name in sorted(available_methods()) if name not in RATIOS for layer in (0, 2)]
METHODS = [(name, layer) for name, layer in METHODS if method_class(name)().first_layer <= layer]
METHODS += [(name, None) for name in RATIOS]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return OPTIONS | trained_networks(tmp_path_factory.mktemp("trained"))


def several_rows() -> dict:
    """Rows with one, two and no images."""
    rows = [prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2), prompt(12, seed=3)]
    ids, mask = pad_rows(rows, "left")
    images = torch.cat([pixels(1, seed=4), pixels(2, seed=5), pixels(1, seed=6)])
    return {"inputs": ids, "attention_mask": mask, "images": images}


def crops() -> dict:
    """Two rows, an image of several crops each."""
    ids, mask = pad_rows([prompt(3, 5, seed=1), prompt(4, 4, seed=2)])
    images = [pixels(3, seed=1), pixels(5, seed=2)]
    return {"inputs": ids, "attention_mask": mask, "images": images, "image_sizes": [(112, 56), (84, 112)]}


def on_gpu(asked: dict) -> dict:
    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to(GPU)
        return [image.to(GPU) for image in value] if isinstance(value[0], torch.Tensor) else value

    return {name: moved(value) for name, value in asked.items()}


def answer(model, asked: dict, tokens: int = 4) -> list:
    return model.generate(**asked, max_new_tokens=tokens, do_sample=False).tolist()


@pytest.fixture
def gpu():
    with pretended_gpu() as pretended:
        yield pretended


@contextmanager
def real_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    with torch.no_grad():
        yield


@pytest.mark.parametrize("device", [pretended_gpu, real_gpu])
@pytest.mark.parametrize("asked", [several_rows, crops])
def test_every_method_answers_as_on_a_cpu(tower, options, asked, device):
    anyres = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    }
    model = build(tower, **(anyres if asked is crops else {}))

    def answers(asked: dict) -> dict:
        found = {"unpruned": answer(model, asked)}
        for method, layer in METHODS:
            with pruning(model, method, ratio=RATIOS.get(method, 0.3), layer=layer, **options.get(method, {})):
                found[method, layer] = answer(model, asked)
        return found

    expected = answers(asked())
    with device():
        model.to(GPU)
        assert answers(on_gpu(asked())) == expected


class TestTwoGpus:
    """The embeddings and half of the layers on one; the other half, vision tower and projector on the other."""

    @pytest.mark.parametrize("layer", [0, 2, 3, None])
    def test_every_method_answers_as_on_a_cpu(self, tower, options, layer):
        model, expected = build(tower), {}
        methods = [name for name in sorted(available_methods()) if (name in RATIOS) == (layer is None)]
        methods = [name for name in methods if layer is None or method_class(name)().first_layer <= layer]

        def answers(asked: dict) -> dict:
            found = {}
            for method in methods:
                with pruning(model, method, ratio=RATIOS.get(method, 0.3), layer=layer, **options.get(method, {})):
                    labels = asked["inputs"].clone()
                    labels[:, :-2] = -100
                    arguments = {name: value for name, value in asked.items() if name != "inputs"}
                    with torch.no_grad():
                        loss = model(asked["inputs"], labels=labels, **arguments).loss
                    found[method] = answer(model, asked, tokens=2), round(float(loss), 3)
            return found

        expected = answers(several_rows())
        with pretended_gpu(), pretended_cuda():
            first = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"]
            rest = [
                "model.layers.2",
                "model.layers.3",
                "model.norm",
                "lm_head",
                "model.vision_tower",
                "model.mm_projector",
            ]
            dispatch_model(model, dict.fromkeys(first, 0) | dict.fromkeys(rest, 1), skip_keys=list(CACHE_NAMES))
            assert {parameter.device for parameter in model.parameters()} == set(GPUS)
            assert answers(on_gpu(several_rows())) == expected


class TestWaiting:
    """How often the host looks at what the GPU computed: not once more for a larger batch."""

    @pytest.fixture
    def model(self, tower, request):
        built = build(tower)  # checkpoints are read without the pretended GPU
        request.getfixturevalue("gpu")
        return built.to(GPU)

    def waits(self, model, gpu, batch: int, **switch) -> Counter:
        ids = torch.stack([prompt(3, 9, seed=row) for row in range(batch)]).to(GPU)
        asked = {"input_ids": ids, "images": pixels(batch).to(GPU), "logits_to_keep": 1}
        with pruning(model, **switch) if switch else torch.no_grad():
            gpu.waits.clear()
            model(**asked)
        return Counter(gpu.waits)

    def test_a_prefill_without_pruning_waits_for_the_prompt_alone(self, model, gpu):
        assert self.waits(model, gpu, 2) == self.waits(model, gpu, 7) == {"copied to the host": 1}

    def test_otprune_waits_twice_more(self, model, gpu):
        found = self.waits(model, gpu, 2, method="otprune", ratio=0.3)
        assert found == self.waits(model, gpu, 7, method="otprune", ratio=0.3)
        assert found.total() == 3

    def test_otprune_waits_no_more_where_its_checks_come_later(self, model, gpu):
        with deferred_checks() as checks:
            assert self.waits(model, gpu, 2, method="otprune", ratio=0.3) == {"copied to the host": 1}
        checks.verify()
        assert gpu.waits[1:] == ["copied to the host"]

    @pytest.mark.parametrize(("method", "layer"), METHODS, ids=str)
    def test_a_larger_batch_waits_as_often(self, model, gpu, options, method, layer):
        switch = {"method": method, "ratio": RATIOS.get(method, 0.3), "layer": layer} | options.get(method, {})
        few, many = (self.waits(model, gpu, batch, **switch) for batch in (2, 7))
        # Random draws by the picture's content, the same on every machine: the host reads each.
        assert many - few == (Counter({"copied to the host": 5}) if method == "random" else Counter())

    def test_remembered_images_are_told_apart_by_one_look(self, model, gpu):
        ids = torch.stack([prompt(3, 9, seed=row) for row in range(6)]).to(GPU)
        model.visual_cache = VisualCache(2**20)
        for hits in (0, 6):
            images = pixels(6).to(GPU)
            gpu.waits.clear()
            model(input_ids=ids, images=images, logits_to_keep=1)
            assert model.visual_cache.hits == hits and len(gpu.waits) == 2


class TestLatency:
    """The commands that measure a GPU, from end to end."""

    def table(self, tmp_path, *command: str) -> list[dict[str, str]]:
        with pretended_cuda():
            assert main([*command, "--device", "cuda", "--output", str(tmp_path)]) == 0
        text = (tmp_path / f"{command[0]}.md").read_text()
        assert NAME in text
        header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header) and row != header]

    def test_select_tells_milliseconds_and_memory(self, gpu, tmp_path):
        rows = self.table(tmp_path, "select", "--sizes", "24:4x2", "--width", "8", "--repetitions", "1", "--curve")
        assert [row["method"] for row in rows] == ["published", "otprune", "divprune", "dpp"]
        assert all(row["peak MiB"] == "7.0" and "/" in row["ms"] for row in rows)

    @pytest.mark.parametrize("command", ["prefill", "generate"])
    def test_prefill_and_generate_split_the_time(self, gpu, tmp_path, command):
        options = ["--batch", "2", "--repetitions", "1", "--dtype", "float32", "--methods", "otprune", "fastv@2"]
        options += ["--new-tokens", "2", "--pope", "2x2"] if command == "generate" else []
        rows = self.table(tmp_path, command, *options)
        assert [row["method"] for row in rows[:3]] == ["unpruned", "otprune", "fastv@2"]
        for row in rows[:3]:
            assert all("/" in row[f"{part}, ms"] for part in ("ttft", "vision", "selection", "prefill"))
            assert row["peak MiB"] == "7.0"


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """The command lines of the measurements of scripts/measure_gpu.sh, by step."""
    steps = ("select", "prefill", "prefill-qwen", "load", "generate", "prefill-1.6", "prefill-13b", "suite")
    found = rehearse(tmp_path_factory.mktemp("rehearsal"), *steps)
    assert [command[:2] for command in found.commands] == [["-m", "llava.eval.latency"]] * len(found.commands)
    return {Path(command[-1]).name: command[2:] for command in found.commands}


class TestTheScript:
    """What it would run on a GPU, on the pretended one and in small."""

    @pytest.fixture
    def in_small(self, monkeypatch, tower):
        """Shapes that a CPU computes in no time, and one round."""
        shapes = {"1.5-7b": build(tower), "qwen2.5-vl-7b": deepcopy(tiny_vlm("qwen2_5_vl").model)}
        monkeypatch.setattr(made_up, "USUAL_TOKENS", 16)
        monkeypatch.setattr(select, "SIZES", [select.Size(24, 4, 2)])
        monkeypatch.setattr(command_line, "load", lambda name, *_: shapes[name].to(GPU))

        def once(runs, repetitions, *rest, **more):
            return clock.take_turns(runs, 1, *rest, **more | {"warm_up": 0})

        for module in (prefill, select):
            monkeypatch.setattr(module, "take_turns", once)

    @pytest.mark.parametrize(
        ("step", "methods"),
        [
            ("select", ["published", "otprune", "divprune"]),
            ("prefill", ["unpruned", "otprune", "divprune", "fastv@2"] * 2),
            pytest.param("prefill-qwen", ["unpruned", "otprune", "divprune", "fastv@2"] * 2, marks=can_be_pruned),
            ("load", ["unpruned", "otprune"] * 3),
        ],
    )
    def test_each_step_leaves_its_results(self, commands, step, methods, in_small, gpu, tmp_path):
        place = commands[step].index("--output")
        with pretended_cuda():
            assert main([*commands[step][:place], "--output", str(tmp_path)]) == 0
        report = json.loads((tmp_path / f"{commands[step][0]}.json").read_text())
        assert [row["method"] for row in report["rows"]] == methods
        assert report["machine"]["name"] == NAME
        for row in report["rows"]:
            assert row["peak_bytes"] > 0 and row["kv_bytes" if "kv_bytes" in row else "n"] > 0

    def test_all_other_commands_are_understood(self, commands):
        for step in ("generate", "prefill-1.6", "prefill-13b", "suite", "serve"):
            assert command_line._parser().parse_args(commands[step]).command == commands[step][0]


class TestThePretendedGpu:
    def test_refuses_tensors_of_both_devices(self, gpu):
        with pytest.raises(RuntimeError, match=r"aten.add.Tensor of tensors on cuda:0 and on the CPU"):
            torch.ones(3, device="cuda") + torch.ones(3)

    def test_counts_what_the_host_waits_for(self, gpu):
        x = torch.arange(4.0, device="cuda")
        assert (x[x > 1].cpu().tolist(), float(x.sum()), x.device) == ([2, 3], 6, GPU)
        assert gpu.waits == ["aten.index.Tensor", "copied to the host", "aten._local_scalar_dense.default"]

    def test_waits_for_copies_unless_it_is_told_not_to(self, gpu):
        x = torch.ones(3)
        for copy in (lambda: x.to(GPU), lambda: torch.tensor([1, 2], device=GPU), lambda: x.to(GPU)[[0, 2]]):
            copy()
        assert gpu.waits == ["copied to the GPU"] * 4
        gpu.waits.clear()
        x.to(GPU, non_blocking=True).to(GPU)
        torch.zeros(3, device=GPU)
        assert not gpu.waits

    def test_has_memory_that_numpy_cannot_read(self, gpu):
        with pytest.raises((TypeError, RuntimeError)):
            torch.ones(3, device="cuda").numpy()


class TestDigests:
    @pytest.fixture(params=["cpu", "gpu"])
    def digests(self, request):
        if request.param == "cpu":
            yield content_digests
            return
        with pretended_gpu():
            yield lambda images: content_digests([image.to(GPU) for image in images])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_the_least_difference_is_seen(self, digests, dtype):
        x = pixels(1)[0].to(dtype)
        changed = x.clone()
        changed[2, -1, -1] = torch.nextafter(changed[2, -1, -1].float(), torch.tensor(9.0)).to(dtype) + 0.01
        negated, swapped = x.clone(), x.clone()
        negated[0, 0, 0] *= -1
        swapped[0, 0, :2] = x[0, 0, :2].flip(0)
        found = digests([x, x.clone(), changed, negated, swapped, x.flip(0), torch.zeros_like(x)])
        assert found[0] == found[1] and len(set(found)) == 6

    def test_of_nothing_there_are_none(self, digests):
        assert digests([]) == []

    def test_strides_do_not_matter(self, digests):
        x = pixels(1)[0]
        assert len(set(digests([x, x.mT.contiguous().mT]))) == 1
