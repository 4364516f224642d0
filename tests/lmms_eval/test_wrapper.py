"""The lmms-eval model: prompts, batches, pictures, answers on disk, and wrong values."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval_otprune.models import llava as wrapper
from lmms_eval_otprune.models import prompts
from lmms_eval_otprune.models.answers import Answer, AnswerLog, Question
from lmms_eval_otprune.models.llava import Llava
from lmms_eval_otprune.models.settings import GenerationSettings
from lmms_eval_otprune.models.token_counts import ImageCount, PromptCount
from PIL import Image

from llava.mm_utils import tokenizer_image_token
from llava.pruning import pruning

SHORT = {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"], "do_sample": False}


def picture(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# Pictures a document: one, none, two, one, ...
DOCUMENTS = [
    {
        "question": f"What is in the picture{' really' * (index % 4)}?",
        "images": [picture(10 * index + n) for n in range(count)],
    }
    for index, count in enumerate((1, 0, 2, 1, 1, 0, 1, 1, 2))
]


def requests(
    task: str = "looks", settings: dict[str, Any] = SHORT, documents: list[dict] = DOCUMENTS
) -> list[Instance]:
    return [
        Instance(
            "generate_until",
            (document["question"], settings, lambda doc: doc["images"], index, task, "test"),
            0,
            metadata={"task": task, "doc_id": index, "repeats": 1},
        )
        for index, document in enumerate(documents)
    ]


@pytest.fixture(scope="module")
def load(tiny_checkpoint) -> Callable[..., Llava]:
    def build(name: str = "llava-v1.5-tiny", **arguments: Any) -> Llava:
        lm = Llava(pretrained=tiny_checkpoint(name), **{"device": "cpu", **arguments})
        lm.task_dict["looks"] = {"test": DOCUMENTS}
        return lm

    return build


@pytest.fixture
def pruned(monkeypatch) -> None:
    monkeypatch.setenv("BASELINE", "OURS")
    monkeypatch.setenv("SUBSET_RATIO", "0.5")
    monkeypatch.setenv("LAYER_INDEX", "0")


def images(lm: Llava, task: str = "looks") -> list[ImageCount]:
    """The images of a task's prompts."""
    return [image for prompt in lm.visual_tokens[task].elements() for image in prompt.images]


def texts(results: list) -> list[str]:
    return [result.text if isinstance(result, GenerationResult) else result for result in results]


