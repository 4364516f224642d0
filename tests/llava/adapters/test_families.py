"""Every vision-language model of transformers is supported, or says why not; the table in the docs is what happens."""

from __future__ import annotations

import contextlib
import inspect
import json
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as ALL

from llava.adapters.transformers import FAMILIES, set_pruning
from llava.adapters.transformers.family import IMPOSSIBLE, why_not
from llava.pruning import PruningConfig, available_methods
from tiny_vlms import TINY, tiny

DOCS = Path(__file__).parents[3] / "LLaVA" / "docs"

OPTIONS = {
    "hiprune": [{"object_layer": layer} for layer in (3, 2)],
    "cdpruner": [{"relevance": "embeddings"}],
    "flowcut": [{"layers": 1}],
    "vscan": [{"local_layer": layer} for layer in (3, 2)],
}
"""Tried in turn; by default otherwise."""


@pytest.mark.parametrize("kind", sorted(ALL))
def test_a_family_is_supported_or_says_why_not(kind):
    names = ALL[kind] if isinstance(ALL[kind], tuple) else (ALL[kind],)
    forward = inspect.signature(getattr(transformers, names[0]).forward)
    reason = why_not(kind, "mm_encoder_outputs" in forward.parameters)
    assert (reason is None) == (kind in FAMILIES)
    assert reason is None or len(reason.split()) > 4


def test_what_is_known_to_be_impossible_is_no_supported_family():
    assert not set(IMPOSSIBLE) & set(FAMILIES)
    assert set(FAMILIES) <= set(ALL) and set(IMPOSSIBLE) <= set(ALL)


def works(name: str, method: str, folder: Path) -> bool:
    """Whether a method can be switched on in a tiny model of a family."""
    model = tiny(name).model
    choices, ratio = OPTIONS.get(method, [{}]), 0.6
    if method == "fitprune":
        depth, recipe = model.config.get_text_config().num_hidden_layers, folder / f"{name}.json"
        known = {"format": 1, "model": {"name": name, "layers": depth, "visual_tokens": None}, "tokens": 16}
        recipe.write_text(json.dumps(known | {"deleted": [4] + [0] * (depth - 1)}))
        choices, ratio = [{"recipe": str(recipe)}], None
    for options in choices:
        with contextlib.suppress(ValueError):
            set_pruning(model, PruningConfig(method, ratio, options=options))
            set_pruning(model, None)
            return True
    return False


def table(folder: Path) -> str:
    """Methods by families, in Markdown; methods that work alike stand in one row."""
    rows: dict[tuple[bool, ...], list[str]] = {}
    for method in available_methods():
        if method not in ("ocvtp", "scorer"):  # whose networks belong to one tower
            found = tuple(works(name, method, folder) for name in sorted(TINY))
            rows.setdefault(found, []).append(method)
    lines = ["| family | " + " | ".join(", ".join(names) for names in rows.values()) + " |"]
    lines.append("| --- |" + " :-: |" * len(rows))
    for place, name in enumerate(sorted(TINY)):
        lines.append(f"| {name} | " + " | ".join("yes" if found[place] else "-" for found in rows) + " |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_happens(tmp_path):
    expected = table(tmp_path)
    assert expected in (DOCS / "models.md").read_text(), f"docs/models.md should hold:\n\n{expected}"
