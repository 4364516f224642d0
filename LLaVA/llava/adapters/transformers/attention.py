"""Looking into an attention module of any model of transformers, without changing what it computes.

Every module asks the attention interface for its function by the name in its configuration. A watched module gets a
copy of its configuration that names the function here, which looks at queries and keys (after norms and rotary
embedding) and hands on to the function that the module would have called.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME, WATCH = "watched_for_pruning", "_watch_for_pruning"


class Call(NamedTuple):
    """What an attention module was about to compute: queries (B, H, Q, d), keys and values (B, H', T, d).

    H is a multiple of H'. The mask is (B or 1, 1 or H, Q, T), bool or additive, or anything else that a kernel takes.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    softcap: float | None
    causal: bool
    value: torch.Tensor

    def rows(self, own: slice) -> Call:
        """The same of some rows of the batch."""
        mask = self.mask
        if isinstance(mask, torch.Tensor) and len(mask) > 1:
            mask = mask[own]
        return self._replace(query=self.query[own], key=self.key[own], value=self.value[own], mask=mask)

    def weights(self, queries: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the softmax for ``queries`` (B, q), int64, alone: (B, H, q, T), float32.

        ``valid`` (B, T), bool, are the keys that may be looked at, where no mask says so.
        """
        batch, heads, _, width = self.query.shape
        asked = self.query.gather(2, queries[:, None, :, None].expand(-1, heads, -1, width))
        keys = self.key.repeat_interleave(heads // self.key.shape[1], dim=1)
        with torch.autocast(self.query.device.type, enabled=False):
            logits = (asked * (width**-0.5 if self.scaling is None else self.scaling) @ keys.mT).float()
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask.expand(batch, -1, -1, -1)[..., : keys.shape[2]]
            mask = mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
        else:
            place = torch.arange(keys.shape[2], device=keys.device)
            seen = place <= queries[..., None] if self.causal else torch.ones_like(queries[..., None] == place)
            if valid is not None:
                seen = seen & valid[:, None]
            logits = logits.masked_fill(~seen[:, None], -torch.inf)
        return logits.softmax(dim=-1)

    def askers(self) -> torch.Tensor | int:
        """How many queries may look at each key, (T,), or at all of them: in a packed sequence, those of its image."""
        if self.mask is None or self.mask.ndim != 4:
            return self.query.shape[2]
        mask = self.mask[0, 0, :, : self.key.shape[2]]
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return allowed.sum(dim=0).clamp_min(1)


class Watch:
    """Calls ``look`` with every `Call` of one attention module, until it is removed; the latest of several goes first.

    They are removed in the opposite order.
    """

    def __init__(self, module: Any, look: Callable[[Call], None]):
        self.module, self.look, self.config = module, look, module.config
        self.earlier: Watch | None = vars(module).get(WATCH)
        if self.earlier is None:
            name = module.config._attn_implementation
            eager = name in (None, "eager")
            module_file = sys.modules[type(module).__module__]
            self.function = module_file.eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS[name]
            # The setter of this attribute would walk into other configurations.
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = NAME
        else:
            self.function = self.earlier.function
        vars(module)[WATCH] = self

    def remove(self) -> None:
        """Leave the module as it was."""
        self.module.config = self.config
        del vars(self.module)[WATCH]
        if self.earlier is not None:
            vars(self.module)[WATCH] = self.earlier


def _watched(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    scaling = kwargs.get("scaling", args[0] if args else None)
    causal = getattr(module, "is_causal", True)
    mask, edges = attention_mask, kwargs.get("cu_seq_lens_q")
    if mask is None and edges is not None:
        mask = _packed(edges, causal)
    call = Call(query, key, mask, scaling, kwargs.get("softcap"), causal, value)
    function, watch = vars(module)[WATCH].function, vars(module)[WATCH]
    while watch is not None:
        watch.look(call)
        watch = watch.earlier
    return function(module, query, key, value, attention_mask, *args, **kwargs)


def _packed(edges: torch.Tensor, causal: bool) -> torch.Tensor:
    """The mask (1, 1, T, T), bool, of sequences that stand one after the other, which flash attention does without."""
    number = torch.arange(len(edges) - 1, device=edges.device).repeat_interleave(edges.diff())
    mask = (number[:, None] == number)[None, None]
    return mask.tril() if causal else mask


AttentionInterface.register(NAME, _watched)
