"""After the tower: projector and language model learn to answer questions about what the frozen tower sees."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import rotate_half

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from mini_training.grounding import Grounding, GroundingHeads
from mini_training.packing import Batch, packed_mask
from mini_training.tower import pixel_values
from mini_training.vocabulary import TEMPLATE

TOWER_FOLDER = "vision_tower"
CONTEXT_LENGTH = 2048


def llava_config(config: dict, vocabulary: int) -> LlavaConfig:
    """The configuration of a LLaVA-1.5 of the recipe's sizes, as its config.json will hold it."""
    sizes = config["decoder"]
    return LlavaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes["width"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        num_hidden_layers=sizes["layers"],
        intermediate_size=sizes["intermediate"],
        initializer_range=sizes["initializer_range"],
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        use_mm_proj=True,
        mm_vision_tower=TOWER_FOLDER,
        mm_hidden_size=config["tower"]["width"],
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        image_aspect_ratio="pad",
        tokenizer_model_max_length=CONTEXT_LENGTH,
        tokenizer_padding_side="right",
        conv_template=TEMPLATE,
        max_sequence_length=CONTEXT_LENGTH,
    )


def build_llava(config: dict, vocabulary: int, folder: Path, device: str = "cpu") -> LlavaLlamaForCausalLM:
    """A new model on the tower in ``folder / "vision_tower"``, which is frozen."""
    settings = llava_config(config, vocabulary)
    settings.name_or_path = str(folder)
    model = LlavaLlamaForCausalLM(settings)
    model.get_vision_tower().load_model()
    return model.to(device)


class ConversationTask(nn.Module):
    """A LLaVA model, asked many packed questions at once.

    With ``grounding`` it is also asked what noun phrases and options point at; ``pointing`` is the weight of the loss
    that asks one head of two layers to attend to where the answer is seen.
    """

    def __init__(self, model: LlavaLlamaForCausalLM, grounding: Grounding | None = None, pointing: float = 0.0):
        super().__init__()
        self.model = model
        self.pointing = pointing
        self.grounding = grounding
        self.heads = None if grounding is None else GroundingHeads(model.config.hidden_size)

    def matrices(self) -> Iterable[nn.Parameter]:
        """The weight matrices of the decoder's layers and the projector."""
        inner = self.model.get_model()
        for module in (inner.layers, inner.mm_projector):
            yield from (p for p in module.parameters() if p.ndim == 2)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss over the answers' tokens, and under ``accuracy/answer`` the share of wholly right answers.

        A question's loss is divided by the square root of its answer's length: a caption teaches more than a word,
        but not as much more as it is longer.
        """
        taps: dict[int, torch.Tensor] = {}
        pointed: list[tuple[torch.Tensor, torch.Tensor]] = []
        with ExitStack() as stack:
            for hook in self._hooks(batch, taps, pointed):
                stack.enter_context(hook)
            logits, labels, segments, rows = self.answer_logits(batch)
        lengths = torch.zeros(int(rows.max()) + 1, int(segments.max()) + 1, device=labels.device)
        ones = torch.ones_like(labels, dtype=torch.float32)
        lengths.index_put_((rows, segments), ones, accumulate=True)
        weights = lengths[rows, segments].rsqrt()
        losses = F.cross_entropy(logits, labels, reduction="none")
        wrong = torch.zeros_like(lengths).index_put_(
            (rows, segments), (logits.argmax(-1) != labels).float(), accumulate=True
        )
        asked = lengths > 0
        short = asked & (lengths <= 4)
        report = {
            "answer": (losses * weights).sum() / weights.sum(),
            "accuracy/short": (wrong[short] == 0).float().mean(),
            "accuracy/token": (logits.argmax(-1) == labels).float().mean(),
        }
        if pointed:
            report["pointing"] = self.pointing * torch.stack([loss for loss, _ in pointed]).mean()
            report["accuracy/pointing"] = torch.stack([right for _, right in pointed]).mean().detach()
        if self.grounding is not None:
            known = self._ground(batch, taps)
            report["grounding"] = self.grounding.weight * sum(v for name, v in known.items() if "/" not in name)
            report |= {name if "/" in name else f"loss/{name}": value.detach() for name, value in known.items()}
        return report

    def _hooks(self, batch: Batch, taps: dict, pointed: list) -> Iterable[RemovableHandle]:
        """What the next forward pass fills in.

        ``taps``: the hidden states after the layers where the heads read. ``pointed``: how little one head of two
        layers attends to where the answer is seen, and how often it does most of all. What a token of the answer is
        predicted from has to find the patch that says it; from the answers alone a small model learns slowly where to
        look.
        """
        layers = self.model.get_model().layers
        for depth in set(self.grounding.depths) if self.grounding else ():
            yield layers[depth - 1].register_forward_hook(
                lambda _, __, hidden, depth=depth: taps.__setitem__(depth, hidden)
            )

        def point(attention, args, kwargs, _):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            pointed.append(_points(attention, hidden, kwargs["position_embeddings"], batch))

        if self.pointing > 0 and len(batch.pointers):
            for depth in (len(layers) // 2, len(layers) * 3 // 4):
                yield layers[depth - 1].self_attn.register_forward_hook(point, with_kwargs=True)

    def _ground(self, batch: Batch, taps: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows, positions, targets = batch.grounding[:, 0], batch.grounding[:, 1], batch.grounding[:, 2:]
        # Every image stands before the questions, and takes more positions than its mark.
        more = (batch.ids == IMAGE_TOKEN_INDEX).sum(1) * (self.model.get_vision_tower().num_patches - 1)
        positions = positions + more[rows]
        return self.heads(*(taps[depth][rows, positions] for depth in self.grounding.depths), targets)

    def answer_logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predictions of all answers' tokens.

        Logits (A, V), float32, and of each token the label, the question (segment) and the row: (A,), int64.
        """
        device = batch.ids.device
        valid = batch.segments >= 0
        if len(batch.images):
            _, _, _, _, embeds, labels = self.model.prepare_inputs_labels_for_multimodal(
                batch.ids, None, valid, None, batch.labels, pixel_values(batch.images)
            )
            segments = _widened(batch, self.model.get_vision_tower().num_patches)
        else:
            embeds, labels, segments = self.model.get_model().embed_tokens(batch.ids), batch.labels, batch.segments
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else embeds.dtype
        mask, positions = packed_mask(segments, dtype)
        decoder = self.model.get_model()
        hidden = decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        rows, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        logits = self.model.lm_head(hidden[rows, positions]).float()
        return logits, labels[rows, positions + 1], segments[rows, positions + 1], rows


