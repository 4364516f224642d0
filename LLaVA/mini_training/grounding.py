"""What the words of a question point at: targets for heads that a model in training has beside its answers.

"Is the red star above the small ring?" is answered in steps: find each thing, see where it is, compare. From answers
alone a small model needs very long to find these steps. So, while it is trained, linear heads read its hidden state at
the end of every noun phrase (how many things fit, and of a single one its attributes and its box; a little deeper, how
it compares with the phrase before) and of every option (whether it is the right one). The heads are thrown away
afterwards; questions stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from llava.mini.captions import COUNT_WORDS, PLURALS, at
from llava.mini.forms.naming import INSIDE
from llava.mini.scenes import COLORS, IMAGE_SIZE, NUMBERS, PLACES, SHAPES, SIGN, SIZES, TEXTS, WORDS, Scene, SceneObject

NEWLINE = "<0x0A>"
KINDS = (*SHAPES, SIGN)
MOST = 8

# Columns of a target: classes that a head distinguishes, then lengths in pixels.
CLASSES = {
    "count": MOST + 1,
    "second_count": MOST + 1,  # in the second of two images
    "shape": len(KINDS),
    "color": len(COLORS),
    "size": len(SIZES),
    "place": len(PLACES),
    "text": len(TEXTS),
    # One thing beside that of the phrase before.
    "further_right": 2,
    "lower": 2,
    "larger": 2,
    "same_color": 2,
    "stated_count": 2,  # whether "three stars" are three
    "right": 2,
}
COMPARISONS = ("further_right", "lower", "larger", "same_color", "stated_count")
LENGTHS = ("x", "y", "width")
COLUMNS = (*CLASSES, *LENGTHS)
NOTHING = -1

BOX_WEIGHT = 20.0


def grounding_targets(pieces: Sequence[str], scenes: Sequence[Scene], right: str = "") -> list[tuple[int, ...]]:
    """Targets of the tokens at the ends of a prompt's noun phrases and options.

    ``pieces`` are the prompt's tokens as the vocabulary spells them; ``scenes`` what the images show, one or two, or
    none for a question without an image; ``right`` the right option's letter, empty for an open question. A target is
    the index of the token, then `COLUMNS`, -1 where there is nothing to say.
    """
    words = [piece.replace("▁", " ").strip() for piece in pieces]
    targets: dict[int, dict[str, int]] = {}
    before = None
    for end, attributes, stated in _phrases(words) if scenes else ():
        things = [[thing for thing in scene.objects if _fits(thing, attributes)] for scene in scenes]
        target = {"count": min(len(things[0]), MOST)}
        if stated:
            target["stated_count"] = int(len(things[0]) == stated)
        if len(scenes) > 1:
            target["second_count"] = min(len(things[1]), MOST)
        elif len(things[0]) == 1:
            (thing,) = things[0]
            target |= facts_of(thing) | ({} if before is None else _comparison(thing, before))
            before = thing
        targets[end] = target
    for end, letter in _options(words):
        targets.setdefault(end, {})["right"] = int(letter == right)
    return [(end, *(values.get(name, NOTHING) for name in COLUMNS)) for end, values in sorted(targets.items())]


def _options(words: Sequence[str]) -> list[tuple[int, str]]:
    """Last token and letter of every option: a line that begins with a letter and a full stop."""
    found = []
    breaks = [i for i, word in enumerate(words) if word == NEWLINE] + [len(words)]
    for start, end in pairwise(breaks):
        line = words[start + 1 : end]
        if len(line) > 2 and line[0] in ("A", "B", "C", "D") and line[1] == ".":
            found.append((end - 1, line[0]))
    return found


def _phrases(words: Sequence[str]) -> list[tuple[int, dict[str, object], int]]:
    """Last token of every noun phrase, the attributes that it gives, and the number that it states (0: none)."""
    found = []
    for i, word in enumerate(words):
        if word in HEADS:
            attributes = dict(HEADS[word])
            before = words[max(0, i - 3) : i]
            if before and before[-1] in COLORS:
                attributes["color"] = before.pop()
                attributes.setdefault("shape", SHAPES)  # "the red shape"; a sign is called a sign
            if before and before[-1] in SIZES:
                attributes["size"] = before.pop()
            stated = COUNT_WORDS.index(before[-1]) if before and before[-1] in COUNT_WORDS else 0
            end = i + _suffix(words[i + 1 : i + 6], attributes, bare=word == "shape" and "color" not in attributes)
            # "A polygon is a shape ..." and "the object above ..." name no thing by themselves.
            if attributes or word in ("shapes", "objects"):
                found.append((end, attributes, stated))
        elif word in TEXTS and words[i - 1] == '"':
            found.append((i, {"text": word}, 0))
        elif word in ALPHABETS and words[i - 1] in ("the", "The") and words[i + 1 : i + 2] != ['"']:
            found.append((i, {"text": ALPHABETS[word]}, 0))
    return found


ALPHABETS = {"word": WORDS, "number": NUMBERS}
HEADS: dict[str, dict[str, object]] = {
    **{shape: {"shape": shape} for shape in KINDS},
    **{plural: {"shape": shape} for shape, plural in PLURALS.items()},
    "shape": {},
    "shapes": {"shape": SHAPES},
    "objects": {},
}


def _suffix(rest: Sequence[str], attributes: dict[str, object], bare: bool) -> int:
    """Add what follows a noun ("that says cat", "in the top left"); how many tokens that is."""
    if attributes.get("shape") == SIGN and list(rest[:2]) == ["that", "says"]:
        # A digit is two tokens: a space, and itself.
        length = 4 if rest[2:3] == [""] else 3
        attributes["text"] = rest[length - 1]
        return length
    if bare:
        for place in sorted(PLACES, key=len, reverse=True):
            for length in range(1, len(rest) + 1):
                if " ".join(rest[:length]) == at(place):
                    attributes.update(place=place, shape=SHAPES)
                    return length
    return 0


def _fits(thing: SceneObject, attributes: dict[str, object]) -> bool:
    return all(
        getattr(thing, name) in value if isinstance(value, tuple) else getattr(thing, name) == value
        for name, value in attributes.items()
    )


def facts_of(thing: SceneObject) -> dict[str, int]:
    """What a single thing is, as numbers: the columns of a target that it alone decides."""
    facts = {
        "shape": KINDS.index(thing.shape),
        "color": tuple(COLORS).index(thing.color),
        "size": tuple(SIZES).index(thing.size),
        "place": PLACES.index(thing.place),
        "x": thing.center[0],
        "y": thing.center[1],
        "width": thing.width,
    }
    return facts | ({"text": TEXTS.index(thing.text)} if thing.is_sign else {})


def _comparison(thing: SceneObject, before: SceneObject) -> dict[str, int]:
    """What is beyond doubt."""
    facts = {"same_color": int(thing.color == before.color)}
    for axis, name in enumerate(("further_right", "lower")):
        if abs(thing.center[axis] - before.center[axis]) >= INSIDE:
            facts[name] = int(thing.center[axis] > before.center[axis])
    if thing.size != before.size and not thing.is_sign and not before.is_sign:
        facts["larger"] = int(thing.width > before.width)
    return facts


@dataclass(frozen=True)
class Grounding:
    """How strongly, and where, a stage asks the heads.

    Attributes
    ----------
    weight : float
        Of the heads' summed losses, beside the answers' loss.
    phrases, comparisons, options : int
        How many decoder layers a noun phrase, what it is compared with, and an option have gone through when read.
    """

    weight: float
    phrases: int
    comparisons: int
    options: int

    @property
    def depths(self) -> tuple[int, int, int]:
        """Layers gone through, in the order of `GroundingHeads.forward`."""
        return self.phrases, self.comparisons, self.options


class GroundingHeads(nn.Module):
    """Linear heads on hidden states, of this width, of the ends of noun phrases and options."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in CLASSES.items()})
        self.box = nn.Linear(width, len(LENGTHS))
        self.norms = nn.ModuleDict({name: nn.RMSNorm(width) for name in ("phrases", "comparisons", "options")})

    def forward(
        self, phrases: torch.Tensor, comparisons: torch.Tensor, options: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses by name, and accuracies under ``accuracy/<name>``.

        The hidden states (G, width) are of the same tokens, of the layers where phrases, comparisons and options are
        read; targets (G, len(COLUMNS)) are int64.
        """
        phrases, options = self.norms["phrases"](phrases), self.norms["options"](options)
        read = {"right": options} | dict.fromkeys(COMPARISONS, self.norms["comparisons"](comparisons))
        out: dict[str, torch.Tensor] = {}
        for number, (name, head) in enumerate(self.heads.items()):
            target = targets[:, number]
            known = target >= 0
            scores = head(read.get(name, phrases)[known]).float()
            # A sum over nothing is 0: every process of a run has gradients of every head.
            out[name] = F.cross_entropy(scores, target[known], reduction="sum") / known.sum().clamp_min(1)
            out[f"accuracy/{name}"] = (scores.argmax(-1) == target[known]).float().mean().detach()
        lengths = targets[:, len(CLASSES) :]
        known = lengths[:, 0] >= 0
        box = self.box(phrases[known]).float()
        goal = lengths[known] / IMAGE_SIZE
        misses = F.smooth_l1_loss(box, goal, beta=0.05, reduction="sum")
        out["box"] = BOX_WEIGHT * misses / (len(LENGTHS) * known.sum().clamp_min(1))
        out["accuracy/box"] = ((box - goal).abs() < 0.06).all(-1).float().mean().detach()
        return out