class TestAnswers:
    @pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-vicuna-tiny"])
    @pytest.mark.parametrize("switch", ["unpruned", "pruned"])
    def test_do_not_depend_on_the_batch_size(self, load, name, switch, request):
        if switch == "pruned":
            request.getfixturevalue("pruned")
        one = load(name, batch_size=1).generate_until(requests())
        eight = load(name, batch_size="8").generate_until(requests())
        assert texts(one) == texts(eight)
        assert [result.token_counts for result in one] == [result.token_counts for result in eight]

    def test_of_a_batch_keep_to_their_own_task_and_settings(self, load):
        lm = load(batch_size=4)
        lm.task_dict["words"] = {"test": [{"question": "Say it.", "images": [picture(99)]}]}
        alone = requests("words", {**SHORT, "max_new_tokens": 3}, lm.task_dict["words"]["test"])
        together = lm.generate_until([*requests(), *alone])
        assert texts(together) == texts(lm.generate_until(requests())) + texts(lm.generate_until(alone))
        assert together[-1].token_counts.output_tokens <= 3

    def test_to_grey_pictures_do_not_depend_on_the_pictures(self, load):
        lm = load(grey_pictures=True)
        lm.task_dict["looks"] = {"test": [{**DOCUMENTS[0], "images": [picture(number)]} for number in (0, 40, 80)]}
        blind = texts(lm.generate_until(requests(documents=lm.task_dict["looks"]["test"])))
        assert len(set(blind)) == 1
        assert lm.model_fingerprint != load().model_fingerprint

    def test_report_text_and_kept_visual_tokens(self, load, pruned):
        lm = load()
        results = lm.generate_until(requests())
        assert images(lm) == [ImageCount(16, ((3, 8),))] * sum(len(document["images"]) for document in DOCUMENTS)
        assert lm.visual_tokens["looks"].total() == len(DOCUMENTS)
        one_picture, none = results[0].token_counts, results[1].token_counts
        assert none.input_tokens > 8
        assert one_picture.input_tokens > 8
        assert all(1 <= result.token_counts.output_tokens <= 6 for result in results)

    @pytest.mark.parametrize(
        ("switch", "runs"),
        [
            ({"BASELINE": "RANDOM", "SUBSET_RATIO": "0.25", "LAYER_INDEX": "2"}, ((2, 16), (1, 4))),
            ({"BASELINE": "VTW", "LAYER_INDEX": "1"}, ((1, 16), (2, 0))),
            ({"BASELINE": "PYRAMIDDROP", "PYRAMIDDROP_SCHEDULE": "published"}, ((1, 16), (1, 8), (1, 4))),
        ],
        ids=["at a layer", "withdrawn", "at several layers"],
    )
    def test_report_what_each_decoder_layer_saw(self, load, monkeypatch, switch, runs):
        unpruned = load().generate_until(requests())
        for name, value in switch.items():
            monkeypatch.setenv(name, value)
        lm = load(batch_size=2)
        results = lm.generate_until(requests())
        assert images(lm) == [ImageCount(16, runs)] * 9
        # All visual tokens enter the decoder.
        assert [r.token_counts.input_tokens for r in results] == [r.token_counts.input_tokens for r in unpruned]

    def test_report_what_leaves_behind_a_layers_attention(self, load, monkeypatch, tmp_path):
        recipe = {"format": 1, "model": {"layers": 3, "visual_tokens": 16}, "tokens": 16, "deleted": [5, 4, 3]}
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        monkeypatch.setenv("BASELINE", "FITPRUNE")
        monkeypatch.setenv("FITPRUNE_RECIPE", str(tmp_path / "recipe.json"))
        lm = load(batch_size=2)
        lm.generate_until(requests())
        assert images(lm) == [ImageCount.of(16, (16, 11, 7), 1, (11, 7, 4))] * 9

    def test_report_the_crops_that_the_tower_saw(self, load):
        lm = load("llava-v1.6-vicuna-tiny")
        lm.generate_until(requests()[:1])
        [image] = images(lm)
        pixels = lm._pixels(DOCUMENTS[0]["images"], lm.config)
        assert image.crops == len(pixels[0]) > 1
        assert image.kept == image.total > 16

    def test_report_the_text_apart_from_the_pictures(self, load, pruned):
        lm = load()
        lm.generate_until(requests()[:1])
        row = prompts.make_row(
            lm.tokenizer, prompts.conversation("vicuna_v1", DOCUMENTS[0]["question"], 1), DOCUMENTS[0]["images"]
        )
        assert lm.visual_tokens["looks"] == {PromptCount(len(row.input_ids) - 1, (ImageCount(16, ((3, 8),)),)): 1}

    def test_give_lmms_eval_tokens_by_layer_and_costs(self, load, monkeypatch):
        reports = []
        monkeypatch.setattr(wrapper, "log_metrics", lambda **metrics: reports.append(metrics["additional_metrics"]))
        for name, value in {"BASELINE": "RANDOM", "SUBSET_RATIO": "0.25", "LAYER_INDEX": "2"}.items():
            monkeypatch.setenv(name, value)
        load().generate_until(requests()[:1])
        [report] = reports
        assert (report["visual_tokens"], report["kept_visual_tokens"]) == (16, 12)
        assert (report["visual_tokens_from_layer_0"], report["visual_tokens_from_layer_2"]) == (16, 4)
        assert 0.5 < report["flops_ratio_literature"] < report["flops_ratio_exact"] < 1

    def test_of_padding_are_empty_and_cost_nothing(self, load):
        lm = load()
        padding = requests()[0]
        padding.metadata["__padding_only__"] = True
        assert texts(lm.generate_until([padding])) == [""]
        assert not lm.visual_tokens

    def test_leave_the_task_s_settings_as_they_are(self, load):
        settings = dict(SHORT)
        load().generate_until(requests(settings=settings))
        assert settings == SHORT

    def test_of_the_second_repeat_are_asked_for_again(self, load):
        asked = [*requests()[:1], *requests()[:1]]
        first, second = load().generate_until(asked)
        assert first == second

    def test_a_prompt_with_more_marks_than_images_is_refused(self, load):
        lm = load()
        lm.task_dict["looks"] = {"test": [{"question": "<image> and <image>?", "images": [picture(1)]}]}
        with pytest.raises(ValueError, match="looks, document 0: the prompt has 2 <image> marks, but there are 1"):
            lm.generate_until(requests(documents=lm.task_dict["looks"]["test"]))

    @pytest.mark.parametrize(
        ("images_of", "reason"),
        [
            (lambda document: [Image.open(io.BytesIO(b"no image"))], "UnidentifiedImageError: cannot identify"),
            (lambda document: [document["image"]], "KeyError: 'image'"),
            (lambda document: ["image.png"], "AttributeError: 'str' object has no attribute 'load'"),
        ],
        ids=["no image", "missing", "path"],
    )
    def test_an_image_that_cannot_be_read_is_named_with_its_document(self, load, images_of, reason):
        [asked] = requests()[3:4]
        asked.arguments = (*asked.arguments[:2], images_of, *asked.arguments[3:])
        with pytest.raises(ValueError, match=rf"looks, document 3: its images cannot be read \({reason}"):
            load().generate_until([*requests()[:3], asked])

    def test_a_surplus_image_is_not_taken_for_the_next_row_s(self, load):
        surplus = [
            {"question": "<image>\nWhat?", "images": [picture(1), picture(2)]},
            {"question": "What?", "images": [picture(3)]},
        ]
        lm = load(batch_size=2)
        lm.task_dict["looks"] = {"test": surplus}
        together = texts(lm.generate_until(requests(documents=surplus)))
        surplus[0]["images"].pop()
        assert together == texts(lm.generate_until(requests(documents=surplus)))


