"""Training, evaluating and resuming by s3prl's own commands, in a folder of the test's, on small settings."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from s3prl_metaperser import configs
from s3prl_metaperser.checkpoints import read_checkpoint

STOCK = [sys.executable, "-m", os.environ.get("METAPERSER_TEST_LAUNCHER", "s3prl.run_downstream")]
"""s3prl's own command; ``tests/stacks.sh`` has the launcher stand in for it where s3prl alone does not import."""
LAUNCHER = [sys.executable, "-m", "s3prl_metaperser.run_downstream"]


class Workshop:
    """Configs, commands and folders of one upstream's runs."""

    def __init__(self, root: Path, corpus: Path, upstream: list[str]) -> None:
        self.root, self.corpus, self.upstream = root, corpus, upstream

    def config(self, name: str, runner: dict | None = None, **expert) -> Path:
        config = yaml.safe_load(configs.find(name).read_text())
        config["runner"] |= {"total_steps": 6, "log_step": 1, "eval_step": 3, "save_step": 2} | (runner or {})
        own = config["downstream_expert"]
        own |= {"corpus": str(self.corpus), "feature_cache": str(self.root / "cache")}
        own["data"]["min_annotations"] = 4
        own["episodes"] |= {"shots": 4, "queries": 8, "number": 2}
        own["model"]["projector_dim"] = 8
        for key, value in expert.items():
            own[key] = own.get(key, {}) | value if isinstance(value, dict) else value
        path = self.root / f"config-{len(list(self.root.glob('config-*')))}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def run(self, *arguments: object, program: list[str] = STOCK, check: bool = True):
        done = self.launch([*program, "-d", "metaperser", "--device", "cpu", *map(str, arguments)])
        if check:
            assert done.returncode == 0, done.stderr[-3000:]
        return done

    def launch(self, command: list[str]) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=environment)

    def train(self, folder: str, config: Path, **kwargs):
        return self.run("-m", "train", *self.upstream, "-c", config, "-p", self.root / folder, **kwargs)

    def train_until_killed(self, folder: str, config: Path) -> int:
        """SIGKILL the stock runner once it has begun a second checkpoint; give the step of the first."""
        place = self.root / folder
        command = [*STOCK, "-m", "train", "-d", "metaperser", "--device", "cpu", *self.upstream]
        process = subprocess.Popen(
            [*command, "-c", str(config), "-p", str(place)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        while len(list(place.glob("states-*.ckpt"))) < 2:  # the first is whole once the second is begun
            assert process.poll() is None, "training ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = sorted(int(path.stem.split("-")[1]) for path in place.glob("states-*.ckpt"))
        try:
            downstream_state(place / f"states-{steps[-1]}.ckpt")
        except Exception:  # s3prl's writing is not atomic; the kill may have hit it
            (place / f"states-{steps[-1]}.ckpt").unlink()
        return steps[0]

    def evaluate(self, checkpoint: Path, folder: str, override: str = ""):
        options = ",,".join(filter(None, [f"args.expdir='{self.root / folder}'", override]))
        (self.root / folder).mkdir(exist_ok=True)
        return self.run("-m", "evaluate", "-e", checkpoint, "-o", options, program=LAUNCHER)


def scalars(folder: Path) -> dict[str, list[float]]:
    """Every TensorBoard scalar of a run, as floats in the order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def downstream_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of what was learned: the downstream, the featurizer, and the upstream where it learns."""
    state = read_checkpoint(checkpoint)
    parts = {"": "Downstream", "featurizer.": "Featurizer", "upstream.": "Upstream"}
    return {f"{prefix}{name}": value for prefix, part in parts.items() for name, value in state.get(part, {}).items()}


def same_weights(first: Path, second: Path) -> bool:
    a, b = downstream_state(first), downstream_state(second)
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
