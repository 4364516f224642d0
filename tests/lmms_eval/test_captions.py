"""Captions whose text holds line ends of other kinds than the one that the published scoring removes."""

from __future__ import annotations

from argparse import Namespace

import pytest
from lmms_eval_otprune.models import java
from lmms_eval_otprune.models.java import java_works
from lmms_eval_otprune.tasks import captions

from llava.benchmark_tasks import changes, definition
from llava.benchmarks import benchmark_of
from llava.eval.results.cider import cider_of_runs, one_line

LINE_ENDS = "\n\v\f\r\u2028\u2029"
GIVEN = [f"a red cube{end}on a table" for end in LINE_ENDS] + [
    "two dogs run",
    "a green ball\r\n",
    "\u0085a blue\x1cbox",
]
REFERENCES = [[f"a red cube{end}on a table", "the cube is red"] for end in reversed(LINE_ENDS)] + [
    ["two dogs run fast", "dogs"],
    ["\u2028a green ball", "one ball"],
    ["a blue box", "the box is blue"],
]
DOCUMENTS = {
    "coco2017_cap_val": lambda number, texts: {"question_id": f"x_{number}.jpg", "id": number, "answer": texts},
    "flickr30k_test": lambda number, texts: {"img_id": str(number), "caption": texts},
    "nocaps_val": lambda number, texts: {"image_id": number, "annotations_captions": texts},
}
needs_java = pytest.mark.skipif(not java_works(), reason="CIDEr is scored with Java")


def plain(text: str) -> str:
    for end in LINE_ENDS:
        text = text.replace(end, " ")
    return text


@pytest.mark.parametrize("task", DOCUMENTS)
def test_the_record_is_the_builtin_one_of_texts_on_one_line(task):
    for number, (given, texts) in enumerate(zip(GIVEN, REFERENCES, strict=True)):
        ours = changes(benchmark_of(task))["process_results"](DOCUMENTS[task](number, texts), [given])
        document = DOCUMENTS[task](number, [plain(text) for text in texts])
        assert ours == definition(benchmark_of(task))["process_results"](document, [plain(given)])


@needs_java
def test_the_metric_gives_each_caption_to_its_own_image(tmp_path):
    metrics = definition(benchmark_of("coco2017_cap_val"))["metric_list"]
    [score] = [metric["aggregation"] for metric in metrics if "CIDEr" in metric["metric"]]
    records = [
        captions.coco(DOCUMENTS["coco2017_cap_val"](number, texts), [given])["coco_CIDEr"]
        for number, (given, texts) in enumerate(zip(GIVEN, REFERENCES, strict=True))
    ]
    value = score(records, Namespace(output_path=str(tmp_path)))
    [scores] = cider_of_runs([(GIVEN, REFERENCES)])
    assert value == pytest.approx(sum(scores) / len(scores), abs=1e-6)
    assert value > 2


@needs_java
def test_the_scores_of_single_images_are_those_of_texts_on_one_line():
    flat = [plain(text) for text in GIVEN], [[plain(text) for text in texts] for texts in REFERENCES]
    first, second = cider_of_runs([(GIVEN, REFERENCES), flat])
    assert first == second
    assert one_line("a\u0085b") == "a\u0085b"


def test_captions_are_tokenised_once(monkeypatch):
    given: list[dict] = []

    class Tokenizer:
        def tokenize(self, captions):
            given.append(captions)
            return {image: [one["caption"].lower() for one in several] for image, several in captions.items()}

    monkeypatch.setattr("pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer", Tokenizer)
    java.remember_tokens()
    first, other = {1: [{"caption": "A dog"}, {"caption": "Dogs"}]}, {1: [{"caption": "A cat"}]}
    for _ in range(2):
        found = Tokenizer().tokenize(first)
        assert found == {1: ["a dog", "dogs"]}
        found[1].clear()
    assert Tokenizer().tokenize(other) == {1: ["a cat"]} and given == [first, other]
