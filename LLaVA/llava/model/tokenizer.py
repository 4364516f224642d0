"""The tokenizer of a LLaVA checkpoint, with exactly the ids that the checkpoint was trained on.

``AutoTokenizer`` does not give them: on a folder whose configuration says ``model_type: llava`` it drops the dummy
space before a text, and transformers' own conversion of ``tokenizer.model`` treats a leading space differently
from the SentencePiece code that training used. So the ``tokenizers`` pipeline is put together here: vocabulary and
merges from ``tokenizer.model``, read by SentencePiece itself, and the normaliser that reproduces either of the two
published conventions (``legacy`` in ``tokenizer_config.json``).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.model.checkpoint import fetch, read_json, refuse_paths

FILES = [
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]
SPACE = "▁"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Encoded by SentencePiece and by the pipeline built from its file; they have to agree. Spaces at both ends and in
# pairs, line ends, ligatures and wide letters are where conventions differ.
PROBES = ("What is shown in the image?", " two  spaces ", "line\n\nbreak\ttab", "1234 5.67 é 漢字 ﬁ \uff21", " now")


def load_tokenizer(
    path: str | os.PathLike, *, padding_side: str | None = None, model_max_length: int | None = None, **hub: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Read are ``tokenizer.model`` or, where there is none, ``tokenizer.json``; ``tokenizer_config.json``,
    ``special_tokens_map.json`` and ``added_tokens.json`` if they exist. No code from the checkpoint runs.

    Parameters
    ----------
    path : str or path
        A folder, or a Hub id ("owner/name").
    padding_side : {None, "left", "right"}
        Overrides the checkpoint's; "right" if neither says.
    model_max_length : int, optional
        In tokens; overrides the checkpoint's.
    **hub
        For a Hub id: ``revision``, ``cache_dir`` and so on, as in ``huggingface_hub``.

    Returns
    -------
    LlamaTokenizer or PreTrainedTokenizerFast
        The former from ``tokenizer.model``; the latter from ``tokenizer.json``, whose pipeline is used as it is.
        ``save_pretrained`` writes ``tokenizer.json``; loading that gives the same ids.

    Raises
    ------
    OSError
        If there is no such folder or checkpoint on the Hub, or it has no tokenizer.
    ValueError
        If a file cannot be parsed, or is not the kind of tokenizer that Llama uses.
    """
    path = os.fspath(path)
    folder = Path(path)
    if not folder.is_dir():
        refuse_paths(path)
        folder = fetch(path, hub, FILES)
    sentencepiece_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if not sentencepiece_file.is_file() and not json_file.is_file():
        raise FileNotFoundError(f"{path!r} has no tokenizer: neither tokenizer.model nor tokenizer.json is there")

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    config = read("tokenizer_config.json")
    options = _named_tokens(config, read("special_tokens_map.json"))
    for key in ("add_bos_token", "add_eos_token", "chat_template", "truncation_side", "use_default_system_prompt"):
        if config.get(key) is not None:
            options[key] = config[key]
    options["padding_side"] = padding_side or config.get("padding_side") or "right"
    options["model_max_length"] = model_max_length or config.get("model_max_length")
    options["name_or_path"] = path
    if not sentencepiece_file.is_file():
        return _from_json(str(json_file), options)
    added = _added_tokens(config, read("added_tokens.json"))
    # A file without the key comes from before the key existed, when only the legacy convention did.
    return _from_sentencepiece(str(sentencepiece_file), added, options, legacy=config.get("legacy") is not False)


