"""The tokenizer gives the ids that the checkpoints were trained on, from every form it may be stored in."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import subprocess
import sys

import pytest
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from golden import golden_root
from llava.mm_utils import tokenizer_image_token
from llava.model import checkpoint as checkpoint_module
from llava.model.tokenizer import load_tokenizer

ROOT = golden_root() / "llava"
GOLDEN = json.loads((ROOT / "mm_utils/tokenizer_image_token.json").read_text())
CHECKPOINTS = sorted({case["checkpoint"] for case in GOLDEN["plain_encode"]})
WORDS = ["a", "cat", "and", "seven", "bicycles", "are", "parked", "in", "front", "of", "the", "old", "library", "near"]


def checkpoint(name: str = "llava-v1.5-tiny"):
    folder = ROOT / "checkpoints" / name
    if not (folder / "tokenizer.model").exists():
        pytest.skip(f"the small copy of the golden data has no tokenizer of {name}")
    return folder


def cases(kind: str, name: str) -> list[dict]:
    return [case for case in GOLDEN[kind] if case["checkpoint"] == name]


def copy_of(name: str, folder):
    for file in checkpoint(name).iterdir():
        if "token" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change(folder, file: str, **values) -> None:
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**content, **values}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A SentencePiece model with the given training options, in a folder of its own; trained once each."""
    root = tmp_path_factory.mktemp("sentencepiece")
    generator = random.Random(0)
    lines = ["  ".join(generator.choices(WORDS, k=9)) + generator.choice(["", ".", "?", " (1, 2)"]) for _ in range(400)]
    (root / "corpus.txt").write_text("\n".join(lines))

    def train(**options):
        folder = root / "-".join([str(value).strip("<>[]'").lower() for value in options.values()] or ["plain"])
        if not folder.exists():
            folder.mkdir()
            defaults = {
                "model_type": "bpe", "vocab_size": 360, "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False, "num_threads": 1, "minloglevel": 2,
            }  # fmt: skip
            SentencePieceTrainer.train(
                input=str(root / "corpus.txt"), model_prefix=str(folder / "tokenizer"), **{**defaults, **options}
            )
        return folder

    return train


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_ids_and_texts_of_the_original(name):
    tokenizer = load_tokenizer(checkpoint(name))
    assert isinstance(tokenizer, LlamaTokenizer)
    for case in cases("plain_encode", name):
        assert tokenizer(case["text"]).input_ids == case["input_ids"], case["text"]
        if "no_special" in case:
            assert tokenizer.encode(case["text"], add_special_tokens=False) == case["no_special"]
        if "decode" in case:
            assert tokenizer.decode(case["input_ids"]) == case["decode"]
            assert tokenizer.decode(case["input_ids"], skip_special_tokens=True) == case["decode_skip"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_facts_of_the_original(name):
    tokenizer = load_tokenizer(checkpoint(name))
    file = ROOT / "load" / f"{name}.json"
    if not file.exists():
        pytest.skip(f"the small copy of the golden data has no {file.name}")
    facts = json.loads(file.read_text())
    assert isinstance(tokenizer, getattr(transformers, facts["tokenizer_class"]))
    assert len(tokenizer) == facts["tokenizer_len"]
    assert {key: getattr(tokenizer, f"{key}_token_id") for key in facts["tokenizer_ids"]} == facts["tokenizer_ids"]
    assert tokenizer.padding_side == facts["padding_side"]
    assert tokenizer.model_max_length == facts.get("model_max_length", tokenizer.model_max_length)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in facts["added_token_ids"]} == facts[
        "added_token_ids"
    ]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("way", ["saved", "saved twice", "pickled", "copied"])
