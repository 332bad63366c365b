"""Kill a command with SIGKILL at random moments, start it again until it ends, and compare with an uninterrupted run.

    python tests/robustness/kill.py --what training --rounds 20 --seed 0
    python tests/robustness/kill.py --what training-entire
    python tests/robustness/kill.py --what extraction
    python tests/robustness/kill.py --what experiment
    python tests/robustness/kill.py --what adapt

The command runs without interruption, then in each round from the same empty folder, with all its processes (its
process group) killed once: in every fifth round before it writes anything, else at some moment from its first file on;
a command that only writes in the end at any moment up to then. A round that ended before it was killed is not counted.
Given again as it was first given, the command must end well, and leave the same: the same files, bit for bit (of
checkpoints what they hold, but for the command line, which says what was resumed), the same TensorBoard scalars
wherever there are any, and no temporary file. With ``--cut`` every killed training also has its newest checkpoint cut
off, as s3prl's own writing leaves it. All is made in a folder of its own: a small synthetic corpus, filterbanks or a
WavLM of two layers with random weights.

Most of such a short command's time are its imports. So all but experiments, which do so themselves, are forked from a
process that has imported s3prl and torch; ``--fresh`` starts every command by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import write_small_corpus
from small_upstreams import write_upstream
from workshop import LAUNCHER, Workshop

from s3prl_metaperser.run_downstream import trust_namespaces

CLI = [sys.executable, "-m", "s3prl_metaperser.cli"]
PASSED_OVER = re.compile(
    r"(args|config)_[\d-]+\.yaml|events\.out\..*|damaged-.*|.*\.?lock|log\.txt|done\.json|.*\.json|report\.html"
)
"""Files that say when and how often a command was given."""
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.part")
PATIENCE = 600


@dataclass
class Subject:
    """A command that is killed.

    Attributes:
        command: the same each time.
        folder: what it writes, and what is compared.
        trains: whether the folder has states of its own to resume from.
    """

    command: list[str]
    folder: Path
    trains: bool = False


def training(root: Path) -> Subject:
    """Meta-training on filterbanks, from a cold feature cache, with checkpoints at every fourth step."""
    shop = Workshop(root, write_small_corpus(root / "corpus"), ["-u", "fbank_no_cmvn"])
    steps = {"total_steps": 40, "log_step": 2, "save_step": 4, "eval_step": 8}
    config = shop.config("meta_perser_paper", steps, init_from=None, feature_cache=str(root / "out/cache"))
    return _training(root, shop, config)


def training_entire(root: Path) -> Subject:
    """Meta-training through a small WavLM, with -f."""
    upstream = ["-u", "wavlm_local", "-k", str(write_upstream("wavlm_local", root / "wavlm")), "-f"]
    shop = Workshop(root, write_small_corpus(root / "corpus"), upstream)
    steps = {"total_steps": 8, "log_step": 1, "save_step": 1, "eval_step": 4, "gradient_accumulate_steps": 2}
    few = {"meta": {"inner_steps": 2}, "adaptation": {"steps": 2}, "episodes": {"number": 1}}
    cache = str(root / "out/cache")
    config = shop.config("meta_perser_entire", steps, init_from=None, feature_cache=cache, **few)
    return _training(root, shop, config)


def extraction(root: Path) -> Subject:
    """Features of 800 clips from a small WavLM in four shards, and one step of SSL-E on them."""
    upstream = ["-u", "wavlm_local", "-k", str(write_upstream("wavlm_local", root / "wavlm"))]
    shop = Workshop(root, write_small_corpus(root / "corpus", per_session=160), upstream)
    steps = {"total_steps": 1, "eval_step": 1, "save_step": 1}
    config = shop.config("ssl_e_paper", steps, feature_cache=str(root / "out/cache"))
    return _training(root, shop, config)


def _training(root: Path, shop: Workshop, config: Path) -> Subject:
    flags = ["-m", "train", "-a", "-d", "metaperser", "--device", "cpu", *shop.upstream]
    return Subject([*LAUNCHER, *flags, "-c", str(config), "-p", str(root / "out/run")], root / "out", trains=True)


def experiment(root: Path) -> Subject:
    """Figure 2 at one K: two trainings, and evaluations, two at a time."""
    corpus = write_small_corpus(root / "corpus")
    settings = ["runner.total_steps=4", "runner.eval_step=2", "runner.save_step=4"]
    settings += ["downstream_expert.data.min_annotations=4", "downstream_expert.adaptation.steps=[2,4]"]
    given = ["--corpus", str(corpus), "--out", str(root / "out"), "-u", "fbank_no_cmvn", "--folds", "1"]
    given += ["--scenario", "seen", "--queries", "6", "--episodes", "2", "--shots", "4", "--train-shots", "4"]
    given += ["--recipe", "paper", "--inner-lr", "0.1", "--jobs", "2", "--set", *settings]
    return Subject([*CLI, "experiment", "figure2", *given], root / "out")


def adapt(root: Path) -> Subject:
    """One listener's model from twelve labelled clips."""
    shop = Workshop(root, write_small_corpus(root / "corpus"), ["-u", "fbank_no_cmvn"])
    config = shop.config("meta_perser_paper", {"total_steps": 2, "eval_step": 2}, init_from=None)
    shop.train("parent", config, program=LAUNCHER)
    clips = sorted((shop.corpus / "audio").glob("*.wav"))[:12]
    rows = [f"{clip.name},{['sad', 'neutral', 'angry'][number % 3]}" for number, clip in enumerate(clips)]
    (root / "mine.csv").write_text("\n".join(["audio,emotions", *rows]) + "\n")
    given = ["--checkpoint", str(root / "parent/dev-best.ckpt"), "--labels", str(root / "mine.csv"), "--device", "cpu"]
    given += ["--audio-root", str(shop.corpus / "audio"), "--out", str(root / "out/my.ckpt"), "--overwrite"]
    return Subject([*CLI, "adapt", *given], root / "out")


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "training": training,
    "training-entire": training_entire,
    "extraction": extraction,
    "experiment": experiment,
    "adapt": adapt,
}


