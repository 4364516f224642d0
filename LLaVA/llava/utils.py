"""Small helpers under the names that LLaVA's evaluation and serving scripts import."""

from __future__ import annotations

import asyncio
import logging
import os
from logging.handlers import TimedRotatingFileHandler

from llava.constants import LOGDIR

server_error_msg = "**The server could not answer. Please regenerate the answer or reload this page.**"
moderation_msg = "This input was refused by the content moderation. Please write a different one."

MODERATION_URL = "https://api.openai.com/v1/moderations"


def disable_torch_init() -> None:
    """Do nothing; kept because evaluation scripts call it first.

    It used to make the creation of a model faster by switching off the initialisation of layers for the rest of the
    process. Models are now created on the meta device, which needs no such thing, and a layer made later must not be
    left with the numbers that happened to be in memory.
    """


class StreamToLogger:
    """A writable text stream whose lines go to a logger.

    Parameters
    ----------
    logger : logging.Logger
    log_level : int
    """

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
    """A logger that writes to stderr and to a file in ``LOGDIR``, a new one every day (UTC).

    ``sys.stdout`` and ``sys.stderr`` stay what they are; a program that wants them in its log assigns a
    :class:`StreamToLogger`. Calling this again with the same name returns the same logger.

    Parameters
    ----------
    logger_name : str
    logger_filename : str
        Name of the file inside ``LOGDIR``, which is created.
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

    Parameters
    ----------
    text : str

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
