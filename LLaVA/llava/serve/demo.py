"""A web page to try pruning on your own image: ``python -m llava.serve.demo``, or ``llava demo``.

An image, a question, a method and a kept ratio in; the unpruned and the pruned answer side by side, with what each
cost, and the kept tokens on the image. Needs the extra ``[demo]`` (Gradio).
"""

from __future__ import annotations

import argparse
import html
import io
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from llava.command import Parser, find_device, positive
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import choose_conv_mode, conv_templates, image_mark
from llava.eval.encoder import Encoder
from llava.eval.page import data_uri
from llava.eval.tokens import dimmed
from llava.flops import ModelShape, exact_flops, tokens_per_layer
from llava.images import load_rgb
from llava.mm_utils import AnswerEnd, get_model_name_from_path, images_to, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.visual_cache import VisualCache
from llava.pruning import PruningConfig, available_methods, pruning

MAX_NEW_TOKENS = 128
SCENES = (
    (14, "What does the green sign say?"),
    (1, "Where is the orange shape?"),
    (6, "What color is the object above the small heart?"),
)
"""Seed of a validation scene of the embedded suite, and a question about it."""
CSS = """
.maps{display:flex;flex-wrap:wrap;gap:1rem}
.maps figure{margin:0;flex:1 1 15rem;max-width:30rem}
.maps img{width:100%}
"""


@dataclass(frozen=True)
class Answer:
    """What a model answered, and what that took.

    Attributes
    ----------
    text : str
    total : int
        Visual tokens of the image.
    kept : float
        Visual tokens present, averaged over the decoder's layers.
    indices : list of int
        Indices of the kept tokens.
    seconds : float
        From the call to the first token: vision tower, selection and prefill.
    flops : int
        Of the prefill, vision tower included; see `llava.flops.exact_flops`.
    """

    text: str
    total: int
    kept: float
    indices: list[int]
    seconds: float
    flops: int