class Started:
    """A command that is under way, in a process group of its own.

    Args:
        subject: the command.
        log: for both its outputs, which are added to it.
        forked: whether it is forked from a process that has imported what it imports.
    """

    def __init__(self, subject: Subject, log: Path, forked: bool) -> None:
        self._process: subprocess.Popen[bytes] | ForkServerProcess
        if forked:
            module, *arguments = subject.command[2:]
            self._process = FORKS.Process(target=be_the_command, args=(module, arguments, log))
            self._process.start()
            return
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                subject.command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def poll(self) -> int | None:
        """Give the exit code, None while it is under way."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def wait(self) -> int:
        """Wait for its end; give the exit code."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(PATIENCE)
        self._process.join(PATIENCE)
        code = self._process.exitcode
        if code is None:
            raise SystemExit(f"a command has not ended after {PATIENCE} s")
        return code

    def kill(self) -> None:
        """Kill it with all its processes."""
        try:
            os.killpg(cast(int, self._process.pid), signal.SIGKILL)
        except ProcessLookupError:  # forked a moment ago, and not in a group of its own yet
            self._process.kill()
        self.wait()


FORKS: ForkServerContext = multiprocessing.get_context("forkserver")


def be_the_command(module: str, arguments: list[str], log: Path) -> None:
    """Be the process that ``python -m MODULE ARGUMENTS`` would be."""
    os.setsid()
    with open(os.devnull, "rb") as nothing, log.open("ab") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main())


def written(folder: Path) -> list[Path]:
    """List the files below a folder, some of which may vanish meanwhile."""
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]


def uninterrupted(subject: Subject, log: Path, forked: bool) -> tuple[float, float]:
    """Run the command to its end; give the seconds after which it began to write, and ended."""
    begun, first = time.monotonic(), None
    process = Started(subject, log, forked)
    while process.poll() is None:
        if first is None and written(subject.folder):
            first = time.monotonic() - begun
        time.sleep(0.01)
    if process.poll() or first is None:
        raise SystemExit(f"without interruption it ended with code {process.poll()}: {log.read_text()[-1500:]}")
    return first, time.monotonic() - begun


def killed(subject: Subject, before: float, after: float, log: Path, forked: bool) -> str | None:
    """Start the command and kill it; give what of its own was there, None if it had ended.

    Args:
        subject: the command.
        before: seconds from its start to the kill, if it has not begun to write by then.
        after: seconds from its first file to the kill.
        log: for both its outputs.
        forked: see :class:`Started`.
    """
    begun, first = time.monotonic(), None
    process = Started(subject, log, forked)
    while time.monotonic() < (begun + before if first is None else first + after):
        if first is None and written(subject.folder):
            first = time.monotonic()
        if process.poll() is not None:
            return None
        time.sleep(0.002)
    process.kill()
    files = written(subject.folder)
    leftovers = sum(bool(LEFTOVER.fullmatch(path.name)) for path in files)
    states = ", ".join(sorted(path.stem for path in files if path.name.startswith("states-")))
    found = f"{len(files)} files" + (f", {states}" if states else "")
    return f"{found}, {leftovers} half written"


