"""What a model says its files are called leads nowhere outside of its folder, when it is read and when it is saved."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_golden import command_line, read_case

from repro.__main__ import main
from repro.data.atomic import check_plain_names, writing_only_below
from repro.data.captions import tokenizer_fingerprint
from repro.errors import InputError
from repro.models.pretrained import Options, load_model, save_model
from repro.models.weights import FLAX_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX

OUTSIDE = ("../../../x", "/tmp/x", "a/../../x", "..", ".", "", "a/b", "..\\x", "a\0b", "x" * 300, "\udcff", 7, None)


@pytest.fixture
def model(golden_inputs: Path, tmp_path: Path) -> Path:
    """A copy of the goldens' model, to be changed."""
    return Path(shutil.copytree(golden_inputs / "model", tmp_path / "models" / "one"))


def change_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **values}))


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_with_a_folder_or_of_no_file_are_refused(name: Any) -> None:
    with pytest.raises(InputError, match="outside of the model's folder"):
        check_plain_names("here", ["model-00001-of-00002.safetensors", "tool_use", "tokenizer.4.0.json", name])


@given(st.text())
def test_a_name_that_is_accepted_is_one_file_of_its_folder(name: str) -> None:
    try:
        check_plain_names("here", [name])
    except InputError:
        return
    assert os.path.dirname(os.path.realpath(os.path.join("/folder", name))) == "/folder"
    assert len(os.fsencode(f"{name}.jinja")) < 255


