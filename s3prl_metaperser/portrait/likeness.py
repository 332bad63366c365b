"""Which annotators are alike: a map from what they say where the others say something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from tqdm import tqdm

from s3prl_metaperser.episodes import generator
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.naming_habits import confusion_mass, row_normalised
from s3prl_metaperser.portrait.spread import Estimates, weights

PRIOR = 5.0
"""Clips of the average annotator that are added to each row of an annotator's confusion: few clips say little."""
_Z = 1.96
_ALIKE = 1e-9
"""Profiles that differ by no more do so by rounding."""
LEAST_MAPPED = 3
"""Annotators that a map needs."""


@dataclass(frozen=True)
class Map:
    """Annotators in two dimensions.

    Attributes:
        annotators: (mapped,) who is on it: those who share a clip with someone.
        places: (mapped, 2).
        shown: (mapped,) whether an interval was made for it; NaN elsewhere in ``spread``.
        spread: (mapped, 2) places with 95% intervals, the axes held: normal ones, from the bootstrap's deviation over
            an annotator's clips. (Resampling leaves pairs out, which moves profiles of square roots to one side.)
        variance: (2,) share of the variance between profiles that each axis has.
        meaning: of each axis: (the others' majority, what is said) of which there is most at its low end, and at its
            high end.
        by: ``confusion``, or ``shares`` where no clips are shared and so profiles are how often each emotion is named.
    """

    annotators: np.ndarray
    places: np.ndarray
    shown: np.ndarray
    spread: Estimates
    variance: np.ndarray
    meaning: tuple[tuple[tuple[str, str], tuple[str, str]], ...]
    by: str


def annotator_map(crowd: Crowd, shown: np.ndarray, majority: np.ndarray, others: np.ndarray, seed: int) -> Map | None:
    """Place annotators by principal components of their profiles.

    A profile is an annotator's confusion with the majority of the others, its rows weighed by how often the corpus has
    them: the share of each pair (majority, said) if all had met the same clips. :data:`PRIOR` clips of the average
    annotator are added to each row. Distances are Hellinger's, of square roots of shares (Rao, "A review of canonical
    coordinates and an alternative to correspondence analysis using Hellinger distance", 1995), so that the map is
    classical multidimensional scaling of them.

    Args:
        crowd: the labels.
        shown: annotators who get an interval.
        majority: (labels, classes) and
        others: (labels,) as :func:`~s3prl_metaperser.portrait.naming_habits.majority_of_others` gives them.
        seed: of the bootstrap.

    Returns:
        The map; None where fewer than :data:`LEAST_MAPPED` annotators can be placed, or all are alike.
    """
    by = "confusion" if (others > 0).any() else "shares"
    if by == "shares":
        # One row: what the majority says of a clip is not known, so all clips count as of one sort.
        majority, others = np.ones((len(crowd.clip), 1)), np.ones(len(crowd.clip), dtype=np.int64)
    mass = confusion_mass(crowd, majority)
    mapped = np.flatnonzero(mass.sum(axis=(1, 2)) > 0)
    if len(mapped) < LEAST_MAPPED:
        return None
    everyone = mass.sum(axis=0)
    average = np.nan_to_num(row_normalised(everyone))
    prevalence = everyone.sum(axis=1, keepdims=True) / everyone.sum()

    def profile(counts: np.ndarray) -> np.ndarray:
        rates = row_normalised(counts + PRIOR * average)
        return np.sqrt(prevalence * np.nan_to_num(rates)).reshape(len(counts), -1)

    profiles = profile(mass[mapped])
    if np.ptp(profiles, axis=0).max() < _ALIKE:
        return None
    pca = PCA(n_components=2, svd_solver="full")
    places = pca.fit_transform(profiles)
    errors = np.full(places.shape, np.nan)
    is_shown = np.isin(mapped, shown)
    for at in tqdm(np.flatnonzero(is_shown), desc="spread of the map", unit="annotator", leave=False, delay=1):
        rows = crowd.rows(mapped[at])
        known = others[rows] > 0
        pairs = majority[rows][known][:, :, None] * crowd.named[rows][known][:, None, :]
        flat, clips = pairs.reshape(len(pairs), -1), len(pairs)
        draws = weights(clips, generator(seed, "map", crowd.names[mapped[at]]))
        drawn = np.concatenate([pca.transform(profile((some @ flat).reshape(-1, *pairs.shape[1:]))) for some in draws])
        errors[at] = drawn.std(axis=0)
    rows_named = crowd.emotions if by == "confusion" else ("",)
    pair_names = [(row, column) for row in rows_named for column in crowd.emotions]
    return Map(
        annotators=mapped,
        places=places,
        shown=is_shown,
        spread=Estimates(places, places - _Z * errors, places + _Z * errors),
        variance=pca.explained_variance_ratio_,
        meaning=tuple((pair_names[np.argmin(axis)], pair_names[np.argmax(axis)]) for axis in pca.components_),
        by=by,
    )
