"""`repro reproduce`: make what a recipe needs, run it, and hold the result against its targets."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import GPT2Config, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessor

from repro.config import ARGUMENTS, HALVES, flags_of, given_flags, make_arguments
from repro.data.atomic import remove_empty
from repro.errors import InputError
from repro.evaluation.evaluator import Evaluation, caption_of_each_image, some_captions
from repro.json_files import read_json, write_json
from repro.pocket.attributes import attribute_accuracy
from repro.pocket.halves import read_scenes, render_pocket
from repro.recipes import read_recipe
from repro.recipes.probe import first_steps
from repro.recipes.verify import MARKER, MARKER_FORM, RUN, Verification, as_json, stop_if_hopeless, verify
from repro.record.writer import entries, locked, log
from repro.run.train import RunResult, run
from repro.training.processes import decided_by_first, is_first

END_OF_TEXT = "<|endoftext|>"
SAMPLES = 6


@dataclass(frozen=True)
class Reproduction:
    """A recipe that was run."""

    folder: Path
    result: RunResult
    verification: Verification
    samples: list[tuple[str, str, str]]  # some images, their captions, and what they show, as far as that is known


def reproduce(
    name: str, folder: Path, given: Mapping[str, Any] = {}, *, keep_going: bool = False, home: Path | None = None
) -> Reproduction:
    """Run a recipe in a folder of its own; goes on with a run of it that was ended.

    Args:
        name: of the recipe.
        folder: new, empty, or of the same recipe.
        given: flags of `repro train` that win over the recipe's, by name.
        keep_going: do not stop a run that can no longer meet the targets.
        home: where the data that a recipe makes, the model's halves and the caches are; None for the same folder.

    Of several processes the first judges the run; the verification that the others return is empty.

    Raises:
        InputError: there is no such recipe, a flag cannot be used, or the folder holds something else.
        RunStopped: the run cannot meet the targets any more, or cannot go on.
    """
    recipe, home = read_recipe(name), home or folder
    with started(recipe, folder, given, home) as (model_args, data_args, args):
        if args.do_train and not args.overwrite_output_dir and "resume" not in given:
            args = dataclasses.replace(args, resume="auto")
        scenes = partial(_score_scenes, home / "data") if "data" in recipe else None
        watch = None if keep_going else partial(stop_if_hopeless, recipe)
        result = run(model_args, data_args, args, score=scenes, probe=first_steps if scenes else None, watch=watch)
        verification = _judged(name, folder, [folder], None, metrics=result.metrics)
    return Reproduction(folder, result, verification, _samples(result, home / "data" if scenes else None))


def reproduce_seeds(
    name: str, folder: Path, seeds: Sequence[int], given: Mapping[str, Any] = {}, *, keep_going: bool = False
) -> tuple[list[Reproduction], Verification]:
    """Run a recipe with several seeds, each in `folder/seed-N` on the same data, and judge all runs together."""
    runs = []
    with ExitStack() as stack:
        decided_by_first(lambda: stack.enter_context(locked(folder)))
        for place, seed in enumerate(seeds, start=1):
            own = folder / f"seed-{seed}"
            log.info("seed %d, run %d of %d, in %s", seed, place, len(seeds), own)
            runs.append(reproduce(name, own, {**given, "seed": seed}, keep_going=keep_going, home=folder))
        together = _judged(name, folder, [run.folder for run in runs], len(seeds))
    return runs, together


def _judged(name: str, folder: Path, runs: Sequence[Path], seeds: int | None, **more: Any) -> Verification:
    """Hold runs against their recipe and write what that comes to; where another process does it, nothing."""
    if not is_first():
        return Verification(name, runs=(), outcomes=(), problems=())
    found = verify(runs, recipe=name, seeds=seeds, recompute=False)
    write_json(folder / "result.json", {**as_json(found), **more})
    return found


@contextmanager
def started(recipe: Mapping[str, Any], folder: Path, given: Mapping[str, Any], home: Path) -> Iterator[tuple[Any, ...]]:
    """Keep others out of a recipe's folder, make its data and the model's halves if they are its own; gives the flags.

    Of several processes the first does this; another makes what it does not find, where no disk is shared.

    Raises:
        InputError: a flag cannot be used, or the folder holds something else.
    """
    marker = folder / MARKER
    if "output_dir" in given:
        raise InputError("--output_dir: a recipe's run is in its own folder; use `repro train` for another.")
    arguments = make_arguments(ARGUMENTS, recipe_flags(recipe, folder, given, home))

    def make() -> None:
        if not (home / "data").exists():
            log.info("rendering %d images", recipe["data"]["num_train"] + recipe["data"]["num_val"])
        render_pocket(home / "data", **recipe["data"])
        make_halves(recipe["model"], home / "data", home / "model")

    def enter() -> None:
        _check_is_of(marker, recipe["name"])
        stack.enter_context(locked(folder))
        _check_is_of(marker, recipe["name"])  # another may have been quicker
        write_json(marker, {"name": recipe["name"]})
        if "data" in recipe:
            make()

    with ExitStack() as stack:
        decided_by_first(enter)
        if "data" in recipe and not (home / "model").exists():
            make()
        yield arguments


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Take away what a block that trains nothing puts into an empty folder, and the folders that it makes."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    is_new = bool(made) or (folder.is_dir() and not any(folder.iterdir()))
    try:
        yield
    finally:
        if is_new and folder.is_dir() and not (folder / RUN).exists():
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            remove_empty(made)


def recipe_flags(recipe: Mapping[str, Any], folder: Path, given: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """The flags of a recipe's run in a folder, those that are given first; a whole model takes the place of halves."""
    own = {"output_dir": folder / RUN}
    if "data" in recipe:
        own |= {"data_dir": home / "data", "cache_dir": home / "cache"}
        own |= {f"{half}_config_name": home / "model" / half for half in ("encoder", "decoder")}
    flags = given_flags(ARGUMENTS, flags_of({**recipe["flags"], **own}), command="reproduce")
    if "model_name_or_path" in given:
        flags = {name: value for name, value in flags.items() if not name.startswith(HALVES)}
    return {**flags, **given}


def _check_is_of(marker: Path, name: str) -> None:
    folder = marker.parent
    is_of = marker.is_file() and read_json(marker, MARKER_FORM)["name"] == name
    if entries(folder) and not is_of:
        raise InputError(f"--output_dir {folder}: holds something else; name a new or an empty folder.")


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
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, **special)
    tokenizer.save_pretrained(decoder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2Config(vocab_size=len(tokenizer), **ids, **model["decoder"]).save_pretrained(decoder)


def _score_scenes(data_dir: Path, evaluation: Evaluation) -> dict[str, float]:
    captions = caption_of_each_image(evaluation.image_paths, evaluation.generations)
    if not captions:
        return {}
    scenes = read_scenes(data_dir, "val")
    return attribute_accuracy(list(captions.values()), [scenes[int(Path(path).stem)] for path in captions])


def _samples(result: RunResult, data_dir: Path | None) -> list[tuple[str, str, str]]:
    evaluation = result.evaluations.get("eval")
    scenes = read_scenes(data_dir, "val") if data_dir else {}
    return [
        (path, caption, scenes[int(Path(path).stem)].in_words() if scenes else "")
        for path, caption in (some_captions(evaluation, SAMPLES) if evaluation else {}).items()
    ]
