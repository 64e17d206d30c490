"""How worker processes begin and how they end, whoever starts them: Grain, or a process pool."""

import multiprocessing
import os
import signal
import threading


def begin_worker(*_) -> None:
    """Prepares a process that has just started as a worker.

    Ctrl-C is left to the process that the worker works for, and the worker ends with that process,
    even if that is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process follows its parent"
    parent.join()
    os._exit(1)


def kill_workers() -> None:
    """Ends all worker processes of this process at once, in the middle of whatever they do."""
    for process in multiprocessing.active_children():
        process.kill()
