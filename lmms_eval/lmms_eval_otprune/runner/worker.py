"""A worker process: loads the model once, then evaluates the tasks that it is given, row after row.

`launch` starts it with the path of a specification; the processes of one worker form a torchrun group. Rank 0 reads the
next task from standard input, and the first process of each machine reports on standard output, in JSON, an object per
line.
"""

from __future__ import annotations

import io
import json
import os
import select
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import datasets
import torch.distributed
import transformers
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import get_datetime_str
from loguru import logger
from tenacity import RetryError

from llava.benchmark_tasks import task_entry, task_manager
from llava.benchmarks import benchmark_of
from llava.model.multimodal_encoder.observations import Output, encoder_outputs
from llava.pruning import PruningConfig
from llava.runtime import is_main_process
from lmms_eval_otprune.models.java import needs_java, remember_tokens
from lmms_eval_otprune.models.llava import Llava
from lmms_eval_otprune.models.rows import RowsInTurn
from lmms_eval_otprune.models.token_counts import summary

from . import records
from .manifest import describe_machine

Orders = SimpleQueue[tuple[int, str] | None]
REPORT_INTERVAL = 0.2
"""Seconds between two progress events."""


class Channel(io.TextIOBase):
    """Sends events of the machine's first process to `launch`; text that is printed into it is shown to the user."""

    def __init__(self):
        self._file = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        self._silent = int(os.environ.get("LOCAL_RANK", 0)) != 0

    def send(self, **event: Any) -> None:
        if not self._silent:
            self._file.write(json.dumps(event) + "\n")

    def write(self, text: str) -> int:
        if text.strip():
            self.send(says=text.strip())
        return len(text)


class Reported:
    """A task's progress, sent to `launch`."""

    def __init__(self, channel: Channel, label: str, total: int, done: int):
        self._channel, self._total, self._done, self._last = channel, total, done, 0.0

    def __enter__(self) -> Reported:
        self.update(0)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, samples: int) -> None:
        self._done += samples
        if time.monotonic() - self._last >= REPORT_INTERVAL or self._done == self._total:
            self._last = time.monotonic()
            self._channel.send(done=self._done, of=self._total)


def main(specification: str) -> None:
    """Evaluate tasks until there are no more."""
    spec = json.loads(Path(specification).read_text(encoding="utf-8"))
    channel = Channel()
    orders: Orders = SimpleQueue()
    _quiet()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    try:
        lm = _load(spec, channel)
        if any(map(needs_java, spec["tasks"])):
            remember_tokens()
        manager = task_manager(spec["tasks"], spec["wrapper"] or "llava", "simple" if lm.is_simple else "chat")
    except Exception as error:
        _log_traceback()
        channel.send(cannot_start=_sentence(error))
        raise SystemExit(1) from error
    current = None
    while (unit := _next(lm, channel, orders)) is not None:
        number, task = unit
        job = spec["jobs"][number]
        channel.send(begins=unit)
        try:
            if number != current:
                _enter(lm, job, spec)
                current = number
            lm.label = f"{job['label']} {task}"
            _evaluate(lm, task, job, spec, manager)
        except Exception as error:
            current = None
            _log_traceback()
            # The first to fail knows the cause; the others only lose their connection to it.
            folder = Path(job["folder"])
            if records.failure(folder, task) is None:
                records.record_failure(folder, task, _sentence(error), channel)
            if lm.world_size > 1:
                # The other processes wait for this one in a collective operation: the group must be restarted.
                raise SystemExit(1) from error
        channel.send(tried=unit)


