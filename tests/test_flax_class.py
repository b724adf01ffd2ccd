"""The native model against transformers' `FlaxVisionEncoderDecoderModel`, and the pairs that only that class knows.

Collected where transformers has the class, which is before version 5.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_beam_search import CHEAP, END, compiled, images, randomized
from transformers import (
    AutoTokenizer,
    BartConfig,
    BeitConfig,
    BertConfig,
    FlaxVisionEncoderDecoderModel,
    GenerationConfig,
    GPT2Config,
    PretrainedConfig,
    VisionEncoderDecoderConfig,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.models.vision_encoder_decoder.modeling_flax_vision_encoder_decoder import (
    FlaxVisionEncoderDecoderModule,
)

from repro.errors import InputError
from repro.models.captioner import NativeCaptioner
from repro.models.layers import ACTIVATIONS
from repro.models.pretrained import Options, Source, create_model, load_model, save_model
from repro.models.transformers_flax import FlaxClassCaptioner
from repro.models.weights import FLAX_FILE, FLAX_INDEX, SAFETENSORS_FILE
from repro.training.losses import row_losses

pytestmark = pytest.mark.usefixtures("flax_classes_promote_ranks")

VOCABULARY, LENGTH, ROWS = 41, 7, 3
TABLE = np.tile(np.linspace(-1, 1, 256, dtype=np.float32)[:, None], (1, 3))


@st.composite
def configs(draw) -> VisionEncoderDecoderConfig:
    """Two small halves of random widths, depths, activations, dropouts and bindings."""
    dropouts = st.sampled_from([0.0, 0.1, 0.4])
    acts = st.sampled_from(sorted(set(ACTIVATIONS)))
    heads, depth = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([4, 8]))
    encoder = ViTConfig(
        hidden_size=heads * depth,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 2)),
        intermediate_size=draw(st.sampled_from([8, 24])),
        image_size=draw(st.sampled_from([8, 11])),  # 11 leaves a rest of three pixels
        patch_size=4,
        hidden_act=draw(acts),
        hidden_dropout_prob=draw(dropouts),
        attention_probs_dropout_prob=draw(dropouts),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-3])),
        qkv_bias=draw(st.booleans()),
    )
    heads = draw(st.sampled_from([1, 2, 4]))
    decoder = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH + draw(st.integers(0, 3)),
        n_embd=draw(st.sampled_from([encoder.hidden_size, 8 * heads])) * 4,
        n_head=heads,
        n_layer=draw(st.integers(1, 2)),
        n_inner=draw(st.sampled_from([None, 12])),
        activation_function=draw(acts),
        resid_pdrop=draw(dropouts),
        embd_pdrop=draw(dropouts),
        attn_pdrop=draw(dropouts),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=0,
        eos_token_id=0,
        is_decoder=True,
        add_cross_attention=True,
    )
    return VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


def both(config: VisionEncoderDecoderConfig, seed: int, dtype: str = "float32"):
    """The two implementations of a configuration, with the weights of a seed, spread so that nothing is near 0."""
    native = NativeCaptioner(config, GenerationConfig(), TABLE, dtype=jnp.dtype(dtype))
    # The class itself would draw weights of its own, one compilation for each shape.
    module = FlaxVisionEncoderDecoderModule(config, dtype=jnp.dtype(dtype))
    model = SimpleNamespace(module=module, dtype=jnp.dtype(dtype), config=config)
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: native.init(0))
    params = jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape).astype(np.float32), shapes)
    return native, FlaxClassCaptioner(model, TABLE), params


def inputs(seed: int, side: int):
    """uint8[B,S,S,3] images, int32[B,T] tokens and masks of at least one token."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, LENGTH + 1, ROWS)
    return (
        random.integers(0, 256, (ROWS, side, side, 3), dtype=np.uint8),
        random.integers(0, VOCABULARY, (ROWS, LENGTH), dtype=np.int32),
        (np.arange(LENGTH) < lengths[:, None]).astype(np.int32),
    )


