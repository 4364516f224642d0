"""The pictures that an image's visual tokens cover, and which token lies where on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from llava.images import REDUCING_GAP, pad_to_square
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.image_tokens import unpad_image


@dataclass(frozen=True)
class View:
    """One picture that a run of visual tokens covers.

    Attributes
    ----------
    name : str
        "image", "base view" or "crops".
    picture : PIL.Image
        RGB, what the patches lie on.
    patches : ndarray (rows, columns), int
        Index of the visual token at each patch.
    """

    name: str
    picture: Image.Image
    patches: np.ndarray

    @property
    def scale(self) -> int:
        """Pixels that a patch is drawn with."""
        return max(1, round(480 / max(self.patches.shape)))

    def pixels(self) -> np.ndarray:
        """The picture as it is drawn: (rows * scale, columns * scale, 3), float32."""
        rows, columns = self.patches.shape
        return np.asarray(self.picture.resize((columns * self.scale, rows * self.scale)), dtype=np.float32)

    def enlarged(self, values: np.ndarray) -> np.ndarray:
        """What stands at each patch, (rows, columns) or (rows, columns, C), as large as `pixels`: (H, W, C or 1)."""
        values = values[..., None] if values.ndim == 2 else values
        return values.repeat(self.scale, 0).repeat(self.scale, 1)


def views_of(image: Image.Image, config, tower) -> list[View]:
    """The pictures that an image's visual tokens cover, in the order of the tokens.

    Parameters
    ----------
    image : PIL.Image
        RGB.
    config
        The model's configuration (``image_aspect_ratio``, ``image_grid_pinpoints``, ``mm_patch_merge_type``).
    tower : CLIPVisionTower

    Returns
    -------
    list of View
        One for a model that pads or squares its images; base view and crops for anyres. Newline tokens belong to no
        patch.
    """
    side = tower.num_patches_per_side
    base = np.arange(side * side).reshape(side, side)
    aspect = getattr(config, "image_aspect_ratio", None)
    if aspect == "pad":
        return [View("image", pad_to_square(image, (122, 116, 104), tower.config.image_size), base)]
    square = image.resize((tower.config.image_size,) * 2, reducing_gap=REDUCING_GAP)
    if aspect != "anyres":
        return [View("image", square, base)]
    columns, rows = get_anyres_image_grid_shape(image.size, config.image_grid_pinpoints, tower.config.image_size)
    grid = torch.zeros(1, rows * side, columns * side)
    newline = 0
    if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
        grid, newline = unpad_image(grid, image.size), 1
    height, width = grid.shape[1:]
    crops = side * side + np.arange(height * (width + newline)).reshape(height, width + newline)
    views = [View("base view", square, base), View("crops", image, crops[:, :width])]
    return [view for view in views if view.patches.size]  # unpadding leaves no patch of the crops of a very thin image
