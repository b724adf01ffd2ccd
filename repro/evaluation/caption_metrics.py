"""BLEU and CIDEr-D of one caption of each image against all of its references, by pycocoevalcap's scorers.

The scorers compare words, and which words there are depends on the tokenizer. The public evaluation uses Stanford's
Penn Treebank tokenizer, a Java program; where there is no Java, `split_words` takes its place, and the result says so.

Source: K. Papineni et al., BLEU: a method for automatic evaluation of machine translation (2002); R. Vedantam et al.,
CIDEr: consensus-based image description evaluation (2015); both as in github.com/tylin/coco-caption.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from repro.errors import InputError

NGRAMS = 4
# Tokens that the public evaluation leaves out: pycocoevalcap's list, and what its tokenizer turns into them.
IGNORED = frozenset(["''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", *'.?!,:-;"(){}', "--", "..."])
SPLIT = (
    (re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b"), lambda m: " ".join(filter(None, m.groups()))),
    (re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b"), r" \1"),
)
WORD = re.compile(
    r"n't\b|'(?:s|m|d|re|ve|ll)\b|(?:[a-z]\.){2,}(?!\w)|(?:st|ave|blvd|rd|ft)\.(?!\w)|\d+(?:[.,:/]\d+)+"
    r"|\w+(?:[-'&@/.]\w+)*|\.\.\.|--|[^\w\s]"
)


def split_words(caption: str) -> list[str]:
    """Cut a caption into lower-case words much as the Penn Treebank tokenizer does, without punctuation."""
    text = caption.lower().replace("’", "'")
    for pattern, replacement in SPLIT:
        text = pattern.sub(replacement, text)
    return [word for word in WORD.findall(text) if word not in IGNORED]


def caption_scores(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], str]:
    """Score captions.

    Args:
        captions: one for each image.
        references: at least one for each of the same images.

    Returns:
        `bleu1` to `bleu4`, 0 to 1, and `cider`, CIDEr-D, 0 to 10, of the whole set, and the tokenizer: `ptb` where
        there is Java, else `split_words`.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    assert captions.keys() == references.keys()
    tokenizer, tokenize = ("ptb", _by_treebank) if shutil.which("java") else ("split_words", _by_words)
    generated = tokenize({image: [caption] for image, caption in captions.items()})
    wanted = tokenize(references)
    bleu, _ = Bleu(NGRAMS).compute_score(wanted, generated, verbose=0)
    cider, _ = Cider().compute_score(wanted, generated)
    return {f"bleu{n}": float(value) for n, value in enumerate(bleu, 1)} | {"cider": float(cider)}, tokenizer


def check_installed() -> None:
    """Raise an `InputError` if the scorers are not there."""
    try:
        import pycocoevalcap.cider.cider  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--caption_metrics: BLEU and CIDEr-D come from pycocoevalcap, which is not installed; `pip install"
            " 'pycocoevalcap>=1.2,<2'` (100 MB), or drop the flag."
        ) from error


def _by_words(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {image: [" ".join(split_words(text)) for text in texts] for image, texts in captions.items()}


def _by_treebank(captions: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # It splits at line breaks of every kind, and then loses count of which caption is whose.
    lines = {image: [{"caption": " ".join(text.split())} for text in texts] for image, texts in captions.items()}
    return PTBTokenizer().tokenize(lines)