def test_round_trips_keep_every_id(name, way, tmp_path):
    tokenizer = load_tokenizer(checkpoint(name))
    if way == "pickled":
        again = pickle.loads(pickle.dumps(tokenizer))
    elif way == "copied":
        again = copy.deepcopy(tokenizer)
    else:
        tokenizer.save_pretrained(tmp_path / "once")
        again = load_tokenizer(tmp_path / "once")
        if way == "saved twice":
            again.save_pretrained(tmp_path / "twice")
            again = load_tokenizer(tmp_path / "twice")
    assert len(again) == len(tokenizer)
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert (again.padding_side, again.model_max_length) == (tokenizer.padding_side, tokenizer.model_max_length)
    for case in cases("plain_encode", name):
        assert again(case["text"]).input_ids == case["input_ids"]
    for case in cases("cases", name):
        assert tokenizer_image_token(case["prompt"], again, case["image_token_index"]) == case["input_ids"]


def test_arguments_override_the_checkpoint():
    tokenizer = load_tokenizer(str(checkpoint()), padding_side="left", model_max_length=77)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)


def test_without_configuration_the_legacy_convention_and_llamas_names_hold(tmp_path):
    folder = copy_of("llava-v1.5-tiny", tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.padding_side == "right"
    legacy = load_tokenizer(checkpoint("llava-v1-tiny-imse"))
    text = "one</s> two"
    assert tokenizer(text).input_ids == legacy(text).input_ids != load_tokenizer(checkpoint())(text).input_ids


def test_added_tokens_are_found_inside_a_text_and_skipped_when_decoding():
    tokenizer = load_tokenizer(checkpoint("llava-v1-tiny-imse"))
    ids = tokenizer("the <im_start><im_patch><im_end> cat", add_special_tokens=False).input_ids
    assert [index for index in ids if index >= 1000] == [1001, 1000, 1002]
    assert "im_" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_adding_an_added_token_again_changes_nothing():
    tokenizer = load_tokenizer(checkpoint("llava-v1-tiny-imse"))
    assert tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True) == 0
    assert len(tokenizer) == 1003


def test_additional_special_tokens_are_special(tmp_path):
    folder = copy_of("llava-v1.5-tiny", tmp_path)
    change(folder, "added_tokens.json", **{"<ad>": 1000, "<pad>": 1001})
    change(folder, "special_tokens_map.json", pad_token="<pad>", additional_special_tokens=["<ad>"])
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<ad>")) == (1001, 1000)
    assert tokenizer.decode(tokenizer("a cat<ad>").input_ids, skip_special_tokens=True) == "a cat"


def test_added_tokens_that_do_not_fit_the_vocabulary_are_refused(tmp_path):
    folder = copy_of("llava-v1.5-tiny", tmp_path)
    change(folder, "added_tokens.json", **{"<im_patch>": 32000})
    with pytest.raises(ValueError, match=r"'<im_patch>' must have id 32000.*gets 1000"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("newer", "expected"), [(False, "</s>"), (True, "<s>")], ids=["older", "newer"])
def test_special_tokens_map_rules_over_an_older_configuration_only(newer, expected, tmp_path):
    folder = copy_of("llava-v1.5-tiny", tmp_path)
    change(folder, "tokenizer_config.json", pad_token="<s>", **({"added_tokens_decoder": {}} if newer else {}))
    change(folder, "special_tokens_map.json", pad_token="</s>")
    assert load_tokenizer(folder).pad_token == expected


