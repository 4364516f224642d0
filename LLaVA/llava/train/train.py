"""Train a LLaVA on conversations: ``python -m llava.train.train --stage pretrain|finetune ...``.

``pretrain`` trains the projector alone (on captions, template ``plain``) and writes ``mm_projector.bin`` and
``config.json``. ``finetune`` trains projector and language model, or with ``--lora-rank`` adapters on it, and writes
a full checkpoint folder, or ``adapter_model.safetensors`` and ``non_lora_trainables.bin``. `load_pretrained_model`
reads all three. The vision tower stays frozen. The data are checked before the model is read. With ``BASELINE`` set the
model is trained on the tokens that pruning keeps; the choice itself has no gradient. Start it with
``accelerate launch -m llava.train.train ...`` on several GPUs.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from llava.command import Parser, above_zero, not_negative, positive, share, whole, whole_number
from llava.conversation import image_mark
from llava.files import atomic_write
from llava.model.builder import announce_pruning, load_pretrained_model
from llava.model.checkpoint import read_config, read_tensors, resolve_model_path
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.tokenizer import FILES as TOKENIZER_FILES
from llava.model.tokenizer import load_tokenizer
from llava.train.data import TEMPLATES, Collator, ConversationDataset, entry_name, read_entries
from llava.train.loop import NonFiniteLoss, Run, Trainer

__all__ = ["learning_rate_factor", "load_trainable", "main"]

STATE = "training_state"
SETTINGS = (
    "stage",
    "model",
    "data",
    "template",
    "epochs",
    "batch_size",
    "accumulate",
    "learning_rate",
    "warmup",
    "weight_decay",
    "clip",
    "lora_rank",
    "lora_alpha",
    "max_length",
    "seed",
)
"""Arguments that a run is resumed with."""
# The layers of a decoder that get adapters; the tower's projections only share some of these names.
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate for step `step` (from 0): a linear rise, then half a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def load_trainable(arguments: argparse.Namespace):
    """The model in float32 with what the stage trains left trainable, its tokenizer and image processor.

    A ValueError if the model has no vision tower and none is given, or for a wrong switch of token pruning.
    """
    if "mm_vision_tower" in _raw_config(arguments.model):
        tokenizer, model, processor, _ = load_pretrained_model(
            arguments.model, None, "llava", device_map=None, torch_dtype=torch.float32
        )
    else:
        if not arguments.vision_tower:
            raise ValueError(f"{arguments.model} has no vision tower: name one with --vision-tower")
        config = LlavaConfig.from_pretrained(arguments.model)
        model = LlavaLlamaForCausalLM.from_pretrained(arguments.model, config=config, dtype=torch.float32)
        tokenizer = load_tokenizer(arguments.model)
        model.get_model().initialize_vision_modules(_vision_settings(arguments))
        model.set_pruning(model.pruning)  # now there is a tower to check the method against
        announce_pruning(model)
        config.mm_use_im_start_end = config.mm_use_im_patch_token = False
        config.image_aspect_ratio = "pad"
        processor = model.get_vision_tower().image_processor
    if arguments.projector:
        weights = read_tensors(Path(arguments.projector))
        prefix = "mm_projector."
        own = {name.split(prefix)[1]: value.float() for name, value in weights.items() if prefix in name}
        model.get_model().mm_projector.load_state_dict(own)
    model.requires_grad_(False)
    if arguments.stage == "finetune" and arguments.lora_rank:
        model = _with_adapters(model, arguments)
    elif arguments.stage == "finetune":
        model.requires_grad_(True)
        model.get_vision_tower().requires_grad_(False)
    _inner(model).mm_projector.requires_grad_(True)
    return model, tokenizer, processor


def _raw_config(model: str) -> dict[str, Any]:
    if not Path(model).is_dir():
        raise ValueError(f"--model {model}: there is no such checkpoint folder")
    return read_config(model)


def _vision_settings(arguments: argparse.Namespace) -> SimpleNamespace:
    return SimpleNamespace(
        vision_tower=arguments.vision_tower,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        mm_projector_type=arguments.projector_type,
        pretrain_mm_mlp_adapter=None,
    )


def _with_adapters(model: Any, arguments: argparse.Namespace) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--lora-rank needs the package peft: pip install peft") from error
    settings = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_rank,
        target_modules=LORA_TARGETS,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def _inner(model: Any) -> Any:
    """The decoder stack with its vision modules, with or without adapters around it."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_model()


