"""FastV: its ranking against the published one, and where its attention comes from."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from golden import golden_root
from llava.model.language_model.observed_attention import asked_of
from llava.pruning import VisualTokens, kept_count, pruning
from llava.pruning.attention import attention_of_queries
from llava.pruning.methods.fastv import FastV
from llava.pruning.rows import Rows
from tiny_llava import build, pad_rows, pixels, prompt

FILE = golden_root() / "pruning" / "attention_methods.json"
CASES = json.loads(FILE.read_text())["fastv"] if FILE.exists() else []
N = 16


def published_row(case, cases=CASES):
    """The attention row (H, L) that a golden case was made from, and where its visual tokens stand."""
    number = int(case["key"].split("/")[1].removeprefix("case"))
    facts = next(other for other in cases if other["key"].startswith(f"fastv/case{number}/rank"))
    length = facts["sys"] + facts["n"] + facts["text"]
    base = json.loads(FILE.read_text())["base_seed"]
    draw = np.random.default_rng([base, 1, number]).random((facts["H"], length))
    row = (draw * draw * draw).astype(np.float32)
    assert hashlib.sha256(row.tobytes()).hexdigest() == facts["sha_row"]
    return torch.from_numpy(row), slice(facts["sys"], facts["sys"] + facts["n"])


@pytest.mark.parametrize("case", [pytest.param(case, id=case["key"]) for case in CASES])
def test_the_ranking_is_the_published_one(case):
    data = np.load(FILE.with_suffix(".npz"))
    row, visual = published_row(case)
    expected = data[f"{case['key']}/keep_indexes"]
    expected = [i - visual.start for i in expected if visual.start <= i < visual.stop]
    attention = row[None, :, visual].transpose(1, 2)
    tokens = VisualTokens(torch.zeros(1, attention.shape[1], 1), len(expected), last_attention=attention)
    chosen = FastV().indices(tokens)
    assert chosen[0].tolist() == expected


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_attention_is_that_of_the_layer_itself(tower, family):
    """Two rows, the second padded on either side: the layer's own eager map, at the last token that is no padding."""
    model = build(tower, family)
    model.set_attn_implementation("eager")
    for side in ("left", "right"):
        ids, mask = pad_rows([prompt(12, seed=1), prompt(7, seed=2)], side)
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            out = model.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                output_attentions=True,
                output_hidden_states=True,
            )
            hidden = out.hidden_states[1]
            rotary = model.model.rotary_emb(hidden, position_ids=positions)
            rows = Rows.start(hidden, mask.bool(), torch.full_like(ids, -1))
            ask = asked_of(model.model.layers[1], hidden, rotary, rows.valid)
            found = attention_of_queries({"last_attention"}, rows, None, ask)["last_attention"]
        last = [int(row.nonzero().max()) for row in mask]
        expected = torch.stack([out.attentions[1][row, :, last[row]].T for row in range(2)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_generates_what_its_rows_generate_alone(tower):
    model = build(tower)
    rows = [prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2), prompt(12, seed=3)]
    images = [pixels(1, seed=4), pixels(2, seed=5), pixels(1, seed=6)]
    ids, mask = pad_rows(rows)
    with pruning(model, "fastv", ratio=0.3, layer=1):
        batch = model.generate(ids, images=torch.cat(images), attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert model.visual_token_counts == [(N, kept_count(N, 0.3))] * 3
        alone = [
            model.generate(row[None], images=part, max_new_tokens=6, do_sample=False)[0].tolist()
            for row, part in zip(rows, images, strict=True)
        ]
    assert batch.tolist() == alone