class _FirstToken(BaseStreamer):
    """Records when tokens arrive."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None: ...


class Model:
    """A checkpoint that answers one request at a time, for all threads.

    Parameters
    ----------
    path : str
        Checkpoint folder, hub id or "llava-mini".
    device : str

    Raises
    ------
    OSError, ValueError
        If there is no such checkpoint, or it has no vision.
    """

    def __init__(self, path: str, device: str):
        dtype = torch.float32 if device == "cpu" else torch.float16
        self.name = get_model_name_from_path(path)
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(
            path, None, self.name, device=device, dtype=dtype, multimodal=True
        )
        self.shape = ModelShape.of(self.model.config, self.model.get_vision_tower().config)
        # A model prunes with one method at a time, shared by all threads.
        self._lock = threading.Lock()
        self._cache = VisualCache(2**28)

    def ask(
        self,
        image: Image.Image,
        question: str,
        config: PruningConfig | None,
        new_tokens: int = MAX_NEW_TOKENS,
        cached: bool = False,
    ) -> Answer:
        """Answer a question about an image, greedily.

        Parameters
        ----------
        image : PIL.Image
            RGB.
        question : str
        config : PruningConfig or None
        new_tokens : int
            Maximum length of the answer.
        cached : bool
            Reuse the encoded image if there is one; `Answer.seconds` is then meaningless.

        Raises
        ------
        ValueError
            For a question that is empty, too long or contains an image mark, or a method that this model cannot use.
        """
        model = self.model
        ids, end = self._prompt(question)
        pixels = images_to(process_images([image], self.processor, model.config), model.device, model.dtype)
        first = _FirstToken()
        with self._lock, torch.inference_mode():
            model.visual_cache = self._cache if cached else None
            try:
                with nullcontext() if config is None else pruning(model, config):
                    begin = time.perf_counter()
                    output = model.generate(
                        ids.to(model.device),
                        images=pixels,
                        image_sizes=[image.size],
                        do_sample=False,
                        max_new_tokens=new_tokens,
                        streamer=first,
                        use_cache=True,
                        **end.options(ids),
                    )
            finally:
                model.visual_cache = None
            prefill = model.latest_prefill
        [(total, _)], [present], [after] = (
            prefill.token_counts,
            prefill.tokens_per_layer,
            prefill.tokens_after_attention,
        )
        text = ids.shape[1] - 1
        flops = exact_flops(
            self.shape,
            tokens_per_layer(text, present),
            after=tokens_per_layer(text, after),
            crops=1 if pixels[0].ndim == 3 else len(pixels[0]),
        )
        return Answer(
            text=end.cut(self.tokenizer.decode(output[0], skip_special_tokens=True)).strip(),
            total=total,
            kept=sum(present) / len(present),
            indices=prefill.tokens_left(0).tolist(),
            # The first call of `put` holds the prompt.
            seconds=first.moments[1] - begin,
            flops=flops.total,
        )

    def _prompt(self, question: str) -> tuple[torch.Tensor, AnswerEnd]:
        """The prompt of an image and a question: ids (1, T), and how its answer ends."""
        question = question.strip()
        if not question:
            raise ValueError("the question is empty: write one")
        for mark in (DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER):
            if mark in question:
                raise ValueError(f"{mark} stands for an image, which is there already: leave it out of the question")
        config = self.model.config
        conv = conv_templates[choose_conv_mode(self.name, None, config, self.tokenizer)].copy()
        conv.append_message(conv.roles[0], f"{image_mark(config)}\n{question}")
        conv.append_message(conv.roles[1], None)
        ids = tokenizer_image_token(conv.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        room = config.max_position_embeddings - self.shape.visual_tokens - MAX_NEW_TOKENS
        if len(ids) > room:
            raise ValueError(f"the question is too long: {len(ids)} tokens with the prompt, and {room} fit")
        return ids.unsqueeze(0), AnswerEnd.of(conv, self.tokenizer)


def build_page(model: Model) -> Any:
    """The page, as `gradio.Blocks`."""
    gr = import_gradio()

    def compare(image: str | None, question: str, method: str, ratio: float) -> list[Any]:
        try:
            if image is None:
                raise ValueError("there is no image: upload one, or choose a scene")
            picture, config = load_rgb(image, "the image"), PruningConfig.from_text(method.strip(), ratio)
            unpruned, pruned = model.ask(picture, question, None), model.ask(picture, question, config)
        except (OSError, ValueError, RuntimeError) as error:
            return [_refusal(error), "", "", gr.update(visible=False), gr.skip(), gr.skip(), None]
        config = config.for_width(model.model.config.hidden_size)
        return [
            f"{config.describe()}; measured once, on {model.model.device}",
            _told("Unpruned", unpruned),
            _told(config.method, pruned, unpruned),
            gr.update(visible=True),
            _map(model, picture, pruned),
            gr.update(maximum=pruned.total, value=len(pruned.indices)),
            (picture, question, config, pruned.total),
        ]

    def step(asked: tuple[Image.Image, str, PruningConfig, int], count: int) -> tuple[Any, Any]:
        """Show the tokens kept with a budget of ``count``: of a greedy method, the first ones chosen."""
        picture, question, config, total = asked
        try:
            config = replace(config, ratio=count / total)
            return gr.skip(), _map(model, picture, model.ask(picture, question, config, 1, cached=True))
        except (OSError, ValueError, RuntimeError) as error:
            return _refusal(error), gr.skip()

    with gr.Blocks(title="Visual token pruning", analytics_enabled=False) as page:
        gr.Markdown(f"# Visual token pruning: {html.escape(model.name)}")
        with gr.Row():
            with gr.Column(min_width=280):
                image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=300)
            with gr.Column(min_width=280):
                question = gr.Textbox(label="Question", lines=2, elem_id="question")
                method = gr.Dropdown(
                    list(available_methods()),
                    value="otprune",
                    allow_custom_value=True,
                    label="Method",
                    info="options follow the name: otprune:gamma=0.05, fastv:layer=3",
                    elem_id="method",
                )
                ratio = gr.Slider(0.005, 1, 0.098, step=0.001, label="Kept ratio", elem_id="ratio")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                status = gr.Markdown(elem_id="status")
        with gr.Row():
            with gr.Column(min_width=280):
                unpruned = gr.Markdown(elem_id="unpruned")
            with gr.Column(min_width=280):
                pruned = gr.Markdown(elem_id="pruned")
            with gr.Column(min_width=280, visible=False) as chosen:
                tokens = gr.HTML(elem_id="tokens")
                count = gr.Slider(1, 576, 56, step=1, label="Kept tokens, as they are chosen", elem_id="count")
        gr.Examples(_scenes(), [image, question], label="Scenes of the embedded suite", cache_examples=False)
        asked = gr.State()
        gr.on(
            [ask.click, question.submit],
            compare,
            [image, question, method, ratio],
            [status, unpruned, pruned, chosen, tokens, count, asked],
            api_name="compare",
        )
        count.input(
            step,
            [asked, count],
            [status, tokens],
            trigger_mode="always_last",
            show_progress="hidden",
            api_name="step",
        )
    return page


def launch(page: Any, host: str, port: int, **options: Any) -> None:
    """Serve a page that loads nothing from other servers. Options are those of `gradio.Blocks.launch`."""
    gr = import_gradio()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host, server_port=port, theme=theme, css=CSS, footer_links=[], max_file_size="64mb", **options
    )


def import_gradio() -> Any:
    """Gradio, or an `ImportError` that says how to get it."""
    try:
        import gradio
    except ImportError:
        raise ImportError("the demo needs Gradio: pip install -e 'LLaVA[demo]'") from None
    return gradio


def _refusal(error: Exception) -> str:
    return f"**{html.escape(' '.join(str(error).split()))}**"


def _told(name: str, answer: Answer, unpruned: Answer | None = None) -> str:
    """An answer and its costs in Markdown, with ratios to the unpruned answer's."""

    def share(value: float, whole: float) -> str:
        return "" if unpruned is None else f" ({100 * value / whole:.1f} %)"

    reference = unpruned or answer
    text = html.escape(answer.text) or "(nothing)"
    return (
        f"### {name}\n\n> {text}\n\n"
        f"* visual tokens: {answer.kept:.4g} of {answer.total}{share(answer.kept, answer.total)}\n"
        f"* time to first token: {1e3 * answer.seconds:.0f} ms{share(answer.seconds, reference.seconds)}\n"
        f"* prefill FLOPs: {answer.flops / 1e9:.4g} G{share(answer.flops, reference.flops)}\n"
    )


