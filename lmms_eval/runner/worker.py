"""One process of a worker group: loads the model once and evaluates task after task.

Started by `launch` with the path of a specification; several processes find each other as torchrun tells them to.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import datasets
import torch.distributed
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import get_datetime_str
from lmms_eval_otprune.llava import Llava
from lmms_eval_otprune.token_counts import summary
from loguru import logger
from tenacity import RetryError

from . import records
from .entries import task_entry, task_manager
from .manifest import describe_machine


def main(specification: str) -> None:
    """Evaluate what the specification lists; status 0 when every task was tried."""
    spec = json.loads(Path(specification).read_text(encoding="utf-8"))
    folder = Path(spec["folder"])
    terminal = _quiet(folder / "worker.log")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        lm = _load(spec, terminal)
        tasks = _agree_on(spec["tasks"])
        if lm.rank == 0:
            records.write_json(folder / "machine.json", describe_machine(lm, spec["model"]))
        manager = task_manager(tasks)
    except Exception as error:
        _log_traceback()
        try:
            _note(spec, {"cannot_start": _sentence(error)})
        except OSError as problem:
            print(f"{_sentence(error)} (not recorded: {_sentence(problem)})", file=terminal)
        raise SystemExit(1) from error
    for number, task in enumerate(tasks, start=1):
        lm.label = f"{spec['label']} [{number}/{len(tasks)}] {task}"
        try:
            _note(spec, {"task": task})
            _evaluate(lm, task, spec, manager)
        except Exception as error:
            _log_traceback()
            # The first to fail knows why; the others only see that it is gone.
            if records.failure(folder, task) is None:
                records.record_failure(folder, task, _sentence(error), terminal)
            if lm.world_size > 1:
                # The other processes wait for this one in a collective operation: the group must be started again.
                raise SystemExit(1) from error


def _leave() -> None:
    """End together, and at once: tearing the interpreter down under gloo's threads can hang or abort a process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _load(spec: dict[str, Any], terminal: TextIO) -> Llava:
    lm = Llava(
        pretrained=spec["model"],
        batch_size=spec["batch_size"],
        device=spec["device"],
        dtype=spec["dtype"],
        conv_template=spec["conv_template"],
        resume_dir=spec["answers"],
        grey_pictures=spec["grey"],
        **spec["visual_cache"],
    )
    lm.keep_model = True
    lm.terminal = terminal
    return lm


def _evaluate(lm: Llava, task: str, spec: dict[str, Any], manager: TaskManager) -> None:
    folder = records.task_folder(Path(spec["folder"]), task)
    started = time.perf_counter()
    lm.visual_tokens.clear()
    cached_before = lm.visual_cache_counts()
    limit = spec["limit"]
    if limit is not None and task.removeprefix("mini_") == "mme":
        # Scored in pairs of questions, which stand side by side.
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
    name = Path(spec["folder"]).parent.name
    tracker.general_config_tracker.log_experiment_args("llava", f"pretrained={name}", None, None, False)
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=stamp)
    tracker.save_results_samples(task_name=task, samples=samples[task])
    _check_saved(folder, task, stamp, len(samples[task]))
    records.forget_failure(Path(spec["folder"]), task)
    records.write_json(
        folder / records.RESULT,
        {
            "task": task,
            "identity": spec["identities"][task],
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
    """lmms-eval goes on without a word when it cannot write the log of samples, on a full disk for instance."""
    logs = list(folder.glob(f"*/{stamp.replace(':', '-')}_samples_{task}.jsonl"))
    if len(logs) != 1 or logs[0].read_bytes().count(b"\n") != samples:
        raise OSError(f"the log of samples of {task} could not be written whole into {folder}")


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """The numbers, without lmms-eval's mark for "no filter"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _gather(counts: Counter, lm: Llava) -> Counter:
    """Those of all processes on rank 0, nothing on the others."""
    if lm.world_size == 1:
        return counts
    gathered: list[Any] | None = [None] * lm.world_size if lm.rank == 0 else None
    torch.distributed.gather_object(counts, gathered)
    return sum(gathered or (), Counter())


def _agree_on(tasks: list[str]) -> list[str]:
    """Rank 0's list: other machines may not see its result folder."""
    if not torch.distributed.is_initialized():
        return tasks
    agreed = [tasks]
    torch.distributed.broadcast_object_list(agreed)
    return agreed[0]


def _note(spec: dict[str, Any], content: dict[str, Any]) -> None:
    """Tell `launch`, on this machine, how far the group has come."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        records.write_json(Path(spec["state"]), content)


def _quiet(log: Path) -> TextIO:
    """Send everything that is printed to a log, and return a stream to the terminal for the progress bar."""
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    logger.remove()
    logger.add(sys.stderr, level="INFO")
    datasets.disable_progress_bars()
    return terminal


def _end_with_parent() -> None:
    """Standard input is a pipe from the launching process: it ends when that one does, however it ends."""
    while os.read(0, 1):
        pass
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
