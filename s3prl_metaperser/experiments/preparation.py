"""Preparing the corpus of an experiment in the experiment's own folder, once."""

from __future__ import annotations

from pathlib import Path

from s3prl_metaperser.errors import MetaPerSERError


def prepare(root: Path, folder: Path, name: str) -> None:
    """Prepare recordings in IEMOCAP's layout, unless that has been done.

    Args:
        root: of the recordings.
        folder: of the prepared corpus.
        name: of the corpus.

    Raises:
        MetaPerSERError: when the recordings cannot be used, or the folder holds the corpus of others.
    """
    from s3prl_metaperser.corpus.iemocap import prepare_iemocap
    from s3prl_metaperser.corpus.manifest import CORPUS_FILE, load_corpus, write_corpus
    from s3prl_metaperser.corpus.report import summary

    corpus, report = prepare_iemocap(root, name=name)
    if not (folder / CORPUS_FILE).exists():
        write_corpus(corpus, folder)
        print(summary(corpus, report))
        return
    found = load_corpus(folder)
    if found.root.resolve() != corpus.root.resolve() or not found.annotations.equals(corpus.annotations):
        raise MetaPerSERError(f"{folder} was prepared from {found.root}, not from {root}; give another --out")
