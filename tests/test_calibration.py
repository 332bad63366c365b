"""A calibration without a browser: its files, what it says of a listener, and what its server lets through."""

import asyncio
import csv
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import soundfile
import torch
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.calibration import uploads
from s3prl_metaperser.calibration.application import application
from s3prl_metaperser.calibration.companion import Companion
from s3prl_metaperser.calibration.explain import differences
from s3prl_metaperser.calibration.guard import TOKEN_HEADER
from s3prl_metaperser.calibration.server import REDIRECTION, address, listen, serve
from s3prl_metaperser.calibration.session import Origin, Session
from s3prl_metaperser.calibration.session_files import SessionFiles
from s3prl_metaperser.corpus.emotions import EMOTIONS
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.personalize.labels import read_labels

CLIPS = ("a/one.wav", "a/two.wav", "b three.wav", "vier.wav")


@pytest.fixture
def audio_root(tmp_path):
    """Four tones, each louder than the one before, of 0.3 s."""
    root = tmp_path / "recordings"
    for number, clip in enumerate(CLIPS, start=1):
        (root / clip).parent.mkdir(parents=True, exist_ok=True)
        wave = 0.2 * number * np.sin(np.arange(4800) / 20)
        soundfile.write(root / clip, wave, 16000, subtype="PCM_16")
    return root


@pytest.fixture
def origin(audio_root):
    return Origin("the checkpoint's fingerprint", str(audio_root))


@pytest.fixture
def files(tmp_path):
    return SessionFiles(tmp_path / "listeners" / "MY.ckpt")


@pytest.fixture
def session(files, origin):
    session = Session(files, origin, EMOTIONS, ())
    session.ask(CLIPS)
    return session


def again(session):
    """The session as another process finds it."""
    return Session.read(session.files, session._origin, EMOTIONS)


def answers(session):
    return [session.answer(number) for number in range(1, len(session.clips) + 1)]


