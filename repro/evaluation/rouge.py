"""ROUGE as runs report it, without a network: F x 100, the plain mean over the rows, with a seeded bootstrap interval.

`evaluate.load` of `rouge_metric.py` gives the same scores as a metric of the `evaluate` library.

Source: rouge_score (Lin 2004, with the Porter stemmer) does the scoring.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK = 10  # bootstrap samples drawn at once: 10 x 25,000 images x 5 columns are 10 MB

_warn_once = cache(logging.getLogger("repro").warning)


@dataclass(frozen=True)
class RougeScores:
    """Scores of a set of captions."""

    rows: np.ndarray  # float64[N,4], F x 100 of each row, in the order of `TYPES`
    means: dict[str, float]  # the mean of each column by type
    intervals: dict[str, tuple[float, float]]  # the percentile bootstrap interval of each mean, (low, high)
    sentence_splitter: str  # `punkt_english` or `punkt_default`, what cut sentences for rougeLsum


def rouge_scores(
    predictions: Sequence[str], references: Sequence[str], *, images: Sequence[Hashable] | None = None, seed: int = 0
) -> RougeScores:
    """Score each prediction against its reference, stemmed, sentences on lines of their own.

    Args:
        images: what each row is about: rows of one image are not independent; None if each has its own.
        seed: of the bootstrap; the means do not depend on it.
    """
    # NLTK takes longer to import than JAX, and no run needs it before its first evaluation.
    from nltk.stem.porter import PorterStemmer
    from rouge_score import rouge_scorer, tokenize

    name, split = _splitter()
    # Captions repeat few words, and stemming is most of the time: each word is stemmed once.
    stemmer = SimpleNamespace(stem=cache(PorterStemmer().stem))
    stems = SimpleNamespace(tokenize=lambda text: tokenize.tokenize(text, stemmer))
    scorer = rouge_scorer.RougeScorer(list(TYPES), tokenizer=stems)
    lines = [["\n".join(split.tokenize(text.strip())) for text in texts] for texts in (predictions, references)]
    if unread := sum(bool(text.strip()) and not stems.tokenize(text) for text in references):
        _warn_once(
            f"ROUGE reads no letters but a to z: {unread} of {len(references)} references have none, and score 0. Go by"
            " the loss, or add --caption_metrics: BLEU and CIDEr read every script."
        )
    rows = 100.0 * f_measures(scorer, lines[0], [[reference] for reference in lines[1]])
    low, high = bootstrap_interval(rows, images, seed=seed)
    return RougeScores(
        rows=rows,
        means=dict(zip(TYPES, rows.mean(axis=0).tolist(), strict=True)),
        intervals=dict(zip(TYPES, zip(low.tolist(), high.tolist(), strict=True), strict=True)),
        sentence_splitter=name,
    )


def f_measures(scorer: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Score each prediction against its references, of which the best of each type counts: float64[N,types], 0..1."""
    scored = (scorer.score_multi(*pair) for pair in zip(references, predictions, strict=True))
    return np.array([[scores[kind].fmeasure for kind in scorer.rouge_types] for scores in scored])


def bootstrap_interval(
    rows: np.ndarray, images: Sequence[Hashable] | None = None, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the means of columns, resampling images with all of their rows.

    Args:
        rows: float64[N,C]
        images: of each row; None if each has its own.

    Returns:
        (low, high), float64[C] each, which hold `CONFIDENCE` of `NUM_RESAMPLES` resampled means.
    """
    places: dict[Hashable, int] = {}
    of_row = [places.setdefault(image, len(places)) for image in (range(len(rows)) if images is None else images)]
    # Sums and, in the last column, the number of rows of each image, float64[M,C+1].
    sums = np.zeros((len(places), rows.shape[1] + 1))
    np.add.at(sums, of_row, np.c_[rows, np.ones(len(rows))])
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(len(sums), size=(CHUNK, len(sums))) for _ in range(NUM_RESAMPLES // CHUNK))
    totals = np.concatenate([sums[some].sum(axis=1) for some in drawn])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(totals[:, :-1] / totals[:, -1:], [tail, 1 - tail], axis=0)
    return low, high


@cache
def _splitter() -> tuple[str, Any]:
    """Give what cuts sentences: the English one where NLTK has its parameters."""
    from nltk.tokenize import punkt

    try:
        return "punkt_english", punkt.PunktTokenizer("english")
    except LookupError:
        return "punkt_default", punkt.PunktSentenceTokenizer()
