"""How a run's process is started on this machine.

Importing torch and s3prl takes longer than many a run. So runs are forked from a server process that has imported them
once (the standard library's ``forkserver``). Each is a process of its own all the same, with the command line, the
environment and the log of its command; it computes the same bits as that command given by hand.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import IO

from s3prl_metaperser.experiments.runs import LOG, Run

POLL_SECONDS = 0.05
MOST_SECONDS = 1.0
"""After so long it is asked again whether a run has ended, also where its end would be told."""
PATIENCE_SECONDS = 10.0
"""What a process is given to end when it is asked to, before it is killed."""


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        reason: such as ``ended with code 1``; None when it ended well.
    """

    reason: str | None

    @classmethod
    def with_code(cls, code: int) -> End:
        """Translate an exit code; a negative one is the signal that killed the process."""
        if code < 0:
            return cls(f"was killed by {signal.Signals(-code).name}")
        return cls(f"ended with code {code}" if code else None)


class Launched(ABC):
    """A run that is under way."""

    @abstractmethod
    def poll(self) -> End | None:
        """Tell how it ended; None while it goes on."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to end."""

    @abstractmethod
    def join(self) -> None:
        """Wait until it has ended, after :meth:`stop`."""


class Launcher(ABC):
    """Starts runs.

    Attributes:
        poll_seconds: how often it is worth asking whether a run has ended.
        is_elsewhere: whether runs have other devices than this machine has.
        held: open files that must stay open until the last run has ended, should this process be killed before.
    """

    poll_seconds = POLL_SECONDS
    is_elsewhere = False
    held: Sequence[IO[str]] = ()

    def check(self, arguments: Sequence[str]) -> None:
        """Find what is wrong with a run's command line before its folder is made.

        Args:
            arguments: see :meth:`Run.arguments`.

        Raises:
            MetaPerSERError: naming it.
        """
        check(arguments)

    def wait(self, under_way: Sequence[Launched]) -> None:
        """Return when it is worth asking again whether a run has ended."""
        time.sleep(self.poll_seconds)

    def clear(self, run: Run) -> None:
        """End what an experiment that was killed may have left running of a run; asked before its folder is made."""
        return

    @abstractmethod
    def start(self, run: Run) -> Launched:
        """Start a run whose folder is prepared.

        Raises:
            OSError: when the machine does not let it.
            MetaPerSERError: when a scheduler does not.
        """


def local_launcher(device: str, threads: int) -> Launcher:
    """Give the quickest launcher for a device.

    A CUDA context does not survive a fork, and not every system can fork; there each run imports for itself.

    Args:
        device: where torch computes.
        threads: CPU threads of each run.
    """
    if device == "cpu" and "forkserver" in multiprocessing.get_all_start_methods():
        return ForkLauncher(threads)
    return ProcessLauncher()


def check(arguments: Sequence[str]) -> None:
    """Check a run's command line in this process; see :meth:`Launcher.check`."""
    # s3prl and torch take seconds to import.
    from s3prl_metaperser import run_downstream

    run_downstream.make_ready()
    from s3prl_metaperser import preflight

    preflight.check(arguments)


class ProcessLauncher(Launcher):
    """Starts each run's command as it stands.

    A run goes on when this process is killed. It then holds what this process has locked, so that nobody else writes
    into the folder meanwhile.
    """

    def start(self, run: Run) -> Launched:
        """See :class:`Launcher`."""
        with (run.folder / LOG).open("ab") as log:
            return _Process(
                subprocess.Popen(
                    run.started_command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=run.environment(),
                    pass_fds=[file.fileno() for file in self.held],
                )
            )


class _Process(Launched):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> End | None:
        code = self._process.poll()
        return None if code is None else End.with_code(code)

    def stop(self) -> None:
        self._process.terminate()

    def join(self) -> None:
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


Body = Callable[[Sequence[str], Path, Mapping[str, str], int], None]
"""What a fork does, of the form of :func:`be_the_run`."""


class ForkLauncher(Launcher):
    """Forks each run from a process that has imported what runs import.

    It begins to import when the launcher is made, while this process goes on with its own work.

    Args:
        threads: CPU threads of each run, which numerical libraries want to know while they are imported.
        body: what a fork does; a function of a module, since it is named to another process.
    """

    def __init__(self, threads: int, body: Body | None = None) -> None:
        self._body = body or be_the_run
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["s3prl_metaperser.experiments.preloaded"])
        with environment({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}):
            forkserver.ensure_running()

    def check(self, arguments: Sequence[str]) -> None:
        """See :class:`Launcher`; in a fork, so that this process need not import s3prl."""
        with ProcessPoolExecutor(1, self._context, initializer=_end_with_parent) as process:
            process.submit(check, arguments).result()

    def wait(self, under_way: Sequence[Launched]) -> None:
        """See :class:`Launcher`; returns as soon as one has ended."""
        if under_way:
            connection.wait([one.sentinel for one in under_way if isinstance(one, _Forked)], MOST_SECONDS)

    def start(self, run: Run) -> Launched:
        """See :class:`Launcher`."""
        process = self._context.Process(
            target=self._body,
            args=(run.started_arguments(), run.folder / LOG, run.environment(), run.threads),
            name=run.name,
        )
        process.start()
        return _Forked(process)


class _Forked(Launched):
    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @property
    def sentinel(self) -> int:
        """What can be read once the process has ended."""
        return self._process.sentinel

    def poll(self) -> End | None:
        code = self._process.exitcode
        return None if code is None else End.with_code(code)

    def stop(self) -> None:
        self._process.terminate()

    def join(self) -> None:
        self._process.join(PATIENCE_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def be_the_run(arguments: Sequence[str], log: Path, environment: Mapping[str, str], threads: int) -> None:
    """Be the process that ``python -m s3prl_metaperser.run_downstream ARGUMENTS`` would be.

    Args:
        arguments: see :meth:`Run.started_arguments`.
        log: the file for both outputs, which are added to it.
        environment: the whole of it.
        threads: CPU threads.
    """
    # By an exception, so that semaphores are given back and nobody warns of them.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    _end_with_parent()
    _redirect(log)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    from s3prl_metaperser import run_downstream

    torch.set_num_threads(threads)
    sys.argv = [str(run_downstream.__file__), *arguments]
    # The folder is there already, so nothing is lost if what is wrong is found by the run itself.
    run_downstream.main(sets_run_up_first=False)


def _end_with_parent() -> None:
    """End with the experiment, also when that is killed: another may soon write into the same folder."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _redirect(log: Path) -> None:
    """Read nothing, and write both outputs to the log, whoever writes them."""
    with open(os.devnull, "rb") as nothing, log.open("ab") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
