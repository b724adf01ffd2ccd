"""A run on a Hub that is slow, refuses, fails, hangs or is not there: it trains on, and nobody learns its token."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_stub import OWNER, HubStub, drop, hang, late, status

from repro.__main__ import main
from repro.models.weights import SAFETENSORS_FILE
from repro.recipes.selftest import command_line, read_case
from repro.record import hub
from repro.record.hub import HubUploader, answer_of, files_of, tried

TOKEN = "hf_aVerySecretTokenOfTheTests"
BARE_TOKEN = "a-token-of-another-kind/+=42"
SOON = {"PAUSE": 0.05, "SILENCE": 1.0, "AT_END": 20.0}
MODEL = "ckpt_epoch_1_step_8"
CASE = read_case("current_block0")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStub]:
    """A Hub to which this process and those it starts are connected, without any login."""
    running = HubStub(TOKEN)
    running.start()
    connect(monkeypatch, running.url, tmp_path)
    yield running
    running.close()


def connect(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)  # read from HF_ENDPOINT when it is imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # The stub stores large files by git-lfs's protocol; Xet's needs a server of another kind.
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf")}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    be_patient(monkeypatch, **SOON)


def be_patient(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    for name, value in seconds.items():
        monkeypatch.setattr(hub, name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run has written when its first model is finished."""
    run = tmp_path / "a-run"
    contents = {
        "run.json": b"{}",
        "metrics.jsonl": b'{"step": 1}\n',
        "events.out.tfevents.1.host": b"scalars",
        f"{MODEL}/{SAFETENSORS_FILE}": b"weights",
        f"{MODEL}/README.md": b"---\ntags:\n- a\n---\ncard",
        "state/8/state/data": b"optimizer",
        "run.lock": b"",
        "non_finite.json": b"paths of images",
        "run.json.partial": b"half",
        "ckpt_epoch_2_step_16.partial/config.json": b"half",
        ".env": b"HF_TOKEN=secret",
    }
    for name, content in contents.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    return run


def uploader(folder: Path, *, repository: str | None = "me/model", token: str | None = TOKEN) -> HubUploader:
    return HubUploader(folder, repository=repository, token=token)


def finish(uploading: HubUploader) -> None:
    uploading.finish("the end", stopped=lambda: False)


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "repro")


def test_all_but_states_and_what_is_not_whole_is_uploaded_as_one_commit(stub, folder, caplog):
    with uploader(folder) as uploading:
        finish(uploading)
    ((repository, message, names),) = stub.commits
    assert (repository, message) == ("me/model", "the end")
    kept = ["run.json", "metrics.jsonl", "events.out.tfevents.1.host", f"{MODEL}/{SAFETENSORS_FILE}"]
    assert set(names) == {*kept, f"{MODEL}/README.md", "README.md"}
    for name in names:
        source = folder / name if name != "README.md" else folder / MODEL / name
        assert stub.repositories[repository][name] == source.read_bytes()
    assert said(caplog) == []
    assert f"the end is at {stub.url}/me/model" in said(caplog, logging.INFO)[-1]


def test_a_card_of_the_users_own_stands_for_the_repository(stub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    with uploader(folder) as uploading:
        finish(uploading)
    assert stub.repositories["me/model"]["README.md"].endswith(b"mine")


def test_a_name_without_an_owner_is_the_tokens_owners(stub, folder, caplog):
    with uploader(folder, repository=None) as uploading:
        finish(uploading)
    assert list(stub.repositories) == [f"{OWNER}/a-run"]
    assert stub.commits


def test_a_repository_that_is_there_is_used(stub, folder, caplog):
    stub.repositories["me/model"] = {"notes.txt": b"old"}
    with uploader(folder) as uploading:
        finish(uploading)
    assert stub.repositories["me/model"].keys() > {"notes.txt", "run.json"}
    assert said(caplog) == []


def test_only_what_changed_is_sent_again(stub, folder):
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


def test_files_that_grow_are_uploaded_as_they_were(stub, folder):
    stub.answers = [late(0.3)]
    with uploader(folder) as uploading:
        uploading.push("first")
        with (
            (folder / "events.out.tfevents.1.host").open("ab") as events,
            (folder / "metrics.jsonl").open("ab") as rows,
        ):
            for _ in range(50):
                events.write(b"more")
                rows.write(b"half a li")
        wait_for(lambda: stub.commits)
    assert stub.repositories["me/model"]["events.out.tfevents.1.host"] == b"scalars"
    assert stub.repositories["me/model"]["metrics.jsonl"] == b'{"step": 1}\n'


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
    [
        *((status(500), 0), (drop, 0), (hang, 0), (status(503), 2)),
        *(pytest.param(fault, 2, marks=pytest.mark.slow) for fault in (status(429), drop, hang)),
    ],
    ids=["500", "drop", "hang", "503 later", "429 later", "drop later", "hang later"],
)
def test_what_fails_three_times_is_tried_again(stub, folder, caplog, monkeypatch, fault, after):
    if fault is hang:
        be_patient(monkeypatch, SILENCE=0.2)
    with uploader(folder) as uploading:
        if after:
            wait_for(lambda: stub.repositories)
            stub.answers = [stub.serve] * after
        stub.answers += [fault] * 3
        finish(uploading)
    assert [message for _, message, _ in stub.commits] == ["the end"]
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(401, "log in with `hf auth login`"), (403, "give it write permission"), (404, "check --hub_model_id")],
)
def test_what_the_hub_refuses_is_not_tried_again_and_the_remedy_is_named(stub, folder, caplog, number, remedy):
    stub.always = status(number)
    with uploader(folder) as uploading:
        wait_for(lambda: said(caplog))
        asked = len(stub.requests)
        assert asked <= 2  # 1.x looks whether a repository that it may not make is there
        uploading.push("first")
        finish(uploading)
    (warning,) = said(caplog)
    assert remedy in warning
    assert f"`hf upload me/model {folder} . --exclude 'state/*'`" in warning
    assert len(stub.requests) == asked