def test_a_reserved_piece_may_be_given_a_name(tmp_path):
    folder = copy_of("llava-v1.5-tiny", tmp_path)
    token = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False, "special": True}
    change(folder, "tokenizer_config.json", added_tokens_decoder={"2": token}, eos_token="<|im_end|>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == 2
    assert tokenizer("cat<|im_end|>").input_ids[-1] == 2


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "newer"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<sep>", "<sep>>"]},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "<|im_end|>"]},
    ],
    ids=["plain", "no_dummy_space", "symbols", "symbols_and_no_dummy_space"],
)
def test_plain_text_is_encoded_as_sentencepiece_encodes_it(trained, options, legacy):
    folder = trained(**options)
    change(folder, "tokenizer_config.json", legacy=legacy)
    tokenizer = load_tokenizer(folder)
    sentencepiece = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    adds_space = options.get("add_dummy_prefix", True)
    symbols = options.get("user_defined_symbols", [])
    generator = random.Random(1)
    for _ in range(300):
        joined = generator.choice(["", " ", "  "]) + generator.choice([" ", "  ", "\n", ""]).join(
            generator.choices(
                [*WORDS, "é", "漢字", "\t", "5.67", "▁", "Zz", *symbols, *symbols], k=generator.randint(1, 12)
            )
        )
        # The newer convention adds the dummy space itself, whatever the file says.
        expected = sentencepiece.encode(joined if adds_space or legacy else "▁" + joined)
        assert tokenizer(joined, add_special_tokens=False).input_ids == expected, repr(joined)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "hard_vocab_limit": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_sentencepiece_models_are_refused_instead_of_giving_other_ids(trained, options):
    folder = trained(**options)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a Llama tokenizer"):
        load_tokenizer(folder)


def test_symbols_survive_saving(trained, tmp_path):
    tokenizer = load_tokenizer(trained(user_defined_symbols=["<sep>", "<sep>>"]))
    tokenizer.save_pretrained(tmp_path)
    text = "<sep>a cat<sep>> <sep>"
    assert load_tokenizer(tmp_path)(text).input_ids == tokenizer(text).input_ids
    assert tokenizer.convert_tokens_to_ids("<sep>>") in tokenizer(text).input_ids


def test_a_pipeline_stored_as_json_is_used_as_it_is(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6}
    pipeline = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace()
    pipeline.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=pipeline, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        add_bos_token=True, model_max_length=64, padding_side="left",
    )  # fmt: skip
    fast.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("ab").input_ids == fast("ab").input_ids == [1, 6, 5]
    assert tokenizer_image_token("ab<image>\na", tokenizer) == [1, 6, 5, -200, 3, 0, 4]
    assert (tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.model_max_length) == (0, "left", 64)


def test_json_alone_gets_llamas_names(tmp_path):
    load_tokenizer(checkpoint()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    case = cases("cases", "llava-v1.5-tiny")[5]
    assert tokenizer_image_token(case["prompt"], tokenizer) == case["input_ids"]


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs"], ids=["empty", "html", "pointer"])
def test_a_damaged_sentencepiece_file_is_named(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_truncated_sentencepiece_file_is_named(tmp_path):
    data = (checkpoint() / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"], ids=repr)
def test_a_damaged_json_pipeline_is_named(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json that can be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["{", "[1]"], ids=repr)
def test_a_damaged_configuration_is_named(file, content, tmp_path):
    folder = copy_of("llava-v1.5-tiny", tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        load_tokenizer(folder)


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(OSError, match="There is no checkpoint folder"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is a file"):
        load_tokenizer(tmp_path / "file")


def test_a_hub_id_is_fetched_into_the_cache_and_read_from_there(monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(checkpoint())

    monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot_download)
    tokenizer = load_tokenizer("liuhaotian/llava-v1.5-7b", revision="main", cache_dir="cache")
    assert tokenizer("a").input_ids == load_tokenizer(checkpoint())("a").input_ids
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("liuhaotian/llava-v1.5-7b", "main", "cache")
    assert {"tokenizer.model", "tokenizer_config.json", "added_tokens.json"} <= set(asked["allow_patterns"])
    assert not any("weight" in pattern or "*" in pattern for pattern in asked["allow_patterns"])


def test_reading_needs_no_protobuf():
    script = (
        "import sys; sys.modules['google.protobuf'] = None; "
        "from llava.model.tokenizer import load_tokenizer; "
        f"print(load_tokenizer({str(checkpoint())!r})('the image').input_ids)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == load_tokenizer(checkpoint())("the image").input_ids
