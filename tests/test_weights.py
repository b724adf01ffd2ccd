"""Every format and naming of weights, of whole models and of halves, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from repro import Captioner
from repro.__main__ import main
from repro.errors import InputError
from repro.models.pretrained import load_model, save_model
from repro.models.weights import (
    DECODER,
    ENCODER,
    FROM_TORCH,
    TO_TORCH,
    WHOLE,
    flatten,
    load_weights,
    other_layout,
    save_weights,
)


@pytest.fixture(scope="module")
def model(golden_inputs):
    return load_model(str(golden_inputs / "model"))


@pytest.fixture(scope="module")
def state(model) -> dict[str, np.ndarray]:
    """The golden model as PyTorch names it, with GPT-2's buffers and the tied head, as older files have them."""
    folder_state = {}
    for name, array in flatten(model.params).items():
        torch_name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
        folder_state[torch_name] = np.ascontiguousarray(other_layout(name, np.asarray(array), TO_TORCH))
    return folder_state


BUFFERS = {"attn.bias": np.ones((1, 1, 64, 64), np.uint8), "attn.masked_bias": np.asarray(-1e4, np.float32)}


def with_buffers(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return state | {f"{prefix}h.0.{name}": array for name, array in BUFFERS.items()}


def load(folder: Path, model, holds: str = WHOLE):
    return load_weights(str(folder), lambda: model.captioner.init(5), holds=holds)


def assert_same(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@given(st.sampled_from(["a.kernel", "a.scale", "a.bias"]), st.sampled_from([(3,), (3, 4), (2, 2, 3, 5)]))
def test_layouts_are_each_others_inverse(name, shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(other_layout(name, other_layout(name, array, TO_TORCH), FROM_TORCH), array)


def test_a_saved_model_is_read_back_from_either_format(model, tmp_path):
    save_model(model, model.params, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.stat().st_size > 100_000) == [
        "flax_model.msgpack",
        "model.safetensors",
    ]
    assert_same(load_model(str(tmp_path)).params, model.params)
    (tmp_path / "flax_model.msgpack").unlink()
    assert_same(load_model(str(tmp_path)).params, model.params)


def test_pytorch_files_of_whole_models_are_read_with_buffers_and_tied_head(model, state, tmp_path):
    head = {"decoder.lm_head.weight": state["decoder.transformer.wte.weight"]}
    save_file(with_buffers(state | head, "decoder.transformer."), tmp_path / "model.safetensors")
    assert_same(load(tmp_path, model), (model.params, []))


def test_sharded_files_are_read_and_a_missing_part_is_named(model, state, tmp_path):
    names = sorted(state)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load(tmp_path, model), (model.params, []))
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"names part-2\.safetensors, which is not there"):
        load(tmp_path, model)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": ["part"]}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_damaged_index_is_named(model, tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json: "):
        load(tmp_path, model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_become_float32(model, state, tmp_path, dtype):
    save_file(
        {name: array.astype(jax.numpy.dtype(dtype)) for name, array in state.items()}, tmp_path / "model.safetensors"
    )
    params, _ = load(tmp_path, model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(
        params["encoder"]["layernorm"]["scale"], model.params["encoder"]["layernorm"]["scale"], rtol=1e-2
    )


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("file", ["model.safetensors", "flax_model.msgpack"])
def test_encoders_are_read_with_and_without_their_name_head_and_pooler(model, state, tmp_path, file, named):
    inner = {name.removeprefix(ENCODER): array for name, array in state.items() if name.startswith(ENCODER)}
    tree = dict(model.params["encoder"])
    if named:  # as an image classifier has it, which has no pooler
        tree.pop("pooler")
        tree = {"vit": tree, "classifier": {"kernel": np.ones((48, 10), np.float32)}}
        inner = {f"vit.{name}": array for name, array in inner.items() if not name.startswith("pooler")}
        inner |= {"classifier.weight": np.ones((10, 48), np.float32)}
    if file == "model.safetensors":
        save_file(inner, tmp_path / file)
    else:
        (tmp_path / file).write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, tree)))
    params, random = load(tmp_path, model, ENCODER)
    expected = dict(model.params["encoder"])
    if named:
        expected["pooler"] = model.captioner.init(5)["pooler"] if "pooler" in params else params["encoder"]["pooler"]
    assert_same(params, {"encoder": expected})
    assert random == (["encoder.pooler.dense.bias", "encoder.pooler.dense.kernel"] if named else [])


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("file", ["model.safetensors", "flax_model.msgpack"])
def test_decoders_are_read_with_and_without_their_name_and_get_cross_attention(model, state, tmp_path, file, named):
    prefix = "decoder.transformer."
    inner = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    inner = with_buffers({name: array for name, array in inner.items() if "cross" not in name}, "")
    tree = {
        **model.params["decoder"]["transformer"],
        "h": {
            number: {name: leaf for name, leaf in block.items() if "cross" not in name}
            for number, block in model.params["decoder"]["transformer"]["h"].items()
        },
    }
    if named:
        inner = {f"transformer.{name}": array for name, array in inner.items()}
        inner |= {"lm_head.weight": np.ones((340, 32), np.float32)}
        tree = {"transformer": tree}
    if file == "model.safetensors":
        save_file(inner, tmp_path / file)
    else:
        (tmp_path / file).write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, tree)))
    params, random = load(tmp_path, model, DECODER)
    ours, drawn = flatten(params), flatten(model.captioner.init(5))
    assert len(random) == 2 * 8
    for name, array in flatten({"decoder": model.params["decoder"]}).items():
        np.testing.assert_array_equal(ours[name], drawn[name] if name in random else array)
        assert (name in random) == ("cross" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("encoder.layernorm.bias"),
            r"1 missing: encoder\.layernorm\.bias \(48,\)",
        ),
        (
            lambda state: state.update({"encoder.layernorm.gain": np.ones(3, np.float32)}),
            r"1 unexpected: encoder\.layernorm\.gain \(3,\)",
        ),
        (
            lambda state: state.update({"decoder.transformer.wpe.weight": np.ones((80, 32), np.float32)}),
            r"1 of another shape: decoder\.transformer\.wpe\.embedding \(80, 32\) instead of \(64, 32\)",
        ),
        (
            lambda state: state.update({"encoder.layernorm.bias": np.full(48, np.nan, np.float32)}),
            r"1 not finite: encoder\.layernorm\.bias \(48,\)",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if ".wte." not in name and "cross" not in name],
            r"missing: .* and \d+ more",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed_with_their_shapes(model, state, tmp_path, change, message):
    broken = dict(state)
    change(broken)
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load(tmp_path, model)


