"""The embedded world: small, exactly known images, drawn from a seed.

A scene is a description (`Scene`): a textured background, some clutter, and one to eight objects that do not overlap.
An object is a coloured shape, or a sign: a coloured plate with a printed word or digit. `sample_scene` draws a
description from a seed, and `render` makes its image.

Everything is the same on every machine and with every version of Python, NumPy and Pillow: descriptions come from
`SeededRandom`, whose stream Python promises to keep, and images are rasterised here in integers, so that no
library's rules for edges, fonts or anti-aliasing can move a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import numpy as np
from PIL import Image

from llava.benchmarks import BENCHMARKS
from llava.mini.font import GLYPH_HEIGHT, GLYPH_WIDTH, dots, text_width
from llava.mini.seeded_random import SeededRandom

IMAGE_SIZE = 336
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
SIGN = "sign"

COLORS = {
    "red": (205, 30, 35),
    "orange": (240, 130, 15),
    "yellow": (245, 225, 40),
    "green": (35, 140, 50),
    "blue": (35, 75, 205),
    "purple": (120, 40, 160),
    "black": (22, 22, 22),
    "white": (246, 246, 246),
}
# Middle tones that no object has, so that every colour stands out from every background.
BACKGROUNDS = {
    "gray": (150, 150, 150),
    "pink": (222, 160, 185),
    "tan": (196, 164, 122),
    "teal": (110, 176, 172),
}
TEXTURES = ("plain", "striped", "checkered", "dotted", "grainy")

# Side of a shape's bounding box in pixels, both ends included. The gaps between the ranges make the names certain.
SIZES = {"small": (16, 26), "medium": (42, 62), "large": (92, 168)}

# As many words in each category, and as many living as lifeless things, so that no answer is the likelier one.
CATEGORIES = {
    "animal": ("cat", "dog", "fox", "cow", "bird", "fish"),
    "food": ("milk", "cake", "apple", "lemon", "bread", "rice"),
    "vehicle": ("car", "bus", "boat", "train", "truck", "bike"),
    "nature": ("sun", "sky", "tree", "leaf", "stone", "cloud"),
}
WORDS = tuple(chain(*CATEGORIES.values()))
NUMBERS = tuple("0123456789")
TEXTS = WORDS + NUMBERS
CHARACTERS = tuple("abcdefghijklmnopqrstuvwxyz") + NUMBERS

PLACES = tuple(
    f"{row} {column}".strip() or "center" for row in ("top", "", "bottom") for column in ("left", "", "right")
)

SPLITS = ("train", "validation", *(benchmark.name for benchmark in BENCHMARKS if benchmark.data))


@dataclass(frozen=True)
class SceneObject:
    """One object: a shape, or a sign with a printed text.

    Attributes
    ----------
    shape, color : str
        One of `SHAPES`, or `SIGN`; a key of `COLORS`: the shape's fill, or the sign's plate.
    size : str
        A key of `SIZES`. Signs are ``small`` when their letters are at most 21 pixels high, else ``medium``.
    left, top, width, height : int
        Bounding box in pixels; it lies inside the image.
    rgb : tuple of int
        The exact fill, a slight variation of the named colour.
    text : str
        What a sign says (one of `TEXTS`, printed in capitals); empty for a shape.
    scale : int
        Pixels a font dot, for a sign: letters are ``7 * scale`` pixels high. 0 for a shape.
    """

    shape: str
    color: str
    size: str
    left: int
    top: int
    width: int
    height: int
    rgb: tuple[int, int, int]
    text: str = ""
    scale: int = 0

    @property
    def is_sign(self) -> bool:
        """Whether the object is a sign."""
        return self.shape == SIGN

    @property
    def center(self) -> tuple[int, int]:
        """The middle of the bounding box, ``(x, y)`` in pixels, rounded down."""
        return self.left + self.width // 2, self.top + self.height // 2

    @property
    def place(self) -> str:
        """Which of the nine `PLACES` holds the centre."""
        return place_of(*self.center)


@dataclass(frozen=True)
class Stroke:
    """A thin line or dot that is no object: `length` steps of ``(dx, dy)`` from ``(x, y)``, `width` pixels wide."""

    x: int
    y: int
    dx: int
    dy: int
    length: int
    width: int
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Everything an image shows.

    Attributes
    ----------
    split, seed : str, int
        What the scene was drawn from.
    background, texture : str
        A key of `BACKGROUNDS`, and one of `TEXTURES`.
    cell : int
        Period of the texture in pixels.
    slant : tuple of int
        Brightness that is gained from left to right and from top to bottom, in levels.
    objects : tuple of SceneObject
        One to eight, in reading order (by thirds of the image from the top, then from the left).
    clutter : tuple of Stroke
        Drawn below the objects.
    """

    split: str
    seed: int
    background: str
    texture: str
    cell: int
    slant: tuple[int, int]
    objects: tuple[SceneObject, ...]
    clutter: tuple[Stroke, ...]

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        """The objects that are not signs, in reading order."""
        return tuple(o for o in self.objects if not o.is_sign)

    @property
    def signs(self) -> tuple[SceneObject, ...]:
        """The signs, in reading order."""
        return tuple(o for o in self.objects if o.is_sign)


