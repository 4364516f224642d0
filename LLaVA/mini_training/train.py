"""Train llava-mini from nothing, or teach it to read: ``python -m mini_training``, from the folder ``LLaVA``.

Six stages. ``tower``: the vision tower learns what is in each patch. ``align``: projector and language model learn
words for it, in captions and plain questions. ``basics``: which thing has which attribute, and how to answer with a
letter. ``finetune``: every kind of question in every layout that a benchmark uses. ``deepen``: more of it, with layers
added that begin as if they were not there. ``ground``: more of it, with heads that ask on the way what the words of a
question point at.

Two more go on from a finished model (``--base llava-mini``). ``read_tower``: its tower learns which text stands at each
patch of a page. ``read``: projector and language model learn to answer questions about pages.

Stopped at any time, even killed, a run goes on with ``--resume`` and ends in the same weights as one that was never
stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file
from torch.utils.data import default_collate

from llava.command import Parser, positive, whole
from llava.model.checkpoint import read_config as read_checkpoint_config
from llava.model.checkpoint import resolve_model_path
from llava.model.tokenizer import load_tokenizer
from llava.train.loop import Run, Trainer
from mini_training.decoder import TOWER_FOLDER, ConversationTask, build_llava
from mini_training.evaluate import PAGE_SORTS, SCENE_SORTS, evaluate
from mini_training.export import export_checkpoint, export_tower
from mini_training.grounding import Grounding
from mini_training.packing import Mixture, PackedScenes, collate
from mini_training.reading import PackedPages, PageImages, Reading, ReadTowerTask
from mini_training.stage import Stage, learning_rate_factor, make_optimizers
from mini_training.tower import TowerScenes, TowerTask
from mini_training.vocabulary import build_tokenizer

CONFIG = Path(__file__).with_name("config.yaml")
STAGES = ("tower", "align", "basics", "finetune", "deepen", "ground")
READ_STAGES = ("read_tower", "read")

LAYERS = "model.model.layers."


def read_config(file: Path, smoke: bool = False) -> dict:
    """The recipe in a YAML file; with `smoke`, with the sizes and steps that its section ``smoke`` has instead.

    An OSError if there is no such file, a ValueError if it holds no recipe, or one with a setting that cannot be: a
    stage is hours away when it is read.
    """
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not {"seed", "tokenizer", "tower", "decoder", "stages"} <= config.keys():
        raise ValueError(f"{file} holds no recipe: it needs seed, tokenizer, tower, decoder and stages")
    small = config.pop("smoke", {})
    config = _merged(config, small) if smoke else config
    for name in (*STAGES, *READ_STAGES):
        try:
            parse_stage(name, config)
            _grounding(name, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file}: stage {name}: {said}") from error
    return config


def _merged(base: dict, over: dict) -> dict:
    return base | {k: _merged(base[k], v) if isinstance(v, dict) else v for k, v in over.items()}


def parse_stage(name: str, config: dict) -> tuple[Stage, Mixture | Reading | None]:
    """A stage of the recipe, and which questions it asks."""
    other = ("layers", "grounding", "pointing")
    settings = {key: value for key, value in config["stages"][name].items() if key not in other}
    mixture, reading = settings.pop("mixture", None), settings.pop("reading", None)
    if reading is not None:
        mixture = Reading(**_known(reading, Reading))
    elif mixture is not None:
        forms = tuple(form for form, n in mixture["forms"].items() for _ in range(n))
        mixture = Mixture(**_known(mixture, Mixture) | {"forms": forms})
    return Stage(name, **_known(settings, Stage)), mixture


def _known(settings: dict, of: type) -> dict:
    for name in settings.keys() - {one.name for one in fields(of)}:
        raise ValueError(f"there is no setting {name!r}; there are {', '.join(one.name for one in fields(of))}")
    return settings


def train(config: dict, run: Run, workers: int = 0) -> bool:
    """Train the stage that the run is named after; see `llava.train.loop.Trainer.fit`."""
    torch.manual_seed(config["seed"])
    name = run.name
    stage, mixture = parse_stage(name, config)
    length, device = stage.steps * stage.batch, str(PartialState(cpu=run.cpu).device)
    seeds = ("train", stage.first_seed, length)
    if name in ("tower", "read_tower"):
        if name == "tower":
            task = TowerTask(config["tower"])
            data = TowerScenes(*seeds, config["tower"]["crowded"])
        else:
            task = ReadTowerTask(run.folder / "checkpoint" / TOWER_FOLDER)
            data = PageImages(*seeds, mixture)
        for unused in (task.tower.encoder.layers[-1], task.tower.post_layernorm):
            unused.requires_grad_(False)
        matrices = [p for p in task.tower.encoder.layers[:-1].parameters() if p.ndim == 2]
        collator = default_collate
    else:
        tokenizer = load_tokenizer(run.folder / "checkpoint")
        task = conversation_task(name, config, len(tokenizer), run.folder, device)
        if not run.state_file.exists():
            _begin(name, task, run.folder)
        matrices, collator = task.matrices(), collate
        if name == "read":
            data = PackedPages(*seeds, mixture, tokenizer)
        else:
            data = PackedScenes(*seeds, stage.batch, mixture, tokenizer)
    trainer = Trainer(task, make_optimizers(task, matrices, stage), run, clip=stage.clip)
    batches = trainer.batches(data, range(length), stage.batch, stage.steps, collator, workers)
    return trainer.fit(batches, stage.steps, lambda step: learning_rate_factor(step, stage))


def _begin(name: str, task: ConversationTask, folder: Path) -> None:
    """Load what a conversation stage starts from: the stage before it, or the base's decoder and projector."""
    if name == "read":
        task.model.load_state_dict(load_file(folder / "checkpoint" / "model.safetensors"), strict=False)
    elif name != "align":
        grow(task, _weights(folder / f"{_before(name)}.pt"))


