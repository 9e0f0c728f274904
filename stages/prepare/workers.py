"""Batches in parallel, their outcomes in order, with a bounded number of them in memory.

In one process, Python works on one batch while the tokenizer's Rust threads work on the batch before it.
With several processes, each takes a batch as a whole, and the tokenizer there runs on one thread.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

from stages.data.source_row import SourceRow
from stages.prepare.examples import ConvertedBatch, ExampleMaker, Outcome
from stages.prepare.garbage_collection import gc_relaxed
from stages.tokenization.encode import Tokenized

BATCHES_PER_WORKER = 2


def outcomes(
    batches: Iterable[Sequence[SourceRow]], maker: ExampleMaker, num_workers: int
) -> Iterator[Outcome]:
    """The outcome of every batch, in the order of the batches; the number of processes does not change it."""
    with gc_relaxed():  # forked processes inherit it
        if num_workers == 1:
            yield from _in_this_process(batches, maker)
        else:
            yield from _in_processes(batches, maker, num_workers)


def _in_this_process(batches: Iterable[Sequence[SourceRow]], maker: ExampleMaker) -> Iterator[Outcome]:
    with ThreadPoolExecutor(1) as tokenizing:
        waiting: tuple[ConvertedBatch, Future[Tokenized]] | None = None
        for rows in batches:
            batch = maker.convert(rows)
            tokenized = tokenizing.submit(maker.template.encoder.tokenize, batch.texts.texts)
            if waiting is not None:
                yield maker.finish(waiting[0], waiting[1].result())
            waiting = batch, tokenized
        if waiting is not None:
            yield maker.finish(waiting[0], waiting[1].result())


def _in_processes(
    batches: Iterable[Sequence[SourceRow]], maker: ExampleMaker, num_workers: int
) -> Iterator[Outcome]:
    # A forked process has the imports and the tokenizer already; a spawned one needs seconds to load them.
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
    """End this process when its parent is killed; it would wait for batches for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(rows: Sequence[SourceRow]) -> Outcome:
    return _maker[0].make(rows)
