"""The command line of this room: ``metaperser calibrate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s3prl_metaperser.argument_types import given_path
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.personalize.commands import (
    add_adaptation_options,
    add_model_options,
    load_model,
    training_corpus,
)

# torch, s3prl and the web server take seconds to import, too long for `metaperser --help`.
if TYPE_CHECKING:
    from socket import socket

    from s3prl_metaperser.calibration.session import Origin, Session
    from s3prl_metaperser.calibration.session_files import SessionFiles
    from s3prl_metaperser.personalize import Recogniser

CLIPS = 32
"""Suggested by default: as many as the paper adapts on."""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``calibrate`` to a command line.

    Args:
        subparsers: of the main parser. The command sets ``run``, a function from the parsed arguments to an exit code.
    """
    parser = subparsers.add_parser(
        "calibrate",
        help="listen and label in the browser, and get a model of your own",
        description="Open a page on this machine on which you listen to the clips that teach most about you, tick what "
        "you hear, and get a model that hears like you. Labels are kept in MY.labels.csv as they are given; the same "
        "command goes on where it stopped.",
    )
    add_model_options(parser, "the checkpoint to make yours, such as result/meta_perser/dev-best.ckpt")
    parser.add_argument(
        "--audio-root", type=given_path, required=True, metavar="DIR", help="folder with the recordings"
    )
    parser.add_argument(
        "--out", type=given_path, required=True, metavar="MY.ckpt", help="your model, written when you save"
    )
    parser.add_argument(
        "--n", type=int, metavar="N", help=f"how many clips to suggest (default: {CLIPS}, or as many as before)"
    )
    parser.add_argument(
        "--corpus", type=given_path, metavar="DIR", help="the training corpus (default: where training found it)"
    )
    add_adaptation_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, metavar="PORT", help="to listen on (default: a free one, from 7860 up)")
    parser.add_argument(
        "--no-browser",
        action="store_true",
        help="print the page's address and open nothing; run on another computer, its page comes to your browser by "
        "ssh -L 7860:localhost:7860 COMPUTER",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew: labels given before are lost")
    parser.set_defaults(run=run_calibrate)


def run_calibrate(args: argparse.Namespace) -> int:
    """Run ``metaperser calibrate``."""
    from s3prl_metaperser.calibration.companion import check_adapts
    from s3prl_metaperser.calibration.server import address, listen
    from s3prl_metaperser.calibration.session_files import SessionFiles
    from s3prl_metaperser.personalize.recogniser import refuse_existing
    from s3prl_metaperser.personalize.recordings import find_recordings, nameable, readable

    refuse_existing(args.out, overwrite=True, sources=(args.checkpoint, args.upstream_ckpt))
    if args.n is not None and args.n < 1:
        raise MetaPerSERError(f"--n {args.n}: expected at least one clip")
    recordings = readable(args.audio_root, nameable(find_recordings(args.audio_root)))
    refuse_existing(args.out, overwrite=True, sources=(args.audio_root / name for name in recordings))
    origin, emotions = _origin(args.checkpoint, args.audio_root)
    files = SessionFiles(args.out)
    with files.held() as lock, listen(args.host, args.port) as listening:
        lock.say(f"at {address(listening)}")
        if not args.overwrite:
            # What is wrong with the files is said before the seconds that a model takes.
            _open(files, origin, emotions, overwrite=False)
        generic = load_model(args)
        check_adapts(generic, args.audio_root / recordings[0], args.lr)
        # Answers of before are discarded once nothing more can be wrong.
        session = _open(files, origin, emotions, args.overwrite)
        _calibrate(args, generic, session, recordings, listening)
    print(f"\n{session.labelled} of {len(session.clips)} clips labelled; the same command goes on.")
    return 0


def _origin(path: Path, audio_root: Path) -> tuple[Origin, Sequence[str]]:
    """Give what a session belongs to, and the emotions that its model knows."""
    from s3prl_metaperser.calibration.session import Origin
    from s3prl_metaperser.checkpoints import CONTRACT, DOWNSTREAM, EXTRA_STATE, read_checkpoint
    from s3prl_metaperser.personal_checkpoint import checkpoint_fingerprint, is_personal

    checkpoint = read_checkpoint(path)
    if is_personal(checkpoint):
        raise MetaPerSERError(f"{path} is one listener's model already; calibrate the one it was made of")
    emotions = checkpoint[DOWNSTREAM][EXTRA_STATE][CONTRACT]["emotions"]
    return Origin(checkpoint_fingerprint(checkpoint), str(audio_root.resolve())), emotions


def _open(files: SessionFiles, origin: Origin, emotions: Sequence[str], overwrite: bool) -> Session:
    """Go on with the session that is there, or begin one."""
    from s3prl_metaperser.calibration.session import Session

    if overwrite:
        files.discard()
    else:
        session = Session.read(files, origin, emotions)
        if session is not None:
            return session
        files.check_free()
    return Session(files, origin, emotions, ())


def _calibrate(
    args: argparse.Namespace, generic: Recogniser, session: Session, recordings: Sequence[str], listening: socket
) -> None:
    from s3prl_metaperser.calibration.companion import Companion
    from s3prl_metaperser.calibration.server import serve

    companion = Companion(generic, session, [session.audio_root / name for name in recordings], args.steps, args.lr)
    wanted = args.n or len(session.clips) or CLIPS
    if wanted > len(session.clips):
        _suggest(session, wanted - len(session.clips), generic, recordings, args.corpus)
    serve(companion, listening, args.host, browser=not args.no_browser)


def _suggest(
    session: Session, number: int, generic: Recogniser, recordings: Sequence[str], corpus: Path | None
) -> None:
    """Add the clips that teach most, given those that are asked already."""
    from s3prl_metaperser.personalize.suggest import suggest

    others = [name for name in recordings if name not in session.clips]
    if not others:
        return
    print(f"choosing {min(number, len(others))} of {len(others)} recordings that teach most about you", flush=True)
    root = session.audio_root
    chosen = suggest(
        generic,
        training_corpus(generic, corpus),
        [root / name for name in others],
        min(number, len(others)),
        labelled=[root / name for name in recordings if name in session.clips],  # some may be gone by now
        progress=True,
    )
    session.ask([others[index] for index in chosen])
