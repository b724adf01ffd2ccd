"""The native model's laws: configuration values, one decoder for whole captions and for single tokens, bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_beam_search import CHEAP, images, randomized
from transformers import (
    CLIPConfig,
    DeiTConfig,
    SwinConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    ViTConfig,
)

from repro.errors import InputError
from repro.models.captioner import VisionEncoderDecoder, looked_up_by_products, normalize
from repro.models.configuration import check_config
from repro.models.gpt2 import start_cache
from repro.models.layers import FEW_ROWS, WIDE, times_transposed
from repro.models.pretrained import Options, Source, create_model, load_model
from repro.training.losses import row_losses

TOKENS = np.random.default_rng(0).integers(0, 340, (4, 9), dtype=np.int32)
MASK = np.ones_like(TOKENS)


@pytest.fixture(scope="module")
def model(golden_inputs):
    return load_model(str(golden_inputs / "model"))


def with_decoder(model, **settings):
    """The model's captioner with other values in its decoder's configuration."""
    config = VisionEncoderDecoderConfig.from_dict(model.captioner.config.to_dict())
    for name, value in settings.items():
        setattr(config.decoder, name, value)
    return dataclasses.replace(model.captioner, config=config)


def with_scaled_queries(params, factors, *, width: int):
    """Params whose queries are multiplied by one factor a layer, in both attentions."""
    params = jax.tree.map(np.array, params)
    for layer, factor in enumerate(factors):
        block = params["decoder"]["transformer"]["h"][str(layer)]
        for leaf in ("kernel", "bias"):
            block["attn"]["c_attn"][leaf][:width] *= factor
            block["crossattention"]["q_attn"][leaf] *= factor
    return params


@pytest.mark.parametrize("rows", [1, 8, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("shape", [(WIDE, WIDE), (WIDE + 3, 300), (WIDE - 1, 300)])
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
    ours = with_decoder(model, **settings).logits(params, pixels, TOKENS, MASK)
    expected = model.captioner.logits(with_scaled_queries(params, factors, width=32), pixels, TOKENS, MASK)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    plain = model.captioner.logits(params, pixels, TOKENS, MASK)
    assert (np.abs(ours - plain).max() > 1e-2) == (settings != {"reorder_and_upcast_attn": True})


@pytest.mark.parametrize("num_beams", [1, 3])
def test_token_by_token_the_logits_are_those_of_the_whole_caption(model, num_beams):
    # The beams swap places at every step; each must go on with its own past.
    module: VisionEncoderDecoder = model.captioner.module
    params, pixels = randomized(model.params, 2), images(2)
    random = np.random.default_rng(3)
    sequences = random.integers(0, 340, (4, num_beams, 9), dtype=np.int32)
    normalized = jnp.asarray(model.captioner.pixel_table)[pixels.astype(np.int32), np.arange(3)]
    apply = partial(module.apply, {"params": params})
    cache = start_cache(apply(normalized, method="encode"), num_beams=num_beams, max_length=9)
    place = np.tile(np.arange(num_beams), (4, 1))
    step = jax.jit(
        partial(apply, method=lambda module, *inputs: module.decoder.decode_step(*inputs)), compiler_options=CHEAP
    )
    for position in range(9):
        moved = np.stack([random.permutation(num_beams) for _ in range(4)])  # beam b is now at moved[b]
        parents, following = np.empty_like(place), np.empty_like(place)
        for row in range(4):
            for beam in range(num_beams):
                parents[row, moved[row, beam]] = place[row, beam]
                following[row, beam] = moved[row, beam]
        place = following
        tokens = np.empty((4, num_beams), np.int32)
        np.put_along_axis(tokens, place, sequences[:, :, position], axis=1)
        logits, cache = step(tokens, parents, jnp.int32(position), cache)
        for beam in range(num_beams):
            whole = model.captioner.logits(params, pixels, sequences[:, beam], MASK)[:, position]
            mine = np.take_along_axis(np.asarray(logits), place[:, beam, None, None], axis=1)[:, 0]
            np.testing.assert_allclose(mine, whole, rtol=2e-4, atol=2e-4)


def test_a_caption_of_an_encoded_image_has_the_logits_of_a_caption_of_its_pixels(model):
    params, pixels = randomized(model.params, 4), images(4)
    mask = (np.arange(9) < np.array([9, 1, 5, 7])[:, None]).astype(np.int32)
    decoded = model.captioner.decode(params, model.captioner.encode(params, pixels), TOKENS, mask)
    np.testing.assert_allclose(decoded, model.captioner.logits(params, pixels, TOKENS, mask), rtol=1e-5, atol=1e-5)


def test_what_a_token_looks_at_is_a_share_of_the_image(model):
    captioner, looks = with_decoder(model), []
    for seed in (1, 2):
        looks.append(np.asarray(captioner.looks_at(randomized(captioner.init(seed), seed), images(0), TOKENS)))
    config = captioner.config.encoder
    assert looks[0].shape == (*TOKENS.shape, (config.image_size // config.patch_size) ** 2)
    assert (looks[0] >= 0).all()
    assert (looks[0].sum(axis=2) <= 1 + 1e-6).all(), "the class token has the rest"
    assert np.abs(looks[0] - looks[1]).max() > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_keeps_one_array_as_large_as_the_logits(smoothing):
    shape = (2, 8, 200_000)
    labels = np.ones(shape[:2], np.int32)

    def loss(logits):
        sums, counts = row_losses(logits, labels, np.ones_like(labels), label_smoothing=smoothing)
        return sums.sum() / counts.sum()

    _, backward = jax.vjp(loss, jnp.ones(shape))
    assert [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.size >= shape[-1]] == [shape]
    # From features to the gradient of a kernel: the logits and, for a moment, their gradient; no target, no softmax.
    features = np.ones((*shape[:2], 4), np.float32)
    gradient = jax.jit(jax.grad(lambda kernel: loss(features @ kernel)))
    memory = gradient.lower(np.ones((4, shape[-1]), np.float32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.1 * 4 * np.prod(shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_params_stay_float32_and_captions_nearly_the_same(golden_inputs, model, dtype):
    half = load_model(str(golden_inputs / "model"), Options(dtype=dtype))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"float32"}
    logits = half.captioner.logits(half.params, images(0), TOKENS, MASK)
    assert str(logits.dtype) == dtype
    exact = model.captioner.logits(model.params, images(0), TOKENS, MASK)
    assert np.abs(logits.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("half", "name", "value"),
    [
        ("encoder", "hidden_act", "gelu_fast"),
        ("decoder", "activation_function", "mish"),
        ("encoder", "num_channels", 1),
        ("encoder", "image_size", [32, 48]),
        ("encoder", "num_attention_heads", 5),
        ("decoder", "n_head", 5),
        ("decoder", "add_cross_attention", False),
        ("decoder", "cross_attention_hidden_size", 48),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused_by_name(model, half, name, value):
    config = VisionEncoderDecoderConfig.from_dict(model.captioner.config.to_dict())
    setattr(getattr(config, half), name, value)
    with pytest.raises(InputError, match=f"{name} .*{str(value)[:4].strip('[')}.*--model_implementation transformers"):
        check_config(config)


def edited(golden_inputs: Path, folder: Path, file: str, change) -> str:
    """A copy of the golden model with one JSON file changed."""
    shutil.copytree(golden_inputs / "model", folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return str(folder)


def test_an_image_size_that_the_positions_do_not_have_is_refused(golden_inputs, tmp_path):
    path = edited(
        golden_inputs,
        tmp_path / "model",
        "preprocessor_config.json",
        lambda content: content.update(size={"height": 48, "width": 48}),
    )
    with pytest.raises(InputError, match=r"48 x 48 pixels.*32 x 32.*preprocessor_config\.json"):
        load_model(path)


@pytest.mark.parametrize("vocab_size", [339, 340 + 128])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(golden_inputs, tmp_path, vocab_size):
    path = edited(
        golden_inputs,
        tmp_path / "model",
        "config.json",
        lambda content: content["decoder"].update(vocab_size=vocab_size),
    )
    with pytest.raises(InputError, match=f"340 tokens.*vocabulary {vocab_size}"):
        load_model(path)


@pytest.mark.parametrize("content", ["[]", "3", '{"encoder": []}'])
def test_a_configuration_of_another_form_is_named(golden_inputs, tmp_path, content):
    path = edited(golden_inputs, tmp_path / "model", "config.json", lambda content: None)
    Path(path, "config.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_model(path)


CANNOT_BE = [
    *(("config.json", "encoder", name, 0) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")),
    *(("config.json", "encoder", name, -1) for name in ("patch_size", "image_size", "intermediate_size")),
    *(("config.json", "encoder", name, 0) for name in ("patch_size", "layer_norm_eps")),
    *(("config.json", "encoder", name, 1.5) for name in ("patch_size", "hidden_dropout_prob")),
    *(("config.json", "encoder", name, "x") for name in ("qkv_bias", "initializer_range", "hidden_act")),
    ("config.json", "encoder", "patch_size", 64),
    *(("config.json", "decoder", name, 0) for name in ("n_embd", "n_layer", "n_head", "n_positions", "n_inner")),
    *(("config.json", "decoder", name, -0.5) for name in ("resid_pdrop", "embd_pdrop", "layer_norm_epsilon")),
    *(("config.json", "decoder", name, 3) for name in ("scale_attn_weights", "activation_function")),
    *(("config.json", None, f"{name}_id", -1) for name in ("decoder_start_token", "eos_token", "pad_token")),
    *(("config.json", None, f"{name}_id", 340) for name in ("decoder_start_token", "eos_token", "pad_token")),
    *(("config.json", None, "eos_token_id", ends) for ends in ([], [0, 340], [[0]])),
    ("config.json", None, "pad_token_id", [0]),
    *(("preprocessor_config.json", None, "resample", value) for value in ("x", 17, -1, 1e400)),
    *(("preprocessor_config.json", None, "image_mean", value) for value in ([0.5, 0.5], "x", [0.5, None, 1], [1e400])),
    *(("preprocessor_config.json", None, "image_std", value) for value in ([0.5, 0.5, 0], 0, [0.5, 0.5])),
    *(("preprocessor_config.json", None, "rescale_factor", value) for value in (-1, "x", 1e400)),
    *(("preprocessor_config.json", None, "size", value) for value in (0, "x", {"height": -1, "width": 32})),
    *(("preprocessor_config.json", None, name, True) for name in ("do_center_crop", "do_pad")),
    *(("generation_config.json", None, name, 0) for name in ("num_beams", "max_length", "max_new_tokens")),
    *(("generation_config.json", None, name, "x") for name in ("num_beams", "length_penalty", "early_stopping")),
    ("generation_config.json", None, "length_penalty", 1e400),
    *(("generation_config.json", None, "eos_token_id", ends) for ends in (-1, 340, [0, 340])),
    *(
        ("generation_config.json", None, name, -1)
        for name in ("min_length", "no_repeat_ngram_size", "repetition_penalty")
    ),
]


@pytest.mark.parametrize(("file", "part", "name", "value"), CANNOT_BE)
def test_a_value_that_cannot_be_is_refused_by_name_before_anything_is_compiled(
    golden_inputs, tmp_path, monkeypatch, file, part, name, value
):
    path = edited(golden_inputs, tmp_path / "model", file, lambda content: None)
    content = json.loads(Path(path, file).read_text())
    (content[part] if part else content)[name] = value
    Path(path, file).write_text(json.dumps(content).replace("Infinity", "1e400"))
    monkeypatch.setattr(jax, "jit", lambda *_: pytest.fail("it compiles"))
    with pytest.raises(InputError, match=rf"(?s){re.escape(path)}.*{name.removeprefix('image_').partition('_')[0]}"):
        load_model(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b"\xff", b"{}", b"[" * 50_000, None, 0.3, 0.7])
@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "preprocessor_config.json"])
def test_a_file_that_is_cut_or_of_another_form_is_named(golden_inputs, tmp_path, file, content):
    path = edited(golden_inputs, tmp_path / "model", file, lambda content: None)
    whole = Path(path, file).read_bytes()
    content = bytes(len(whole)) if content is None else content
    Path(path, file).write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content)
    if (file, content) == ("generation_config.json", b"{}"):  # every value is then transformers' own
        load_model(path)
        return
    with pytest.raises(InputError, match=re.escape(path)):
        load_model(path)


def test_a_tokenizer_with_tokens_beyond_the_vocabulary_is_refused(golden_inputs, tmp_path):
    def edit(content) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary[list(vocabulary)[-1]] = 5000

    with pytest.raises(InputError, match="number 5000, the decoder's vocabulary ends at 339"):
        load_model(edited(golden_inputs, tmp_path / "model", "tokenizer.json", edit))


def test_a_tokenizer_that_transformers_5_saved_is_read_by_4_too(golden_inputs, tmp_path):
    def edit(content) -> None:  # as 5.24 writes it
        content |= {"backend": "tokenizers", "is_local": True, "tokenizer_class": "TokenizersBackend"}
        for name in ("added_tokens_decoder", "clean_up_tokenization_spaces", "extra_special_tokens"):
            content.pop(name, None)

    found = load_model(edited(golden_inputs, tmp_path / "model", "tokenizer_config.json", edit)).tokenizer
    expected = load_model(str(golden_inputs / "model")).tokenizer
    for text in ("a dog on the beach", " two  dogs<|endoftext|>"):
        assert found(text).input_ids == expected(text).input_ids
    assert (found.eos_token, found.bos_token) == (expected.eos_token, expected.bos_token)


HALVES = {
    "deit": ("encoder", DeiTConfig()),
    "swin": ("encoder", SwinConfig()),
    "clip": ("encoder", CLIPConfig()),
    "trocr": ("decoder", TrOCRConfig()),
    "vit": ("decoder", ViTConfig()),
}


@pytest.mark.parametrize("kind", HALVES)
def test_a_half_that_is_not_supported_is_named_with_those_that_are(golden_inputs, tmp_path, kind):
    half, config = HALVES[kind]
    whole = Path(golden_inputs, "model")
    for name, part in ((half, config), *load_model(str(whole)).captioner.config.to_dict().items()):
        if name in ("encoder", "decoder") and not (tmp_path / name).exists():
            shutil.copytree(whole, tmp_path / name)
            content = part if isinstance(part, dict) else part.to_dict()
            (tmp_path / name / "config.json").write_text(json.dumps(content))
    sources = [Source(None, str(tmp_path / name)) for name in ("encoder", "decoder")]
    with pytest.raises(InputError, match=f"{half}: {kind} is not supported, only (vit|gpt2), .*those but vit and gpt2"):
        create_model(*sources)


def test_a_half_in_the_place_of_a_whole_model_is_named(golden_inputs, tmp_path):
    shutil.copytree(golden_inputs / "model", tmp_path / "vit")
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="holds a vit, not a vision-encoder-decoder"):
        load_model(str(tmp_path / "vit"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpu_s_look_up_by_products_gives_the_table_s_values_bit_for_bit(dtype):
    random = np.random.default_rng(0)
    table = random.standard_normal((256, 3)).astype(np.float32) * 10.0 ** random.integers(-20, 20, (256, 3))
    table = table.astype(np.float32)
    pixels = random.integers(0, 256, (3, 17, 19, 3), dtype=np.uint8)
    pixels[0, 0, : len(pixels[0, 0])] = np.arange(19)[:, None]
    wanted = np.asarray(jnp.asarray(table[pixels, np.arange(3)], dtype))
    for found in (normalize(pixels, table, dtype), looked_up_by_products(pixels, jnp.asarray(table, dtype))):
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), wanted.view(np.uint8))
