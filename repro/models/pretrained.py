"""Models with their tokenizer and image processor: created from two halves, loaded, saved."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    ViTImageProcessor,
)
from transformers import __version__ as transformers_version

# Under its public name, transformers 5.17 has a stand-in that asks for torchvision, which use_fast=False does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from repro.data.atomic import check_plain_names, writing_only_below
from repro.data.images import pixel_table, resize_of
from repro.errors import InputError
from repro.limits import check_settings
from repro.models import configuration
from repro.models.captioner import NativeCaptioner
from repro.models.generation import left_out
from repro.models.weights import DECODER, ENCODER, WHOLE, Format, Params, load_weights, save_weights

Implementation = Literal["native", "transformers"]
Loaded = TypeVar("Loaded")

BACKEND = "TokenizersBackend"  # as transformers 5 calls, and names in its files, what is PreTrainedTokenizerFast in 4
VOCABULARIES = ("vocab_file", "merges_file", "tokenizer_file", "spm_file")


@dataclass(frozen=True)
class Pretrained:
    """A model and what belongs to it."""

    captioner: Any  # a `NativeCaptioner`, or a `FlaxClassCaptioner`
    params: Params  # float32 parameter tree of `captioner`
    tokenizer: Any
    image_processor: Any
    notes: tuple[str, ...] = ()  # what is random instead of loaded, what is left out of captions

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in flatten_dict(self.params).values())

    def fingerprint(self) -> str:
        """Hash what the model computes, but for its weights: configurations, shapes, what is done to pixels."""
        shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(self.params).items()}
        parts = (self.captioner.config, self.captioner.generation_config, self.image_processor)
        content = [shapes, *(configuration.without_origin(part.to_dict()) for part in parts)]
        text = json.dumps(content, sort_keys=True, default=str)
        return sha256(text.encode()).hexdigest()[:16]


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


@dataclass(frozen=True)
class Options:
    """How a model is read and how it computes; `hub` holds cache_dir, token and trust_remote_code."""

    implementation: Implementation | None = None  # None for `native` where it knows the pair, else `transformers`
    dtype: str = "float32"  # type of the computation
    gradient_checkpointing: bool = False  # compute activations again in the backward pass
    seed: int = 42  # of the weights that are not loaded
    use_fast_tokenizer: bool = True
    weights_format: Format | None = None  # None for any
    hub: dict[str, Any] = dataclasses.field(default_factory=lambda: {"trust_remote_code": False}, repr=False)

    @property
    def download(self) -> dict[str, Any]:
        """What the functions that read files take; they run no code."""
        return {name: value for name, value in self.hub.items() if name != "trust_remote_code"}


def load_model(path: str, options: Options | None = None) -> Pretrained:
    """Load a vision-encoder-text-decoder model saved in the Hugging Face layout.

    Args:
        path: folder or Hub id.

    Raises:
        InputError: configuration, weights, tokenizer or image processor are missing, unusable, or do not go together.
    """
    options = options or Options()
    check_settings(Path(path))
    config = _read(path, "the configuration", lambda: AutoConfig.from_pretrained(path, **options.hub))
    if not isinstance(config, VisionEncoderDecoderConfig):
        raise InputError(
            f"{path}: holds a {config.model_type}, not a vision-encoder-decoder; give a half as"
            " --encoder_model_name_or_path or --decoder_model_name_or_path, as `repro create-model` does."
        )
    tokenizer = _read_tokenizer(path, options)
    processor = _read_processor(path, options.hub)
    if _implementation(config, options) == "transformers":
        module = _transformers_flax()
        model, params = _read(path, "the model", lambda: module.load(path, dtype=options.dtype, **options.download))
        _read(path, "the generation configuration", lambda: _checked(config, model.generation_config))
        captioner = module.FlaxClassCaptioner(model, pixel_table(processor))
        return _assemble(path, captioner, params, tokenizer, processor)
    captioner = _native(path, config, tokenizer, processor, options, saved=True)
    params, random = _load_weights(path, lambda: captioner.init(options.seed), WHOLE, options)
    return _assemble(path, captioner, params, tokenizer, processor, _notes(random, options.seed))


def create_model(encoder: Source, decoder: Source, options: Options | None = None) -> Pretrained:
    """Join a vision encoder and a text decoder; cross-attention, and halves without weights, are random.

    The decoder's bos token starts its captions and its eos token pads them, unless its configuration says otherwise.

    Raises:
        InputError: a half is not named, or cannot be read.
    """
    options = options or Options()
    for half, source in (("encoder", encoder), ("decoder", decoder)):
        if source.weights is None and source.config is None:
            raise InputError(
                f"no {half} is named: give --{half}_model_name_or_path, or --{half}_config_name for random weights."
            )
    for named in {encoder.weights, encoder.config, decoder.weights, decoder.config} - {None}:
        check_settings(Path(str(named)))
    read = partial(AutoConfig.from_pretrained, **options.hub)
    paths = [source.config_path for source in (encoder, decoder)]
    config = _joined_config(*(_read(path, "the configuration", partial(read, path)) for path in paths))
    path = decoder.weights or decoder.config_path
    tokenizer = _read_tokenizer(path, options)
    processor = _image_processor(encoder, config.encoder, options.hub)
    sources = {"encoder": encoder.weights, "decoder": decoder.weights}
    notes = [f"{half}: random weights, seed {options.seed}" for half, weights in sources.items() if weights is None]
    if _implementation(config, options) == "transformers":
        notes = [f"cross-attention and projection: random weights, seed {options.seed}", *notes]
        module = _transformers_flax()
        settings = {"seed": options.seed, "dtype": options.dtype, **options.hub}
        model, params = _read(path, "the weights", lambda: module.create(config, sources, **settings))
        captioner = module.FlaxClassCaptioner(model, pixel_table(processor))
        return _assemble(path, captioner, params, tokenizer, processor, notes)
    captioner = _native(path, config, tokenizer, processor, options, saved=False)
    params = initial = captioner.init(options.seed)
    random = ["enc_to_dec_proj.kernel"] if "enc_to_dec_proj" in initial else []
    for weights, holds in ((encoder.weights, ENCODER), (decoder.weights, DECODER)):
        if weights is not None:
            half, missing = _load_weights(weights, lambda: initial, holds, options)
            params, random = {**params, **half}, random + missing
    return _assemble(path, captioner, params, tokenizer, processor, [*notes, *_notes(random, options.seed)])


def save_model(pretrained: Pretrained, params: Params, folder: Path) -> None:
    """Write weights, configuration, generation configuration, tokenizer and image processor to a folder.

    A native model's weights are written twice, for Flax and for PyTorch; another pair's for Flax alone.
    """
    captioner = pretrained.captioner
    folder.mkdir(parents=True, exist_ok=True)
    with writing_only_below(folder):
        if isinstance(captioner, NativeCaptioner):
            save_weights(params, folder)
            captioner.config.save_pretrained(folder)
            captioner.generation_config.save_pretrained(folder)
        else:
            captioner.model.save_pretrained(folder, params=params)
        tokenizer = copy.deepcopy(pretrained.tokenizer)
        if tokenizer.is_fast:  # a call's truncation and padding stay in it, and would be saved
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(folder)
        pretrained.image_processor.save_pretrained(folder)


def _implementation(config: Any, options: Options) -> Implementation:
    configuration.check_halves(config)
    pair = f"{config.encoder.model_type} with {config.decoder.model_type}"
    native = pair == "vit with gpt2"
    chosen = options.implementation or ("native" if native else "transformers")
    if chosen == "native" and not native:
        raise InputError(f"--model_implementation native: knows vit with gpt2, not {pair}; use transformers.")
    if chosen == "transformers" and options.gradient_checkpointing:
        raise InputError("--gradient_checkpointing: needs --model_implementation native, which knows vit with gpt2.")
    return chosen


def _transformers_flax() -> Any:
    try:
        return importlib.import_module("repro.models.transformers_flax")
    except ImportError as error:
        raise InputError(
            f"--model_implementation transformers: transformers {transformers_version} has no Flax classes; run"
            " `pip install 'transformers<5'`, or use a ViT with a GPT-2, which need none."
        ) from error


def _native(
    path: str, config: Any, tokenizer: Any, processor: Any, options: Options, *, saved: bool
) -> NativeCaptioner:
    _read(path, "the configuration", lambda: configuration.check_parts(config, tokenizer, processor))
    generation_config, table = _generation_config(path, config, options, saved=saved), pixel_table(processor)
    dtype = jnp.dtype(options.dtype)
    return NativeCaptioner(config, generation_config, table, dtype=dtype, remat=options.gradient_checkpointing)


def _load_weights(path: str, initial: Callable[[], Params], holds: str, options: Options) -> tuple[Params, list[str]]:
    hub = {"form": options.weights_format, **options.download}
    return _read(path, "the weights", lambda: load_weights(path, initial, holds=holds, **hub))


def _generation_config(path: str, config: Any, options: Options, *, saved: bool) -> Any:
    # Models that were saved before there was such a file have none, and a Hub that is not reached gives none.
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    is_there = saved and cached_file(path, "generation_config.json", **quiet, **options.download) is not None
    # Theirs are in config.json, of which transformers 5 drops them elsewhere.
    older: dict[str, Any] = {} if is_there else {"config_file_name": "config.json", "_from_model_config": True}

    def load() -> Any:
        own = GenerationConfig.from_pretrained(path, **older, **options.download) if saved else None
        return _checked(config, own or GenerationConfig.from_model_config(config))

    return _read(path, "the generation configuration", load)


def _checked(config: Any, asked: Any) -> Any:
    """Give a generation configuration whose values can be."""
    forms = configuration.GENERATION | configuration.special_tokens(config.decoder.vocab_size)
    configuration.check_values("generation_config.json", asked, forms, "mend it")
    return asked


def _notes(random: Iterable[str], seed: int) -> list[str]:
    """Say in one line which kinds of weights are random."""
    kinds = {"cross-attention": "cross_?att", "enc_to_dec_proj": "enc_to_dec_proj", "pooler (unused)": "pooler"}
    found = [kind for kind, pattern in kinds.items() if any(re.search(pattern, name) for name in random)]
    return [f"{', '.join(found)}: random weights, seed {seed}"] if found else []


def _joined_config(encoder: Any, decoder: Any) -> Any:
    config: Any = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.architectures = ["VisionEncoderDecoderModel"]
    start, end, pad = (getattr(decoder, name, None) for name in configuration.SPECIAL)
    config.decoder_start_token_id = getattr(decoder, "bos_token_id", None) if start is None else start
    config.eos_token_id = end
    config.pad_token_id = pad if pad is not None else end[0] if isinstance(end, list) else end
    return config


def _read_tokenizer(path: str, options: Options) -> Any:
    def load() -> Any:
        said = get_tokenizer_config(path, **options.download)
        # transformers 4 opens these wherever they lie; a path of another machine is none that can be read.
        named = [file for file in map(said.get, VOCABULARIES) if file is not None and Path(file).exists()]
        check_plain_names(f"{path}: tokenizer_config.json", [*named, *(said.get("fast_tokenizer_files") or ())])
        if said.get("tokenizer_class") == BACKEND:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **options.download)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, use_fast=options.use_fast_tokenizer, **options.hub)
        templates = tokenizer.chat_template
        check_plain_names(f"{path}: tokenizer_config.json", templates if isinstance(templates, dict) else ())
        return tokenizer

    return _read(path, "the tokenizer", load)


def _image_processor(encoder: Source, config: PretrainedConfig, hub: dict[str, Any]) -> Any:
    path = encoder.weights or encoder.config_path
    is_there = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    if encoder.weights is None and is_there is None:
        return ViTImageProcessor(size={"height": config.image_size, "width": config.image_size})
    return _read_processor(path, hub)


def _read_processor(path: str, hub: dict[str, Any]) -> Any:
    def load() -> Any:
        processor = AutoImageProcessor.from_pretrained(path, use_fast=False, **hub)
        configuration.check_values("preprocessor_config.json", processor, configuration.PROCESSOR, "mend it")
        for name, value in processor.to_dict().items():
            if name.startswith("do_") and value and name not in configuration.PROCESSOR_STEPS:
                raise InputError(f"preprocessor_config.json: {name} {value!r} is not done here; set it to false.")
        resize_of(processor), pixel_table(processor)
        return processor

    return _read(path, "the image processor (preprocessor_config.json)", load)


def _assemble(
    path: str, captioner: Any, params: Params, tokenizer: Any, processor: Any, notes: Iterable[str] = ()
) -> Pretrained:
    config, asked = captioner.config, captioner.generation_config
    for name in configuration.SPECIAL:
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
    _read(path, "the tokenizer", lambda: configuration.check_tokenizer(tokenizer, config.decoder.vocab_size))
    _read(path, "a configuration", lambda: configuration.check_can_be_saved(config, asked, processor))
    return Pretrained(captioner, params, tokenizer, processor, (*notes, *left_out(asked)))


def _read(path: str, what: str, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except InputError as error:
        raise InputError(f"{path}: {error}" if path not in str(error) else str(error)) from error
    # Of a damaged file transformers and tokenizers raise whatever comes, down to a bare `Exception`.
    except Exception as error:
        raise InputError(
            f"{path}: {what} cannot be loaded. Give a folder that holds it, or a Hub id where there"
            f" is a network. ({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]})"
        ) from error
