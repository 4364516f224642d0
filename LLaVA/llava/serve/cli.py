"""Talk with a checkpoint about one image, answers appearing as they are written.

``python -m llava.serve.cli --help`` lists the options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers import TextStreamer

from llava.command import Parser, not_negative, positive
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, check_conv_mode, choose_conv_mode, conv_templates, image_mark
from llava.mm_utils import (
    AnswerEnd,
    get_model_name_from_path,
    images_to,
    load_image,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import EMBEDDED_MODEL, load_pretrained_model
from llava.utils import disable_torch_init


def main(args: argparse.Namespace) -> None:
    """Load a checkpoint and an image, then answer questions until an empty line or the end of the input.

    Parameters
    ----------
    args : argparse.Namespace
        As :func:`parse_args` returns it.

    Raises
    ------
    OSError
        If the image or the checkpoint cannot be read.
    ValueError
        If the image is damaged, ``conv_mode`` is unknown, or the checkpoint has no vision.
    """
    disable_torch_init()
    model_name = get_model_name_from_path(args.model_path)
    check_conv_mode(args.conv_mode)
    image = load_image(args.image_file)

    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, args.model_base, model_name, args.load_8bit, args.load_4bit, device=args.device
    )
    if image_processor is None:
        raise ValueError(
            f"{args.model_path} is a language model without vision: give a LLaVA, such as {EMBEDDED_MODEL}"
        )
    pixels = process_images([image], image_processor, model.config)
    pixels = images_to(pixels, model.device, getattr(model, "dtype", torch.float16))

    args.conv_mode = choose_conv_mode(model_name, args.conv_mode, model.config, tokenizer)
    conv = conv_templates[args.conv_mode].copy()
    names = ("user", "assistant") if conv.sep_style is SeparatorStyle.MPT else conv.roles
    end = AnswerEnd.of(conv, tokenizer)
    streamer = _Streamer(tokenizer, end)
    # The image has its mark in the first question only, and is passed at every turn.
    mark: str | None = image_mark(model.config)
    while question := _ask(f"{names[0]}: "):
        if DEFAULT_IMAGE_TOKEN in question:
            print(f"{DEFAULT_IMAGE_TOKEN} stands for the image, which is shown already: please ask without it")
            continue
        conv.append_message(conv.roles[0], f"{mark}\n{question}" if mark else question)
        conv.append_message(conv.roles[1], None)
        mark = None
        prompt = conv.get_prompt()
        input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

        print(f"{names[1]}: ", end="", flush=True)
        with torch.inference_mode():
            output_ids = model.generate(
                input_ids.unsqueeze(0).to(model.device),
                images=pixels,
                image_sizes=[image.size],
                do_sample=args.temperature > 0,
                temperature=args.temperature,
                max_new_tokens=args.max_new_tokens,
                streamer=streamer,
                use_cache=True,
                **end.options(input_ids.unsqueeze(0)),
            )
        # Without special tokens: the template itself ends the turn, and one </s> too many confuses the next answer.
        answer = end.cut(tokenizer.decode(output_ids[0], skip_special_tokens=True)).strip()
        # Even if the model wrote it, it would stand for an image in the next prompt.
        answer = answer.replace(DEFAULT_IMAGE_TOKEN, "")
        conv.messages[-1][-1] = answer
        if args.debug:
            print("\n", {"prompt": prompt, "outputs": answer}, "\n")
    print("exit...")


class _Streamer(TextStreamer):
    """Prints an answer as it is written, without the text that ends it."""

    def __init__(self, tokenizer, end: AnswerEnd):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._end_text = end.text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        # Text comes up to its last space, so an end without spaces comes whole.
        super().on_finalized_text(text.partition(self._end_text)[0] if self._end_text else text, stream_end)


def _ask(prompt: str) -> str:
    if sys.stdin is None:  # closed
        return ""
    try:
        question = input(prompt)
        question.encode()
        return question
    except EOFError:
        return ""
    except UnicodeError:
        print("that was not UTF-8: please type it again")
        return _ask(prompt)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return _parser().parse_args(argv)


def _parser() -> Parser:
    about = "Talk with a LLaVA checkpoint about one image. An empty line ends the conversation."
    parser = Parser("llava.serve.cli", about)
    parser.add_model(dest="model_path", base=True)
    parser.add_image("image_file")
    parser.add_device("cuda", "cuda is the CPU where there is no GPU; ")
    parser.add_argument("--conv-mode", help="prompt template (default: the checkpoint's)")
    parser.add_argument("--temperature", type=not_negative, default=0.2, help="0 for greedy decoding (default: 0.2)")
    at_most = "length of an answer at most, in tokens (default: 512)"
    parser.add_argument("--max-new-tokens", type=positive, default=512, help=at_most)
    parser.add_argument("--load-8bit", action="store_true", help="quantise the language model to 8 bits")
    parser.add_argument("--load-4bit", action="store_true", help="quantise the language model to 4 bits")
    parser.add_argument("--debug", action="store_true", help="print every prompt and answer")
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return _parser().run(main, argv)


if __name__ == "__main__":
    raise SystemExit(run())