def test_a_wrong_token_is_refused_and_never_quoted(stub, folder, caplog):
    with uploader(folder, token=BARE_TOKEN) as uploading:
        finish(uploading)
    (warning,) = said(caplog)
    assert "401" in warning
    assert BARE_TOKEN not in warning


def test_a_name_that_cannot_be_one_is_said_with_the_remedy(stub, folder, caplog):
    with uploader(folder, repository="my best run!") as uploading:
        finish(uploading)
    (warning,) = said(caplog)
    assert "--hub_model_id OWNER/NAME" in warning
    assert stub.requests == []


def test_a_hub_that_stays_broken_costs_one_warning_an_upload(stub, folder, caplog):
    stub.always = status(500)
    began = time.monotonic()
    with uploader(folder) as uploading:
        wait_for(lambda: said(caplog))
        finish(uploading)
    assert time.monotonic() - began < SOON["AT_END"]
    assert len(said(caplog)) == 2
    assert all("the upload failed (" in text and "500" in text for text in said(caplog))


def test_a_hub_that_is_not_there_is_a_warning(stub, folder, caplog, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with uploader(folder) as uploading:
        finish(uploading)
    assert said(caplog)
    assert "the upload failed" in said(caplog)[0]


def test_what_hangs_is_waited_for_no_longer_than_is_said(stub, folder, caplog, monkeypatch):
    be_patient(monkeypatch, PAUSE=0.0, SILENCE=30.0, AT_END=1.0)
    stub.always = hang
    began = time.monotonic()
    with uploader(folder) as uploading:
        uploading.push("first")
        finish(uploading)
    assert 1.0 < time.monotonic() - began < 3.0
    (warning,) = said(caplog)
    assert "was not finished in time" in warning
    assert "waits for the upload, 1 seconds at most" in said(caplog, logging.INFO)[0]


def test_a_signal_ends_the_waiting(stub, folder, caplog, monkeypatch):
    be_patient(monkeypatch, SILENCE=30.0, AT_END=30.0)
    stub.always = hang
    began = time.monotonic()
    with uploader(folder) as uploading:
        uploading.finish("the end", stopped=lambda: time.monotonic() - began > 0.5)
    assert time.monotonic() - began < 3.0
    assert "was not finished when a signal came" in said(caplog)[0]


def test_an_error_of_the_run_ends_the_upload_under_way(stub, folder, caplog):
    stub.always = hang
    began = time.monotonic()

    def fail() -> None:
        with uploader(folder) as uploading:
            uploading.push("first")
            wait_for(lambda: stub.requests)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert time.monotonic() - began < 3.0
    assert "the upload under way is ended" in said(caplog)[0]


def test_an_upload_that_hangs_does_not_hold_up_the_end_of_the_process(stub, folder):
    code = (
        "import time\nfrom pathlib import Path\nimport repro.__main__\nfrom repro.record.hub import HubUploader\n"
        "def main():\n"
        f"    with HubUploader(Path({str(folder)!r}), repository='me/model', token={TOKEN!r}):\n"
        "        time.sleep(1)\n"
        "    return 0\n"
        "repro.__main__.main = main\nrepro.__main__.program()"
    )
    stub.always = hang
    # Four attempts of 30 seconds would take two minutes.
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    assert stub.requests


def test_without_a_network_or_a_token_nothing_is_asked_and_the_remedy_is_named(stub, folder, caplog, monkeypatch):
    with uploader(folder, token=None) as uploading:
        finish(uploading)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with uploader(folder) as uploading:
        uploading.push("first")
        finish(uploading)
    first, second = said(caplog)
    assert "there is no token: log in with `hf auth login`" in first
    assert "the Hub cannot be reached: HF_HUB_OFFLINE is set" in second
    assert stub.requests == []


def test_the_librarys_login_is_used(stub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with uploader(folder, token=None) as uploading:
        finish(uploading)
    assert stub.commits


def test_a_state_that_is_renamed_meanwhile_does_not_matter(tmp_path, monkeypatch):
    for name in ("metrics.jsonl", f"{MODEL}/config.json", "state/8.orbax-checkpoint-tmp/array"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    scan = os.scandir

    def vanished(place: object = ".") -> object:
        if os.path.basename(str(place)) == "state":
            raise FileNotFoundError(2, "No such file or directory", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", vanished)
    assert list(files_of(tmp_path)) == [f"{MODEL}/config.json", "metrics.jsonl"]


def test_a_file_that_cannot_be_read_costs_the_upload_alone(stub, folder, caplog, monkeypatch):
    def refuse(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with uploader(folder) as uploading:
        uploading.push("first")
    assert "the files cannot be read: [Errno 5]" in said(caplog)[0]


def test_attempts_pause_twice_as_long_each_time(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)

    def attempt() -> str:
        raise TimeoutError("read timed out")

    assert tried(attempt) == ("", "TimeoutError: read timed out", None)
    assert pauses == [2.0, 4.0, 8.0]


@pytest.mark.parametrize(("asked", "waits"), [("100", 100), ("1", 2), ("9000", 240), ("soon", 2), (None, 2)])
def test_a_hub_is_waited_for_as_long_as_it_asks_within_the_bound(monkeypatch, asked, waits):
    pauses: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)

    def attempt() -> str:
        if pauses:
            return "address"
        error = Exception("slow down")
        error.response = SimpleNamespace(status_code=429, headers={"Retry-After": asked} if asked else {})
        raise error

    assert tried(attempt) == ("address", "", None)
    assert pauses == [waits]


def test_the_status_is_found_behind_other_errors():
    refusal = Exception("refused")
    refusal.response = SimpleNamespace(status_code=403, headers={})
    other = RuntimeError("Error while uploading 'x' to the Hub.")
    other.__cause__ = refusal
    assert answer_of(other) == (403, 0)
    assert answer_of(ValueError()) == (None, 0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images and tokens, for all runs."""
    return tmp_path_factory.mktemp("cache")


def flags(folder: Path, cache: Path, *more: str) -> list[str]:
    """An epoch of eight steps, with an evaluation, a state, a model and an upload."""
    given = command_line(CASE, folder)
    given[given.index("--cache_dir") + 1] = str(cache)
    return ["train", *given, "--push_to_hub", "--hub_model_id", "me/model", "--num_train_epochs", "1", *more]


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


@pytest.mark.parametrize(
    ("fault", "warned"),
    [
        (None, None),
        ([status(500)] * 3, None),
        (status(403), "the Hub refuses"),
        (hang, "was not finished in time"),
        ("not there", "the upload failed"),
    ],
    ids=["good", "three failures", "403", "hang", "not there"],
)
def test_training_ends_well_and_in_time_whatever_the_hub_does_and_the_token_is_nowhere(
    fault, warned, stub, tmp_path, cache, monkeypatch, capfd
):
    be_patient(monkeypatch, SILENCE=30.0 if fault is hang else 5.0, AT_END=5.0)
    stub.token = BARE_TOKEN
    if fault == "not there":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    elif isinstance(fault, list):
        stub.answers = fault
    else:
        stub.always = fault
    run, ends = tmp_path / "run", []
    real = HubUploader.finish

    def finish_in_time(self: HubUploader, *arguments: object, **settings: object) -> None:
        began = time.monotonic()
        real(self, *arguments, **settings)
        ends.append(time.monotonic() - began)

    monkeypatch.setattr(HubUploader, "finish", finish_in_time)
    assert main(flags(run, cache, "--hub_token", BARE_TOKEN, "--token", BARE_TOKEN)) == 0
    assert ends[0] < 6.0
    log = (run / "log").read_text()
    assert ("--push_to_hub: " in log and "WARNING" in log) == (warned is not None)
    assert (warned or "end of the run is at") in log
    assert [path.name for path in run.glob("ckpt_*")] == [MODEL]
    captured = capfd.readouterr()
    places = [(Path(name), text.encode()) for name, text in (("stdout", captured.out), ("stderr", captured.err))]
    places += [*contents(tmp_path), *contents(cache), *((Path("uploaded"), body) for body in stub.received)]
    assert len(places) > 30
    assert [path for path, content in places if BARE_TOKEN.encode() in content] == []
    if warned is None:
        there = stub.repositories["me/model"]
        local = {path.relative_to(run).as_posix(): content for path, content in contents(run)}
        stays = ("run.lock", "eval_images.json", "eval_attention.json", "report.html")
        uploaded = {name for name in local if not name.startswith("state/") and name not in stays}
        assert set(there) == uploaded | {"README.md"}
        for name in uploaded:  # the log says afterwards that it is uploaded
            assert local[name] == there[name] if name != "log" else local[name].startswith(there[name]), name
        assert there["README.md"] == local[f"{MODEL}/README.md"]


def test_a_signal_ends_a_run_whose_upload_hangs(stub, tmp_path, cache):
    stub.always = hang
    run = tmp_path / "run"
    command = [sys.executable, "-m", "repro", *flags(run, cache, "--hub_token", TOKEN, "--num_train_epochs", "500")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(run.glob("ckpt_*/README.md")) and stub.requests, seconds=60)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 15
    assert "the upload under way is ended" in errors
    assert "--resume auto goes on" in errors


def wait_for(condition, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.02)