def _token(value: str | dict[str, Any], special: bool = True) -> AddedToken:
    """A token that is found in the text as it was typed, before spaces are turned into ``▁``."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=special)
    flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(value["content"], normalized=False, special=special, **flags)


def _added_tokens(config: dict[str, Any], added_tokens: dict[str, int]) -> dict[int, AddedToken]:
    tokens = {index: _token(content) for content, index in added_tokens.items()}
    for index, value in config.get("added_tokens_decoder", {}).items():
        tokens[int(index)] = _token(value, special=bool(value.get("special", False)))
    return dict(sorted(tokens.items()))


def _named_tokens(config: dict[str, Any], special_tokens_map: dict[str, Any]) -> dict[str, Any]:
    """``bos_token`` and the others; where both files name one, ``special_tokens_map.json`` is the older and rules.

    Unless ``tokenizer_config.json`` is of the newer kind, which holds every added token.
    """
    order = [config, special_tokens_map] if "added_tokens_decoder" not in config else [special_tokens_map, config]
    found = {key: value for source in order for key, value in source.items() if value is not None}
    named: dict[str, Any] = {key: _token(found[key]) for key in NAMED_TOKENS if key in found}
    extra = found.get("extra_special_tokens") or found.get("additional_special_tokens") or []
    if isinstance(extra, list) and extra:
        named["extra_special_tokens"] = [_token(value) for value in extra]
    return named


def _from_sentencepiece(
    file: str, added: dict[int, AddedToken], options: dict[str, Any], *, legacy: bool
) -> LlamaTokenizer:
    processor = SentencePieceProcessor()
    try:
        processor.Load(file)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} is not a SentencePiece model, or a truncated one") from error
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    for index, token in added.items():
        # A checkpoint may give a reserved piece a name of its own; in text, that name counts.
        if index < len(pieces) and token.content not in pieces:
            pieces[index] = token.content
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=_merges(processor, vocabulary),
        legacy=legacy,
        added_tokens_decoder=added,
        **{key: _token(text) for key, text in LLAMA_TOKENS.items() if key not in options},
        **{"add_bos_token": True, "add_eos_token": False, **options},
    )
    backend = tokenizer.backend_tokenizer
    # The newer convention puts a dummy space in front itself; the legacy one leaves that to SentencePiece.
    adds_space = processor.normalize("a").startswith(SPACE)
    _set_space_convention(backend, legacy, dummy_space=adds_space or not legacy)
    front = "" if adds_space or legacy else SPACE

    def differs(text: str) -> bool:
        return tokenizer(text, add_special_tokens=False).input_ids != processor.encode(front + text)

    symbols = sorted(filter(differs, _unscored(processor) - set(tokenizer.get_added_vocab())))
    if symbols:
        _keep_whole(backend, symbols)
    _check_added(file, tokenizer, added)
    for text in (*PROBES, *symbols):
        if differs(text):
            raise ValueError(
                f"{file} is not a Llama tokenizer (byte-pair encoding, text neither normalised nor stripped): "
                f"for {text!r}, its own ids and those of the pipeline built from it differ"
            )
    return tokenizer


def _is_text(processor: SentencePieceProcessor, index: int) -> bool:
    not_text = (processor.is_unknown, processor.is_control, processor.is_byte, processor.is_unused)
    return not any(kind(index) for kind in not_text)


def _merges(processor: SentencePieceProcessor, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best piece first.

    SentencePiece joins the neighbours whose union has the highest score; a merge list says the same by its order.
    Reading the file this way needs no protobuf package, whose versions often clash.
    """
    text = {piece: index for piece, index in vocabulary.items() if _is_text(processor, index)}
    ranked = []
    for piece, index in text.items():
        score = processor.get_score(index)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in text and right in text:
                ranked.append((-score, index, text[left], text[right], (left, right)))
    return [merge for *_, merge in sorted(ranked)]


def _unscored(processor: SentencePieceProcessor) -> set[str]:
    """Pieces of text without a score: symbols that SentencePiece never takes apart, and the first merge."""
    unscored = (index for index in range(processor.get_piece_size()) if processor.get_score(index) == 0)
    return {processor.id_to_piece(index) for index in unscored if _is_text(processor, index)}


def _keep_whole(backend: Tokenizer, symbols: list[str]) -> None:
    """Cut the text around symbols that no merges lead to, and look each up as a whole."""
    longest_first = sorted(symbols, key=len, reverse=True)
    cut = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated")
    before = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])
    backend.model.ignore_merges = True


def _set_space_convention(backend: Tokenizer, legacy: bool, dummy_space: bool) -> None:
    """Turn spaces into ``▁``, and put one in front where training did.

    Legacy: before every stretch of text between added tokens. Newer: before the whole text only, even if it
    begins with a space already.
    """
    replace = normalizers.Replace(" ", SPACE)
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if dummy_space else replace
        backend.pre_tokenizer = None
        return
    backend.normalizer = replace
    # After the replacement no text begins with a plain space, so the first step always adds one; the second turns
    # it into the mark that the vocabulary uses.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
        ]
    )


def _check_added(file: str, tokenizer: PreTrainedTokenizerBase, added: dict[int, AddedToken]) -> None:
    for index, token in added.items():
        found = tokenizer.convert_tokens_to_ids(token.content)
        if found != index:
            raise ValueError(
                f"added token {token.content!r} must have id {index}, but with {file} it gets {found}: "
                "the two files do not belong together"
            )


def _from_json(file: str, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    try:
        backend = Tokenizer.from_file(file)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file} is not a tokenizer.json that can be read: {error}") from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for key, text in LLAMA_TOKENS.items():
        if key not in options and text in vocabulary:
            options[key] = _token(text)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)
