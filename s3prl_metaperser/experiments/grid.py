"""A grid of runs that depend on each other: which may start, which must wait, what becomes of a failure.

A node is a run, or a choice between runs that is made on the dev annotator once those it compares have ended. Nodes
whose needs are met are launched, some at once. A failure takes along what needs it, and nothing else.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Literal

from tqdm import tqdm

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.launchers import Launched, Launcher
from s3prl_metaperser.experiments.runs import DEV_RESULTS, LOG, Run, last_words
from s3prl_metaperser.results_file import read_results
from s3prl_metaperser.settings import MetricName

State = Literal["done before", "done", "failed", "not run"]


@dataclass(frozen=True)
class Choice:
    """A run that goes on from the best of several trainings.

    Attributes:
        options: name of a training → the run, should that training be the best.
        folders: name of a training → its folder.
        metric: of the dev annotator's episodes, higher is better; of equals the first wins.
    """

    options: Mapping[str, Run]
    folders: Mapping[str, Path]
    metric: MetricName


@dataclass(frozen=True)
class Node:
    """A run of the grid and what comes before it.

    Attributes:
        name: such as ``seen/fold1/entire_few``; also that of its run.
        run: what is run.
        needs: nodes whose files it reads; all options, for a choice.
        after: nodes that must have ended, well or not.
    """

    name: str
    run: Run | Choice
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A run that did not end well.

    Attributes:
        name: of the node.
        reason: how it ended and its last words, in one line.
        log: the file with all of it.
    """

    name: str
    reason: str
    log: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} (all of it: {self.log})"


@dataclass
class Outcome:
    """What became of a grid.

    Attributes:
        states: node → what became of it.
        runs: node → its run, for those that are done or failed.
        seconds: node → how long its run took, when it was run.
        chosen: choice → the training that was best on dev.
        failures: in the order in which they happened.
    """

    states: dict[str, State] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def is_done(self, name: str) -> bool:
        """Tell whether a node's files can be read."""
        return self.states.get(name) in ("done", "done before")


