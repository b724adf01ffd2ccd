"""Models with their tokenizer and image processor: created from two halves, loaded, saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    FlaxAutoModel,
    FlaxAutoModelForCausalLM,
    FlaxVisionEncoderDecoderModel,
    PretrainedConfig,
    VisionEncoderDecoderConfig,
    ViTImageProcessor,
)

from repro.data.images import pixel_table
from repro.errors import InputError
from repro.models.transformers_flax import Captioner, Params

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Pretrained:
    """A model and what belongs to it.

    Attributes:
        params: float32 parameter tree of `captioner`.
        notes: what was initialized at random instead of loaded, for the log.
    """

    captioner: Captioner
    params: Params
    tokenizer: Any
    image_processor: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where weights come from: `weights` with its own configuration, or `config` alone for random ones."""

    weights: str | None
    config: str | None

    @property
    def config_path(self) -> str:
        path = self.config or self.weights
        assert path is not None
        return path


def load_model(path: str, *, dtype: str = "float32", use_fast_tokenizer: bool = True, **hub: Any) -> Pretrained:
    """Load a vision-encoder-text-decoder model saved in the Hugging Face layout.

    Args:
        path: folder or Hub id.
        dtype: type of the computation.
        **hub: cache_dir, token, trust_remote_code.

    Raises:
        InputError: configuration, weights, tokenizer or image processor are missing or unusable.
    """
    # This class takes no trust_remote_code: there is no code but transformers' own for it.
    options = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    model = _read(
        path,
        "the model",
        lambda: FlaxVisionEncoderDecoderModel.from_pretrained(path, dtype=jnp.dtype(dtype), **options),
    )
    tokenizer = _read(
        path,
        "the tokenizer",
        lambda: AutoTokenizer.from_pretrained(path, use_fast=use_fast_tokenizer, **hub),
    )
    processor = _read(
        path,
        "the image processor (preprocessor_config.json)",
        lambda: AutoImageProcessor.from_pretrained(path, use_fast=False, **hub),
    )
    return _assemble(model, model.params, tokenizer, processor, path)


def create_model(
    encoder: Source,
    decoder: Source,
    *,
    seed: int,
    dtype: str = "float32",
    use_fast_tokenizer: bool = True,
    **hub: Any,
) -> Pretrained:
    """Join a vision encoder and a text decoder; cross-attention, and halves without weights, are random.

    The decoder's bos token starts its captions and its eos token pads them, unless its configuration says otherwise.

    Raises:
        InputError: a half is not named, or cannot be read.
    """
    for half, source in (("encoder", encoder), ("decoder", decoder)):
        if source.weights is None and source.config is None:
            raise InputError(
                f"no {half} is named: give --{half}_model_name_or_path, or --{half}_config_name for random weights."
            )
    encoder_config, decoder_config = (_read_config(source.config_path, hub) for source in (encoder, decoder))
    decoder_config.is_decoder = decoder_config.add_cross_attention = True
    config: Any = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder_config, decoder_config)
    start, end, pad = (
        getattr(decoder_config, name) for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    )
    config.decoder_start_token_id = decoder_config.bos_token_id if start is None else start
    config.eos_token_id = end
    config.pad_token_id = end if pad is None else pad

    model = FlaxVisionEncoderDecoderModel(config, seed=seed, dtype=jnp.dtype(dtype))
    halves, notes = {}, ["cross-attention and projection: random weights, seed " + str(seed)]
    for half, source, kind, half_config in (
        ("encoder", encoder, FlaxAutoModel, encoder_config),
        ("decoder", decoder, FlaxAutoModelForCausalLM, decoder_config),
    ):
        if source.weights is None:
            notes.append(f"{half}: random weights, seed {seed}")
        else:
            halves[half] = _half_weights(source.weights, kind, half_config, seed, hub)
    tokenizer = _read(
        decoder.weights or decoder.config_path,
        "the tokenizer",
        lambda: AutoTokenizer.from_pretrained(
            decoder.weights or decoder.config_path, use_fast=use_fast_tokenizer, **hub
        ),
    )
    params = {**model.params, **halves}
    processor = _image_processor(encoder, encoder_config, hub)
    return _assemble(model, params, tokenizer, processor, decoder.config_path, notes=tuple(notes))


def save_model(pretrained: Pretrained, params: Params, folder: Path) -> None:
    """Write weights, configuration, generation configuration, tokenizer and image processor to a folder."""
    pretrained.captioner.model.save_pretrained(folder, params=params)
    pretrained.tokenizer.save_pretrained(folder)
    pretrained.image_processor.save_pretrained(folder)


def _read_config(path: str, hub: dict[str, Any]) -> Any:
    return _read(path, "the configuration", lambda: AutoConfig.from_pretrained(path, **hub))


def _half_weights(path: str, kind: Any, config: PretrainedConfig, seed: int, hub: dict[str, Any]) -> Params:
    loaded = _read(path, "the weights", lambda: kind.from_pretrained(path, config=config, seed=seed, **hub))
    return loaded.params


def _image_processor(encoder: Source, config: PretrainedConfig, hub: dict[str, Any]) -> Any:
    path = encoder.weights or encoder.config_path
    try:
        return AutoImageProcessor.from_pretrained(path, use_fast=False, **hub)
    except (OSError, ValueError) as error:
        if encoder.weights is not None:
            raise InputError(f"{path}: no image processor (preprocessor_config.json): {error}") from error
        return ViTImageProcessor(size={"height": config.image_size, "width": config.image_size})


def _assemble(
    model: Any, params: Params, tokenizer: Any, processor: Any, path: str, *, notes: tuple[str, ...] = ()
) -> Pretrained:
    config = model.config
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is None:
            raise InputError(
                f"{path}: the configuration has no {name}; set it in config.json (`repro create-model` does)."
            )
    pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    if pad_token is None or tokenizer.eos_token is None:
        raise InputError(
            f"{path}: the tokenizer has no token for pad_token_id {config.pad_token_id}, or no eos"
            " token; use the decoder's own tokenizer, or set pad_token_id in config.json."
        )
    tokenizer.pad_token = pad_token
    return Pretrained(
        captioner=Captioner(model=model, pixel_table=pixel_table(processor)),
        params=params,
        tokenizer=tokenizer,
        image_processor=processor,
        notes=notes,
    )


def _read(path: str, what: str, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: {what} cannot be loaded. Give a folder that holds it, or a Hub id where there"
            f" is a network. ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error