def cut_newest(subject: Subject, rng: random.Random) -> str:
    """Cut off the newest state where there are two, as a kill within s3prl's own writing does."""
    states = sorted(subject.folder.rglob("states-*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))
    if len(states) < 2:
        return ""
    whole = states[-1].read_bytes()
    states[-1].write_bytes(whole[: rng.randrange(len(whole))])
    return f", then {states[-1].stem} cut off"


def content(path: Path) -> object:
    """Give what is compared of a file: a hash, of a checkpoint's weights and counts, or of all its bytes."""
    if path.name == "checksums.sha256":
        return [line for line in path.read_text().splitlines() if not line.endswith(".json")]
    if path.suffix != ".ckpt":
        return path.read_bytes()
    digest = hashlib.sha256()
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    parts = {name: part for name, part in checkpoint.items() if name not in ("Args", "Config")}

    def add(name: str, value: object) -> None:
        digest.update(f"{name} {type(value).__name__}\n".encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, one in value.items():
                add(f"{name}/{key}", one)
        else:
            digest.update(repr(value).encode())

    add("", parts)
    return digest.hexdigest()


def scalars(folder: Path) -> dict[tuple[str, str, int], set[float]]:
    """Give the values of every TensorBoard scalar: folder, tag, step → what was logged there, over all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[tuple[str, str, int], set[float]] = {}
    for path in folder.rglob("events.out.*"):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                place = str(path.parent.relative_to(folder)), tag, event.step
                found.setdefault(place, set()).add(event.value)
    return found


def kept(folder: Path) -> dict[str, object]:
    """Give what is compared of a folder: path → content."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(written(folder))
        if not PASSED_OVER.fullmatch(path.name) and not LEFTOVER.fullmatch(path.name)
    }


def differences(subject: Subject, expected: dict[str, object], logged: dict) -> tuple[list[str], int]:
    """Name what differs from the uninterrupted run, and count the scalars that a kill has taken."""
    found, again = kept(subject.folder), scalars(subject.folder)
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is new" for name in found.keys() - expected.keys()]
    wrong += [f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    # Who adapts holds no lock: what it left goes with a writing a minute later.
    left = [path.name for path in written(subject.folder) if LEFTOVER.fullmatch(path.name)]
    wrong += [f"{name} is left" for name in left if not name.startswith(".my.ckpt")]
    wrong += [f"{place} differs" for place, values in again.items() if logged.get(place) != values]
    return wrong, len(logged.keys() - again.keys())


def main() -> int:
    """Kill as often as asked for; give 1 where anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=SUBJECTS, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--cut", action="store_true", help="cut the newest checkpoint off after each kill")
    parser.add_argument("--fresh", action="store_true", help="start every command by itself")
    parser.add_argument("--root", type=Path, help="folder to work in, which must not exist, and is kept")
    args = parser.parse_args()
    trust_namespaces()
    if args.root:
        args.root.mkdir(parents=True)
        return run(args, args.root.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return run(args, Path(folder).resolve())


def run(args: argparse.Namespace, root: Path) -> int:
    """Do what the command line asks for in a folder."""
    forked = args.what != "experiment" and not args.fresh
    os.environ["OMP_NUM_THREADS"] = "1"
    if forked:
        FORKS.set_forkserver_preload(["s3prl_metaperser.experiments.preloaded"])
    subject, rng, log = SUBJECTS[args.what](root), random.Random(args.seed), root / "log.txt"
    uninterrupted(subject, log, forked)
    shutil.rmtree(subject.folder)
    first, last = uninterrupted(subject, log, forked)  # once more: files are in memory now, as in every round
    expected, logged = kept(subject.folder), scalars(subject.folder)
    print(f"{args.what}: {last:.1f} s, writes after {first:.1f} s; {len(expected)} files, {len(logged)} scalars")
    failed = lost = 0
    for number in range(1, args.rounds + 1):
        said = None
        while said is None:
            shutil.rmtree(subject.folder, ignore_errors=True)
            is_early = number % 5 == 0 or last - first < last / 5
            before, after = rng.uniform(0, first) if is_early else PATIENCE, rng.uniform(0, last - first)
            said = killed(subject, before, after, log, forked)
        if args.cut and subject.trains:
            said += cut_newest(subject, rng)
        # TensorBoard's files are named after the second: by hand no command is given twice in one.
        time.sleep(1)
        code = Started(subject, log, forked).wait()
        wrong, missing = differences(subject, expected, logged) if code == 0 else ([f"ended with code {code}"], 0)
        failed, lost = failed + bool(wrong), lost + missing
        when = f"{before:.2f} s after its start" if is_early else f"{after:.2f} s after its first file"
        print(f"round {number}: killed {when} ({said}): {'; '.join(wrong[:5]) or 'the same'}", flush=True)
        if wrong and args.root:
            shutil.copytree(subject.folder, root / f"round-{number}")
    print(f"{args.what}: {args.rounds} killed, {args.rounds - failed} the same; {lost} scalars of TensorBoard lost")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
