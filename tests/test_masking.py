"""No secret in what any command prints or writes, however it was given; files are as readable as the umask says."""

import dataclasses
import json
import logging
import os
import re
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_reproduce import small_recipe  # noqa: F401

import repro.recipes
from repro.__main__ import main
from repro.commands import COMMANDS
from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.masking import SECRET_FLAGS, MaskingFormatter, learn, masked, masked_command
from repro.recipes import preflight
from repro.recipes.selftest import command_line, read_case
from repro.recipes.verify import ARGUMENTS

TOKEN, BARE_TOKEN = "hf_SECRETofTheTests", "a-token-of-another-kind/+=42"
TAKES_TOKENS = ("train", "reproduce", "data check")  # test_hub.py trains with tokens


def assert_nowhere(folder, captured):
    """No token is in what was printed, in any file, or in a name."""
    found = sorted(folder.rglob("*"))
    places = [("output", text.encode()) for text in (*captured, *(str(path.relative_to(folder)) for path in found))]
    places += [(str(path), path.read_bytes()) for path in found if path.is_file()]
    assert [place for place, content in places for token in (TOKEN, BARE_TOKEN) if token.encode() in content] == []


def test_the_commands_that_take_tokens_are_those_of_these_tests(capsys):
    for words in (*(COMMANDS.keys() - {"data"}), "data check", "data coco", "data pocket"):
        with pytest.raises(SystemExit):
            main([*words.split(), "--help"])
        text = capsys.readouterr().out
        takes = bool(re.search(r"--(hub_)?token\b", text)) or "Every flag of `repro train`" in text
        assert takes == (words in TAKES_TOKENS), words


def test_every_flag_of_a_secret_is_masked_and_left_out_of_the_arguments_text():
    flags = {field.name for kind in ARGUMENTS for field in dataclasses.fields(kind)}
    assert {name for name in flags if name.endswith("token")} == set(SECRET_FLAGS)
    texts = [repr(ModelArguments(token=TOKEN)), repr(TrainingArguments(hub_token=TOKEN)), repr(DataArguments())]
    assert TOKEN not in "".join(texts)