class Grid:
    """Runs nodes in an order that respects what they need.

    Args:
        nodes: in the order of preference among those that may start; each after those it waits for.

    Raises:
        ValueError: for two nodes of one name, or a node that comes before one it waits for.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes: dict[str, Node] = {}
        for node in nodes:
            missing = {*node.needs, *node.after} - self.nodes.keys()
            if missing or node.name in self.nodes:
                raise ValueError(f"{node.name} comes twice, or before {sorted(missing)}")
            self.nodes[node.name] = node

    def run(self, launcher: Launcher, jobs: int) -> Outcome:
        """Run what is not done yet.

        Args:
            launcher: starts processes.
            jobs: runs that are under way at once.

        Returns:
            What became of every node.

        Raises:
            KeyboardInterrupt: after Ctrl-C, and SystemExit after SIGTERM; what was under way has then been stopped. Run
                again, trainings go on from their last states, and what has none begins anew.
        """
        shown = tqdm(total=len(self.nodes), desc="runs", unit="run", dynamic_ncols=True)
        with shown, _ended_by_sigterm():
            execution = _Execution(self.nodes, launcher, shown)
            try:
                while execution.goes_on(jobs):
                    launcher.wait(execution.under_way)
            finally:
                execution.stop()
        return execution.outcome

    def describe(self) -> Iterator[str]:
        """Say of every run, in order, whether it is done, by which command, and what dev has yet to choose."""
        done: set[str] = set()
        for node in self.nodes.values():
            known = done.issuperset(node.needs)
            run, chosen = _decided(node) if known else (node.run, None)
            if known and isinstance(run, Run) and run.is_done():
                done.add(node.name)
            yield f"{'done' if node.name in done else 'to run':6}  {node.name}"
            if isinstance(run, Choice):
                yield f"        chosen on dev from {', '.join(run.options)}; one of:"
            elif chosen is not None:
                yield f"        chosen on dev: {chosen}"
            for one in run.options.values() if isinstance(run, Choice) else [run]:
                yield f"        {one.shown_command()}"


@dataclass(frozen=True)
class _Running:
    run: Run
    launched: Launched
    started: datetime


class _Execution:
    """One pass through a grid: what waits, what runs, what has become of the rest."""

    def __init__(self, nodes: Mapping[str, Node], launcher: Launcher, shown: tqdm) -> None:
        self.outcome = Outcome()
        self._nodes = nodes
        self._rank = {name: rank for rank, name in enumerate(nodes)}
        self._launcher = launcher
        self._shown = shown
        self._order: TopologicalSorter[str] = TopologicalSorter(
            {node.name: (*node.needs, *node.after) for node in nodes.values()}
        )
        self._order.prepare()
        self._queue: list[Run] = []
        self._running: list[_Running] = []

    def goes_on(self, jobs: int) -> bool:
        """Take in what has ended, start what may start, and tell whether anything is left to wait for."""
        for one in list(self._running):
            end = one.launched.poll()
            if end is not None:
                self._running.remove(one)
                self._take_in(one, end.reason)
        # What is done before, or cannot be done, makes others ready at once.
        while ready := self._order.get_ready():
            for name in ready:
                self._receive(self._nodes[name])
        self._queue.sort(key=lambda run: self._rank[run.name])
        while self._queue and len(self._running) < jobs:
            self._start(self._queue.pop(0))
        under_way = ", ".join(one.run.name for one in self._running)
        if under_way != self._shown.postfix:
            self._shown.set_postfix_str(under_way)
        return self._order.is_active()

    @property
    def under_way(self) -> list[Launched]:
        """What has been started and not ended."""
        return [one.launched for one in self._running]

    def stop(self) -> None:
        """End what is under way."""
        for one in self._running:
            one.launched.stop()
        for one in self._running:
            one.launched.join()

    def _receive(self, node: Node) -> None:
        if not all(self.outcome.is_done(needed) for needed in node.needs):
            self._settle(node.name, "not run")
            return
        run, chosen = _decided(node)
        self.outcome.runs[node.name] = run
        if chosen is not None:
            self.outcome.chosen[node.name] = chosen
        if run.is_done():
            self.outcome.seconds[node.name] = float(run.record().get("seconds", "nan"))
            self._settle(node.name, "done before")
        else:
            self._queue.append(run)

    def _start(self, run: Run) -> None:
        try:
            self._launcher.clear(run)
            state = run.begin()
            if state is not None:
                self._shown.write(f"{run.name} goes on from {state.name}", file=sys.stderr)
            self._running.append(_Running(run, self._launcher.start(run), datetime.now(timezone.utc)))
        except (OSError, MetaPerSERError) as error:
            self._fail(run, f"could not be started: {error}")

    def _take_in(self, one: _Running, reason: str | None) -> None:
        ended = datetime.now(timezone.utc)
        missing = one.run.missing_output()
        if reason is not None:
            self._fail(one.run, f"{reason}: {last_words(one.run.folder / LOG)}")
        elif missing is not None:
            self._fail(one.run, f"ended well, but left no {missing}: is eval_step above total_steps?")
        else:
            try:
                one.run.finish(one.started, ended)
            except (OSError, MetaPerSERError) as error:
                self._fail(one.run, f"ended well, but that could not be recorded: {error}")
                return
            self.outcome.seconds[one.run.name] = round((ended - one.started).total_seconds(), 1)
            self._settle(one.run.name, "done")

    def _fail(self, run: Run, reason: str) -> None:
        failure = Failure(run.name, " ".join(reason.split()), str(run.folder / LOG))
        self.outcome.failures.append(failure)
        self._shown.write(f"failed: {failure}", file=sys.stderr)
        self._settle(run.name, "failed")

    def _settle(self, name: str, state: State) -> None:
        self.outcome.states[name] = state
        self._order.done(name)
        self._shown.update(1)


def _decided(node: Node) -> tuple[Run, str | None]:
    """Give a node's run, and the training that was chosen for it where there was a choice."""
    if isinstance(node.run, Run):
        return node.run, None
    scores = {
        name: float(read_results(folder / DEV_RESULTS)[node.run.metric].mean())
        for name, folder in node.run.folders.items()
    }
    best = max(scores, key=scores.__getitem__)
    return node.run.options[best], best


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program by an exception, so that what is under way is stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
