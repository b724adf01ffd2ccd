"""ROUGE against rouge_score's facts, the `evaluate` library's documented examples and the goldens."""

import json
import socket

import evaluate
import nltk
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from nltk.tokenize import punkt
from rouge_score import rouge_scorer

from repro.evaluation import rouge, rouge_metric
from repro.evaluation.rouge import TYPES, bootstrap_interval, rouge_scores

WORDS = ["a", "red", "two", "circles", "squares", "runs", "running", "on", "the", "left"]
captions = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
pairs = st.lists(st.tuples(captions, captions), min_size=1, max_size=8)


@pytest.fixture(autouse=True, scope="module")
def _no_network():
    def refuse(*_, **__):
        raise AssertionError("something tried to connect")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            patch.setattr(owner, name, refuse)
        yield


@pytest.fixture
def splitter_anew():
    """Lets a test change what NLTK finds."""
    rouge._splitter.cache_clear()
    yield
    rouge._splitter.cache_clear()


@pytest.fixture
def without_parameters(monkeypatch, splitter_anew):
    """As where NLTK has no English parameters."""

    def absent(_):
        raise LookupError("punkt_tab")

    monkeypatch.setattr(punkt, "PunktTokenizer", absent)


@pytest.fixture
def metric():
    return evaluate.load(rouge_metric.__file__)


def scores_of(rows, **options):
    """Of pairs (prediction, reference)."""
    return rouge_scores(*zip(*rows, strict=True), **options)


def evaluations():
    for path in sorted(GOLDEN.glob("*.json")):
        for found in json.loads(path.read_text())["evals"]:
            prefix = "eval" if "eval_generation" in found else "test"
            rows = [(row["pred"], row["label"]) for row in found[f"{prefix}_generation"]]
            yield pytest.param(rows, found[f"{prefix}_rouge_exact_mean"], id=f"{path.stem}-{found['dir'] or prefix}")


@pytest.mark.parametrize(("rows", "expected"), list(evaluations()))
def test_means_equal_the_goldens(rows, expected, without_parameters):
    scores = scores_of(rows)
    assert scores.sentence_splitter == "punkt_default"
    assert scores.means == pytest.approx(expected, abs=1e-4)


@given(pairs, st.randoms(use_true_random=False))
def test_means_do_not_depend_on_the_order_of_rows(rows, random):
    assert scores_of(rows).means == pytest.approx(scores_of(random.sample(rows, len(rows))).means)


@pytest.mark.parametrize("caption", ["एक लाल बस", "一辆红色的公共汽车"])
def test_captions_that_rouge_cannot_read_are_told_once(caption, caplog):
    rouge._warn_once.cache_clear()
    for _ in range(3):
        means = scores_of([(text, text) for text in (caption, "a bus", "")]).means
        assert set(means.values()) <= {0.0, 100 / 3}
    assert caplog.text.count("1 of 3 references have none, and score 0. Go by the loss, or") == 1


@given(pairs)
def test_the_interval_holds_the_mean_and_repeats_with_its_seed(rows):
    scores, again = (scores_of(rows, seed=3) for _ in range(2))
    assert scores.intervals == again.intervals
    for kind in TYPES:
        low, high = scores.intervals[kind]
        assert low - 1e-9 <= scores.means[kind] <= high + 1e-9


def test_the_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(generator.normal(size=(100, 1)), seed=seed)
        covered += low[0] <= 0.0 <= high[0]
    assert 180 <= covered <= 198  # 95 % of 200 are 190, with a standard deviation of 3


def test_rows_of_one_image_are_drawn_together():
    rows = np.random.default_rng(0).normal(size=(20, 1))
    alone = bootstrap_interval(rows, seed=0)
    fivefold = bootstrap_interval(np.repeat(rows, 5, axis=0), np.repeat(range(20), 5).tolist(), seed=0)
    np.testing.assert_allclose(fivefold, alone)


def test_sentences_on_lines_of_their_own_change_rouge_lsum_alone(without_parameters):
    means = scores_of([("A cat sits. A dog runs.", "A dog runs. A cat sits.")]).means
    assert means["rougeLsum"] == pytest.approx(100.0)
    assert means["rougeL"] == pytest.approx(50.0)


def test_english_parameters_are_used_where_they_are_installed(tmp_path, monkeypatch, splitter_anew):
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    (folder / "abbrev_types.txt").write_text("dr\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    name, english = rouge._splitter()
    text = "We met Dr. Smith. It rained."
    assert name == "punkt_english"
    assert english.tokenize(text) == ["We met Dr. Smith.", "It rained."]
    assert punkt.PunktSentenceTokenizer().tokenize(text) == ["We met Dr.", "Smith.", "It rained."]


@given(captions, captions)
def test_rows_equal_rouge_scores_own_stemmer(prediction, reference):
    expected = rouge_scorer.RougeScorer(list(TYPES), use_stemmer=True).score(reference, prediction)
    assert scores_of([(prediction, reference)]).rows[0].tolist() == [100.0 * expected[kind].fmeasure for kind in TYPES]


def test_documented_examples_of_the_evaluate_library(metric):
    same = ["hello there", "general kenobi"]
    assert metric.compute(predictions=same, references=same) == dict.fromkeys(TYPES, 1.0)
    rows = metric.compute(predictions=same, references=same, rouge_types=["rouge1", "rougeL"], use_aggregator=False)
    assert rows == {"rouge1": [1.0, 1.0], "rougeL": [1.0, 1.0]}
    several = metric.compute(predictions=same, references=[["hello", "there"], ["general kenobi", "general yoda"]])
    assert several == pytest.approx({"rouge1": 5 / 6, "rouge2": 0.5, "rougeL": 5 / 6, "rougeLsum": 5 / 6})
    best = metric.compute(predictions=same[1:], references=[["general yoda", "general kenobi"]])
    assert best == dict.fromkeys(TYPES, 1.0), "the best counts wherever it stands"
    partly = metric.compute(predictions=["hello goodbye", "ankh morpork"], references=["goodbye", "general kenobi"])
    # The card prints 0.25 here, and 2/3 for the same row elsewhere; F of precision 1/2 and recall 1 is 2/3.
    assert partly["rouge1"] == pytest.approx(1 / 3)


def test_the_metric_and_the_function_agree(metric):
    rows = {"predictions": ["two red circles run", "a star"], "references": ["two circles running", "a big star"]}
    theirs = metric.compute(**rows, use_stemmer=True)
    assert rouge_scores(**rows).means == pytest.approx({kind: 100 * value for kind, value in theirs.items()})


def test_agreement_with_perl_rouge(real_data):
    folder = real_data / "rouge_golden"
    stemmed = json.loads((folder / "expected.json").read_text())["use_stemmer=true"]
    predictions, targets = ((folder / f"{name}.txt").read_text().splitlines() for name in ("prediction", "target"))
    rows = rouge_scores(predictions[: len(stemmed)], targets[: len(stemmed)]).rows
    for measured, row in zip(rows, stemmed, strict=True):
        assert measured[:2] == pytest.approx([100 * row[kind]["f"] for kind in TYPES[:2]], abs=1e-3)