def conversation_task(stage: str, config: dict, vocabulary: int, folder: Path, device: str = "cpu") -> ConversationTask:
    """The model on the exported tower, with new weights and as many decoder layers as the stage has."""
    decoder = config["decoder"] | {name: n for name, n in config["stages"][stage].items() if name == "layers"}
    model = build_llava(config | {"decoder": decoder}, vocabulary, folder / "checkpoint", device)
    pointing = config["stages"][stage].get("pointing", 0.0)
    return ConversationTask(model, _grounding(stage, config), pointing).to(device)


def _grounding(stage: str, config: dict) -> Grounding | None:
    settings = config["stages"][stage].get("grounding")
    return Grounding(**_known(settings, Grounding)) if settings else None


def grow(task: ConversationTask, state: dict[str, torch.Tensor]) -> None:
    """Load the weights of an equal or shallower model, spread over the layers; a layer in between does nothing yet.

    A ValueError if the state has more layers.
    """
    layers = task.model.get_model().layers
    old = 1 + max(int(name.split(".")[3]) for name in state if name.startswith(LAYERS))
    if old > len(layers):
        raise ValueError(f"a model of {len(layers)} layers cannot continue one of {old}")
    places = [number * len(layers) // old for number in range(old)]
    moved = {}
    for name, value in state.items():
        if name.startswith(LAYERS):
            number, _, rest = name.removeprefix(LAYERS).partition(".")
            name = f"{LAYERS}{places[int(number)]}.{rest}"
        moved[name] = value
    task.load_state_dict(moved, strict=False)
    with torch.no_grad():
        for number in set(range(len(layers))) - set(places):
            layers[number].self_attn.o_proj.weight.zero_()
            layers[number].mlp.down_proj.weight.zero_()


def _weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)["model"]


def _before(name: str) -> str:
    chain = READ_STAGES if name in READ_STAGES else STAGES
    return chain[chain.index(name) - 1]


def _prepare(name: str, config: dict, folder: Path, base: str | None) -> None:
    """Put what a stage builds on into ``checkpoint``: the tower and the tokenizer, or the whole base."""
    if name == "tower":
        return
    if name == "read_tower":
        if not (folder / "checkpoint").exists():
            shutil.copytree(resolve_model_path(base), folder / "checkpoint")
        return
    before = folder / f"{_before(name)}.pt"
    if not before.exists():
        raise FileNotFoundError(f"stage {name} needs {before}: train stage {_before(name)} first")
    if (folder / f"{name}.pt").exists():
        return
    if name == "align":
        task = TowerTask(config["tower"])
        build_tokenizer(folder / "checkpoint", **config["tokenizer"])
    elif name == "read":
        task = ReadTowerTask(folder / "checkpoint" / TOWER_FOLDER)
    else:
        return
    task.load_state_dict(_weights(before), strict=False)
    export_tower(task.tower, folder / "checkpoint")