def _leave() -> None:
    """End together, and at once: tearing the interpreter down under gloo's threads can hang or abort a process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _load(spec: dict[str, Any], channel: Channel) -> RowsInTurn:
    lm = _load_llava(spec) if spec["wrapper"] is None else _load_wrapper(spec)
    lm.keep_model = True
    lm.open_progress = lambda *about: Reported(channel, *about)
    return lm


def _load_wrapper(spec: dict[str, Any]) -> RowsInTurn:
    from lmms_eval_otprune.models import transformers_models

    return transformers_models.load(spec["wrapper"], spec["model"], spec["device"], spec["dtype"], spec["batch_size"])


def _load_llava(spec: dict[str, Any]) -> Llava:
    lm = Llava(
        pretrained=spec["model"],
        model_base=spec["model_base"],
        batch_size=spec["batch_size"],
        device=spec["device"],
        dtype=spec["dtype"],
        conv_template=spec["conv_template"],
        **spec["visual_cache"],
    )
    if "visual_cache_folder" in spec["visual_cache"]:
        lm.model.visual_cache.expected = _encoder_outputs(spec["jobs"])
    return lm


def _encoder_outputs(jobs: Sequence[Mapping[str, Any]]) -> tuple[Output, ...]:
    """The outputs that any row still to be evaluated needs, so that each image is encoded once for all of them."""
    found: dict[Output, None] = {}
    for job in jobs:
        with suppress(ValueError):  # reported when the row is evaluated
            if job["to_do"] and (config := _pruning(job)) is not None:
                for outputs in encoder_outputs(config.build_pruner()).values():
                    found |= dict.fromkeys(outputs)
    return tuple(found)


def _pruning(job: Mapping[str, Any]) -> PruningConfig | None:
    return PruningConfig.from_env({**os.environ, **job["switch"]}) if job["switch"] else None


def _next(lm: RowsInTurn, channel: Channel, orders: Orders) -> tuple[int, str] | None:
    """The next task, (number of the job, task), as rank 0 receives it; None at the end."""
    unit: list[tuple[int, str] | None] = [None]
    if lm.rank == 0:
        channel.send(ready=True)
        unit = [orders.get()]
    if lm.world_size > 1:
        torch.distributed.broadcast_object_list(unit)
    return unit[0]


def _enter(lm: RowsInTurn, job: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
    """Switch to another row: its log, its pruning, its answers."""
    _log_to(Path(job["folder"]) / "worker.log")
    lm.set_pruning(_pruning(job))
    if isinstance(lm, Llava):
        lm.batch_size = spec["pruned_batch_size" if lm.model.active_pruner.before_decoder else "batch_size"]
    grey = {"grey_pictures": True} if job["grey"] else {}
    lm.start_run(job["answers"], writer=spec["writer"], **grey)
    if lm.rank == 0:
        machine = {**describe_machine(lm, spec["model"]), "processes": spec["processes"]}
        records.write_json(Path(job["folder"]) / "machine.json", machine)


def _evaluate(lm: RowsInTurn, task: str, job: Mapping[str, Any], spec: Mapping[str, Any], manager: TaskManager) -> None:
    folder = records.task_folder(Path(job["folder"]), task)
    started = time.perf_counter()
    lm.visual_tokens.clear()
    cached_before = lm.visual_cache_counts()
    limit, benchmark = spec["limit"], benchmark_of(task)
    if limit is not None and benchmark is not None and benchmark.in_pairs:
        limit += limit % 2
    stamp = get_datetime_str()
    results = simple_evaluate(
        model=lm,
        model_args=f"pretrained={spec['model']}",
        tasks=[task_entry(task, spec["all_metrics"])],
        task_manager=manager,
        batch_size=spec["batch_size"],
        limit=limit,
        log_samples=True,
        cli_args=Namespace(output_path=str(folder), process_with_media=False),
        random_seed=spec["seed"],
        numpy_random_seed=spec["seed"],
        torch_random_seed=spec["seed"],
        fewshot_random_seed=spec["seed"],
        datetime_str=stamp,
        process_docs_parallel=1,
    )
    prompts = _gather(lm.visual_tokens[task], lm)
    cache_use = _gather(lm.visual_cache_counts() - cached_before, lm)
    if results is None:
        return
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder))
    # The model's name becomes a folder.
    name = Path(job["folder"]).parent.name
    wrapper = spec["wrapper"] or "llava"
    tracker.general_config_tracker.log_experiment_args(wrapper, f"pretrained={name}", None, None, False)
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=stamp)
    tracker.save_results_samples(task_name=task, samples=samples[task])
    _check_saved(folder, task, stamp, len(samples[task]))
    records.forget_failure(Path(job["folder"]), task)
    records.write_json(
        folder / records.RESULT,
        {
            "task": task,
            "identity": job["identities"][task],
            "metrics": _metrics(results["results"][task]),
            "samples": len(samples[task]),
            "visual_tokens": summary(prompts, lm.model_shape()),
            "visual_cache": {"hits": cache_use["hits"], "misses": cache_use["misses"]},
            "throughput": results.get("throughput"),
            "seconds": round(time.perf_counter() - started, 1),
            "date": stamp,
        },
    )


def _check_saved(folder: Path, task: str, stamp: str, samples: int) -> None:
    """lmms-eval does not report that it could not write the log of samples, for instance on a full disk."""
    logs = list(folder.glob(f"*/{stamp.replace(':', '-')}_samples_{task}.jsonl"))
    if len(logs) != 1 or logs[0].read_bytes().count(b"\n") != samples:
        raise OSError(f"the log of samples of {task} could not be written whole into {folder}")


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """The numbers under their plain names: lmms-eval appends ",none" where no filter was applied."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _gather(counts: Counter, lm: RowsInTurn) -> Counter:
    """The sum over all processes on rank 0, nothing on the others."""
    if lm.world_size == 1:
        return counts
    gathered: list[Any] | None = [None] * lm.world_size if lm.rank == 0 else None
    torch.distributed.gather_object(counts, gathered)
    return sum(gathered or (), Counter())


def _quiet() -> None:
    """Send what libraries print to standard error, which is the log, and switch their progress bars off."""
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    logger.remove()
    logger.add(sys.stderr, level="INFO")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _listen(orders: Orders) -> None:
    """Receive tasks, and exit when the launching process ends, however it does: standard input is closed then."""
    if is_main_process():
        for line in io.FileIO(0, closefd=False):
            orders.put(json.loads(line))
    else:
        # Rank 0 reads it; this process only sees it closed.
        closed = select.poll()
        closed.register(0, select.POLLHUP)
        closed.poll()
    os._exit(1)


def _log_traceback() -> None:
    # The log's disk may be what is full.
    with suppress(OSError):
        traceback.print_exc()


def _sentence(error: BaseException) -> str:
    return records.sentence(error.__cause__ if isinstance(error, RetryError) and error.__cause__ else error)


if __name__ == "__main__":
    main(sys.argv[1])
    _leave()
