"""A small corpus in the manifest's own format, written by hand, and a small upstream with random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from small_upstreams import write_upstream

from s3prl_metaperser.run_downstream import install_stand_ins

install_stand_ins()  # for the tests that import s3prl themselves; where s3prl imports without, there is nothing to do

SAMPLE_RATE = 16000
EMOTIONS = ["frustrated", "angry", "sad", "disgust", "excited", "fear", "neutral", "surprise", "happy"]
LISTENERS = {"E1": "external", "E2": "external", "E3": "external", "F1": "self", "M2": "self", "E9": "external"}


LONGEST = ("test_demo_entire", "test_readme", "test_ddp", "test_runner", "test_experiments", "test_personalize")
"""Modules that are begun first, so that no process of two is left with one of them alone in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order modules; ``--no-loadscope-reorder`` keeps that order, where xdist would begin those of many tests first."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def write_small_corpus(folder: Path, per_session: int = 12, sessions: int = 5) -> Path:
    """60 clips of 0.4 to 0.7 s whose loudness and pitch follow one of three emotions, named by five listeners.

    Listener E9 labels two clips only. F1 labels session 1, M2 session 2; E3 calls anger frustration.
    """
    rng = np.random.default_rng(0)
    audio, rows = folder / "audio", []
    audio.mkdir(parents=True)
    for session in range(1, sessions + 1):
        for number in range(per_session):
            utterance = f"Ses{session:02d}_{number:02d}"
            latent = int(rng.integers(3))
            samples = int(SAMPLE_RATE * rng.uniform(0.4, 0.7))
            time = np.arange(samples) / SAMPLE_RATE
            wave = (0.05 + 0.1 * latent) * np.sin(2 * np.pi * (120 + 90 * latent) * time)
            soundfile.write(audio / f"{utterance}.wav", wave + 0.01 * rng.standard_normal(samples), SAMPLE_RATE)
            for listener, kind in LISTENERS.items():
                if listener == "E9" and (session, number) not in [(1, 0), (1, 1)]:
                    continue
                if kind == "self" and session != int(listener[1]):
                    continue
                heard = ["sad", "neutral", "angry"][latent if rng.random() < 0.85 else int(rng.integers(3))]
                if listener == "E3" and heard == "angry":
                    heard = "frustrated"
                ticked = f"{heard};fear" if rng.random() < 0.1 else heard
                rows.append(f"{utterance},audio/{utterance}.wav,{session},S{session},{listener},{kind},{ticked}")
    rows.sort(key=lambda row: (row.split(",")[0], row.split(",")[4]))
    header = "utterance,audio,session,speaker,annotator,kind,emotions"
    (folder / "annotations.csv").write_text("\n".join([header, *rows]) + "\n")
    counts = {"utterances": sessions * per_session, "annotators": len(LISTENERS), "annotations": len(rows)}
    corpus = {"name": "small", "source": "table", "root": ".", "emotions": EMOTIONS, "counts": counts}
    (folder / "corpus.json").write_text(json.dumps(corpus))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_users_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPERSER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    return write_small_corpus(tmp_path_factory.mktemp("small") / "corpus")


@pytest.fixture(scope="session")
def small_wavlm(tmp_path_factory) -> Path:
    """A two-layer WavLM with random weights, in the format that ``wavlm_local`` reads."""
    return write_upstream("wavlm_local", tmp_path_factory.mktemp("wavlm"))
