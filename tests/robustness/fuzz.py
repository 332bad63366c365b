"""Feed a reader of files that others wrote with broken ones, a million if there is time.

    python tests/robustness/fuzz.py --target manifest --inputs 1000000 --seed 0
    python tests/robustness/fuzz.py --target manifest --engine atheris --seconds 480
    python tests/robustness/fuzz.py --sizes

Each input must be accepted or refused with ``MetaPerSERError``. Targets are in ``tests/fuzz_targets.py``. Engines:
``mutations`` makes inputs of valid files and pieces that break readers, input N of a seed being always the same one;
``hypothesis`` draws the same and texts at random, and shrinks what fails; ``atheris`` (``pip install atheris``, not for
every Python) is libFuzzer, which keeps what reaches new branches of our modules, csv and json, and so finds its way in
by itself; yaml's branches are left out, as counting them takes ten times as long.

Every hundredth input of ``mutations`` and all of ``--sizes`` are read under tracemalloc; no peak may be above
``10 × bytes + CONSTANT``. ``--sizes`` reads the inputs that take most: huge cells, lines and nestings, and rows of tiny
cells that all differ.

Every input is written to a file, and what is accepted is written again as the project does, down to the disk: with
``TMPDIR=/dev/shm``, a disk in memory, all this is five to ten times as fast.
"""

import argparse
import random
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MEBIBYTE = 1 << 20
MEASURED = 100
"""Of so many mutations one has its memory measured, which takes ten times as long."""


def main() -> int:
    """Run one target, or measure sizes; give 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="a name of fuzz_targets.py, or all, one after the other")
    parser.add_argument("--engine", choices=("mutations", "hypothesis", "atheris"), default="mutations")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of each target (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop earlier, after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", action="store_true", help="measure memory on large inputs instead")
    args = parser.parse_args()
    if args.sizes:
        return measure_sizes()
    if args.engine == "atheris":
        run_atheris(args.target, args.inputs, args.seconds, args.seed)
    from fuzz_targets import targets

    known = targets()
    chosen = list(known) if args.target == "all" else [args.target]
    run = run_hypothesis if args.engine == "hypothesis" else run_mutations
    return max(run(known[name], args.inputs, args.seconds, args.seed) for name in chosen)


def run_mutations(target, inputs: int, seconds: float, seed: int) -> int:
    """Read mutations of valid inputs, in order, until one fails."""
    from fuzz_targets import CONSTANT, Room, mutated

    accepted, highest, started = 0, 0, time.monotonic()
    number = 0
    with Room(target) as room:
        for number in range(1, inputs + 1):
            data = mutated(target, random.Random(f"{seed} {number}"))
            measured = number % MEASURED == 0
            if measured:
                tracemalloc.start()
            try:
                accepted += room.is_accepted(data)
            except BaseException:
                print(f"{target.name}: input {number} of seed {seed}: {data!r:.2000}", file=sys.stderr)
                raise
            if measured:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                highest = max(highest, peak - 10 * len(data))
                if peak > 10 * len(data) + CONSTANT:
                    print(f"{target.name}: input {number} of seed {seed} took {peak:,} bytes: {data!r:.500}")
                    return 1
            if time.monotonic() - started > seconds:
                break
    taken = time.monotonic() - started
    print(
        f"{target.name}: {number:,} inputs in {taken:.0f} s, {accepted:,} accepted, {number - accepted:,} refused; "
        f"most memory above 10 × size: {max(0, highest) / MEBIBYTE:.1f} MiB of {CONSTANT / MEBIBYTE:.0f}",
        flush=True,
    )
    return 0


def run_hypothesis(target, inputs: int, seconds: float, seed: int) -> int:
    """Draw inputs; a failing one is shrunk and raised."""
    import hypothesis
    from fuzz_targets import Room, drawn

    counts = {True: 0, False: 0}
    deadline = time.monotonic() + seconds
    with Room(target) as room:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=inputs, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(drawn(target))
        def read(data: bytes) -> None:
            if time.monotonic() < deadline:
                counts[room.is_accepted(data)] += 1

        read()
    print(f"{target.name}: {sum(counts.values()):,} inputs drawn, {counts[True]:,} accepted, {counts[False]:,} refused")
    return 0


def run_atheris(name: str, inputs: int, seconds: float, seed: int) -> None:
    """Let libFuzzer find its way; it ends the process itself."""
    import atheris

    with atheris.instrument_imports(include=["s3prl_metaperser", "csv", "json"]):
        import fuzz_targets
    target = fuzz_targets.targets()[name]
    room = fuzz_targets.Room(target)

    def read(data: bytes) -> None:
        room.is_accepted(data)

    corpus = room.folder.parent / f"{room.folder.name}-corpus"
    corpus.mkdir()
    for place, data in enumerate(target.valid):
        (corpus / str(place)).write_bytes(data)
    words = corpus.with_suffix(".dict")
    words.write_text("".join(f'"{_escaped(piece)}"\n' for piece in target.pieces() if 0 < len(piece) <= 64))
    limits = [f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=65536", "-rss_limit_mb=4096", "-timeout=20"]
    limits += [] if seconds == float("inf") else [f"-max_total_time={int(seconds)}"]
    atheris.Setup([sys.argv[0], str(corpus), f"-dict={words}", "-print_final_stats=1", *limits], read)
    atheris.Fuzz()


def _escaped(piece: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in piece)


def measure_sizes(megabytes: float = 4) -> int:
    """Print, for each target and large input, peak memory per byte of input."""
    from fuzz_targets import Room, large_inputs, targets

    known = targets()
    print(f"{'target':10} {'input':38} {'MiB':>6} {'peak MiB':>9} {'× size':>7}  accepted")
    for name, what, data in large_inputs(int(megabytes * MEBIBYTE)):
        with Room(known[name]) as room:
            tracemalloc.start()
            accepted = room.is_accepted(data)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        size = len(data)
        print(
            f"{name:10} {what:38} {size / MEBIBYTE:6.2f} {peak / MEBIBYTE:9.1f} {peak / size:7.1f}  {accepted}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
