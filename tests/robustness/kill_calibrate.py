"""Kill `metaperser calibrate` with SIGKILL at random moments, start it again until all is labelled, and compare.

    python tests/robustness/kill_calibrate.py --corpus DIR --checkpoint CKPT --audio-root DIR [--rounds 20] [--seed 0]

One uninterrupted calibration labels every suggested clip (some after a change of mind, some skipped) and saves the
model. Each round does the same in a new folder, killed once at a random moment: in every third round while it starts
and suggests, else while it answers and saves. Started again it must go on with every answer that was acknowledged, ask
the same clips, and end with the same bytes in MY.labels.csv and MY.ckpt; nothing is left but hidden temporary files.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from tqdm import tqdm

CLIPS = 8
OWN_FILES = {"MY.ckpt", "MY.labels.csv", "MY.calibration.json"}


class KilledError(Exception):
    """The server is gone."""


class Calibration:
    """One running `metaperser calibrate`, and the requests that its page makes."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        command = [sys.executable, "-m", "s3prl_metaperser.cli", "calibrate", "--no-browser", "--device", "cpu"]
        command += ["--checkpoint", str(options.checkpoint), "--audio-root", str(options.audio_root)]
        command += ["--corpus", str(options.corpus), "--out", str(folder / "MY.ckpt"), "--n", str(CLIPS)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.address = ""
        self.token = ""

    def wait(self) -> None:
        """Wait for the page."""
        if self.process.stdout is None:
            raise TypeError("the server's output is read")
        for line in self.process.stdout:
            if line.startswith("Open "):
                self.address, self.token = re.findall(r"(http://[^\s#]+)#token=(\S+)", line)[0]
                return
        raise KilledError

    def ask(self, path: str, content: bytes | None = None) -> bytes:
        """Make one request, a POST where it has content."""
        request = urllib.request.Request(self.address + path, content, {"x-calibration-token": self.token})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if isinstance(error, urllib.error.HTTPError):
                raise
            raise KilledError from None

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def answer_of(number: int, emotions: list[str]) -> list[str]:
    """Say what this listener hears in a clip: two emotions in every third, a skip in every seventh."""
    if number % 7 == 0:
        return []
    return emotions[number % 9 : number % 9 + (2 if number % 3 == 0 else 1)]


@dataclass(frozen=True)
class Moment:
    """When a server is killed: so many seconds after its start, or after its page is there."""

    seconds: float
    of_answering: bool


@dataclass
class Taken:
    """Seconds that an uninterrupted calibration took to start, and to answer and save."""

    start: float = 0.0
    answers: float = 0.0


def calibrate(
    options: argparse.Namespace,
    folder: Path,
    acknowledged: dict[int, list[str]],
    killed: Moment | None = None,
    taken: Taken | None = None,
) -> bool:
    """Answer what has no answer yet, and save; give whether it came to the end before the server was killed.

    Args:
        options: the command line.
        folder: of the session.
        acknowledged: answers that an earlier server had taken; those that this one takes are added.
        killed: when; None: never.
        taken: is told how long it took.
    """
    began = time.monotonic()
    calibration = Calibration(options, folder)
    killer = Timer(killed.seconds if killed else 0.0, calibration.process.kill)
    try:
        if killed and not killed.of_answering:
            killer.start()
        calibration.wait()
        ready = time.monotonic()
        if killed and killed.of_answering:
            killer.start()
        emotions = json.loads((folder / "emotions.json").read_text())
        state = json.loads(calibration.ask("session"))
        for number, expected in acknowledged.items():
            if state["answers"][number - 1] != expected:
                raise AssertionError(
                    f"clip {number}: {expected} was acknowledged, {state['answers'][number - 1]} is there"
                )
        for number in range(1, CLIPS + 1):
            wanted = answer_of(number, emotions)
            if state["answers"][number - 1] == wanted:
                acknowledged[number] = wanted
                continue
            if wanted:
                # First another answer, then the right one: as somebody does who goes back.
                acknowledged.pop(number, None)
                for given in (emotions[:1], wanted):
                    query = urllib.parse.urlencode([("emotion", emotion) for emotion in given])
                    calibration.ask(f"clips/{number}/label?{query}", b"")
            else:
                calibration.ask(f"clips/{number}/skip", b"")
            acknowledged[number] = wanted
        calibration.ask("finish", b"")
        if taken is not None:
            taken.start, taken.answers = ready - began, time.monotonic() - ready
        return True
    except KilledError:
        return False
    finally:
        killer.cancel()
        calibration.kill()


def main() -> int:
    """Run the rounds and print how many survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("corpus", "checkpoint", "audio-root"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from s3prl_metaperser.checkpoints import CONTRACT, DOWNSTREAM, EXTRA_STATE, read_checkpoint

    emotions = read_checkpoint(options.checkpoint)[DOWNSTREAM][EXTRA_STATE][CONTRACT]["emotions"]
    draws = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        # One folder name throughout: the checkpoint says where its parent is, seen from it.
        whole = Path(place) / "whole"
        whole.mkdir()
        (whole / "emotions.json").write_text(json.dumps(emotions))
        taken = Taken()
        if not calibrate(options, whole, {}, taken=taken):
            raise AssertionError("the uninterrupted calibration did not end")
        kills = 0
        for number in tqdm(range(options.rounds), desc="rounds", unit="round"):
            folder = Path(place) / f"round{number}"
            folder.mkdir()
            (folder / "emotions.json").write_text(json.dumps(emotions))
            acknowledged: dict[int, list[str]] = {}
            of_answering = number % 3 > 0
            moment = Moment(draws.uniform(0, taken.answers if of_answering else taken.start), of_answering)
            if not calibrate(options, folder, acknowledged, moment):
                kills += 1
                if not calibrate(options, folder, acknowledged):
                    raise AssertionError("it did not end after it was started again")
            for name in OWN_FILES:
                if not filecmp.cmp(whole / name, folder / name, shallow=False):
                    raise AssertionError(f"round {number}: {name} differs from the uninterrupted calibration's")
            # A killed writer's own temporary file stays, hidden, until somebody writes the same file a minute later.
            names = {path.name for path in folder.iterdir()}
            left = {name for name in names - OWN_FILES - {"emotions.json"} if not name.startswith(".MY.")}
            if left:
                raise AssertionError(f"round {number}: {sorted(left)} left behind")
    print(f"calibrate: {options.rounds} rounds, {kills} killed before their end, all ended with the same bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
