"""Questions about scenes as benchmarks ask them: what `llava-mini` is trained on, and what its suite consists of.

A form (`llava.mini.forms`) states a fact; here it becomes a `QA`, worded and laid out as the eleven benchmarks do, so
that training and evaluation read the same prompts.

Answers are balanced so that the question alone gives nothing away: yes and no are equally frequent for the same
words, each letter is the right one equally often, and colours, shapes and places are drawn evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from string import ascii_uppercase

from llava.mini.forms import FORMS, PAIR_FORMS, TEXT_FORMS, Fact
from llava.mini.forms.reading import PAGE_FORMS, READING_FORMS
from llava.mini.pages import Page
from llava.mini.scenes import Scene
from llava.mini.seeded_random import SeededRandom

SHORT = "Answer the question using a single word or phrase."
WORD = "Answer the question with a single word."
LETTER = "Answer with the option's letter from the given choices directly."
DESCRIBE = ("Describe this image.", "Describe the image.", "What is in this image?", "What do you see?")
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."

# How each benchmark lays a question out; MMMU asks both ways.
LAYOUTS = {
    "mmbench": "{hint}{question} There are several options:\n{options}\n{instruction}",
    "seedbench": "{question}\n{options}{instruction}",
    "mmmu": "{question}\n{options}\n{instruction}",
    "scienceqa": "{context}{question}\n{options}{instruction}",
    "short": "{question}\n{instruction}",
    "okvqa": f"{{question}}\n{INSUFFICIENT}\n{{instruction}}",
    "plain": "{question}",
    "chartqa": f"{{question}}\n{WORD}",
}
CHOICE_STYLES = ("mmbench", "seedbench", "mmmu", "scienceqa")


@dataclass(frozen=True)
class QA:
    """One question as a benchmark asks it.

    Attributes
    ----------
    form : str
        The kind of question: a key of `FORMS`, `PAIR_FORMS` or `TEXT_FORMS`.
    style : str
        A key of `LAYOUTS`: whose layout `prompt` follows.
    question : str
        The bare question.
    answer : str
        The right answer: a word, a sentence, or the right option's letter when there are `choices`.
    choices : tuple of str
        The options A, B, ...; empty for an open question.
    hint : str
        Context that comes with the question, or empty.
    """

    form: str
    style: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    hint: str = ""

    @property
    def prompt(self) -> str:
        """The whole text that the benchmark gives to a model, without image tokens."""
        return LAYOUTS[self.style].format(
            question=self.question,
            options="".join(
                f"{letter}. {choice}\n" for letter, choice in zip(ascii_uppercase, self.choices, strict=False)
            ),
            hint=f"{self.hint} " if self.hint else "",
            context=f"Context: {self.hint}\n" if self.hint else "",
            instruction=LETTER if self.choices else SHORT,
        )

    @property
    def answer_text(self) -> str:
        """The answer in words: the option of that letter, or `answer` itself."""
        return self.choices[ord(self.answer) - ord("A")] if self.choices else self.answer


def as_open(fact: Fact, style: str = "short") -> QA:
    """Ask a fact openly.

    The style is ``short`` (GQA, MME, POPE), ``okvqa``, ``mmmu``, ``chartqa`` or ``plain`` (captions, and as people
    ask).
    """
    return QA(fact.form, style, _with_image_token(fact.question, style), fact.answer)


def as_choice(fact: Fact, rng: SeededRandom, style: str, n_choices: int | None = None) -> QA:
    """Ask a fact with options in random order: four, or as many as the fact allows, unless ``n_choices`` is given.

    The style is ``mmbench``, ``seedbench`` (always four options), ``mmmu`` or ``scienceqa``. A ValueError if the fact
    has too few wrong answers.
    """
    most = 1 + len(fact.wrong)
    n = min(4, most) if n_choices is None else n_choices
    if n > most or n < 2 or (style == "seedbench" and n != 4):
        raise ValueError(f"a fact with {most - 1} wrong answers has no {n} options in the style {style}")
    choices = rng.shuffled([fact.answer, *rng.sample(fact.wrong, n - 1)])
    letter = chr(ord("A") + choices.index(fact.answer))
    hint = fact.hint if style in ("mmbench", "scienceqa") else ""
    return QA(fact.form, style, _with_image_token(fact.question, style), letter, tuple(choices), hint)


def _with_image_token(question: str, style: str) -> str:
    return f"<image 1> {question}" if style == "mmmu" and "<image 1>" not in question else question


def sample_questions(
    scene: Scene,
    rng: SeededRandom,
    n: int,
    forms: Iterable[str] | None = None,
    choice_percent: int = 40,
    plain_percent: int = 0,
) -> list[QA]:
    """Up to `n` different questions about a scene, in the benchmarks' layouts; fewer when the scene gives no more.

    Parameters
    ----------
    forms : iterable of str, optional
        Keys of `FORMS` to draw from; by default all, ``caption`` and ``exists`` more often than the others.
    choice_percent : int
        How many of a hundred questions come with options, where that is possible.
    plain_percent : int
        How many of a hundred open ones are asked as people ask, without a benchmark's instruction after them.
    """
    names = [*FORMS, "caption", "caption", "exists", "exists"] if forms is None else list(forms)

    def draw() -> QA | None:
        fact = FORMS[rng.choice(names)](scene, rng)
        return None if fact is None else _styled(fact, rng, choice_percent, plain_percent)

    return _different(n, draw)


def _different(n: int, draw: Callable[[], QA | None]) -> list[QA]:
    """Up to `n` different questions of some tries."""
    asked: dict[str, QA] = {}
    for _ in range(6 * n):
        if len(asked) == n:
            break
        qa = draw()
        if qa is not None:
            asked.setdefault(qa.question, qa)
    return list(asked.values())


def _styled(fact: Fact, rng: SeededRandom, choice_percent: int, plain_percent: int) -> QA:
    if fact.form == "caption" and plain_percent and rng.chance(plain_percent):
        return QA(fact.form, "plain", rng.choice(DESCRIBE), fact.answer)
    if fact.form in ("caption", "dense"):
        return as_open(fact, "plain")
    if fact.hint or (fact.wrong and fact.answer not in ("yes", "no") and rng.chance(choice_percent)):
        # A hint belongs to the question, and only two of the styles print it.
        style = rng.choice(("mmbench", "scienceqa") if fact.hint else CHOICE_STYLES)
        most = min(4, 1 + len(fact.wrong))
        n_choices = 4 if style == "seedbench" else rng.between(min(most, 3), most)
        with suppress(ValueError):  # too few wrong answers
            return as_choice(fact, rng, style, n_choices)
    if plain_percent and rng.chance(plain_percent):
        return as_open(fact, "plain")
    return as_open(fact, rng.weighted({"short": 76, "okvqa": 14, "mmmu": 10}))


def sample_pair_questions(first: Scene, second: Scene, rng: SeededRandom, n: int) -> list[QA]:
    """Up to `n` different questions about two images, with the options "the first image" and "the second image"."""

    def draw() -> QA | None:
        fact = PAIR_FORMS[rng.choice(tuple(PAIR_FORMS))](first, second, rng)
        return None if fact is None else as_choice(fact, rng, "mmmu")

    return _different(n, draw)


def sample_text_questions(rng: SeededRandom, n: int) -> list[QA]:
    """`n` questions without an image, most with options in ScienceQA's layout, some open."""
    questions = []
    for _ in range(n):
        fact = TEXT_FORMS[rng.choice(tuple(TEXT_FORMS))](rng)
        # "Which of these ..." makes no sense without options.
        if "of these" in fact.question or rng.chance(70):
            questions.append(as_choice(fact, rng, "scienceqa", rng.between(2, 4)))
        else:
            questions.append(as_open(fact, "short"))
    return questions


def sample_page_questions(kind: str, page: Page, rng: SeededRandom, n: int) -> list[QA]:
    """The different ones among `n` questions about a page of that kind, in the wordings of the benchmarks."""
    facts = (READING_FORMS[type(page.content)][rng.choice(PAGE_FORMS[kind])](page.content, rng) for _ in range(n))
    asked: dict[str, QA] = {}
    for fact in facts:
        asked.setdefault(fact.question, as_open(fact, rng.weighted({"short": 6, "chartqa": 2, "plain": 2})))
    return list(asked.values())
