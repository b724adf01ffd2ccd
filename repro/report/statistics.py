"""What sets of captions look like as texts: their lengths, words and phrases, generated beside reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
LONGEST = 24  # words; the last bar of the lengths holds all captions that have more, too
COUNTED_CHARACTERS = 5000  # of one caption; what is longer is no caption
PHRASES = (1, 2, 3, 4)
LISTED = 8


@dataclass(frozen=True)
class TextStatistics:
    """Of one set of captions.

    Attributes:
        captions: how many there are.
        mean_words, median_words: of a caption.
        lengths: int64[LONGEST + 1], captions by number of words.
        vocabulary: distinct words.
        distinct: by n, the share of the n-grams that are unlike all before them.
        unique: share of the captions that no other one equals.
        phrases: by n, how often each n-gram occurs.
    """

    captions: int
    mean_words: float
    median_words: float
    lengths: np.ndarray
    vocabulary: int
    distinct: dict[int, float]
    unique: float
    phrases: dict[int, Counter[tuple[str, ...]]]


def words_of(caption: str) -> list[str]:
    """Cut a caption into runs of letters and digits, in lower case."""
    return WORD.findall(caption[:COUNTED_CHARACTERS].lower())


def text_statistics(captions: Sequence[str]) -> TextStatistics:
    """Count lengths, words and n-grams of captions, of which there is at least one."""
    texts = [words_of(caption) for caption in captions]
    counts = np.array([len(words) for words in texts])
    phrases = {
        n: Counter(chain.from_iterable(zip(*(words[start:] for start in range(n)), strict=False) for words in texts))
        for n in PHRASES
    }
    times = Counter(map(tuple, texts))
    return TextStatistics(
        captions=len(captions),
        mean_words=float(counts.mean()),
        median_words=float(np.median(counts)),
        lengths=np.bincount(np.minimum(counts, LONGEST), minlength=LONGEST + 1),
        vocabulary=len(phrases[1]),
        distinct={n: len(found) / max(found.total(), 1) for n, found in phrases.items()},
        unique=sum(count == 1 for count in times.values()) / len(captions),
        phrases=phrases,
    )


def commonest_phrases(generated: TextStatistics, reference: TextStatistics, n: int) -> list[tuple[str, float, float]]:
    """List the most frequent n-grams of generated captions.

    Returns:
        The words, and how often they occur in a thousand captions, generated and reference.
    """
    return [
        (" ".join(words), 1000 * count / generated.captions, 1000 * reference.phrases[n][words] / reference.captions)
        for words, count in _most_common(generated.phrases[n])
    ]


def commonest_captions(captions: Iterable[str]) -> list[tuple[str, int]]:
    """List the captions that are repeated most, and how often; none that occurs once."""
    return [(caption, count) for caption, count in _most_common(Counter(captions)) if count > 1]


def _most_common(counted: Counter) -> list[tuple]:
    # Ties in the order of the words, so that the same run gives the same report.
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:LISTED]
