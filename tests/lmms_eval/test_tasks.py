"""The benchmarks: the builtin definitions, over embedded data or with the changes that the table needs."""

from __future__ import annotations

import random
from pathlib import Path

import lmms_eval_otprune.tasks
import pytest
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.tasks.mmmu import utils as builtin_mmmu
from lmms_eval.utils import load_yaml_config
from lmms_eval_otprune.runner.suites import GROUPS, SUITES
from lmms_eval_otprune.runner.tasks import data_versions
from lmms_eval_otprune.tasks import mmmu

from llava.benchmark_tasks import definition, task_entry
from llava.benchmarks import benchmark_of
from llava.mini import suite

FOLDER = Path(lmms_eval_otprune.tasks.__file__).parent


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_defaults=False, include_path=str(FOLDER), model_name="llava")


def load(manager: TaskManager, name: str):
    return get_task_dict([name], manager, "simple")[name]


@pytest.mark.parametrize("name", [*SUITES["mini"].tasks, *SUITES["documents"].tasks])
class TestEmbedded:
    def test_is_the_builtin_task_over_other_data(self, manager, name):
        task = load(manager, name)
        builtin = definition(suite.TASKS[name])
        document = task.eval_docs[0]
        assert len(task.eval_docs) >= 200
        assert suite.TASKS[name].metric in task.aggregation()
        assert set(task.aggregation()) <= {metric["metric"] for metric in builtin["metric_list"]}
        assert task.config.generation_kwargs.items() >= (builtin.get("generation_kwargs") or {}).items()
        assert isinstance(task.doc_to_text(document), str)
        assert all(image.mode == "RGB" for image in task.doc_to_visual(document))

    def test_asks_chat_models_in_messages(self, name, monkeypatch):
        # MMMU's own code switches this on for the whole process.
        kept = builtin_mmmu.config["metadata"]
        monkeypatch.setitem(kept, "interleaved_format", kept["interleaved_format"])
        manager = TaskManager(include_defaults=False, include_path=str(FOLDER), model_name="qwen2_5_vl")
        [task] = get_task_dict([name], manager, "chat").values()
        assert isinstance(task, ConfigurableMessagesTask) and task.model_name == "qwen2_5_vl"
        document = task.eval_docs[0]
        metadata = {"task": name, "doc_id": 0, "repeats": 1, "split": task.config.test_split}
        request = task.construct_requests(doc_id=0, ctx="", metadata=metadata)
        _, messages_of, *_ = request.args
        [turn] = messages_of(document)
        shown = [part["url"] for part in turn["content"] if part["type"] == "image"]
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in task.doc_to_visual(document)]
        assert any(part["type"] == "text" and part["text"] for part in turn["content"])

    def test_is_scored_without_opening_pictures(self, manager, name):
        features = load(manager, name).eval_docs_no_media.features
        assert not [column for column, feature in features.items() if "Image(" in repr(feature)]


@pytest.mark.parametrize(("name", "group"), [("mini", "otprune_mini"), ("documents", "otprune_mini_documents")])
def test_every_embedded_task_has_a_published_counterpart(name, group):
    assert set(suite.TASKS) >= set(SUITES[name].tasks)
    group = load_yaml_config(yaml_path=str(FOLDER / f"{group}.yaml"), mode="full")
    assert sorted(group["task"]) == sorted(SUITES[name].tasks)


@pytest.mark.parametrize("name", GROUPS)
def test_the_published_groups_need_no_login(name):
    group = load_yaml_config(yaml_path=str(FOLDER / f"{name}.yaml"), mode="full")
    assert [entry["task"] for entry in group["task"]] == list(GROUPS[name])
    for entry in group["task"]:
        assert not ({**definition(benchmark_of(entry["task"])), **entry}.get("dataset_kwargs") or {}).get("token")


@pytest.mark.parametrize("name", ["mini_coco2017_cap_val", "mini_flickr30k_test", "mini_nocaps_val"])
def test_captions_are_scored_by_the_table_s_metric_unless_all_are_asked_for(manager, name):
    [shown] = get_task_dict([task_entry(name, all_metrics=False)], manager, "simple").values()
    assert list(shown.aggregation()) == [suite.TASKS[name].metric]
    assert len(shown.eval_docs) >= 200
    [whole] = get_task_dict([task_entry(name, all_metrics=True)], manager, "simple").values()
    assert list(whole.aggregation()) == list(load(manager, name).aggregation())
    assert len(whole.aggregation()) > 5


@pytest.mark.parametrize("name", ["mini_mme", "gqa", "mmbench_en_dev_static"])
def test_other_tasks_keep_their_metrics(name):
    assert task_entry(name, all_metrics=False) == task_entry(name, all_metrics=True)


def test_gqa_opens_the_picture_of_the_question(manager):
    task = load(manager, "mini_gqa")
    images = task._table("testdev_balanced_images")
    by_name = {row["id"]: row["image"] for row in images}
    document = task.eval_docs[7]
    [picture] = task.doc_to_visual(document)
    assert picture.tobytes() == by_name[document["imageId"]].convert("RGB").tobytes()


DOCUMENT = {
    "id": "validation_Math_1",
    "question_type": "multiple-choice",
    "options": "['one', 'two', 'three', 'four']",
    "answer": "A",
}


class TestMmmu:
    def test_guesses_depend_on_the_question_alone(self):
        guesses = []
        for seed in range(5):
            random.seed(seed)
            guesses.append(mmmu.process_results(DOCUMENT, ["~"])["mmmu_acc"]["parsed_pred"])
        assert guesses == guesses[:1] * 5

    def test_leaves_the_process_s_random_state_alone(self):
        random.seed(3)
        mmmu.process_results(DOCUMENT, ["~"])
        after = random.random()
        random.seed(3)
        assert after == random.random()

    def test_scores_readable_answers_as_the_builtin_task(self):
        ours = mmmu.process_results(DOCUMENT, ["B"])
        assert ours == builtin_mmmu.mmmu_process_results(DOCUMENT, ["B"])


@pytest.mark.parametrize("name", ["mini", "documents"])
def test_answers_about_another_version_of_the_data_are_told_apart(name, monkeypatch):
    before = data_versions(SUITES[name].tasks)
    monkeypatch.setattr(suite, "WORLD_VERSION", "another")
    assert data_versions(SUITES[name].tasks) not in (before, "published")
