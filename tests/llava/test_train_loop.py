"""The training loop: wherever a run is stopped or killed, it ends in the weights of one that was not."""

from __future__ import annotations

import random
import socket

import pytest
import torch
from torch import nn

from llava.train.loop import NonFiniteLoss, Run, Trainer, read_log
from tiny_training import ACCUMULATE, STEPS, Killed, Task, process, train, weights


def records(folder) -> list[dict]:
    return [line | {"seconds": 0} for line in read_log(folder)]


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_was_stopped_or_killed_ends_as_one_that_was_not(tmp_path, seed):
    whole, complete = train(tmp_path / "whole")
    assert complete and len(records(tmp_path / "whole")) == 3
    dice, complete = random.Random(seed), False
    while not complete:
        how = dice.choice(
            (
                {"seconds": 0},
                {"last_step": dice.randint(1, STEPS)},
                {"killed_after": dice.randint(1, STEPS * ACCUMULATE), "save_steps": dice.randint(1, 4)},
            )
        )
        try:
            parts, complete = train(tmp_path / "parts", resume=True, **how)
        except Killed:
            continue
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for name, value in weights(whole).items():
        assert torch.equal(weights(parts)[name], value), name
    assert not any("frozen" in name for name in torch.load(parts.run.state_file)["model"])


def test_a_line_of_a_killed_process_is_left_out(tmp_path):
    train(tmp_path, last_step=5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"run": "state", "step": 8}\n{"run": "other", "step": 90}\n{"run": "sta')
    train(tmp_path, resume=True)
    assert [(line["run"], line["step"]) for line in read_log(tmp_path)] == [
        ("state", 4),
        ("other", 90),
        ("state", 8),
        ("state", 11),
    ]


def test_what_cannot_be_resumed_is_refused(tmp_path):
    train(tmp_path, last_step=1)
    with pytest.raises(ValueError, match="holds a run: give --resume, or another --output"):
        train(tmp_path)
    with pytest.raises(ValueError, match=r"of another model: it holds body\.0\.weight"):
        Trainer(nn.Linear(2, 2), [], Run(tmp_path, resume=True, cpu=True))
    with pytest.raises(ValueError, match="was trained with batch None, not 3"):
        Trainer(Task(), [], Run(tmp_path, resume=True, cpu=True), settings={"batch": 3})
    for content in (b"", b"no state"):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(OSError, match=r"Cannot read the run in .*state.pt: "):
            train(tmp_path, resume=True)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_state(tmp_path):
    train(tmp_path, last_step=2)
    before = (tmp_path / "state.pt").read_bytes()
    spoilt = Task()
    spoilt.register_forward_pre_hook(lambda _, batch: (batch[0] / (batch[2][0] != 28), *batch[1:]))
    with pytest.raises(NonFiniteLoss, match="the loss of step 3 is nan") as error:
        train(tmp_path, resume=True, task=spoilt)
    assert (error.value.step, error.value.part) == (3, 1)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_two_processes_take_the_steps_of_one_and_may_leave_weights_unused(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(process, (tmp_path, port), nprocs=2)
    task = Task()
    task.body[1].p = 0.0
    alone, _ = train(tmp_path / "alone", task=task)
    found = torch.load(tmp_path / "weights.pt")
    for name, value in weights(alone).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