def measure(captioner):
    """Logits without dropout, logits with it, and the gradient of a loss with it, compiled together."""

    @partial(jax.jit, compiler_options=CHEAP)
    def run(params, pixels, tokens, mask, key):
        def loss(params):
            logits = captioner.logits(params, pixels, tokens, mask, dropout_key=key)
            sums, counts = row_losses(logits, tokens, mask)
            return sums.sum() / counts.sum(), logits

        gradients, trained = jax.grad(loss, has_aux=True)(params)
        return captioner.logits(params, pixels, tokens, mask), trained, gradients

    return run


def relative(ours, theirs) -> float:
    """The largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@hypothesis_settings(max_examples=8)
@given(configs(), st.integers(0, 2**31 - 1))
def test_logits_dropout_and_gradients_are_those_of_the_flax_class(config, seed):
    native, flax_class, params = both(config, seed)
    ours, theirs = measure(native), measure(flax_class)
    for draw in range(4):
        arguments = (params, *inputs(seed + draw, config.encoder.image_size), jax.random.PRNGKey(seed + draw))
        plain, trained, gradients = ours(*arguments)
        expected_plain, expected_trained, expected_gradients = theirs(*arguments)
        assert relative(plain, expected_plain) < 1e-5
        assert relative(trained, expected_trained) < 1e-5
        # Relative to the whole gradient: some of its leaves, the keys' biases, are zero but for rounding.
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradients))
        compare = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4 * largest)
        jax.tree.map(compare, gradients, expected_gradients)


@hypothesis_settings(max_examples=5)
@given(configs(), st.integers(0, 2**31 - 1))
def test_bfloat16_is_as_far_from_float32_as_the_flax_class_is(config, seed):
    # 8 bits of mantissa: one rounding is at most 2**-9 relative. Some forty of them between pixels and logits, each
    # as likely up as down, make sqrt(40) / 512 = 0.012 where errors only add up; layer norm of nearly constant
    # states, and products of two rounded factors, make it several times as much. 0.1 holds for both implementations.
    precise, _, params = both(config, seed)
    native, flax_class, _ = both(config, seed, "bfloat16")
    arguments = (params, *inputs(seed, config.encoder.image_size))
    exact = jax.jit(precise.logits, compiler_options=CHEAP)(*arguments)
    ours, theirs = (jax.jit(one.logits, compiler_options=CHEAP)(*arguments) for one in (native, flax_class))
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    assert relative(ours, exact) < max(0.1, 1.5 * relative(theirs, exact))


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_seed_draws_the_same_weights(golden_inputs, tied):
    config = VisionEncoderDecoderConfig.from_pretrained(golden_inputs / "model")
    config.decoder.tie_word_embeddings = tied
    ours = NativeCaptioner(config, GenerationConfig(), TABLE).init(7)
    theirs = FlaxVisionEncoderDecoderModel(config, seed=7).params
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    # Compiled or not, the same bits become normal numbers by arithmetic that is rounded a little differently.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), ours, theirs)


def test_recomputed_activations_drop_out_alike(native):
    checkpointing = dataclasses.replace(native.captioner, remat=True)
    arguments = (native.params, *inputs(0, 32), jax.random.PRNGKey(1))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        measure(checkpointing)(*arguments),
        measure(native.captioner)(*arguments),
    )


CASES = ((1, 9, 4), (2, 7, 3), (3, 12, 4), (4, 16, 1), (5, 10, 2), (6, 8, 3), (7, 13, 2), (8, 11, 4))
"""(beams, max_length, rows); not length 20, which transformers takes for "unset"."""
SEEDS = 40


@pytest.fixture(scope="module")
def native(golden_inputs):
    return load_model(str(golden_inputs / "model"), Options(implementation="native"))


@pytest.fixture(scope="module")
def flax_class(golden_inputs):
    return load_model(str(golden_inputs / "model"), Options(implementation="transformers"))


def their_captions(flax_class, num_beams: int, max_length: int):
    """The class's own `generate`, compiled: (params, pixels) to int32[B,L]."""

    @partial(jax.jit, compiler_options=CHEAP)
    def generate(params, pixels):
        normalized = jnp.asarray(flax_class.captioner.pixel_table)[pixels.astype(jnp.int32), jnp.arange(3)]
        model = flax_class.captioner.model
        return model.generate(
            jnp.moveaxis(normalized, -1, 1), params=params, max_length=max_length, num_beams=num_beams
        ).sequences

    return generate