class TestPrompts:
    def test_are_the_builtin_wrapper_s(self, load, tiny_checkpoint, monkeypatch):
        from lmms_eval.models.simple import llava as builtin

        seen: dict[str, list[str]] = {"ours": [], "theirs": []}
        for name, module in (("ours", prompts), ("theirs", builtin)):
            tokenize = module.tokenizer_image_token
            monkeypatch.setattr(
                module,
                "tokenizer_image_token",
                lambda prompt, *rest, _name=name, _tokenize=tokenize, **more: (
                    seen[_name].append(prompt) or _tokenize(prompt, *rest, **more)
                ),
            )
        load().generate_until(requests())
        theirs = builtin.Llava(pretrained=tiny_checkpoint(), device="cpu", device_map="auto")
        theirs.task_dict["looks"] = {"test": DOCUMENTS}
        # It takes a row's settings apart, so every row gets its own.
        with_images = [r for r in requests(settings=dict(SHORT)) if DOCUMENTS[r.doc_id]["images"]]
        monkeypatch.setattr(theirs.model, "generate", lambda ids, **_: ids[:, :1].clamp(min=3))
        for request in with_images:
            theirs.generate_until([request])
        text_only = [prompt for prompt in seen["ours"] if "<image>" not in prompt]
        assert len(text_only) == 2
        assert sorted(seen["ours"]) == sorted([*seen["theirs"], *text_only])

    def test_name_every_picture_once(self):
        assert "USER: <image> <image>\nWhat? ASSISTANT:" in prompts.conversation("vicuna_v1", "What?", 2)
        assert prompts.conversation("vicuna_v1", "See <image>?", 1).count("<image>") == 1
        assert "<image>" not in prompts.conversation("vicuna_v1", "What?", 0)
        marked = prompts.conversation("llava_v0", "<image> or <image>?", 2, mark="<im_start><image><im_end>")
        assert "Human: <im_start><image><im_end> or <im_start><image><im_end>?###" in marked

    @pytest.mark.parametrize(
        ("name", "template", "prompt"),
        [
            ("llava-v1.6-mistral-tiny", "mistral_instruct", "[INST] <image>\nWhat? [/INST]"),
            ("llava-v1-tiny-imse", "vicuna_v1", "USER: <im_start><image><im_end>\nWhat? ASSISTANT:"),
        ],
    )
    def test_are_written_as_the_checkpoint_was_trained(self, load, name, template, prompt):
        lm = load(name)
        row = lm._row(Question("looks", "test", 0, 0, "What?", SHORT), DOCUMENTS[0]["images"])
        assert lm.conv_template == template and prompt in lm._conversation("What?", 1)
        assert row.input_ids.tolist() == tokenizer_image_token(lm._conversation("What?", 1), lm.tokenizer)

    def test_are_written_as_told(self, load):
        lm = load("llava-v1.5-tiny", conv_template="llava_v0")
        assert lm.conv_template == "llava_v0" and "Human: <image>\nWhat?###" in lm._conversation("What?", 1)
        assert lm.model_fingerprint != load("llava-v1.5-tiny").model_fingerprint


