"""Make the same results in every way that must not matter, and compare them bit for bit.

    python tests/robustness/determinism.py --seed 1

An experiment on a small corpus (a WavLM of two layers with random weights) is made

- with one run at a time and a cold feature cache, which is what the others are compared with,
- with one, two and three runs at a time, with the cache cold and warm,
- with one, two and three processes extracting features, and without a cache at all,
- from another folder and from another place in the file system,

with the same seed. ``results-figure2.csv`` and all predictions must be the same. With another seed they must not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import write_small_corpus
from small_upstreams import write_upstream

CLI = [sys.executable, "-m", "s3prl_metaperser.cli"]
PROCESSES = "METAPERSER_EXTRACTION_PROCESSES"


class Bench:
    """A corpus and an upstream, and the experiment on them.

    Args:
        root: folder to work in.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = write_small_corpus(root / "corpus")
        self.upstream = write_upstream("wavlm_local", root / "wavlm")

    def made(
        self, name: str, seed: int, jobs: int = 1, cache: str = "", processes: int = 0, cached: bool = True
    ) -> dict[str, bytes]:
        """Make the experiment; give its results and predictions.

        Args:
            name: of its folder.
            seed: of the experiment.
            jobs: runs at a time.
            cache: name of the feature cache; one of its own where it is empty.
            processes: that extract; 0: as many as the experiment wants.
            cached: whether there is a cache at all.
        """
        settings = ["runner.total_steps=4", "runner.eval_step=2", "runner.save_step=4"]
        settings += ["downstream_expert.data.min_annotations=4", "downstream_expert.adaptation.steps=[2,4]"]
        settings += [] if cached else ["downstream_expert.feature_cache=off"]
        out = self.root / name
        given = ["--corpus", str(self.corpus), "--out", str(out), "-u", "wavlm_local", "-k", str(self.upstream)]
        given += ["--folds", "1", "--scenario", "seen", "--queries", "6", "--episodes", "2", "--seed", str(seed)]
        given += ["--shots", "4", "--train-shots", "4", "--recipe", "paper", "--inner-lr", "0.1", "--jobs", str(jobs)]
        environment = os.environ | {"METAPERSER_CACHE": str(self.root / (cache or f"cache-of-{name}"))}
        environment |= {PROCESSES: str(processes)} if processes else {}
        done = subprocess.run(
            [*CLI, "experiment", "figure2", *given, "--set", *settings],
            cwd=self.root,
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            raise SystemExit(f"{name} ended with code {done.returncode}: {done.stderr[-1500:]}")
        files = [out / "results-figure2.csv", *sorted(out.rglob("predictions*.csv"))]
        return {str(path.relative_to(out)): path.read_bytes() for path in files}


def main() -> int:
    """Compare; give 1 where something differed that must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder).resolve())
        expected = bench.made("first", args.seed, cache="shared")
        ways: dict[str, dict] = {
            "the cache warm": {"cache": "shared"},
            "three runs at a time, the cache cold": {"jobs": 3},
            "two runs at a time, the cache warm": {"jobs": 2, "cache": "shared"},
            "one process extracts": {"processes": 1},
            "two processes extract": {"processes": 2},
            "in another folder": {"cache": "else/where"},
            "without a cache": {"cached": False},
        }
        wrong = 0
        for number, (way, given) in enumerate(ways.items()):
            found = bench.made(
                f"deeper/{number}" if way == "in another folder" else f"way-{number}", args.seed, **given
            )
            differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            wrong += bool(differing)
            print(f"{way}: {', '.join(sorted(differing)[:4]) + ' differ' if differing else 'the same'}", flush=True)
        other = bench.made("other-seed", args.seed + 1, cache="shared")
        wrong += other == expected
        print(f"another seed: {'the same, which it must not be' if other == expected else 'others'}")
        print(f"{len(expected)} files compared in {len(ways)} ways, {wrong} wrong")
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