@pytest.mark.parametrize(("num_beams", "max_length", "rows"), CASES)
def test_captions_are_those_of_the_flax_classs_generate(native, flax_class, num_beams, max_length, rows):
    theirs = their_captions(flax_class, num_beams, max_length)
    ours = compiled(native, num_beams, max_length, "current", rows)
    exact = compiled(native, num_beams, max_length, "exact", rows)
    lengths, rows_that_differ = set(), 0
    for seed in range(SEEDS):
        params, pixels = randomized(native.params, seed), images(seed, rows)
        tokens = np.asarray(ours(params, pixels).tokens[:, 0])
        np.testing.assert_array_equal(tokens, theirs(params, pixels), err_msg=f"seed {seed}")
        alone = [np.asarray(theirs(params, pixels[row : row + 1]))[0] for row in range(rows)]
        np.testing.assert_array_equal(exact(params, pixels).tokens[:, 0], alone, err_msg=f"seed {seed}, exact")
        rows_that_differ += (tokens != alone).any(axis=1).sum()
        lengths.update((tokens[:, 1:] != END).sum(axis=1).tolist())
    assert len(lengths) >= 5, "the ends hardly vary, so that agreement shows little"
    print(f"{num_beams} beams: {rows_that_differ} of {SEEDS * rows} captions depend on their batch under `current`")


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.5, 2.0])
def test_length_penalty_and_early_stopping_are_the_flax_classs(native, flax_class, early_stopping, length_penalty):
    settings = GenerationConfig(early_stopping=early_stopping, length_penalty=length_penalty)
    captioner = dataclasses.replace(native.captioner, generation_config=settings)
    ours = compiled(dataclasses.replace(native, captioner=captioner), 3, 12, "current", 4)

    @partial(jax.jit, compiler_options=CHEAP)
    def theirs(params, pixels):
        normalized = jnp.asarray(captioner.pixel_table)[pixels.astype(jnp.int32), jnp.arange(3)]
        return flax_class.captioner.model.generate(
            jnp.moveaxis(normalized, -1, 1),
            params=params,
            max_length=12,
            num_beams=3,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
        ).sequences

    for seed in range(12):
        params, pixels = randomized(native.params, seed), images(seed)
        np.testing.assert_array_equal(ours(params, pixels).tokens[:, 0], theirs(params, pixels), err_msg=f"seed {seed}")


def test_our_search_over_the_flax_class_finds_what_it_finds_over_the_native_model(native, flax_class):
    for stop_rule in ("2022", "exact"):
        ours, theirs = (compiled(model, 3, 12, stop_rule, 4) for model in (native, flax_class))
        for seed in range(8):
            params, pixels = randomized(native.params, seed), images(seed)
            np.testing.assert_array_equal(ours(params, pixels).tokens, theirs(params, pixels).tokens)


