"""The command line of this package: ``metaperser adapt``, ``predict``, ``suggest`` and ``labels``."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import posixpath
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# torch and s3prl take seconds to import, too long for `metaperser --help`: each function imports what it needs.
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from s3prl_metaperser.corpus.manifest import Corpus
    from s3prl_metaperser.personalize.recogniser import Heard, Recogniser

from s3prl_metaperser.argument_types import given_path, given_text
from s3prl_metaperser.personalize import STEPS

DIGITS = 6
"""Of a printed probability."""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the commands that make and use one listener's model.

    Args:
        subparsers: of the main parser. Each command sets ``run``, a function from the parsed arguments to an exit code.
    """
    _register_suggest(subparsers)
    _register_labels(subparsers)
    _register_adapt(subparsers)
    _register_predict(subparsers)


def add_model_options(parser: argparse.ArgumentParser, help_of_checkpoint: str) -> None:
    """Add what every command that loads a checkpoint takes: ``--checkpoint``, ``--device``, ``--upstream-ckpt``."""
    parser.add_argument("--checkpoint", type=given_path, required=True, metavar="CKPT", help=help_of_checkpoint)
    parser.add_argument(
        "--device", type=given_text, metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: cuda if there is one)"
    )
    parser.add_argument(
        "--upstream-ckpt",
        type=given_text,
        metavar="FILE",
        help="where the upstream's own checkpoint (s3prl's -k) is now, if it is not where training read it",
    )


def add_adaptation_options(parser: argparse.ArgumentParser) -> None:
    """Add how a checkpoint is adapted: ``--steps`` and ``--lr``."""
    parser.add_argument(
        "--steps",
        type=_positive,
        default=STEPS,
        metavar="N",
        help="gradient steps on the labels (default: %(default)s; with 8 labels 5 to 10 do better)",
    )
    parser.add_argument(
        "--lr",
        type=_rate,
        metavar="RATE",
        help="one rate for all tensors, needed with a checkpoint of SSL-E; Meta-PerSER has learned its own",
    )


def load_model(args: argparse.Namespace) -> Recogniser:
    """Load the checkpoint that :func:`add_model_options` asked for."""
    from s3prl_metaperser.personalize import load

    return load(args.checkpoint, args.device, args.upstream_ckpt)


def training_corpus(model: Recogniser, folder: Path | None) -> Corpus:
    """Load the corpus whose annotators the checkpoint learned from; only ``suggest`` looks whether it is that one.

    Args:
        model: knows where training found it.
        folder: where it is now, if that is elsewhere.

    Raises:
        MetaPerSERError: when no corpus is there.
    """
    from s3prl_metaperser.corpus.manifest import load_corpus
    from s3prl_metaperser.errors import MetaPerSERError

    place = Path(model.settings.corpus) if folder is None else folder
    if folder is None and not place.is_dir():
        raise MetaPerSERError(
            f"the corpus {place} that {model.checkpoint} was trained on is not here; say where it is with --corpus"
        )
    return load_corpus(place)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; expected a number above 0, such as 0.1")
    return rate


def _folds(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) != 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of groups; expected 2 or more, or 0 for none")


# suggest


