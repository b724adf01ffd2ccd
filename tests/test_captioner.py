"""The native model's laws: configuration values, one decoder for whole captions and for single tokens, bad input."""

import dataclasses
import json
import re
import shutil
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_beam_search import CHEAP, images, randomized
from transformers import CLIPConfig, DeiTConfig, VisionEncoderDecoderConfig, ViTConfig

from repro.errors import InputError
from repro.models.captioner import looked_up_by_products, normalize
from repro.models.configuration import check_config
from repro.models.gpt2 import start_cache
from repro.models.layers import FEW_ROWS, WIDE, times_transposed
from repro.models.pretrained import Options, Source, create_model, load_model

TOKENS = np.random.default_rng(0).integers(0, 340, (4, 9), dtype=np.int32)
MASK = np.ones_like(TOKENS)


@pytest.fixture(scope="module")
def model(golden_inputs):
    return load_model(str(golden_inputs / "model"))


@pytest.fixture(scope="module")
def logits(model):
    return jax.jit(model.captioner.logits, compiler_options=CHEAP)


def with_decoder(model, **settings):
    """The model's configuration with other values in its decoder's."""
    config = VisionEncoderDecoderConfig.from_dict(model.captioner.config.to_dict())
    for name, value in settings.items():
        setattr(config.decoder, name, value)
    return config


def with_scaled_queries(params, factors, *, width):
    """Params whose queries are multiplied by one factor a layer, in both attentions."""
    params = jax.tree.map(np.array, params)
    for layer, factor in enumerate(factors):
        block = params["decoder"]["transformer"]["h"][str(layer)]
        for leaf in ("kernel", "bias"):
            block["attn"]["c_attn"][leaf][:width] *= factor
            block["crossattention"]["q_attn"][leaf] *= factor
    return params


@pytest.mark.parametrize(
    ("rows", "shape"),
    [(1, (WIDE, WIDE)), (FEW_ROWS, (WIDE + 3, 300)), (FEW_ROWS + 1, (WIDE + 3, 300)), (8, (WIDE - 1, 300))],
)
def test_the_order_of_a_product_does_not_change_it_nor_its_gradients(rows, shape):
    random = np.random.default_rng(rows)
    states, kernel, cotangent = (
        random.normal(size=size).astype(np.float32) for size in ((rows, shape[1]), shape, (rows, shape[0]))
    )
    product, pull = jax.vjp(jax.jit(times_transposed), states, kernel)
    by_states, by_kernel = pull(jnp.asarray(cotangent))
    np.testing.assert_allclose(product, states @ kernel.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(by_states, cotangent @ kernel, rtol=0, atol=1e-4)
    np.testing.assert_allclose(by_kernel, cotangent.T @ states, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"scale_attn_weights": False}, (8**0.5, 8**0.5)),
        ({"scale_attn_by_inverse_layer_idx": True}, (1.0, 0.5)),
        ({"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}, (8**0.5, 8**0.5 / 2)),
        ({"reorder_and_upcast_attn": True}, (1.0, 1.0)),
    ],
)
def test_attention_is_scaled_as_the_configuration_says(model, settings, factors):
    # Heads are 8 wide. FlaxGPT2 does not read these values; PyTorch's GPT-2 does, and test_torch.py compares.
    params, pixels = randomized(model.params, 1), images(1)
    scaled = dataclasses.replace(model.captioner, config=with_decoder(model, **settings))
    ours = scaled.logits(params, pixels, TOKENS, MASK)
    expected = model.captioner.logits(with_scaled_queries(params, factors, width=32), pixels, TOKENS, MASK)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    plain = model.captioner.logits(params, pixels, TOKENS, MASK)
    assert (np.abs(ours - plain).max() > 1e-2) == (settings != {"reorder_and_upcast_attn": True})


def test_token_by_token_the_logits_are_those_of_the_whole_caption(model, logits):
    # The beams swap places at every step; each must go on with its own past.
    captioner, params, pixels, num_beams = model.captioner, randomized(model.params, 2), images(2), 3
    random = np.random.default_rng(3)
    sequences = random.integers(0, 340, (4, num_beams, 9), dtype=np.int32)
    whole = np.stack([logits(params, pixels, sequences[:, beam], MASK) for beam in range(num_beams)], axis=1)
    cache = start_cache(captioner.encode(params, pixels), num_beams=num_beams, max_length=9)
    step = partial(
        captioner.module.apply, {"params": params}, method=lambda module, *of: module.decoder.decode_step(*of)
    )
    step = jax.jit(step, compiler_options=CHEAP)
    places = np.tile(np.arange(num_beams), (4, 1))
    for position in range(9):
        moved = random.permuted(places, axis=1)  # beam b is now at moved[:, b]
        parents, tokens = np.empty_like(places), np.empty((4, num_beams), np.int32)
        np.put_along_axis(parents, moved, places, axis=1)
        np.put_along_axis(tokens, moved, sequences[:, :, position], axis=1)
        found, cache = step(tokens, parents, jnp.int32(position), cache)
        places = moved
        mine = np.take_along_axis(np.asarray(found), places[:, :, None], axis=1)
        np.testing.assert_allclose(mine, whole[:, :, position], rtol=2e-4, atol=2e-4)


