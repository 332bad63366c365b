"""Let several processes work on one feature cache, one experiment or one run, and compare with one alone.

    python tests/robustness/together.py --rounds 3 --processes 3 --seed 0

A round does each of these with all processes at once, started within a tenth of a second of each other:

- ``cache``: evaluations of one checkpoint in folders of their own, by one cold feature cache, of 800 clips in four
  shards. One of them is killed on the way. No clip may be in two shards, and all that end must give the same results.
- ``evaluations``: evaluations of different systems in one folder. It must end with the rows of all of them.
- ``trainings``: the same training in one folder. One must end well, the others be refused in one line with exit code 2.
- ``experiments``: the same experiment in one folder. All must end well, and each run have been made once.

Afterwards the same commands run once alone: nothing may be locked, extracted or run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import write_small_corpus
from small_upstreams import write_upstream
from workshop import LAUNCHER, Workshop

CLI = [sys.executable, "-m", "s3prl_metaperser.cli"]
PATIENCE = 900
SYSTEMS = ("entire_zero", "entire_few", "linear_few", "entire_sim")


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def together(commands: Sequence[Sequence[str]], rng: random.Random) -> list[subprocess.Popen[str]]:
    """Start commands one shortly after the other."""
    processes = []
    for command in commands:
        processes.append(start(command))
        time.sleep(rng.uniform(0, 0.1))
    return processes


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for processes; give exit code and output of each."""
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def check(holds: bool, what: str) -> None:
    """End the script where something does not hold."""
    if not holds:
        raise SystemExit(f"FAILED: {what}")


