"""SHA-256 of what is kept, beside it: so that a damaged or edited file is named, and not used.

``corpus.json`` and ``done.json`` carry their own, under the key ``sha256``. Results have theirs in ``checksums.sha256``
of their folder, in the format of ``sha256sum``, which checks it too (``sha256sum -c checksums.sha256``).
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from s3prl_metaperser.atomic import replacing, write_text
from s3prl_metaperser.errors import MetaPerSERError, UnreadableError

KEY = "sha256"
LIST = "checksums.sha256"


def of_file(path: Path) -> str:
    """Hash a file.

    Raises:
        UnreadableError: when it cannot be read, or is not there.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UnreadableError(path, error) from None
    return digest.hexdigest()


def _of_file_if_there(path: Path) -> str | None:
    try:
        return of_file(path)
    except UnreadableError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def of_json(content: Mapping[str, Any], *more: str) -> str:
    """Hash what a JSON file holds, but for its own checksum.

    Args:
        content: its keys and values.
        *more: further checksums that are to be known with it.
    """
    rest = {key: value for key, value in content.items() if key != KEY}
    return _of_text(json.dumps([rest, *more], sort_keys=True))


def sealed(content: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Give content with its checksum under the key ``sha256``; arguments as for :func:`of_json`."""
    return {**content, KEY: of_json(content, *more)}


def is_intact(content: Mapping[str, Any], *more: str) -> bool:
    """Tell whether content is what :func:`sealed` made; so is content without any checksum."""
    return KEY not in content or content[KEY] == of_json(content, *more)


class CheckedFolder:
    """Files of one folder that are replaced as wholes, by one process at a time.

    The list has a file's next checksum before the file has its next content. A process that is killed between the two
    leaves both checksums there, and the file matches one of them.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, name: str) -> None:
        """Compare a file with its checksum; one that has none passes, as one does that is not there.

        Raises:
            UnreadableError: when it or the list cannot be read.
            MetaPerSERError: when it is not what was written.
        """
        path, known = self.folder / name, self._known().get(name)
        while known and (digest := _of_file_if_there(path)) and digest not in known:
            before, known = known, self._known().get(name)
            # Another process may have replaced the file, whose next checksum comes first, between the two looks.
            if known == before:
                raise MetaPerSERError(
                    f"{path} is not what was written there (edited, or damaged?): move it away, and run again what "
                    f"made it; or, where the change is meant, delete its line from {self.folder / LIST}"
                )

    def has_known(self, name: str) -> bool:
        """Tell whether a file of this name was written here, or was about to be, also where it is gone by now.

        Raises:
            UnreadableError: when the list cannot be read.
            MetaPerSERError: when it is damaged.
        """
        return name in self._known()

    def replace(self, texts: Mapping[str, str | None]) -> None:
        """Replace files of the folder, whatever they are; see :meth:`check`.

        Args:
            texts: file name → what it is to hold; None: it is removed.

        Raises:
            UnwritableError: when a file cannot be written; all are as they were.
            MetaPerSERError: when the list is damaged.
        """
        known, paths = self._known(), {name: self.folder / name for name in texts}
        others = {name: digests for name, digests in known.items() if name not in texts}
        now = {name: known.get(name) or [of_file(path)] for name, path in paths.items() if path.exists()}
        fresh = {name: [] if text is None else [_of_text(text)] for name, text in texts.items()}
        self._write({**others, **{name: [*now.get(name, []), *digests] for name, digests in fresh.items()}})
        with ExitStack() as all_or_none:
            for name, text in texts.items():
                if text is not None:
                    temporary = all_or_none.enter_context(replacing(paths[name]))
                    temporary.write_text(text, encoding="utf-8", newline="\n")
        for name, text in texts.items():
            if text is None:
                paths[name].unlink(missing_ok=True)
        self._write({**others, **fresh})

    def _known(self) -> dict[str, list[str]]:
        try:
            lines = (self.folder / LIST).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UnreadableError(self.folder / LIST, error) from None
        except UnicodeDecodeError:
            raise self._damaged() from None
        known: dict[str, list[str]] = {}
        for line in lines:
            digest, separator, name = line.partition("  ")
            if not (separator and name and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
                raise self._damaged()
            known.setdefault(name, []).append(digest)
        return known

    def _damaged(self) -> MetaPerSERError:
        return MetaPerSERError(
            f"{self.folder / LIST} is damaged; delete it, and have a look at the files beside it: they are not compared"
        )

    def _write(self, known: Mapping[str, list[str]]) -> None:
        lines = [f"{digest}  {name}\n" for name, digests in known.items() for digest in dict.fromkeys(digests)]
        write_text(self.folder / LIST, "".join(lines))
