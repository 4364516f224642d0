"""Ask a checkpoint one question about one or more images: ``python -m llava.eval.run_llava --help``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from llava import hf
from llava.command import RATIO, Parser, not_negative, positive, ratio, text
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import check_conv_mode, choose_conv_mode, conv_templates, image_mark
from llava.mm_utils import (
    AnswerEnd,
    get_model_name_from_path,
    images_to,
    load_image,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import EMBEDDED_MODEL, load_pretrained_model
from llava.pruning import PruningConfig, pruning
from llava.utils import disable_torch_init

__all__ = ["eval_model", "image_parser", "load_image", "load_images", "main"]

logger = logging.getLogger(__name__)


def image_parser(args: Any) -> list[str]:
    """The files or addresses in ``args.image_file``, which ``args.sep`` separates."""
    return args.image_file.split(args.sep)


def load_images(image_files: Sequence[str]) -> list[Image.Image]:
    """Read several images with :func:`llava.mm_utils.load_image`."""
    return [load_image(image_file) for image_file in image_files]


def eval_model(args: Any) -> str:
    """Load a checkpoint, ask it one question, print the answer.

    Parameters
    ----------
    args : object
        With the attributes ``model_path``, ``model_base``, ``image_file`` (paths or http(s) addresses), ``query``,
        ``conv_mode`` (None: the checkpoint's; the choice is stored there), ``sep``, ``temperature`` (0: greedy),
        ``top_p``, ``num_beams``, ``max_new_tokens``; optionally ``device``, ``method`` and ``ratio``.
        Every ``<image-placeholder>`` in the query stands for one image; without any, the first image goes in front of
        the query.

    Returns
    -------
    str
        The answer, as printed.

    Raises
    ------
    OSError
        If an image or the checkpoint cannot be read.
    ValueError
        If an image is damaged, ``conv_mode`` is unknown, the checkpoint has no vision, or the method cannot work in it.
    IndexError
        If the query has more places for images than there are images.
    """
    disable_torch_init()
    check_conv_mode(args.conv_mode)
    images = load_images(image_parser(args))
    if _places(args.query) < len(images):
        logger.warning(
            "%d images, but the query has a place for %d only: the others are ignored; write %s once for each image",
            len(images),
            _places(args.query),
            IMAGE_PLACEHOLDER,
        )

    asked = getattr(args, "method", None)
    method = PruningConfig.from_text(asked, getattr(args, "ratio", RATIO)) if asked else None
    ask = _ask_transformers if hf.holds(args.model_path) else _ask_llava
    answer = ask(args, images, method)
    print(answer)
    return answer


def _ask_llava(args: Any, images: list[Image.Image], method: PruningConfig | None) -> str:
    model_name, device = get_model_name_from_path(args.model_path), getattr(args, "device", None)
    options = {"device": device} if device else {}
    loaded = load_pretrained_model(args.model_path, args.model_base, model_name, **options)
    tokenizer, model, image_processor, _ = loaded
    if image_processor is None:
        raise ValueError(
            f"{args.model_path} is a language model without vision: give a LLaVA, such as {EMBEDDED_MODEL}"
        )

    args.conv_mode = choose_conv_mode(model_name, args.conv_mode, model.config, tokenizer)
    conv = conv_templates[args.conv_mode].copy()
    conv.append_message(conv.roles[0], _with_image_marks(args.query, image_mark(model.config)))
    conv.append_message(conv.roles[1], None)
    input_ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    pixels = process_images(images, image_processor, model.config)

    output_ids = _generate(
        model,
        method,
        input_ids.unsqueeze(0).to(model.device),
        images=images_to(pixels, model.device, getattr(model, "dtype", torch.float16)),
        image_sizes=[image.size for image in images],
        do_sample=args.temperature > 0,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        use_cache=True,
    )
    # Not stopped there, only cut: what `generate` is called with is the original's.
    return AnswerEnd.of(conv, tokenizer).cut(tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0]).strip()


def _ask_transformers(args: Any, images: list[Image.Image], method: PruningConfig | None) -> str:
    for option in ("model_base", "conv_mode"):
        if getattr(args, option, None):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for LLaVA's own checkpoints, and {args.model_path} is one of transformers")
    _refuse_places_without_images(args)  # the text after such a place would be lost
    method = method or PruningConfig.from_env()
    device = getattr(args, "device", None) or "cuda"
    model, processor = hf.load(args.model_path, device if torch.cuda.is_available() or device != "cuda" else "cpu")
    inputs = hf.prompt(processor, _content(args.query, images)).to(model.device, model.dtype)
    sampling = {"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {}
    settings = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    output_ids = _generate(model, method, **inputs, do_sample=args.temperature > 0, **sampling, **settings)
    answer = output_ids[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answer, skip_special_tokens=True)[0].strip()


def _generate(model: Any, method: PruningConfig | None, *ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What a model writes, and on standard error what a method kept."""
    with torch.inference_mode():
        if method is None:
            return model.generate(*ids, **arguments)
        with pruning(model, method) as report:
            output_ids = model.generate(*ids, **arguments)
            counts = ", ".join(f"{kept} of {total}" for total, kept in report.visual_token_counts)
    print(f"{method.method}: {counts} visual tokens kept", file=sys.stderr)
    return output_ids


def _content(query: str, images: list[Image.Image]) -> list[str | Image.Image]:
    """The parts of a question, an image in each of its places."""
    if IMAGE_PLACEHOLDER not in query:
        query = IMAGE_PLACEHOLDER + query
    texts = query.replace(DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER).split(IMAGE_PLACEHOLDER)
    every = [texts[0], *(part for image, text in zip(images, texts[1:], strict=False) for part in (image, text))]
    return [part for part in every if part != ""]


def _places(query: str) -> int:
    """How many images a query will have marks for."""
    return (query.count(IMAGE_PLACEHOLDER) or 1) + query.count(DEFAULT_IMAGE_TOKEN)


def _refuse_places_without_images(args: argparse.Namespace) -> None:
    places, images = _places(args.query), len(image_parser(args))
    if places > images:
        raise IndexError(
            f"the query has places for {places} images, but {images} given; without {IMAGE_PLACEHOLDER}, which says "
            "where an image goes, the first one is put in front"
        )


def _with_image_marks(query: str, mark: str) -> str:
    if IMAGE_PLACEHOLDER in query:
        return query.replace(IMAGE_PLACEHOLDER, mark)
    return f"{mark}\n{query}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        "llava.eval.run_llava", "Ask a checkpoint, LLaVA's or transformers', one question about one or more images."
    )
    parser.add_model(dest="model_path", base=True)
    parser.add_image("image_file", about="local files or http(s) addresses, separated by --sep")
    where = f"{IMAGE_PLACEHOLDER} says where an image goes"
    parser.add_argument("--query", required=True, type=text, help=f"the question; {where}")
    parser.add_method(None)
    parser.add_ratio()
    parser.add_argument("--conv-mode", help="prompt template (default: the checkpoint's)")
    parser.add_argument("--sep", default=",", help="what separates the images (default: a comma)")
    parser.add_argument("--temperature", type=not_negative, default=0.2, help="0 for greedy decoding (default: 0.2)")
    parser.add_argument("--top-p", type=ratio, help="sample from the smallest set of tokens with this probability")
    parser.add_argument("--num-beams", type=positive, default=1, help="beams of the beam search (default: 1)")
    at_most = "length of the answer at most, in tokens (default: 512)"
    parser.add_argument("--max-new-tokens", type=positive, default=512, help=at_most)
    parser.add_device("cuda", "cuda is the CPU where there is no GPU; ")
    return parser.run(_ask, argv)


def _ask(args: argparse.Namespace) -> None:
    _refuse_places_without_images(args)  # before any weight is loaded
    eval_model(args)


if __name__ == "__main__":
    raise SystemExit(main())
