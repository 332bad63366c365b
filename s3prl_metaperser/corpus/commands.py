"""The command line of this package: ``metaperser prepare …`` and ``metaperser demo-corpus``."""

from __future__ import annotations

import argparse

from s3prl_metaperser.corpus.preparing import register_demo_corpus, register_readers


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``prepare`` and ``demo-corpus`` to a command line.

    Args:
        subparsers: of the main parser. Each command sets ``run``, a function from the parsed arguments to an exit code.
    """
    prepare = subparsers.add_parser(
        "prepare",
        help="turn a corpus as distributed into an annotation manifest",
        description="Read who named which emotions in which utterance and write it as DIR/annotations.csv and "
        "DIR/corpus.json. Prints the annotators, their labels, and what was left out and why.",
    )
    register_readers(prepare.add_subparsers(dest="reader", required=True, metavar="{iemocap,crema-d,table}"))
    register_demo_corpus(subparsers)
