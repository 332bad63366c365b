"""Do suggested clips teach more about a listener than random ones? Every listener of a corpus, with 8 and 16 labels.

    python tests/benchmarks/suggestions.py CORPUS --out FOLDER [--scenario seen unseen] [--role dev] [--jobs 2]

Each listener's models have not seen a label of theirs (``listeners.py``; they are trained into FOLDER first, which
takes minutes once). In each of many draws a third of a listener's clips, up to 64, are kept to be judged on, and up to
100 others are the pool from which 8 and 16 are labelled and adapted to (50 steps): those that ``metaperser suggest``
would suggest, random ones, and ones that are spread over the features only (farthest first: Gonzalez 1985).
Suggestions from one pool are always the same, and hardly differ between pools of nearly all clips: hence small ones.

``--role dev`` judges the listener that each model was chosen on; by those the way to suggest was chosen. Writes
FOLDER/suggestions.csv, a row a draw, and FOLDER/suggestions.md, the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from intervals import LOG_LOSS, MEASURES, Difference, Tally, differences, markdown, over_listeners, scored
from listeners import QUERIES, SEED, Judged, Listener, trained_listeners
from scipy.spatial.distance import cdist

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.episodes import generator
from s3prl_metaperser.errors import MetaPerSERError, exit_with
from s3prl_metaperser.personalize import load
from s3prl_metaperser.personalize.recogniser import STEPS
from s3prl_metaperser.personalize.suggest import suggest

NUMBERS = (8, 16)
POOL = 100
DRAWS, RANDOM_DRAWS = 30, 10
RANDOM, SPREAD, SUGGESTED = "random", "spread", "suggested"


def farthest_first(embeddings: np.ndarray, number: int) -> list[int]:
    """Choose clips by features only: the most central, then always the farthest from those chosen."""
    distances = cdist(embeddings, embeddings)
    chosen = [int(distances.sum(axis=1).argmin())]
    while len(chosen) < number:
        chosen.append(int(distances[chosen].min(axis=0).argmax()))
    return chosen


def judge(listener: Listener, role: str) -> tuple[list[dict[str, Any]], dict[int, dict[str, dict[str, Difference]]]]:
    """Label, adapt and predict for each pool and way to choose clips.

    Returns:
        A row for each draw; and for each number of labels the differences of both ways from random clips.
    """
    model = load(listener.meta_perser, device="cpu")
    task = listener.labels if role == "test" else listener.dev
    judged = Judged(model, listener.corpus, task)
    clips = len(task)
    embeddings = model.network.learner.embeddings(model.statistics(judged.paths).unsqueeze(0))[0].cpu().numpy()
    chosen: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)
    for number in range(DRAWS):
        order = generator(SEED, "pool", task.annotator, number).permutation(clips)
        query, pool, _ = np.split(order, np.cumsum([min(QUERIES, clips // 3), POOL]))
        suggested = suggest(model, listener.corpus, [judged.paths[clip] for clip in pool], max(NUMBERS))
        chosen[SUGGESTED].append((number, pool[suggested], query))
        chosen[SPREAD].append((number, pool[farthest_first(embeddings[pool], max(NUMBERS))], query))
        for draw in range(RANDOM_DRAWS):
            drawn = generator(SEED, "random", task.annotator, number, draw).permutation(pool)[: max(NUMBERS)]
            chosen[RANDOM].append((number, drawn, query))
    rows: list[dict[str, Any]] = []
    compared: dict[int, dict[str, dict[str, Difference]]] = {}
    size = len(pool)
    for labels in NUMBERS:
        tallies = {}
        for way, draws in chosen.items():
            numbers, supports, queries = (np.stack(part) for part in zip(*draws, strict=True))
            probabilities = judged.personal(supports[:, :labels], queries, [STEPS])[STEPS]
            tallies[way] = Tally(judged.targets)
            for number, query, own in zip(numbers, queries, probabilities, strict=True):
                tallies[way].add(query, own)
                rows.append(
                    {"scenario": listener.scenario, "listener": task.annotator, "labels": labels, "chosen": way}
                    | {"draw": int(number), "pool": size, "queries": len(query), "model": listener.name}
                    | scored(own, judged.targets[query])
                )
        compared[labels] = {way: differences(tallies[way], tallies[RANDOM]) for way in (SUGGESTED, SPREAD)}
    return rows, compared


def listener_table(rows: pd.DataFrame, compared: Mapping[str, Mapping[int, Any]], measure: str) -> str:
    """Write the table of listeners by one score."""
    header = ["listener", "pool", "judged"]
    for labels in NUMBERS:
        header += [f"{RANDOM} {labels}", f"{SUGGESTED} {labels}", "difference"]
    lines = []
    for name, own in compared.items():
        of_listener = rows[rows["model"] == name]
        first = of_listener.iloc[0]
        shown = first["listener"] if first["listener"] == name else f"{first['listener']} (of {name})"
        line: list[object] = [shown, first["pool"], first["queries"]]
        for labels in NUMBERS:
            for way in (RANDOM, SUGGESTED):
                at = of_listener[(of_listener["labels"] == labels) & (of_listener["chosen"] == way)]
                line.append(f"{at[measure].mean():.1f} ± {at[measure].std(ddof=0):.1f}")
            line.append(own[labels][SUGGESTED][measure].shown())
        lines.append(line)
    return markdown(header, lines)


def overview(compared: Mapping[str, Mapping[int, Any]], groups: Mapping[str, Sequence[str]]) -> str:
    """Write the mean difference from random clips over listeners, and for how many it is a gain."""
    lines = []
    for labels in NUMBERS:
        for way in (SUGGESTED, SPREAD):
            for group, names in groups.items():
                cells = []
                for measure in MEASURES:
                    sign, decimals = (-1, 2) if measure == LOG_LOSS else (1, 1)
                    own = [compared[name][labels][way][measure].mean for name in names]
                    better = sum(sign * mean > 0 for mean in own)
                    cells.append(f"{over_listeners(own).shown(decimals)}, {better} of {len(own)}")
                lines.append([labels, way, group, *cells])
    return markdown(["labels", "clips", "listeners", *(f"{name} − random's" for name in MEASURES)], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge all listeners and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that `metaperser prepare` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="models, and the results")
    parser.add_argument("-u", "--upstream", default="fbank_no_cmvn", help="of s3prl's hub")
    parser.add_argument("--scenario", nargs="+", choices=["seen", "unseen"], default=["seen", "unseen"])
    parser.add_argument("--role", choices=["test", "dev"], default="test", help="whose labels (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    compared: dict[str, dict[str, Any]] = {scenario: {} for scenario in args.scenario}
    groups: dict[str, list[str]] = {"all": [], "external": [], "self-reporting": []}
    for listener in trained_listeners(args.corpus, args.out, args.scenario, args.upstream, args.jobs):
        if args.role == "dev" and listener.reports_on_self:
            continue  # A model of its own for each, but the same dev listener for all.
        own, compared[listener.scenario][listener.name] = judge(listener, args.role)
        rows += own
        for group in ("all", "self-reporting" if listener.reports_on_self else "external"):
            groups[group] = list(dict.fromkeys([*groups[group], listener.name]))
    frame = pd.DataFrame(rows)
    groups = {group: names for group, names in groups.items() if names}
    parts = []
    for scenario, of_scenario in compared.items():
        own_rows = frame[frame["scenario"] == scenario]
        parts += [f"{scenario}, miF1\n", listener_table(own_rows, of_scenario, "miF1")]
        parts += [f"{scenario}: the mean difference over listeners, and how many gain\n", overview(of_scenario, groups)]
    text = "\n".join(parts)
    stem = "suggestions" if args.role == "test" else "suggestions-dev"
    write_text(args.out / f"{stem}.csv", frame.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    write_text(args.out / f"{stem}.md", text)
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MetaPerSERError as error:
        raise exit_with(error, "suggestions.py") from None
