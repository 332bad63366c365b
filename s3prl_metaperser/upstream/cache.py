"""The feature cache: each utterance goes through a frozen upstream once, ever.

A cache folder holds one folder for each identity (upstream, weights, selection, normalisation, pooling), and in it
shards of pooled clips, keyed by the SHA-256 of the audio file. Shards are safetensors files: written under a temporary
name and renamed, named by what they hold, never changed afterwards. A process that extracts holds the folder's lock,
which the kernel releases when the process ends, however it ends.

Every row has a CRC-32 in its shard, which is compared when the row is first read: opening a cache reads none. A shard
whose checksums do not match is deleted, and its clips are extracted again. One that may not be read, in a cache that
several users share, is no damaged one: it is named, and left as it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s3prl_metaperser.atomic import locked, remove_leftovers, replacing, write_text
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.upstream.pooling import PooledClip

FORMAT = 4
"""Of what is extracted, how, and how it is kept. 2: each batch by one thread. 3: with checksums. 4: on the CPU, each
clip alone."""
STATISTICS, FRAME_DEVIATION = "statistics", "frame_deviation"
"""The tensors of a shard."""


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
        return expanded(chosen)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "metaperser"


def expanded(folder: str) -> Path:
    """Give a cache folder's path, with the user's home in place of ``~``.

    Raises:
        MetaPerSERError: when the system knows of no home.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise MetaPerSERError(
            f"{folder}: no home folder is known for this user; name a folder for features by METAPERSER_CACHE"
        ) from None


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


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """Map a shard, of which only what is then read comes from the disk.

    Raises:
        FileNotFoundError: when it is gone.
        DamagedShardError: when it is no safetensors file.
        MetaPerSERError: when it may not be read.
    """
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except SafetensorError:
        raise DamagedShardError(shard) from None
    except OSError as error:
        # safetensors says of every file that it cannot open that it is not there.
        fault = error
        try:
            shard.open("rb").close()
        except FileNotFoundError:
            raise
        except OSError as of_opening:
            fault = of_opening
        if isinstance(fault, FileNotFoundError):
            raise  # another process has just put it back
        raise MetaPerSERError(
            f"feature cache file {shard} cannot be read: {fault.strerror or fault}; have its owner let you read it, or "
            "set downstream_expert.feature_cache or METAPERSER_CACHE to a folder of your own"
        ) from None


class FeatureCache:
    """Pooled clips of one upstream identity, on disk.

    Args:
        root: the cache folder.
        identity: what made the features.

    Attributes:
        damaged: shards that were found damaged when their headers were read.
    """

    def __init__(self, root: Path, identity: UpstreamIdentity) -> None:
        self.folder = root / "features" / f"{identity.upstream.replace('/', '_')}-{identity.key}"
        self.identity = identity
        self._places: dict[str, tuple[Path, int]] = {}
        self._known_shards: set[Path] = set()
        self.damaged: set[Path] = set()
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
            remove_leftovers(self.folder, "shard-*")
            yield

    def refresh(self) -> None:
        """Read the headers of shards that appeared since the last look; what is damaged is as good as not there."""
        for path in sorted(set(self.folder.glob("shard-*.safetensors")) - self._known_shards):
            try:
                clips = _clips_of(path)
            except DamagedShardError:
                self.damaged.add(path)
                continue
            except FileNotFoundError:
                continue  # another process has dropped it since the folder was listed
            self._places.update({audio: (path, row) for row, audio in enumerate(clips)})
            self._known_shards.add(path)

    def drop(self, shard: Path) -> None:
        """Forget a shard that has been found damaged, and delete it if it still is; only for whom :meth:`extracting`.

        Another process may have put a sound one in its place meanwhile, which :meth:`refresh` then finds.
        """
        self._places = {audio: place for audio, place in self._places.items() if place[0] != shard}
        self._known_shards.discard(shard)
        self.damaged.discard(shard)
        try:
            _check_all(shard)
        except FileNotFoundError:
            return
        except DamagedShardError as error:
            print(f"[metaperser] {error}", file=sys.stderr, flush=True)
            with naming_the_folder(self.folder):
                shard.unlink(missing_ok=True)

    def __contains__(self, audio: str) -> bool:
        return audio in self._places

    def add(self, clips: dict[str, PooledClip]) -> None:
        """Write one shard.

        Args:
            clips: audio SHA-256 → pooled clip.
        """
        names = list(clips)
        path = self.folder / _shard_name(names)
        tensors = {
            STATISTICS: torch.stack([clips[audio].statistics for audio in names]),
            FRAME_DEVIATION: torch.tensor([clips[audio].frame_deviation for audio in names]),
        }
        every = range(len(names))
        checksums = {_checksums(name): torch.tensor(_checksum(tensor, every)) for name, tensor in tensors.items()}
        with naming_the_folder(self.folder), replacing(path) as temporary:
            try:
                save_file({**tensors, **checksums}, temporary, metadata={"audio": json.dumps(names)})
            except SafetensorError as error:
                raise OSError(errno.EIO, str(error)) from None
        self._places.update({audio: (path, row) for row, audio in enumerate(names)})
        self._known_shards.add(path)

    def stored(self, audio: Sequence[str]) -> tuple[StoredRows, StoredRows]:
        """Give clips without reading them.

        Args:
            audio: SHA-256 of each clip; all must be in the cache.

        Returns:
            (clips, S, dim) statistics and (clips,) frame deviations.

        Raises:
            DamagedShardError: when the first shard is damaged.
        """
        places = [self._places[name] for name in audio]
        return StoredRows(STATISTICS, places), StoredRows(FRAME_DEVIATION, places)


