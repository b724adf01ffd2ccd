"""The metrics of an evaluation: what they are called where people read them, in which unit, and which way is better."""

from __future__ import annotations

from typing import Literal, NamedTuple

from repro.evaluation.rouge import TYPES


class Metric(NamedTuple):
    """One metric."""

    label: str
    unit: str
    better: Literal["more", "less"] | None  # None where neither more nor less is
    needs: str  # the flag without which it is not computed


METRICS = {
    "loss": Metric("loss", "nats a token", "less", "do_eval"),
    **{kind: Metric(f"ROUGE-{kind[5:]}", "F x 100", "more", "predict_with_generate") for kind in TYPES},
    **{f"bleu{n}": Metric(f"BLEU-{n}", "0 to 1", "more", "caption_metrics") for n in range(1, 5)},
    "cider": Metric("CIDEr-D", "0 to 10", "more", "caption_metrics"),
    "gen_len": Metric("length of the captions", "tokens", None, "predict_with_generate"),
}


def name_of(metric: str) -> str:
    """What people call a metric; one that is not known is called as it is."""
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ")
