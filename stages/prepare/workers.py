"""Batches worked on side by side, their outcomes in order, with a bounded number of them in memory.

In one process, Python works on one batch while the tokenizer's Rust threads work on the batch before it.
With several, each batch goes to a process as a whole, and the tokenizer there runs on one thread.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

from stages.data.source_row import SourceRow
from stages.prepare.examples import ExampleMaker, Outcome
from stages.prepare.garbage_collection import looked_for_seldom

BATCHES_PER_WORKER = 2


def outcomes(
    batches: Iterable[Sequence[SourceRow]], maker: ExampleMaker, num_workers: int
) -> Iterator[Outcome]:
    """The outcome of every batch, in the order of the batches, whatever the number of processes."""
    with looked_for_seldom():  # forked processes have it from here
        if num_workers == 1:
            yield from _in_this_process(batches, maker)
        else:
            yield from _in_processes(batches, maker, num_workers)


def _in_this_process(batches: Iterable[Sequence[SourceRow]], maker: ExampleMaker) -> Iterator[Outcome]:
    with ThreadPoolExecutor(1) as tokenizing:
        waiting = None
        for rows in batches:
            converted = maker.convert(rows)
            tokenized = tokenizing.submit(maker.template.encoder.tokenize, converted.texts.texts)
            if waiting is not None:
                yield maker.finish(waiting[0], waiting[1].result())
            waiting = converted, tokenized
        if waiting is not None:
            yield maker.finish(waiting[0], waiting[1].result())


def _in_processes(
    batches: Iterable[Sequence[SourceRow]], maker: ExampleMaker, num_workers: int
) -> Iterator[Outcome]:
    # A forked process has the imports and the tokenizer already; where there is no fork it takes seconds.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(num_workers, context, _begin, (maker,)) as pool:
        waiting: deque[Future[Outcome]] = deque()
        for rows in batches:
            waiting.append(pool.submit(_make, rows))
            if len(waiting) > BATCHES_PER_WORKER * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_maker: list[ExampleMaker] = []


def _begin(maker: ExampleMaker) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _maker.append(maker)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for batches for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(rows: Sequence[SourceRow]) -> Outcome:
    return _maker[0].make(rows)
