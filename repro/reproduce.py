"""`repro reproduce`: make a recipe's data and model, run it, and hold the result against its targets."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import GPT2Config, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessor

from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.data.pocket import read_scenes, render_pocket
from repro.data.scenes import Scene
from repro.errors import InputError
from repro.evaluation.attributes import attribute_accuracy
from repro.evaluation.targets import Verdict, check_targets
from repro.recipes import read_recipe
from repro.reporting.writer import write_json
from repro.run import RunResult, run

END_OF_TEXT = "<|endoftext|>"
MARKER = "recipe.json"
SAMPLES = 6


@dataclass(frozen=True)
class Sample:
    """A validation image, what is generated for it, and what it shows."""

    image_path: str
    caption: str
    truth: str


@dataclass(frozen=True)
class Reproduction:
    """A recipe that was run.

    Attributes:
        measured: every metric, the attribute accuracies and `minutes` of wall time.
    """

    folder: Path
    measured: dict[str, float]
    verdicts: list[Verdict]
    samples: list[Sample]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)


def reproduce(
    name: str, folder: Path, *, seed: int = 42, protocol: str | None = None, progress: bool = True
) -> Reproduction:
    """Run a recipe in a folder of its own.

    Args:
        name: of the recipe.
        folder: new, empty, or of an earlier reproduction, whose run is replaced.
        seed: of the weights, the order and dropout; the data are the recipe's.
        protocol: instead of the recipe's.

    Raises:
        InputError: there is no such recipe, or the folder holds something else.
    """
    recipe = read_recipe(name)
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise InputError(f"--output_dir {folder}: holds something else; name a new or an empty folder.")
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARKER, {**recipe, "seed": seed})
    data_dir, model_dir = folder / "data", folder / "model"
    render_pocket(data_dir, **recipe["data"])
    make_halves(recipe["model"], data_dir, model_dir)
    flags = dict(recipe["flags"])
    if protocol is not None:
        flags["protocol"] = protocol
    result = run(
        ModelArguments(
            encoder_config_name=str(model_dir / "encoder"),
            decoder_config_name=str(model_dir / "decoder"),
            cache_dir=str(folder / "cache"),
        ),
        DataArguments(data_dir=str(data_dir), **_fields(DataArguments, flags)),
        TrainingArguments(
            output_dir=str(folder / "run"),
            overwrite_output_dir=True,
            seed=seed,
            **_fields(TrainingArguments, flags),
        ),
        progress=progress,
    )
    captions, scenes, paths = captions_and_scenes(result, data_dir)
    measured = {
        **result.metrics,
        **attribute_accuracy(captions, scenes),
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }
    verdicts = check_targets(recipe["targets"], measured)
    write_json(
        folder / "result.json",
        {
            "recipe": name,
            "seed": seed,
            "measured": measured,
            "targets": [{**vars(verdict), "passed": verdict.passed} for verdict in verdicts],
        },
    )
    step = max(len(paths) // SAMPLES, 1)
    samples = [Sample(paths[i], captions[i], scenes[i].in_words()) for i in range(0, len(paths), step)][:SAMPLES]
    return Reproduction(folder, measured, verdicts, samples)


def make_halves(model: Mapping[str, Any], data_dir: Path, folder: Path) -> None:
    """Write configurations of a small ViT and GPT-2, an image processor, and a tokenizer made from the captions."""
    shutil.rmtree(folder, ignore_errors=True)
    encoder, decoder = folder / "encoder", folder / "decoder"
    ViTConfig(**model["encoder"]).save_pretrained(encoder)
    side = model["encoder"]["image_size"]
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(encoder)
    annotations = json.loads((data_dir / "annotations" / "captions_train2017.json").read_bytes())
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        (f"{row['caption'].lower()} " for row in annotations["annotations"]),
        vocab_size=model["vocab_size"],
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )
    tokenizer.save_pretrained(decoder)
    GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **model["decoder"],
    ).save_pretrained(decoder)


def captions_and_scenes(result: RunResult, data_dir: Path) -> tuple[list[str], list[Scene], list[str]]:
    """Pair one generated caption with the true scene of each validation image that was evaluated."""
    evaluation = result.evaluations["eval"]
    by_path = {path: row["pred"] for path, row in zip(evaluation.image_paths, evaluation.generations, strict=True)}
    scenes = read_scenes(data_dir, "val")
    paths = sorted(by_path)
    return (
        [by_path[path] for path in paths],
        [scenes[int(Path(path).stem)] for path in paths],
        paths,
    )


def _fields(arguments: type[DataArguments] | type[TrainingArguments], flags: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(arguments)}
    return {name: value for name, value in flags.items() if name in names}
