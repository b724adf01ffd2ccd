"""The model card of a checkpoint: what it is, how it came about, what it scores, how to load it.

Captions, file names and flags are other people's text: in the card they are text and nothing else, no Markdown, HTML or
YAML. Of paths only the last part is told. The card depends on what was computed, not on when or in how many parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from repro import __version__
from repro.data.sources import COCO_NAMES
from repro.evaluation.evaluator import Evaluation, some_captions
from repro.json_files import write_whole
from repro.models.weights import SAFETENSORS_FILE
from repro.record.metrics import METRICS
from repro.record.sanitize import clip, template

CARD = "README.md"
TASK = "image-to-text"
SAMPLES = 6
LONGEST_TEXT = 200
# Captions of training and validation; Source: http://cocodataset.org, as its annotation files have them.
COCO_ROWS = {"2014": {414_113, 202_654}, "2017": {591_753, 25_014}}
LABELS = {name: f"{metric.label}, {metric.unit}" for name, metric in METRICS.items()}
COUNTS = ("read", "kept", "dropped", "images")  # rows of a split, and its images
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Trained:
    """How the model of a checkpoint was trained and evaluated."""

    epoch: int  # of the checkpoint
    step: int
    facts: Mapping[str, Any]  # of `run.json`
    flags: Mapping[str, Any]  # those that the numbers depend on and that are not as by default
    device: str  # what computed it, in words
    evaluation: Evaluation | None  # on the validation rows; None if there was none

    def flag(self, name: str) -> Any:
        """The value of any flag."""
        return self.facts["flags"].get(name)


def write_card(folder: Path, trained: Trained) -> None:
    """Write `README.md` into a checkpoint's folder, unless it is there already, word for word."""
    data = metadata(folder.name, trained)
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(folder, trained)}"
    ModelCard(text)  # what it cannot read is a mistake here
    path = folder / CARD
    if not path.exists() or path.read_bytes() != text.encode():
        write_whole(path, text.encode())  # an upload may be reading it


def metadata(name: str, trained: Trained) -> ModelCardData:
    """Put what the Hub searches and shows into its form; the licence is left to whoever owns the model."""
    measured = trained.evaluation.metrics if trained.evaluation else {}
    metrics = {key: value for key, value in measured.items() if math.isfinite(value) and key != "gen_len"}
    data_name, data_id = _data(trained)
    official = trained.flag("dataset_name") in COCO_NAMES
    results = [
        EvalResult(
            task_type=TASK,
            task_name="Image captioning",
            dataset_type=data_id or ("coco" if official else "image-captions"),
            dataset_name=data_name,
            dataset_split="validation",
            metric_type=_kind(key),
            metric_name=LABELS.get(key, clean(key)),
            metric_value=round(float(value), 4),
        )
        for key, value in metrics.items()
    ]
    return ModelCardData(
        language="en" if official else None,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["image-captioning", "vision-encoder-decoder", "jax", "repro"],
        base_model=[found for found in _sources(trained).values() if is_hub_id(found)] or None,
        datasets=[data_id] if data_id else None,
        metrics=sorted(set(map(_kind, metrics))) or None,
        model_name=clean(trained.flag("hub_model_id") or name).rpartition("/")[2],
        eval_results=results or None,
    )


def is_hub_id(name: str) -> bool:
    """Tell whether a name that was loaded from stands for something on the Hub, and not for a folder."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def clean(text: str) -> str:
    """Make any text one line that can be encoded, without control characters, and not too long."""
    return clip(" ".join(str(text).split()), LONGEST_TEXT)


def escaped(text: str) -> str:
    """Write any text so that Markdown and HTML show it as it is, in a table too: what could mean more is an entity."""
    return re.sub(r"(?i)(?=[!-~])[^\w\s.,'-]|_|(?<=www)\.", lambda found: f"&#{ord(found.group())};", clean(text))


def _kind(metric: str) -> str:
    """The Hub's name of a metric."""
    return next((kind for kind in ("rouge", "bleu") if metric.startswith(kind)), clean(metric))


