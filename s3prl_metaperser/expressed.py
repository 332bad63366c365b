"""What a recording expresses, as distinct from what its listeners call it: Dawid and Skene's estimate.

A mean of labels mixes two things: what is in the recording, and the habits of whoever happened to label it. Expectation
maximisation takes them apart. Each training annotator a has a naming N_a[z, c], the probability of saying emotion c of
a clip that expresses z; each clip has a posterior over z. The E step multiplies what its annotators said, each read by
that annotator's own naming; the M step counts. Expressed emotions are named after what most listeners call them, since
the first posterior is the mean of the labels.

Source: Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm"; labels
here are distributions, and count as such. One departure: the prior over expressed emotions counts a clip once for each
label that it has, not once as their mean of posteriors does, so that clips that many labelled weigh more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.special import softmax

from s3prl_metaperser.episodes import Annotations, Examples

SHRINKAGE = 0.3
"""Annotations a cell that every annotator's naming borrows from the average one; those who labelled little need it."""
SMOOTHING = 0.1
"""Annotations a cell that the average naming is given, so that nothing is impossible."""
ITERATIONS = 10
"""Where clips have one label or two, the likelihood says little of namings, and expectation maximisation, left to
converge, drifts from the labels until the posteriors say nothing. Ten iterations do nearly all where there is much to
learn, and no harm where there is nothing."""


@dataclass(frozen=True)
class Expressed:
    """What the training annotators' labels say of the recordings and of listeners on average.

    Attributes:
        examples: each training utterance with the posterior over what it expresses, (utterances, classes) float32.
        naming: (classes, classes) float32; row z is what listeners on average call expressed emotion z.
    """

    examples: Examples
    naming: np.ndarray


def estimate_expressed(annotations: Annotations) -> Expressed:
    """Estimate what each utterance expresses from the training annotators' labels.

    Args:
        annotations: single annotations, each with whose it is.

    Returns:
        The estimate; utterances sorted by id.

    >>> said = np.eye(2, dtype=np.float32)[[0, 0, 0, 1, 1, 1, 1, 0]]
    >>> clips = ("a", "a", "a", "b", "b", "b", "a", "b")
    >>> annotators = np.array([0, 1, 2, 0, 1, 2, 3, 3])
    >>> expressed = estimate_expressed(Annotations(Examples(clips, said), annotators))
    >>> expressed.examples.targets.round(2).tolist()   # the fourth listener swaps the names, and is understood
    [[1.0, 0.0], [0.0, 1.0]]
    """
    names, clips = np.unique(np.array(annotations.examples.utterances, dtype=object).astype(str), return_inverse=True)
    targets = annotations.examples.targets.astype(np.float64)
    annotators = int(annotations.annotators.max()) + 1
    classes = targets.shape[1]
    said = []
    for emotion in range(classes):
        ticked = np.flatnonzero(targets[:, emotion])
        places = annotations.annotators[ticked], clips[ticked]
        said.append(sparse.csr_matrix((targets[ticked, emotion], places), shape=(annotators, len(names))))
    posterior = np.stack([np.asarray(one.sum(axis=0)).ravel() for one in said], axis=1)
    posterior /= posterior.sum(axis=1, keepdims=True)
    for _ in range(ITERATIONS):
        counts = np.stack([one @ posterior for one in said], axis=2)
        naming = _average(counts)
        own = counts + SHRINKAGE * classes * naming
        own /= own.sum(axis=2, keepdims=True)
        prior = counts.sum(axis=(0, 2)) + 1
        evidence = np.log(prior / prior.sum()) + sum(
            one.T @ np.log(own[:, :, emotion]) for emotion, one in enumerate(said)
        )
        posterior = softmax(evidence, axis=1)
    naming = _average(np.stack([one @ posterior for one in said], axis=2))
    return Expressed(Examples(tuple(names.tolist()), posterior.astype(np.float32)), naming.astype(np.float32))


def _average(counts: np.ndarray) -> np.ndarray:
    """Give the average naming, (classes, classes), of (annotators, classes, classes) counts."""
    total = counts.sum(axis=0) + SMOOTHING
    return total / total.sum(axis=1, keepdims=True)
