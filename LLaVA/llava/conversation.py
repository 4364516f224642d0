"""Conversations and the prompt templates of the published LLaVA checkpoints.

A checkpoint answers well only under the template it was trained with, so the texts and separators here are
reproduced to the character.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.legacy import GradioConversation


class SeparatorStyle(Enum):
    """How the turns of a conversation are joined into one prompt."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclass
class Conversation(GradioConversation):
    """A system text, the turns so far, and the way they are written as one prompt.

    Parameters
    ----------
    system : str
        Text in front of the first turn.
    roles : tuple of str
        Names of the user and of the assistant, in this order.
    messages : sequence of (role, message)
        A message is a text, ``None`` or ``""`` for a turn that the model is to write, or a tuple
        ``(text, PIL image, mode)`` with a mode of `process_image`. In the templates this is a tuple; :meth:`copy` gives
        a conversation that turns can be added to.
    offset : int
        Number of leading messages that are examples of the template, not part of the dialogue.
    sep_style : SeparatorStyle
        How turns are joined.
    sep, sep2 : str
        Separators; ``sep2`` ends the assistant's turns where the style distinguishes the two.
    version : str
        Name of the format; with "mmtag" in it, images are announced in a turn of their own.
    skip_next : bool
        Used by serving code to mark a refused turn; not copied.
    """

    system: str
    roles: tuple[str, str]
    messages: list | tuple
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """Write the conversation as one prompt; the conversation itself is left as it is.

        Returns
        -------
        str
            The prompt, ending where the model has to go on if the last turn is empty.

        Raises
        ------
        AssertionError
            In style LLAMA_2, if the first message is empty or not the user's.
        TypeError
            If a turn needs a separator that the template does not have (``plain`` has no second one).
        ValueError
            If ``sep_style`` is not a :class:`SeparatorStyle`.
        """
        writers = {
            SeparatorStyle.SINGLE: self._write_named_turns,
            SeparatorStyle.TWO: self._write_named_turns,
            SeparatorStyle.MPT: self._write_mpt,
            SeparatorStyle.PLAIN: self._write_plain,
            SeparatorStyle.LLAMA_2: self._write_llama_2,
        }
        if self.sep_style not in writers:
            raise ValueError(f"Invalid style: {self.sep_style!r}; allowed: {', '.join(map(str, SeparatorStyle))}")
        return writers[self.sep_style]([(role, _text(message)) for role, message in self._turns()])

    def _turns(self) -> list:
        """The messages, with the mark for the image put where the format wants it if the first one has an image."""
        turns = list(self.messages)
        if not turns or not isinstance(turns[0][1], tuple):
            return turns
        role, (text, *_) = turns[0]
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            announced = [(self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"), (self.roles[1], "Received.")]
            return [*announced, (role, text), *turns[1:]]
        return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *turns[1:]]

    def _write_named_turns(self, turns: list) -> str:
        ends = (self.sep, self.sep) if self.sep_style is SeparatorStyle.SINGLE else (self.sep, self.sep2)
        prompt = self.system + self.sep
        for index, (role, text) in enumerate(turns):
            prompt += f"{role}:" if text is None else f"{role}: " + text + ends[index % 2]
        return prompt

    def _write_mpt(self, turns: list) -> str:
        prompt = self.system + self.sep
        for role, text in turns:
            prompt += role if text is None else role + text + self.sep
        return prompt

    def _write_plain(self, turns: list) -> str:
        ends = (self.sep, self.sep2)
        prompt = self.system
        for index, (_, text) in enumerate(turns):
            prompt += "" if text is None else text + ends[index % 2]
        return prompt

    def _write_llama_2(self, turns: list) -> str:
        if turns and turns[0][1] is None:
            raise AssertionError("the first message of a LLAMA_2 conversation must not be empty")
        if turns and turns[0][0] != self.roles[0]:
            raise AssertionError(f"the first message must come from {self.roles[0]!r}, not from {turns[0][0]!r}")
        prompt = ""
        for index, (_, text) in enumerate(turns):
            if text is None:
                continue
            if index == 0 and self.system:
                text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{text}"
            prompt += f"{self.sep}[INST] {text} [/INST]" if index % 2 == 0 else f" {text} {self.sep2}"
        # The tokenizer adds the first <s>. Characters, not a prefix, are stripped: this is what checkpoints were
        # trained with, and it makes no difference in front of "[INST]".
        return prompt.lstrip(self.sep)

    @property
    def turn_end(self) -> str:
        """What ends the assistant's turns: ``</s>`` of the v1 family, ``###`` of v0."""
        return self.sep2 or "" if self.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2) else self.sep

    def append_message(self, role: str, message: str | tuple | None) -> None:
        """Add a turn, in place. A template, whose messages are a tuple, refuses: :meth:`copy` it first."""
        if isinstance(self.messages, tuple):
            raise AttributeError("a template takes no messages: copy() it first")
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent conversation whose messages are a list of ``[role, message]`` lists."""
        return Conversation(
            system=self.system,
            roles=self.roles,
            messages=[[role, message] for role, message in self.messages],
            offset=self.offset,
            sep_style=self.sep_style,
            sep=self.sep,
            sep2=self.sep2,
            version=self.version,
        )

    def dict(self) -> dict:
        """The conversation as plain data for a log; of a message with an image only the text is kept."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [
                [role, message[0] if isinstance(message, tuple) else message] for role, message in self.messages
            ],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _text(message: str | tuple | None) -> str | None:
    """What a turn says; None if the model is to write it, which an image without words does not mean."""
    return message[0] if isinstance(message, tuple) else message or None


