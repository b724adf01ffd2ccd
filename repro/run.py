"""One run from its flags to its files: data, model, training, evaluation, prediction."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.data.images import load_images
from repro.data.pipeline import CaptionedImages, check_sizes, prepare_split
from repro.data.sources import Rows, load_splits
from repro.errors import InputError
from repro.evaluation.evaluator import Evaluation, Evaluator
from repro.models.pretrained import Pretrained, Source, create_model, load_model, save_model
from repro.protocol import Protocol, protocol_named
from repro.reporting.hub import HubUploader
from repro.reporting.progress import StepLog
from repro.reporting.writer import RunWriter, check_output_dir, log, prefixed
from repro.training.loop import Schedule, StepResult, take_steps
from repro.training.optimizer import count_parameters, create_learning_rate_fn, create_optimizer
from repro.training.sharding import (
    create_mesh,
    put,
    replicated,
    rows_sharding,
    train_batch_sharding,
)
from repro.training.state import create_train_state
from repro.training.steps import make_eval_step, make_train_step

PACKAGES = ("jax", "flax", "optax", "transformers", "datasets", "evaluate", "rouge_score", "numpy")
PACKAGES += ("pillow", "nltk")
SECRETS = ("token", "hub_token")


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        folder: the run's.
        metrics: the last evaluation's and the prediction's, named and rounded as in the result files.
        evaluations: the last evaluation, `eval`, and the prediction, `test`.
        facts: the content of `run.json`.
        checkpoints: the model folders that were saved, in order.
    """

    folder: Path
    metrics: dict[str, float]
    evaluations: dict[str, Evaluation]
    facts: dict[str, Any]
    checkpoints: tuple[Path, ...]


@dataclass(frozen=True)
class _Run:
    """All that is known before the first step."""

    data_args: DataArguments
    args: TrainingArguments
    protocol: Protocol
    num_replicas: int
    mesh: Mesh
    pretrained: Pretrained
    splits: dict[str, CaptionedImages]
    dropped: list[dict[str, Any]]
    facts: dict[str, Any]
    progress: bool

    @property
    def train_batch(self) -> int:
        return self.num_replicas * self.args.per_device_train_batch_size

    @property
    def num_epochs(self) -> int:
        return int(self.args.num_train_epochs)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.splits["train"]) // self.train_batch

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.num_epochs


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    *,
    progress: bool = True,
) -> RunResult:
    """Do what the flags ask for.

    Raises:
        InputError: a flag or the data cannot be used; nothing was trained, written or removed.
    """
    protocol = protocol_named(args.protocol)
    with jax.threefry_partitionable(protocol.threefry_partitionable):
        _check_flags(model_args, args)
        prepared = _prepare(model_args, data_args, args, protocol, progress)
        with RunWriter(Path(args.output_dir)) as writer:
            return _execute(prepared, writer)


def load_or_create(model_args: ModelArguments, *, seed: int) -> Pretrained:
    """Load the whole model that the flags name, or join the two halves that they name."""
    options: dict[str, Any] = {
        "dtype": model_args.dtype,
        "use_fast_tokenizer": model_args.use_fast_tokenizer,
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    if model_args.model_name_or_path is not None:
        return load_model(model_args.model_name_or_path, **options)
    encoder = Source(model_args.encoder_model_name_or_path, model_args.encoder_config_name)
    decoder = Source(model_args.decoder_model_name_or_path, model_args.decoder_config_name)
    return create_model(encoder, decoder, seed=seed, **options)


def _check_flags(model_args: ModelArguments, args: TrainingArguments) -> None:
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: add --do_train, --do_eval or --do_predict.")
    if args.num_train_epochs != int(args.num_train_epochs) or args.num_train_epochs < 1:
        raise InputError(
            f"--num_train_epochs {args.num_train_epochs}: must be a whole number, at least 1."
        )
    positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "num_replicas")
    for name in positive:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")
    named = (
        model_args.model_name_or_path,
        model_args.encoder_model_name_or_path or model_args.encoder_config_name,
    )
    if named.count(None) == len(named):
        raise InputError(
            "no model is named: give --model_name_or_path, or --encoder_model_name_or_path and"
            " --decoder_model_name_or_path."
        )
    check_output_dir(Path(args.output_dir), overwrite=args.overwrite_output_dir)


