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

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s3prl_metaperser.atomic import locked, replacing, write_text
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.upstream.pooling import PooledClip

FORMAT = 2
"""Of what is extracted and how. 2: each batch by one thread."""


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

    def stored(self, audio: Sequence[str]) -> tuple[StoredRows, StoredRows]:
        """Give clips without reading them.

        Args:
            audio: SHA-256 of each clip; all must be in the cache.

        Returns:
            (clips, S, dim) statistics and (clips,) frame deviations.
        """
        places = [self._places[name] for name in audio]
        return StoredRows("statistics", places), StoredRows("frame_deviation", places)


class StoredRows:
    """A tensor whose rows lie in several shards, and which is never in memory as a whole.

    Args:
        tensor: its name in the shards.
        places: shard and row in it of each row.

    Attributes:
        shape: (rows, ...).
        dtype: of its elements.
    """

    def __init__(self, tensor: str, places: Sequence[tuple[Path, int]]) -> None:
        numbers: dict[Path, int] = {}
        self._tensor = tensor
        self._shard_of = np.array([numbers.setdefault(path, len(numbers)) for path, _ in places], dtype=np.int64)
        self._row_of = torch.tensor([row for _, row in places], dtype=torch.int64)
        self._shards = list(numbers)
        first = self._map(0)
        self.shape = torch.Size((len(places), *first.shape[1:]))
        self.dtype = first.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape.numel() * self.dtype.itemsize

    def _map(self, number: int) -> Tensor:
        """Map a shard's tensor, of which only what is then read comes from the disk.

        It must not stay mapped: in the end all of it would count among the process's memory.
        """
        path = self._shards[number]
        with naming_the_folder(path.parent), safe_open(path, framework="pt") as shard:
            return shard.get_tensor(self._tensor)

    def __getitem__(self, asked: Tensor | tuple[Tensor, int]) -> Tensor:
        """Read rows, each shard in one go.

        Args:
            asked: (n,) indices; with the index of the part that is wanted of each row, along its first dimension.

        Returns:
            (n, ...), in the order asked for.
        """
        rows, part = asked if isinstance(asked, tuple) else (asked, None)
        given = torch.empty(len(rows), *self.shape[1 if part is None else 2 :], dtype=self.dtype)
        shard_of = self._shard_of[rows.numpy()]
        order = np.argsort(shard_of, kind="stable")
        numbers, begins = np.unique(shard_of[order], return_index=True)
        ends = [*begins.tolist()[1:], len(order)]
        by_shard = torch.from_numpy(order)
        rows_by_shard = self._row_of[rows[by_shard]]
        for number, begin, end in zip(numbers.tolist(), begins.tolist(), ends, strict=True):
            shard = self._map(number) if part is None else self._map(number)[:, part]
            given[by_shard[begin:end]] = shard.index_select(0, rows_by_shard[begin:end])
        return given


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
                state = os.stat(path)
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
