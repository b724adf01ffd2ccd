"""What a model says its files are called leads nowhere outside of its folder, when it is read and when it is saved."""

import copy
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.data.atomic import check_plain_names, writing_only_below
from repro.data.captions import tokenizer_fingerprint
from repro.errors import InputError
from repro.models.pretrained import Options, Source, create_model, load_model, save_model
from repro.models.weights import FLAX_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX

OUTSIDE = ("../../../x", "/tmp/x", "a/../../x", "..", ".", "", "a/b", "..\\x", "a\0b", "x" * 300, "\udcff", 7, None)


@pytest.fixture
def model(golden_inputs, tmp_path):
    """A copy of the goldens' model, to be changed."""
    return Path(shutil.copytree(golden_inputs / "model", tmp_path / "models" / "one"))


def change_json(file, **values):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **values}))


def with_template(model, name):
    """Give the model's tokenizer a chat template of a name."""
    templates = [{"name": "default", "template": "a"}, {"name": name, "template": "b"}]
    change_json(model / "tokenizer_config.json", chat_template=templates)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_with_a_folder_or_of_no_file_are_refused(name):
    with pytest.raises(InputError, match="outside of the model's folder"):
        check_plain_names("here", ["model-00001-of-00002.safetensors", "tool_use", "tokenizer.4.0.json", name])


@given(st.text())
def test_a_name_that_is_accepted_is_one_file_of_its_folder(name):
    try:
        check_plain_names("here", [name])
    except InputError:
        return
    assert os.path.dirname(os.path.realpath(os.path.join("/folder", name))) == "/folder"
    assert len(os.fsencode(f"{name}.jinja")) < 255


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/escaped", "a/b"])
def test_a_chat_template_that_would_be_saved_elsewhere_is_refused_when_the_model_is_loaded(name, model, tmp_path):
    with_template(model, name)
    refusal = rf"tokenizer_config\.json.*chat template {re.escape(repr(name))}"
    with pytest.raises(InputError, match=refusal):
        load_model(str(model))
    for half in ("encoder", "decoder"):
        shutil.copytree(model, tmp_path / half)
        part = json.loads((model / "config.json").read_text())[half]
        (tmp_path / half / "config.json").write_text(json.dumps(part))
    with pytest.raises(InputError, match=refusal):
        create_model(*(Source(None, str(tmp_path / half)) for half in ("encoder", "decoder")))


def test_a_template_of_a_plain_name_goes_with_the_model(model, tmp_path):
    with_template(model, "tool_use")
    loaded = load_model(str(model))
    save_model(loaded, loaded.params, tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).tokenizer.chat_template == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize("key", ["fast_tokenizer_files", "tokenizer_file", "vocab_file"])
def test_a_tokenizer_is_read_from_its_own_folder(key, model, tmp_path):
    other = tmp_path / "models" / "tokenizer.4.0.json"
    other.write_bytes((model / "tokenizer.json").read_bytes())
    name = "../tokenizer.4.0.json" if key == "fast_tokenizer_files" else str(other)
    change_json(model / "tokenizer_config.json", **{key: [name] if key == "fast_tokenizer_files" else name})
    with pytest.raises(InputError, match=re.escape(repr(name))):
        load_model(str(model))


@pytest.mark.parametrize("part", ["tokenizer", "image_processor"])
def test_whatever_a_model_brings_nothing_is_written_outside_of_the_folder_that_it_is_saved_to(
    part, model, tmp_path, monkeypatch
):
    loaded, saved, new, secret = load_model(str(model)), *(tmp_path / name for name in ("saved", "new", "secret"))
    secret.write_text("mine")
    saved.mkdir()
    (saved / "link").symlink_to(new)
    deeds = [
        lambda: (saved / "link").write_text("x"),
        lambda: new.write_text("x"),
        lambda: os.open(new, os.O_CREAT | os.O_WRONLY),
        lambda: new.mkdir(),
        lambda: shutil.copyfile(model / "config.json", new),
        lambda: secret.open("a"),
        lambda: secret.unlink(),
        lambda: os.rename(secret, saved / "stolen"),
        lambda: os.rename(saved / "config.json", new),
        lambda: os.truncate(secret, 0),
    ]
    for deed in deeds:
        monkeypatch.setattr(type(getattr(loaded, part)), "save_pretrained", lambda *_, deed=deed, **more: deed())
        with pytest.raises(InputError, match="would be written outside of"):
            save_model(loaded, loaded.params, saved)
        assert secret.read_text() == "mine"
        assert not new.exists()
    new.write_text("afterwards everything may be written again")


def test_a_tokenizers_hash_writes_nothing_outside_of_its_temporary_folder(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": "a", f"{tmp_path}/escaped": "b"}
    with pytest.raises((InputError, ValueError)):  # transformers from 5.? on refuses it too
        tokenizer_fingerprint(tokenizer)
    assert not list(tmp_path.glob("escaped*"))


def test_a_module_that_is_compiled_while_a_model_is_saved_is_imported_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "imported_late.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path / "late")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with writing_only_below(tmp_path / "saved"):
        assert importlib.import_module("imported_late").VALUE == 3
    assert not (tmp_path / "late" / "__pycache__").exists()


@pytest.fixture
def sharded(model, tmp_path):
    """The model without weights of its own, which lie in a file outside of it."""
    loaded = load_model(str(model))
    save_model(loaded, loaded.params, tmp_path / "whole")
    (model / FLAX_FILE).unlink()
    shutil.copy(tmp_path / "whole" / SAFETENSORS_FILE, model.parent / "x.safetensors")
    return loaded


@pytest.mark.parametrize("name", ["../x.safetensors", 7])
def test_a_shard_outside_of_the_models_folder_is_refused(name, model, sharded):
    change_json(model / SAFETENSORS_INDEX, weight_map={"a": name})
    with pytest.raises(InputError, match=SAFETENSORS_INDEX):
        load_model(str(model))


def test_a_shard_that_a_cache_keeps_elsewhere_is_read(model, sharded):
    (model / "model-00001-of-00001.safetensors").symlink_to(model.parent / "x.safetensors")
    change_json(model / SAFETENSORS_INDEX, weight_map={"a": "model-00001-of-00001.safetensors"})
    assert load_model(str(model)).fingerprint() == sharded.fingerprint()


def test_no_model_runs_code_or_asks_for_it(model, monkeypatch):
    assert Options().hub["trust_remote_code"] is False
    (model / "own.py").write_text("raise SystemExit('code of a model was run')")
    change_json(model / "config.json", auto_map={"AutoConfig": "own.Config"}, model_type="nothing-known")
    change_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]}, tokenizer_class="T")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(InputError):
        load_model(str(model))