def _prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    protocol: Protocol,
    progress: bool,
) -> _Run:
    limits = {
        "train": data_args.max_train_samples if args.do_train else 0,
        "validation": data_args.max_eval_samples if args.do_eval else 0,
        "test": data_args.max_predict_samples if args.do_predict else 0,
    }
    wanted = [name for name, limit in limits.items() if limit != 0]
    rows = load_splits(
        splits=wanted,
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        data_dir=data_args.data_dir,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        test_file=data_args.test_file,
        image_column=data_args.image_column,
        caption_column=data_args.caption_column,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    rows = {name: _first(split, limits[name]) for name, split in rows.items()}
    pretrained = load_or_create(model_args, seed=args.seed)
    _check_lengths(data_args, pretrained)
    splits, dropped = _decode(rows, pretrained, model_args, data_args, protocol, progress)

    num_replicas = args.num_replicas or jax.device_count()
    for name, split in splits.items():
        if name == "train":
            check_sizes(
                len(split),
                train_batch=num_replicas * args.per_device_train_batch_size,
                eval_batch=num_replicas * args.per_device_eval_batch_size,
                block_size=args.block_size,
            )
    mesh = create_mesh(
        jax.devices(),
        num_replicas=num_replicas,
        replica_batch=args.per_device_train_batch_size,
    )
    prepared = _Run(
        data_args=data_args,
        args=args,
        protocol=protocol,
        num_replicas=num_replicas,
        mesh=mesh,
        pretrained=pretrained,
        splits=splits,
        dropped=dropped,
        facts={},
        progress=progress,
    )
    return dataclasses.replace(prepared, facts=_facts(prepared, rows, model_args))


def _first(split: Rows, limit: int | None) -> Rows:
    if limit is None or limit >= len(split.dataset):
        return split
    return dataclasses.replace(split, dataset=split.dataset.select(range(limit)))


def _check_lengths(data_args: DataArguments, pretrained: Pretrained) -> None:
    positions = getattr(pretrained.captioner.config.decoder, "max_position_embeddings", None)
    for name in ("max_target_length", "val_max_target_length"):
        length = getattr(data_args, name)
        if length is not None and (length < 2 or (positions is not None and length > positions)):
            raise InputError(
                f"--{name} {length}: must be between 2 and the decoder's {positions} positions."
            )


def _decode(
    rows: dict[str, Rows],
    pretrained: Pretrained,
    model_args: ModelArguments,
    data_args: DataArguments,
    protocol: Protocol,
    progress: bool,
) -> tuple[dict[str, CaptionedImages], list[dict[str, Any]]]:
    """Decode the images and tokenize the captions of all splits; the rows that cannot be used are returned too."""
    splits, dropped = {}, []
    for name, split in rows.items():
        store = load_images(
            split.dataset["image_path"],
            pretrained.image_processor,
            convert_to_rgb=protocol.convert_to_rgb,
            cache_dir=_image_cache(model_args),
            num_workers=data_args.preprocessing_num_workers,
            overwrite_cache=data_args.overwrite_cache,
            progress=progress,
        )
        length = data_args.max_target_length
        if name != "train":
            length = data_args.val_max_target_length or length
        splits[name], failed = prepare_split(
            split.dataset,
            pretrained.tokenizer,
            store,
            max_length=length,
            decoder_start_token_id=pretrained.captioner.config.decoder_start_token_id,
            split=name,
        )
        dropped += [*split.dropped, *failed]
    return splits, dropped


def _image_cache(model_args: ModelArguments) -> Path:
    if model_args.cache_dir is not None:
        return Path(model_args.cache_dir) / "repro-images"
    from datasets.config import HF_CACHE_HOME

    return Path(HF_CACHE_HOME) / "repro-images"


def _facts(prepared: _Run, rows: dict[str, Rows], model_args: ModelArguments) -> dict[str, Any]:
    flags = {
        name: value
        for arguments in (model_args, prepared.data_args, prepared.args)
        for name, value in dataclasses.asdict(arguments).items()
        if name not in SECRETS
    }
    counts = {
        name: {
            "read": len(split.dataset) + len(split.dropped),
            "kept": len(prepared.splits[name]),
            "dropped": sum(row["split"] == name for row in prepared.dropped),
            "images": len(np.unique(prepared.splits[name].image_index)),
            "fingerprint": fingerprint(prepared.splits[name]),
        }
        for name, split in rows.items()
    }
    steps = prepared.args.do_train
    return {
        "flags": flags,
        "protocol": dataclasses.asdict(prepared.protocol),
        "num_replicas": prepared.num_replicas,
        "devices": [str(device) for device in prepared.mesh.devices.flat],
        "platform": f"{jax.default_backend()}, {platform.platform()}, Python {sys.version.split()[0]}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "model": {
            "parameters": count_parameters(prepared.pretrained.params),
            "notes": list(prepared.pretrained.notes),
        },
        "data": counts,
        "steps_per_epoch": prepared.steps_per_epoch if steps else 0,
        "num_steps": prepared.num_steps if steps else 0,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def fingerprint(split: CaptionedImages) -> str:
    """Hash what is learned from: tokens, and which image each row has."""
    digest = hashlib.sha256()
    for array in (split.labels, split.decoder_attention_mask, split.image_index):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _execute(prepared: _Run, writer: RunWriter) -> RunResult:
    args, facts = prepared.args, dict(prepared.facts)
    writer.describe(facts, prepared.dropped)
    for name, counts in facts["data"].items():
        log.info("%s: %d rows read, %d kept, %d dropped, %d images", name, *list(counts.values())[:4])
    for note in prepared.pretrained.notes:
        log.info("model: %s", note)
    uploader = None
    if args.push_to_hub:
        uploader = HubUploader(
            writer.folder, repository=args.hub_model_id, token=args.hub_token
        )
    evaluator = _evaluator(prepared)
    params = put(prepared.pretrained.params, replicated(prepared.mesh))
    metrics: dict[str, float] = {}
    evaluations: dict[str, Evaluation] = {}
    checkpoints: list[Path] = []
    step = 0

    def evaluate(params: Any, split: str, prefix: str, folder: Path) -> None:
        started = time.perf_counter()
        evaluation = evaluator.evaluate(params, prepared.splits[split], name=prefix)
        seconds = time.perf_counter() - started
        writer.evaluation(prefix, evaluation, step=step, folder=folder, seconds=seconds)
        metrics.update(prefixed(prefix, evaluation.metrics))
        evaluations[prefix] = evaluation
        log.info("step %d: %s", step, describe(prefix, evaluation))

    if args.do_train:
        steps = StepLog(
            writer,
            num_steps=prepared.num_steps,
            batch_size=prepared.train_batch,
            logging_steps=args.logging_steps,
            progress=prepared.progress,
        )
        for result in _steps(prepared, params):
            params, step = result.state.params, result.step
            steps.add(result)
            if not (_evaluates_at(prepared, result) or _saves_at(prepared, result)):
                continue
            steps.pause()
            folder = writer.folder / f"ckpt_epoch_{result.epoch}_step_{step}"
            if args.do_eval:
                evaluate(params, "validation", "eval", folder)
            save_model(prepared.pretrained, jax.device_get(params), folder)
            checkpoints.append(folder)
            if uploader:
                uploader.push(f"epoch {result.epoch}, step {step}")
            steps.resume()
        facts |= steps.close()
    elif args.do_eval:
        evaluate(params, "validation", "eval", writer.folder)
    if args.do_predict:
        evaluate(params, "test", "test", writer.folder)
    facts["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    writer.describe(facts, prepared.dropped)
    if uploader:
        uploader.push("end of the run")
        uploader.wait()
    return RunResult(writer.folder, metrics, evaluations, facts, tuple(checkpoints))


def describe(prefix: str, evaluation: Evaluation) -> str:
    """Put an evaluation's metrics on one line."""
    return ", ".join(f"{prefix}_{name} {value:.4f}" for name, value in evaluation.metrics.items())


def _evaluates_at(prepared: _Run, result: StepResult) -> bool:
    """The example's rule: every `eval_steps`, or else at the end of each epoch; `exact` adds the end of training."""
    if not prepared.args.do_eval:
        return False
    if prepared.protocol.always_evaluate_at_end and result.step == prepared.num_steps:
        return True
    if prepared.args.eval_steps is not None and prepared.args.eval_steps > 0:
        return result.step % prepared.args.eval_steps == 0
    return result.is_epoch_end


def _saves_at(prepared: _Run, result: StepResult) -> bool:
    """Without evaluations the example saves nothing at all; a trained model is kept here."""
    return not prepared.args.do_eval and result.step == prepared.num_steps


def _steps(prepared: _Run, params: Any) -> Any:
    args = prepared.args
    schedule = create_learning_rate_fn(
        args.learning_rate, num_steps=prepared.num_steps, warmup_steps=args.warmup_steps
    )
    optimizer = create_optimizer(
        schedule,
        rule=prepared.protocol.decay_mask,
        weight_decay=args.weight_decay,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
    )
    train_step = make_train_step(
        prepared.pretrained.captioner.logits,
        optimizer,
        schedule,
        reduction=prepared.protocol.loss_reduction,
        label_smoothing=args.label_smoothing_factor,
    )
    everywhere = replicated(prepared.mesh)
    state = create_train_state(
        params, optimizer, seed=args.seed, num_replicas=prepared.num_replicas
    )
    return take_steps(
        jax.jit(train_step, donate_argnums=0, out_shardings=everywhere),
        # A copy: the first step takes the buffers of the state that it is given.
        jax.tree.map(jax.numpy.copy, put(state, everywhere)),
        prepared.splits["train"],
        Schedule(
            seed=args.seed,
            num_epochs=prepared.num_epochs,
            shuffle=args.block_size > 0 or prepared.protocol.shuffle_without_blocks,
            block_size=args.block_size,
            num_replicas=prepared.num_replicas,
            replica_batch=args.per_device_train_batch_size,
        ),
        train_batch_sharding(prepared.mesh, num_replicas=prepared.num_replicas),
    )


def _evaluator(prepared: _Run) -> Evaluator:
    args, data_args, captioner = prepared.args, prepared.data_args, prepared.pretrained.captioner
    batch_size = prepared.num_replicas * args.per_device_eval_batch_size
    sharding = rows_sharding(prepared.mesh, num_rows=batch_size)
    eval_step = jax.jit(
        make_eval_step(captioner.logits, label_smoothing=args.label_smoothing_factor)
    )
    generate: Callable[[Any, np.ndarray], Any] | None = None
    if data_args.predict_with_generate:
        settings = captioner.model.generation_config
        captions = jax.jit(
            lambda params, pixels: captioner.generate(
                params,
                pixels,
                max_length=data_args.val_max_target_length or data_args.max_target_length,
                num_beams=data_args.num_beams or settings.num_beams,
                stop_rule=prepared.protocol.stop_rule,
                group_size=args.per_device_eval_batch_size,
            ).tokens
        )
        generate = lambda params, pixels: captions(params, put(pixels, sharding))  # noqa: E731
    return Evaluator(
        row_losses=lambda params, batch: eval_step(params, put(batch, sharding)),
        generate=generate,
        tokenizer=prepared.pretrained.tokenizer,
        protocol=prepared.protocol,
        num_replicas=prepared.num_replicas,
        replica_batch=args.per_device_eval_batch_size,
        progress=prepared.progress,
    )