def _order(entries: int, epochs: float, seed: int) -> list[int]:
    """Which entry is read when: every epoch a new permutation."""
    order: list[int] = []
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(seed + epoch)
        order += torch.randperm(entries, generator=generator).tolist()
    return order[: round(epochs * entries)]


def save_result(model: Any, arguments: argparse.Namespace) -> None:
    """Write what was trained to ``arguments.output``, in the layout of the stage."""
    folder, source = Path(arguments.output), Path(arguments.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    projector = {
        f"model.mm_projector.{k}": v.detach().cpu() for k, v in _inner(model).mm_projector.state_dict().items()
    }
    config = base.config
    config.architectures = [type(base).__name__]
    if arguments.stage == "finetune":
        config.conv_template = TEMPLATES[arguments.template]
    if arguments.stage == "pretrain":
        atomic_write(folder / "mm_projector.bin", lambda part: torch.save(projector, part))
    elif arguments.lora_rank:
        model.save_pretrained(folder)
        beside = {f"base_model.model.{k}": v for k, v in projector.items()}
        atomic_write(folder / "non_lora_trainables.bin", lambda part: torch.save(beside, part))
    else:
        weights = {k: v.detach().cpu().contiguous() for k, v in base.state_dict().items()}
        if base.get_vision_tower().in_own_folder:
            weights = {k: v for k, v in weights.items() if ".vision_tower." not in k}
        pt = {"format": "pt"}
        atomic_write(folder / "model.safetensors", lambda part: save_file(weights, part, metadata=pt))
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
    config.save_pretrained(folder)
    tower = source / config.mm_vision_tower
    if tower.is_dir() and not Path(config.mm_vision_tower).is_absolute() and folder.resolve() != source.resolve():
        shutil.copytree(tower, folder / config.mm_vision_tower, dirs_exist_ok=True)


def _parser() -> Parser:
    parser = Parser("llava.train.train", __doc__)
    add = parser.add_argument
    add("--stage", choices=("pretrain", "finetune"), required=True)
    about = "checkpoint folder: a LLaVA, or a plain Llama with --vision-tower"
    add("--model", "--model-path", dest="model", required=True, help=about)
    add("--data", required=True, help="JSON file of conversations")
    add("--images", default=".", help="folder of the images")
    add("--output", required=True)
    add("--vision-tower", help="CLIP folder or hub id, for a model that has none")
    add("--projector-type", default="mlp2x_gelu")
    add("--projector", help="mm_projector.bin of a pretrain stage, to start from")
    add("--template", choices=tuple(TEMPLATES), help="default: plain for pretrain, v1 for finetune")
    add("--epochs", type=above_zero, default=1.0)
    add("--batch-size", type=positive, default=16, help="conversations a process and forward pass")
    add("--accumulate", type=positive, default=1, help="forward passes a step")
    add("--learning-rate", type=above_zero, help="default: 1e-3 for pretrain, 2e-5 for finetune, 2e-4 with adapters")
    add("--warmup", type=share, default=0.03, help="fraction of the steps")
    add("--weight-decay", type=not_negative, default=0.0)
    add("--clip", type=above_zero, default=1.0, help="largest norm of a step's gradient")
    add("--lora-rank", type=whole, default=0, help="train adapters of this rank instead of all weights")
    add("--lora-alpha", type=above_zero, help="default: twice the rank")
    add("--max-length", type=positive, default=2048, help="tokens of text a conversation")
    add("--bf16", action="store_true", help="bfloat16 arithmetic; weights stay float32")
    add("--gradient-checkpointing", action="store_true")
    add("--save-steps", type=positive, default=500, help="how often the state for --resume is written")
    add("--stop-after", type=positive, help="leave after this many steps; --resume continues")
    add("--resume", action="store_true", help="continue from the state in --output, if there is one")
    add("--workers", type=whole, default=2, help="processes that read images")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0)
    return parser