class TestLikelihood:
    def request(self, candidate: str) -> Instance:
        return Instance(
            "loglikelihood",
            ("What is it?", candidate, lambda doc: doc["images"], 0, "looks", "test"),
            0,
            metadata={"task": "looks", "doc_id": 0, "repeats": 1},
        )

    def test_is_the_model_s_own_loss_of_the_answer(self, load):
        lm = load()
        [(loss, greedy)] = lm.loglikelihood([self.request("a dog")])
        question = prompts.conversation("vicuna_v1", "What is it?", 1)
        whole = prompts.conversation("vicuna_v1", "What is it?", 1, "a dog")
        row = prompts.make_row(lm.tokenizer, whole, DOCUMENTS[0]["images"])
        ids = row.input_ids[None]
        labels = ids.clone()
        labels[0, : len(prompts.make_row(lm.tokenizer, question, DOCUMENTS[0]["images"]).input_ids)] = -100
        with torch.inference_mode():
            pixels = lm._pixels(DOCUMENTS[0]["images"], lm.config)
            expected = lm.model(input_ids=ids, labels=labels, images=pixels, image_sizes=[(80, 60)]).loss
        assert loss == pytest.approx(float(expected), rel=1e-5)
        assert isinstance(greedy, bool)

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("fastv", {"ratio": 0.3, "layer": 1}),
            ("pyramiddrop", {"ratio": 0.6}),
            ("sparsevlm", {"ratio": 0.6}),
            ("cdpruner", {"ratio": 0.3, "relevance": "embeddings"}),
        ],
    )
    def test_every_candidate_is_read_beside_the_same_visual_tokens(self, load, monkeypatch, method, options):
        lm = load()
        forward, firsts = lm.model.forward, []

        def watched(**arguments):
            found = forward(**arguments)
            firsts.append(found.logits[0, 0])  # after the question, before the answer
            return found

        monkeypatch.setattr(lm.model, "forward", watched)
        with pruning(lm.model, method, **options):
            for candidate in ("yes", "a dog beside a cat", "nothing that anyone would want to see"):
                lm.loglikelihood([self.request(candidate)])
        assert len(firsts) == 3
        for first in firsts[1:]:
            torch.testing.assert_close(first, firsts[0], rtol=1e-4, atol=1e-4)

    def test_several_rounds_are_refused(self, load):
        with pytest.raises(NotImplementedError, match="one round"):
            load().generate_until_multi_round([])


