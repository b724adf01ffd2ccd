"""ROUGE against rouge_score's facts, the `evaluate` library's documented examples and the goldens."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path

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

words = st.lists(
    st.sampled_from(["a", "red", "two", "circles", "squares", "runs", "running", "on", "the", "left"]),
    min_size=1,
    max_size=12,
)
captions = words.map(" ".join)
pairs = st.lists(st.tuples(captions, captions), min_size=1, max_size=8)


@pytest.fixture(autouse=True, scope="module")
def _no_network() -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something tried to connect")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            patch.setattr(owner, name, refuse)
        yield


@pytest.fixture
def without_parameters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where NLTK has no English parameters."""

    def absent(_: str) -> None:
        raise LookupError("punkt_tab")

    monkeypatch.setattr(punkt, "PunktTokenizer", absent)
    rouge._splitter.cache_clear()
    yield
    rouge._splitter.cache_clear()


@pytest.fixture
def metric() -> evaluate.Metric:
    return evaluate.load(rouge_metric.__file__)


def evaluations() -> list[tuple[str, list[dict[str, str]], dict[str, float]]]:
    found = []
    for path in sorted(GOLDEN.glob("*.json")):
        for evaluation in json.loads(path.read_text())["evals"]:
            prefix = "eval" if "eval_generation" in evaluation else "test"
            name = f"{path.stem}-{evaluation['dir'] or prefix}"
            found.append((name, evaluation[f"{prefix}_generation"], evaluation[f"{prefix}_rouge_exact_mean"]))
    return found


@pytest.mark.parametrize(("rows", "expected"), [pytest.param(*case[1:], id=case[0]) for case in evaluations()])
def test_means_equal_the_goldens(
    rows: list[dict[str, str]], expected: dict[str, float], without_parameters: None
) -> None:
    scores = rouge_scores([row["pred"] for row in rows], [row["label"] for row in rows])
    assert scores.sentence_splitter == "punkt_default"
    assert scores.means == pytest.approx(expected, abs=1e-4)


@given(captions)
def test_a_caption_scores_100_against_itself(caption: str) -> None:
    scores = rouge_scores([caption], [caption])
    one_word = len(caption.split()) == 1
    assert scores.means == pytest.approx({kind: 0.0 if kind == "rouge2" and one_word else 100.0 for kind in TYPES})


@given(pairs, st.randoms(use_true_random=False))
def test_means_do_not_depend_on_the_order_of_rows(rows: list[tuple[str, str]], rng: random.Random) -> None:
    shuffled = rng.sample(rows, len(rows))
    means = [rouge_scores(*map(list, zip(*order, strict=True))).means for order in (rows, shuffled)]
    assert means[0] == pytest.approx(means[1])


@pytest.mark.parametrize("caption", ["एक लाल बस", "รถบัสสีแดง", "一辆红色的公共汽车", "красный автобус", "حافلة حمراء"])
def test_captions_that_rouge_cannot_read_are_told_once(caption: str, caplog: pytest.LogCaptureFixture) -> None:
    rouge._warn_once.cache_clear()
    for _ in range(3):
        assert set(rouge_scores([caption, "a bus", ""], [caption, "a bus", ""]).means.values()) <= {0.0, 100 / 3}
    assert caplog.text.count("1 of 3 references have none, and score 0. Go by the loss, or") == 1


@given(captions, captions)
def test_f_is_symmetric(first: str, second: str) -> None:
    forth, back = rouge_scores([first], [second]), rouge_scores([second], [first])
    assert forth.means == pytest.approx(back.means)


@given(pairs)
def test_the_interval_holds_the_mean_and_repeats_with_its_seed(rows: list[tuple[str, str]]) -> None:
    scores, again = (rouge_scores(*map(list, zip(*rows, strict=True)), seed=3) for _ in range(2))
    assert scores.intervals == again.intervals
    for kind in TYPES:
        low, high = scores.intervals[kind]
        assert low - 1e-9 <= scores.means[kind] <= high + 1e-9


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(generator.normal(size=(100, 1)), seed=seed)
        covered += low[0] <= 0.0 <= high[0]
    assert 180 <= covered <= 198  # 95 % of 200 are 190, with a standard deviation of 3


