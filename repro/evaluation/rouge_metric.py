"""ROUGE as a metric of the `evaluate` library: `evaluate.load` of this file's path, which needs no network.

Apart from `rouge.py`, whose scores it gives, because importing `evaluate` would cost every start a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import datasets
import evaluate
from rouge_score import rouge_scorer

from repro.evaluation.rouge import TYPES, f_measures


class Rouge(evaluate.Metric):
    """The `evaluate` form: plain means of F, 0..1, by type; lists of F by row without `use_aggregator`.

    A prediction with several references counts with the best of each type. Sentences must be on lines of their own for
    rougeLsum, as in the library's own metric.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="Lin, C.-Y.: ROUGE: A Package for Automatic Evaluation of Summaries. 2004.",
            inputs_description=str(Rouge.__doc__),
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        rouge_types: Sequence[str] = TYPES,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
        tokenizer: Any = None,
    ) -> dict[str, Any]:
        wrapped = tokenizer and SimpleNamespace(tokenize=tokenizer)
        scorer = rouge_scorer.RougeScorer(list(rouge_types), use_stemmer=use_stemmer, tokenizer=wrapped)
        together = [[reference] if isinstance(reference, str) else reference for reference in references]
        columns = dict(zip(rouge_types, f_measures(scorer, predictions, together).T, strict=True))
        return {kind: float(rows.mean()) if use_aggregator else rows.tolist() for kind, rows in columns.items()}