def test_an_encoded_image_has_the_logits_of_its_pixels_with_and_without_jit(model):
    captioner, pixels = model.captioner, images(4)
    mask = (np.arange(9) < np.array([9, 1, 5, 7])[:, None]).astype(np.int32)
    compiled = jax.jit(captioner.decode, compiler_options=CHEAP)
    for params, decode in ((randomized(model.params, 4), captioner.decode), (model.params, compiled)):
        decoded = decode(params, captioner.encode(params, pixels), TOKENS, mask)
        logits = captioner.logits(params, pixels, TOKENS, mask)
        np.testing.assert_allclose(decoded, logits, rtol=1e-5, atol=1e-5)


def test_what_a_token_looks_at_is_a_share_of_the_image(model):
    captioner, config = model.captioner, model.captioner.config.encoder
    looks, others = (
        np.asarray(captioner.looks_at(randomized(model.params, seed), images(0), TOKENS)) for seed in (1, 2)
    )
    assert looks.shape == (*TOKENS.shape, (config.image_size // config.patch_size) ** 2)
    assert (looks >= 0).all()
    assert (looks.sum(axis=2) <= 1 + 1e-6).all(), "the class token has the rest"
    assert np.abs(looks - others).max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_params_stay_float32_and_captions_nearly_the_same(golden_inputs, logits, dtype):
    half = load_model(str(golden_inputs / "model"), Options(dtype=dtype))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"float32"}
    found = jax.jit(half.captioner.logits, compiler_options=CHEAP)(half.params, images(0), TOKENS, MASK)
    assert str(found.dtype) == dtype
    exact = logits(half.params, images(0), TOKENS, MASK)
    assert np.abs(found.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpu_s_look_up_by_products_gives_the_table_s_values_bit_for_bit(dtype):
    random = np.random.default_rng(0)
    table = random.standard_normal((256, 3)).astype(np.float32) * 10.0 ** random.integers(-20, 20, (256, 3))
    table = table.astype(np.float32)
    pixels = random.integers(0, 256, (3, 17, 19, 3), dtype=np.uint8)
    wanted = np.asarray(jnp.asarray(table[pixels, np.arange(3)], dtype))
    for found in (normalize(pixels, table, dtype), looked_up_by_products(pixels, jnp.asarray(table, dtype))):
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize(("name", "value"), [("activation_function", "mish"), ("n_head", 5)])
def test_a_configuration_that_is_not_supported_is_refused_with_what_may_know_it(model, name, value):
    with pytest.raises(InputError, match=f"{name} .*{value}.*--model_implementation transformers"):
        check_config(with_decoder(model, **{name: value}))


@pytest.fixture
def folder(golden_inputs, tmp_path):
    """A copy of the golden model, to be changed."""
    return Path(shutil.copytree(golden_inputs / "model", tmp_path / "model"))


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content).replace("Infinity", "1e400"))


def last_token(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[list(vocabulary)[-1]] = 5000


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", lambda content: content.update(size=48), r"48 x 48.*32 x 32.*preprocessor_config"),
        ("config.json", lambda content: content["decoder"].update(vocab_size=339), "340 tokens.*vocabulary 339"),
        ("config.json", lambda content: content["decoder"].update(vocab_size=468), "340 tokens.*vocabulary 468"),
        ("tokenizer.json", last_token, "number 5000, the decoder's vocabulary ends at 339"),
        ("config.json", lambda content: content.update(model_type="vit"), "holds a vit, not a vision-encoder-decoder"),
    ],
)
def test_what_does_not_go_together_or_is_no_whole_model_is_refused(folder, file, change, message):
    edit(folder / file, change)
    with pytest.raises(InputError, match=message):
        load_model(str(folder))


