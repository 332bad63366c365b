"""One person's calibration from beginning to end, in real headless Chromium against the command as users start it."""

import csv
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
import torch
from playwright.sync_api import expect, sync_playwright
from workshop import Workshop

from s3prl_metaperser import cli
from s3prl_metaperser.calibration import server
from s3prl_metaperser.corpus.iemocap import prepare_iemocap
from s3prl_metaperser.corpus.manifest import write_corpus
from s3prl_metaperser.corpus.synthetic import write_demo_corpus
from s3prl_metaperser.personalize import load

CHROMIUM = os.environ.get("METAPERSER_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; install one or name it: METAPERSER_CHROMIUM"
)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",  # a microphone that beeps
    "--use-fake-ui-for-media-stream",  # and may be used
]
CLIPS = 6


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """The demo corpus."""
    root = tmp_path_factory.mktemp("calibration")
    write_demo_corpus(root / "recordings")
    write_corpus(prepare_iemocap(root / "recordings")[0], root / "corpus")
    return Workshop(root, root / "corpus", ["-u", "fbank_no_cmvn"])


@pytest.fixture(scope="module")
def checkpoint(workshop):
    """Meta-PerSER, hardly trained."""
    workshop.train("trained", workshop.config("meta_perser", init_from=None))
    return workshop.root / "trained" / "dev-best.ckpt"


@pytest.fixture
def page():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 1000})
        page.set_default_timeout(15_000)
        expect.set_options(timeout=15_000)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(f"{error} {error.stack}"))
        yield page
        browser.close()


@contextmanager
def started(arguments):
    """``metaperser calibrate`` as a process of its own, once it is ready; killed (SIGKILL) at the end."""
    program = Path(sys.executable).parent / "metaperser"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        said = next((line for line in process.stdout if line.startswith("Open ")), None)
        assert said is not None, process.stderr.read()
        process.address = re.search(r"http://\S+", said).group()
        yield process
    finally:
        process.kill()
        process.communicate()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def labels_in(path):
    with path.open(newline="") as file:
        return [row["emotions"] for row in csv.DictReader(file)]


def is_on(page, number):
    expect(page.locator("#clip-title")).to_have_text(f"Clip {number} of {CLIPS}")


def has_labelled(page, text):
    expect(page.locator("#progress-text")).to_have_text(text)


def ticked(page):
    return [box.get_attribute("value") for box in page.locator("input[name=emotion]:checked").all()]


def fits_a_telephone(page):
    """At a width of 400 pixels nothing is cut off at the side; then as it was."""
    size = page.viewport_size
    page.set_viewport_size({"width": 400, "height": 800})
    widths = page.evaluate("[document.scrollingElement.scrollWidth, document.scrollingElement.clientWidth]")
    assert widths[0] <= widths[1]
    page.set_viewport_size(size)


def plays_to_its_end(page, start):
    page.evaluate("document.getElementById('audio').addEventListener('timeupdate', () => window.wentOn = true)")
    start()
    expect(page.locator("#audio")).to_have_js_property("ended", True)
    assert page.evaluate("window.wentOn && document.getElementById('audio').currentTime") > 0.2


def shown_probabilities(page):
    """(mine, the average listener's) by emotion, from the table on the page."""
    rows = page.locator("#probabilities tbody tr").all()
    names = [re.sub(r"\W", "", row.locator("th").inner_text()) for row in rows]
    cells = [[float(cell.get_attribute("data-probability")) for cell in row.locator("td").all()] for row in rows]
    return [dict(zip(names, column, strict=True)) for column in zip(*cells, strict=True)]