def test_sentences_on_lines_of_their_own_change_rouge_lsum_alone(without_parameters: None) -> None:
    prediction, reference = "A cat sits. A dog runs.", "A dog runs. A cat sits."
    scores = rouge_scores([prediction], [reference])
    assert scores.means["rougeLsum"] == pytest.approx(100.0)
    assert scores.means["rougeL"] == pytest.approx(50.0)


def test_english_parameters_are_used_where_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    (folder / "abbrev_types.txt").write_text("dr\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    rouge._splitter.cache_clear()
    name, english = rouge._splitter()
    rouge._splitter.cache_clear()
    text = "We met Dr. Smith. It rained."
    assert name == "punkt_english"
    assert english.tokenize(text) == ["We met Dr. Smith.", "It rained."]
    assert punkt.PunktSentenceTokenizer().tokenize(text) == ["We met Dr.", "Smith.", "It rained."]


@given(captions, captions)
def test_rows_equal_rouge_scores_own_stemmer(prediction: str, reference: str) -> None:
    expected = rouge_scorer.RougeScorer(list(TYPES), use_stemmer=True).score(reference, prediction)
    measured = rouge_scores([prediction], [reference]).rows[0]
    assert measured.tolist() == [100.0 * expected[kind].fmeasure for kind in TYPES]


def test_documented_examples_of_the_evaluate_library(metric: evaluate.Metric) -> None:
    same = ["hello there", "general kenobi"]
    assert metric.compute(predictions=same, references=same) == dict.fromkeys(TYPES, 1.0)
    rows = metric.compute(predictions=same, references=same, rouge_types=["rouge1", "rougeL"], use_aggregator=False)
    assert rows == {"rouge1": [1.0, 1.0], "rougeL": [1.0, 1.0]}
    several = metric.compute(predictions=same, references=[["hello", "there"], ["general kenobi", "general yoda"]])
    assert several == pytest.approx({"rouge1": 5 / 6, "rouge2": 0.5, "rougeL": 5 / 6, "rougeLsum": 5 / 6})
    partly = metric.compute(predictions=["hello goodbye", "ankh morpork"], references=["goodbye", "general kenobi"])
    # The card prints 0.25 here, and 2/3 for the same row elsewhere; F of precision 1/2 and recall 1 is 2/3.
    assert partly["rouge1"] == pytest.approx(1 / 3)


def test_the_best_reference_counts_wherever_it_stands(metric: evaluate.Metric) -> None:
    scores = metric.compute(predictions=["general kenobi"], references=[["general yoda", "general kenobi"]])
    assert scores == dict.fromkeys(TYPES, 1.0)


def test_the_metric_and_the_function_agree(metric: evaluate.Metric) -> None:
    predictions, references = ["two red circles run", "a star"], ["two circles running", "a big star"]
    ours = rouge_scores(predictions, references).means
    theirs = metric.compute(predictions=predictions, references=references, use_stemmer=True)
    assert ours == pytest.approx({kind: 100 * value for kind, value in theirs.items()})


def test_agreement_with_perl_rouge(real_data: Path) -> None:
    folder = real_data / "rouge_golden"
    expected = json.loads((folder / "expected.json").read_text())
    targets = (folder / "target.txt").read_text().splitlines()
    predictions = (folder / "prediction.txt").read_text().splitlines()
    for stemmer, rows in ((key == "use_stemmer=true", value) for key, value in expected.items() if "=" in key):
        scorer = rouge_scorer.RougeScorer(list(rows[0]), use_stemmer=stemmer)
        for target, prediction, row in zip(targets, predictions, rows, strict=False):
            scores = scorer.score(target, prediction)
            for kind, value in row.items():
                assert scores[kind].fmeasure == pytest.approx(value["f"], abs=1e-5)
    stemmed = expected["use_stemmer=true"]
    rows = rouge_scores(predictions[: len(stemmed)], targets[: len(stemmed)]).rows
    for measured, row in zip(rows, stemmed, strict=True):
        assert measured[:2] == pytest.approx([100 * row[kind]["f"] for kind in TYPES[:2]], abs=1e-3)