# By file and part of it: values that cannot be, and of what.
CANNOT_BE = {
    ("config.json", "encoder"): [
        (0, "hidden_size num_hidden_layers num_attention_heads patch_size layer_norm_eps"),
        (-1, "patch_size image_size intermediate_size"),
        (1.5, "patch_size hidden_dropout_prob"),
        ("x", "qkv_bias initializer_range hidden_act"),
        (64, "patch_size"),
        (1, "num_channels"),
        (5, "num_attention_heads"),
        ([32, 48], "image_size"),
    ],
    ("config.json", "decoder"): [
        (0, "n_embd n_layer n_head n_positions n_inner"),
        (-0.5, "resid_pdrop embd_pdrop layer_norm_epsilon"),
        (3, "scale_attn_weights activation_function"),
        (5, "n_head"),
        (False, "add_cross_attention"),
        (48, "cross_attention_hidden_size"),
    ],
    ("config.json", None): [
        (-1, "decoder_start_token_id eos_token_id pad_token_id"),
        (340, "decoder_start_token_id eos_token_id pad_token_id"),
        *((ends, "eos_token_id") for ends in ([], [0, 340], [[0]])),
        ([0], "pad_token_id"),
    ],
    ("preprocessor_config.json", None): [
        *((value, "resample") for value in ("x", 17, -1, 1e400)),
        *((value, "image_mean") for value in ([0.5, 0.5], "x", [0.5, None, 1], [1e400])),
        *((value, "image_std") for value in ([0.5, 0.5, 0], 0, [0.5, 0.5])),
        *((value, "rescale_factor") for value in (-1, "x", 1e400)),
        *((value, "size") for value in (0, "x", {"height": -1, "width": 32})),
        (True, "do_center_crop do_pad"),
    ],
    ("generation_config.json", None): [
        (0, "num_beams max_length max_new_tokens"),
        ("x", "num_beams length_penalty early_stopping"),
        (1e400, "length_penalty"),
        *((ends, "eos_token_id") for ends in (-1, 340, [0, 340])),
        (-1, "min_length no_repeat_ngram_size repetition_penalty"),
    ],
}


@pytest.mark.parametrize(
    ("file", "part", "name", "value"),
    [(*place, name, value) for place, cases in CANNOT_BE.items() for value, names in cases for name in names.split()],
)
def test_a_value_that_cannot_be_is_refused_by_name_before_anything_is_compiled(
    folder, monkeypatch, file, part, name, value
):
    edit(folder / file, lambda content: (content[part] if part else content).update({name: value}))
    monkeypatch.setattr(jax, "jit", lambda *_: pytest.fail("it compiles"))
    named = name.removeprefix("image_").partition("_")[0]
    with pytest.raises(InputError, match=rf"(?s){re.escape(str(folder))}.*{named}"):
        load_model(str(folder))


FILES = ("config.json", "tokenizer.json", "generation_config.json", "preprocessor_config.json")
CONTENTS = (b"", b"[]", b"null", b"\xff", b"{}", b"[" * 50_000, "zeros", "half")


@pytest.mark.parametrize(("file", "content"), [*product(FILES, CONTENTS), ("config.json", b'{"encoder": []}')])
def test_a_file_that_is_cut_or_of_another_form_is_named(folder, file, content):
    whole = (folder / file).read_bytes()
    damaged = {"zeros": bytes(len(whole)), "half": whole[: len(whole) // 2]}
    (folder / file).write_bytes(damaged.get(content, content))
    if (file, content) == ("generation_config.json", b"{}"):  # every value is then transformers' own
        load_model(str(folder))
        return
    with pytest.raises(InputError, match=re.escape(str(folder))):
        load_model(str(folder))


def test_a_tokenizer_that_transformers_5_saved_is_read_by_4_too(folder, model):
    def as_5_24_writes_it(content):
        content |= {"backend": "tokenizers", "is_local": True, "tokenizer_class": "TokenizersBackend"}
        for name in ("added_tokens_decoder", "clean_up_tokenization_spaces", "extra_special_tokens"):
            content.pop(name, None)

    edit(folder / "tokenizer_config.json", as_5_24_writes_it)
    found, expected = load_model(str(folder)).tokenizer, model.tokenizer
    for text in ("a dog on the beach", " two  dogs<|endoftext|>"):
        assert found(text).input_ids == expected(text).input_ids
    assert (found.eos_token, found.bos_token) == (expected.eos_token, expected.bos_token)


@pytest.mark.parametrize(
    ("half", "kind", "config"),
    [("encoder", "deit", DeiTConfig()), ("encoder", "clip", CLIPConfig()), ("decoder", "vit", ViTConfig())],
)
def test_a_half_that_is_not_supported_is_named_with_those_that_are(golden_inputs, model, tmp_path, half, kind, config):
    whole = model.captioner.config
    for name, part in ({"encoder": whole.encoder, "decoder": whole.decoder} | {half: config}).items():
        shutil.copytree(golden_inputs / "model", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(part.to_dict()))
    with pytest.raises(InputError, match=f"{half}: {kind} is not supported, only (vit|gpt2), .*those but vit and gpt2"):
        create_model(*(Source(None, str(tmp_path / name)) for name in ("encoder", "decoder")))