@pytest.mark.parametrize("command", ["train", "data check", "export", "caption", "create-model"])
@pytest.mark.parametrize("name", ["../../../escaped", "/{}/escaped", "a/b"])
def test_a_chat_template_that_would_be_saved_elsewhere_is_refused_when_the_model_is_loaded(
    name: str, command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = name.format(tmp_path)
    templates = [{"name": "default", "template": "a"}, {"name": name, "template": "b"}]
    change_json(model / "tokenizer_config.json", chat_template=templates)
    flags = ["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    if command == "create-model":
        for half in ("encoder", "decoder"):
            content = json.loads((model / "config.json").read_text())[half]
            (tmp_path / half).mkdir()
            for file in model.glob("*token*"):
                shutil.copy(file, tmp_path / half)
            (tmp_path / half / "config.json").write_text(json.dumps(content))
        flags[:2] = [f"--{half}_config_name={tmp_path / half}" for half in ("encoder", "decoder")]
    elif command == "caption":
        flags = [str(model), str(tmp_path / "a.png")]
    elif command != "export":
        flags = [*command_line(read_case("current_block0"), tmp_path / "out"), *flags]
    before = listing(tmp_path)
    assert main([*command.split(), *flags]) == 2
    error = capsys.readouterr().err
    assert f"chat template {name!r}" in error
    assert "tokenizer_config.json" in error
    assert {path for path in listing(tmp_path) - before if path.suffix == ".jinja" or "ckpt" in path.name} == set()


@pytest.mark.parametrize("key", ["fast_tokenizer_files", "tokenizer_file", "vocab_file"])
def test_a_tokenizer_is_read_from_its_own_folder(key: str, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "models" / "tokenizer.4.0.json"
    content = json.loads((model / "tokenizer.json").read_text())
    other.write_text(json.dumps({**content, "added_tokens": []}))
    honest = (model / "tokenizer_config.json").read_text()
    name = "../tokenizer.4.0.json" if key == "fast_tokenizer_files" else str(other)
    change_json(model / "tokenizer_config.json", **{key: [name] if key == "fast_tokenizer_files" else name})
    with pytest.raises(InputError, match=re.escape(repr(name))):
        load_model(str(model))
    (model / "tokenizer_config.json").write_text(honest)
    load_model(str(model))


def test_a_template_of_a_plain_name_goes_with_the_model(model: Path, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    change_json(model / "tokenizer_config.json", chat_template=templates)
    loaded = load_model(str(model))
    save_model(loaded, loaded.params, tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).tokenizer.chat_template == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize("part", ["tokenizer", "image_processor"])
def test_whatever_a_model_brings_nothing_is_written_outside_of_the_folder_that_it_is_saved_to(
    part: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(model))
    kind = type(getattr(loaded, part))
    honest = kind.save_pretrained
    secret = tmp_path / "secret"
    secret.write_text("mine")
    deeds = [
        lambda: (tmp_path / "new").write_text("x"),
        lambda: os.open(tmp_path / "new", os.O_CREAT | os.O_WRONLY),
        lambda: (tmp_path / "new").mkdir(),
        lambda: shutil.copyfile(model / "config.json", tmp_path / "new"),
        lambda: secret.open("a"),
        lambda: secret.unlink(),
        lambda: os.rename(secret, tmp_path / "saved" / "stolen"),
        lambda: os.rename(tmp_path / "saved" / "config.json", tmp_path / "new"),
        lambda: os.truncate(secret, 0),
    ]
    for deed in deeds:

        def save(self: Any, folder: Any, deed: Any = deed, **more: Any) -> Any:
            deed()
            return honest(self, folder, **more)

        monkeypatch.setattr(kind, "save_pretrained", save)
        with pytest.raises(InputError, match="would be written outside of"):
            save_model(loaded, loaded.params, tmp_path / "saved")
        assert secret.read_text() == "mine"
        assert not (tmp_path / "new").exists()
    (tmp_path / "free").write_text("afterwards everything may be written again")


def test_a_link_in_the_folder_leads_nothing_out_of_it(model: Path, tmp_path: Path) -> None:
    loaded, target = load_model(str(model)), tmp_path / "target"
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "tokenizer_config.json").symlink_to(target)
    with pytest.raises(InputError, match="would be written outside of"):
        save_model(loaded, loaded.params, tmp_path / "saved")
    assert not target.exists()


def test_a_tokenizers_hash_writes_nothing_outside_of_its_temporary_folder(model: Path, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(load_model(str(model)).tokenizer)
    tokenizer.chat_template = {"default": "a", f"{tmp_path}/escaped": "b"}
    with pytest.raises((InputError, ValueError)):  # transformers from 5.? on refuses it too
        tokenizer_fingerprint(tokenizer)
    assert not list(tmp_path.glob("escaped*"))


def test_a_module_that_is_compiled_while_a_model_is_saved_is_imported_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "imported_late.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path / "late")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with writing_only_below(tmp_path / "saved"):
        assert importlib.import_module("imported_late").VALUE == 3
    assert not (tmp_path / "late" / "__pycache__").exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "{}/x.safetensors", "sub/x.safetensors", "..", 7])
def test_a_shard_outside_of_the_models_folder_is_refused(name: Any, model: Path, tmp_path: Path) -> None:
    loaded = load_model(str(model))
    save_model(loaded, loaded.params, tmp_path / "whole")
    (model / FLAX_FILE).unlink(missing_ok=True)
    (model / SAFETENSORS_FILE).unlink(missing_ok=True)
    for place in (tmp_path, model.parent):
        shutil.copy(tmp_path / "whole" / SAFETENSORS_FILE, place / "x.safetensors")
    name = name.format(tmp_path) if isinstance(name, str) else name
    change_json(model / SAFETENSORS_INDEX, weight_map={"a": name})
    with pytest.raises(InputError, match=SAFETENSORS_INDEX):
        load_model(str(model))


def test_a_shard_that_a_cache_keeps_elsewhere_is_read(model: Path, tmp_path: Path) -> None:
    loaded = load_model(str(model))
    save_model(loaded, loaded.params, tmp_path / "whole")
    (model / FLAX_FILE).unlink(missing_ok=True)
    (model / SAFETENSORS_FILE).unlink(missing_ok=True)
    blob = shutil.copy(tmp_path / "whole" / SAFETENSORS_FILE, tmp_path / "blob")
    (model / "model-00001-of-00001.safetensors").symlink_to(blob)
    change_json(model / SAFETENSORS_INDEX, weight_map={"a": "model-00001-of-00001.safetensors"})
    assert load_model(str(model)).fingerprint() == loaded.fingerprint()


def test_no_model_runs_code_or_asks_for_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Options().hub["trust_remote_code"] is False
    (model / "own.py").write_text("raise SystemExit('code of a model was run')")
    change_json(model / "config.json", auto_map={"AutoConfig": "own.Config"}, model_type="nothing-known")
    change_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]}, tokenizer_class="T")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(InputError):
        load_model(str(model))
