"""Train llava-mini from nothing: ``python -m mini_training``, from the folder ``LLaVA``.

Six stages. ``tower``: the vision tower learns what is in each patch. ``align``: projector and language model learn
words for it, in captions and plain questions. ``basics``: which thing has which attribute, and how to answer with a
letter. ``finetune``: every kind of question in every layout that a benchmark uses. ``deepen``: more of it, with layers
added that begin as if they were not there. ``ground``: more of it, with heads that ask on the way what the words of a
question point at. Stopped at any time, even killed, a run goes on with ``--resume`` and ends in the same weights as one
that was never stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from torch import nn
from torch.utils.data import default_collate

from llava.command import positive, whole
from llava.model.tokenizer import load_tokenizer
from llava.train.loop import Run, Trainer
from mini_training.attention import attention_for
from mini_training.decoder import ConversationTask, build_llava
from mini_training.evaluate import evaluate
from mini_training.export import export_checkpoint, export_tower
from mini_training.grounding import Grounding
from mini_training.packing import Mixture, PackedScenes, collate
from mini_training.stage import Stage, learning_rate_factor, make_optimizers
from mini_training.tower import TowerScenes, TowerTask
from mini_training.vocabulary import build_tokenizer

CONFIG = Path(__file__).with_name("config.yaml")
STAGES = ("tower", "align", "basics", "finetune", "deepen", "ground")

LAYERS = "model.model.layers."


def read_config(file: Path, smoke: bool = False) -> dict:
    """The recipe in a YAML file; with `smoke`, with the sizes and steps that its section ``smoke`` has instead.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it holds no recipe, or one with a setting that cannot be: a stage is hours away when it is read.
    """
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not {"seed", "tokenizer", "tower", "decoder", "stages"} <= config.keys():
        raise ValueError(f"{file} holds no recipe: it needs seed, tokenizer, tower, decoder and stages")
    small = config.pop("smoke", {})
    config = _merged(config, small) if smoke else config
    for name in STAGES:
        try:
            parse_stage(name, config)
            _grounding(name, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file}: stage {name}: {said}") from error
    return config


def _merged(base: dict, over: dict) -> dict:
    return base | {k: _merged(base[k], v) if isinstance(v, dict) else v for k, v in over.items()}


def parse_stage(name: str, config: dict) -> tuple[Stage, Mixture | None]:
    """A stage of the recipe, and which questions it asks."""
    settings = {key: value for key, value in config["stages"][name].items() if key not in ("layers", "grounding")}
    mixture = settings.pop("mixture", None)
    if mixture is not None:
        forms = tuple(form for form, n in mixture["forms"].items() for _ in range(n))
        mixture = Mixture(**_known(mixture, Mixture) | {"forms": forms})
    return Stage(name, **_known(settings, Stage)), mixture


def _known(settings: dict, of: type) -> dict:
    for name in settings.keys() - {one.name for one in fields(of)}:
        raise ValueError(f"there is no setting {name!r}; there are {', '.join(one.name for one in fields(of))}")
    return settings


def train(name: str, config: dict, run: Run, workers: int = 0) -> bool:
    """Train one stage; see `llava.train.loop.Trainer.fit`."""
    torch.manual_seed(config["seed"])
    stage, mixture = parse_stage(name, config)
    run = replace(run, name=name, seed=config["seed"])
    length, device = stage.steps * stage.batch, str(PartialState(cpu=run.cpu).device)
    if name == "tower":
        task = TowerTask(config["tower"], attention_for(device))
        for unused in (task.tower.encoder.layers[-1], task.tower.post_layernorm):
            unused.requires_grad_(False)
        matrices = [p for p in task.tower.encoder.layers[:-1].parameters() if p.ndim == 2]
        data, collator = TowerScenes("train", stage.first_seed, length, config["tower"]["crowded"]), default_collate
    else:
        tokenizer = load_tokenizer(run.folder / "checkpoint")
        task = conversation_task(name, config, len(tokenizer), run.folder, device)
        if name != "align" and not run.state_file.exists():
            before = run.folder / f"{_before(name)}.pt"
            grow(task, torch.load(before, map_location="cpu", weights_only=True)["model"])
        matrices, collator = task.matrices(), collate
        data = PackedScenes("train", stage.first_seed, length, stage.batch, mixture, tokenizer)
    trainer = Trainer(task, make_optimizers(task, matrices, stage), run, clip=stage.clip)
    batches = trainer.batches(data, range(length), stage.batch, stage.steps, collator, workers)
    return trainer.fit(batches, stage.steps, lambda step: learning_rate_factor(step, stage))


def conversation_task(stage: str, config: dict, vocabulary: int, folder: Path, device: str = "cpu") -> ConversationTask:
    """The model on the exported tower, with new weights and as many decoder layers as the stage has."""
    layers = config["stages"][stage]["layers"]
    deep = config | {"decoder": config["decoder"] | {"layers": layers}}
    model = build_llava(deep, vocabulary, folder / "checkpoint", device)
    return ConversationTask(model, _grounding(stage, config)).to(device)


def _grounding(stage: str, config: dict) -> Grounding | None:
    settings = config["stages"][stage].get("grounding")
    return Grounding(**_known(settings, Grounding)) if settings else None


def grow(task: ConversationTask, state: dict[str, torch.Tensor]) -> None:
    """Load the weights of an equal or shallower model, spread over the layers; a layer in between does nothing yet.

    Parameters
    ----------
    task : ConversationTask
    state : dict
        Of a task with at most as many decoder layers.

    Raises
    ------
    ValueError
        If the state has more layers.
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