def _fill_defaults(arguments: argparse.Namespace) -> None:
    pretrain = arguments.stage == "pretrain"
    if arguments.template is None:
        arguments.template = "plain" if pretrain else "v1"
    if arguments.learning_rate is None:
        arguments.learning_rate = 1e-3 if pretrain else 2e-4 if arguments.lora_rank else 2e-5


def main(argv: list[str] | None = None) -> int:
    """The command line; 3 when ``--stop-after`` came first."""
    return _parser().run(train, argv)


def train(arguments: argparse.Namespace) -> int:
    """Train; returns 0, or 3 when ``--stop-after`` came first."""
    _fill_defaults(arguments)
    if arguments.lora_rank and arguments.stage == "pretrain":
        raise ValueError("--lora-rank is for finetune: pretrain trains the projector alone")
    if arguments.lora_alpha and not arguments.lora_rank:
        raise ValueError("--lora-alpha goes with --lora-rank")
    arguments.model = resolve_model_path(arguments.model)
    run = Run(
        Path(arguments.output),
        name=STATE,
        seed=arguments.seed,
        resume=arguments.resume,
        last_step=arguments.stop_after,
        save_seconds=math.inf,
        save_steps=arguments.save_steps,
        log_steps=1,
        precision="bf16" if arguments.bf16 else "no",
    )
    torch.manual_seed(arguments.seed)
    # Before the model is read, which may take minutes.
    mark = image_mark(SimpleNamespace(**_raw_config(arguments.model)))
    checks = (arguments.template, arguments.images, load_tokenizer(arguments.model), arguments.max_length, mark)
    entries = read_entries(arguments.data, *checks)
    model, tokenizer, processor = load_trainable(arguments)
    if arguments.gradient_checkpointing:
        # Older transformers know the second name alone, version 6 the first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer = Trainer(
        model,
        [torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)],
        run,
        clip=arguments.clip,
        accumulate=arguments.accumulate,
        losses=lambda output: {"loss": output.loss},
        settings={name: getattr(arguments, name) for name in SETTINGS},
    )
    dataset = ConversationDataset(
        entries,
        arguments.images,
        tokenizer,
        processor,
        model.config,
        arguments.template,
        arguments.max_length,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = _order(len(entries), arguments.epochs, arguments.seed)
    if not order:
        raise ValueError(f"--epochs {arguments.epochs:g} of {len(entries)} conversations is none of them")
    processes = trainer.accelerator.num_processes
    per_step = arguments.batch_size * arguments.accumulate * processes
    steps = math.ceil(len(order) / per_step)
    collate = Collator(pad, _inner(model).get_vision_tower().config.image_size)
    batches = trainer.batches(dataset, order, per_step, steps, collate, arguments.workers)
    try:
        done = trainer.fit(batches, steps, lambda step: learning_rate_factor(step, steps, arguments.warmup))
    except NonFiniteLoss as error:
        if error.part is None:
            raise
        place = error.part * processes + trainer.accelerator.process_index
        first = error.step * per_step + place * arguments.batch_size
        names = [entry_name(entries, entry) for entry in order[first : first + arguments.batch_size]]
        raise FloatingPointError(f"{error}, on {', '.join(names)}") from error
    except ValueError as error:
        # That of a process that reads images comes with its traceback in front.
        raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from error
    if done and trainer.accelerator.is_main_process:
        save_result(trainer.accelerator.unwrap_model(trainer.task), arguments)
        run.state_file.unlink(missing_ok=True)
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
