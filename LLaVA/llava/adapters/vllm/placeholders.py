"""What stands for an image in a prompt, cut to the number of tokens that it keeps."""

from __future__ import annotations

from collections.abc import Sequence

from llava.pruning import kept_count


def shortened(tokens: Sequence[int], is_embed: Sequence[bool], ratio: float) -> list[int]:
    """Take the last placeholders out, down to ``kept_count(N, ratio)`` of N.

    Parameters
    ----------
    tokens : sequence of int
        Ids that stand for the image: placeholders, and whatever text a family writes around or between them.
    is_embed : sequence of bool
        Which of them are placeholders, that is, get an embedding of the image.
    ratio : float
        Kept ratio, 0 < ratio <= 1.

    Returns
    -------
    list of int
        The text is all there, in order.
    """
    left = kept_count(sum(is_embed), ratio)
    kept = []
    for token, embed in zip(tokens, is_embed, strict=True):
        if not embed or left > 0:
            kept.append(token)
        left -= embed
    return kept
