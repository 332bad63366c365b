"""The feature cache: each utterance goes through a frozen upstream once, ever.

A cache folder holds one folder for each identity (upstream, weights, selection, normalisation, pooling), and in it
shards of pooled clips, keyed by the SHA-256 of the audio file. Shards are safetensors files: written under a temporary
name and renamed, named by what they hold, never changed afterwards. A process that extracts holds the folder's lock,
which the kernel releases when the process ends, however it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from s3prl_metaperser.atomic import locked, replacing, write_text
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.upstream.pooling import PooledClip

FORMAT = 1


@dataclass(frozen=True)
class UpstreamIdentity:
    """Everything that changes what a frozen upstream makes of a recording.

    Attributes:
        upstream: s3prl's name (``-u``).
        weights: SHA-256 over names, shapes and bytes of its parameters and buffers.
        ckpt: SHA-256 of the file given by ``-k``, or empty: its settings matter beside its weights.
        model_config: SHA-256 of the file given by ``-g``, or empty.
        code: versions of the libraries that compute the features.
        feature_selection: s3prl's ``-s``, as the featurizer resolved it.
        layer_selection: s3prl's ``-l``.
        normalize: s3prl's ``--upstream_feature_normalize``.
        pooling: ``mean``, ``mean_std`` or ``mean_std_per_layer``.
    """

    upstream: str
    weights: str
    ckpt: str
    model_config: str
    code: str
    feature_selection: str
    layer_selection: int | None
    normalize: bool
    pooling: str

    @property
    def key(self) -> str:
        """A short name that differs where anything differs."""
        return hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()[:20]


def weights_fingerprint(module: nn.Module) -> str:
    """Hash a module's parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def default_cache() -> Path:
    """Give the user's cache folder: ``$METAPERSER_CACHE``, else ``metaperser`` in the XDG cache folder."""
    chosen = os.environ.get("METAPERSER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metaperser"


@contextmanager
def naming_the_folder(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the cache and the cure."""
    try:
        yield
    except OSError as error:
        raise MetaPerSERError(
            f"feature cache {folder} cannot be used: {error.strerror}; "
            "set downstream_expert.feature_cache or METAPERSER_CACHE to a folder that can be written"
        ) from None


class FeatureCache:
    """Pooled clips of one upstream identity, on disk.

    Args:
        root: the cache folder.
        identity: what made the features.
    """

    def __init__(self, root: Path, identity: UpstreamIdentity) -> None:
        self.folder = root / "features" / f"{identity.upstream.replace('/', '_')}-{identity.key}"
        self.identity = identity
        self._places: dict[str, tuple[Path, int]] = {}
        self._known_shards: set[Path] = set()
        with naming_the_folder(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "identity.json").exists():
                write_text(self.folder / "identity.json", json.dumps(asdict(identity), indent=2) + "\n")

    @contextmanager
    def extracting(self) -> Iterator[None]:
        """Hold the right to add clips; others wait, saying so, and then find them here."""
        with naming_the_folder(self.folder):
            file = (self.folder / ".lock").open("a")
        with file, locked(file, f"[metaperser] another process fills {self.folder}; waiting for it"):
            yield

    def refresh(self) -> None:
        """Read the headers of shards that appeared since the last look."""
        for path in sorted(set(self.folder.glob("shard-*.safetensors")) - self._known_shards):
            try:
                with safe_open(path, framework="pt") as shard:
                    clips = json.loads(shard.metadata()["audio"])
            except (SafetensorError, KeyError, TypeError, ValueError):
                raise MetaPerSERError(
                    f"feature cache file {path} is damaged; delete it, its clips will be extracted again"
                ) from None
            self._places.update({audio: (path, row) for row, audio in enumerate(clips)})
            self._known_shards.add(path)

    def __contains__(self, audio: str) -> bool:
        return audio in self._places

    def add(self, clips: dict[str, PooledClip]) -> None:
        """Write one shard.

        Args:
            clips: audio SHA-256 → pooled clip.
        """
        names = list(clips)
        name = hashlib.sha256("".join(names).encode()).hexdigest()[:20]
        path = self.folder / f"shard-{name}.safetensors"
        tensors = {
            "statistics": torch.stack([clips[audio].statistics for audio in names]),
            "frame_deviation": torch.tensor([clips[audio].frame_deviation for audio in names]),
        }
        with naming_the_folder(self.folder), replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"audio": json.dumps(names)})
        self._places.update({audio: (path, row) for row, audio in enumerate(names)})
        self._known_shards.add(path)

    def load(self, audio: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Read clips into memory, opening each shard once.

        Args:
            audio: SHA-256 of each clip; all must be in the cache.

        Returns:
            (clips, S, dim) statistics and (clips,) frame deviations.
        """
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for index, name in enumerate(audio):
            path, row = self._places[name]
            wanted.setdefault(path, []).append((index, row))
        statistics: Tensor | None = None
        deviations = torch.empty(len(audio))
        for path, places in wanted.items():
            indices = torch.tensor([index for index, _ in places])
            rows = torch.tensor([row for _, row in places])
            with naming_the_folder(self.folder), safe_open(path, framework="pt") as shard:
                part = shard.get_tensor("statistics")[rows]
                deviations[indices] = shard.get_tensor("frame_deviation")[rows]
            if statistics is None:
                statistics = torch.empty(len(audio), *part.shape[1:])
            statistics[indices] = part
        if statistics is None:
            raise ValueError("no clips asked for")
        return statistics, deviations


class FileHashes:
    """SHA-256 of files, remembered by path, size and time of change, as git does.

    Args:
        root: the cache folder.
        files_root: the folder of the files, such as a corpus's audio; each has a memory of its own.
    """

    def __init__(self, root: Path, files_root: Path) -> None:
        name = hashlib.sha256(str(files_root.resolve()).encode()).hexdigest()[:20]
        self.path = root / "file-hashes" / f"{name}.json"
        try:
            self._known: dict[str, list] = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Hash files, reading only those that changed since the last time.

        Raises:
            MetaPerSERError: when a file is missing or cannot be read.
        """
        hashes, changed = [], False
        for path in paths:
            try:
                state = path.stat()
                known = self._known.get(str(path))
                if known is None or known[:2] != [state.st_size, state.st_mtime_ns]:
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    known = self._known[str(path)] = [state.st_size, state.st_mtime_ns, digest]
                    changed = True
            except OSError as error:
                raise MetaPerSERError(
                    f"file {path} cannot be read: {error.strerror}; restore it, or run metaperser prepare again"
                ) from None
            hashes.append(known[2])
        if changed:
            with naming_the_folder(self.path.parent):
                write_text(self.path, json.dumps(self._known))
        return hashes