class TestSession:
    def test_what_was_answered_is_found_again(self, session):
        session.label(1, ["sad"])
        session.label(3, ["happy", "angry"])
        session.skip(2)
        session.label(1, ["neutral"])
        assert answers(again(session)) == [("neutral",), (), ("angry", "happy"), None]
        assert (again(session).labelled, again(session).skipped, again(session).next) == (2, 1, 4)

    def test_a_skipped_clip_can_be_labelled_and_a_labelled_one_skipped(self, session):
        session.skip(1)
        session.label(1, ["fear"])
        session.label(2, ["sad"])
        session.skip(2)
        assert answers(session) == answers(again(session)) == [("fear",), (), None, None]
        session.skip(1)
        assert answers(session) == answers(again(session)) == [(), (), None, None]

    def test_the_labels_are_a_file_that_adapt_reads(self, session, audio_root):
        session.label(3, ["happy", "angry"])
        with session.files.labels.open(newline="") as file:
            assert list(csv.reader(file)) == [["audio", "emotions"], ["b three.wav", "angry;happy"]]
        assert read_labels(session.files.labels, audio_root).audio == ("b three.wav",)

    def test_names_with_dots_are_listeners_of_their_own(self, tmp_path):
        smith, jones, whole = (SessionFiles(tmp_path / name) for name in ("dr.smith", "dr.jones", "dr.smith.ckpt"))
        assert smith.labels.name == "dr.smith.labels.csv"
        for kind in ("labels", "state", "lock"):
            assert getattr(smith, kind) == getattr(whole, kind) != getattr(jones, kind)

    def test_more_clips_can_be_asked(self, files, origin):
        session = Session(files, origin, EMOTIONS, ())
        session.ask(CLIPS[:2])
        session.label(2, ["sad"])
        session.ask(CLIPS[2:])
        assert again(session).clips == CLIPS
        assert answers(again(session)) == [None, ("sad",), None, None]

    @pytest.mark.parametrize(
        "answer", [lambda s: s.label(1, ["sad"]), lambda s: s.skip(2), lambda s: s.label(3, ["fear"])]
    )
    @pytest.mark.parametrize("fatal", [1, 2])
    def test_killed_between_any_two_writes_each_clip_has_its_old_answer_or_its_new_one(
        self, session, answer, fatal, monkeypatch
    ):
        """Clip 1 was skipped and gets a label, 2 had one and is skipped, 3 is new: one or two files change."""
        session.skip(1)
        session.label(2, ["happy"])
        session.label(4, ["angry"])
        before = answers(session)
        replace, left = os.replace, [fatal]

        def killed(*paths):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            replace(*paths)

        monkeypatch.setattr(os, "replace", killed)
        with suppress(KeyboardInterrupt):
            answer(session)
        monkeypatch.undo()
        found = answers(again(session))
        answer(session)
        after = answers(session)
        assert found in (before, after)
        assert answers(again(session)) == after

    def test_an_answer_that_cannot_be_written_is_not_taken_for_saved(self, session, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        for answer in (lambda: session.label(1, ["sad"]), lambda: session.skip(2)):
            with pytest.raises(MetaPerSERError, match=r"No space left on device.*was not saved"):
                answer()
        assert answers(session) == [None] * 4
        assert [path.name for path in session.files.out.parent.iterdir()] == ["MY.calibration.json"]

    @pytest.mark.parametrize(
        ("emotions", "said"), [([], "no emotion is ticked"), (["hapy"], "did you mean 'happy'"), (["sad", "x"], "'x'")]
    )
    def test_what_is_no_answer_changes_nothing(self, session, emotions, said):
        session.label(1, ["sad"])
        with pytest.raises(MetaPerSERError, match=said):
            session.label(1, emotions)
        assert answers(again(session))[0] == ("sad",)

    @pytest.mark.parametrize("number", [0, -1, 5])
    def test_there_are_no_other_clips(self, session, number):
        for ask in (session.recording, session.answer, session.skip):
            with pytest.raises(MetaPerSERError, match="numbered from 1 to 4"):
                ask(number)

    def test_a_clip_that_was_replaced_by_a_link_out_of_the_root_is_not_given(self, session, audio_root, tmp_path):
        secret = tmp_path / "secret.wav"
        (audio_root / CLIPS[0]).rename(secret)
        (audio_root / CLIPS[0]).symlink_to(secret)
        with pytest.raises(MetaPerSERError, match="leads outside"):
            session.recording(1)

    def test_a_labelled_recording_that_is_gone_is_put_back_or_its_line_removed(self, session, files, audio_root):
        session.label(1, ["sad"])
        session.label(2, ["angry"])
        gone = audio_root / CLIPS[1]
        kept = gone.read_bytes()
        gone.unlink()
        cure = r"; put it back there, or remove this line \(the file, if there is no other label in it\)"
        with pytest.raises(MetaPerSERError, match=rf"MY\.labels\.csv:3: there is no recording {gone}{cure}"):
            again(session)
        gone.write_bytes(kept)
        assert answers(again(session)) == [("sad",), ("angry",), None, None]
        gone.unlink()
        files.labels.write_text("".join(files.labels.read_text().splitlines(keepends=True)[:2]))
        found = again(session)
        assert answers(found) == [("sad",), None, None, None]
        found.skip(2)
        found.label(3, ["happy"])
        assert answers(again(session)) == [("sad",), (), ("happy",), None]
        files.labels.unlink()
        assert answers(again(session)) == [None, (), None, None]

    def test_a_session_of_another_checkpoint_or_folder_is_refused(self, session, files, origin, tmp_path):
        for other, said in (
            (Origin("another", origin.audio_root), "of another checkpoint"),
            (Origin(origin.checkpoint, str(tmp_path)), "on the recordings in"),
        ):
            with pytest.raises(MetaPerSERError, match=said):
                Session.read(files, other, EMOTIONS)

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "{}", '{"format": 2}', "origin=1", "clips=1", "clips=[1]", 'origin={"checkpoint": 1}'],
    )
    def test_a_file_that_is_not_ours_is_refused_in_one_line(self, session, files, origin, content):
        key, _, value = content.partition("=")
        if value:
            state = json.loads(files.state.read_text())
            content = json.dumps(state | {key: json.loads(value)})
        files.state.write_text(content)
        with pytest.raises(MetaPerSERError, match=r"MY\.calibration\.json"):
            Session.read(files, origin, EMOTIONS)

    @pytest.mark.parametrize("name", ["MY.ckpt", "MY.labels.csv"])
    def test_what_lies_where_a_session_would_begin_is_not_replaced(self, files, name):
        files.out.parent.mkdir()
        (files.out.parent / name).touch()
        with pytest.raises(MetaPerSERError, match=f"{name} exists.*--overwrite"):
            files.check_free()

    def test_beginning_anew_takes_no_answer_along(self, session, files, origin):
        session.label(1, ["sad"])
        files.discard()
        assert Session.read(files, origin, EMOTIONS) is None
        files.check_free()

    def test_folders_that_were_made_for_a_session_stay_if_anything_is_in_them(self, tmp_path):
        files = SessionFiles(tmp_path / "new/listeners/MY.ckpt")
        with files.held():
            assert files.lock.exists()
        assert not (tmp_path / "new").exists()
        with files.held():
            files.labels.touch()
        with files.held():
            pass
        assert list(files.out.parent.iterdir()) == [files.labels]

    def test_one_process_at_a_time_holds_a_session_and_a_killed_one_leaves_it_free(self, files):
        code = (
            "import sys, time; from pathlib import Path\n"
            "from s3prl_metaperser.calibration.session_files import SessionFiles\n"
            "with SessionFiles(Path(sys.argv[1])).held() as lock:\n"
            "    lock.say('at http://127.0.0.1:7861/'); print('held', flush=True); time.sleep(60)"
        )
        holder = subprocess.Popen([sys.executable, "-c", code, str(files.out)], stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(MetaPerSERError, match=r"open already, at http://127\.0\.0\.1:7861/"), files.held():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with files.held():
            assert files.lock.exists()
        assert list(files.out.parent.iterdir()) == []


class TestExplanation:
    generic = np.array([[0.7, 0.2, 0.1]] * 3 + [[0.3, 0.6, 0.1]] + [[0.1, 0.8, 0.1]] * 3)
    personal = np.array([[0.3, 0.59, 0.11]] * 3 + [[0.3, 0.6, 0.1]] + [[0.1, 0.7, 0.2]] * 3)

    def test_means_are_over_the_clips_of_what_others_hear(self):
        found = differences(self.generic, self.personal, ("sad", "fear", "happy"))
        assert found.clips.tolist() == [3, 4, 0]
        assert found.change[0] == pytest.approx([-0.4, 0.39, 0.01])
        assert found.change[1] == pytest.approx([0, -0.075, 0.075])
        assert np.isnan(found.change[2]).all()

    def test_the_largest_are_told_first(self):
        said = [str(one) for one in differences(self.generic, self.personal, ("sad", "fear", "happy")).largest(3)]
        assert said == [
            "Where others hear sad, you hear fear more often (20% → 59% on average, 3 clips).",
            "Where others hear fear, you hear happy more often (10% → 18% on average, 4 clips).",
        ]

    def test_few_clips_and_small_differences_are_not_told(self):
        assert differences(self.generic[:2], self.personal[:2], ("sad", "fear", "happy")).largest() == []
        assert differences(self.generic, self.generic + 0.01, ("sad", "fear", "happy")).largest() == []


@dataclass(frozen=True)
class Heard:
    audio: str
    emotions: tuple[str, ...]
    probabilities: dict[str, float]


@dataclass
class LoudnessModel:
    """Stands in for a recogniser: quiet clips are sad, loud ones angry; adapted, it hears the first label in all."""

    heard: str = ""
    adaptations: list = field(default_factory=list)
    working: threading.Lock = field(default_factory=threading.Lock)
    emotions = EMOTIONS
    settings = SimpleNamespace(scope="head")

    def probabilities(self, wavs, progress=False):
        assert self.working.acquire(blocking=False), "two threads work with the model at once"
        rows = []
        for wav in wavs:
            wav = read_audio(wav) if isinstance(wav, Path) else wav
            row = np.full(9, 0.05)
            row[EMOTIONS.index(self.heard or ("angry" if wav.abs().max() > 0.5 else "sad"))] = 0.6
            rows.append(row)
        self.working.release()
        return np.array(rows)

    def predict(self, wavs, progress=False):
        return [
            Heard(
                "",
                tuple(e for e, p in zip(EMOTIONS, row, strict=True) if p > 1 / 9),
                dict(zip(EMOTIONS, row, strict=True)),
            )
            for row in self.probabilities(wavs)
        ]

    def adapt(self, wavs, labels, steps, lr=None):
        self.adaptations.append((list(wavs), list(labels), steps))
        return LoudnessModel(labels[0][0], working=self.working)

    def save(self, path, standalone=False, overwrite=False):
        assert overwrite or not path.exists()
        torch.save({"heard": self.heard, "standalone": standalone}, path)
        return path


TOKEN = "the-token"
HOST = "127.0.0.1:7860"


@pytest.fixture
def model():
    return LoudnessModel()


@pytest.fixture
def closed():
    return []


@pytest.fixture
def stranger(session, model, audio_root, closed):
    """Another user of the same machine, who was never given the address."""
    companion = Companion(model, session, [audio_root / clip for clip in CLIPS], steps=7)
    app = application(companion, TOKEN, "127.0.0.1", lambda: closed.append(True))
    return TestClient(app, base_url=f"http://{HOST}", raise_server_exceptions=False)


@pytest.fixture
def client(stranger):
    """The page, opened by the address that the program printed."""
    stranger.headers[TOKEN_HEADER] = TOKEN
    return stranger


def wav(seconds=0.5, loudness=0.9, rate=16000, **kwargs):
    file = io.BytesIO()
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(file, loudness * np.sin(1000 * time), rate, format=kwargs.pop("format", "WAV"), **kwargs)
    return file.getvalue()


def through_a_pipe(flac):
    """Take the number of samples out of a header, 36 bits, as what writes to a pipe leaves them."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


class TestServer:
    def test_the_page_and_its_files_come_from_here_alone(self, client):
        page = client.get("/")
        assert page.status_code == 200
        assert "://" not in page.text.replace("http://www.w3.org/2000/svg", "")
        for name in ("page.css", "page.js", "icon.svg"):
            assert f'"/files/{name}"' in page.text
            assert client.get(f"/files/{name}").status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "://" not in policy

    def test_a_clip_is_sent_as_it_is_heard_by_the_model(self, client, audio_root):
        answer = client.get("/clips/2")
        assert answer.headers["content-type"] == "audio/wav"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        samples, rate = soundfile.read(io.BytesIO(answer.content))
        assert rate == 16000
        assert samples == pytest.approx(read_audio(audio_root / CLIPS[1]).numpy(), abs=2**-15)

    def test_no_other_file_can_be_asked_for(self, client, audio_root, tmp_path):
        soundfile.write(tmp_path / "secret.wav", np.ones(100), 16000)
        for path in (
            "/clips/5",
            "/clips/0",
            "/clips/-1",
            "/clips/one.wav",
            "/clips/²",
            f"/clips/{'1' * 5000}",
            "/clips/../secret.wav",
            "/clips/%2e%2e%2fsecret.wav",
        ):
            assert client.get(path).status_code == 404
        for path in ("/files/../page.html.jinja", "/files/%2e%2e/page.html.jinja", "/files//etc/passwd", "/files/"):
            assert client.get(path).status_code == 404
        (audio_root / CLIPS[0]).unlink()
        (audio_root / CLIPS[0]).symlink_to(tmp_path / "secret.wav")
        refused = client.get("/clips/1")
        assert (refused.status_code, "leads outside" in refused.json()["message"]) == (400, True)

    def test_a_recording_that_is_broken_is_named(self, client, audio_root):
        (audio_root / CLIPS[0]).write_bytes(b"RIFF")
        refused = client.get("/clips/1")
        assert refused.status_code == 400
        assert "one.wav" in refused.json()["message"]

    def test_answers_are_saved_before_they_are_confirmed(self, client, session):
        state = client.post("/clips/1/label?emotion=sad&emotion=fear").json()
        assert state == {
            "answers": [["sad", "fear"], None, None, None],
            "next": 2,
            "labelled": 1,
            "skipped": 0,
            "labels": 1,
            "places": {
                "out": str(session.files.out),
                "labels": str(session.files.labels),
                "recordings": str(session.audio_root),
            },
        }
        assert answers(again(session))[0] == ("sad", "fear")
        assert client.post("/clips/2/skip").json()["answers"][1] == []
        assert client.get("/session").json() == client.post("/clips/2/skip").json()

    @pytest.mark.parametrize("path", ["/clips/1/label", "/clips/1/label?emotion=joyful", "/clips/9/label?emotion=sad"])
    def test_a_wrong_answer_is_refused(self, client, session, path):
        refused = client.post(path)
        assert 400 <= refused.status_code < 500
        assert refused.json()["message"]
        assert answers(again(session)) == [None] * 4

    CHANGES = ("/clips/1/label?emotion=sad", "/clips/1/skip", "/predict", "/finish", "/close")

    @pytest.mark.parametrize("path", CHANGES)
    @pytest.mark.parametrize(
        "headers",
        [
            {TOKEN_HEADER: ""},
            {TOKEN_HEADER: "of an earlier start"},
            {TOKEN_HEADER: "é"},
            {"origin": "http://evil.example"},
            {"origin": "http://127.0.0.1:8000"},
            {"origin": "null"},
            {"origin": "http://["},
            {"origin": "http://127.0.0.1:7860.evil.example"},
            {"host": "evil.example:7860"},
            {"host": "10.0.0.7:7860"},
            {"host": ""},
        ],
        ids=str,
    )
    def test_nobody_else_changes_anything(self, client, session, closed, path, headers):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        refused = client.post(path, headers=encoded, content=wav())
        assert refused.status_code == 403
        assert refused.json()["message"]
        assert answers(again(session)) == [None] * 4
        assert not session.files.out.exists()
        assert not closed

    READS = ("/session", "/clips/1", "/model", "/model/checkpoint", "/model/picture.png", "/nothing", "/files")

    @pytest.mark.parametrize("path", [*READS, *CHANGES])
    @pytest.mark.parametrize("said", [None, "", "of an earlier start", f"{TOKEN}x", TOKEN[:-1], "é"])
    def test_whoever_was_not_given_the_address_gets_nothing(self, stranger, session, closed, path, said):
        """A cookie or a query that knows the token is not asked either: both are sent on to others too easily."""
        headers = {} if said is None else {TOKEN_HEADER: said.encode("latin-1")}
        elsewhere = {"cookie": f"{TOKEN_HEADER}={TOKEN}; token={TOKEN}"}
        for place in (path, f"{path}{'&' if '?' in path else '?'}token={TOKEN}"):
            for method in ("GET", "HEAD", "POST"):
                refused = stranger.request(method, place, headers=headers | elsewhere)
                assert refused.status_code == 403
                assert "default-src 'none'" in refused.headers["content-security-policy"]
                assert method == "HEAD" or refused.json()["message"]
        assert answers(again(session)) == [None] * 4
        assert not closed

    def test_what_anybody_may_read_says_nothing_of_the_listener(self, stranger, client, session, tmp_path):
        client.post("/clips/1/label?emotion=sad")
        del stranger.headers[TOKEN_HEADER]
        for path in ("/", "/files/page.js", "/files/page.css", "/files/icon.svg"):
            shown = stranger.get(path)
            assert shown.status_code == 200
            assert "set-cookie" not in shown.headers
            for secret in (TOKEN, str(tmp_path), session.files.out.name, CLIPS[0]):
                assert secret not in shown.text
        assert stranger.post("/").status_code == 403

    @pytest.mark.parametrize("path", CHANGES)
    def test_what_changes_something_is_a_post(self, client, path):
        assert client.get(path).status_code == 405

    @pytest.mark.parametrize("path", ["/", "/session", "/clips/1", "/files/page.js"])
    def test_a_foreign_name_that_leads_here_gets_nothing(self, client, path):
        assert client.get(path, headers={"host": "evil.example"}).status_code == 403
        for name in ("localhost:7860", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST"):
            assert client.get(path, headers={"host": name}).status_code == 200

    def test_without_a_label_there_is_no_model_of_yours(self, client):
        for path in ("/model", "/model/picture.png", "/model/judgement", "/model/checkpoint"):
            refused = client.get(path)
            assert (refused.status_code, "no clip is labelled yet" in refused.json()["message"]) == (400, True)
        assert client.post("/finish").status_code == 400

    def test_the_model_is_adapted_to_the_labels_once_and_again_when_they_change(self, client, model, audio_root):
        client.post("/clips/2/label?emotion=fear")
        for path in ("/model", "/model/picture.png", "/model/checkpoint"):
            assert client.get(path).status_code == 200
        assert model.adaptations == [([audio_root / CLIPS[1]], [("fear",)], 7)]
        client.post("/clips/2/label?emotion=happy")
        assert client.get("/model").status_code == 200
        assert model.adaptations[1:] == [([audio_root / CLIPS[1]], [("happy",)], 7)]

    def test_how_one_differs_in_numbers_and_as_a_picture(self, client):
        client.post("/clips/2/label?emotion=fear")
        found = client.get("/model").json()
        sad, angry, fear = map(EMOTIONS.index, ("sad", "angry", "fear"))
        assert found["clips"][sad] == found["clips"][angry] == 2
        assert found["change"][angry][fear] == pytest.approx(0.55)
        assert found["change"][fear] == [None] * 9
        for theme, paper in (("light", (255, 255, 255)), ("dark", (20, 24, 29))):
            picture = Image.open(io.BytesIO(client.get(f"/model/picture.png?theme={theme}").content))
            assert picture.convert("RGB").getpixel((2, 2)) == paper
        assert client.get("/model/picture.png?theme=none").status_code == 400

    def test_the_model_so_far_is_downloaded_whole_and_saved_small(self, client, session):
        client.post("/clips/1/label?emotion=fear")
        download = client.get("/model/checkpoint")
        assert download.headers["content-disposition"] == 'attachment; filename="MY.ckpt"'
        assert torch.load(io.BytesIO(download.content), weights_only=True) == {"heard": "fear", "standalone": True}
        assert not session.files.out.exists()
        saved = client.post("/finish").json()
        assert saved["out"] == str(session.files.out)
        assert f"--checkpoint {session.files.out} " in saved["next"]
        assert torch.load(session.files.out, weights_only=True) == {"heard": "fear", "standalone": False}
        client.post("/clips/2/label?emotion=sad")
        assert client.post("/finish").status_code == 200

    def test_a_clip_of_ones_own_is_heard_by_both_models(self, client):
        alone = client.post("/predict?name=my.wav", content=wav(loudness=0.3)).json()
        assert (alone["decided"], alone["personal"]) == (["sad"], None)
        client.post("/clips/1/label?emotion=fear")
        both = client.post("/predict?name=my.wav", content=wav(loudness=0.3)).json()
        assert both["decided"] == ["fear"]
        assert both["generic"] == alone["generic"]
        assert both["personal"]["fear"] == pytest.approx(0.6)

    @pytest.mark.parametrize(
        "kind", [{"format": "FLAC"}, {"format": "OGG"}, {"format": "MP3"}, {"rate": 44100}, {"rate": 44101}]
    )
    def test_recordings_of_many_kinds_are_taken(self, client, kind):
        assert client.post("/predict?name=clip", content=wav(**kind)).status_code == 200

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"this is a letter, not a recording", "is not a readable recording"),
            (b"", "is empty"),
            (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2mp41" + bytes(4000), "is not a readable recording"),
            (wav()[:5000], "is cut off"),
            (wav(seconds=0), "holds no samples"),
            (wav(seconds=61), "61 s long"),
            (wav(seconds=3600, loudness=0, format="FLAC"), "3600 s long"),
            (b"RIFF\xff\xff\xff\xffWAVEfmt \x00", "is not a readable recording"),
            (wav(seconds=0.1, rate=1_000_003), "has 1,000,003 samples a second"),
            (through_a_pipe(wav(format="FLAC")), "does not say how long it is"),
        ],
        ids=["text", "empty", "video", "cut off", "no samples", "long", "hours of silence", "header", "rate", "pipe"],
    )
    def test_a_wrong_upload_gets_a_message(self, client, content, said):
        refused = client.post("/predict?name=C:\\clips\\mine.wav", content=content)
        assert refused.status_code == 400
        assert refused.json()["message"].startswith("'mine.wav' ")
        assert said in refused.json()["message"]

    def test_an_upload_that_is_too_large_is_not_read(self, client, monkeypatch):
        monkeypatch.setattr(uploads, "MOST_BYTES", 1000)
        assert client.post("/predict?name=x", content=bytes(1000)).status_code == 400
        refused = client.post("/predict?name=x", content=bytes(1001))
        assert refused.status_code == 413
        assert "larger than" in refused.json()["message"]
        taken = []

        async def endless():
            while True:
                taken.append(300)
                yield bytes(300)

        for promised, read in (("1001", 0), (None, 1200), ("10", 1200)):
            taken.clear()
            with pytest.raises(uploads.TooLargeError):
                asyncio.run(uploads.collect(endless(), promised))
            assert sum(taken) == read

    def test_a_tab_that_is_closed_in_the_middle_of_an_upload_is_no_failure(self, session, model, closed):
        app = application(Companion(model, session, [], steps=7), TOKEN, "127.0.0.1", lambda: closed.append(True))
        came = [{"type": "http.request", "body": b"RIFF", "more_body": True}, {"type": "http.disconnect"}]
        sent = []

        async def receive():
            return came.pop(0)

        async def send(message):
            sent.append(message)

        headers = [(b"host", HOST.encode()), (TOKEN_HEADER.encode(), TOKEN.encode())]
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"name=x", "headers": headers}
        asyncio.run(app(scope, receive, send))
        assert sent[0]["status"] == 400

    def test_a_failure_of_ours_is_said_without_its_inside(self, client, monkeypatch):
        monkeypatch.setattr(Companion, "hear", lambda *_: 1 / 0)
        failed = client.post("/predict?name=x", content=wav())
        assert failed.status_code == 500
        assert "default-src 'none'" in failed.headers["content-security-policy"]
        assert "terminal" in failed.json()["message"]
        assert "division" not in failed.text

    def test_the_page_can_end_the_program(self, client, closed):
        assert client.post("/close").status_code == 200
        assert closed == [True]

    def test_many_questions_at_once_are_answered_one_after_the_other(self, client):
        client.post("/clips/1/label?emotion=fear")
        statuses = []
        ask = lambda: statuses.append(client.post("/predict?name=x", content=wav()).status_code)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 8


class TestAddress:
    def test_a_port_that_is_taken_is_passed_over_unless_it_was_asked_for(self):
        with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
            taken = first.getsockname()[1]
            assert taken != second.getsockname()[1]
            assert address(first) == f"http://127.0.0.1:{taken}/"
            with pytest.raises(MetaPerSERError, match=f"port {taken}: Address already in use"):
                listen("127.0.0.1", taken)

    @pytest.mark.parametrize(("host", "port"), [("203.0.113.1", None), ("no such host", 7860), ("127.0.0.1", 99999)])
    def test_where_nobody_can_listen_it_says_so(self, host, port):
        with pytest.raises(MetaPerSERError, match="cannot listen on"):
            listen(host, port)

    @pytest.mark.parametrize(
        ("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("localhost", "127.0.0.1")]
    )
    def test_the_address_leads_to_this_very_socket(self, host, shown):
        try:
            listening = listen(host, None)
        except MetaPerSERError:
            pytest.skip(f"this machine does not listen on {host}")
        with listening:
            place = address(listening)
            port = listening.getsockname()[1]
            assert place in (f"http://{shown}:{port}/", f"http://[::1]:{port}/")
            with socket.create_connection((urlsplit(place).hostname, port), timeout=5) as asking:
                taken, sender = listening.accept()
                taken.close()
                assert sender[:2] == asking.getsockname()[:2]

    @pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)])
    def test_an_address_that_others_reach_comes_with_a_warning(self, session, model, monkeypatch, capsys, host, warned):
        monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
        with listen(host, 0) as listening:
            port = listening.getsockname()[1]
            said = []
            for _ in range(2):
                serve(Companion(model, session, [], steps=7), listening, host, browser=False)
                said.append(capsys.readouterr())
        assert ["not encrypted" in one.err for one in said] == [warned] * 2
        tokens = [re.search(rf":{port}/#token=([\w-]{{43}}) in a browser", one.out)[1] for one in said]
        assert tokens[0] != tokens[1], "each start has a token of its own"

    def test_no_browser_is_given_the_token_on_its_command_line(self, session, model, monkeypatch, capsys):
        """It is given a file that nobody else may read; one that a killed process has left is not taken for it."""
        given = queue.Queue()
        found = []

        def opened(uri):
            given.put(uri)
            return True

        def run(*_, **__):
            path = Path(unquote(urlsplit(given.get(timeout=10)).path))
            found.append((path, path.stat().st_mode & 0o777, path.read_text()))

        monkeypatch.setattr(webbrowser, "open", opened)
        monkeypatch.setattr(uvicorn.Server, "run", run)
        session.files.entrance.write_text(f'{REDIRECTION}http://127.0.0.1:7860/#token=of-an-earlier-start">')
        with listen("127.0.0.1", 0) as listening:
            serve(Companion(model, session, [], steps=7), listening, "127.0.0.1", browser=True)
        ((path, mode, content),) = found
        (page,) = re.findall(r"http://\S+", capsys.readouterr().out)
        assert (path, mode) == (session.files.entrance, 0o600)
        assert f'content="0; url={page}"' in content
        assert not path.exists()

    def test_where_that_file_cannot_be_written_the_printed_address_is_left(self, session, model, monkeypatch, capsys):
        ran = []
        monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: ran.append(True))
        monkeypatch.setattr(webbrowser, "open", lambda uri: ran.append(uri))
        entrance = session.files.entrance
        for is_there, is_left in (
            (entrance.mkdir, entrance.is_dir),
            (lambda: entrance.write_text("mine"), lambda: entrance.read_text() == "mine"),
        ):
            is_there()
            with listen("127.0.0.1", 0) as listening:
                serve(Companion(model, session, [], steps=7), listening, "127.0.0.1", browser=True)
            assert ran == [True]
            assert is_left()
            assert "#token=" in capsys.readouterr().out
            ran.clear()
            if entrance.is_dir():
                entrance.rmdir()
