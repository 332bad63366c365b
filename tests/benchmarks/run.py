"""What adapting with a frozen upstream costs: every line of docs/performance.md's first half, measured in one run.

    python tests/benchmarks/run.py [--real-speech FOLDER] [--out RESULT] [PART ...]

Each line is a ratio of two programs that run side by side, in turns, or a property such as the growth of a step's time.
Each part runs in a process of its own, one after the other. What each part measures stands at the top of its module in
``frozen/``. Learn2learn and TorchOpt are measured where they are installed:

    pip install torchopt
    pip download --no-deps --no-binary :all: learn2learn && tar xf learn2learn-0.2.0.tar.gz && cd learn2learn-0.2.0
    pip install cython gym wheel "torchvision==0.23.*" && python setup.py build_ext bdist_wheel
    pip install --no-deps dist/*.whl
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that a part finds `frozen` in its own process too
from frozen.measuring import Line, Options, result_files

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.errors import MetaPerSERError, exit_with, suggest

PARTS = ("inner_loop", "meta_step", "meta_test", "extraction", "scale", "start_up", "table1")


def run_part(part: str, options: Options) -> list[Line]:
    """Measure a part, in a process of its own, and print each line as it comes."""
    torch.set_num_threads(options.threads)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        own = Options(options.threads, options.rounds, options.real_speech, Path(folder))
        for line in importlib.import_module(f"frozen.{part}").measure(own):
            print(f"{part}: {line.what}: {line.reached}" + (f" (target {line.target})" if line.target else ""))
            sys.stdout.flush()
            lines.append(line)
    return lines


def as_table(measured: dict[str, list[Line]]) -> pd.DataFrame:
    """Give the lines of all parts as rows."""
    rows = [{"part": part, **asdict(line)} for part, lines in measured.items() for line in lines]
    frame = pd.DataFrame(rows)
    frame["met"] = frame["met"].map({True: "yes", False: "no"}).fillna("")
    return frame


def markdown(frame: pd.DataFrame) -> str:
    """Write rows as a Markdown table."""
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def machine(options: Options) -> str:
    """Say what it ran on."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {options.threads} threads, load {os.getloadavg()[0]:.1f} at "
        f"the start; torch {torch.__version__}, Python {platform.python_version()}; median of {options.rounds} rounds, "
        "in brackets the smallest and the largest."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)}. By default all")
    parser.add_argument("--real-speech", type=Path, metavar="FOLDER", help="recordings in IEMOCAP's layout, for table1")
    parser.add_argument("--out", type=Path, metavar="RESULT", help="RESULT.csv and RESULT.md are written")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of torch (default all cores)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each is timed (default 7)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all parts, print the table and save it."""
    args = parse(arguments)
    for part in args.parts:
        if part not in PARTS:
            raise MetaPerSERError(f"part {part!r} is unknown; {suggest(part, PARTS)}")
    for name, number in (("--threads", args.threads), ("--rounds", args.rounds)):
        if number < 1:
            raise MetaPerSERError(f"{name} {number}: expected 1 or more")
    if args.real_speech is not None and not args.real_speech.is_dir():
        raise MetaPerSERError(
            f"--real-speech {args.real_speech}: no such folder; expected recordings in IEMOCAP's layout"
        )
    results = result_files(args.out)
    options = Options(args.threads, args.rounds, args.real_speech, Path())
    head = machine(options)
    measured: dict[str, list[Line]] = {}
    for part in args.parts or PARTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            measured[part] = process.submit(run_part, part, options).result()
    frame = as_table(measured)
    text = f"{head}\n\n{markdown(frame)}"
    for path, content in zip(results, (frame.to_csv(index=False), text), strict=False):
        write_text(path, content)
    print(f"\n{text}")


if __name__ == "__main__":
    try:
        main()
    except MetaPerSERError as error:
        raise exit_with(error, "run.py") from None