def place_of(x: int, y: int) -> str:
    """Name of the ninth of the image that the pixel ``(x, y)`` lies in (one of `PLACES`)."""
    return PLACES[3 * (y * 3 // IMAGE_SIZE) + x * 3 // IMAGE_SIZE]


def sample_scene(seed: int, split: str) -> Scene:
    """Draw a scene. The same seed and split give the same scene everywhere; no two splits share one.

    The split is one of `SPLITS`: training, validation, or the benchmark that the scene is for. A ValueError for an
    unknown split or a negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    rng = SeededRandom("scene", split, seed)
    texture = rng.choice(TEXTURES)
    cell = rng.between(3, 4) if texture == "grainy" else rng.between(8, 16)
    return Scene(
        split=split,
        seed=seed,
        background=rng.choice(tuple(BACKGROUNDS)),
        texture=texture,
        cell=cell,
        slant=(rng.between(-14, 14), rng.between(-14, 14)),
        objects=_sample_objects(rng),
        clutter=tuple(_sample_stroke(rng) for _ in range(rng.between(0, 16))),
    )


def _sample_objects(rng: SeededRandom) -> tuple[SceneObject, ...]:
    total = rng.weighted({1: 6, 2: 12, 3: 16, 4: 18, 5: 16, 6: 14, 7: 10, 8: 8})
    n_signs = min(total, rng.weighted({0: 35, 1: 42, 2: 23}))
    signs = [_sample_sign(rng, text) for text in rng.sample(TEXTS, n_signs)]
    shapes = _sample_shapes(rng, total - n_signs)
    # The largest first: small ones always find room between them.
    wanted = sorted(signs + shapes, key=lambda o: -o.width * o.height)
    placed: list[SceneObject] = []
    for thing in wanted:
        if (there := _placed(rng, thing, placed)) is not None:
            placed.append(there)
    return tuple(sorted(placed, key=_reading_order))


def _reading_order(thing: SceneObject) -> tuple[int, int, int]:
    x, y = thing.center
    return y * 3 // IMAGE_SIZE, x, y


def _sample_shapes(rng: SeededRandom, n: int) -> list[SceneObject]:
    """`n` shapes; in half of the scenes with room for it, two to five of them are of one kind."""
    shapes: list[SceneObject] = []
    if n >= 2 and rng.chance(50):
        shape, color, size = rng.choice(SHAPES), rng.choice(tuple(COLORS)), _sample_size(rng)
        same_color = rng.chance(60)
        for _ in range(min(n, rng.between(2, 5))):
            shapes.append(_sample_shape(rng, shape, color if same_color else rng.choice(tuple(COLORS)), size))
    while len(shapes) < n:
        shapes.append(_sample_shape(rng, rng.choice(SHAPES), rng.choice(tuple(COLORS)), _sample_size(rng)))
    return shapes


def _sample_size(rng: SeededRandom) -> str:
    return rng.weighted({"small": 38, "medium": 40, "large": 22})


def _sample_shape(rng: SeededRandom, shape: str, color: str, size: str) -> SceneObject:
    side = rng.between(*SIZES[size])
    return SceneObject(shape, color, size, 0, 0, side, side, _tinted(rng, COLORS[color]))


def _sample_sign(rng: SeededRandom, text: str) -> SceneObject:
    scale = rng.weighted({2: 12, 3: 22, 4: 44, 5: 22})
    margin = scale + 2
    width = text_width(text, scale) + 2 * margin
    color = rng.choice(tuple(COLORS))
    size = "small" if scale <= 3 else "medium"
    height = GLYPH_HEIGHT * scale + 2 * margin
    return SceneObject(SIGN, color, size, 0, 0, width, height, _tinted(rng, COLORS[color]), text, scale)


def _tinted(rng: SeededRandom, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + rng.between(-9, 9))) for level in rgb)
    return red, green, blue


def _placed(rng: SeededRandom, thing: SceneObject, others: list[SceneObject]) -> SceneObject | None:
    """The object at a random place where it touches no other one, or None when forty tries found none."""
    rim = 4
    for _ in range(40):
        left = rng.between(rim, IMAGE_SIZE - rim - thing.width)
        there = replace(thing, left=left, top=rng.between(rim, IMAGE_SIZE - rim - thing.height))
        if not any(touch(there, other) for other in others):
            return there
    return None


def touch(a: SceneObject, b: SceneObject) -> bool:
    """Whether two objects overlap or lie less than six pixels apart."""
    gap = 6
    beside = a.left >= b.left + b.width + gap or b.left >= a.left + a.width + gap
    return not (beside or a.top >= b.top + b.height + gap or b.top >= a.top + a.height + gap)


def _sample_stroke(rng: SeededRandom) -> Stroke:
    dx, dy = rng.choice(((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2), (0, 0)))
    length = 1 if dx == dy == 0 else rng.between(6, 26)
    width = rng.between(1, 2) if length > 1 else rng.between(2, 4)
    rgb = _tinted(rng, rng.choice(tuple(COLORS.values())))
    return Stroke(rng.below(IMAGE_SIZE), rng.below(IMAGE_SIZE), dx, dy, length, width, rgb)


def render(scene: Scene) -> Image.Image:
    """The scene's image, 336 x 336 RGB; the same pixels on every machine (about 2 ms)."""
    shade = _shade(scene)  # (336, 336)
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for channel, level in enumerate(BACKGROUNDS[scene.background]):
        canvas[..., channel] = shade + level
    for stroke in scene.clutter:
        _paint_stroke(canvas, stroke)
    for thing in scene.objects:
        window = canvas[thing.top : thing.top + thing.height, thing.left : thing.left + thing.width]
        if thing.is_sign:
            window[:] = thing.rgb
            ink = (10, 10, 10) if sum(COLORS[thing.color]) > 360 else (250, 250, 250)
            window[text_mask(thing.text, thing.scale, thing.width, thing.height) > 0] = ink
        else:
            window[shape_mask(thing.shape, thing.width)] = thing.rgb
    return Image.fromarray(canvas)


def _shade(scene: Scene) -> np.ndarray:
    """Brightness around the background's colour: the texture, a slant, and 28-pixel mottles; int16 (336, 336)."""
    along = np.arange(IMAGE_SIZE, dtype=np.int16)
    across, down = scene.slant
    slant = (along * across // IMAGE_SIZE - across // 2)[None, :] + (along * down // IMAGE_SIZE - down // 2)[:, None]
    noise = np.random.PCG64(SeededRandom("shade", scene.split, scene.seed).below(2**53))
    mottles = _draw_levels(noise, IMAGE_SIZE // 28, 9) - 4
    return slant + _enlarged(mottles, 28) + _texture(scene, noise)


def _texture(scene: Scene, noise: np.random.PCG64) -> np.ndarray:
    cell, depth = scene.cell, 15
    along = np.arange(IMAGE_SIZE, dtype=np.int16)
    if scene.texture == "plain":
        return np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.int16)
    if scene.texture == "striped":
        stripe = (along // cell % 2) * (2 * depth) - depth
        stripe = stripe[None, :] if scene.seed % 2 else stripe[:, None]
        return np.broadcast_to(stripe, (IMAGE_SIZE, IMAGE_SIZE))
    if scene.texture == "checkered":
        return ((along // cell)[None, :] + (along // cell)[:, None]) % 2 * (2 * depth) - depth
    if scene.texture == "dotted":
        offset = 2 * (along % (2 * cell)) + 1 - 2 * cell
        radius = cell * 9 // 10
        return np.where((offset**2)[None, :] + (offset**2)[:, None] <= radius**2, -2 * depth, depth // 3)
    grains = -(-IMAGE_SIZE // cell)
    return _enlarged(_draw_levels(noise, grains, 2) * (2 * depth) - depth, cell)[:IMAGE_SIZE, :IMAGE_SIZE]


def _draw_levels(noise: np.random.PCG64, side: int, levels: int) -> np.ndarray:
    """A ``(side, side)`` int16 array of 0 .. levels - 1 from the generator's raw stream, which NumPy keeps fixed."""
    raw = noise.random_raw(side * side) >> np.uint64(40)
    return (raw * np.uint64(levels) >> np.uint64(24)).astype(np.int16).reshape(side, side)


def _enlarged(levels: np.ndarray, factor: int) -> np.ndarray:
    return levels.repeat(factor, 0).repeat(factor, 1)


def _paint_stroke(canvas: np.ndarray, stroke: Stroke) -> None:
    for step in range(stroke.length):
        x, y = stroke.x + step * stroke.dx, stroke.y + step * stroke.dy
        if 0 <= x < IMAGE_SIZE and 0 <= y < IMAGE_SIZE:
            canvas[y : y + stroke.width, x : x + stroke.width] = stroke.rgb


@lru_cache(maxsize=512)
def shape_mask(shape: str, side: int) -> np.ndarray:
    """Which pixels of the ``(side, side)`` box the shape covers, bool; integer tests at the pixels' centres."""
    step = 2 * np.arange(side, dtype=np.int64) + 1 - side  # doubled distance from the middle, -side .. side
    u, v = step[None, :], step[:, None]
    if shape == "circle":
        return u**2 + v**2 <= side**2
    if shape == "square":
        return np.ones((side, side), bool)
    if shape == "triangle":
        return 2 * abs(u) <= v + side
    if shape == "cross":
        return (10 * abs(u) <= 3 * side) | (10 * abs(v) <= 3 * side)
    if shape == "diamond":
        return abs(u) + abs(v) <= side
    if shape == "ring":
        return (u**2 + v**2 <= side**2) & (100 * (u**2 + v**2) >= 30 * side**2)
    if shape == "heart":
        lobes = (2 * abs(u) - side) ** 2 + (2 * v + side) ** 2 <= side**2
        return lobes | ((2 * v >= -side) & (3 * abs(u) <= 2 * (side - v)))
    if shape == "star":
        # A pentagram is where at least four of the five lines through its edges have the point on their inner side.
        normals = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))
        low = v - side // 10  # its lowest tips lie above the box's rim: the shape is moved down by that much
        inside = sum((nx * u + ny * low <= 340 * side).astype(np.int8) for nx, ny in normals)
        return (inside >= 4) & np.ones((side, side), bool)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")


@lru_cache(maxsize=512)
def text_mask(text: str, scale: int, width: int, height: int) -> np.ndarray:
    """The ink of a sign, int8 ``(height, width)``: 0, or 1 + the index in `CHARACTERS` of the letter's ink."""
    mask = np.zeros((height, width), np.int8)
    margin = scale + 2
    for i, character in enumerate(text):
        left = margin + i * (GLYPH_WIDTH + 1) * scale
        glyph = dots(character, scale) * (1 + CHARACTERS.index(character))
        mask[margin : margin + GLYPH_HEIGHT * scale, left : left + GLYPH_WIDTH * scale] = glyph
    return mask