@pytest.mark.usefixtures("small_recipe")
def test_what_commands_write_holds_no_token_and_is_as_readable_as_the_umask_says(
    golden_inputs, tmp_path, monkeypatch, capfd
):
    folder, model = tmp_path / "new" / "pocket", golden_inputs / "model"
    tokens = [f"--token={TOKEN}", "--hub_token", BARE_TOKEN]
    reproduce = ["reproduce", "--output_dir", str(folder), *tokens]
    checked = [*command_line(read_case("current_block0"), tmp_path / "golden" / "run"), *tokens]
    halves = [f"--{half}_config_name={folder / 'model' / half}" for half in ("encoder", "decoder")]
    repro.recipes.read_recipe("pocket")["flags"]["predict_with_generate"] = False  # scenes may do without captions
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/repro", *reproduce])
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:  # test_reproduce.py tries a step
            patch.setattr(preflight, "dry_run", lambda *_: preflight.DryRun([], {}, "it fits"))
            assert main([*reproduce, "--dry_run"]) == 0
        assert not (tmp_path / "new").exists(), "a dry run leaves no folder that it did not find"
        assert main(reproduce) == 0
        assert main(["data", "check", *checked, "--report_dir", str(tmp_path / "check")]) == 0
        assert main(["export", "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "exported")]) == 0
        assert main(["create-model", *halves, "--output_dir", str(tmp_path / "created")]) == 0
    finally:
        os.umask(before)
    assert_nowhere(tmp_path, capfd.readouterr())
    command = json.loads((folder / "run" / "run.json").read_text())["command"]
    assert command == f"repro reproduce --output_dir {folder} '--token=***' --hub_token '***'"
    assert json.loads((folder / "recipe.json").read_text()) == {"name": "pocket"}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert sum(path.name == "model.safetensors" for path in modes) == 3
    assert {path: oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


def test_a_failed_dry_run_leaves_nothing_and_no_token(tmp_path, capfd):
    found = tmp_path / "found"
    found.mkdir()
    for folder in (tmp_path / "a" / "b", found):
        flags = ["--hub_token", TOKEN, "--token", BARE_TOKEN, "--data_dir", "none", "--output_dir", str(folder)]
        assert main(["reproduce", "coco2017", *flags, "--dry_run"]) == 2
        assert main(["reproduce", "coco2017", *flags, "--dry_run", "--seed", BARE_TOKEN]) == 2
    assert list(tmp_path.rglob("*")) == [found]
    assert_nowhere(tmp_path, capfd.readouterr())


@pytest.mark.parametrize(
    "words",
    [
        *(f"{command} --{flag}={{}}" for command in ("train", "data check") for flag in SECRET_FLAGS),
        *(f"{command} --{flag} {{}} --seed {{}}" for command in TAKES_TOKENS for flag in ("hub-token", *SECRET_FLAGS)),
        *(f"{command} --hub_token={{}} --hub_tokn={{}}" for command in TAKES_TOKENS),
        *(f"{command} --hub_token {{}} {{}}" for command in (*COMMANDS, "data check")),
        "train --hub_token {} --model_name_or_path {} --output_dir {}/x",
        "export --hub_token {} --model_name_or_path {} --output_dir {}/x",
        "caption --token {} MODEL IMAGE",
        "--token {}",
        "{} --token {}",
    ],
)
def test_what_is_refused_quotes_no_token(words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for token in (TOKEN, BARE_TOKEN):
        assert main(words.replace("{}", token).split()) == 2
    assert_nowhere(tmp_path, capfd.readouterr())


def test_tokens_in_a_file_of_flags_are_masked(tmp_path, capfd):
    file = tmp_path / "flags.json"
    file.write_text(json.dumps({"hub_token": BARE_TOKEN, "token": TOKEN, "seed": BARE_TOKEN}))
    assert main(["train", str(file)]) == 2
    captured = capfd.readouterr()
    assert "argument --seed: invalid int value: '***'" in captured.err
    file.unlink()
    assert_nowhere(tmp_path, captured)


def test_a_traceback_that_nobody_catches_is_masked():
    code = (
        "import sys, repro.__main__, repro.commands.verify\n"
        f"def fail(argv): raise KeyError({BARE_TOKEN!r}, {TOKEN!r})\n"
        "repro.commands.verify.main = fail\n"
        "repro.__main__.program()"
    )
    command = [sys.executable, "-c", code, "verify", "--token", BARE_TOKEN, "--hub_token", TOKEN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "KeyError: ('***', '***')" in done.stderr
    assert TOKEN not in done.stderr


def test_a_log_record_is_masked_with_its_arguments_and_traceback():
    learn(BARE_TOKEN)
    try:
        raise ValueError(BARE_TOKEN)
    except ValueError:
        record = logging.LogRecord("repro", logging.ERROR, "", 0, "sent %s", (BARE_TOKEN,), sys.exc_info())
    text = MaskingFormatter("%(message)s").format(record)
    assert text.startswith("sent ***\n")
    assert text.endswith("ValueError: ***")


def test_what_looks_like_a_secret_is_masked_and_what_does_not_stays():
    secret = "hf_" + "aB3" * 11
    assert masked(f"Bearer {secret}, https://me:password@mirror/x, https://s3/x?Signature=abc&Expires=1 (why?)") == (
        "Bearer ***, https://***mirror/x, https://s3/x?Signature=***&Expires=1 (why?)"
    )
    plain = "runs/hf_vit_gpt2 https://host/image?id=7: 404; what?"
    assert masked(plain) == plain


@given(secret=st.text(st.sampled_from("abcXYZ019-_+/='\" "), min_size=1).map(lambda text: f"§{text}§"))
def test_a_command_shows_everything_but_its_secrets(secret):
    for flag in ("--token", "--hub_token", "--hub-token"):
        for words in ([flag, secret], [f"{flag}={secret}"]):
            shown = masked_command(["/opt/x/repro/__main__.py", "train", *words, "--output_dir", "runs/1"])
            assert "§" not in shown
            assert shown.startswith("repro train ")
            assert shown.endswith(" --output_dir runs/1")