class DamagedShardError(MetaPerSERError):
    """A shard of the feature cache that is not what was written, or is gone.

    Attributes:
        shard: its path.
    """

    def __init__(self, shard: Path) -> None:
        super().__init__(f"feature cache file {shard} is damaged; it is deleted, and its clips are extracted again")
        self.shard = shard

    def __reduce__(self) -> tuple[type[DamagedShardError], tuple[Path]]:
        return type(self), (self.shard,)


def _shard_name(audio: Sequence[str]) -> str:
    return f"shard-{hashlib.sha256(''.join(audio).encode()).hexdigest()[:20]}.safetensors"


def _checksums(tensor: str) -> str:
    return f"{tensor}.crc32"


def _checksum(tensor: Tensor, rows: Iterable[int]) -> list[int]:
    """Give the CRC-32 of each of some rows of a tensor: of its bytes, its place, its type and its shape."""
    kind = f"{tensor.dtype} {tuple(tensor.shape[1:])}"
    return [zlib.crc32(tensor[row].contiguous().numpy().data, zlib.crc32(f"{row} {kind}".encode())) for row in rows]


def _clips_of(shard: Path) -> list[str]:
    """Read from a shard's header the SHA-256 of each clip.

    Raises:
        FileNotFoundError: when it is gone.
        DamagedShardError: when it is no such file, or not of the clips that its name was made from.
    """
    with _opened(shard) as file:
        try:
            clips: list[str] = json.loads(file.metadata()["audio"])
            is_sound = _shard_name(clips) == shard.name
        except (KeyError, TypeError, ValueError):
            is_sound = False
    if not is_sound:
        raise DamagedShardError(shard)
    return clips


def _check_all(shard: Path) -> None:
    """Read a whole shard.

    Raises:
        FileNotFoundError: when it is gone.
        DamagedShardError: when anything in it is not what was written.
    """
    places = [(shard, row) for row in range(len(_clips_of(shard)))]
    for tensor in (STATISTICS, FRAME_DEVIATION):
        StoredRows(tensor, places)[torch.arange(len(places))]


