"""SHA-256 of what is kept, beside it: so that a damaged or edited file is named, and not used.

JSON files carry their own, under the key ``sha256``. CSV files of fixed columns have theirs in ``checksums.sha256`` of
their folder, in the format of ``sha256sum``, which checks it too (``sha256sum -c checksums.sha256``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.errors import MetaPerSERError

KEY = "sha256"
LIST = "checksums.sha256"


def of_file(path: Path) -> str:
    """Hash a file.

    Raises:
        OSError: when it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def of_json(content: Mapping[str, Any], *more: str) -> str:
    """Hash what a JSON file holds, but for its own checksum.

    Args:
        content: its keys and values.
        *more: further checksums that are to be known with it.
    """
    rest = {key: value for key, value in content.items() if key != KEY}
    return hashlib.sha256(json.dumps([rest, *more], sort_keys=True).encode()).hexdigest()


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
            MetaPerSERError: when it is not what was written.
        """
        path, known = self.folder / name, self._known().get(name)
        if known and path.exists() and of_file(path) not in known:
            raise MetaPerSERError(
                f"{path} is not what was written there (edited, or damaged?): move it away, or, where the change is "
                f"meant, delete its line from {self.folder / LIST}"
            )

    def replace(self, texts: Mapping[str, str], write: Callable[[Path, str], None] = write_text) -> None:
        """Replace files of the folder.

        Args:
            texts: file name → what it is to hold.
            write: replaces one file atomically.

        Raises:
            UnwritableError: naming the first that cannot be written; those before it have been replaced.
        """
        known = self._known()
        fresh = {name: [hashlib.sha256(text.encode()).hexdigest()] for name, text in texts.items()}
        now = {name: [of_file(self.folder / name)] for name in texts if name in known and (self.folder / name).exists()}
        self._write({**known, **{name: [*now.get(name, []), *fresh[name]] for name in texts}})
        for name, text in texts.items():
            write(self.folder / name, text)
        self._write({**known, **fresh})

    def _known(self) -> dict[str, list[str]]:
        try:
            lines = (self.folder / LIST).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError):
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