def _data(trained: Trained) -> tuple[str, str | None]:
    """Name the data, and their id if they are the Hub's or COCO's own."""
    name = trained.flag("dataset_name")
    if name in COCO_NAMES:
        year = str(trained.flag("dataset_config_name") or "2017")
        if any(split["read"] in COCO_ROWS.get(year, ()) for split in trained.facts["data"].values()):
            return f"COCO {year}", name
        return f"images and captions in COCO's layout ({clean(year)})", None
    if name is not None:
        return (name, name) if is_hub_id(name) else (_last_part(name), None)
    return _last_part(trained.flag("validation_file") or trained.flag("train_file") or "captioned images"), None


def _sources(trained: Trained) -> dict[str, str]:
    """Where weights came from, by half or `model`."""
    whole = trained.flag("model_name_or_path")
    halves = {half: trained.flag(f"{half}_model_name_or_path") for half in ("encoder", "decoder")}
    return {part: name for part, name in ({"model": whole} if whole else halves).items() if name}


def _last_part(path: str) -> str:
    return clean(Path(path).name or path)


def _body(folder: Path, trained: Trained) -> str:
    """Fill the template in; what others wrote is escaped here or there."""
    facts, evaluation, sources = trained.facts, trained.evaluation, _sources(trained)
    length = trained.flag("val_max_target_length") or trained.flag("max_target_length")
    beams = {"num_beams": trained.flag("num_beams")} if trained.flag("num_beams") else {}
    weights = [
        f"{part}: {escaped(name) if is_hub_id(name) else f'folder {escaped(_last_part(name))}'}"
        for part, name in sources.items()
    ]
    validation = facts["data"].get("validation")
    return template("repro.record", "model_card.md", autoescape=False, escaped=escaped).render(
        trained=trained,
        facts=facts,
        evaluation=evaluation,
        version=__version__,
        name=folder.name,
        task=TASK,
        data_name=_data(trained)[0],
        results=_results(evaluation) if evaluation else [],
        samples=_samples(evaluation) if evaluation else [],
        search={"max_length": length, **beams},
        # The pipeline has a max_new_tokens of its own, which wins over max_length; the latter counts the start token.
        in_pipeline={"max_new_tokens": length - 1, **beams},
        in_pytorch=(folder / SAFETENSORS_FILE).exists(),
        training=[
            ("weights at the start", "; ".join([*weights, *map(escaped, facts["model"]["notes"])])),
            ("parameters", f"{facts['model']['parameters']:,}"),
            ("protocol", escaped(facts["protocol"]["name"])),
            ("replicas", f"{facts['num_replicas']}, each with its own batch and dropout"),
            ("steps", f"{facts['num_steps']:,} in all, {facts['steps_per_epoch']:,} an epoch"),
            ("computed on", f"{escaped(trained.device)}; {escaped(facts['platform'])}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ],
        cut=cut_in_words(validation) if validation and validation["captions_cut"] else "",
        data=[
            (split, *(f"{counts[key]:,}" for key in COUNTS), cut_in_words(counts), counts["fingerprint"])
            for split, counts in facts["data"].items()
        ],
        flags=[(f"`--{name}`", escaped(str(value))) for name, value in trained.flags.items()],
        bases=[escaped(name) for name in sources.values() if is_hub_id(name)],
        is_coco=trained.flag("dataset_name") in COCO_NAMES,
    )


def _results(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Each metric's label, value and interval."""
    intervals = evaluation.details.get("rouge_intervals", {})
    return [
        (LABELS.get(key, escaped(key)), f"{value:.4f}", " to ".join(f"{end:.4f}" for end in intervals.get(key, ())))
        for key, value in evaluation.metrics.items()
    ]


def cut_in_words(counts: Mapping[str, Any]) -> str:
    """Say how many captions of a split had more tokens than a row holds, and lost their end."""
    return f"{counts['captions_cut']:,} of {counts['captions']:,} were cut at {counts['max_length']} tokens"


def _samples(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Choose images that lie evenly among those evaluated, the same every time."""
    rows = list(zip(evaluation.image_paths, evaluation.generations, strict=False))
    labels = {path: row["label"] for path, row in reversed(rows)}  # the first of each image
    found = some_captions(evaluation, SAMPLES).items()
    return [(escaped(Path(path).name), escaped(caption), escaped(labels[path])) for path, caption in found]
