"""What a model's configurations may say: each value of its type and in its range, before anything is built of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from repro.data.atomic import writing_only_below
from repro.data.images import resize_of
from repro.errors import InputError
from repro.json_files import Count, Positive, checked
from repro.limits import LAYERS
from repro.models.layers import ACTIVATIONS

# Of a configuration, what says where it comes from and not what it computes.
ORIGIN = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
LARGEST = 1e30  # of a number that is computed with; float32 ends at 3e38
Finite = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
AboveZero = Annotated[float, Meta(gt=0, le=LARGEST)]
Spread = Annotated[float, Meta(ge=0, le=LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1)]

DIVISOR = "a divisor of the width"
NULL = "null, so that enc_to_dec_proj joins the widths"
# Rows by which an embedding may exceed the tokenizer: vocabularies are rounded up to a multiple of at most this.
SPARE_TOKENS = 128
CHANNELS = 3  # red, green, blue: what the image cache holds
ENCODER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), Positive),
    **{"model_type": Literal["vit"], "hidden_act": Literal[tuple(ACTIVATIONS)], "num_channels": Literal[CHANNELS]},
    **{"image_size": Positive, "patch_size": Positive, "qkv_bias": bool},
    **{"hidden_dropout_prob": Share, "attention_probs_dropout_prob": Share, "layer_norm_eps": AboveZero},
    **{"initializer_range": Spread, "pooler_output_size": Positive | None},
}
DECODER: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), Positive),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), Share),
    **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"), bool),
    **{"model_type": Literal["gpt2"], "activation_function": Literal[tuple(ACTIVATIONS)]},
    **{"tie_word_embeddings": bool, "n_inner": Positive | None},
    **{"layer_norm_epsilon": AboveZero, "initializer_range": Spread},
}
# What transformers 4's Flax class can join (4.57); more have Flax classes, and fail in it.
FLAX_CLASS = {
    "encoder": ("vit", "beit", "dinov2"),
    "decoder": ("gpt2", "gpt-sw3", "bart", "bert", "roberta", "roberta-prelayernorm", "xlm-roberta"),
}
SPECIAL = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
GENERATION: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "max_length", "max_new_tokens"), Positive | None),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), Count | None),
    **{"length_penalty": Finite | None, "early_stopping": bool | Literal["never"] | None},
    **{"repetition_penalty": AboveZero | None},
}
PROCESSOR_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
PROCESSOR: dict[str, Any] = {
    **dict.fromkeys(PROCESSOR_STEPS, bool | None),
    "resample": Annotated[int, Meta(ge=0, le=5)],
    "rescale_factor": AboveZero | None,
    "image_mean": Annotated[list[Finite], Meta(min_length=CHANNELS, max_length=CHANNELS)] | Finite | None,
    "image_std": Annotated[list[AboveZero], Meta(min_length=CHANNELS, max_length=CHANNELS)] | AboveZero | None,
}


def check_values(where: str, part: Any, forms: Mapping[str, Any], remedy: str) -> None:
    """Check the values of a configuration, as far as it has them; an InputError names the first that cannot be."""
    for name in filter(partial(hasattr, part), forms):
        value = getattr(part, name)
        try:
            checked(value, forms[name])
        except ValueError as error:
            raise InputError(f"{where}: {name} {value!r} cannot be used ({error}); {remedy}.") from error


def special_tokens(vocab_size: int) -> dict[str, Any]:
    """Give the forms of the special tokens; only ends may be several."""
    token = Annotated[int, Meta(ge=0, lt=vocab_size)]
    ends = token | Annotated[list[token], Meta(min_length=1)]
    return dict.fromkeys(SPECIAL, token | None) | {"eos_token_id": ends | None}


def check_halves(config: Any) -> None:
    """Check that there is something that can join two halves; raises as `check_config` does."""
    for name, known in FLAX_CLASS.items():
        half = getattr(config, name)
        layers = getattr(half, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > LAYERS:
            raise InputError(f"config.json, {name}: {layers} layers; at most {LAYERS} are built.")
        if half.model_type not in known:
            raise InputError(
                f"{name}: {half.model_type} is not supported, only {', '.join(known)}; those but vit and gpt2 need `pip"
                " install 'transformers<5'`."
            )


def check_config(config: Any) -> None:
    """Check a `VisionEncoderDecoderConfig`; an InputError names the first value that the native modules do not know."""
    encoder, decoder = config.encoder, config.decoder
    remedy = "change it, or try --model_implementation transformers"
    check_values("config.json, vit", encoder, ENCODER, remedy)
    check_values("config.json, gpt2", decoder, DECODER, remedy)
    check_values("config.json", config, special_tokens(decoder.vocab_size), "mend it")
    width, joined = decoder.hidden_size, getattr(decoder, "cross_attention_hidden_size", None)
    for half, name, is_good, wanted in (
        (encoder, "patch_size", encoder.patch_size <= encoder.image_size, f"at most {encoder.image_size}"),
        (encoder, "num_attention_heads", encoder.hidden_size % encoder.num_attention_heads == 0, DIVISOR),
        (decoder, "n_head", width % decoder.num_attention_heads == 0, DIVISOR),
        (decoder, "add_cross_attention", decoder.add_cross_attention is True, "true"),
        (decoder, "cross_attention_hidden_size", joined in (None, width), NULL),
    ):
        if not is_good:
            raise InputError(
                f"config.json, {half.model_type}: {name} {getattr(half, name)!r} is not supported by the native model,"
                f" which wants {wanted}; {remedy}."
            )


def check_parts(config: Any, tokenizer: Any, processor: Any) -> None:
    """Check that a native model's parts fit together, before its weights are read; raises as `check_config` does."""
    check_config(config)
    side, size = config.encoder.image_size, resize_of(processor)
    if (size.height, size.width) != (side, side):
        raise InputError(
            f"the image processor makes images of {size.height} x {size.width} pixels, and the encoder's position"
            f" embeddings are for {side} x {side}; set size in preprocessor_config.json to {side}."
        )
    tokens, rows = len(tokenizer), config.decoder.vocab_size
    if not tokens <= rows < tokens + SPARE_TOKENS:
        raise InputError(
            f"the tokenizer has {tokens} tokens and the decoder's vocabulary {rows}; use the tokenizer that the decoder"
            " was trained with, or set vocab_size in config.json."
        )


def without_origin(value: Any) -> Any:
    """Leave out of a configuration where it comes from."""
    if isinstance(value, dict):
        return {str(name): without_origin(part) for name, part in value.items() if name not in ORIGIN}
    return value


def check_can_be_saved(*parts: Any) -> None:
    """Save configurations to nowhere: transformers refuses some only then, and a run would end at its first model."""
    with tempfile.TemporaryDirectory() as folder, writing_only_below(Path(folder)):
        for part in parts:
            part.save_pretrained(folder)


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Try a tokenizer, which may raise anything, and check that it knows no token beyond the decoder's vocabulary."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(f"it has a token of number {largest}, the decoder's vocabulary ends at {vocab_size - 1}")
    ids = tokenizer(["a dog"], max_length=4, padding="max_length", truncation=True, return_tensors="np").input_ids
    tokenizer.batch_decode(ids, skip_special_tokens=True)