def _points(attention: nn.Module, hidden: torch.Tensor, positions: tuple, batch: Batch) -> tuple:
    """Of a layer's first head: minus the log share of the image's attention that goes to the right patches; hits."""
    patches, width = batch.patches.shape[1], attention.head_dim
    first = int((batch.ids[0] == IMAGE_TOKEN_INDEX).nonzero()[0])  # every row begins with the same prompt
    cos, sin = (part.expand(len(hidden), -1, -1) for part in positions)
    rows, places = batch.pointers[:, 0], batch.pointers[:, 1] + patches - 1
    image = slice(first, first + patches)
    query = F.linear(hidden[rows, places], attention.q_proj.weight[:width])  # (P, d)
    key = F.linear(hidden[:, image], attention.k_proj.weight[:width])  # (B, N, d)
    query = query * cos[rows, places] + rotate_half(query) * sin[rows, places]
    key = key * cos[:, image] + rotate_half(key) * sin[:, image]
    scores = torch.cat([query[rows == row] @ key[row].T for row in range(len(key))]).float() * width**-0.5  # (P, N)
    shares = scores.log_softmax(-1)
    loss = -shares.masked_fill(~batch.patches, -torch.inf).logsumexp(-1)
    return loss.mean(), batch.patches.gather(1, scores.argmax(-1, keepdim=True)).float().mean()


def _widened(batch: Batch, patches: int) -> torch.Tensor:
    """The segments after every image mark has become `patches` tokens: (B, T) -> (B, T')."""
    repeats = torch.where(batch.ids == IMAGE_TOKEN_INDEX, patches, 1)
    return torch.stack([row.repeat_interleave(times) for row, times in zip(batch.segments, repeats, strict=True)])
