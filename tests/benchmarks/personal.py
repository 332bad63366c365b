"""Does a model of one's own hear better than the one it came from? All listeners of a corpus, from a few labels.

    python tests/benchmarks/personal.py CORPUS --out FOLDER [--scenario seen unseen] [--jobs 2]

Each listener's models have not seen a label of theirs (``listeners.py``; they are trained into FOLDER first, which
takes minutes once). In each of many draws K of the listener's clips are adapted to, and up to 64 others are judged: by
the personal model, by the checkpoint it came from, and by the SSL-E that this one started from. The last is the
stricter comparison, for an initialisation of MAML is made to be adapted, not to be used as it is.

Listeners with few labels have small queries and more draws. A draw's score is that of its query; differences are of all
of a listener's judged clips pooled, with 95% intervals by bootstrap over these clips. Writes FOLDER/personal.csv, a row
a draw, and FOLDER/personal.md, the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from intervals import LOG_LOSS, MEASURES, Difference, Tally, differences, markdown, over_listeners, scored
from listeners import QUERIES, SEED, SHOTS, Judged, Listener, trained_listeners

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.episodes import generator
from s3prl_metaperser.errors import MetaPerSERError, exit_with
from s3prl_metaperser.personalize import load
from s3prl_metaperser.personalize.recogniser import STEPS

KS = (SHOTS, 16, 8)
TRIED_STEPS = (5, 10, 20, 50)
DRAWS = 50
GENERIC, SSL_E = "generic", "SSL-E"
DEV_STEPS = "dev's"
Way = tuple[int, str]
"""K, and the number of steps as the tables call it."""


def draws_of(name: str, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw (draws, 32) supports and (draws, Q) queries; a smaller support is the beginning of a larger one."""
    queries = min(QUERIES, labels - SHOTS)
    number = max(DRAWS, ceil(10 * QUERIES / queries))
    orders = np.stack([generator(SEED, "personal", name, draw).permutation(labels) for draw in range(number)])
    return orders[:, queries : queries + SHOTS], orders[:, :queries]


def judge(listener: Listener) -> tuple[list[dict[str, Any]], dict[Way, dict[str, dict[str, Difference]]]]:
    """Judge a listener's models.

    Returns:
        A row for each draw and model; and for each way to adapt the differences from both generic models.
    """
    model = load(listener.meta_perser, device="cpu")
    judged = Judged(model, listener.corpus, listener.labels)
    supports, queries = draws_of(listener.name, len(judged.targets))
    unadapted = {
        GENERIC: model.probabilities(judged.paths),
        SSL_E: load(listener.ssl_e, device="cpu").probabilities(judged.paths),
    }
    rows: list[dict[str, Any]] = []

    def tallied(name: str, shots: int, steps: int, probabilities: np.ndarray) -> Tally:
        tally = Tally(judged.targets)
        for draw, (query, own) in enumerate(zip(queries, probabilities, strict=True)):
            tally.add(query, own)
            rows.append(
                {
                    "scenario": listener.scenario,
                    "listener": listener.name,
                    "model": name,
                    "shots": shots,
                    "steps": steps,
                }
                | {"draw": draw, "queries": len(query), **scored(own, judged.targets[query])}
            )
        return tally

    generic = {name: tallied(name, 0, 0, probabilities[queries]) for name, probabilities in unadapted.items()}
    compared: dict[Way, dict[str, dict[str, Difference]]] = {}
    for shots in KS:
        adapted = judged.personal(supports[:, :shots], queries, TRIED_STEPS)
        judged.check(supports[0, :shots], queries[0], STEPS, adapted[STEPS][0])
        for steps, probabilities in adapted.items():
            personal = tallied("personal", shots, steps, probabilities)
            against = {name: differences(personal, tally) for name, tally in generic.items()}
            compared[shots, str(steps)] = against
            if steps == listener.dev_steps:
                compared[shots, DEV_STEPS] = against
    return rows, compared


def listener_table(rows: pd.DataFrame, compared: Mapping[str, Mapping[Way, Any]], measure: str) -> str:
    """Write the table of listeners at 32 labels and the default number of steps, by one score."""
    lines = []
    decimals = 2 if measure == LOG_LOSS else 1
    for name, own in compared.items():
        of_listener = rows[rows["listener"] == name]
        ways = {
            model: of_listener[(of_listener["model"] == model) & of_listener["steps"].isin([0, STEPS])]
            for model in (GENERIC, SSL_E)
        }
        at_k = of_listener[(of_listener["shots"] == SHOTS) & (of_listener["steps"] == STEPS)]
        shown = [
            f"{one[measure].mean():.{decimals}f} ± {one[measure].std(ddof=0):.{decimals}f}"
            for one in (*ways.values(), at_k)
        ]
        against = [own[SHOTS, str(STEPS)][model][measure].shown(decimals) for model in (GENERIC, SSL_E)]
        lines.append([name, f"{len(at_k)} × {at_k['queries'].iloc[0]}", *shown, *against])
    header = ["listener", "draws × clips", f"{GENERIC} {measure}", f"{SSL_E} {measure}", f"personal {measure}"]
    return markdown([*header, f"personal − {GENERIC}", f"personal − {SSL_E}"], lines)


def overview(compared: Mapping[str, Mapping[Way, Any]]) -> str:
    """Write how many listeners gain, and how much on average, at each K and number of steps."""
    lines = []
    for shots in KS:
        for steps in (*map(str, TRIED_STEPS), DEV_STEPS):
            for model in (GENERIC, SSL_E):
                cells = []
                for measure in MEASURES:
                    sign, decimals = (-1, 2) if measure == LOG_LOSS else (1, 1)
                    own = [one[shots, steps][model][measure] for one in compared.values()]
                    better = sum(sign * one.mean > 0 for one in own)
                    cells.append(f"{better} of {len(own)}, {over_listeners([one.mean for one in own]).shown(decimals)}")
                lines.append([shots, steps, model, *cells])
    return markdown(["labels", "steps", "against", *MEASURES], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge all listeners and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that `metaperser prepare` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="models, personal.csv, personal.md")
    parser.add_argument("-u", "--upstream", default="fbank_no_cmvn", help="of s3prl's hub")
    parser.add_argument("--scenario", nargs="+", choices=["seen", "unseen"], default=["seen", "unseen"])
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    compared: dict[str, dict[str, Any]] = {scenario: {} for scenario in args.scenario}
    for listener in trained_listeners(args.corpus, args.out, args.scenario, args.upstream, args.jobs):
        own, compared[listener.scenario][listener.name] = judge(listener)
        rows += own
    frame = pd.DataFrame(rows)
    parts = []
    for scenario, of_scenario in compared.items():
        own_rows = frame[frame["scenario"] == scenario]
        parts += [f"{scenario}, {SHOTS} labels, {STEPS} steps\n", listener_table(own_rows, of_scenario, "miF1")]
        parts += [f"{scenario}: listeners who gain, and the mean gain over listeners\n", overview(of_scenario)]
    text = "\n".join(parts)
    write_text(args.out / "personal.csv", frame.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    write_text(args.out / "personal.md", text)
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MetaPerSERError as error:
        raise exit_with(error, "personal.py") from None
