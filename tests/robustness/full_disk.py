"""Fill the disk under each command, and take the right to write from it; see that it says so and harms nothing.

    python tests/robustness/full_disk.py [--what training "feature cache" evaluation adapt prepare experiment]

As root on Linux: folders are small tmpfs mounts of their own, and read-only remounts of them (file modes do not stop
root). Each command first runs with room enough, then again where the disk is full after so many bytes, or read-only.
It must end with exit code 2 and one line of its own, the last error on stderr, that names a file or folder and why, or
well where what is left is room enough; an experiment of which single runs fail names these and ends with code 1, as
always. What had been made before must be as it was, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import write_small_corpus
from workshop import LAUNCHER, Workshop

CLI = [sys.executable, "-m", "s3prl_metaperser.cli"]
ROOM = 64 << 20
LEFT = (0, 1_000, 20_000, 100_000)
"""Bytes that are left free; rounded to pages."""
ELSEWHERE = "elsewhere"
"""Where the command trains whose cache alone is on the full disk."""
ALSO = ("args_", "config_", "events.", "log.txt", ".lock", ".training.lock", "identity.json")
"""What s3prl and TensorBoard add to a folder at each start, and what holds no result."""


@contextmanager
def mounted(place: Path) -> Iterator[Path]:
    """Give a small file system of its own."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, left: int) -> None:
    """Take the room of a file system but for so many bytes."""
    free = os.statvfs(place)
    (place / "filling").write_bytes(b"\0" * max(0, free.f_bavail * free.f_bsize - left))


def content(place: Path) -> dict[str, bytes]:
    """Give all files that matter."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and path.name != "filling" and not path.name.startswith(ALSO)
    }


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which must come."""
    given = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=300)


def judge(name: str, done: subprocess.CompletedProcess[str], before: dict[str, bytes], place: Path) -> bool:
    """Print how a command ended; tell whether it was as it must be."""
    last = [line for line in done.stderr.replace("\r", "\n").splitlines() if "error:" in line][-1:] or ["no error"]
    now = content(place)
    changed = [path for path, bytes_ in before.items() if now.get(path) != bytes_]
    half = [path for path in now if Path(path).name.startswith(".")]
    runs_failed = name.startswith("experiment") and done.returncode == 1 and "cannot be written" in done.stderr
    had_room = done.returncode == 0 and not name.endswith("read-only")
    bad = (done.returncode != 2 and not runs_failed and not had_room) or "Traceback" in done.stderr or changed or half
    faults = f"  CHANGED {changed}" * bool(changed) + f"  LEFT {half}" * bool(half)
    verdict = "FAILED" if bad else "room" if had_room else "ok"
    print(f"{verdict:6} {name}: code {done.returncode}: {last[0].strip()}{faults}", flush=True)
    if bad:
        print(done.stderr[-1500:])
    return not bad


def main() -> int:
    """Try the commands; give 1 where one did not end as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", metavar="COMMAND", help="only these (default: all)")
    only = parser.parse_args().what
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        corpus = write_small_corpus(root / "corpus")
        shop = Workshop(root, corpus, ["-u", "fbank_no_cmvn"])
        steps = {"total_steps": 6, "eval_step": 2, "save_step": 2}
        shop.train("parent", shop.config("meta_perser_paper", steps, init_from=None), program=LAUNCHER)
        clips = sorted((corpus / "audio").glob("*.wav"))[:6]
        rows = [f"{clip.name},{['sad', 'neutral', 'angry'][number % 3]}" for number, clip in enumerate(clips)]
        (root / "mine.csv").write_text("\n".join(["audio,emotions", *rows]) + "\n")
        chosen = {name: command for name, command in commands(root, shop).items() if only is None or name in only}
        good = [try_all(name, command, root) for name, command in chosen.items()]
        print(f"{sum(map(sum, good))} of {sum(map(len, good))} ended as they must")
        return 0 if all(map(all, good)) else 1


def commands(root: Path, shop: Workshop) -> dict[str, list[str]]:
    """Give each command, all of which write below root/place."""
    place = root / "place"
    steps = {"total_steps": 6, "eval_step": 2, "save_step": 2}
    config = shop.config("meta_perser_paper", steps, init_from=None)
    cold = shop.config("meta_perser_paper", steps, init_from=None, feature_cache=str(place / "cache"))
    train = [*LAUNCHER, "-m", "train", "-d", "metaperser", "--device", "cpu", *shop.upstream]
    parent, audio = str(root / "parent/dev-best.ckpt"), str(shop.corpus / "audio")
    settings = ["runner.total_steps=4", "runner.eval_step=2", "runner.save_step=4"]
    settings += ["downstream_expert.data.min_annotations=4", "downstream_expert.adaptation.steps=[2,4]"]
    few = ["-u", "fbank_no_cmvn", "--folds", "1", "--scenario", "seen", "--queries", "6", "--episodes", "2"]
    few += ["--shots", "4", "--train-shots", "4", "--recipe", "paper", "--inner-lr", "0.1", "--set", *settings]
    return {
        "training": [*train, "-c", str(config), "-p", str(place / "run")],
        "feature cache": [*train, "-c", str(cold), "-p", str(root / ELSEWHERE)],
        "evaluation": [
            *(*LAUNCHER, "-m", "evaluate", "-e", parent, "--device", "cpu"),
            *("-o", f"args.expdir='{place / 'run'}'"),
        ],
        "adapt": [
            *(*CLI, "adapt", "--checkpoint", parent, "--labels", str(root / "mine.csv"), "--audio-root", audio),
            *("--out", str(place / "my.ckpt"), "--overwrite", "--device", "cpu"),
        ],
        "prepare": [
            *(*CLI, "prepare", "table", str(shop.corpus / "annotations.csv"), "--audio-root", str(shop.corpus)),
            *("--out", str(place / "corpus"), "--overwrite"),
        ],
        "experiment": [*CLI, "experiment", "figure2", "--corpus", str(shop.corpus), "--out", str(place / "out"), *few],
    }


def try_all(name: str, command: list[str], root: Path) -> list[bool]:
    """Run a command with room, with less and less of it, and where nothing may be written."""
    good, elsewhere = [], root / ELSEWHERE
    for left in LEFT:
        shutil.rmtree(elsewhere, ignore_errors=True)  # into which no other may train
        with mounted(root / "place") as place:
            before: dict[str, bytes] = {}
            if name != "feature cache" and left == LEFT[0]:
                done = run(command)
                if done.returncode:
                    raise SystemExit(f"{name}: with room enough: {done.stderr[-1500:]}")
                if name == "training":
                    (place / "run").rename(place / "earlier")  # into which no other may train
                before = content(place)
            fill(place, left)
            good.append(judge(f"{name}, {left} bytes left", run(command), before, place))
    shutil.rmtree(elsewhere, ignore_errors=True)
    with mounted(root / "place") as place:
        run(command)
        if name == "training":
            (place / "run").rename(place / "earlier")
        before = content(place)
        for shard in place.rglob("shard-*"):
            shard.unlink()
            before = content(place)
        shutil.rmtree(elsewhere, ignore_errors=True)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        good.append(judge(f"{name}, read-only", run(command), before, place))
    return good


if __name__ == "__main__":
    sys.exit(main())
