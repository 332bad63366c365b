"""Prepare a corpus for ``-d metaperser``: its annotations as one table, ``annotations.csv``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from s3prl_metaperser.corpus.preparing import register_demo_corpus, register_readers
from s3prl_metaperser.errors import told_in_a_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Read a corpus and write its annotations.

    Args:
        arguments: the command line without the program's name; by default the process's own.

    Returns:
        The exit code.

    Raises:
        SystemExit: with code 2 after bad input, whose one line is then on stderr.
    """
    parser = argparse.ArgumentParser(
        prog=f"python3 -m {__spec__.name}",
        description="Read who named which emotions in which utterance and write it as DIR/annotations.csv and "
        "DIR/corpus.json, where downstream_expert.corpus of the config finds it.",
    )
    subparsers = parser.add_subparsers(title="corpora", metavar="{iemocap,crema-d,table,demo-corpus}", required=True)
    register_readers(subparsers)
    register_demo_corpus(subparsers)
    parsed = parser.parse_args(arguments)
    with told_in_a_line("metaperser.prepare"):
        code: int = parsed.run(parsed)
    return code


if __name__ == "__main__":
    sys.exit(main())