def begins_by_mouse_and_by_keyboard(page, out):
    """Plays, labels two clips each way, goes back and changes an answer, skips."""
    labels = out.with_suffix(".labels.csv")
    is_on(page, 1)
    has_labelled(page, f"0 of {CLIPS} labelled")
    expect(page.locator("#model-state")).to_contain_text("still the generic model")
    expect(page.locator("#download")).to_be_hidden()
    fits_a_telephone(page)
    page.get_by_label("Play each next clip by itself").uncheck()
    plays_to_its_end(page, page.get_by_role("button", name="Play").click)

    page.get_by_label("sad").check()
    page.get_by_label("fear").check()
    page.get_by_role("button", name="Save and go on").click()
    is_on(page, 2)
    assert labels_in(labels) == ["sad;fear"]

    expect(page.locator("#clip-title")).to_be_focused()
    plays_to_its_end(page, lambda: page.keyboard.press("p"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="Nothing is ticked")).to_be_visible()
    for key in ("2", "7", "7"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    is_on(page, 3)
    assert labels_in(labels) == ["sad;fear", "angry"]

    page.keyboard.press("s")
    is_on(page, 4)
    has_labelled(page, f"2 of {CLIPS} labelled, 1 skipped")

    for number in (3, 2, 1):
        page.keyboard.press("ArrowLeft")
        is_on(page, number)
    assert ticked(page) == ["sad", "fear"]
    page.keyboard.press("6")
    page.keyboard.press("Enter")
    is_on(page, 4)
    assert labels_in(labels) == ["sad", "angry"]


def everything_by_keyboard_alone(page):
    """Every control is reached by Tab, in the order of the page."""
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.value || ''"))
    expected = ["back", "play", "position", "frustrated", "happy", "skip", "save", "compare", "download", "upload"]
    assert [name for name in reached if name in expected][: len(expected)] == expected
    assert {"record", "finish", "close", "shortcuts", "autoplay"} <= set(reached)


def sees_how_they_differ(page):
    page.get_by_role("button", name="Show how I differ").click()
    expect(page.locator("#picture")).to_have_js_property("complete", True)
    expect(page.locator("#picture")).to_have_js_property("naturalWidth", 1012)
    assert page.locator("#sentences li").count() >= 1
    page.get_by_text("The same as a table").click()
    assert page.locator("#changes tbody tr").count() == 9
    expect(page.locator("#judgement")).to_contain_text(re.compile("generic"))
    fits_a_telephone(page)


def tries_clips(page, clip, out, tmp_path):
    """Uploads a recording, speaks, and gives files that are none."""
    upload = page.get_by_label("Choose a recording")
    upload.set_input_files(clip)
    expect(page.locator("#heard-title")).to_contain_text("You hear: ")
    mine, average = shown_probabilities(page)
    fits_a_telephone(page)

    letter = tmp_path / "letter.txt"
    letter.write_text("Dear listener,")
    cut = tmp_path / "cut.wav"
    cut.write_bytes(Path(clip).read_bytes()[:2000])
    (tmp_path / "empty.wav").touch()
    for wrong, said in (
        (letter, "'letter.txt' is not a readable recording"),
        (cut, "'cut.wav' is cut off"),
        (tmp_path / "empty.wav", "'empty.wav' is empty"),
    ):
        upload.set_input_files(wrong)
        expect(page.locator("#try-message")).to_contain_text(said)
        expect(page.locator("#heard")).to_be_hidden()
    fits_a_telephone(page)

    page.get_by_role("button", name="Record myself").click()
    expect(page.locator("#try-status")).to_have_text("Recording…")
    page.wait_for_timeout(700)
    page.get_by_role("button", name="Stop recording").click()
    expect(page.locator("#heard-title")).to_contain_text("You hear: ")
    expect(page.locator("#try-message")).to_be_empty()
    return mine, average


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; install one, or name it: METAPERSER_CHROMIUM")
def test_a_calibration_from_beginning_to_end(page, workshop, checkpoint, tmp_path, capsys):
    out = tmp_path / "MY.ckpt"
    recordings = workshop.root / "recordings"
    options = ["--audio-root", recordings, "--out", out, "--n", CLIPS, "--port", free_port(), "--no-browser"]
    command = ["calibrate", "--checkpoint", *map(str, [checkpoint, *options])]

    with started(command) as program:
        page.goto(program.address)
        begins_by_mouse_and_by_keyboard(page, out)
        with pytest.raises(SystemExit) as second:
            cli.main(command)
        assert second.value.code == 2
        address, token = program.address.split("#token=")
        said = capsys.readouterr().err
        assert f"is open already, at {address};" in said
        assert token not in said
        assert page.url == address, "the token is not on show"
        page.reload()
        is_on(page, 4)
        assert token not in "".join(path.read_text() for path in tmp_path.iterdir())
    assert labels_in(out.with_suffix(".labels.csv")) == ["sad", "angry"]
    assert not out.exists()

    page.keyboard.press("9")
    page.keyboard.press("Enter")
    expect(page.locator("#answer-message")).to_contain_text("The program does not answer")
    with started(command) as program:
        page.keyboard.press("Enter")
        expect(page.locator("#answer-message")).to_contain_text("Open the address that the program printed")
        page.reload()
        expect(page.locator("#progress-text")).to_contain_text("Open the address that the program printed")
        page.goto(program.address)  # in the same tab: only what follows # is new
        is_on(page, 4)
        has_labelled(page, f"2 of {CLIPS} labelled, 1 skipped")
        everything_by_keyboard_alone(page)
        for number in (4, 5, 6):
            is_on(page, number)
            page.get_by_label("happy").check()
            page.get_by_role("button", name="Save and go on").click()
        expect(page.locator("#done-title")).to_be_focused()
        sees_how_they_differ(page)

        with page.expect_download() as download:
            page.get_by_role("button", name="Download my model").click()
        download.value.save_as(tmp_path / "downloaded.ckpt")
        assert "Downstream" in torch.load(tmp_path / "downloaded.ckpt", weights_only=True)

        page.get_by_role("button", name="Save my model").click()
        expect(page.locator("#finished")).to_contain_text(f"metaperser predict --checkpoint {out}")

        clip = next(recordings.rglob("Ses05*.wav"))
        mine, average = tries_clips(page, clip, out, tmp_path)
        page.get_by_role("button", name="Close the program").click()
        expect(page.locator("#closed-title")).to_be_focused()
        expect(page.get_by_role("main")).to_have_count(1)
        page.evaluate("audio.dispatchEvent(new Event('pause'))")  # as a player sends it that was stopped a moment ago
        assert program.wait(timeout=15) == 0
        assert "5 of 6 clips labelled" in program.stdout.read()
        assert program.stderr.read() == ""
    assert page.faults == []

    given = {file: load(file, device="cpu") for file in (checkpoint, out, tmp_path / "downloaded.ckpt")}
    heard = [model.predict([clip])[0].probabilities for model in given.values()]
    assert average == pytest.approx(heard[0], abs=1e-6)
    assert mine == pytest.approx(heard[1], abs=1e-6)
    assert mine == pytest.approx(heard[2], abs=1e-6)
    assert mine != pytest.approx(average, abs=1e-3)
    with out.with_suffix(".labels.csv").open(newline="") as file:
        named = [row["audio"] for row in csv.DictReader(file)]
    assert all(soundfile.info(recordings / name).frames for name in named)
    assert sorted(path.name for path in out.parent.iterdir() if path.name.startswith(("MY", ".MY"))) == [
        "MY.calibration.json",
        "MY.ckpt",
        "MY.labels.csv",
    ]


class TestCommand:
    """What ends the command before, or without, a page."""

    @pytest.fixture
    def calibrate(self, workshop, checkpoint, tmp_path, monkeypatch):
        """The command in this process, which serves nothing: the clips that it would have asked."""
        served = []
        monkeypatch.setattr(server, "serve", lambda companion, *_, **__: served.append(companion.session.clips))

        def run(*options):
            given = {
                "--checkpoint": checkpoint,
                "--audio-root": workshop.root / "recordings",
                "--out": tmp_path / "MY.ckpt",
            }
            given |= dict(zip(options[::2], options[1::2], strict=True))
            assert (
                cli.main(["calibrate", "--device", "cpu", *(str(word) for pair in given.items() for word in pair)]) == 0
            )
            return served[-1]

        return run

    def test_more_clips_can_be_asked_of_the_same_session(self, calibrate, capsys):
        first = calibrate("--n", 3)
        assert len(set(first)) == 3
        assert "0 of 3 clips labelled; the same command goes on" in capsys.readouterr().out
        assert calibrate("--steps", 7) == first
        more = calibrate("--n", 5)
        assert more[:3] == first
        assert len(set(more)) == 5

    def test_clips_can_be_added_where_one_that_was_asked_is_gone(self, calibrate, workshop, tmp_path):
        recordings = shutil.copytree(workshop.root / "recordings", tmp_path / "recordings")
        first = calibrate("--audio-root", recordings, "--n", 3)
        (recordings / first[1]).unlink()
        more = calibrate("--audio-root", recordings, "--n", 5)
        assert more[:3] == first
        assert len(set(more)) == 5

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--n", 0), "at least one clip"),
            (("--audio-root", "{empty}"), "holds no recording"),
            (("--checkpoint", "{other}"), "not a readable torch file"),
            (("--checkpoint", "{none}"), "does not exist"),
            (("--out", "{checkpoint}"), "is what the result is made from"),
            (("--out", "{other}"), "other.ckpt exists"),
            (("--port", "{taken}"), "Address already in use"),
            (("--lr", 0.1), "has learned its own rates"),
            (("--corpus", "{empty}"), "empty"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_said_in_a_line_and_nothing_is_left_behind(
        self, calibrate, checkpoint, tmp_path, capsys, options, said
    ):
        (tmp_path / "empty").mkdir()
        (tmp_path / "other.ckpt").write_text("something else")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            places = {
                "empty": tmp_path / "empty",
                "other": tmp_path / "other.ckpt",
                "none": tmp_path / "none.ckpt",
                "checkpoint": checkpoint,
                "taken": listening.getsockname()[1],
            }
            with pytest.raises(SystemExit) as ended:
                calibrate(*(str(word).format(**places) for word in options))
        assert ended.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("metaperser: error: ")
        assert said in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "other.ckpt"]

    def test_one_listeners_model_is_not_calibrated_again(self, calibrate, workshop, checkpoint, tmp_path, capsys):
        personal = tmp_path / "hers.ckpt"
        load(checkpoint, "cpu").adapt([next((workshop.root / "recordings").rglob("*.wav"))], ["sad"]).save(personal)
        with pytest.raises(SystemExit):
            calibrate("--checkpoint", personal)
        assert "one listener's model already" in capsys.readouterr().err