class StoredRows:
    """A tensor whose rows lie in several shards, and which is never in memory as a whole.

    Args:
        tensor: its name in the shards.
        places: shard and row in it of each row.

    Attributes:
        shape: (rows, ...).
        dtype: of its elements.

    Raises:
        DamagedShardError: when the first shard, which says what the rows are like, is damaged.
    """

    def __init__(self, tensor: str, places: Sequence[tuple[Path, int]]) -> None:
        numbers: dict[Path, int] = {}
        self._tensor = tensor
        self._shard_of = np.array([numbers.setdefault(path, len(numbers)) for path, _ in places], dtype=np.int64)
        self._row_of = np.array([row for _, row in places], dtype=np.int64)
        self._shards = list(numbers)
        self._is_checked = np.zeros(len(places), dtype=bool)
        with self._mapped(0) as shard:
            first = shard.get_tensor(tensor)
            self._check(0, shard, first, np.zeros(1, dtype=np.int64))
            self.shape = torch.Size((len(places), *first.shape[1:]))
            self.dtype = first.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape.numel() * self.dtype.itemsize

    @contextmanager
    def _mapped(self, number: int) -> Iterator[Any]:
        """Map a shard, which must not stay mapped: in the end all of it would count among the process's memory."""
        path = self._shards[number]
        with naming_the_folder(path.parent):
            try:
                with _opened(path) as shard:
                    yield shard
            except FileNotFoundError:
                raise DamagedShardError(path) from None

    def _check(self, number: int, shard: Any, tensor: Tensor, asked: np.ndarray) -> None:
        """Compare rows of one shard with their checksums, those that have not been compared yet.

        Args:
            number: of the shard.
            shard: the open file.
            tensor: in it.
            asked: (n,) indices of the rows here.

        Raises:
            DamagedShardError: naming the shard.
        """
        new = np.unique(asked[~self._is_checked[asked]])
        if not len(new):
            return
        rows, checksums = self._row_of[new], shard.get_tensor(_checksums(self._tensor))
        has_rows = tensor.dim() and rows.max() < min(len(tensor), len(checksums))
        if not has_rows or _checksum(tensor, rows.tolist()) != checksums[rows].tolist():
            raise DamagedShardError(self._shards[number])
        self._is_checked[new] = True

    def __getitem__(self, asked: Tensor | tuple[Tensor, int]) -> Tensor:
        """Read rows, each shard in one go.

        Args:
            asked: (n,) indices; with the index of the part that is wanted of each row, along its first dimension.

        Returns:
            (n, ...), in the order asked for.

        Raises:
            DamagedShardError: when a row is not what was written.
        """
        rows, part = (asked[0].numpy(), asked[1]) if isinstance(asked, tuple) else (asked.numpy(), None)
        given = torch.empty(len(rows), *self.shape[1 if part is None else 2 :], dtype=self.dtype)
        shard_of = self._shard_of[rows]
        order = np.argsort(shard_of, kind="stable")
        numbers, begins = np.unique(shard_of[order], return_index=True)
        ends = [*begins.tolist()[1:], len(order)]
        by_shard = torch.from_numpy(order)
        rows_by_shard = torch.from_numpy(self._row_of[rows[order]])
        for number, begin, end in zip(numbers.tolist(), begins.tolist(), ends, strict=True):
            with self._mapped(number) as shard:
                tensor = shard.get_tensor(self._tensor)
                self._check(number, shard, tensor, rows[order[begin:end]])
                wanted = tensor if part is None else tensor[:, part]
                given[by_shard[begin:end]] = wanted.index_select(0, rows_by_shard[begin:end])
        return given


class FileHashes:
    """SHA-256 of files, remembered by path, size and both times of change, as git does.

    A file that takes another's place keeps the time of change of its content; that of its inode is when it did so.

    Args:
        root: the cache folder.
        files_root: the folder of the files, such as a corpus's audio; each has a memory of its own.
    """

    def __init__(self, root: Path, files_root: Path) -> None:
        name = hashlib.sha256(str(files_root.resolve()).encode()).hexdigest()[:20]
        self.path = root / "file-hashes" / f"{name}.txt"
        self._known = self._read()

    def _read(self) -> dict[str, list]:
        """Read what is remembered: nothing where the first line is not the CRC-32 of the rest."""
        try:
            checksum, _, content = self.path.read_bytes().partition(b"\n")
            return dict(json.loads(content)) if int(checksum, 16) == zlib.crc32(content) else {}
        except (OSError, ValueError, TypeError):
            return {}

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Hash files, reading only those that changed since the last time.

        Raises:
            MetaPerSERError: when a file is missing or cannot be read.
        """
        hashes, changed = [], False
        for path in paths:
            try:
                found = os.stat(path)
                state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
                digest, *known = self._known.get(str(path), [""])
                if known != state:
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    self._known[str(path)] = [digest, *state]
                    changed = True
            except OSError as error:
                raise MetaPerSERError(
                    f"file {path} cannot be read: {error.strerror}; restore it, or run metaperser prepare again"
                ) from None
            hashes.append(digest)
        if changed:
            with naming_the_folder(self.path.parent):
                content = json.dumps(self._known)
                write_text(self.path, f"{zlib.crc32(content.encode()):08x}\n{content}")
        return hashes
