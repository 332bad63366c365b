"""What a run leaves for people: ``results.csv``, ``predictions.csv``, ``tuning.csv``, ``failures.csv``, and a line.

``checkpoints.csv`` says which weights the results are of, so that those of one checkpoint take no other's place.
Their checksums are beside them, in ``checksums.sha256``: a file that was edited or damaged is named, and not added to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from s3prl_metaperser.atomic import UnwritableError, hold, locked, remove_leftovers
from s3prl_metaperser.checksums import LIST, CheckedFolder
from s3prl_metaperser.divergence import Divergence
from s3prl_metaperser.episodes import Episode
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.metrics import METRICS, Scores, decide
from s3prl_metaperser.numerals import exact
from s3prl_metaperser.results_file import (
    CHECKPOINT_COLUMNS,
    DIVERGED_AT,
    FAILURE_COLUMNS,
    RESULT_COLUMNS,
    SAME_RUN,
    TUNED_FOR,
    merged,
    probability_of,
    read_checkpoints,
    read_failures,
    read_predictions,
    read_results,
    read_tuning,
    runs_of,
)
from s3prl_metaperser.settings import Settings
from s3prl_metaperser.systems import DISPLAY_NAMES
from s3prl_metaperser.tuning import Tuning


@dataclass(frozen=True)
class EvaluatedEpisode:
    """An episode with what a system said of its query.

    Attributes:
        episode: support and query.
        probabilities: (Q, classes); not finite where adaptation diverged.
        scores: of the decisions; 0 where adaptation diverged.
        divergence: where adaptation left the finite numbers, if it did: the episode has failed.
    """

    episode: Episode
    probabilities: np.ndarray
    scores: Scores
    divergence: Divergence | None = None


@dataclass(frozen=True)
class Weights:
    """Whose results are written.

    Attributes:
        checkpoint: the file that holds them, or is about to.
        fingerprint: of the weights.
        in_training: whether they are those of the training whose folder it is, and take the place of earlier ones.
    """

    checkpoint: Path
    fingerprint: str
    in_training: bool = False


class Report:
    """Writes one run's results into its experiment folder.

    Args:
        folder: s3prl's expdir.
        settings: of the run.
        upstream: s3prl's name (``-u``).
        emotions: the classes, in order.
    """

    def __init__(self, folder: Path, settings: Settings, upstream: str, emotions: Sequence[str]) -> None:
        self.folder = folder
        self.settings = settings
        self.upstream = upstream
        self.emotions = list(emotions)
        self._files = CheckedFolder(folder)
        self._check_files_there()

    def _check_files_there(self) -> None:
        """Refuse what this run could not add to, before it computes anything; other files of the folder are not ours.

        Raises:
            MetaPerSERError: naming the file.
        """
        readers: dict[str, Callable[[Path], object]] = {"tuning.csv": read_tuning}
        for split in ("test", "dev"):
            readers |= {
                _name("results", split): read_results,
                _name("predictions", split): lambda path: read_predictions(path, self.emotions),
                _name("failures", split): read_failures,
                _name("checkpoints", split): read_checkpoints,
            }
        for name, read in readers.items():
            self._files.check(name)
            if (self.folder / name).exists():
                read(self.folder / name)

    def hold(self) -> None:
        """Keep other processes from training into the folder until this one ends, however it ends.

        Raises:
            MetaPerSERError: when another one does.
        """
        taken = f"another process trains into {self.folder}; wait until it has ended, or give another folder with -p"
        hold(self.folder / ".training.lock", taken)
        remove_leftovers(self.folder, "*.ckpt")

    def refuse_others(self, split: str, episodes: Sequence[Episode], weights: Weights) -> None:
        """Refuse to replace what other weights scored; rows of which nobody knows whose they are may be replaced.

        Args:
            split: ``dev`` or ``test``.
            episodes: those whose rows are to be written.
            weights: whose rows they will be.

        Raises:
            MetaPerSERError: naming both checkpoints.
        """
        self._refuse_others(split, pd.DataFrame([self._run_cells(one) for one in episodes]), weights)

    def _refuse_others(self, split: str, rows: pd.DataFrame, weights: Weights) -> None:
        results, checkpoints = (self.folder / _name(table, split) for table in ("results", "checkpoints"))
        if weights.in_training or not (results.exists() and checkpoints.exists()):
            return
        replaced = {*runs_of(rows)}.intersection(runs_of(read_results(results)))
        known = read_checkpoints(checkpoints)
        for run, checkpoint, fingerprint in zip(runs_of(known), known["checkpoint"], known["weights"], strict=True):
            if run in replaced and fingerprint != weights.fingerprint:
                earlier = os.path.normpath(self.folder / checkpoint)
                raise MetaPerSERError(
                    f"checkpoint {weights.checkpoint}: its rows of {run[0]} would replace those of other weights (of "
                    f"{earlier}, as it was then) in {results}; give another folder with "
                    "-o \"args.expdir='FOLDER'\", or move the tables there away"
                )

    def write(self, split: str, evaluated: Sequence[EvaluatedEpisode], weights: Weights | None = None) -> Path:
        """Add these episodes' rows, in place of earlier rows of the same system, setting and annotator.

        Episodes that failed have rows like all others, and are named in failures.csv, which is there only then.

        Args:
            split: ``test`` fills results.csv and predictions.csv; another fills files of its own.
            evaluated: the episodes.
            weights: whose results they are; None for a system that has learned nothing.

        Returns:
            The path of the results file.

        Raises:
            MetaPerSERError: when another process has meanwhile written what :meth:`refuse_others` refuses to replace.
        """
        rows = pd.DataFrame(
            [self._run_cells(one.episode) | self._score_cells(one.scores) for one in evaluated], columns=RESULT_COLUMNS
        )
        tables = {
            _name("checkpoints", split): self._checkpoint_rows(rows, weights),
            _name("results", split): rows,
            _name("predictions", split): pd.DataFrame([row for one in evaluated for row in self._prediction_rows(one)]),
            _name("failures", split): pd.DataFrame(
                [
                    self._run_cells(one.episode) | {DIVERGED_AT: one.divergence.step}
                    for one in evaluated
                    if one.divergence is not None
                ],
                columns=FAILURE_COLUMNS,
            ),
        }
        with self._locked():
            for name in tables:
                self._files.check(name)
            if weights is not None:
                self._refuse_others(split, rows, weights)
            written = {name: merged(self.folder / name, table, rows) for name, table in tables.items()}
            self._files.replace({name: None if table.empty else _csv(table) for name, table in written.items()})
        return self.folder / _name("results", split)

    def write_tuning(self, tuning: Tuning, fold: int) -> None:
        """Write what was tried on dev into ``tuning.csv``, in place of earlier rows of the same system and setting.

        Columns :data:`TUNED_FOR`, ``lr,steps``, the dev score under the name of its metric, and ``chosen``; ``lr`` is
        empty where the rates are learned. Earlier rows that do not say what they are for give way to any of their
        system.

        Args:
            tuning: what was tried.
            fold: whose dev annotators it was tried on.
        """
        tuned_for = {
            "system": DISPLAY_NAMES[self.settings.system],
            "scenario": self.settings.scenario,
            "upstream": self.upstream,
            "scope": self.settings.scope,
            "fold": str(fold),
            "shots": str(self.settings.episodes.shots),
            "queries": str(self.settings.episodes.queries),
        }
        rows = pd.DataFrame(
            tuned_for
            | {
                "lr": ["" if one.lr is None else exact(one.lr) for one in tuning.candidates],
                "steps": [str(one.steps) for one in tuning.candidates],
                tuning.metric: [f"{score:.4f}" for score in tuning.scores],
                "chosen": [str(one == tuning.best) for one in tuning.candidates],
            }
        )
        path = self.folder / "tuning.csv"
        with self._locked():
            self._files.check(path.name)
            if path.exists():
                earlier = read_tuning(path)
                again = [earlier[name].isin(["", value]) for name, value in tuned_for.items()]
                rows = pd.concat([earlier[~np.all(again, axis=0)], rows], ignore_index=True)
            metrics = [name for name in METRICS if name in rows]
            self._files.replace({path.name: _csv(rows[[*TUNED_FOR, "lr", "steps", *metrics, "chosen"]])})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = lock.open("a")
        except OSError as error:
            raise UnwritableError(lock, error) from None
        with file, locked(file, f"[metaperser] another process writes into {self.folder}; waiting for it"):
            remove_leftovers(self.folder, "*.csv")
            remove_leftovers(self.folder, LIST)
            yield

    def _run_cells(self, episode: Episode) -> dict[str, object]:
        return {
            "system": DISPLAY_NAMES[self.settings.system],
            "scenario": self.settings.scenario,
            "upstream": self.upstream,
            "scope": self.settings.scope,
            "test_annotator": episode.annotator,
            "episode": episode.index,
            "shots": len(episode.support),
            "queries": len(episode.query),
        }

    def _checkpoint_rows(self, rows: pd.DataFrame, weights: Weights | None) -> pd.DataFrame:
        if weights is None:
            return pd.DataFrame(columns=CHECKPOINT_COLUMNS)
        # From here, so that a folder's files are the same wherever it is.
        place = os.path.relpath(weights.checkpoint.resolve(), self.folder.resolve())
        whose = {"checkpoint": place, "weights": weights.fingerprint}
        return rows[list(SAME_RUN)].drop_duplicates().assign(**whose)

    @staticmethod
    def _score_cells(scores: Scores) -> dict[str, object]:
        return {name: round(getattr(scores, name), 4) for name in METRICS}

    def _prediction_rows(self, one: EvaluatedEpisode) -> list[dict[str, object]]:
        decisions = decide(one.probabilities) & (one.divergence is None)
        return [
            self._run_cells(one.episode)
            | {
                "utterance": utterance,
                "labels": self._names(one.episode.query.targets[row] > 0),
                "predicted": self._names(decisions[row]),
            }
            | {
                probability_of(emotion): round(float(p), 6)
                for emotion, p in zip(self.emotions, one.probabilities[row], strict=True)
            }
            for row, utterance in enumerate(one.episode.query.utterances)
        ]

    def _names(self, chosen: np.ndarray) -> str:
        return ";".join(emotion for emotion, one in zip(self.emotions, chosen, strict=True) if one)


def _name(table: str, split: str) -> str:
    return f"{table}.csv" if split == "test" else f"{table}-{split}.csv"


def _csv(rows: pd.DataFrame) -> str:
    text: str = rows.to_csv(index=False, lineterminator="\n")
    return text


def summary_line(evaluated: Sequence[EvaluatedEpisode], system: str, split: str) -> str:
    """Say mean and standard deviation over episodes of each metric in one line."""
    annotators = sorted({one.episode.annotator for one in evaluated})
    who = annotators[0] if len(annotators) == 1 else f"{len(annotators)} annotators"
    values = {name: np.array([getattr(one.scores, name) for one in evaluated]) for name in METRICS}
    cells = "  ".join(f"{name} {value.mean():.1f} ± {value.std():.1f}" for name, value in values.items())
    failed = sum(one.divergence is not None for one in evaluated)
    failures = f"; {failed} failed (they diverged, and score 0)" if failed else ""
    return f"[metaperser] {system} on {split} ({who}, {len(evaluated)} episodes): {cells}{failures}"