class TestResuming:
    def test_asks_only_for_what_has_no_answer_yet(self, load, tmp_path, monkeypatch):
        whole = load(resume_dir=str(tmp_path / "whole")).generate_until(requests())
        interrupted = load(batch_size=2, resume_dir=str(tmp_path / "cut"))
        generate, batches = interrupted._generate, []

        def stop_after_two(*arguments):
            if len(batches) == 2:
                raise KeyboardInterrupt
            batches.append(arguments)
            return generate(*arguments)

        monkeypatch.setattr(interrupted, "_generate", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            interrupted.generate_until(requests())

        resumed = load(resume_dir=str(tmp_path / "cut"))
        generate, asked = resumed._generate, []
        monkeypatch.setattr(resumed, "_generate", lambda rows, *rest: asked.extend(rows) or generate(rows, *rest))
        answers = resumed.generate_until(requests())
        assert len(asked) < len(DOCUMENTS)
        assert answers == whole
        assert images(resumed) == [ImageCount(16, ((3, 16),))] * 9

    def test_reused_answers_count_neither_in_speed_nor_in_tokens(self, load, tmp_path, monkeypatch):
        reports = []
        monkeypatch.setattr(wrapper, "log_metrics", lambda **metrics: reports.append(metrics))
        load(resume_dir=str(tmp_path)).generate_until(requests()[:4])
        load(resume_dir=str(tmp_path)).generate_until(requests()[:4])
        load(resume_dir=str(tmp_path)).generate_until(requests()[:5])
        assert [report["additional_metrics"]["total_requests"] for report in reports] == [4, 1]
        assert reports[1]["additional_metrics"]["visual_tokens"] == 16

    def test_another_pruning_configuration_starts_anew(self, load, tmp_path, monkeypatch):
        load(resume_dir=str(tmp_path)).generate_until(requests()[:1])
        monkeypatch.setenv("BASELINE", "OURS")
        monkeypatch.setenv("SUBSET_RATIO", "0.25")
        lm = load(resume_dir=str(tmp_path))
        lm.generate_until(requests()[:1])
        assert images(lm) == [ImageCount(16, ((3, 4),))]

    @pytest.mark.parametrize(("temperature", "answers"), [(0.0, 1), (1.0, 2)])
    def test_another_seed_starts_anew_where_answers_are_sampled(self, load, tmp_path, temperature, answers):
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            settings = {**SHORT, "temperature": temperature}
            load(resume_dir=str(tmp_path)).generate_until(requests(settings=settings)[:1])
        assert len((tmp_path / "answers_rank0.jsonl").read_text().splitlines()) == answers


class TestAnswerLog:
    QUESTION = Question("pope", "test", 3, 0, "Is there a dog?", {"max_new_tokens": 16})
    ANSWER = Answer("yes", 636, 2, (ImageCount(576, ((2, 576), (30, 56))),))

    def log(self, folder: Path, rank: int = 0, pruning: str = "p") -> AnswerLog:
        return AnswerLog(folder, rank, "m", pruning)

    @pytest.mark.parametrize("behind", [None, ((1, 576), (31, 56))], ids=["at the input", "behind the attention"])
    def test_is_read_by_every_rank(self, tmp_path, behind):
        answer = replace(self.ANSWER, visual_tokens=(ImageCount(576, ((2, 576), (30, 56)), 1, behind),))
        self.log(tmp_path, rank=1).append([(self.QUESTION, answer)])
        assert self.log(tmp_path, rank=0).get(self.QUESTION) == answer

    @pytest.mark.parametrize(
        "change",
        [
            {"task": "gqa"},
            {"doc_id": 4},
            {"repeat": 1},
            {"prompt": "Is there a cat?"},
            {"settings": {"max_new_tokens": 8}},
            {"seed": 1},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_tells_questions_apart(self, tmp_path, change):
        log = self.log(tmp_path)
        log.append([(self.QUESTION, self.ANSWER)])
        assert log.get(Question(**{**vars(self.QUESTION), **change})) is None

    def test_knows_the_prompt_behind_an_answer(self):
        assert self.ANSWER.prompt == PromptCount(60, self.ANSWER.visual_tokens)

    def test_passes_over_lines_that_say_nothing_of_the_layers(self, tmp_path):
        log = self.log(tmp_path)
        log.append([(self.QUESTION, self.ANSWER)])
        path = tmp_path / "answers_rank0.jsonl"
        path.write_text(json.dumps({**json.loads(path.read_text()), "visual_tokens": [[576, 56]]}) + "\n")
        assert self.log(tmp_path).get(self.QUESTION) is None

    def test_keeps_configurations_apart(self, tmp_path):
        self.log(tmp_path).append([(self.QUESTION, self.ANSWER)])
        assert self.log(tmp_path, pruning="q").get(self.QUESTION) is None

    def test_keeps_answers_with_any_character(self, tmp_path):
        characters = "".join(map(chr, (*range(0x100), 0x2028, 0x2029, 0xFEFF, 0xFFFD)))
        answer = replace(self.ANSWER, text=f"yes{characters}no")
        self.log(tmp_path).append([(self.QUESTION, answer)])
        assert self.log(tmp_path).get(self.QUESTION) == answer

    @pytest.mark.parametrize("cut", [1, 20, 100])
    def test_survives_a_torn_last_line(self, tmp_path, cut):
        self.log(tmp_path).append([(self.QUESTION, self.ANSWER)])
        path = tmp_path / "answers_rank0.jsonl"
        path.write_bytes(path.read_bytes() + path.read_bytes()[:-cut])
        other = Question("pope", "test", 4, 0, "Is there a cat?", {})
        self.log(tmp_path).append([(other, self.ANSWER)])
        reopened = self.log(tmp_path)
        assert reopened.get(self.QUESTION) == reopened.get(other) == self.ANSWER


class TestWrongValues:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"truncation": True}, "unknown model argument truncation; allowed: pretrained"),
            ({"batch_size": "auto"}, "batch_size=auto: must be a whole number >= 1"),
            ({"batch_size": "0"}, "batch_size=0"),
            ({"dtype": "int8"}, "dtype=int8: allowed are auto, float32"),
            ({"conv_template": "vicuna"}, "conv_template=vicuna: allowed are auto, default"),
            ({"device": "gpu"}, "device=gpu: allowed are cpu"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_name_the_value_and_what_is_allowed(self, load, arguments, sentence):
        with pytest.raises(ValueError, match=sentence):
            load(**arguments)

    @pytest.mark.parametrize(
        ("switch", "sentence"),
        [
            ({"BASELINE": "NOSUCH", "SUBSET_RATIO": "0.1"}, "BASELINE=NOSUCH"),
            ({"BASELINE": "OURS"}, "a kept ratio is needed .SUBSET_RATIO."),
            ({"SUBSET_RATIO": "0.1"}, "BASELINE is not"),
            ({"BASELINE": "OURS", "SUBSET_RATIO": "1.5"}, "SUBSET_RATIO=1.5"),
            ({"BASELINE": "OURS", "SUBSET_RATIO": "0.1", "LAYER_INDEX": "x"}, "LAYER_INDEX=x"),
            ({"BASELINE": "OURS", "SUBSET_RATIO": "0.1", "OTPRUNE_GAMA": "1"}, "OTPRUNE_GAMA"),
        ],
        ids=["method", "half", "other half", "ratio", "layer", "option"],
    )
    def test_of_the_switch_are_found_before_anything_is_loaded(self, load, monkeypatch, switch, sentence):
        for name, value in switch.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(wrapper, "load_pretrained_model", lambda *_, **__: pytest.fail("weights were loaded"))
        with pytest.raises(ValueError, match=sentence):
            load()

    def test_of_the_layer_are_found_before_weights_are_read(self, load, monkeypatch):
        for name, value in {"BASELINE": "OURS", "SUBSET_RATIO": "0.5", "LAYER_INDEX": "99"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="LAYER_INDEX=99 is outside the decoder: it has 3 layers"):
            load()


class TestScoring:
    def test_captions_without_java_fail_before_they_are_generated(self, load, monkeypatch):
        lm = load()
        monkeypatch.setattr(wrapper.java, "java_works", lambda: False)
        monkeypatch.setattr(lm, "_generate", lambda *_: pytest.fail("something was generated"))
        with pytest.raises(RuntimeError, match="default-jre-headless"):
            lm.generate_until(requests("coco2017_cap_val"))

    def test_an_odd_number_of_mme_questions_fails_before_they_are_generated(self, load, monkeypatch):
        lm = load()
        monkeypatch.setattr(lm, "_generate", lambda *_: pytest.fail("something was generated"))
        with pytest.raises(RuntimeError, match="must be even, not 9"):
            lm.generate_until(requests("mme"))


class TestResponseCache:
    """lmms-eval's own ``--use_cache``."""

    def test_is_not_shared_between_pruning_configurations(self, load, tmp_path, monkeypatch):
        def ask(lm: Llava) -> tuple[list[str], int]:
            cache = ResponseCache.create(str(tmp_path), model="llava", model_args="pretrained=x")
            answers = texts(cache.execute(lm, "generate_until", requests()))
            cache.finalize(success=True)
            return answers, cache._hits

        full, hits = ask(load())
        assert hits == 0
        assert ask(load()) == (full, sum(bool(text.strip()) for text in full))
        monkeypatch.setenv("BASELINE", "OURS")
        monkeypatch.setenv("SUBSET_RATIO", "0.25")
        assert ask(load())[1] == 0


class TestSettings:
    def test_what_a_task_leaves_out_is_the_builtin_wrapper_s(self):
        assert GenerationSettings.read({}).to_dict() == {
            "max_new_tokens": 1024,
            "temperature": 0.0,
            "top_p": None,
            "num_beams": 1,
            "image_aspect_ratio": None,
        }

    def test_sampling_follows_from_the_temperature(self):
        assert GenerationSettings.read({"temperature": 0, "top_p": 1.0}).arguments()["do_sample"] is False
        assert GenerationSettings.read({"temperature": 0.5, "top_p": 0.9}).arguments() == {
            "max_new_tokens": 1024,
            "num_beams": 1,
            "do_sample": True,
            "temperature": 0.5,
            "top_p": 0.9,
        }

    def test_the_aspect_ratio_of_a_task_yields_to_the_checkpoint_s(self, load):
        settings, config = GenerationSettings(image_aspect_ratio="original"), load().config
        assert settings.preprocessing(config).image_aspect_ratio == "pad"
        del config.image_aspect_ratio
        assert settings.preprocessing(config).image_aspect_ratio == "original"


def test_the_model_outlives_a_run_only_when_another_follows(load):
    lm = load()
    lm.keep_model = True
    lm.clean()
    assert lm.model is not None
    lm.keep_model = False
    lm.clean()
    with pytest.raises(IndexError):
        _ = lm.model
