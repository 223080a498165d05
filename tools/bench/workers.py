"""Worker processes kept alive between their turns and idle while others are timed: a contender, or the ranks that train a network
together."""
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

ANSWER_S = 600.0  # longest wait for an answer: a contender may first write a copy of the photographs
# One computing thread a worker, and idle threads sleep. Read when torch is imported, so before the process begins.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MKL_NUM_THREADS": "1"}


class NotAvailable(RuntimeError):
    """A contender that cannot run here, and why: its package is not installed, or not of this version."""


def serve(pipe: Connection, start: Callable[..., AbstractContextManager[Any]], arguments: tuple[Any, ...]) -> None:
    """The process: start, answer that it is ready, then call (function, arguments) as commanded until the command is None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its workers
    try:
        with start(*arguments) as state:
            pipe.send(None)
            while (command := pipe.recv()) is not None:
                function, given = command
                pipe.send(function(state, *given))
            del state
    except EOFError:  # whoever commands is gone
        pass
    except NotAvailable as error:
        pipe.send(error)
    except Exception as error:  # sent to the other process, which names the worker
        last = (str(error).strip().splitlines() or [""])[-1]  # of a traceback of its own workers what it ends with
        with suppress(OSError):
            pipe.send(RuntimeError(f"{type(error).__name__}: {last}"))
    finally:
        gc.collect()  # processes of a worker's own end with the iterator that started them, cleanly while they are idle
        pipe.close()


class Workers:
    """Processes that work together, seen from outside. Each calls the context manager `start` with its `arguments`; commands work
    on what that gives. Raises NotAvailable, or RuntimeError saying which process failed, or died, and how."""

    def __init__(self, name: str, start: Callable[..., AbstractContextManager[Any]], arguments: Sequence[tuple[Any, ...]],
                 environment: Sequence[dict[str, str]] | None = None) -> None:
        self._name, self._pipes, self._processes = name, list[Connection](), []
        context = multiprocessing.get_context("spawn")
        for given, variables in zip(arguments, environment or [{}] * len(arguments)):
            pipe, other = context.Pipe()
            process = context.Process(target=serve, args=(other, start, given), name=name)
            with mock.patch.dict(os.environ, _ENVIRONMENT | variables):
                process.start()
            other.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        try:
            self._answers()
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(state, *arguments)` returns in each process; they run it at the same time."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._answers()

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, (pipe, process) in enumerate(zip(self._pipes, self._processes)):
            who = f"process {rank} of {self._name}" if len(self._pipes) > 1 else self._name
            if not pipe.poll(ANSWER_S):
                raise RuntimeError(f"{who} gave no answer for {ANSWER_S:.0f} s")
            try:
                answer = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join(5)
                raise RuntimeError(f"{who} died (exit code {process.exitcode})") from None
            if isinstance(answer, NotAvailable):
                raise answer
            if isinstance(answer, Exception):
                raise RuntimeError(f"{who} failed: {answer}")
            answers.append(answer)
        return answers
