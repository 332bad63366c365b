"""One run of the grid: a config, a folder, and s3prl's runner in a process of its own.

A run that has ended well leaves ``done.json`` with a fingerprint of everything that determines it; asked for again, it
is not repeated. A run that was killed is begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import s3prl_metaperser
from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.errors import MetaPerSERError

DONE = "done.json"
LOG = "log.txt"


@cache
def _code_fingerprint() -> str:
    package = Path(s3prl_metaperser.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Upstream:
    """What s3prl loads, and where.

    Attributes:
        name: ``-u``.
        ckpt: ``-k``, or None.
        device: ``--device``.
    """

    name: str
    ckpt: str | None
    device: str

    def arguments(self) -> list[str]:
        """Give the flags of s3prl's runner."""
        return ["-u", self.name, "--device", self.device, *(["-k", self.ckpt] if self.ckpt else [])]


@dataclass(frozen=True)
class Run:
    """One call of s3prl's runner.

    Attributes:
        folder: its expdir.
        mode: ``train`` or ``evaluate``.
        config: the whole config file.
        upstream: what is loaded.
        seed: ``--seed``.
        checkpoint: whose weights are evaluated; None while training.
    """

    folder: Path
    mode: str
    config: Mapping[str, Any]
    upstream: Upstream
    seed: int
    checkpoint: Path | None = None

    def command(self) -> list[str]:
        """Give the command line."""
        return [
            sys.executable,
            "-m",
            "s3prl_metaperser.run_downstream",
            *["-m", self.mode, "-d", "metaperser", *self.upstream.arguments()],
            *["-c", str(self.folder / "config.yaml"), "-p", str(self.folder), "--seed", str(self.seed)],
            *(["-i", str(self.checkpoint)] if self.checkpoint else []),
        ]

    def fingerprint(self, threads: int) -> str:
        """Hash everything that determines the run: code, command, config, corpus, and the weights it starts from."""
        config = dict(self.config)
        corpus = Path(config["downstream_expert"]["corpus"])
        read = [
            *(corpus / "annotations.csv", corpus / "corpus.json"),
            *(self.checkpoint, config["downstream_expert"].get("init_from"), self.upstream.ckpt),
        ]
        parts = {
            "code": _code_fingerprint(),
            "mode": self.mode,
            "config": config,
            "upstream": asdict(self.upstream),
            "seed": self.seed,
            "threads": threads,
            "files": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in read if path],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def execute(self, threads: int) -> None:
        """Run unless it has been done.

        Args:
            threads: CPU threads of the process; results depend on it in the last bits, so it is not left to chance.

        Raises:
            MetaPerSERError: when the runner fails; with its last words.
        """
        fingerprint = self.fingerprint(threads)
        done = self.folder / DONE
        if done.exists() and json.loads(done.read_text(encoding="utf-8")).get("fingerprint") == fingerprint:
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        write_text(self.folder / "config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with (self.folder / LOG).open("w", encoding="utf-8") as log:
            result = subprocess.run(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        if result.returncode != 0:
            raise MetaPerSERError(
                f"{self.mode} in {self.folder} ended with code {result.returncode}: {self._last_words()}; "
                f"all of it is in {self.folder / LOG}"
            )
        write_text(done, json.dumps({"fingerprint": fingerprint, "command": self.command()}, indent=2) + "\n")

    def _last_words(self) -> str:
        lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing"