class Bench:
    """A small corpus, its checkpoints, and a folder for each round.

    Args:
        root: folder to work in.
        processes: at once.
        rng: of moments.
    """

    def __init__(self, root: Path, processes: int, rng: random.Random) -> None:
        self.root, self.processes, self.rng = root, processes, rng
        (root / "many").mkdir()
        (root / "few").mkdir()
        wavlm = ["-u", "wavlm_local", "-k", str(write_upstream("wavlm_local", root / "wavlm"))]
        self.many = Workshop(root / "many", write_small_corpus(root / "many/corpus", per_session=160), wavlm)
        self.few = Workshop(root / "few", write_small_corpus(root / "few/corpus"), ["-u", "fbank_no_cmvn"])
        steps = {"total_steps": 2, "eval_step": 2}
        for shop in (self.many, self.few):
            shop.train("ssl_e", shop.config("ssl_e_paper", steps), program=LAUNCHER)
        self.expected = self.evaluate_many("alone", self.many.root / "cache")

    def evaluation(self, shop: Workshop, folder: Path, cache: Path, system: str = "entire_zero") -> list[str]:
        """Give the command that evaluates SSL-E into a folder."""
        folder.mkdir(exist_ok=True, parents=True)
        options = [f"args.expdir='{folder}'", f"config.downstream_expert.system='{system}'"]
        options += [f"config.downstream_expert.feature_cache='{cache}'"]
        checkpoint = str(shop.root / "ssl_e/dev-best.ckpt")
        return [*LAUNCHER, "-m", "evaluate", "-e", checkpoint, "--device", "cpu", "-o", ",,".join(options)]

    def evaluate_many(self, name: str, cache: Path) -> bytes:
        """Evaluate once, alone; give the predictions."""
        folder = self.root / name
        ((code, said),) = ended([start(self.evaluation(self.many, folder, cache))])
        check(code == 0, f"alone it ended with code {code}: {said[-500:]}")
        return (folder / "predictions.csv").read_bytes()

    def cache(self, place: Path) -> str:
        """One cold cache, one process killed on the way."""
        cache = place / "cache"
        folders = [place / f"run-{number}" for number in range(self.processes)]
        processes = together([self.evaluation(self.many, folder, cache) for folder in folders], self.rng)
        shards_before_kill = self.rng.randrange(4)
        while len(shards(cache)) < shards_before_kill or not cache.exists():
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0, 0.5))
        victim = self.rng.choice(processes)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        for folder, (code, said) in zip(folders, ended(processes), strict=True):
            if code != -signal.SIGKILL:
                check(code == 0, f"one ended with code {code}: {said[-500:]}")
                check((folder / "predictions.csv").read_bytes() == self.expected, f"{folder} has other predictions")
        clips = [clip for shard in shards(cache) for clip in clips_of(shard)]
        check(len(clips) == len(set(clips)) == 800, f"{len(clips)} clips in shards, {len(set(clips))} different ones")
        before = {path: path.stat().st_mtime_ns for path in shards(cache)}
        check(self.evaluate_many(f"{place.name}-warm", cache) == self.expected, "warm, there are other predictions")
        check(before == {path: path.stat().st_mtime_ns for path in shards(cache)}, "warm, something was extracted")
        return f"one killed after {shards_before_kill} shards; {len(before)} shards, each clip in one"

    def evaluations(self, place: Path) -> str:
        """One folder, several systems."""
        systems, folder = SYSTEMS[: self.processes], place / "run"
        commands = [self.evaluation(self.few, folder, self.few.root / "cache", system) for system in systems]
        for code, said in ended(together(commands, self.rng)):
            check(code == 0, f"one ended with code {code}: {said[-500:]}")
        rows = (folder / "results.csv").read_text().splitlines()[1:]
        check(len(rows) == 2 * len(systems) == len(set(rows)), f"{len(rows)} rows of {len(systems)} systems")
        listed = subprocess.run(["sha256sum", "-c", "checksums.sha256"], cwd=folder, capture_output=True, text=True)
        check(listed.returncode == 0, f"checksums: {listed.stdout}{listed.stderr}")
        return f"{len(systems)} systems, {len(rows)} rows"

    def trainings(self, place: Path) -> str:
        """One folder, the same training."""
        config = self.few.config("ssl_e_paper", {"total_steps": 400, "eval_step": 200, "save_step": 100})
        given = ["-m", "train", "-d", "metaperser", "--device", "cpu", *self.few.upstream, "-c", str(config)]
        commands = [[*LAUNCHER, *given, "-p", str(place / "run")]] * self.processes
        codes = ended(together(commands, self.rng))
        refused = [said for code, said in codes if code == 2]
        check(sorted(code for code, _ in codes) == [0] + [2] * len(refused), f"ended with {[c for c, _ in codes]}")
        told = ("another process trains into", "holds an earlier training")
        check(all(any(one in said.splitlines()[-1] for one in told) for said in refused), f"said {refused}")
        return f"one trained, {len(refused)} refused"

    def experiments(self, place: Path) -> str:
        """One folder, the same experiment."""
        settings = ["runner.total_steps=4", "runner.eval_step=2", "runner.save_step=4"]
        settings += ["downstream_expert.data.min_annotations=4", "downstream_expert.adaptation.steps=[2,4]"]
        command = [*CLI, "experiment", "figure2", "--corpus", str(self.few.corpus), "--out", str(place / "out")]
        command += ["-u", "fbank_no_cmvn", "--folds", "1", "--scenario", "seen", "--queries", "6", "--episodes", "2"]
        command += ["--shots", "4", "--train-shots", "4", "--recipe", "paper", "--inner-lr", "0.1", "--set", *settings]
        for code, said in ended(together([command] * self.processes, self.rng)):
            check(code == 0, f"one ended with code {code}: {said[-500:]}")
        records = sorted((place / "out").rglob("done.json"))
        starts = {path: json.loads(path.read_text())["started"] for path in records}
        ((code, _),) = ended([start(command)])
        check(code == 0, f"given again it ended with code {code}")
        again = {path: json.loads(path.read_text())["started"] for path in records}
        check(starts == again, "given again, runs were made again")
        for path in records:
            check(len(list(path.parent.glob("args_*.yaml"))) == 1, f"{path.parent} was run twice")
        return f"{len(records)} runs, each made once"


def shards(cache: Path) -> list[Path]:
    """List the shards of a cache."""
    return sorted(cache.rglob("shard-*.safetensors"))


def clips_of(shard: Path) -> list[str]:
    """Give the hashes of a shard's clips."""
    with safe_open(shard, framework="pt") as file:
        names: list[str] = json.loads(file.metadata()["audio"])
        return names


def main() -> None:
    """Do as many rounds as asked for; end with code 1 where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, choices=(2, 3, 4), default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder).resolve(), args.processes, random.Random(args.seed))
        parts: list[Callable[[Path], str]] = [bench.cache, bench.evaluations, bench.trainings, bench.experiments]
        for number in range(1, args.rounds + 1):
            for part in parts:
                name = getattr(part, "__name__", "")
                place = bench.root / f"{name}-{number}"
                place.mkdir()
                print(f"round {number}, {name}: {part(place)}", flush=True)


if __name__ == "__main__":
    main()
