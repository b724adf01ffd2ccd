"""No secret in what any command prints or writes, however it was given; files are as readable as the umask says."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_golden import command_line, read_case
from test_reproduce import small_recipe  # noqa: F401

from repro.__main__ import main
from repro.commands import COMMANDS
from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.masking import SECRET_FLAGS, MaskingFormatter, learn, masked, masked_command
from repro.recipes.verify import ARGUMENTS

TOKEN, BARE_TOKEN = "hf_SECRETofTheTests", "a-token-of-another-kind/+=42"
CASE = read_case("current_block0")
TAKES_TOKENS = ("train", "reproduce", "data check")


def run_flags(folder: Path) -> list[str]:
    return [*command_line(CASE, folder / "run"), "--num_train_epochs", "1"]


def call(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Run a command as if this process had been started for it."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/repro", *argv])
    return main(argv)


def written(folder: Path) -> list[tuple[str, bytes]]:
    """All files below a folder, and the names of all that is there."""
    found = sorted(folder.rglob("*"))
    names = [("names", str(path.relative_to(folder)).encode()) for path in found]
    return names + [(str(path), path.read_bytes()) for path in found if path.is_file()]


def assert_nowhere(folder: Path, captured: Any, *, files: int) -> None:
    places = [("stdout", captured.out.encode()), ("stderr", captured.err.encode()), *written(folder)]
    assert len(places) > files
    for token in (TOKEN, BARE_TOKEN):
        assert [place for place, content in places if token.encode() in content] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_that_take_tokens_are_those_of_these_tests(command: str, capsys: pytest.CaptureFixture[str]):
    for words in [[command]] if command != "data" else [["data", "check"], ["data", "coco"], ["data", "pocket"]]:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        text = capsys.readouterr().out
        takes = bool(re.search(r"--(hub_)?token\b", text)) or "Every flag of `repro train`" in text
        assert takes == (" ".join(words) in TAKES_TOKENS), words


def test_every_flag_of_a_secret_is_masked_and_left_out_of_the_arguments_text() -> None:
    flags = {field.name: field for kind in ARGUMENTS for field in dataclasses.fields(kind)}
    assert {name for name in flags if name.endswith("token")} == set(SECRET_FLAGS)
    texts = [repr(ModelArguments(token=TOKEN)), repr(TrainingArguments(hub_token=TOKEN)), repr(DataArguments())]
    assert TOKEN not in "".join(texts)


def test_a_run_and_a_check_of_its_data_write_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*run_flags(tmp_path), "--token", TOKEN, f"--hub-token={BARE_TOKEN}"]
    assert call(monkeypatch, "train", *flags) == 0
    command = json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    assert command.startswith(f"repro train --output_dir {tmp_path / 'run'} ")
    assert command.endswith("--num_train_epochs 1 --token '***' '--hub-token=***'")
    assert call(monkeypatch, "data", "check", *flags, "--report_dir", str(tmp_path / "check")) == 0
    assert_nowhere(tmp_path, capfd.readouterr(), files=30)


def test_a_recipe_and_its_dry_run_write_no_token(
    small_recipe: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ["--output_dir", str(tmp_path / "new" / "pocket"), f"--token={TOKEN}", "--hub_token", BARE_TOKEN]
    assert call(monkeypatch, "reproduce", *flags, "--dry_run") == 0
    assert not (tmp_path / "new").exists(), "a dry run leaves no folder that it did not find"
    assert call(monkeypatch, "reproduce", *flags) == 0
    assert json.loads((tmp_path / "new" / "pocket" / "recipe.json").read_text()) == {"name": "pocket"}
    assert_nowhere(tmp_path, capfd.readouterr(), files=30)


def test_a_failed_dry_run_leaves_nothing_and_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found"
    found.mkdir()
    for folder in (tmp_path / "a" / "b", found):
        flags = ["--hub_token", TOKEN, "--token", BARE_TOKEN, "--data_dir", "none", "--output_dir", str(folder)]
        assert call(monkeypatch, "reproduce", "coco2017", *flags, "--dry_run") == 2
        assert call(monkeypatch, "reproduce", "coco2017", *flags, "--dry_run", "--seed", BARE_TOKEN) == 2
    assert list(tmp_path.rglob("*")) == [found]
    assert_nowhere(tmp_path, capfd.readouterr(), files=2)


@pytest.mark.parametrize(
    "words",
    [
        *(f"{command} --{flag}={{}}" for command in ("train", "data check") for flag in SECRET_FLAGS),
        *(f"{command} --{flag} {{}}" for command in ("train", "data check") for flag in SECRET_FLAGS),
        *(f"{command} --hub_token {{}} --seed {{}}" for command in TAKES_TOKENS),
        *(f"{command} --hub-token {{}} --seed {{}}" for command in TAKES_TOKENS),
        *(f"{command} --hub_token={{}} --hub_tokn={{}}" for command in TAKES_TOKENS),
        *(f"{command} --hub_token {{}} {{}}" for command in (*COMMANDS, "data check")),
        *(
            f"{command} --hub_token {{}} --model_name_or_path {{}} --output_dir {{}}/x"
            for command in ("train", "export")
        ),
        "caption --token {} MODEL IMAGE",
        "--token {}",
        "{} --token {}",
    ],
)
def test_what_is_refused_quotes_no_token(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for token in (TOKEN, BARE_TOKEN):
        assert call(monkeypatch, *words.replace("{}", token).split()) == 2
    assert_nowhere(tmp_path, capfd.readouterr(), files=1)


def test_tokens_in_a_file_of_flags_and_of_a_damaged_one_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flags.json"
    file.write_text(json.dumps({"hub_token": BARE_TOKEN, "token": TOKEN, "seed": BARE_TOKEN}))
    assert call(monkeypatch, "train", str(file)) == 2
    captured = capfd.readouterr()
    assert "argument --seed: invalid int value: '***'" in captured.err
    file.unlink()
    assert_nowhere(tmp_path, captured, files=1)


def test_a_traceback_that_nobody_catches_is_masked(tmp_path: Path) -> None:
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


def test_a_log_record_is_masked_with_its_arguments_and_traceback() -> None:
    learn(BARE_TOKEN)
    try:
        raise ValueError(BARE_TOKEN)
    except ValueError:
        record = logging.LogRecord("repro", logging.ERROR, "", 0, "sent %s", (BARE_TOKEN,), sys.exc_info())
    text = MaskingFormatter("%(message)s").format(record)
    assert text.startswith("sent ***\n")
    assert text.endswith("ValueError: ***")


def test_what_looks_like_a_secret_is_masked_and_what_does_not_stays() -> None:
    secret = "hf_" + "aB3" * 11
    assert masked(f"Bearer {secret}, https://me:password@mirror/x, https://s3/x?Signature=abc&Expires=1 (why?)") == (
        "Bearer ***, https://***mirror/x, https://s3/x?Signature=***&Expires=1 (why?)"
    )
    plain = "runs/hf_vit_gpt2 https://host/image?id=7: 404; what?"
    assert masked(plain) == plain


SAFE = st.text(st.characters(codec="ascii", exclude_categories=("Cc", "Cs")), min_size=1)


@given(secret=st.text(st.sampled_from("abcXYZ019-_+/='\" "), min_size=1).map(lambda text: f"§{text}§"), place=SAFE)
def test_a_command_shows_everything_but_its_secrets(secret: str, place: str) -> None:
    for flag in ("--token", "--hub_token", "--hub-token"):
        for words in ([flag, secret], [f"{flag}={secret}"]):
            shown = masked_command(["/opt/x/repro/__main__.py", "train", *words, "--output_dir", "runs/1"])
            assert "§" not in shown
            assert shown.startswith("repro train ")
            assert shown.endswith(" --output_dir runs/1")


def test_files_are_as_readable_as_the_umask_says(
    small_recipe: dict[str, Any],  # noqa: F811
    golden_inputs: Path,
    tmp_path: Path,
) -> None:
    before = os.umask(0o027)
    try:
        model, halves = golden_inputs / "model", tmp_path / "pocket" / "model"
        assert main(["reproduce", "--output_dir", str(tmp_path / "pocket")]) == 0
        assert main(["export", "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "exported")]) == 0
        joined = [f"--{half}_config_name={halves / half}" for half in ("encoder", "decoder")]
        assert main(["create-model", *joined, "--output_dir", str(tmp_path / "created")]) == 0
        flags = command_line(CASE, tmp_path / "golden" / "run")
        assert main(["data", "check", *flags, "--report_dir", str(tmp_path / "check")]) == 0
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert sum(path.name == "model.safetensors" for path in found) == 3
    wanted = {path: 0o750 if path.is_dir() else 0o640 for path in found}
    assert {path: oct(mode) for path, mode in found.items() if mode != wanted[path]} == {}
