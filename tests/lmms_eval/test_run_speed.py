"""What makes a run fast and must not change it: images prepared early, and encoded images that are remembered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval_otprune.models import llava as wrapper
from lmms_eval_otprune.models.llava import Llava
from lmms_eval_otprune.models.prefetch import prefetch
from PIL import Image

from llava.pruning import PruningConfig

SETTINGS = {"max_new_tokens": 4, "temperature": 0, "until": ["\n\n"], "do_sample": False}


def picture(seed: int) -> Image.Image:
    values = torch.randint(0, 256, (60, 80, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


# Seven questions about two pictures: one document shows both, one none.
DOCUMENTS = [
    {"question": f"What is {number} here?", "images": [picture(seed) for seed in seeds]}
    for number, seeds in enumerate(([0], [1], [0], [], [0, 1], [1], [0]))
]
SHOWN, DIFFERENT = 7, 2


def requests(images_of: Callable = lambda document: document["images"]) -> list[Instance]:
    return [
        Instance(
            "generate_until",
            (document["question"], SETTINGS, images_of, index, "looks", "test"),
            0,
            metadata={"task": "looks", "doc_id": index, "repeats": 1},
        )
        for index, document in enumerate(DOCUMENTS)
    ]


@pytest.fixture(scope="module")
def load(tiny_checkpoint) -> Callable[..., Llava]:
    def build(**arguments: Any) -> Llava:
        lm = Llava(pretrained=tiny_checkpoint("llava-v1.5-tiny"), **{"device": "cpu", **arguments})
        lm.task_dict["looks"] = {"test": DOCUMENTS}
        return lm

    return build


class TestPrefetch:
    def test_results_come_in_order_from_another_thread(self):
        found = list(prefetch(lambda item: (item * item, threading.current_thread().name), range(6)))
        assert [(item, square) for item, (square, _) in found] == [(item, item * item) for item in range(6)]
        assert {thread for _, (_, thread) in found} == {"prefetch_0"}

    def test_it_is_ahead_and_not_further_than_told(self):
        begun: list[int] = []
        results = prefetch(begun.append, range(10), depth=2)
        next(results)
        assert len(begun) <= 3
        next(results)
        assert 2 <= len(begun) <= 4
        results.close()
        assert len(begun) <= 4

    def test_an_error_comes_where_its_item_s_turn_comes(self):
        results = prefetch(lambda item: 1 // item, [2, 1, 0, 1])
        assert [next(results), next(results)] == [(2, 0), (1, 1)]
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_nothing_of_nothing(self):
        assert list(prefetch(str, [])) == []


class TestImagesPreparedEarly:
    def test_are_read_by_another_thread(self, load):
        readers = set()

        def images_of(document):
            readers.add(threading.current_thread())
            return document["images"]

        load(batch_size=2).generate_until(requests(images_of))
        assert readers and threading.main_thread() not in readers

    def test_give_the_answers_of_images_read_in_turn(self, load, monkeypatch):
        answers = load(batch_size=2).generate_until(requests())
        monkeypatch.setattr(wrapper, "prefetch", lambda work, items: ((item, work(item)) for item in items))
        assert load(batch_size=2).generate_until(requests()) == answers


class TestBatches:
    def test_of_a_cpu_are_of_prompts_of_one_length(self, load, monkeypatch):
        """Nothing is padded, and what is asked and answered stays the same."""
        lm, padded = load(batch_size=4), []
        pad = wrapper.pad_left
        monkeypatch.setattr(wrapper, "pad_left", lambda *given: padded.append(pad(*given)) or padded[-1])
        asked = [one for one in requests() if len(DOCUMENTS[one.doc_id]["images"]) == 1]
        assert lm.generate_until(asked) == load(batch_size=1).generate_until(asked)
        assert all(mask.all() for _, mask in padded)
        assert any(len(ids) > 1 for ids, _ in padded)


class Documents(list):
    """With a fingerprint of their content, as those of data sets."""

    _fingerprint = "seven"


class TestRowsInTurn:
    """Of several rows of a table, each a pruning configuration over the same questions."""

    METHODS = (None, "random", "otprune", "visionzip", "random:drop_duplicates=1")

    def test_what_was_asked_before_is_not_prepared_again(self, load, tmp_path):
        """But for a method that looks at the pixels, and one that wants of the encoder what is not stored."""
        read, configs = [], [name and PruningConfig.from_text(name, 0.5) for name in self.METHODS]

        def images_of(document):
            read.append(document)
            return document["images"]

        lm = load(batch_size=2, visual_cache_folder=str(tmp_path))
        lm.task_dict["looks"] = {"test": Documents(DOCUMENTS)}
        found, readings = [], []
        for config in configs * 2:
            lm.set_pruning(config)
            lm.start_run()
            found.append(lm.generate_until(requests(images_of)))
            readings.append(len(read))
            read.clear()
        plain = load(batch_size=2, visual_cache="off")
        for config, answers in zip(configs * 2, found, strict=True):
            plain.set_pruning(config)
            assert answers == plain.generate_until(requests())
        assert readings == [7, 0, 0, readings[3], 7, 0, 0, 0, 0, 7] and readings[3] >= 5

    def test_other_documents_under_the_same_name_are_read(self, load, tmp_path):
        lm = load(visual_cache_folder=str(tmp_path))
        lm.task_dict["looks"] = {"test": Documents(DOCUMENTS)}
        lm.generate_until(requests())
        others = Documents([{**document, "images": [picture(7)]} for document in DOCUMENTS])
        others._fingerprint = "others"
        lm.task_dict["looks"] = {"test": others}
        lm.generate_until(requests())
        assert lm.visual_cache_counts()["misses"] == DIFFERENT + 1

    def test_grey_images_share_the_beginning_of_their_prompts(self, load, monkeypatch):
        asked = [one for one in requests() if len(DOCUMENTS[one.doc_id]["images"]) == 1]
        prefills: list[int] = []
        lm, plain = (load(batch_size=3, grey_pictures=True) for _ in range(2))
        lm.model.register_forward_pre_hook(lambda *_: prefills.append(1))
        shared = lm.generate_until(asked), lm.visual_tokens
        monkeypatch.setattr(wrapper, "shared_beginning", lambda rows: None)
        assert shared == (plain.generate_until(asked), plain.visual_tokens)
        assert len(lm._begun) == 1 and not plain._begun

    def test_grey_images_are_seen_when_a_question_comes_again(self, load, tmp_path):
        lm = load(batch_size=3, grey_pictures=True, visual_cache_folder=str(tmp_path))
        lm.task_dict["looks"] = {"test": Documents(DOCUMENTS)}
        first = lm.generate_until(requests()), dict(lm._begun)
        lm.start_run(grey_pictures=True)
        assert lm.generate_until(requests()) == first[0]
        for cache, _ in lm._begun.values():
            assert all(layer.keys.isfinite().all() for layer in cache.layers)


class TestRememberedPictures:
    @pytest.mark.parametrize("batch_size", [1, 4])
    @pytest.mark.parametrize("method", ["ORIG", "OURS", "VISIONZIP"])
    def test_answers_are_those_of_a_run_without(self, load, monkeypatch, method, batch_size):
        monkeypatch.setenv("BASELINE", method)
        if method != "ORIG":
            monkeypatch.setenv("SUBSET_RATIO", "0.5")
        cached, plain = load(batch_size=batch_size), load(batch_size=batch_size, visual_cache="off")
        assert cached.generate_until(requests()) == plain.generate_until(requests())
        assert cached.visual_cache_counts() == {"hits": SHOWN - DIFFERENT, "misses": DIFFERENT}
        assert plain.visual_cache_counts() == {} and plain.model.visual_cache is None
        assert cached.visual_tokens == plain.visual_tokens

    def test_are_reported_to_lmms_eval(self, load, monkeypatch):
        reports = []
        monkeypatch.setattr(wrapper, "log_metrics", lambda **metrics: reports.append(metrics["additional_metrics"]))
        lm = load()
        lm.generate_until(requests())
        lm.generate_until(requests())
        first, again = reports
        assert first["encoding_latency"] > again["encoding_latency"] == 0
        assert [(report["visual_cache_hits"], report["visual_cache_misses"]) for report in reports] == [(5, 2), (7, 0)]

    def test_in_files_serve_another_process_and_another_method(self, load, monkeypatch, tmp_path):
        plain = load(visual_cache="off").generate_until(requests())
        first, again = (load(visual_cache_folder=str(tmp_path)) for _ in range(2))
        assert first.generate_until(requests()) == again.generate_until(requests()) == plain
        monkeypatch.setenv("BASELINE", "OURS")
        monkeypatch.setenv("SUBSET_RATIO", "0.5")
        pruned, half = load(visual_cache_folder=str(tmp_path)), load(visual_cache_folder=str(tmp_path), dtype="float16")
        assert pruned.generate_until(requests()) == load(visual_cache="off").generate_until(requests())
        half.generate_until(requests())
        assert [lm.visual_cache_counts()["misses"] for lm in (first, again, pruned, half)] == [
            DIFFERENT,
            0,
            0,
            DIFFERENT,
        ]

    @pytest.mark.parametrize("value", ["on", "-1", "1.5", "256MiB"])
    def test_a_wrong_size_is_refused(self, load, value):
        with pytest.raises(ValueError, match=f"visual_cache={value}: must be a whole number of bytes, or off"):
            load(visual_cache=value)
