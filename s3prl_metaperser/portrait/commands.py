"""The command line of this package: ``metaperser portrait``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from s3prl_metaperser.argument_types import given_path
from s3prl_metaperser.errors import MetaPerSERError

if TYPE_CHECKING:
    from s3prl_metaperser.corpus.manifest import Corpus
    from s3prl_metaperser.portrait.movement import Comparison

OF_MODELS = {"shots": 32, "draws": 5, "clips": 256, "lr": None, "device": "cpu"}
"""The options that are for personal models alone, and their defaults."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``portrait`` to a command line.

    Args:
        subparsers: of the main parser. The command sets ``run``, a function from the parsed arguments to an exit code.
    """
    parser = subparsers.add_parser(
        "portrait",
        help="show the listeners of a corpus: habits, agreement, confusions, a map",
        description="Show the listeners of a corpus on one page: who labels how, who agrees with whom (Krippendorff's "
        "alpha of sets of emotions), each one's confusion with the majority of the others, and a map of annotators; "
        "with a checkpoint, how far personal models move from the generic one too. OUT is an HTML page that loads "
        "nothing; the folder OUT_figures beside it (portrait_figures for portrait.html) holds each figure as PNG (300 "
        "dpi) and PDF and the numbers as CSV. The same corpus, checkpoint and seed give the same bytes.",
    )
    add = parser.add_argument
    add("--corpus", type=given_path, required=True, metavar="DIR", help="the folder that `metaperser prepare` wrote")
    add("--out", type=given_path, required=True, metavar="OUT", help="the page to write, such as portrait.html")
    add("--checkpoint", type=given_path, metavar="CKPT", help="such as RUN/dev-best.ckpt, of Meta-PerSER or SSL-E")
    add(
        "--most",
        type=_positive,
        default=24,
        metavar="N",
        help="annotators in the figures, those with most labels; the map and the overall numbers have all "
        "(default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the bootstrap and of all draws (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the portrait that is there")
    model = parser.add_argument_group("with a checkpoint")
    add = model.add_argument
    add(
        "--shots",
        type=_positive,
        metavar="K",
        help=f"labels that each personal model is adapted on (default: {OF_MODELS['shots']})",
    )
    add(
        "--draws",
        type=_positive,
        metavar="N",
        help=f"models an annotator, each from another draw of K labels (default: {OF_MODELS['draws']})",
    )
    add(
        "--clips",
        type=_positive,
        metavar="N",
        help=f"clips of the corpus that models are compared on, the same for all (default: {OF_MODELS['clips']})",
    )
    add("--lr", type=float, metavar="LR", help="rate to adapt at, for a checkpoint of SSL-E, which has learned none")
    add("--device", help=f"where torch computes: cpu, cuda, cuda:1 (default: {OF_MODELS['device']})")
    parser.set_defaults(run=run_portrait)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return number


def run_portrait(args: argparse.Namespace) -> int:
    """Run ``metaperser portrait``."""
    from s3prl_metaperser.corpus.manifest import load_corpus
    from s3prl_metaperser.portrait.composition import compose
    from s3prl_metaperser.portrait.page import refuse_existing, write_portrait

    if args.seed < 0:
        raise MetaPerSERError(f"--seed {args.seed}; expected 0 or more")
    _settle_models(args)
    refuse_existing(args.out, args.overwrite)
    corpus = load_corpus(args.corpus)
    comparison = None if args.checkpoint is None else _comparison(args, corpus)
    written = write_portrait(compose(corpus, args.most, args.seed, comparison), args.out, args.overwrite)
    print(f"written: {args.out}, and {len(written) - 1} files in {written[1].parent}", file=sys.stderr)
    return 0


def _settle_models(args: argparse.Namespace) -> None:
    """Give the options for personal models their defaults, and refuse them where no model is given."""
    for name, default in OF_MODELS.items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, default)
        elif args.checkpoint is None:
            raise MetaPerSERError(
                f"--{name} {given}: is for personal models, which are made from a checkpoint; give --checkpoint, or "
                f"leave --{name} out"
            )


def _comparison(args: argparse.Namespace, corpus: Corpus) -> Comparison:
    """Load the checkpoint and see that it fits the corpus."""
    from s3prl_metaperser.checkpoints import PROVENANCE, annotators_seen
    from s3prl_metaperser.personalize import load
    from s3prl_metaperser.portrait.movement import Comparison

    model = load(args.checkpoint, device=args.device)
    if model.is_personal:
        raise MetaPerSERError(f"{args.checkpoint} is one listener's model; give the checkpoint that it came from")
    if model.emotions != corpus.emotions:
        raise MetaPerSERError(
            f"{args.checkpoint} knows the emotions {', '.join(model.emotions)}, the corpus has "
            f"{', '.join(corpus.emotions)}; use a checkpoint of the same emotions"
        )
    return Comparison(
        model=model,
        name="/".join(args.checkpoint.parts[-2:]),
        trained_on=annotators_seen(model.about[PROVENANCE], corpus),
        shots=args.shots,
        draws=args.draws,
        clips=args.clips,
        lr=args.lr,
    )
