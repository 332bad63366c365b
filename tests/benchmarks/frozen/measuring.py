"""What the parts have in common: programs timed side by side, and the lines that are printed."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from s3prl_metaperser.errors import MetaPerSERError


@dataclass(frozen=True)
class Options:
    """What ``run.py`` was told.

    Attributes:
        threads: CPU threads of torch.
        rounds: how often each program is timed.
        real_speech: folder of recordings in IEMOCAP's layout, or None: what needs them is left out, and says so.
        scratch: a folder of this part's own, gone afterwards.
    """

    threads: int
    rounds: int
    real_speech: Path | None
    scratch: Path


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: what was measured, with its sizes.
        target: such as ``≥ 8``; empty where there is none.
        reached: the figure, with its spread and unit.
        met: whether the target is reached; None where there is none, or where nothing could be measured.
        note: what limits it, or why it could not be measured.
    """

    what: str
    target: str
    reached: str
    met: bool | None
    note: str = ""


def side_by_side(
    programs: Mapping[str, Callable[[], object]], rounds: int, warming: int = 1, settling: int = 0
) -> dict[str, list[float]]:
    """Time programs in turns (A B C A B C …), so that what else the machine does falls on all alike.

    Args:
        programs: name → what is timed.
        rounds: how often each is.
        warming: how often each is run before, untimed.
        settling: how often each is run, untimed, at the beginning of its turn: what is a step of training follows on
            another of its kind, not on another program's with other memory in the caches.

    Returns:
        Name → seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    with tqdm(total=(warming + rounds) * len(programs), unit="run", leave=False, dynamic_ncols=True) as progress:
        for number in range(warming + rounds):
            for name, program in programs.items():
                progress.set_description(name)
                for _ in range(settling):
                    program()
                begun = time.perf_counter()
                program()
                taken = time.perf_counter() - begun
                if number >= warming:
                    seconds[name].append(taken)
                progress.update()
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How many times one program's seconds are another's: the median over rounds, with the extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, slow: list[float], fast: list[float]) -> Ratio:
        """Compare round by round."""
        ratios = [one / other for one, other in zip(slow, fast, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3g} × ({self.least:.3g} to {self.most:.3g})"


class Memory:
    """The process's resident set, over what it was when this was made; in bytes."""

    def __init__(self) -> None:
        if not Path("/proc/self/clear_refs").exists():
            raise MetaPerSERError("this benchmark reads the resident set from /proc; run it on Linux")
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.held = self._of("VmRSS")
        # 5 sets the high-water mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _of(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{key}:"))
        return int(line.split()[1]) * 1024

    def now(self) -> int:
        """Give what is resident."""
        return self._of("VmRSS") - self.held

    def peak(self) -> int:
        """Give the most that was."""
        return self._of("VmHWM") - self.held


def result_files(out: Path | None) -> list[Path]:
    """Give the files that ``--out RESULT`` stands for, table and Markdown; their folder is made.

    Raises:
        MetaPerSERError: where one of them is there already, or the folder cannot be.
    """
    files = [] if out is None else [out.with_name(out.name + ending) for ending in (".csv", ".md")]
    for path in files:
        if path.exists():
            raise MetaPerSERError(f"--out {out}: {path} is already there; move it away or give another name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MetaPerSERError(f"--out {out}: its folder cannot be made ({error.strerror})") from None
    return files
