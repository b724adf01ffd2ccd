"""Every format and naming of weights, of whole models and of halves, and what is refused."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from repro import Captioner
from repro.__main__ import main
from repro.errors import InputError
from repro.models.pretrained import load_model, save_model
from repro.models.weights import (
    DECODER,
    ENCODER,
    FLAX_FILE,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    WHOLE,
    flatten,
    load_weights,
    save_weights,
)


@pytest.fixture(scope="module")
def model(golden_inputs):
    return load_model(str(golden_inputs / "model"))


@pytest.fixture(scope="module")
def initial(model):
    """The weights that a file may lack."""
    return model.captioner.init(5)


@pytest.fixture(scope="module")
def state(model, tmp_path_factory):
    """The golden model as PyTorch names it."""
    folder = tmp_path_factory.mktemp("state")
    save_weights(model.params, folder)
    return load_file(folder / SAFETENSORS_FILE)


def without(tree, *names):
    return {name: part for name, part in tree.items() if name not in names}


def write_flax(folder, tree):
    (folder / FLAX_FILE).write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, tree)))


@pytest.fixture
def load(initial, tmp_path):
    """Loads what a test has written."""
    return lambda holds=WHOLE, **options: load_weights(str(tmp_path), lambda: initial, holds=holds, **options)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_pytorch_files_of_whole_models_are_read_with_buffers_and_tied_head(load, model, state, tmp_path):
    older = {
        "decoder.transformer.h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8),
        "decoder.transformer.h.0.attn.masked_bias": np.asarray(-1e4, np.float32),
        "decoder.lm_head.weight": state["decoder.transformer.wte.weight"],
    }
    save_file(state | older, tmp_path / SAFETENSORS_FILE)
    assert_same(load(), (model.params, []))


def test_sharded_files_are_read_and_a_missing_part_is_named(load, model, state, tmp_path):
    names = sorted(state)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (tmp_path / SAFETENSORS_INDEX).write_text(json.dumps(index))
    assert_same(load(), (model.params, []))
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"names part-2\.safetensors, which is not there"):
        load()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": {', '{"weight_map": ["part"]}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_a_damaged_index_is_named(load, tmp_path, content):
    (tmp_path / SAFETENSORS_INDEX).write_text(content)
    with pytest.raises(InputError, match=r"index\.json: "):
        load()


@pytest.mark.parametrize("file", [SAFETENSORS_FILE, FLAX_FILE])
def test_a_damaged_file_is_named(load, model, tmp_path, file):
    save_weights(model.params, tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{re.escape(file)}: is damaged"):
        load()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_become_float32(load, model, state, tmp_path, dtype):
    half = {name: array.astype(jax.numpy.dtype(dtype)) for name, array in state.items()}
    save_file(half, tmp_path / SAFETENSORS_FILE)
    params, _ = load()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    scales = (tree["encoder"]["layernorm"]["scale"] for tree in (params, model.params))
    np.testing.assert_allclose(*scales, rtol=1e-2)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("form", ["safetensors", "msgpack"])
def test_encoders_are_read_with_and_without_their_name_head_and_pooler(load, initial, model, tmp_path, form, named):
    tree = encoder = model.params["encoder"]
    if named:  # as an image classifier has it, which has no pooler
        tree = {"vit": without(encoder, "pooler"), "classifier": {"kernel": np.ones((48, 10), np.float32)}}
    save_weights(tree, tmp_path)
    params, random = load(ENCODER, form=form)
    pooler = (initial if named else model.params)["encoder"]["pooler"]
    assert_same(params, {"encoder": {**encoder, "pooler": pooler}})
    assert random == (["encoder.pooler.dense.bias", "encoder.pooler.dense.kernel"] if named else [])


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("form", ["safetensors", "msgpack"])
def test_decoders_are_read_with_and_without_their_name_and_get_cross_attention(
    load, initial, model, tmp_path, form, named
):
    tree = dict(model.params["decoder"]["transformer"])
    tree["h"] = {number: without(block, "crossattention", "ln_cross_attn") for number, block in tree["h"].items()}
    if named:
        tree = {"transformer": tree, "lm_head": {"kernel": np.ones((32, 340), np.float32)}}
    save_weights(tree, tmp_path)
    params, random = load(DECODER, form=form)
    ours, drawn = flatten(params), flatten(initial)
    assert len(random) == 2 * 8
    for name, array in flatten({"decoder": model.params["decoder"]}).items():
        np.testing.assert_array_equal(ours[name], drawn[name] if name in random else array)
        assert (name in random) == ("cross" in name)


DO_NOT_FIT = {
    "1 missing: encoder.layernorm.bias (48,)": {"encoder.layernorm.bias": None},
    "1 unexpected: encoder.layernorm.gain (3,)": {"encoder.layernorm.gain": np.ones(3, np.float32)},
    "1 of another shape: decoder.transformer.wpe.embedding (80, 32) instead of (64, 32)": {
        "decoder.transformer.wpe.weight": np.ones((80, 32), np.float32)
    },
    "1 not finite: encoder.layernorm.bias (48,)": {"encoder.layernorm.bias": np.full(48, np.nan, np.float32)},
}


@pytest.mark.parametrize("message", DO_NOT_FIT)
def test_weights_that_do_not_fit_are_listed_with_their_shapes(load, state, tmp_path, message):
    broken = {name: array for name, array in (state | DO_NOT_FIT[message]).items() if array is not None}
    save_file(broken, tmp_path / SAFETENSORS_FILE)
    with pytest.raises(InputError, match=re.escape(message)):
        load()


def test_of_many_weights_some_are_listed_and_the_rest_counted(load, state, tmp_path):
    save_file({name: array for name, array in state.items() if "cross" in name}, tmp_path / SAFETENSORS_FILE)
    with pytest.raises(InputError, match=r"missing: .* and \d+ more"):
        load()


def test_without_pytorch_a_pickle_is_not_read(load, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: a pickle can run code.*install torch, or save"):
        load()


def test_a_saved_tokenizer_keeps_nothing_of_the_calls_before(golden_inputs, tmp_path):
    loaded, saved = load_model(str(golden_inputs / "model")), []
    for _ in range(2):
        save_model(loaded, loaded.params, tmp_path)
        saved.append((tmp_path / "tokenizer.json").read_bytes())
        loaded.tokenizer(["a long caption"], padding="max_length", max_length=7, truncation=True)
    assert saved[0] == saved[1]


def grown(params):
    return jax.tree.map(lambda leaf: leaf + np.float32(1), params)


@pytest.mark.parametrize("holds", [WHOLE, ENCODER])
def test_formats_that_differ_are_named_and_one_may_be_chosen(load, model, tmp_path, holds):
    params = model.params["encoder"] if holds else model.params
    save_weights(grown(params), tmp_path)
    write_flax(tmp_path, params)
    with pytest.raises(InputError, match=r"flax_model.msgpack: and model.safetensors hold different weights \(\d+ of"):
        load(holds)
    for form, expected in (("msgpack", params), ("safetensors", grown(params))):
        found, _ = load(holds, form=form)
        assert_same(found, {"encoder": expected} if holds else expected)


def test_weights_that_only_the_second_format_has_are_named(load, model, tmp_path):
    save_weights(model.params, tmp_path)
    write_flax(tmp_path, {**model.params, "encoder": without(model.params["encoder"], "pooler")})
    with pytest.raises(InputError, match=r"hold different weights \(2 of \d+, such as encoder.pooler.dense.bias"):
        load()


def test_weights_that_are_not_finite_in_both_formats_are_named_as_that(load, model, tmp_path):
    save_weights(jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), model.params), tmp_path)
    with pytest.raises(InputError, match=r"\d+ not finite"):
        load()


def test_a_model_trained_on_elsewhere_is_exported_by_its_format_in_both_and_over_nothing(model, tmp_path, capsys):
    source, target = tmp_path / "model", tmp_path / "new"
    save_model(model, later := grown(model.params), source)
    write_flax(source, model.params)
    command = ["export", "--model_name_or_path", str(source), "--output_dir", str(target)]
    assert main(command) == 2
    assert "--weights_format msgpack or safetensors" in capsys.readouterr().err
    command += ["--weights_format", "safetensors"]
    assert main(command) == 0
    named = {FLAX_FILE, SAFETENSORS_FILE, "config.json", "generation_config.json", "tokenizer.json"}
    assert named <= {path.name for path in target.iterdir()}
    assert_same(load_model(str(target)).params, later)
    written = load_file(target / SAFETENSORS_FILE)
    assert written["decoder.transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert written["encoder.embeddings.patch_embeddings.projection.weight"].shape == (48, 3, 8, 8)
    assert "decoder.lm_head.weight" not in written
    assert main(command) == 2
    assert main(command[:3]) == 2
    assert "the following arguments are required: --output_dir." in capsys.readouterr().err
    for form, params in (("msgpack", model.params), ("safetensors", later)):
        assert_same(Captioner.from_pretrained(source, weights_format=form).pretrained.params, params)
