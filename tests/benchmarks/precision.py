"""Does bfloat16 change what a listener gets? The same training in both precisions, seed by seed, by s3prl's runner.

    python tests/benchmarks/precision.py [--seeds N] [--out FOLDER]

On the synthetic demo corpus, with a small WavLM of random weights and scope entire: SSL-E, then Meta-PerSER from it,
each in ``precision: float32`` and ``bfloat16``. Printed and saved are the test listener's scores, mean and standard
deviation over seeds, and the differences of the two precisions within a seed beside those between seeds in one
precision: the noise.
"""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

from s3prl_metaperser import configs
from s3prl_metaperser.experiments.demo import make_corpus
from s3prl_metaperser.experiments.random_wavlm import write_random_wavlm

PRECISIONS = ("float32", "bfloat16")
METRICS = ["maF1", "miF1", "UA"]


def config(name: str, folder: Path, corpus: Path, precision: str, init_from: Path | None) -> Path:
    """Shorten an installed config to what a small model needs, and write it."""
    given = yaml.safe_load(configs.find(name).read_text())
    steps = {"ssl_e_entire": 50, "meta_perser_entire": 6}[name]
    runner = {
        "total_steps": steps,
        "eval_step": steps,
        "save_step": steps,
        "gradient_accumulate_steps": 1 if init_from is None else 3,
    }
    given["runner"] |= runner
    given["optimizer"]["lr"] = 1e-3
    own = given["downstream_expert"]
    own |= {"corpus": str(corpus), "precision": precision, "feature_cache": str(folder.parent / "cache")}
    own["episodes"] |= {"shots": 16, "queries": 64, "number": 3}
    own["adaptation"] |= {"steps": [5]}
    if init_from is not None:
        own["init_from"] = str(init_from)
        own["meta"] |= {"query": "disjoint", "inner_steps": 3}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def train(
    name: str, seed: int, precision: str, out: Path, corpus: Path, upstream: Path, init_from: Path | None
) -> Path:
    """Run s3prl's runner, unless it has run; give the folder."""
    folder = out / f"{name}-{precision}-seed{seed}"
    if not (folder / "results.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        written = config(name, folder, corpus, precision, init_from)
        command = [sys.executable, "-m", "s3prl.run_downstream", "-m", "train", "-d", "metaperser", "-f"]
        command += ["-c", str(written), "--device", "cpu"]
        command += ["-u", "wavlm_local", "-k", str(upstream), "-p", str(folder), "--seed", str(seed)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return folder


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--out", type=Path, default=Path("result/precision"), help="folder of runs and table")
    args = parser.parse_args()
    out = args.out.absolute()
    corpus = make_corpus(out, 0)
    rows = []
    for seed in range(1, args.seeds + 1):
        upstream = out / f"wavlm-seed{seed}.pt"
        if not upstream.exists():
            write_random_wavlm(upstream, seed)
        for precision in PRECISIONS:
            ssl_e = train("ssl_e_entire", seed, precision, out, corpus, upstream, None)
            meta = train("meta_perser_entire", seed, precision, out, corpus, upstream, ssl_e / "dev-best.ckpt")
            for folder in (ssl_e, meta):
                results = pd.read_csv(folder / "results.csv")
                system = results["system"].iloc[0]
                rows.append({"system": system, "precision": precision, "seed": seed, **results[METRICS].mean()})
            print(pd.DataFrame(rows[-2:]).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(out / "precision.csv", index=False)
    print(table.groupby(["system", "precision"])[METRICS].agg(["mean", "std"]).round(2).to_string())
    for system, own in table.groupby("system"):
        by_seed = own.pivot(index="seed", columns="precision", values="miF1")
        within = (by_seed["bfloat16"] - by_seed["float32"]).abs().mean()
        between = pd.Series([abs(a - b) for a, b in itertools.combinations(by_seed["float32"], 2)]).mean()
        print(f"{system}: miF1 differs by {within:.2f} between precisions of a seed, by {between:.2f} between seeds")


if __name__ == "__main__":
    main()
