"""A run on a Hub that is slow, refuses, fails, hangs or is not there: it trains on, and nobody learns its token."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_stub import OWNER, HubStub, drop, hang, late, status

import repro.__main__
from repro.__main__ import main
from repro.models.weights import SAFETENSORS_FILE
from repro.recipes.selftest import command_line, read_case
from repro.record import hub
from repro.record.hub import HubUploader, answer_of, files_of, tried
from repro.run.step_log import StepLog

TOKEN = "hf_aVerySecretTokenOfTheTests"
BARE_TOKEN = "a-token-of-another-kind/+=42"
SOON = {"PAUSE": 0.05, "SILENCE": 1.0, "AT_END": 20.0}
NOWHERE = "http://127.0.0.1:1"
MODEL = "ckpt_epoch_1_step_8"
EVENTS = "events.out.tfevents.1.host"


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A Hub to which this process and those it starts are connected, without any login."""
    running = HubStub(TOKEN)
    # The stub stores large files by git-lfs's protocol; Xet's needs a server of another kind.
    home, url = str(tmp_path / "hf"), running.url
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": url, "HF_HOME": home}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # What the library has read of them when it was imported.
    read = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": url, "HF_TOKEN_PATH": f"{home}/token"}
    for place, values in ((huggingface_hub.constants, read), (hub, SOON)):
        for name, value in values.items():
            monkeypatch.setattr(place, name, value)
    yield running
    running.close()


@pytest.fixture
def folder(tmp_path):
    """What a run has written when its first model is finished."""
    whole = {
        **{"run.json": b"{}", "metrics.jsonl": b'{"step": 1}\n', EVENTS: b"scalars"},
        **{f"{MODEL}/{SAFETENSORS_FILE}": b"weights", f"{MODEL}/README.md": b"---\ntags:\n- a\n---\ncard"},
    }
    stays = ("state/8/data", "run.lock", "non_finite.json", ".env", "run.json.partial", "ckpt_2.partial/config.json")
    for name, content in {**whole, **dict.fromkeys(stays, b"nobody's business")}.items():
        path = tmp_path / "a-run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "a-run"


def uploader(folder, *, repository="me/model", token=TOKEN):
    return HubUploader(folder, repository=repository, token=token)


def finish(uploading):
    uploading.finish("the end", stopped=lambda: False)


def upload(folder, **settings):
    with uploader(folder, **settings) as uploading:
        finish(uploading)


@pytest.fixture
def said(caplog):
    """Gives what was logged, warnings and worse or from another level on."""
    caplog.set_level(logging.INFO, "repro")
    return lambda level=logging.WARNING: [r.getMessage() for r in caplog.records if r.levelno >= level]


def wait_for(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.02)