def _register_suggest(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "suggest",
        help="name the clips whose labels would teach most about a listener",
        description="Print which clips to label, the most telling first: those that stand for many others, and that "
        "the annotators whom the checkpoint was trained on hear differently.",
    )
    add_model_options(parser, "a meta-trained checkpoint, such as result/meta_perser/dev-best.ckpt")
    parser.add_argument(
        "--audio-root", type=given_path, required=True, metavar="DIR", help="folder with the recordings"
    )
    parser.add_argument("--n", type=_positive, default=16, metavar="N", help="how many clips (default: %(default)s)")
    parser.add_argument(
        "--labels", type=given_path, metavar="FILE.csv", help="clips that are labelled already; others are suggested"
    )
    parser.add_argument(
        "--corpus", type=given_path, metavar="DIR", help="the training corpus (default: where training found it)"
    )
    parser.add_argument(
        "--out",
        type=given_path,
        metavar="FILE.csv",
        help="write them as a csv whose column emotions is yours to fill in",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.csv")
    parser.set_defaults(run=run_suggest)


def run_suggest(args: argparse.Namespace) -> int:
    """Run ``metaperser suggest``."""
    from s3prl_metaperser.corpus.manifest import files_of
    from s3prl_metaperser.errors import MetaPerSERError
    from s3prl_metaperser.personalize.labels import read_labels, write_labels
    from s3prl_metaperser.personalize.recordings import find_recordings, nameable, readable

    _refuse_existing_csv(args.out, args.overwrite, (args.checkpoint, args.upstream_ckpt, args.labels))
    recordings = readable(args.audio_root, nameable(find_recordings(args.audio_root)))
    answers = None if args.labels is None else read_labels(args.labels, args.audio_root)
    # A clip that was answered with "other" tells nothing of the others, and is not to be asked again either.
    labelled, answered = (answers.audio, {*answers.audio, *answers.left_out}) if answers is not None else ((), set())
    unlabelled = [audio for audio in recordings if audio not in answered]
    if not unlabelled:
        raise MetaPerSERError(f"{args.audio_root}: all of its {len(recordings)} recordings are labelled already")
    model = load_model(args)
    corpus = training_corpus(model, args.corpus)
    sources = (*files_of(args.corpus or model.settings.corpus), *(args.audio_root / audio for audio in recordings))
    _refuse_existing_csv(args.out, args.overwrite, sources)

    from s3prl_metaperser.personalize.suggest import suggest

    paths = [args.audio_root / audio for audio in unlabelled]
    known = [args.audio_root / audio for audio in sorted(labelled)]
    chosen = [unlabelled[index] for index in suggest(model, corpus, paths, min(args.n, len(paths)), known, True)]
    if len(chosen) < args.n:
        print(f"metaperser: there are only {len(chosen)} recordings to label", file=sys.stderr)
    if args.out is None:
        print("\n".join(map(_printable, chosen)))
        return 0
    write_labels(args.out, dict.fromkeys(chosen, ()))
    print(f"wrote {len(chosen)} clips to {args.out}; fill in its column emotions, several joined by ';'")
    return 0


def _refuse_existing_csv(path: Path | None, overwrite: bool, sources: Iterable[Path | str | None]) -> None:
    from s3prl_metaperser.personalize.recogniser import refuse_existing

    if path is not None:
        refuse_existing(path, overwrite, sources)


# labels


def _register_labels(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "labels",
        help="write one annotator's labels of a corpus as a csv to adapt to",
        description="Write what one annotator of a prepared corpus said, as the csv that `metaperser adapt` reads.",
    )
    parser.add_argument(
        "--corpus", type=given_path, required=True, metavar="DIR", help="folder that `metaperser prepare` wrote"
    )
    parser.add_argument("--annotator", required=True, metavar="NAME", help="whose labels")
    parser.add_argument(
        "--only",
        type=given_path,
        metavar="FILE.csv",
        help="of the clips in this csv, such as those that `suggest` wrote",
    )
    parser.add_argument(
        "--out", type=given_path, required=True, metavar="FILE.csv", help="the csv, with audio,emotions"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.csv")
    parser.set_defaults(run=run_labels)


def run_labels(args: argparse.Namespace) -> int:
    """Run ``metaperser labels``."""
    from s3prl_metaperser.corpus.checks import SEPARATOR
    from s3prl_metaperser.corpus.csv_file import read_csv
    from s3prl_metaperser.corpus.manifest import files_of, load_corpus
    from s3prl_metaperser.errors import MetaPerSERError, suggest
    from s3prl_metaperser.personalize.labels import write_labels

    _refuse_existing_csv(args.out, args.overwrite, (args.only, *files_of(args.corpus)))
    corpus = load_corpus(args.corpus)
    frame = corpus.annotations
    own = frame[frame["annotator"] == args.annotator]
    if own.empty:
        names = sorted(str(name) for name in frame["annotator"].unique())
        raise MetaPerSERError(f"--annotator {args.annotator}: not in {args.corpus}; {suggest(args.annotator, names)}")
    audio = map(posixpath.normpath, own["audio"].astype(str))
    labels = dict(zip(audio, own["emotions"].astype(str).str.split(SEPARATOR), strict=True))
    if args.only is not None:
        wanted = [posixpath.normpath(audio) for audio in read_csv(args.only, ("audio",), others=True)["audio"]]
        missing = [audio for audio in wanted if audio not in labels]
        if wanted and set(wanted).isdisjoint(map(posixpath.normpath, frame["audio"].unique())):
            raise MetaPerSERError(
                f"{args.only}: none of its clips is a recording of {args.corpus}, such as {wanted[:1]}; its paths must "
                f"be relative to that corpus's root: metaperser suggest --audio-root {shlex.quote(str(corpus.root))}"
            )
        if len(missing) == len(wanted):
            raise MetaPerSERError(f"{args.only}: {args.annotator} labelled none of its clips, such as {wanted[:1]}")
        if missing:
            print(f"metaperser: {args.annotator} did not label {len(missing)} of {len(wanted)} clips", file=sys.stderr)
        labels = {audio: labels[audio] for audio in wanted if audio in labels}
    write_labels(args.out, labels)
    print(f"wrote {len(labels)} labels of {args.annotator} to {args.out}; its audio is relative to {corpus.root}")
    return 0


# adapt


def _register_adapt(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "adapt",
        help="make a checkpoint one person's, from clips that this person labelled",
        description="Adapt a meta-trained checkpoint to one listener's labels, as meta-test does, and say whether that "
        "helped, on labelled clips that were left out. What it writes works with `metaperser predict` and with s3prl's "
        "-m inference and -m evaluate (-e MY.ckpt). It holds the adapted weights and nothing else of the listener.",
    )
    add_model_options(parser, "the checkpoint to adapt, such as result/meta_perser/dev-best.ckpt")
    parser.add_argument(
        "--labels",
        type=given_path,
        required=True,
        metavar="FILE.csv",
        help="columns audio,emotions: a clip and what the listener heard, several emotions joined by ';'",
    )
    parser.add_argument(
        "--audio-root", type=given_path, metavar="DIR", help="what audio is relative to (default: the csv's folder)"
    )
    parser.add_argument("--out", type=given_path, required=True, metavar="MY.ckpt", help="the listener's checkpoint")
    add_adaptation_options(parser)
    parser.add_argument(
        "--folds",
        type=_folds,
        metavar="N",
        help="groups in which labelled clips are left out to judge by, 0: do not judge (default: each clip on its own, "
        "10 groups above 64 clips, 5 where the upstream adapts)",
    )
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="write everything, not only what differs from CKPT, which must else stay where it is (or beside MY.ckpt)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace MY.ckpt")
    parser.set_defaults(run=run_adapt)


def run_adapt(args: argparse.Namespace) -> int:
    """Run ``metaperser adapt``."""
    from s3prl_metaperser.personalize.judgement import FEWEST_TO_JUDGE
    from s3prl_metaperser.personalize.labels import read_labels
    from s3prl_metaperser.personalize.recogniser import refuse_existing

    refuse_existing(args.out, args.overwrite, (args.checkpoint, args.upstream_ckpt, args.labels))
    # Before the upstream is loaded, which takes seconds; the model's emotions are not known yet.
    labels = read_labels(args.labels, args.audio_root)
    refuse_existing(args.out, args.overwrite, labels.named)
    model = load_model(args)
    labels = read_labels(args.labels, args.audio_root, model.emotions)
    if labels.left_out:
        print(f"metaperser: {len(labels.left_out)} clips that say only 'other' are left out", file=sys.stderr)
    if labels.unlabelled:
        print(f"metaperser: {len(labels.unlabelled)} clips without a label are left out", file=sys.stderr)
    given = labels.paths, labels.emotions, args.steps, args.lr
    personal = model.adapt(*given, progress=True)
    lines = [_adapted_line(personal, args)]
    if args.folds != 0 and len(labels) >= FEWEST_TO_JUDGE:
        lines += model.judge(*given, folds=args.folds, progress=True).lines()
    elif args.folds != 0:
        lines.append(f"too few clips to judge by leaving some out: label at least {FEWEST_TO_JUDGE}")
    personal.save(args.out, args.standalone, args.overwrite)
    kind = "everything" if args.standalone else f"the difference from {args.checkpoint}"
    lines.append(f"wrote {args.out} ({_size(args.out.stat().st_size)}: {kind})")
    lines.append(f"next: metaperser predict --checkpoint {shlex.quote(str(args.out))} CLIP.wav")
    print("\n".join(lines))
    return 0


def _adapted_line(personal: Recogniser, args: argparse.Namespace) -> str:
    adaptation = personal.adaptation
    if adaptation is None:
        raise TypeError("an adapted model knows its adaptation")
    first, last = adaptation.losses[0], adaptation.losses[-1]
    return (
        f"adapted to {adaptation.clips} clips of {args.labels} in {args.steps} steps: "
        f"loss on them {first:.3f} → {last:.3f}"
    )


def _size(count: int) -> str:
    if count < 10**6:
        return f"{count / 1000:.0f} KB"
    return f"{count / 10**6:.1f} MB"


# predict


def _register_predict(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="say what a checkpoint hears in recordings",
        description="Print the probability of each emotion in each recording, and the emotions that are decided for: "
        "those above chance, one divided by their number.",
    )
    add_model_options(parser, "a listener's own checkpoint, or any of -d metaperser")
    parser.add_argument(
        "recordings",
        type=given_text,
        nargs="+",
        metavar="WAV",
        help="recordings, folders of them, patterns such as 'clips/*.wav', or - to read paths from standard input",
    )
    parser.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="of what is printed (default: %(default)s)"
    )
    parser.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> int:
    """Run ``metaperser predict``."""
    from s3prl_metaperser.personalize.recordings import check_readable, named_recordings

    paths = named_recordings(args.recordings, sys.stdin)
    check_readable(paths)
    model = load_model(args)
    heard = model.predict(paths, progress=len(paths) > 1)
    match args.format:
        case "json":
            text = json.dumps([_as_json(one) for one in heard], indent=2, ensure_ascii=False) + "\n"
        case "csv":
            text = _as_csv(heard, model.emotions)
        case _:
            text = _as_table(heard, model.emotions)
    sys.stdout.write(text)
    return 0


