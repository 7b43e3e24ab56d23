"""Many calls of one function, by processes of this machine or of a Ray cluster."""

import functools
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

from phi3v.errors import RunError, one_line

T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parents[1]
# On Ray, a process may be killed, and a node may go, without the item's doing.
MAX_DEAD_PROCESSES, MAX_DEAD_NODES = 3, 10
# Tasks that Ray has at a time, so that a cluster that can grow sees that there is more to do.
IN_FLIGHT = 4096


class Item(NamedTuple):
    number: int
    arguments: tuple
    deaths: int = 0  # of the processes and nodes that it was given to


def run_all(
    work: Callable[..., T],
    *arguments: Sequence,
    died: T,
    num_workers: int | None = None,
    ray_address: str | None = None,
    shared: Iterable[Path] = (),
) -> Iterator[T]:
    """
    Yield work(*each) for each of zip(*arguments), in order.

    An item whose process dies (a crash in a library, no memory) gets another one; where that dies
    too, `died` stands in its place. To close the iterator, or Ctrl-C, ends what is at work.

    Args:
        work: can be pickled, as what it takes and returns.
        num_workers: processes at a time (default: one for each CPU of the machine or cluster).
        ray_address: None for processes of this machine. Otherwise what `ray.init` takes (auto,
            host:6379, ray://host:10001), or "" for the cluster that is at hand or, where there is
            none, a local one.
        shared: what every node of the cluster has to see.

    Raises:
        RunError: Ray cannot be used, or a node does not see what is shared.
        Whatever `work` raises ends the run.
    """
    results = as_done(
        work,
        *arguments,
        died=died,
        num_workers=num_workers,
        ray_address=ray_address,
        shared=shared,
    )
    return in_order(results)


def as_done(
    work: Callable[..., T],
    *arguments: Sequence,
    died: T,
    num_workers: int | None = None,
    ray_address: str | None = None,
    shared: Iterable[Path] = (),
) -> Iterator[tuple[int, T]]:
    """As `run_all`, but yields each item's number and result as soon as it is done."""
    items = [Item(number, each) for number, each in enumerate(zip(*arguments, strict=True))]
    if ray_address is None:
        return run_locally(work, items, num_workers or os.cpu_count(), died)
    return run_on_ray(work, items, num_workers or IN_FLIGHT, died, ray_address, tuple(shared))


def in_order(results: Iterator[tuple[int, T]]) -> Iterator[T]:
    early: dict[int, T] = {}
    number = 0
    with closing(results):
        for done, result in results:
            early[done] = result
            while number in early:
                yield early.pop(number)
                number += 1


def in_flight(
    submit: Callable[[Item], Future], take: Callable[[], Item | None], limit: int
) -> Iterator[tuple[Item, Future]]:
    """Submit what `take` gives, at most `limit` at a time; yields each as soon as it is done."""
    done: SimpleQueue[tuple[Item, Future]] = SimpleQueue()
    count = 0
    while True:
        while count < limit and (item := take()) is not None:
            submit(item).add_done_callback(lambda future, item=item: done.put((item, future)))
            count += 1
        if count == 0:
            return
        yield done.get()
        count -= 1


# ---- This machine ----


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends, even if it was killed."""

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=follow_parent, daemon=True).start()


def run_pool(
    work: Callable[..., T], todo: Iterator[Item], num_workers: int
) -> Generator[tuple[int, T], None, list[Item]]:
    """Returns, once a worker has died, what was at work then; nothing when all is done."""
    # Forked, a worker is there at once; spawned, it imports the script and phi3v again, some
    # 5 seconds. On macOS to fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_workers, context, start_worker)
    suspects: list[Item] = []

    def take() -> Item | None:
        return None if suspects else next(todo, None)

    def submit(item: Item) -> Future:
        try:
            return pool.submit(work, *item.arguments)
        except BrokenProcessPool as error:
            future: Future = Future()
            future.set_exception(error)
            return future

    try:
        for item, future in in_flight(submit, take, 2 * num_workers):
            if isinstance(future.exception(), BrokenProcessPool):
                suspects.append(item)
            else:
                yield item.number, future.result()
    except BaseException:  # stopped: the items at work are not waited for
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(suspects, key=lambda item: item.number)


def run_locally(
    work: Callable[..., T], items: list[Item], num_workers: int, died: T
) -> Iterator[tuple[int, T]]:
    todo = iter(items)
    while suspects := (yield from run_pool(work, todo, min(num_workers, len(items) or 1))):
        # A worker that dies takes the whole pool with it: these get a process each.
        for item in suspects:
            if (yield from run_pool(work, iter([item]), 1)):
                yield item.number, died


# ---- A Ray cluster ----


@contextmanager
def ray_session(address: str) -> Iterator[None]:
    import ray

    # Ray's own processes send figures of their use to its makers, where nobody says otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of `ray job submit --working-dir`, which may hold another version.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory() as code:
        # A working_dir, as modules given in any other way come after those that a node may have in
        # a folder of the same name as this one.
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, Path(code, PACKAGE.name), ignore=skip)
        try:
            if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
                # Where nobody answers, Ray itself would try for minutes.
                socket.create_connection((match[1].strip("[]"), int(match[2])), 10).close()
            ray.init(
                address or None,
                runtime_env={"working_dir": code},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # of gRPC, of the system, of Ray
            raise RunError(f"cannot use Ray at {address or 'a local cluster'}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place
    try:
        yield
    finally:
        ray.shutdown()  # and so ends the tasks


@functools.cache  # once in a process
def check_node(shared: tuple[Path, ...]) -> None:
    for path in shared:
        if not path.exists():
            raise RunError(
                f"the node {socket.gethostname()} does not see {path}: "
                "it has to be on storage that all nodes share, below the same path"
            )


def run_on_ray(
    work: Callable[..., T],
    items: list[Item],
    limit: int,
    died: T,
    address: str,
    shared: tuple[Path, ...],
) -> Iterator[tuple[int, T]]:
    try:
        import ray
        from ray import exceptions as ray_errors
    except ImportError as error:
        raise RunError("--ray needs Ray, which is not installed: pip install ray") from error

    process_died = (ray_errors.WorkerCrashedError, ray_errors.OutOfMemoryError)
    # With a node goes, too, what its tasks have returned, and is not yet fetched.
    node_died = (
        ray_errors.NodeDiedError,
        ray_errors.LocalRayletDiedError,
        ray_errors.ObjectLostError,
    )

    # By its default strategy, Ray 2.60 left one of two nodes idle for most of a run.
    @ray.remote(max_retries=0, scheduling_strategy="SPREAD")
    def task(*arguments: object) -> T:
        check_node(shared)
        return work(*arguments)

    def submit(item: Item) -> Future:
        return task.remote(*item.arguments).future()

    def take() -> Item | None:
        return again.popleft() if again else next(todo, None)

    todo, again = iter(items), deque[Item]()
    with ray_session(address):
        for item, future in in_flight(submit, take, limit):
            error = future.exception()
            if error is None:
                yield item.number, future.result()
            elif isinstance(error, process_died + node_died):
                item = item._replace(deaths=item.deaths + 1)
                most = MAX_DEAD_NODES if isinstance(error, node_died) else MAX_DEAD_PROCESSES
                if item.deaths < most:
                    again.append(item)
                else:
                    yield item.number, died
            elif isinstance(error, ray_errors.RayTaskError):
                raise error.cause  # what `work` has raised
            else:
                raise RunError(f"Ray: {one_line(error)}") from error