def sizes_of(base: str) -> dict:
    """The recipe's sections ``tower`` and ``decoder`` for a finished model."""
    folder = Path(resolve_model_path(base))
    sizes = read_checkpoint_config(str(folder))
    tower = read_checkpoint_config(str(folder / TOWER_FOLDER))
    return {
        "tower": {
            "width": tower["hidden_size"],
            "heads": tower["num_attention_heads"],
            "layers": tower["num_hidden_layers"] - 1,
            "intermediate": tower["intermediate_size"],
        },
        "decoder": {
            "width": sizes["hidden_size"],
            "heads": sizes["num_attention_heads"],
            "layers": sizes["num_hidden_layers"],
            "intermediate": sizes["intermediate_size"],
            "initializer_range": sizes["initializer_range"],
        },
    }


def _export(config: dict, folder: Path, base: str | None) -> None:
    tokenizer = load_tokenizer(folder / "checkpoint")
    last = next(name for name in reversed(READ_STAGES if base else STAGES) if (folder / f"{name}.pt").exists())
    task = conversation_task(last, config, len(tokenizer), folder)
    task.load_state_dict(_weights(folder / f"{last}.pt"), strict=False)
    export_checkpoint(task.model, folder, config, base)


def _parser() -> Parser:
    several = "Several processes: accelerate launch --cpu --num_processes 2 -m mini_training --threads 1 ..."
    parser = Parser("mini_training", __doc__, epilog=several)
    add = parser.add_argument
    add("--output", default="llava-mini-run", help="folder of the run; the model lands in its folder checkpoint")
    add("--config", default=str(CONFIG), help="the recipe (YAML)")
    add("--base", help="go on from this model, llava-mini or a folder, in place of training one: it learns to read")
    add("--stage", choices=(*STAGES, *READ_STAGES, "export", "evaluate", "all"), default="all")
    add("--resume", action="store_true", help="go on from the last saved state")
    add("--minutes", type=float, default=math.inf, help="save and stop after this long")
    add("--threads", type=positive, default=os.cpu_count(), help="threads per process")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--workers", type=whole, default=0, help="processes that draw later images; for a GPU, one per core")
    add("--fp32", action="store_true", help="no bfloat16 products")
    add("--scenes", type=positive, default=200, help="scenes to evaluate on")
    add("--smoke", action="store_true", help="tiny sizes, few steps: try everything out in seconds")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; 3 when time ran out first."""
    return _parser().run(_run, argv)


def _run(arguments: argparse.Namespace) -> int:
    """Run the recipe; 0 when everything asked for is complete, 3 when time ran out first."""
    folder, base = Path(arguments.output), arguments.base
    config = read_config(Path(arguments.config), arguments.smoke) | (sizes_of(base) if base else {})
    chain, cpu = READ_STAGES if base else STAGES, arguments.device == "cpu"
    if arguments.stage not in (*chain, "export", "evaluate", "all"):
        raise ValueError(f"stage {arguments.stage} is trained {'without' if base else 'with'} --base")
    wanted = chain if arguments.stage == "all" else [name for name in chain if name == arguments.stage]
    precision = "no" if arguments.fp32 else "bf16"
    runs = [Run(folder, name, config["seed"], arguments.resume, precision=precision, cpu=cpu) for name in wanted]
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    end, place = time.monotonic() + 60 * arguments.minutes, PartialState(cpu=cpu)
    for run in runs:
        if place.is_main_process:
            _prepare(run.name, config, folder, base)
        place.wait_for_everyone()
        if not train(config, replace(run, resume=True, seconds=end - time.monotonic()), arguments.workers):
            return 3
    if not place.is_main_process:
        return 0
    if arguments.stage in ("export", "all"):
        _export(config, folder, base)
    if arguments.stage in ("evaluate", "all"):
        scenes, sorts = 4 if arguments.smoke else arguments.scenes, PAGE_SORTS if base else SCENE_SORTS
        evaluate(folder / "checkpoint", scenes, folder / "evaluation.json", sorts)
    return 0
