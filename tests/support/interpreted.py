"""Triton kernels on a machine without a GPU: in Triton's interpreter, which runs a kernel's blocks one by one."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

MOST_TURNS = 5_000


@contextmanager
def interpreter() -> Iterator[Callable]:
    """Gives ``run(function, *arguments)``, which calls the function where Triton interprets its kernels.

    That is chosen when Triton is first imported, and another test may have imported it: a process of its own it is.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_choose_interpreter) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _choose_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def in_turns(function: Callable, *arguments):
    """Call a function where Triton interprets, with the blocks of a launch in turns: any of them, but always the same,
    goes on at an atomic operation. Blocks that wait for each other need it.
    """
    from triton.runtime import interpreter as triton_interpreter

    builder, executor = triton_interpreter.interpreter_builder, triton_interpreter.GridExecutor
    prepare, turns = executor.__init__, _Turns()

    def prepare_with_turns(self, fn, *rest):
        prepare(self, _InTurns(fn, builder, turns), *rest)

    def in_own_place(operation):
        def call(*operands):
            builder.grid_idx = turns.current.place
            return operation(*operands)

        return call

    def after_a_turn(operation):
        def call(*operands):
            turns.pass_on()
            return operation(*operands)

        return call

    executor.__init__ = prepare_with_turns
    builder.create_get_program_id = in_own_place(builder.create_get_program_id)
    builder.create_atomic_rmw = after_a_turn(builder.create_atomic_rmw)
    try:
        return function(*arguments)
    finally:
        executor.__init__ = prepare
        del builder.create_get_program_id, builder.create_atomic_rmw


class _Block(threading.Thread):
    """One block of a launch, standing still until it has its turn."""

    def __init__(self, place: tuple[int, int, int], work: Callable[[], None], turns: _Turns):
        super().__init__(daemon=True)
        self.place, self.work, self.turns = place, work, turns
        self.turn = threading.Semaphore(0)

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.work()
        except BaseException as error:
            self.turns.errors.append(error)
        self.turns.leave()


class _Turns:
    """Blocks of which one runs at a time."""

    def __init__(self):
        self.blocks: deque[_Block] = deque()
        self.errors: list[BaseException] = []
        self.taken = 0
        self.dice = random.Random(0)

    @property
    def current(self) -> _Block:
        return self.blocks[0]

    def run(self) -> None:
        threads = list(self.blocks)
        for thread in threads:
            thread.start()
        self.current.turn.release()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def pass_on(self) -> None:
        self.taken += 1
        if self.errors or self.taken > MOST_TURNS:
            raise RuntimeError(f"blocks still wait for each other after {self.taken} turns")
        me = self.current
        self.blocks.rotate(self.dice.randrange(len(self.blocks)))
        self.current.turn.release()
        me.turn.acquire()

    def leave(self) -> None:
        self.blocks.popleft()
        if self.blocks:
            self.current.turn.release()


class _InTurns:
    """A kernel whose calls are remembered, and made together at that of the last block."""

    def __init__(self, fn: Callable, builder, turns: _Turns):
        functools.update_wrapper(self, fn)
        self.__signature__, self.__globals__ = inspect.signature(fn), fn.__globals__
        self.fn, self.builder, self.turns = fn, builder, turns

    def __call__(self, **arguments) -> None:
        place = self.builder.grid_idx
        self.turns.blocks.append(_Block(place, functools.partial(self.fn, **arguments), self.turns))
        if place == tuple(extent - 1 for extent in self.builder.grid_dim):
            self.turns.run()
