"""Where a process's time goes: a timer interrupts it, and what lies between two of them counts for the code it hits.

The timer runs in real time, at a thousandth of the cost of a profiler that hooks calls, so that shares are those of
the program as it is. An interrupt during a long call of C++ comes when that returns, in the frame that made it, and
counts for it whole. What other threads do while the main thread waits counts as what that waits in.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Sequence
from types import CodeType, FrameType

INTERVAL_SECONDS = 0.005

Rule = tuple[str, str, tuple[str, ...]]
"""A share, what the path of a file contains, and the functions of the file that count for it; none: all."""


class Attribution:
    """Counts the seconds of this process's main thread, from :meth:`start` to :meth:`stop`.

    Args:
        rules: the innermost frame that one of them fits decides; of several rules that fit it, the first.
        outside: rules as well; a share found there is put before the first's, as in ``evaluation/inner loop``.
        otherwise: the share of what no rule fits.
    """

    def __init__(self, rules: Sequence[Rule], outside: Sequence[Rule], otherwise: str) -> None:
        self.seconds: Counter[str] = Counter()
        self._rules, self._outside, self._otherwise = rules, outside, otherwise
        self._of_code: dict[CodeType, tuple[str | None, str | None]] = {}
        self._last = 0.0

    def start(self) -> None:
        """Begin to count; takes SIGALRM."""
        self._last = time.perf_counter()
        signal.signal(signal.SIGALRM, self._interrupted)
        signal.setitimer(signal.ITIMER_REAL, INTERVAL_SECONDS, INTERVAL_SECONDS)

    def stop(self) -> None:
        """Count what is left, and no more."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._count(self._otherwise)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        found: str | None = None
        outside: str | None = None
        while frame is not None and outside is None:
            own, outside = self._look_up(frame.f_code)
            found = found or own
            frame = frame.f_back
        self._count("/".join(filter(None, (outside, found or self._otherwise))))

    def _count(self, share: str) -> None:
        now = time.perf_counter()
        self.seconds[share] += now - self._last
        self._last = now

    def _look_up(self, code: CodeType) -> tuple[str | None, str | None]:
        known = self._of_code.get(code)
        if known is None:
            known = self._of_code[code] = _fitting(self._rules, code), _fitting(self._outside, code)
        return known


def _fitting(rules: Sequence[Rule], code: CodeType) -> str | None:
    for share, place, functions in rules:
        if place in code.co_filename and (not functions or code.co_name in functions):
            return share
    return None