def _load(task: nn.Module, file: Path) -> None:
    task.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["model"], strict=False)


def _before(name: str) -> str:
    return STAGES[STAGES.index(name) - 1]


def _prepare(name: str, config: dict, folder: Path) -> None:
    """Put what a stage builds on into ``checkpoint``: the tower, and the tokenizer."""
    if name == "tower":
        return
    before = folder / f"{_before(name)}.pt"
    if not before.exists():
        raise FileNotFoundError(f"stage {name} needs {before}: train stage {_before(name)} first")
    if name == "align" and not (folder / "align.pt").exists():
        task = TowerTask(config["tower"])
        _load(task, folder / "tower.pt")
        export_tower(task.tower, folder / "checkpoint")
        build_tokenizer(folder / "checkpoint", **config["tokenizer"])


def _export(config: dict, folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "checkpoint")
    last = next(name for name in reversed(STAGES) if (folder / f"{name}.pt").exists())
    task = conversation_task(last, config, len(tokenizer), folder)
    _load(task, folder / f"{last}.pt")
    export_checkpoint(task.model, folder, config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mini_training",
        description=__doc__.split("\n")[0],
        epilog="Several processes: accelerate launch --cpu --num_processes 2 -m mini_training --threads 1 ...",
    )
    add = parser.add_argument
    add("--output", default="llava-mini-run", help="folder of the run; the model lands in its folder checkpoint")
    add("--config", default=str(CONFIG), help="the recipe (YAML)")
    add("--stage", choices=(*STAGES, "export", "evaluate", "all"), default="all")
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
    """Run the recipe; 0 when everything asked for is complete, 3 when time ran out first."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output)
    try:
        config = read_config(Path(arguments.config), arguments.smoke)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    wanted = STAGES if arguments.stage == "all" else [name for name in STAGES if name == arguments.stage]
    started = [name for name in wanted if (folder / f"{name}.pt").exists()]
    if started and not arguments.resume:
        parser.error(f"{folder} holds a run of stage {started[0]}: give --resume, or another --output")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    end, place = time.monotonic() + 60 * arguments.minutes, PartialState(cpu=arguments.device == "cpu")
    for name in wanted:
        if place.is_main_process:
            _prepare(name, config, folder)
        place.wait_for_everyone()
        run = Run(
            folder,
            resume=arguments.resume,
            seconds=end - time.monotonic(),
            precision="no" if arguments.fp32 else "bf16",
            cpu=arguments.device == "cpu",
        )
        if not train(name, config, run, arguments.workers):
            return 3
    if not place.is_main_process:
        return 0
    if arguments.stage in ("export", "all"):
        _export(config, folder)
    if arguments.stage in ("evaluate", "all"):
        evaluate(folder / "checkpoint", 4 if arguments.smoke else arguments.scenes, folder / "evaluation.json")
    return 0
