"""Is one system better than another? Paired differences over episodes, with interval and test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from s3prl_metaperser.atomic import replacing
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.table_formats import Block, Cell, Row, Table, write_formats
from s3prl_metaperser.metrics import METRICS
from s3prl_metaperser.publishing.pages import MISSING

PAIR = ["fold", "test_annotator", "episode", "shots"]
"""Columns of results that make two systems' rows a pair: the same support and query sets."""
COLUMNS = [
    *("scenario", "metric", "ours", "other", "episodes", "folds"),
    *("difference", "low", "high", "p", "p_corrected", "significant"),
]
LEVEL = 0.05

HOW_TO_READ = (
    "Differences in points (percent), averaged over pairs of the same episode, with the 95% bootstrap interval of that "
    "mean. Episodes of a fold share their training and their test listener, so whole folds are drawn with replacement; "
    "few folds make a coarse interval, and rather too narrow a one.",
    "p is of the two-sided Wilcoxon signed-rank test over the paired episodes, corrected after Holm for all "
    "comparisons in this table. The test takes episodes as independent, so a difference counts as significant (bold) "
    "only when p is below 0.05 and the interval does not contain 0.",
)
ONE_FOLD = "Results of a single fold have no interval, and nothing is called significant: run more folds."


def clustered_interval(
    values: np.ndarray, clusters: np.ndarray, seed: int = 0, resamples: int = 10_000
) -> tuple[np.ndarray, np.ndarray]:
    """Give the 95% percentile bootstrap interval of a mean, clusters being drawn with replacement.

    A drawn cluster brings all its values along, as often as it is drawn.

    Args:
        values: (n, columns); each column's mean has an interval of its own, from the same draws.
        clusters: (n,) what each value belongs to.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        Low and high, (columns,) each; NaN where all values are of one cluster.
    """
    names, place = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    members = place == np.arange(len(names))[:, None]
    sums, sizes = members @ values, members.sum(axis=1)
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)[:, None]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p-values for their number after Holm (1979): step down, never below an earlier one, never above 1.

    >>> holm(np.array([0.04, 0.01, 0.03])).round(2).tolist()
    [0.06, 0.03, 0.06]
    """
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def compare(
    results: pd.DataFrame,
    ours: str,
    others: Sequence[str],
    seed: int = 0,
    resamples: int = 10_000,
    *,
    common_only: bool = False,
) -> pd.DataFrame:
    """Compare one system with each other one, in each scenario and metric, over paired episodes.

    Rows are a pair when they agree in fold, test annotator, episode and shots. Results of one upstream at a time.

    Args:
        results: rows of ``results.csv`` with a column ``fold``.
        ours: the system to be compared.
        others: the systems it is compared with.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        common_only: compare over the episodes both systems have, where a run failed, instead of refusing; a system that
            shares none with ``ours`` is left out. The columns ``episodes`` and ``folds`` tell.

    Returns:
        One row a (scenario, other, metric), columns :data:`COLUMNS`: ``episodes`` and ``folds`` compared over;
        ``difference``, ours minus other, the mean over pairs in points; ``low`` and ``high``, its 95% bootstrap
        interval clustered by fold (NaN with a single fold); ``p`` of the two-sided Wilcoxon signed-rank test, 1 where
        all differences are 0; ``p_corrected`` after Holm over all rows of this frame; ``significant``: ``p_corrected``
        below 0.05 and 0 outside the interval.

    Raises:
        MetaPerSERError: when a row has no partner or several.
    """
    compared = []
    for scenario in dict.fromkeys(results["scenario"]):
        of_scenario = results[results["scenario"] == scenario]
        left = _scores(of_scenario, ours, scenario)
        for other in others:
            right = _scores(of_scenario, other, scenario)
            if common_only:
                both = left.index.intersection(right.index)
                left_paired, right = left.loc[both], right.loc[both]
                if both.empty:
                    continue
            else:
                _check_pairs(left, right, ours, other, scenario)
                left_paired = left
            # Results are rounded to four digits: so are their differences, or equal ones would not be ties.
            differences = (left_paired - right.reindex(left_paired.index)).round(4)
            compared.append(_compare_pairs(differences, scenario, ours, other, seed, resamples))
    if not compared:
        raise MetaPerSERError(f"{ours} shares no episode with {', '.join(others)}: there is nothing to compare")
    frame = pd.concat(compared, ignore_index=True)
    frame["p_corrected"] = holm(frame["p"].to_numpy())
    outside = (frame["low"] > 0) | (frame["high"] < 0)
    frame["significant"] = (frame["p_corrected"] < LEVEL) & outside
    return frame[COLUMNS]


def _scores(results: pd.DataFrame, system: str, scenario: str) -> pd.DataFrame:
    rows = results[results["system"] == system].set_index(PAIR)[list(METRICS)].sort_index()
    if rows.index.has_duplicates:
        raise MetaPerSERError(
            f"{system}, {scenario}: several results of {_name(rows.index[rows.index.duplicated()])}; expected one a "
            "system and episode: compare one upstream, scope and number of queries at a time"
        )
    return rows


def _check_pairs(left: pd.DataFrame, right: pd.DataFrame, ours: str, other: str, scenario: str) -> None:
    for have, lack, system, partner in ((left, right, ours, other), (right, left, other, ours)):
        alone = have.index.difference(lack.index)
        if not alone.empty:
            raise MetaPerSERError(
                f"{partner}, {scenario}: no result of {_name(alone)}, which {system} has; expected the same episodes "
                "of both: run what is missing"
            )


def _name(episodes: pd.MultiIndex) -> str:
    named = "; ".join(
        ", ".join(f"{column.replace('_', ' ')} {value}" for column, value in zip(PAIR, key, strict=True))
        for key in episodes[:3]
    )
    return f"{named} and {len(episodes) - 3} more" if len(episodes) > 3 else named


def _compare_pairs(
    differences: pd.DataFrame, scenario: str, ours: str, other: str, seed: int, resamples: int
) -> pd.DataFrame:
    folds = differences.index.get_level_values("fold").to_numpy()
    values = differences.to_numpy()
    low, high = clustered_interval(values, folds, seed, resamples)
    return pd.DataFrame(
        {
            "scenario": scenario,
            "metric": METRICS,
            "ours": ours,
            "other": other,
            "episodes": len(values),
            "folds": len(np.unique(folds)),
            "difference": values.mean(axis=0),
            "low": low,
            "high": high,
            "p": [float(wilcoxon(column).pvalue) if column.any() else 1.0 for column in values.T],
        }
    )


def sentences(frame: pd.DataFrame) -> list[str]:
    """Say for each scenario in plain words how the system compares with the strongest other in each metric.

    Args:
        frame: of :func:`compare`.

    Returns:
        A sentence a scenario, such as "seen: Meta-PerSER is above Entire-Few by 6.3 points miF1 [5.1, 7.4]; …".
    """
    said = []
    for scenario, rows in frame.groupby("scenario", sort=False):
        strongest = [rows.loc[of_metric["difference"].idxmin()] for _, of_metric in rows.groupby("metric", sort=False)]
        clauses = "; ".join(_clause(row) for row in strongest)
        said.append(f"{scenario}: {rows['ours'].iloc[0]} is {clauses}. Each against the strongest other system.")
    return said


def _clause(row: pd.Series) -> str:
    interval = "" if np.isnan(row["low"]) else f" [{row['low']:.1f}, {row['high']:.1f}]".replace("-", "−")
    if not row["significant"]:
        found = f"{row['difference']:+.1f} points".replace("-", "−")
        return f"not significantly apart from {row['other']} in {row['metric']} ({found}{interval})"
    side = "above" if row["difference"] > 0 else "below"
    return f"{side} {row['other']} by {abs(row['difference']):.1f} points {row['metric']}{interval}"


def write_comparison(frame: pd.DataFrame, out: Path, name: str) -> Table:
    """Write a comparison for people: what it says, the table, how to read it.

    Args:
        frame: of :func:`compare`.
        out: folder of ``NAME.csv`` (all columns), ``NAME.md`` and ``NAME.tex``.
        name: of the files.

    Returns:
        The table, for the report.
    """
    ours = frame["ours"].iloc[0]
    metrics = list(dict.fromkeys(frame["metric"]))
    pairs = {(str(row["scenario"]), str(row["other"]), row["metric"]): row for _, row in frame.iterrows()}
    blocks = []
    for scenario, of_scenario in frame.groupby("scenario", sort=False):
        rows = []
        for other, of_other in of_scenario.groupby("other", sort=False):
            cells = [Cell(str(other)), Cell(str(of_other["episodes"].iloc[0])), Cell(str(of_other["folds"].iloc[0]))]
            for metric in metrics:
                cells += _pair_cells(pairs[str(scenario), str(other), metric])
            rows.append(Row(tuple(cells)))
        blocks.append(Block(str(scenario), tuple(rows)))
    table = Table(
        caption=f"{ours} minus each other system, in points, over paired episodes; significant differences are bold.",
        leading=(f"{ours} minus", "episodes", "folds"),
        groups=tuple((metric, ("difference [95%]", "p (Holm)")) for metric in metrics),
        blocks=tuple(blocks),
        lead=tuple(sentences(frame)),
        notes=(*HOW_TO_READ, *([ONE_FOLD] if frame["low"].isna().any() else [])),
    )
    with replacing(out / f"{name}.csv") as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", float_format="%.6g")
    write_formats(table, out, name)
    return table


def _pair_cells(row: pd.Series) -> tuple[Cell, Cell]:
    interval = MISSING if np.isnan(row["low"]) else f"[{row['low']:.1f}, {row['high']:.1f}]"
    p = "< 0.001" if row["p_corrected"] < 0.001 else f"{row['p_corrected']:.3f}"
    return Cell(f"{row['difference']:+.1f} {interval}".replace("-", "−"), bool(row["significant"])), Cell(p)
