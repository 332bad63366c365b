"""Any labels written down as a table, in the manifest's own columns."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from s3prl_metaperser.corpus.checks import SEPARATOR, check_annotations, one_spelling
from s3prl_metaperser.corpus.csv_file import Where, categorical, line_of_row, read_csv
from s3prl_metaperser.corpus.emotions import EMOTIONS, OTHER, UnknownEmotionError, parse_emotions
from s3prl_metaperser.corpus.manifest import Corpus, build_corpus
from s3prl_metaperser.corpus.recordings import missing_recordings
from s3prl_metaperser.corpus.report import PreparationReport
from s3prl_metaperser.errors import MetaPerSERError

REQUIRED = ("audio", "annotator", "emotions")
DEFAULTS = {"session": "1", "speaker": "unknown", "kind": "external"}
"""What a column means that the table leaves out. ``utterance`` is the audio path then."""

ONLY_OTHER = "annotations: only 'Other'"
NO_AUDIO = "utterances: no audio file, or an empty one"


def prepare_table(
    source: Path, audio_root: Path | None = None, name: str | None = None
) -> tuple[Corpus, PreparationReport]:
    """Read a csv with one row per annotator and utterance.

    Args:
        source: the csv. Columns ``audio`` (path of the recording), ``annotator``, ``emotions`` (in any spelling,
            several joined by ``;``), and if wanted ``utterance`` (one for each recording), ``session``, ``speaker``,
            ``kind``. Blanks around an annotator's name don't count.
        audio_root: the folder that ``audio`` is relative to and may not leave; by default the csv's own.
        name: what to call the corpus; by default the csv's name without ending.

    Returns:
        The corpus, and what was left out and why: "other", and utterances without a recording.

    Raises:
        MetaPerSERError: the table breaks a rule; the message names line, column and value.
    """
    source = Path(source)
    root = source.parent if audio_root is None else Path(audio_root)
    if not root.is_dir():
        raise MetaPerSERError(
            f"{root}: no such folder; expected the one that the column audio of {source} is relative to"
        )
    frame = read_csv(source, REQUIRED, optional=("utterance", *DEFAULTS))
    where = line_of_row(source)
    frame["audio"] = one_spelling(categorical(frame["audio"]))
    if "utterance" not in frame:
        frame["utterance"] = frame["audio"]
    for column, value in DEFAULTS.items():
        if column not in frame:
            frame[column] = pd.Categorical.from_codes([0] * len(frame), categories=pd.Index([value], dtype=object))
    frame["annotator"] = frame["annotator"].map(str.strip)
    frame["emotions"] = _normalised(frame["emotions"], where)
    check_annotations(frame, (*EMOTIONS, OTHER), where)

    report = PreparationReport()
    frame = _without_other(frame, report, source)
    missing = missing_recordings(root, categorical(frame["audio"]).categories)
    lost = frame["audio"].isin(missing)
    without_audio = frame.loc[lost, "utterance"].unique()
    if len(without_audio):
        report.drop(NO_AUDIO, str(without_audio[0]), len(without_audio))
    if lost.all():
        example = root / str(frame["audio"].iloc[0])
        raise MetaPerSERError(
            f"{source}: none of its {len(without_audio):,} utterances has audio, e.g. {example}; name the folder that "
            "the column audio is relative to with --audio-root"
        )
    return build_corpus(name or source.stem, root, frame[~lost], source="table"), report


def _normalised(column: pd.Series, where: Where) -> pd.Series:
    """Rewrite each cell in the manifest's spelling, ``other`` included; an empty cell stays empty."""
    cells = categorical(column)
    spelled = []
    for code, cell in enumerate(cells.categories):
        try:
            spelled.append(SEPARATOR.join(parse_emotions(cell)))
        except UnknownEmotionError as error:
            row = int((cells.codes == code).argmax())
            raise MetaPerSERError(f"{where(row)}: emotions {cell!r}: {error}") from None
    return pd.Series(pd.Index(spelled, dtype=object).take(cells.codes), index=column.index)


def _without_other(frame: pd.DataFrame, report: PreparationReport, source: Path) -> pd.DataFrame:
    """Take ``other`` out of annotations, and annotations that name nothing else out of the table."""
    only_other = frame["emotions"] == OTHER
    if only_other.any():
        example = frame[only_other].iloc[0]
        report.drop(ONLY_OTHER, f"{example['utterance']} by {example['annotator']}", int(only_other.sum()))
    if only_other.all():
        raise MetaPerSERError(f"{source}: every annotation says only 'Other'; expected {', '.join(EMOTIONS)}")
    kept = frame[~only_other]
    # `other` is always the last of several.
    return kept.assign(emotions=kept["emotions"].str.removesuffix(f"{SEPARATOR}{OTHER}"))
