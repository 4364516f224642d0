"""What a prefill costs, with and without pruning, in two named conventions.

"literature" is the count of the pruning papers, multiply-accumulates of a decoder whose feed-forward block has two
matrices; "exact" is what the model computes, two FLOPs a multiply-accumulate, vision tower included.

``python -m llava.eval.flops --model 1.5-7b --text 60 --method otprune --ratio 0.098``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from llava.arguments import positive, whole
from llava.files import check_writable, write_json
from llava.runtime import print_everything

if TYPE_CHECKING:
    from llava.pruning import PruningConfig


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama-like decoder that its cost depends on.

    Attributes
    ----------
    hidden, intermediate, layers : int
        Width, feed-forward width (d and m of the papers) and number of layers.
    query_width, key_width : int
        Heads times head width: of the queries, and of keys and values each.
    vocabulary : int
    """

    hidden: int
    intermediate: int
    layers: int
    query_width: int
    key_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """The shape in a configuration like `LlamaConfig` or `MistralConfig`.

        Raises
        ------
        ValueError
            Names a size that the configuration has not.
        """
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        head_width = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            hidden=hidden,
            intermediate=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            query_width=heads * head_width,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
            vocabulary=_size(config, "vocab_size"),
        )


@dataclass(frozen=True)
class TowerShape:
    """The sizes of a CLIP vision tower.

    Attributes
    ----------
    hidden, intermediate : int
    layers : int
        Those that run: the tower stops at the layer that LLaVA reads.
    patches : int
        Patches a crop.
    patch_values : int
        Values a patch: channels times its area.
    outputs : int
        Vectors a crop that go on to the projector.
    """

    hidden: int
    intermediate: int
    layers: int
    patches: int
    patch_values: int
    outputs: int

    @classmethod
    def of(cls, config: Any, select_layer: int = -2, select_feature: str = "patch") -> TowerShape:
        """The shape in a configuration like `CLIPVisionConfig`.

        Parameters
        ----------
        config : object
        select_layer : int
            ``mm_vision_select_layer``, an index into the hidden states.
        select_feature : str
            ``mm_vision_select_feature``: "patch", or "cls_patch".

        Raises
        ------
        ValueError
            Names a size that the configuration has not.
        """
        layers, patch = _size(config, "num_hidden_layers"), _size(config, "patch_size")
        patches = (_size(config, "image_size") // patch) ** 2
        return cls(
            hidden=_size(config, "hidden_size"),
            intermediate=_size(config, "intermediate_size"),
            layers=select_layer if select_layer >= 0 else layers + 1 + select_layer,
            patches=patches,
            patch_values=getattr(config, "num_channels", 3) * patch**2,
            outputs=patches + (select_feature == "cls_patch"),
        )


@dataclass(frozen=True)
class ModelShape:
    """A LLaVA: decoder, vision tower, and the projector between them.

    Attributes
    ----------
    decoder : DecoderShape
    tower : TowerShape
    projector_layers : int
        Linear layers of the projector; 0 for "identity".
    crops : int
        Crops an image, base view included: 1, or the most that an anyres model makes.
    """

    decoder: DecoderShape
    tower: TowerShape
    projector_layers: int
    crops: int = 1

    @classmethod
    def of(cls, config: Any, vision_config: Any) -> ModelShape:
        """The shape in a LLaVA's configuration and its vision tower's.

        Raises
        ------
        ValueError
            Names a size that a configuration has not, or an unknown projector.
        """
        tower = TowerShape.of(
            vision_config,
            getattr(config, "mm_vision_select_layer", -2),
            getattr(config, "mm_vision_select_feature", "patch"),
        )
        return cls(
            decoder=DecoderShape.of(config),
            tower=tower,
            projector_layers=_projector_layers(getattr(config, "mm_projector_type", "linear")),
            crops=_most_crops(config, vision_config.image_size),
        )

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an image with all its crops; unpadding and newline tokens change it by a few per cent."""
        return self.crops * self.tower.outputs


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the configuration must say {name}, a whole number >= 1, not {value!r}")
    return value


def _projector_layers(kind: str) -> int:
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind != f"mlp{depth}x_gelu" or not depth.isdecimal():
        raise ValueError(f"Unknown projector type: {kind}")
    return int(depth)


def _most_crops(config: Any, side: int) -> int:
    """Crops of a large square picture, base view included."""
    if getattr(config, "image_aspect_ratio", None) != "anyres":
        return 1
    from llava.mm_utils import get_anyres_image_grid_shape

    across, down = get_anyres_image_grid_shape((10_000, 10_000), config.image_grid_pinpoints, side)
    return 1 + across * down


_CLIP_L_336 = SimpleNamespace(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336, patch_size=14
)
_VICUNA_7B = DecoderShape(4096, 11008, layers=32, query_width=4096, key_width=4096, vocabulary=32000)
_VICUNA_13B = DecoderShape(5120, 13824, layers=40, query_width=5120, key_width=5120, vocabulary=32000)

SHAPES = {
    "1.5-7b": ModelShape(_VICUNA_7B, TowerShape.of(_CLIP_L_336), projector_layers=2),
    "1.5-13b": ModelShape(_VICUNA_13B, TowerShape.of(_CLIP_L_336), projector_layers=2),
    "1.6-7b": ModelShape(_VICUNA_7B, TowerShape.of(_CLIP_L_336), projector_layers=2, crops=5),
    "1.6-13b": ModelShape(_VICUNA_13B, TowerShape.of(_CLIP_L_336), projector_layers=2, crops=5),
}
"""The published LLaVAs on Vicuna."""

BENCHMARK_TOKENS = {
    "COCO": (15, 2225),
    "Flickr30k": (15, 1922),
    "GQA": (23, 2239),
    "MMB": (83, 1927),
    "MME": (25, 2108),
    "MMMU": (113, 1882),
    "NoCaps": (15, 2292),
    "OKVQA": (39, 2249),
    "POPE": (21, 2250),
    "SQA": (91, 1598),
    "SEED": (57, 2116),
}
"""What the papers average over: a benchmark's text tokens (no system prompt), and LLaVA-1.6's visual tokens.

Source: DivPrune, CVPR 2025, and OTPrune, arXiv 2602.20205.
"""

USUAL_TEXT = 60
"""Text tokens of a short question behind Vicuna's system prompt."""

UNITS = {"literature": "MACs", "exact": "FLOPs"}
"""What each convention counts; the papers call theirs FLOPs, too."""


def tokens_per_layer(text: int, visual_per_layer: Sequence[int]) -> list[int]:
    """The tokens that each decoder layer sees: ``text``, which all layers see, and that layer's visual tokens."""
    return [text + visual for visual in visual_per_layer]


def literature_flops(shape: DecoderShape, tokens: Sequence[int], *, behind: Sequence[int] | None = None) -> int:
    """The papers' count: the sum of ``4 n d^2 + 2 n^2 d + 2 n d m`` over the layers.

    Multiply-accumulates, though the papers print them as FLOPs; a feed-forward block of two matrices, though Llama's
    has three; no vision tower, no vocabulary, no selection.

    Parameters
    ----------
    shape : DecoderShape
        Read are hidden (d), intermediate (m) and layers.
    tokens : sequence of int
        n of each layer, text included.
    behind : sequence of int, optional
        The same behind the attention, ``n d^2 + 2 n d m`` of the above, where tokens leave in between.

    Raises
    ------
    ValueError
        If there is not one number a layer.

    Source: DivPrune, CVPR 2025.
    """
    behind = tokens if behind is None else behind
    _check_tokens(shape, tokens)
    _check_tokens(shape, behind)
    d, m = shape.hidden, shape.intermediate
    return sum(3 * n * d**2 + 2 * n**2 * d for n in tokens) + sum(n * d**2 + 2 * n * d * m for n in behind)


def literature_ratio(shape: DecoderShape, tokens: Sequence[int], unpruned: int) -> float:
    """`literature_flops` of ``tokens`` over that of ``unpruned`` tokens in every layer: 1 where nothing is dropped."""
    return literature_flops(shape, tokens) / literature_flops(shape, [unpruned] * shape.layers)


@dataclass(frozen=True)
class ExactFlops:
    """FLOPs of one prompt's prefill with one image, by part.

    Attributes
    ----------
    vision_tower, projector, decoder, lm_head : int
    """

    vision_tower: int
    projector: int
    decoder: int
    lm_head: int

    @property
    def total(self) -> int:
        return self.vision_tower + self.projector + self.decoder + self.lm_head

    def to_dict(self) -> dict[str, int]:
        """The parts, and their sum as "total"."""
        return asdict(self) | {"total": self.total}


def exact_flops(
    shape: ModelShape,
    tokens: Sequence[int],
    *,
    behind: Sequence[int] | None = None,
    crops: int | None = None,
    logits: int = 1,
) -> ExactFlops:
    """What a prefill computes: every matrix product and convolution, two FLOPs a multiply-accumulate.

    Attention is counted over all n^2 pairs, as `torch.utils.flop_counter` does: a kernel that skips the causal half
    does less. Norms, activations, rotations and the softmax are left out, and so is the selection.

    Parameters
    ----------
    shape : ModelShape
    tokens : sequence of int
        Tokens in each decoder layer, text included.
    behind : sequence of int, optional
        Those in its output projection and feed-forward block, where tokens leave behind the attention.
    crops : int, optional
        Crops that the vision tower sees; the shape's own if left out, 0 for a prompt without an image.
    logits : int
        Positions that get logits: 1 in generation, all of the last layer's in a plain forward pass.

    Raises
    ------
    ValueError
        If there is not one number of tokens a layer.
    """
    behind = tokens if behind is None else behind
    _check_tokens(shape.decoder, tokens)
    _check_tokens(shape.decoder, behind)
    crops = shape.crops if crops is None else crops
    return ExactFlops(
        vision_tower=crops * _tower_flops(shape.tower),
        projector=crops * _projector_flops(shape),
        decoder=sum(_layer_flops(shape.decoder, *n) for n in zip(tokens, behind, strict=True)),
        lm_head=2 * logits * shape.decoder.hidden * shape.decoder.vocabulary,
    )


def _check_tokens(shape: DecoderShape, tokens: Sequence[int]) -> None:
    if len(tokens) != shape.layers:
        raise ValueError(
            f"the decoder has {shape.layers} layers and needs a number of tokens for each, not {len(tokens)}"
        )
    if min(tokens) < 0:
        raise ValueError(f"a layer has at least 0 tokens, not {min(tokens)}")


def _layer_flops(shape: DecoderShape, n: int, behind: int) -> int:
    """Of a layer that ``n`` tokens enter and ``behind`` leave, the others behind its attention."""
    projections = n * shape.hidden * (shape.query_width + 2 * shape.key_width)
    scores_and_values = 2 * n**2 * shape.query_width
    output = behind * shape.hidden * shape.query_width
    feed_forward = 3 * behind * shape.hidden * shape.intermediate
    return 2 * (projections + scores_and_values + output + feed_forward)


def _tower_flops(tower: TowerShape) -> int:
    """One crop: the patches' embedding, then the layers over the patches and [CLS]."""
    n, d = tower.patches + 1, tower.hidden
    layer = 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * tower.intermediate
    return 2 * (tower.patches * tower.patch_values * d + tower.layers * layer)


def _projector_flops(shape: ModelShape) -> int:
    """One crop."""
    if shape.projector_layers == 0:
        return 0
    width = shape.decoder.hidden
    return 2 * shape.tower.outputs * width * (shape.tower.hidden + (shape.projector_layers - 1) * width)


def load_shape(model: str) -> ModelShape:
    """The shape of a model by its name in `SHAPES`, or of a checkpoint, of which only the configuration is read.

    Parameters
    ----------
    model : str
        A name, "llava-mini", a checkpoint folder or a hub id.

    Raises
    ------
    OSError
        If there is no such checkpoint.
    ValueError
        If its configuration is not that of a LLaVA on a Llama-like decoder.
    """
    if model in SHAPES:
        return SHAPES[model]
    from llava.model.builder import read_config, resolve_model_path

    path = resolve_model_path(model)
    config = SimpleNamespace(**read_config(path))
    tower = getattr(config, "mm_vision_tower", None)
    if not isinstance(tower, str):
        raise ValueError(f"{model} is no LLaVA: its configuration names no vision tower (mm_vision_tower)")
    try:
        return ModelShape.of(config, _vision_config(path, tower))
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None


def _vision_config(checkpoint: str, tower: str) -> Any:
    folder = next((str(place) for place in (Path(tower), Path(checkpoint, tower)) if place.is_dir()), None)
    if folder is None and tower == "openai/clip-vit-large-patch14-336":
        return _CLIP_L_336
    from transformers import CLIPVisionConfig

    try:
        return CLIPVisionConfig.from_pretrained(folder or tower)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"Cannot read the configuration of the vision tower {tower!r}: {reason}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exits with 2 and one sentence when what was asked for cannot be."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.json is not None:
            check_writable(arguments.json)
        shape = load_shape(arguments.model)
        config = _pruning(arguments)
        report, text = (_benchmarks if arguments.benchmarks else _prompt)(arguments, shape, config)
        if arguments.json is not None:
            report = {"model": arguments.model, "pruning": config and config.to_dict()} | report
            write_json(arguments.json, report)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    decoder = shape.decoder
    print(
        f"{arguments.model}: {decoder.layers} decoder layers of {decoder.hidden}, feed-forward {decoder.intermediate}"
    )
    print("unpruned" if config is None else config.describe(), text, sep="\n\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.flops",
        description="What a prefill costs, unpruned and pruned, in the literature's convention and exactly.",
        epilog="Selecting the tokens, and what a method makes the model compute for it, is not counted.",
    )
    models = f"{', '.join(SHAPES)}, llava-mini, or a checkpoint (folder or hub id; only its configuration is read)"
    parser.add_argument("--model", default="1.5-7b", help=f"{models}; default: 1.5-7b")
    prompt = parser.add_argument_group("the prompt")
    prompt.add_argument("--text", type=whole, metavar="N", help=f"text tokens, all of them (default: {USUAL_TEXT})")
    prompt.add_argument("--visual", type=positive, metavar="N", help="visual tokens (default: by model, 576 or 2880)")
    prompt.add_argument("--crops", type=positive, metavar="N", help="crops of the image (default: by model, 1 or 5)")
    averages = "instead: the papers' averages over the token counts of eleven benchmarks (literature's convention)"
    prompt.add_argument("--benchmarks", action="store_true", help=averages)
    switch = parser.add_argument_group("the switch")
    switch.add_argument("--method", help="see python -m llava.pruning (default: none)")
    switch.add_argument("--ratio", metavar="R", help="kept ratio, 0 < r <= 1 (SUBSET_RATIO)")
    switch.add_argument("--layer", metavar="L", help="where tokens are dropped (LAYER_INDEX)")
    options = "option of the method; may be repeated"
    switch.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=options)
    parser.add_argument("--convention", choices=("both", *UNITS), help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it all to a file, too")
    return parser


def _pruning(arguments: argparse.Namespace) -> PruningConfig | None:
    """The configuration that the command line asks for."""
    if arguments.method is None:
        if arguments.ratio is not None or arguments.layer is not None or arguments.option:
            raise ValueError("--ratio, --layer and --option need a --method")
        return None
    from llava.pruning import PruningConfig
    from llava.pruning.registry import resolve_name

    # All of it is text here as it is in the environment, so it is read by the same rules.
    method = resolve_name(arguments.method).upper()
    environ = {"BASELINE": method}
    if arguments.ratio is not None:
        environ["SUBSET_RATIO"] = arguments.ratio
    if arguments.layer is not None:
        environ["LAYER_INDEX"] = arguments.layer
    for option in arguments.option:
        name, equals, value = option.partition("=")
        if not (name and equals):
            raise ValueError(f"--option must read NAME=VALUE, not {option!r}")
        variable = f"{method}_{name.upper()}"
        if variable in environ:
            raise ValueError(f"--option {name} is given twice")
        environ[variable] = value
    return PruningConfig.from_env(environ)


def visual_per_layer(config: PruningConfig, visual: int, layers: int) -> tuple[list[int], list[int]]:
    """Visual tokens of an image that has ``visual`` of them: in each of so many layers, and behind its attention.

    Raises
    ------
    ValueError
        If the number depends on the image, or on what the method learns from a model.
    """
    from llava.pruning.schedule import kept_after_attention, kept_per_layer

    pruner = config.build_pruner()
    if pruner.varies:
        raise ValueError(f"how many tokens {config.method} keeps with these options depends on the image")
    if pruner.fits:
        raise ValueError(f"how many tokens {config.method} keeps in each layer is fitted to a model: give a recipe")
    pruner.check_tokens(visual)
    stages = config.stages(layers)
    entering = kept_per_layer(stages, visual, layers, pruner.budget)
    return entering, kept_after_attention(stages, visual, layers, pruner.budget) if pruner.after_attention else entering


def _prompt(
    arguments: argparse.Namespace, shape: ModelShape, config: PruningConfig | None
) -> tuple[dict[str, Any], str]:
    """What one prompt costs: for the JSON file, and for a person."""
    text = USUAL_TEXT if arguments.text is None else arguments.text
    visual = arguments.visual or shape.visual_tokens
    crops = arguments.crops or shape.crops
    layers = shape.decoder.layers
    counts = {"unpruned": ([visual] * layers,) * 2}
    if config is not None:
        counts["pruned"] = visual_per_layer(config, visual, layers)
    tokens = {name: tokens_per_layer(text, entering) for name, (entering, _) in counts.items()}
    behind = {name: tokens_per_layer(text, left) for name, (_, left) in counts.items()}
    means = {name: sum(entering) / layers for name, (entering, _) in counts.items()}

    costs = {}
    if arguments.convention != "exact":
        costs["literature"] = _costs(
            {name: {"decoder": literature_flops(shape.decoder, n, behind=behind[name])} for name, n in tokens.items()}
        )
    if arguments.convention != "literature":
        exact = {name: exact_flops(shape, n, behind=behind[name], crops=crops) for name, n in tokens.items()}
        costs["exact"] = _costs({name: flops.to_dict() for name, flops in exact.items()})

    lines = [f"tokens per layer: {text} text and {visual} visual tokens, {crops} crop{'s' * (crops > 1)}"]
    lines += [f"  {name:14}{_ranges(n)}" for name, n in tokens.items()]
    if config is not None:
        mean = means["pruned"]
        lines.append(f"  {'visual, mean':14}{mean:.6g} of {visual} ({100 * mean / visual:.2f} %)")
    for convention, cost in costs.items():
        lines += ["", *_table(convention, cost)]
    report = {"text": text, "visual": visual, "crops": crops, "tokens_per_layer": tokens, "mean_visual_tokens": means}
    return report | costs, "\n".join(lines)


def _benchmarks(
    arguments: argparse.Namespace, shape: ModelShape, config: PruningConfig | None
) -> tuple[dict[str, Any], str]:
    """The papers' averages: for the JSON file, and for a person."""
    for name in ("text", "visual", "crops"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--benchmarks has token counts of its own: leave out --{name}")
    if arguments.convention in ("both", "exact"):
        raise ValueError(f"--benchmarks is in the literature's convention, not {arguments.convention}")
    decoder = shape.decoder
    costs = {}
    for name, (text, several_crops) in BENCHMARK_TOKENS.items():
        visual = several_crops if shape.crops > 1 else shape.visual_tokens
        counts = {"unpruned": ([visual] * decoder.layers,) * 2}
        if config is not None:
            counts["pruned"] = visual_per_layer(config, visual, decoder.layers)
        flops = {}
        for kind, visual_counts in counts.items():
            tokens, behind = (tokens_per_layer(text, n) for n in visual_counts)
            flops[kind] = {name: literature_flops(decoder, tokens, behind=behind)}
        costs |= _costs(flops)
    # As in the papers the ratio's average is that of the ratios, not the ratio of the averages.
    columns = next(iter(costs.values()))
    costs["average"] = {column: sum(cost[column] for cost in costs.values()) / len(costs) for column in columns}
    return {"literature": costs}, "\n".join(_table("literature", costs))


def _costs(flops: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """ "unpruned" and perhaps "pruned", each by part -> both and their ratio, by part."""
    costs: dict[str, dict[str, float]] = {part: {"unpruned": full} for part, full in flops["unpruned"].items()}
    for part, left in flops.get("pruned", {}).items():
        full = costs[part]["unpruned"]
        costs[part] |= {"pruned": left, "ratio": left / full if full else 1.0}
    return costs


def _table(convention: str, costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines with a row a part, and columns for what each has."""
    largest = max(cost["unpruned"] for cost in costs.values())
    scale, prefix = next((unit for unit in ((1e12, "T"), (1e9, "G")) if largest >= unit[0]), (1e6, "M"))
    columns = list(next(iter(costs.values())))
    lines = [f"{f'{convention}, {prefix}{UNITS[convention]}':18}" + "".join(f"{column:>12}" for column in columns)]
    for part, cost in costs.items():
        cells = [
            f"{100 * cost[column]:10.2f} %" if column == "ratio" else f"{cost[column] / scale:12.4f}"
            for column in columns
        ]
        lines.append(f"  {part.replace('_', ' '):16}" + "".join(cells))
    return lines


def _ranges(tokens: Sequence[int]) -> str:
    """Layers with the same number of tokens together: "0-1: 636, 2-31: 116"."""
    parts, first = [], 0
    for count, run in groupby(tokens):
        last = first + len(list(run)) - 1
        parts.append(f"{first}: {count}" if first == last else f"{first}-{last}: {count}")
        first = last + 1
    return ", ".join(parts)


if __name__ == "__main__":
    print_everything()
    sys.exit(main())
