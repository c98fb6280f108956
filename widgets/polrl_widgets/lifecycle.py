"""Which labs are open, and what ends or pauses them: the cell that is run again, the interrupt button."""

from __future__ import annotations

import contextlib
import signal
import threading
import weakref
from types import FrameType
from typing import Any, Protocol


class Open(Protocol):
    """What a lab can be told from outside."""

    def interrupt(self, words: str) -> None:
        """Pause and say why."""

    def close(self) -> None:
        """End training and leave the page."""


_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()
#: By cell: the execution that made the labs, and these.
_BY_CELL: dict[str, tuple[str, list[weakref.ref[Any]]]] = {}
_INTERRUPTED = "paused: the kernel was interrupted"


def opened(lab: Open) -> None:
    """Note a new lab; those that an earlier run of the same cell left are closed."""
    shell = _shell()
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell, execution = parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id", "")
    if cell is not None:
        before, labs = _BY_CELL.get(cell, (execution, []))
        if before != execution:
            for former in filter(None, (lab() for lab in labs)):
                former.close()
            labs = []
        _BY_CELL[cell] = (execution, [*labs, weakref.ref(lab)])
    _OPEN.add(lab)
    _follow_interrupts(shell)


def pause_all() -> None:
    """Pause every open lab, because the kernel was interrupted."""
    for lab in list(_OPEN):
        lab.interrupt(_INTERRUPTED)


def _shell() -> Any:
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


def _follow_interrupts(shell: Any) -> None:
    """Let the interrupt button pause labs, while a cell runs and while none does."""
    kernel = getattr(shell, "kernel", None)
    if kernel is None or getattr(shell, "_polrl_follows", False):
        return
    shell._polrl_follows = True

    def after_cell(result: Any = None) -> None:
        if isinstance(getattr(result, "error_in_exec", None), KeyboardInterrupt):
            pause_all()

    shell.events.register("post_run_cell", after_cell)

    def on_signal(number: int, frame: FrameType | None) -> None:
        pause_all()

    # An idle kernel ignores the signal, and undoes at a cell's end what the cell has set; but it restores this.
    if threading.current_thread() is threading.main_thread() and hasattr(kernel, "saved_sigint_handler"):
        kernel.saved_sigint_handler = on_signal
    else:
        with contextlib.suppress(ValueError):  # another thread may not set handlers
            signal.signal(signal.SIGINT, on_signal)