def _map(model: Model, image: Image.Image, answer: Answer) -> str:
    """The image's views with the dropped tokens faded."""
    figures = []
    for view in Encoder(model.model, model.processor).views([image])[0]:
        buffer = io.BytesIO()
        Image.fromarray(dimmed(view, answer.indices)).save(buffer, "PNG")
        address = data_uri(buffer.getvalue(), "image/png")
        caption = f"{view.name}: {len(answer.indices)} of {answer.total} visual tokens kept"
        figures.append(f'<figure><img alt="{caption}" src="{address}"><figcaption>{caption}</figcaption></figure>')
    return f'<div class="maps">{"".join(figures)}</div>'


def _scenes() -> list[list[str]]:
    """Images of the embedded suite as files, each with a question."""
    from llava.mini.scenes import render, sample_scene

    folder = Path(tempfile.mkdtemp(prefix="llava-demo-"))
    scenes = []
    for seed, question in SCENES:
        path = folder / f"scene_{seed}.png"
        render(sample_scene(seed, "validation")).save(path)
        scenes.append([str(path), question])
    return scenes


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: serve the page until Ctrl-C."""
    parser = Parser("llava.serve.demo", __doc__)
    parser.add_model()
    parser.add_device()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=positive, default=7860, help="default: 7860")
    parser.add_argument("--share", action="store_true", help="also open a public address through Gradio's servers")
    return parser.run(_serve, argv)


def _serve(arguments: argparse.Namespace) -> None:
    import_gradio()
    model = Model(arguments.model, find_device(arguments.device))
    # The first call of a process takes longer, which must not count as the time of an unpruned prefill.
    model.ask(Image.new("RGB", (64, 64)), "What is this?", None, 1)
    launch(build_page(model), arguments.host, arguments.port, share=arguments.share)


if __name__ == "__main__":
    raise SystemExit(main())
