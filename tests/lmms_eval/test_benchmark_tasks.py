"""Tasks by name, as the commands that need pictures or questions load them."""

from __future__ import annotations

import pytest

from llava.benchmark_tasks import load_tasks
from llava.fitting.data import find_images


def test_an_image_of_many_questions_is_taken_once():
    found, (task,) = find_images("mini_pope"), load_tasks("mini_pope").values()
    assert 1 < len(found) < len(task.eval_docs) and task.doc_to_text(task.eval_docs[0])
    assert len({found.open(number)[0].tobytes() for number in range(len(found))}) == len(found)
    assert all(name.startswith("mini_pope ") for name in found.names)


def test_a_name_that_is_no_task_is_named():
    with pytest.raises(ValueError, match=r"^mini_nope is no task that lmms-eval knows$"):
        load_tasks("mini_nope")
