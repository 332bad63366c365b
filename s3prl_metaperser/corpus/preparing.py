"""What prepares a corpus from a command line: a parser for each reader, and one for the demo corpus."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from s3prl_metaperser.argument_types import given_path
from s3prl_metaperser.errors import MetaPerSERError

# pandas and soundfile take a second to import, too long for `metaperser --help`: each function imports what it needs.
if TYPE_CHECKING:
    from s3prl_metaperser.corpus.manifest import Corpus
    from s3prl_metaperser.corpus.report import PreparationReport


def register_readers(readers: argparse._SubParsersAction) -> None:
    """Add ``iemocap``, ``crema-d`` and ``table`` to a command line.

    Args:
        readers: of their parser. Each sets ``run``, a function from the parsed arguments to an exit code.
    """
    iemocap = _reader(
        readers,
        "iemocap",
        run_prepare_iemocap,
        "the IEMOCAP release, or a corpus in its layout",
        "folder IEMOCAP_full_release (with Session1 to Session5), or the one that holds it",
    )
    iemocap.add_argument("--name", default="IEMOCAP", help="what to call the corpus (default: %(default)s)")
    _reader(
        readers,
        "crema-d",
        run_prepare_crema_d,
        "the voice-only ratings of CREMA-D",
        "clone of the CREMA-D repository (with finishedResponses.csv and AudioWAV)",
    )
    table = _reader(
        readers,
        "table",
        run_prepare_table,
        "your own labels as a csv",
        "csv with the columns audio,annotator,emotions and, if wanted, utterance (default: the audio path), session "
        "(1), speaker (unknown), kind (external); several emotions are joined by ';'",
    )
    table.add_argument(
        "--audio-root", type=given_path, metavar="DIR", help="what audio is relative to (default: the csv's folder)"
    )
    table.add_argument("--name", help="what to call the corpus (default: the csv's name)")


def register_demo_corpus(subparsers: argparse._SubParsersAction) -> None:
    """Add ``demo-corpus`` to a command line, likewise."""
    demo = subparsers.add_parser(
        "demo-corpus",
        help="write a synthetic corpus in IEMOCAP's layout, to try everything on",
        description="Write a synthetic corpus in IEMOCAP's layout: 654 speech-like recordings, twelve annotators with "
        "personal habits. Prepare it afterwards with `metaperser prepare iemocap`.",
    )
    demo.add_argument(
        "--out", type=given_path, required=True, metavar="DIR", help="folder to write Session1 to Session5 to"
    )
    demo.add_argument("--seed", type=int, default=0, help="draws voices, listeners and labels (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace the sessions already in DIR")
    demo.set_defaults(run=run_demo_corpus)


def _reader(
    readers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    purpose: str,
    source: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = readers.add_parser(name, help=purpose, description=f"Prepare {purpose}.")
    parser.add_argument("source", type=given_path, metavar="SOURCE", help=source)
    parser.add_argument("--out", type=given_path, required=True, metavar="DIR", help="folder to write the manifest to")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that DIR already holds")
    parser.set_defaults(run=run)
    return parser


def run_prepare_iemocap(args: argparse.Namespace) -> int:
    """Prepare IEMOCAP."""
    from s3prl_metaperser.corpus.iemocap import prepare_iemocap

    return _prepare(args, lambda: prepare_iemocap(args.source, name=args.name))


def run_prepare_crema_d(args: argparse.Namespace) -> int:
    """Prepare CREMA-D."""
    from s3prl_metaperser.corpus.crema_d import prepare_crema_d

    return _prepare(args, lambda: prepare_crema_d(args.source))


def run_prepare_table(args: argparse.Namespace) -> int:
    """Prepare a table."""
    from s3prl_metaperser.corpus.table import prepare_table

    return _prepare(args, lambda: prepare_table(args.source, args.audio_root, args.name))


def _prepare(args: argparse.Namespace, read: Callable[[], tuple[Corpus, PreparationReport]]) -> int:
    """Read, write and describe a corpus."""
    from s3prl_metaperser.corpus.manifest import refuse_existing, write_corpus
    from s3prl_metaperser.corpus.report import summary

    refuse_existing(args.out, args.overwrite, args.source)
    try:
        corpus, report = read()
    except OSError as error:
        raise MetaPerSERError(f"{error.filename}: cannot be read ({error.strerror})") from None
    write_corpus(corpus, args.out, args.overwrite)
    print(summary(corpus, report))
    print(f"\nwritten to {args.out}")
    return 0


def run_demo_corpus(args: argparse.Namespace) -> int:
    """Write the demo corpus."""
    from s3prl_metaperser.corpus.synthetic import write_demo_corpus

    write_demo_corpus(args.out, args.seed, args.overwrite)
    print(f"written to {args.out}")
    print(f"next: metaperser prepare iemocap {args.out} --out CORPUS")
    return 0