@pytest.mark.parametrize("file", ["model.safetensors", "flax_model.msgpack", "model.safetensors.index.json"])
def test_a_damaged_file_is_named(model, tmp_path, file):
    save_weights(model.params, tmp_path)
    whole = tmp_path / file
    content = whole.read_bytes() if whole.exists() else b'{"weight_map": {'
    for other in tmp_path.iterdir():
        other.unlink()
    whole.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{re.escape(file)}: is damaged"):
        load(tmp_path, model)


def test_without_pytorch_a_pickle_is_not_read(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: a pickle can run code.*install torch, or save"):
        load(tmp_path, model)


def test_a_saved_tokenizer_keeps_nothing_of_the_calls_before(golden_inputs, tmp_path):
    saved = []
    for number in range(2):
        loaded = load_model(str(golden_inputs / "model"))
        if number:
            loaded.tokenizer(["a long caption"], padding="max_length", max_length=7, truncation=True)
        save_model(loaded, loaded.params, tmp_path / str(number))
        saved.append((tmp_path / str(number) / "tokenizer.json").read_bytes())
    assert saved[0] == saved[1]


def test_export_writes_both_formats_and_overwrites_nothing(golden_inputs, model, tmp_path, capsys):
    target = tmp_path / "exported"
    flags = ["export", "--model_name_or_path", str(golden_inputs / "model"), "--output_dir", str(target)]
    assert main(flags) == 0
    assert {"flax_model.msgpack", "model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in target.iterdir()
    }
    assert_same(load_model(str(target)).params, model.params)
    state = load_file(target / "model.safetensors")
    assert state["decoder.transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert "decoder.lm_head.weight" not in state
    assert main(flags) == 2
    assert main(flags[:3]) == 2
    assert "the following arguments are required: --output_dir." in capsys.readouterr().err


def grown(params):
    return jax.tree.map(lambda leaf: leaf + np.float32(1), params)


@pytest.mark.parametrize("holds", [WHOLE, ENCODER])
def test_formats_that_differ_are_named_and_one_may_be_chosen(model, tmp_path, holds):
    params = model.params["encoder"] if holds else model.params
    save_weights(grown(params), tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(params))
    with pytest.raises(InputError, match=r"flax_model.msgpack: and model.safetensors hold different weights \(\d+ of"):
        load(tmp_path, model, holds)
    for form, expected in (("msgpack", params), ("safetensors", grown(params))):
        found, _ = load_weights(str(tmp_path), lambda: model.captioner.init(5), holds=holds, form=form)
        assert_same(found, {"encoder": expected} if holds else expected)


def test_weights_that_only_the_second_format_has_are_named(model, tmp_path):
    save_weights(model.params, tmp_path)
    lacking = jax.tree.map(lambda leaf: leaf, model.params)
    del lacking["encoder"]["pooler"]
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(lacking))
    with pytest.raises(InputError, match=r"hold different weights \(2 of \d+, such as encoder.pooler.dense.bias"):
        load(tmp_path, model)


def test_a_model_trained_on_elsewhere_is_exported_by_its_format(model, tmp_path, capsys):
    save_model(model, model.params, tmp_path / "model")
    save_model(model, later := grown(model.params), tmp_path / "later")
    (tmp_path / "later" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    command = ["export", "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "new")]
    assert main(command) == 2
    assert "--weights_format msgpack or safetensors" in capsys.readouterr().err
    assert main([*command, "--weights_format", "safetensors"]) == 0
    assert_same(load_model(str(tmp_path / "new")).params, later)
    for form, params in (("msgpack", model.params), ("safetensors", later)):
        assert_same(Captioner.from_pretrained(tmp_path / "model", weights_format=form).pretrained.params, params)


def test_weights_that_are_not_finite_in_both_formats_are_named_as_that(model, tmp_path):
    save_model(model, jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), model.params), tmp_path)
    with pytest.raises(InputError, match=r"\d+ not finite"):
        load(tmp_path, model)
