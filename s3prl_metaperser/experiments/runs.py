"""One run of a grid: a config, a folder, and the command of s3prl's runner that goes with them.

A run that has ended well leaves ``done.json`` with a fingerprint of everything that determines it, and checksums of
what it has left; asked for again, it is not repeated. A training that was stopped or killed goes on from the newest
state that it has saved (s3prl's ``states-STEP.ckpt``), in any scope, and ends in what it would have ended in: its
folder says in ``begun.json`` which run it was begun by. How much is lost is for ``runner.save_step`` to say. All else
is begun anew: evaluations, trainings that have saved no state yet, and runs whose files are not what they have left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

import s3prl_metaperser
from s3prl_metaperser import checksums, state_files
from s3prl_metaperser.atomic import remove_leftovers, write_text
from s3prl_metaperser.corpus.manifest import ANNOTATIONS_FILE, CORPUS_FILE, load_corpus
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.settings import read_settings

Mode = Literal["train", "evaluate"]

BEGUN, DONE = "begun.json", "done.json"
LOG = "log.txt"
CONFIG = "config.yaml"
BEST = "dev-best.ckpt"
RESULTS, DEV_RESULTS = "results.csv", "results-dev.csv"
FAILURES, DEV_FAILURES = "failures.csv", "failures-dev.csv"
OUTPUTS: dict[Mode, tuple[str, ...]] = {"train": (BEST, DEV_RESULTS), "evaluate": (RESULTS,)}
"""What a run that ended well has left, and others read."""
KEPT = (
    *(BEST, DEV_RESULTS, RESULTS, DEV_FAILURES, FAILURES),
    *("predictions.csv", "predictions-dev.csv", "tuning.csv", "checkpoints.csv", "checkpoints-dev.csv"),
)
"""Files of a run that have a checksum in ``done.json``, as far as they are there."""

CODE, RECORDINGS, WEIGHTS = "code", "recordings", "upstream weights"
"""Sources of a run."""

PROGRAM = (sys.executable, "-m", "s3prl_metaperser.run_downstream")
LIBRARIES = ("s3prl", "torch", "torchaudio", "transformers", "numpy", "higher")
"""Those whose version may change a run's numbers."""
STATES = 2
"""What the configs have s3prl keep: the last state, and one to go on from where the last is damaged."""
_OWN_ROOM = "experiments"