def _as_json(heard: Heard) -> dict[str, object]:
    return {
        "audio": heard.audio,
        "emotions": list(heard.emotions),
        "probabilities": {emotion: round(value, DIGITS) for emotion, value in heard.probabilities.items()},
    }


def _as_csv(heard: Sequence[Heard], emotions: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["audio", "emotions", *emotions])
    for one in heard:
        writer.writerow(
            [one.audio, ";".join(one.emotions), *(f"{one.probabilities[emotion]:.{DIGITS}f}" for emotion in emotions)]
        )
    return text.getvalue()


def _as_table(heard: Sequence[Heard], emotions: Sequence[str]) -> str:
    names = [_printable(name) for name in _shortened([one.audio for one in heard])]
    decided = [", ".join(one.emotions) or "(none)" for one in heard]
    widths = [max(map(len, ["recording", *names])), max(map(len, ["hears", *decided]))]
    columns = [max(len(emotion), 5) for emotion in emotions]
    header = ["recording".ljust(widths[0]), "hears".ljust(widths[1])]
    lines = ["  ".join([*header, *(emotion.rjust(w) for emotion, w in zip(emotions, columns, strict=True))])]
    for one, name, chosen in zip(heard, names, decided, strict=True):
        cells = (f"{one.probabilities[emotion]:{w}.3f}" for emotion, w in zip(emotions, columns, strict=True))
        lines.append("  ".join([name.ljust(widths[0]), chosen.ljust(widths[1]), *cells]))
    return "\n".join(lines) + "\n"


def _printable(name: str) -> str:
    """Escape what would split a row or command a terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def _shortened(names: list[str]) -> list[str]:
    """Name recordings by what differs: without the folder that all of them are in."""
    folder = {str(Path(name).parent) for name in names}
    return [Path(name).name for name in names] if len(folder) == 1 else names