def conv_mode_for(model_name: str, model_config: Any = None, tokenizer: Any = None) -> str:
    """The template a checkpoint was trained with: as its files say, and as its name says where they leave it open.

    Parameters
    ----------
    model_name : str
        As :func:`llava.mm_utils.get_model_name_from_path` returns it; case does not matter.
    model_config : object, optional
        The checkpoint's configuration: ``conv_template``, which `llava.train` writes, then the architecture.
    tokenizer : optional
        The checkpoint's; its end-of-text token distinguishes the 34B model of LLaVA-1.6.

    Returns
    -------
    str
        A key of ``conv_templates``.
    """
    recorded = getattr(model_config, "conv_template", None)
    if recorded in conv_templates:
        return recorded
    architectures = getattr(model_config, "architectures", None) or ()
    architecture = " ".join([getattr(model_config, "model_type", None) or "", *architectures]).lower()
    name = model_name.lower()
    for mark, mode in (("mistral", "mistral_instruct"), ("mpt", "mpt")):
        if mark in (architecture or name):
            return mode
    if "v1.6-34b" in name or getattr(tokenizer, "eos_token", None) == "<|im_end|>":
        return "chatml_direct"
    if "llama-2" in name:
        return "llava_llama_2"
    # Checkpoints before 1.5, of which some are v0, have a linear projector.
    if "v1" in name or str(getattr(model_config, "mm_projector_type", "")).startswith("mlp"):
        return "llava_v1"
    return "llava_v0"


def benchmark_conv_mode(model_name: str, model_config: Any, tokenizer: Any) -> str:
    """As `conv_mode_for`, but for the v1 family the template of its training and of published benchmark results."""
    mode = conv_mode_for(model_name, model_config, tokenizer)
    return "vicuna_v1" if mode == "llava_v1" else mode


def check_conv_mode(mode: str | None) -> None:
    """Raise a ValueError if there is no such template; None, "the checkpoint's", is one."""
    if mode is not None and mode not in conv_templates:
        raise ValueError(f"unknown conversation mode {mode!r}; allowed: {', '.join(conv_templates)}")


def choose_conv_mode(model_name: str, wanted: str | None, model_config: Any = None, tokenizer: Any = None) -> str:
    """The template to use: the wanted one, with a printed warning if the checkpoint speaks for another.

    Parameters
    ----------
    wanted : str or None
        A key of ``conv_templates``; None for the checkpoint's.
    model_name, model_config, tokenizer
        See `conv_mode_for`.

    Raises
    ------
    ValueError
        If there is no such template.
    """
    check_conv_mode(wanted)
    inferred = conv_mode_for(model_name, model_config, tokenizer)
    if wanted is None or wanted == inferred:
        return inferred
    print(
        f"[WARNING] the auto inferred conversation mode is {inferred}, while `--conv-mode` is {wanted}, using {wanted}"
    )
    return wanted


def image_mark(model_config: Any) -> str:
    """What stands for an image in a prompt: ``<image>``, between two more marks for the first checkpoints."""
    if getattr(model_config, "mm_use_im_start_end", False):
        return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    return DEFAULT_IMAGE_TOKEN


_CHAT_WITH_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CHAT_WITH_HUMAN = _CHAT_WITH_USER.replace("user", "human")
# No space after "natural language.": the checkpoints were trained without it.
_CHAT_WITH_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)

_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_LLAMA_2_CHAT = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT_CHAT = (
    "<|im_start|>system\n"
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_EXAMPLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively "
    "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be "
    "depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
    "have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n"
)


def _family(style: SeparatorStyle, roles: tuple[str, str], sep: str, sep2: str | None = None, version: str = "Unknown"):
    """The templates of a family differ in their system text, and in the turns that they begin with."""

    def template(system: str, *messages: str, version: str = version, sep: str = sep) -> Conversation:
        turns = tuple(zip(roles, messages, strict=False))
        return Conversation(system, roles, turns, len(turns), style, sep, sep2, version)

    return template


_v0 = _family(SeparatorStyle.SINGLE, ("Human", "Assistant"), "###")
_v1 = _family(SeparatorStyle.TWO, ("USER", "ASSISTANT"), " ", "</s>", "v1")
_llama_2 = _family(SeparatorStyle.LLAMA_2, ("USER", "ASSISTANT"), "<s>", "</s>", "llama_v2")
_chatml = _family(SeparatorStyle.MPT, ("<|im_start|>user\n", "<|im_start|>assistant\n"), "<|im_end|>", None, "mpt")
_plain = _family(SeparatorStyle.PLAIN, ("", ""), "\n")

conv_vicuna_v0 = _v0(_CHAT_WITH_HUMAN, _EXAMPLE_QUESTION, _EXAMPLE_ANSWER)
conv_llava_v0 = _v0(_CHAT_WITH_HUMAN)
conv_llava_v0_mmtag = _v0(_CHAT_WITH_MMTAG, version="v0_mmtag")
conv_vicuna_v1 = _v1(_CHAT_WITH_USER)
conv_llava_v1 = _v1(_CHAT_WITH_HUMAN)
conv_llava_v1_mmtag = _v1(_CHAT_WITH_MMTAG, version="v1_mmtag")
conv_llama_2 = _llama_2(_LLAMA_2_CHAT)
conv_llava_llama_2 = _llama_2(_LANGUAGE_AND_VISION)
conv_mistral_instruct = _llama_2("", sep="")
conv_mpt = _chatml(_MPT_CHAT)
conv_chatml_direct = _chatml("<|im_start|>system\nAnswer the questions.")
conv_llava_plain = _plain("")

default_conversation = conv_vicuna_v1

conv_templates = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
}