@cache
def _code_fingerprint() -> str:
    """Hash the code that runs inside a run: the package without the room that only arranges runs."""
    package = Path(s3prl_metaperser.__file__).parent
    digest = hashlib.sha256("".join(f"{name} {version(name)}\n" for name in LIBRARIES).encode())
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] != _OWN_ROOM:
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _file_fingerprint(path: Path) -> str:
    state = path.stat()
    return _content_hash(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@cache
def _content_hash(path: Path, size: int, changed: int, replaced: int) -> str:
    """Hash a file; the rest is what a changed file is told from a remembered one by, as in a feature cache."""
    return checksums.of_file(path)


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _fingerprints(place: Path) -> list[str]:
    """Hash a file, or every file of a folder, such as an hf_* upstream's, with its name there."""
    if not place.is_dir():
        return [_file_fingerprint(place)]
    files = sorted(file for file in place.rglob("*") if file.is_file())
    return [f"{file.relative_to(place)} {_file_fingerprint(file)}" for file in files]


def _audio_fingerprints(corpus: Path, manifest: Sequence[str], feature_cache: str) -> list[str]:
    """Hash a corpus's recordings; as the feature cache remembers them, where there is one.

    Raises:
        MetaPerSERError: when one is missing or cannot be read, or the corpus is not valid.
    """
    # torch takes seconds to import.
    from s3prl_metaperser.upstream.cache import FileHashes, default_cache, expanded

    root, recordings = _recordings(corpus, *manifest)
    if feature_cache == "off":
        return [_file_fingerprint(path) for path in recordings]
    place = default_cache() if feature_cache == "auto" else expanded(feature_cache)
    return FileHashes(place, root).of(recordings)


@cache
def _recordings(corpus: Path, *manifest: str) -> tuple[Path, Sequence[Path]]:
    """Give a corpus's audio root and recordings; ``manifest`` tells a changed corpus from a remembered one."""
    loaded = load_corpus(corpus)
    return loaded.root, list(loaded.audio_paths().values())


@dataclass(frozen=True)
class Upstream:
    """What s3prl loads, and where.

    Attributes:
        name: ``-u``.
        ckpt: ``-k``, a path or an address, or None.
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
        name: what it is called in the grid, such as ``seen/fold1/ssl_e``.
        folder: its expdir.
        mode: ``train`` or ``evaluate``.
        config: the whole config file.
        upstream: what is loaded.
        seed: ``--seed``.
        threads: CPU threads; results depend on it in the last bits, so it is not left to chance.
        checkpoint: whose weights are evaluated; None while training, and for a system that needs none.
    """

    name: str
    folder: Path
    mode: Mode
    config: Mapping[str, Any]
    upstream: Upstream
    seed: int
    threads: int
    checkpoint: Path | None = None

    @property
    def trains_upstream(self) -> bool:
        """Whether the upstream learns too, which s3prl must be told beside the config."""
        return self.mode == "train" and self.config["downstream_expert"]["scope"] == "entire"

    def arguments(self) -> list[str]:
        """Give the command line after the program's name."""
        return [
            *["-m", self.mode, "-d", "metaperser", *self.upstream.arguments()],
            *(["-f"] if self.trains_upstream else []),
            *["-c", str(self.folder / CONFIG), "-p", str(self.folder), "--seed", str(self.seed)],
            *(["-i", str(self.checkpoint)] if self.checkpoint else []),
        ]

    def started_arguments(self) -> list[str]:
        """Give :meth:`arguments` as they are started with after :meth:`begin`: a training takes up a state it finds."""
        arguments = self.arguments()
        if self.mode == "evaluate":
            return arguments
        arguments += ["-a"]
        ckpt = self.upstream.ckpt
        if ckpt and not Path(ckpt).exists():
            # An address that comes out of a state is not trusted, unless it is given here as well. s3prl's -o is split
            # at these characters before it is evaluated.
            literal = repr(ckpt).replace("=", r"\x3d").replace(",", r"\x2c")
            arguments += ["-o", f"args.upstream_ckpt={literal}"]
        return arguments

    def command(self) -> list[str]:
        """Give the command that does the same by hand, from the beginning."""
        return [*PROGRAM, *self.arguments()]

    def started_command(self) -> list[str]:
        """Give the command with :meth:`started_arguments`."""
        return [*PROGRAM, *self.started_arguments()]

    def thread_limits(self) -> dict[str, str]:
        """Give the environment variables by which numerical libraries keep to :attr:`threads`."""
        return thread_limits(self.threads)

    def environment(self) -> dict[str, str]:
        """Give the environment of the process."""
        return dict(os.environ) | self.thread_limits()

    def shown_command(self) -> str:
        """Give :meth:`command` as a shell takes it, with its thread limits."""
        limits = " ".join(f"{name}={value}" for name, value in self.thread_limits().items())
        return f"{limits} {shlex.join(self.command())}"

    def fingerprint(self) -> str:
        """Hash everything that determines the run: code, config, corpus, and the weights it starts from.

        Files are told by what they hold, not by where they are.

        Raises:
            OSError: when a file that it reads is not there (yet).
            MetaPerSERError: when a recording is not, or the corpus is not valid.
        """
        feature_cache = read_settings(self.config["downstream_expert"]).feature_cache
        expert = dict(self.config["downstream_expert"])
        corpus = Path(expert.pop("corpus"))
        manifest = [_file_fingerprint(corpus / name) for name in (ANNOTATIONS_FILE, CORPUS_FILE)]
        read = [Path(path) for path in (self.checkpoint, expert.pop("init_from", None)) if path]
        upstream, ckpt = self.upstream, self._upstream_file()
        if ckpt is not None:
            read.append(ckpt)
            upstream = replace(upstream, ckpt="")
        parts = {
            "code": _code_fingerprint(),
            "mode": self.mode,
            "config": {**self.config, "downstream_expert": expert},
            "upstream": asdict(upstream),
            "seed": self.seed,
            "threads": self.threads,
            "files": [*manifest, *(digest for path in read for digest in _fingerprints(path))],
            "audio": _audio_fingerprints(corpus, manifest, feature_cache),
        }
        return _hash(parts)

    def _upstream_file(self) -> Path | None:
        ckpt = self.upstream.ckpt
        return Path(ckpt) if ckpt and Path(ckpt).exists() else None

    def _sources(self) -> dict[str, str]:
        """Hash, one by one, what all runs of a folder read and no setting of them tells."""
        expert = self.config["downstream_expert"]
        corpus, ckpt = Path(expert["corpus"]), self._upstream_file()
        manifest = [_file_fingerprint(corpus / name) for name in (ANNOTATIONS_FILE, CORPUS_FILE)]
        return {
            CODE: _code_fingerprint(),
            RECORDINGS: _hash(_audio_fingerprints(corpus, manifest, read_settings(expert).feature_cache)),
            WEIGHTS: _hash(_fingerprints(ckpt) if ckpt is not None else []),
        }

    def is_done(self) -> bool:
        """Tell whether this very run has ended well, and what it left is still there; say so where it is damaged."""
        try:
            record = self.record()
            if record["fingerprint"] != self.fingerprint() or self.missing_output() is not None:
                return False
            changed = [name for name, digest in record["files"].items() if self._checksum(name) != digest]
        except (OSError, MetaPerSERError, ValueError, KeyError, TypeError, AttributeError):
            return False
        for name in changed:
            print(
                f"metaperser: {self.folder / name} is not what its run has left (edited, or damaged?): {self.name} is "
                "run again",
                file=sys.stderr,
            )
        return not changed

    def _checksum(self, name: str) -> str | None:
        path = self.folder / name
        return _file_fingerprint(path) if path.exists() else None

    def record(self) -> dict[str, Any]:
        """Read ``done.json``: fingerprint, sources, files' checksums, command, start, end, and how many seconds.

        Of a training that has gone on, times are those of its last part.

        Raises:
            OSError: it has not ended well.
            ValueError: the file is damaged.
        """
        return _record(self.folder)

    def begin(self) -> Path | None:
        """Make the folder for the run to be started in: as :meth:`prepare` does, or as this very run has left it.

        Returns:
            The state that the training goes on from; None where the run begins anew.

        Raises:
            OSError: when a file that the run reads is not there, or the folder cannot be written.
            MetaPerSERError: when the corpus or a recording cannot be read, or nobody knows what the training's last
                state is.
        """
        beginning = self._beginning()
        state = self._state_to_go_on_from(beginning)
        if state is None:
            self.prepare()
            write_text(self.folder / BEGUN, beginning)
            return None
        remove_leftovers(self.folder, "*")
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"\n{GOING_ON}; it goes on from {state.name}\n")
        return state

    def _beginning(self) -> str:
        """Say by what the folder is begun; what is found there is compared with this, character by character.

        With all paths: a state holds arguments and config, which s3prl goes on with, also where the folder or the
        corpus has been moved since.
        """
        parts = {"fingerprint": self.fingerprint(), "arguments": self.arguments(), "config": dict(self.config)}
        return json.dumps(parts, indent=2) + "\n"

    def _state_to_go_on_from(self, beginning: str) -> Path | None:
        """Find the newest sound state of this very run, where it has not ended and all beside the state is sound."""
        if self.mode == "evaluate" or (self.folder / DONE).exists():
            return None
        try:
            was_begun = (self.folder / BEGUN).read_text(encoding="utf-8") == beginning
        except (OSError, UnicodeDecodeError):
            return None
        found = state_files.states(self.folder)
        if not (was_begun and found):
            return None
        # torch takes seconds to import, and is needed for nothing else here.
        from s3prl_metaperser import resuming, torch_files

        try:
            state, _ = resuming.newest_sound(found)
            files = checksums.CheckedFolder(self.folder)
            for name in KEPT:
                files.check(name)
            has_best = state_files.step(state) >= self.config["runner"]["eval_step"]
            if has_best and (missing := self.missing_output()) is not None:
                raise MetaPerSERError(f"{self.folder / missing} is missing")
            best = self.folder / BEST
            if best.exists() and (damage := torch_files.damage(best)) is not None:
                raise MetaPerSERError(f"{best} is damaged ({damage})")
        except MetaPerSERError as error:
            print(f"metaperser: {self.name} is begun anew: {error}", file=sys.stderr)
            return None
        return state

    def prepare(self) -> None:
        """Make the folder with the config in it, in place of all that an earlier run left."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        write_text(self.folder / CONFIG, yaml.safe_dump(dict(self.config), sort_keys=False))

    def missing_output(self) -> str | None:
        """Name the first file that the run should have left and has not."""
        return next((name for name in OUTPUTS[self.mode] if not (self.folder / name).exists()), None)

    def finish(self, started: datetime, ended: datetime) -> None:
        """Record that the run has ended well; where the upstream has learned, remove the state before the last.

        Raises:
            OSError: when a file that the run reads is not there any more, or the folder cannot be written.
            MetaPerSERError: when what the run reads is not what it was begun with, so that nobody knows what it read.
        """
        beginning = self._beginning()
        if (self.folder / BEGUN).read_text(encoding="utf-8") != beginning:
            raise MetaPerSERError(
                "its corpus, recordings or weights are not what it was begun with; give the command again"
            )
        # It was there for a kill, and is as large as three upstreams (Adam's moments). More are somebody's own wish.
        if self.trains_upstream and self.config["runner"]["max_keep"] == STATES:
            for state in state_files.states(self.folder)[1:]:
                state.unlink()
        record = {
            "fingerprint": json.loads(beginning)["fingerprint"],
            "command": self.shown_command(),
            "started": started.isoformat(timespec="milliseconds"),
            "ended": ended.isoformat(timespec="milliseconds"),
            "seconds": round((ended - started).total_seconds(), 1),
            "sources": self._sources(),
            "files": {name: digest for name in KEPT if (digest := self._checksum(name)) is not None},
        }
        write_text(self.folder / DONE, json.dumps(checksums.sealed(record), indent=2) + "\n")


def fingerprint_of(folder: Path) -> str | None:
    """Give the fingerprint of the run that has ended well in a folder; None where nobody knows of one."""
    try:
        return str(_record(folder)["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None


def sources_of(folder: Path) -> dict[str, str]:
    """Give the hash of each source of the run that has ended well in a folder; none where nobody knows."""
    try:
        return dict(_record(folder)["sources"])
    except (OSError, ValueError, KeyError):
        return {}


def _record(folder: Path) -> dict[str, Any]:
    record = dict(json.loads((folder / DONE).read_text(encoding="utf-8")))
    # One without its checksum may be one whose key is what was damaged.
    if checksums.KEY not in record or not checksums.is_intact(record):
        raise ValueError(f"{folder / DONE} is damaged")
    return record


def thread_limits(threads: int) -> dict[str, str]:
    """Give the environment variables by which numerical libraries keep to a number of CPU threads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


ERROR = re.compile(r"\b(?:metaperser|run_downstream)\b[^:]*: error: .*")
"""The one line in which a command of this package says what was wrong, also behind a bar that was not ended."""
BAR = re.compile(r"\d+%\|")
GOING_ON = "[metaperser] this training was stopped"
"""Stands in a log where a later start of the same training begins."""


def last_words(log: Path) -> str:
    """Give the last error that a log names, else its last line that is no progress bar, which are drawn after it."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "it left no log"
    last = text.rpartition(GOING_ON)[2].replace("\r", "\n").replace("\x1b[A", "\n")
    said = [line.strip() for line in last.split("\n") if line.strip()]
    errors = [found[0] for line in said if (found := ERROR.search(line))]
    lines = [line for line in said if not BAR.search(line)]
    return (errors or lines or said or ["it said nothing"])[-1]
