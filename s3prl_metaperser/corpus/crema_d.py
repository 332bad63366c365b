"""CREMA-D: thousands of raters who heard acted sentences, each naming one of six emotions.

Source: Cao et al., "CREMA-D: Crowd-sourced Emotional Multimodal Actors Dataset", 2014, and the public repository
https://github.com/CheyneyComputerScience/CREMA-D. Of ``finishedResponses.csv`` this reads

========== ==========================================================
localid    the rater; it is the same in all of a rater's sessions
queryType  what was played: 1 voice only, 2 face only, 3 both
clipName   the recording, such as ``1001_DFA_ANG_XX``: actor, sentence, intended emotion, level
respEmo    the emotion that the rater named: A, D, F, H, N or S
========== ==========================================================

and keeps the voice-only responses. Where a rater heard a clip twice, the last response stands, as with IEMOCAP.
CREMA-D has no sessions: the actors, sorted, are dealt out to sessions 1 to 5 in turn, so that no actor is in two.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from s3prl_metaperser.corpus.csv_file import Where, line_of_row, read_csv
from s3prl_metaperser.corpus.manifest import Corpus, build_corpus
from s3prl_metaperser.corpus.recordings import git_lfs_pointer, recordings_below
from s3prl_metaperser.corpus.report import PreparationReport
from s3prl_metaperser.errors import MetaPerSERError

RESPONSES_FILE = "finishedResponses.csv"
SESSIONS = 5
RESPONSES = {"A": "angry", "D": "disgust", "F": "fear", "H": "happy", "N": "neutral", "S": "sad"}
SILENT_CLIPS = ("1076_MTI_SAD_XX",)
"""Clips whose recording holds no sound."""

FACE = "responses: to a face, not to a voice alone"
PRACTICE = "responses: to a practice clip"
NO_ANSWER = "responses: no emotion given"
REPEATED = "responses: replaced by a later one of the same rater"
SILENT = "utterances: known to hold no sound"
NO_AUDIO = "utterances: no audio file, or an empty one"

_COLUMNS = ("localid", "queryType", "clipName", "respEmo")
_VOICE_ONLY = "1"
_QUERY_TYPES = ("1", "2", "3")
_CLIP = re.compile(r"\d{4}_[A-Z]{3}_[A-Z]{3}_[A-Z]{2}")
_EMPTY = ("", "NA")
_ENCODING = "latin-1"


def prepare_crema_d(source: Path) -> tuple[Corpus, PreparationReport]:
    """Read the voice-only ratings of a clone of CREMA-D's repository.

    Args:
        source: the clone, with ``finishedResponses.csv`` and ``AudioWAV`` (or, failing that, ``AudioMP3``).

    Returns:
        The corpus (an annotator is a rater's ``localid``, a speaker an actor's number), and what was left out and why.

    Raises:
        MetaPerSERError: a file or folder is missing, the audio was not downloaded, or a response is malformed.
    """
    source = Path(source)
    if not source.is_dir():
        raise MetaPerSERError(f"{source}: no such folder; expected a clone of the CREMA-D repository")
    path = source / RESPONSES_FILE
    responses = read_csv(path, _COLUMNS, others=True, encoding=_ENCODING)
    folder, suffix, sizes = _find_audio(source)
    report = PreparationReport()
    voice = _voice_only(responses, path, report)
    clips = sorted(voice["clipName"].unique())
    if not clips:
        raise MetaPerSERError(f"{path}: none of its voice-only responses names an emotion of a clip; is it cut off?")
    actors = sorted({clip[:4] for clip in clips})
    sessions = {actor: place % SESSIONS + 1 for place, actor in enumerate(actors)}

    kept = []
    for clip in clips:
        if clip in SILENT_CLIPS:
            report.drop(SILENT, clip)
        elif sizes.get(clip + suffix, 0) == 0:
            report.drop(NO_AUDIO, clip)
        else:
            kept.append(clip)
    if not kept:
        raise MetaPerSERError(
            f"{folder}: holds none of the {len(clips):,} rated clips; expected files such as {clips[0]}{suffix}"
        )
    voice = voice[voice["clipName"].isin(kept)]
    actor = voice["clipName"].str[:4]
    frame = pd.DataFrame(
        {
            "utterance": voice["clipName"],
            "audio": folder.name + "/" + voice["clipName"] + suffix,
            "session": actor.map(sessions),
            "speaker": actor,
            "annotator": voice["localid"],
            "kind": "external",
            "emotions": voice["respEmo"].map(RESPONSES),
        }
    )
    return build_corpus("CREMA-D", source, frame, source="crema-d"), report


def _find_audio(source: Path) -> tuple[Path, str, dict[str, int]]:
    """Find the recordings: folder, ending, and file name to size in bytes."""
    for name, suffix in (("AudioWAV", ".wav"), ("AudioMP3", ".mp3")):
        sizes = recordings_below(source / name, suffix)
        if sizes:
            break
    else:
        raise MetaPerSERError(f"{source}: holds no AudioWAV/*.wav and no AudioMP3/*.mp3; clone the whole repository")
    folder = source / name
    pointer = git_lfs_pointer(folder, sizes)
    if pointer is not None:
        raise MetaPerSERError(
            f"{folder / pointer}: is a git-lfs pointer, not a recording; run `git lfs install && git lfs pull` in "
            f"{source}"
        )
    return folder, suffix, sizes


def _voice_only(responses: pd.DataFrame, path: Path, report: PreparationReport) -> pd.DataFrame:
    """Keep the valid responses to a voice alone, one for each rater and clip, as plain strings."""
    where = line_of_row(path, _ENCODING)
    _check(responses, "queryType", responses["queryType"].isin(_QUERY_TYPES), "1 (voice), 2 (face) or 3 (both)", where)
    is_voice = responses["queryType"] == _VOICE_ONLY
    if not is_voice.any():
        raise MetaPerSERError(f"{path}: holds no response to a voice alone (queryType 1)")
    report.drop(FACE, count=int((~is_voice).sum()))
    voice = responses[is_voice].astype(object)
    practice = voice["clipName"].str.endswith("_practice")
    report.drop(PRACTICE, count=int(practice.sum()))
    voice = voice[~practice]
    whole = voice["clipName"].map(lambda clip: _CLIP.fullmatch(clip) is not None)
    _check(voice, "clipName", whole, "a clip such as 1001_DFA_ANG_XX", where)
    _check(voice, "localid", ~voice["localid"].isin(_EMPTY), "a rater's number", where)
    empty = voice["respEmo"].isin(_EMPTY)
    if empty.any():
        report.drop(NO_ANSWER, where(int(voice.index[empty][0])).rpartition("/")[2], int(empty.sum()))
    voice = voice[~empty]
    _check(voice, "respEmo", voice["respEmo"].isin(RESPONSES), f"one of {', '.join(RESPONSES)}", where)
    repeated = voice.duplicated(["clipName", "localid"], keep="last")
    if repeated.any():
        first = voice[repeated].iloc[0]
        report.drop(REPEATED, f"{first['clipName']} by {first['localid']}", int(repeated.sum()))
    return voice[~repeated]


def _check(rows: pd.DataFrame, column: str, valid: pd.Series, expected: str, where: Where) -> None:
    if not valid.all():
        row = int(rows.index[~valid][0])
        raise MetaPerSERError(f"{where(row)}: {column} is {rows[column][row]!r}; expected {expected}")
