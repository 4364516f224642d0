"""Names of the original LLaVA that its users import and that nothing in this package calls: logs, moderation, pages.

They are found under the original's names: `llava.utils`, `llava.model.utils` and the methods of
`llava.conversation.Conversation`.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from io import BytesIO
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, LOGDIR
from llava.files import write_json
from llava.images import REDUCING_GAP, pad_to_square

server_error_msg = "**The server could not answer. Please regenerate the answer or reload this page.**"
moderation_msg = "This input was refused by the content moderation. Please write a different one."

MODERATION_URL = "https://api.openai.com/v1/moderations"
PAD_COLOUR = (122, 116, 104)
"""The mean colour of the images that CLIP was trained on."""


class StreamToLogger:
    """A writable text stream whose lines go to a logger."""

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO) -> None:
        self.logger = logger
        self.log_level = log_level
        self._unfinished = ""

    def write(self, text: str) -> int:
        """Log every complete line; keep the rest until its end comes."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Log what is left of an unfinished line."""
        if self._unfinished:
            self.logger.log(self.log_level, self._unfinished.rstrip())
        self._unfinished = ""


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """A logger that writes to stderr and to the named file in ``LOGDIR``, a new one every day (UTC).

    ``sys.stdout`` and ``sys.stderr`` stay what they are; a program that wants them in its log assigns a
    :class:`StreamToLogger`. Calling this again with the same name returns the same logger.
    """
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    if logger.handlers:
        return logger
    os.makedirs(LOGDIR, exist_ok=True)
    form = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    file = os.path.join(LOGDIR, logger_filename)
    for handler in (logging.StreamHandler(), TimedRotatingFileHandler(file, when="D", utc=True, encoding="utf-8")):
        handler.setFormatter(form)
        logger.addHandler(handler)
    return logger


def violates_moderation(text: str) -> bool:
    """Ask OpenAI's moderation service whether a text is to be refused.

    Raises
    ------
    RuntimeError
        If the environment variable ``OPENAI_API_KEY`` is not set.
    OSError
        If the service cannot be reached or refuses the request: a text that was not checked is not passed as clean.
    """
    # Only needed here: importing the package must not need the web.
    import requests

    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise RuntimeError("moderation needs the environment variable OPENAI_API_KEY, which is not set")
    answer = requests.post(
        MODERATION_URL, headers={"Authorization": f"Bearer {key}"}, json={"input": text}, timeout=(5, 10)
    )
    answer.raise_for_status()
    return bool(answer.json()["results"][0]["flagged"])


def pretty_print_semaphore(semaphore: asyncio.Semaphore | None) -> str:
    """A semaphore's free places and state, for a log line."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def auto_upgrade(config: str) -> None:
    """Let ``AutoModel`` find LLaVA in a first-generation checkpoint: rewrite its config.json, after asking.

    `llava.model.builder.load_pretrained_model` reads such a checkpoint as it is; scripts that use ``AutoModel`` do not.

    Parameters
    ----------
    config : str
        The checkpoint's folder. Nothing happens unless its configuration names a vision tower, but not LLaVA.

    Raises
    ------
    OSError
        If there is no such checkpoint.
    ValueError
        If it is no Llama.
    SystemExit
        If the answer is no.
    """
    from llava.model.builder import read_config
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    content = read_config(config)
    model_type = content.get("model_type", "")
    if "mm_vision_tower" not in content or "llava" in model_type:
        return
    if model_type != "llama":
        raise ValueError(
            f"{config} holds model_type {model_type!r}; only a first-generation LLaVA on llama is upgraded"
        )
    print(f"{config} is a checkpoint of the first generation: its config.json has to name LLaVA.")
    if input("Rewrite it now? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SystemExit(1)
    content |= {"model_type": LlavaConfig.model_type, "architectures": [LlavaLlamaForCausalLM.__name__]}
    write_json(Path(config) / "config.json", content)


class GradioConversation:
    """What the original's web page asks of a conversation."""

    messages: list | tuple
    offset: int

    def process_image(
        self,
        image: Image.Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> Image.Image | str:
        """Bring an image into the form in which a serving front end sends it.

        Parameters
        ----------
        image : PIL.Image.Image
        image_process_mode : str
            "Pad": to a square, filled with CLIP's mean colour; "Resize": to 336 x 336; "Default" and "Crop": as it is.
        return_pil : bool
            Return the image instead of its base64 text.
        image_format : str
            Pillow's name of the format that is encoded.
        max_len, min_len : int
            If the longer side has more than ``max_len`` pixels, the image is shrunk until the longer side has at most
            ``max_len`` and the shorter one at most ``min_len``.

        Raises
        ------
        ValueError
            If the mode is none of the four.
        """
        if image_process_mode == "Pad":
            if image.width != image.height:
                side = min(max_len, min_len) if max(image.size) > max_len else max(image.size)
                image = pad_to_square(image.convert("RGB"), PAD_COLOUR, side)
        elif image_process_mode == "Resize":
            image = image.resize((336, 336), reducing_gap=REDUCING_GAP)
        elif image_process_mode not in ("Default", "Crop"):
            raise ValueError(
                f"Invalid image_process_mode: {image_process_mode!r}; allowed: 'Pad', 'Resize', 'Default', 'Crop'"
            )
        shorter, longer = sorted(image.size)
        if longer > max_len:
            aspect = longer / shorter
            shortest = max(1, int(min(max_len / aspect, min_len, shorter)))
            longest = min(max_len, int(shortest * aspect))
            size = (shortest, longest) if image.height > image.width else (longest, shortest)
            image = image.resize(size, reducing_gap=REDUCING_GAP)
        if return_pil:
            return image
        buffer = BytesIO()
        image.save(buffer, format=image_format)
        return base64.b64encode(buffer.getvalue()).decode()

    def get_images(self, return_pil: bool = False) -> list[Image.Image | str]:
        """The images of the user's turns, each after :meth:`process_image` in its own mode."""
        return [
            self.process_image(message[1], message[2], return_pil=return_pil)
            for _, message in self.messages[self.offset :: 2]
            if isinstance(message, tuple)
        ]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """The dialogue as ``[user, assistant]`` pairs, images as inline ``<img>`` tags in front of the text."""
        pairs: list[list[str | None]] = []
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2 == 1:
                pairs[-1][1] = message
            elif isinstance(message, tuple):
                text, image, _ = message
                encoded = self.process_image(image.convert("RGB"), "Default", image_format="JPEG")
                tag = f'<img src="data:image/jpeg;base64,{encoded}" alt="user upload image" />'
                pairs.append([tag + text.replace(DEFAULT_IMAGE_TOKEN, "").strip(), None])
            else:
                pairs.append([message, None])
        return pairs
