"""How long should SSL-E train in the unseen scenario? Judged without the test session.

    python tests/benchmarks/ssl_e_length.py CORPUS [--upstream fbank_no_cmvn]

Dev episodes of the unseen scenario hold recordings that are trained on, so dev cannot tell when a model knows them by
heart. Here the corpus's last session is dropped altogether and the one before takes its place; each fold's *dev*
annotator is judged on the labels of that session. Prints miF1 of Entire-Zero and of Entire-Few at each rate, means over
folds and episodes, for each number of training steps.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from s3prl import hub
from s3prl.upstream.interfaces import Featurizer

from s3prl_metaperser.corpus.manifest import load_corpus
from s3prl_metaperser.datasets import AggregatedBatches
from s3prl_metaperser.episodes import draw_episode, fold_count, make_split
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.metrics import score
from s3prl_metaperser.objective import class_balanced_weights
from s3prl_metaperser.settings import DataSettings, read_settings
from s3prl_metaperser.systems import EntireFew, EntireZero
from s3prl_metaperser.upstream.features import LiveFeatures
from s3prl_metaperser.upstream.pooling import PooledUpstream

STEPS = (100, 200, 400, 700, 1000, 2000)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SEED, SHOTS, MOST_QUERIES, EPISODES = 1337, 32, 48, 10
CPU = torch.device("cpu")


class Kept(LiveFeatures):
    """Features held in memory, standardised once."""

    def transform(self, transform):
        utterances = sorted(self._audio)
        self._table = dict(zip(utterances, transform(self.raw(utterances)[0]), strict=True))

    def gather(self, utterances):
        return torch.stack([self._table[utterance] for utterance in utterances])


def judge(system, learner, features, episodes):
    probabilities = system.predict(learner, features, episodes).probabilities
    return np.mean([score(p, e.query.targets).miF1 for p, e in zip(probabilities, episodes, strict=True)])


def run_fold(corpus, fold, pooled, held_out):
    data = DataSettings(test_sessions=[held_out])
    split = make_split(corpus, "unseen", fold, data)
    judged_fold = next(
        other
        for other in range(1, fold_count(corpus, data) + 1)
        if make_split(corpus, "unseen", other, data).test[0].annotator == split.dev[0].annotator
    )
    (task,) = make_split(corpus, "unseen", judged_fold, data).test
    queries = min(MOST_QUERIES, len(task) - SHOTS)
    episodes = [draw_episode(task, SHOTS, queries, SEED, index) for index in range(EPISODES)]

    torch.manual_seed(SEED)
    settings = read_settings({"corpus": "-", "system": "entire_zero"})
    weights = class_balanced_weights(torch.from_numpy(split.annotation_targets()))
    learner = Learner(settings, int(pooled.featurizer.output_dim), weights)
    learner.bind_layer_weights(getattr(pooled.featurizer, "weights", None), pooled.layers)
    features = Kept(pooled, corpus.audio_paths(), CPU)
    learner.standardization.fit(features.raw(split.aggregated.utterances)[0], pooled.layers)
    features.transform(learner.standardization)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    batches = AggregatedBatches(split, settings, SEED, 0, max(STEPS))
    rows = []
    for step in range(max(STEPS)):
        _, batch = batches[step]
        loss = learner.aggregated_loss(features.gather(batch.utterances), torch.from_numpy(batch.targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1)
        optimizer.step()
        if step + 1 in STEPS:
            few = [EntireFew(dataclasses.replace(settings.adaptation, lr=rate, steps=50), "miF1") for rate in RATES]
            rows.append([judge(system, learner, features, episodes) for system in (EntireZero(), *few)])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--upstream", default="fbank_no_cmvn")
    args = parser.parse_args()
    corpus = load_corpus(args.corpus)
    sessions = sorted(corpus.annotations["session"].unique())
    earlier = corpus.annotations[corpus.annotations["session"] < sessions[-1]].reset_index(drop=True)
    corpus = dataclasses.replace(corpus, annotations=earlier)
    upstream = getattr(hub, args.upstream)()
    pooled = PooledUpstream(upstream, Featurizer(upstream, upstream_device="cpu"), "mean", CPU)
    folds = [
        run_fold(corpus, fold, pooled, int(sessions[-2])) for fold in range(1, fold_count(corpus, DataSettings()) + 1)
    ]
    print("SSL-E steps | Entire-Zero | " + " | ".join(f"Few at {rate:g}" for rate in RATES))
    for steps, mean, spread in zip(STEPS, np.mean(folds, axis=0), np.std(folds, axis=0), strict=True):
        cells = " | ".join(f"{value:.1f} ± {deviation:.1f}" for value, deviation in zip(mean, spread, strict=True))
        print(f"{steps} | {cells}")


if __name__ == "__main__":
    main()
