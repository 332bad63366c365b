"""Preparing the corpus of an experiment in the experiment's own folder, once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from s3prl_metaperser.errors import MetaPerSERError


def prepare(root: Path, folder: Path, name: str, check: Callable[[Path], None] | None = None) -> None:
    """Prepare recordings in IEMOCAP's layout, unless that has been done.

    Args:
        root: of the recordings.
        folder: of the prepared corpus.
        name: of the corpus.
        check: refuses what cannot be made of the corpus, of which it is given the folder of a copy, before anything is
            written into ``folder``.

    Raises:
        MetaPerSERError: when the recordings cannot be used, or the folder holds the corpus of others.
    """
    from s3prl_metaperser.corpus.iemocap import prepare_iemocap
    from s3prl_metaperser.corpus.manifest import ANNOTATIONS_FILE, CORPUS_FILE, load_corpus, write_corpus
    from s3prl_metaperser.corpus.report import summary

    corpus, report = prepare_iemocap(root, name=name)
    if not (folder / CORPUS_FILE).exists():
        with tempfile.TemporaryDirectory() as temporary:
            draft = Path(temporary)
            write_corpus(corpus, draft)
            begun = folder / ANNOTATIONS_FILE
            # It takes its place first: where it stands alone, whoever wrote it was killed before it had the other.
            if begun.exists() and begun.read_bytes() != (draft / ANNOTATIONS_FILE).read_bytes():
                raise MetaPerSERError(f"{begun} is not of {root}; move it away, or give another --out")
            if check is not None:
                check(draft)
        write_corpus(corpus, folder, overwrite=True)
        print(summary(corpus, report))
        return
    found = load_corpus(folder)
    if found.root.resolve() != corpus.root.resolve() or not found.annotations.equals(corpus.annotations):
        raise MetaPerSERError(f"{folder} was prepared from {found.root}, not from {root}; give another --out")
    if found.name != name:
        raise MetaPerSERError(
            f"{folder} was prepared with --name {found.name!r}, not {name!r}; give the same, or another --out"
        )