def write_half(folder: Path, config: PretrainedConfig, golden_inputs: Path) -> str:
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(golden_inputs / "model").save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
IMAGES = {"image_size": 16, "patch_size": 8}
TOKENS = {"vocab_size": 340, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 0}
PAIRS = {
    "beit with gpt2": (
        BeitConfig(**WIDTHS, **IMAGES),
        GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=16, **TOKENS),
    ),
    "vit with bart": (
        ViTConfig(**WIDTHS, **IMAGES),
        BartConfig(
            d_model=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_position_embeddings=16,
            forced_eos_token_id=None,
            **TOKENS,
        ),
    ),
    "vit with bert": (ViTConfig(**WIDTHS, **IMAGES), BertConfig(max_position_embeddings=16, **WIDTHS, **TOKENS)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_other_pairs_go_by_the_flax_class(pair, tmp_path, golden_inputs):
    encoder, decoder = (
        write_half(tmp_path / half, config, golden_inputs)
        for half, config in zip(("encoder", "decoder"), PAIRS[pair], strict=True)
    )
    made = create_model(Source(None, encoder), Source(None, decoder))
    save_model(made, made.params, tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert type(model.captioner).__name__ == "FlaxClassCaptioner"
    params, pixels = jax.tree.map(lambda x: 5 * x, model.params), images(0)[:, :16, :16]
    found = compiled(model, 3, 8, "current", 4)(params, pixels)
    tokens, scores = np.asarray(found.tokens[:, 0]), np.asarray(found.scores[:, 0])
    if pair != "vit with bert":  # with which the beam search of transformers 4.57 fails
        np.testing.assert_array_equal(tokens, their_captions(model, 3, 8)(params, pixels))
    # What the search says of a caption is what the whole caption's logits say.
    logits = model.captioner.logits(params, pixels, tokens, np.ones_like(tokens))
    decoded = model.captioner.decode(params, model.captioner.encode(params, pixels), tokens, np.ones_like(tokens))
    np.testing.assert_allclose(decoded, logits, rtol=1e-4, atol=1e-4)
    log_probs = np.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    for row in range(4):
        ends = np.flatnonzero(tokens[row, 1:] == 0)
        length = ends[0] + 1 if len(ends) else 7
        np.testing.assert_allclose(log_probs[row, :length].sum() / length, scores[row], rtol=1e-4)
    dropped = model.captioner.logits(params, pixels, tokens, tokens, dropout_key=jax.random.PRNGKey(0))
    assert np.isfinite(dropped).all()
    with pytest.raises(InputError, match=f"native: knows vit with gpt2, not {pair}"):
        load_model(str(tmp_path / "model"), Options(implementation="native"))


def test_the_flax_class_does_not_recompute_activations(golden_inputs):
    with pytest.raises(InputError, match="--gradient_checkpointing: needs --model_implementation native"):
        load_model(str(golden_inputs / "model"), Options(implementation="transformers", gradient_checkpointing=True))


@pytest.mark.parametrize(("name", "value"), [("num_beams", "x"), ("eos_token_id", 10**6)])
def test_what_a_model_asks_of_a_search_is_checked_for_the_flax_class_too(golden_inputs, tmp_path, name, value):
    folder = Path(shutil.copytree(golden_inputs / "model", tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(InputError, match=rf"generation_config.json: .*{name}"):
        load_model(str(folder), Options(implementation="transformers"))


def test_what_one_implementation_saves_the_other_loads(native, flax_class, tmp_path):
    for saver, loader in ((native, "transformers"), (flax_class, "native")):
        folder = tmp_path / loader
        save_model(saver, randomized(saver.params, 1), folder)
        loaded = load_model(str(folder), Options(implementation=loader))
        jax.tree.map(np.testing.assert_array_equal, loaded.params, randomized(saver.params, 1))


def test_a_shard_outside_of_the_models_folder_is_refused(golden_inputs, tmp_path):
    model = Path(shutil.copytree(golden_inputs / "model", tmp_path / "model"))
    for file in (FLAX_FILE, SAFETENSORS_FILE):
        (model / file).unlink(missing_ok=True)
    (model / FLAX_INDEX).write_text(json.dumps({"weight_map": {"a": "../x.msgpack"}}))
    with pytest.raises(InputError, match=FLAX_INDEX):
        load_model(str(model), Options(implementation="transformers"))
