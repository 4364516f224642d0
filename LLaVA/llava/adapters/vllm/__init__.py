"""The pruners inside vLLM, as a general plug-in: no fork, and nothing of vLLM is patched.

    BASELINE=OURS SUBSET_RATIO=0.098 vllm serve llava-hf/llava-1.5-7b-hf

vLLM's own model classes are subclassed. The API server writes ``kept_count(N, ratio)`` placeholders per image where it
would write N, and the model prunes the N embeddings of the image to the same number. The ratio travels with the image,
so that both are computed from the same numbers and cannot disagree, whatever ratio a request names. All that follows
(KV cache, scheduling, attention, CUDA graphs) is vLLM's own code on a shorter prompt.

    switch.py        which method prunes, and what an engine cannot serve
    placeholders.py  the placeholders that an image keeps in the prompt
    mrope.py         positions of three axes (time, row, column) of what is kept
    families.py      what differs between families of models: one line each
    processor.py     the part in the API server
    model.py         the part in the worker
    models.py        the classes that vLLM looks up by name

The first four import nothing of vLLM.
"""

from __future__ import annotations

import os


def register() -> None:
    """Entry point ``vllm.general_plugins``; vLLM calls it in each of its processes, before it looks up a model.

    Classes are only named, not imported: nothing may touch a GPU before vLLM starts its workers.

    Raises
    ------
    ValueError
        For a mistake in the switch, a method that an engine cannot serve, or a release of vLLM that was not tried.
    """
    from llava.adapters.vllm.switch import check_release, check_servable, is_on

    if not is_on(os.environ):
        return
    import vllm

    from llava.adapters.vllm.families import FAMILIES
    from llava.pruning import PruningConfig

    check_release(vllm.__version__)
    config = PruningConfig.from_env(os.environ)
    if config is not None:
        check_servable(config)
    for architecture in FAMILIES:
        vllm.ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")
