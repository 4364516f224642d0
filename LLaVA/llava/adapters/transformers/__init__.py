"""The pruners on the vision-language models of the library ``transformers``.

A forward pre-hook on the model encodes the images first, lets the pruner choose, and rewrites the model's *inputs*:
ids, attention mask, positions, token types, labels and the encoder's output lose the dropped tokens together. All that
follows is the model's own code on a shorter prompt. Nothing is patched, and ``generate`` is not touched: it goes on
counting the columns of the whole prompt, which the same hook translates in every decoding step.

    family.py    what differs between families of models: one line each
    encoder.py   what a method wants to know of the vision encoder, by attention.py
    images.py    which tokens of the prompts are which image's
    inputs.py    the rewriting, tensors in and tensors out
    session.py   the hooks: switching pruning on and off
    inside.py    drops at the decoder's layers
"""

from llava.adapters.transformers.family import FAMILIES, Family, register_family
from llava.adapters.transformers.session import Session, active_session, set_pruning

__all__ = ["FAMILIES", "Family", "Session", "active_session", "register_family", "set_pruning"]