def test_all_but_states_and_what_is_not_whole_is_uploaded_under_the_last_models_card_or_ones_own(folder, monkeypatch):
    scan = os.scandir

    def renamed_meanwhile(place="."):
        if os.path.basename(str(place)) == "state":
            raise FileNotFoundError(2, "No such file or directory", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", renamed_meanwhile)
    found, card = files_of(folder), f"{MODEL}/README.md"
    assert found.keys() == {"run.json", "metrics.jsonl", EVENTS, f"{MODEL}/{SAFETENSORS_FILE}", card, "README.md"}
    assert found["README.md"] == folder / card
    assert found[EVENTS] == b"scalars", "as it is now: such files grow"
    (folder / "README.md").write_text("mine")
    assert files_of(folder)["README.md"] == b"mine"


def test_a_name_without_an_owner_is_the_tokens_owners_who_is_logged_in(stub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    upload(folder, repository=None, token=None)
    assert [repository for repository, _, _ in stub.commits] == [f"{OWNER}/a-run"]


def test_only_what_changed_is_sent_again_and_it_is_said_where_it_is(stub, folder, said):
    with uploader(folder) as uploading:
        uploading.push("first")
        wait_for(lambda: stub.commits)
        (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        finish(uploading)
        finish(uploading)
    assert [message for _, message, _ in stub.commits] == ["first", "the end"]
    if huggingface_hub.__version__ >= "1":  # earlier ones commit what is small once more
        assert stub.commits[-1][2] == ["metrics.jsonl"]
    assert sum(request.startswith("PUT /lfs/") for request in stub.requests) == 2, "weights and scalars, once"
    assert stub.repositories["me/model"]["README.md"].endswith(b"card")
    assert said() == []
    assert f"the end is at {stub.url}/me/model" in said(logging.INFO)[-1]


def test_of_uploads_that_come_up_meanwhile_the_newest_is_done_and_nobody_waits(stub, folder):
    stub.answers = [late(0.5)]
    with uploader(folder) as uploading:
        wait_for(lambda: stub.requests)
        began = time.monotonic()
        for step in range(1, 5):
            uploading.push(f"step {step}")
        assert time.monotonic() - began < 0.3
        finish(uploading)
    assert [message for _, message, _ in stub.commits] == ["the end"]


@pytest.mark.parametrize(
    ("fault", "after"),
    [(status(500), 0), (hang, 0), (drop, 0), (drop, 1), (status(429), 1)],
    ids=["500", "hang", "drop", "drop later", "429 later"],
)
def test_what_fails_three_times_is_tried_again(stub, folder, said, monkeypatch, fault, after):
    if fault is hang:
        monkeypatch.setattr(hub, "SILENCE", 0.2)
    with uploader(folder) as uploading:
        if after:
            wait_for(lambda: stub.repositories)
            stub.answers = [stub.serve] * after
        stub.answers += [fault] * 3
        finish(uploading)
    assert [message for _, message, _ in stub.commits] == ["the end"]
    assert said() == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(401, "log in with `hf auth login`"), (403, "give it write permission"), (404, "check --hub_model_id")],
)
def test_what_the_hub_refuses_is_not_tried_again_and_the_remedy_is_named(stub, folder, said, number, remedy):
    stub.always = status(number)
    with uploader(folder, token=BARE_TOKEN) as uploading:
        wait_for(said)
        asked = len(stub.requests)
        assert asked <= 2  # 1.x looks whether a repository that it may not make is there
        uploading.push("first")
        finish(uploading)
    (warning,) = said()
    assert remedy in warning
    assert str(number) in warning
    assert f"`hf upload me/model {folder} . --exclude 'state/*'`" in warning
    assert BARE_TOKEN not in warning
    assert len(stub.requests) == asked


def test_a_name_that_cannot_be_one_is_said_with_the_remedy(stub, folder, said):
    upload(folder, repository="my best run!")
    assert "--hub_model_id OWNER/NAME" in said()[0]
    assert stub.requests == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_hub_that_is_broken_or_not_there_costs_one_warning_an_upload(stub, folder, said, monkeypatch, is_there):
    stub.always = status(500)
    if not is_there:
        monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with uploader(folder) as uploading:
        wait_for(said)
        finish(uploading)
    assert len(said()) == 2
    assert all("the upload failed (" in text for text in said())


@pytest.mark.parametrize(("signalled", "reason"), [(False, "in time"), (True, "when a signal came")])
def test_what_hangs_is_waited_for_for_some_time_or_until_a_signal(stub, folder, said, monkeypatch, signalled, reason):
    monkeypatch.setattr(hub, "SILENCE", 30.0)
    monkeypatch.setattr(hub, "AT_END", 9.0 if signalled else 0.5)
    stub.always, began = hang, time.monotonic()
    with uploader(folder) as uploading:
        uploading.push("first")
        uploading.finish("the end", stopped=lambda: signalled and time.monotonic() - began > 0.5)
    assert 0.5 < time.monotonic() - began < 3.0
    assert [f"the upload was not finished {reason}" in warning for warning in said()] == [True]
    assert f"waits for the upload, {hub.AT_END:g} seconds at most" in said(logging.INFO)[0]


def test_an_upload_that_hangs_does_not_hold_up_the_end_of_the_process(stub, folder, said, monkeypatch):
    def train():
        with uploader(folder):
            wait_for(lambda: stub.requests)
        return 0

    stub.always, ended = hang, []
    monkeypatch.setattr(repro.__main__, "main", train)
    monkeypatch.setattr(repro.__main__, "preload", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # to be put back afterwards
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit):
        repro.__main__.program()
    assert ended == [0]
    assert "the upload under way is ended" in said()[0]


def test_without_a_network_or_a_token_nothing_is_asked_and_the_remedy_is_named(stub, folder, said, monkeypatch):
    upload(folder, token=None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    upload(folder)
    first, second = said()
    assert "there is no token: log in with `hf auth login`" in first
    assert "the Hub cannot be reached: HF_HUB_OFFLINE is set" in second
    assert stub.requests == []


def test_a_file_that_cannot_be_read_costs_the_upload_alone(stub, folder, said, monkeypatch):
    def refuse(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with uploader(folder) as uploading:
        uploading.push("first")
    assert "the files cannot be read: [Errno 5]" in said()[0]


def answered(status_code, **headers):
    error = Exception("slow down")
    error.response = SimpleNamespace(status_code=status_code, headers=headers)
    return error


@pytest.fixture
def pauses(monkeypatch):
    """Those of this thread, which do not last: an upload of an earlier test may not have given up yet."""
    found, ours = [], threading.get_ident()
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: threading.get_ident() == ours and found.append(seconds))
    return found


def test_attempts_pause_twice_as_long_each_time(pauses):
    def attempt():
        raise TimeoutError("read timed out")

    assert tried(attempt) == ("", "TimeoutError: read timed out", None)
    assert pauses == [2.0, 4.0, 8.0]


@pytest.mark.parametrize(("asked", "waits"), [("100", 100), ("1", 2), ("9000", 240), ("soon", 2), (None, 2)])
def test_a_hub_is_waited_for_as_long_as_it_asks_within_the_bound(pauses, asked, waits):
    def attempt():
        if pauses:
            return "address"
        raise answered(429, **({"Retry-After": asked} if asked else {}))

    assert tried(attempt) == ("address", "", None)
    assert pauses == [waits]


def test_the_status_is_found_behind_other_errors():
    other = RuntimeError("Error while uploading 'x' to the Hub.")
    other.__cause__ = answered(403)
    assert answer_of(other) == (403, 0)
    assert answer_of(ValueError()) == (None, 0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Decoded images and tokens, for all runs."""
    return tmp_path_factory.mktemp("cache")


def flags(folder, cache, *more):
    """An epoch of eight steps, with an evaluation, a state, a model and an upload."""
    given = command_line(read_case("current_block0"), folder)
    given[given.index("--cache_dir") + 1] = str(cache)
    return ["train", *given, "--push_to_hub", "--hub_model_id", "me/model", "--num_train_epochs", "1", *more]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("fault", "warned"),
    [(None, None), (status(403), "the Hub refuses"), (hang, "was not finished in time")],
    ids=["three failures", "403", "hang"],
)
def test_training_ends_well_and_in_time_whatever_the_hub_does_and_the_token_is_nowhere(
    fault, warned, stub, tmp_path, cache, monkeypatch, capfd
):
    monkeypatch.setattr(hub, "SILENCE", 30.0 if fault is hang else 5.0)
    monkeypatch.setattr(hub, "AT_END", 1.0 if fault is hang else 5.0)
    stub.token, stub.always, stub.answers = BARE_TOKEN, fault, [status(500)] * 3
    run = tmp_path / "run"
    assert main(flags(run, cache, "--hub_token", BARE_TOKEN, "--token", BARE_TOKEN)) == 0
    log, local = (run / "log").read_text(), contents(run)
    assert ("--push_to_hub: " in log and "WARNING" in log) == (warned is not None)
    assert (warned or "end of the run is at") in log
    assert [path.name for path in run.glob("ckpt_*")] == [MODEL]
    places = [*contents(tmp_path).items(), *contents(cache).items(), *(("uploaded", body) for body in stub.received)]
    places.append(("output", "".join(capfd.readouterr()).encode()))
    assert len(places) > 30
    assert [path for path, content in places if BARE_TOKEN.encode() in content] == []
    if warned is None:
        there = stub.repositories["me/model"]
        stays = ("run.lock", "eval_images.json", "eval_attention.json", "report.html", "state")
        kept = {path.relative_to(run).as_posix(): content for path, content in local.items()}
        kept = {name: content for name, content in kept.items() if name.partition("/")[0] not in stays}
        # The log says afterwards that it is uploaded.
        assert kept.pop("log").startswith(there.pop("log"))
        assert there == {**kept, "README.md": kept[f"{MODEL}/README.md"]}


def test_a_signal_ends_a_run_whose_upload_hangs(stub, tmp_path, cache, monkeypatch, capfd):
    stub.always, sent, add = hang, [], StepLog.add

    def add_and_signal(self, step, *metrics, **more):
        add(self, step, *metrics, **more)
        if step == 4:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepLog, "add", add_and_signal)
    monkeypatch.setattr(hub, "SILENCE", 30.0)
    assert main(flags(tmp_path / "run", cache, "--hub_token", TOKEN)) == 128 + signal.SIGTERM
    assert time.monotonic() - sent[0] < 15
    errors = capfd.readouterr().err
    assert "the upload under way is ended" in errors
    assert "--resume auto goes on" in errors
