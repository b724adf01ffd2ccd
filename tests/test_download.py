"""COCO's files from a server on this machine that drops, delays, lies, corrupts and refuses."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import load_splits

import repro.commands.data as data_command
from repro.__main__ import main
from repro.commands.data import SPLITS
from repro.data import download as module
from repro.data.coco import DOWNLOADS, SPLIT_NAMES
from repro.data.download import FILES, RemoteFile, download, download_coco
from repro.errors import InputError
from repro.pocket.halves import render_pocket

CONTENT = bytes(range(256)) * 40_000
FILE = RemoteFile("zips/some.zip", hashlib.md5(CONTENT).hexdigest(), len(CONTENT))
Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


def send(handler, status: int, body: bytes, *, length: int | None = None, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def ranged(handler, content: bytes, *, at_most: int | None = None) -> None:
    """Answer as a good server does; with `at_most`, break off after so many bytes."""
    asked = handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    if start >= len(content):
        return send(handler, 416, b"")
    body, headers = content[start:], {}
    if asked:
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    send(handler, 206 if asked else 200, body[:at_most], length=len(body), **headers)


class Server:
    """Serves `files` by path; `answers` are used up first, one a request."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {FILE.path: CONTENT}
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, str | None]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                server.requests.append((path, self.headers.get("Range")))
                answer = server.answers.pop(0) if server.answers else ranged
                if path in server.files:
                    answer(self, server.files[path])
                else:
                    send(self, 404, b"no such file")

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                """A client that hangs up is nothing to report."""

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    running = Server()
    yield running
    running.close()


def get(server: Server, folder: Path, file: RemoteFile = FILE, *more_urls: str) -> Path:
    return download(file, folder, base_urls=[server.url, *more_urls], progress=False)


def test_a_file_arrives_whole_and_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert get(server, tmp_path) == tmp_path / "some.zip"
    assert server.requests == [(FILE.path, None)]
    assert [path.name for path in tmp_path.iterdir()] == ["some.zip"]


def test_a_dropped_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.answers = [lambda handler, content: ranged(handler, content, at_most=3_000_000)] * 3
    assert get(server, tmp_path).read_bytes() == CONTENT
    starts = [asked for _, asked in server.requests]
    assert starts[0] is None
    assert len(set(starts)) == 4, "each request must go on from where the last one broke"


def test_the_next_run_goes_on_where_an_interrupted_one_ended(server: Server, tmp_path: Path) -> None:
    (tmp_path / "some.zip.part").write_bytes(CONTENT[:1_000_000])
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [(FILE.path, "bytes=1000000-")]


def test_a_part_that_is_already_whole_needs_no_byte_more(server: Server, tmp_path: Path) -> None:
    (tmp_path / "some.zip.part").write_bytes(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_starts_the_file_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "some.zip.part").write_bytes(b"x" * 1000)
    server.answers = [lambda handler, content: send(handler, 200, content)]
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_range_that_was_not_asked_for_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "some.zip.part").write_bytes(CONTENT[:1000])
    server.answers = [lambda handler, content: send(handler, 206, content, Content_Range="bytes 0-9/10")]
    with pytest.raises(InputError, match=r"asked for bytes from 1000, the server sends 'bytes 0-9/10'.*\.part"):
        get(server, tmp_path)
    assert (tmp_path / "some.zip.part").stat().st_size == 1000


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = [lambda handler, content: send(handler, status, b"busy")] * module.RETRIES
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_stays_busy_is_given_up_and_nothing_is_lost(server: Server, tmp_path: Path) -> None:
    server.answers = [lambda handler, content: ranged(handler, content, at_most=2_000_000)]
    server.answers += [lambda handler, content: send(handler, 503, b"busy")] * (module.RETRIES + 1)
    with pytest.raises(InputError, match=r"gave up after 6 attempts \(the server answers 503.*bytes that have arrived"):
        get(server, tmp_path)
    assert not (tmp_path / "some.zip").exists()
    arrived = (tmp_path / "some.zip.part").read_bytes()
    assert arrived
    assert arrived == CONTENT[: len(arrived)]
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_file_that_is_not_there_is_said_at_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"zips/other\.zip: the server answers 404 Not Found; check --base_url"):
        get(server, tmp_path, RemoteFile("zips/other.zip"))
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_server_at_all_is_an_error_that_names_it(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:1/zips/some\.zip: gave up after 6 attempts"):
        download(FILE, tmp_path, base_urls=["http://127.0.0.1:1"], progress=False)


@pytest.mark.parametrize("base", ["not a url", "ftp://example.org"])
def test_what_is_not_a_web_address_is_refused(tmp_path: Path, base: str) -> None:
    with pytest.raises(InputError, match=f"{base}/zips/some.zip: cannot be asked for .*; check --base_url"):
        download(FILE, tmp_path, base_urls=[base], progress=False)


def test_the_command_line_knows_the_splits_and_the_server() -> None:
    # Written twice, so that help needs no import of what reads data.
    assert SPLITS == tuple(SPLIT_NAMES) == tuple(FILES)
    assert f"default: {DOWNLOADS})" in Path(data_command.__file__).read_text()


def test_corrupt_bytes_are_found_and_removed(server: Server, tmp_path: Path) -> None:
    server.files[FILE.path] = CONTENT[:-1] + b"?"
    with pytest.raises(InputError, match=f"has the MD5 .* instead of {FILE.md5}.*was removed"):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [CONTENT[:-5], CONTENT + b"more"], ids=["short", "long"])
def test_another_length_than_the_published_one_is_refused(server: Server, tmp_path: Path, content: bytes) -> None:
    server.files[FILE.path] = content
    with pytest.raises(InputError, match=f"has {len(content):,} bytes instead of {len(CONTENT):,}"):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_next_server_is_tried_where_one_has_a_damaged_file(server: Server, tmp_path: Path) -> None:
    good = Server()
    server.files[FILE.path] = CONTENT[::-1]
    assert get(server, tmp_path, FILE, good.url).read_bytes() == CONTENT
    good.close()


def test_a_file_of_the_users_that_is_not_the_published_one_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "some.zip").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"some\.zip: has 4 bytes instead of .*; remove it"):
        get(server, tmp_path)
    assert (tmp_path / "some.zip").read_bytes() == b"mine"


def test_a_file_that_does_not_fit_is_refused_before_it_is_fetched(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=f"{len(CONTENT):,} bytes are to come and .* has room for 1,000; make room"):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def serve_coco(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve a folder in COCO's layout as the official zips, and image by image."""
    patterns = {
        "zips/train2017.zip": "train2017/*",
        "zips/val2017.zip": "val2017/*",
        "zips/test2017.zip": "test2017/*",
        "annotations/annotations_trainval2017.zip": "annotations/captions_*",
        "annotations/image_info_test2017.zip": "annotations/image_info_*",
    }
    for path, pattern in patterns.items():
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(folder.glob(pattern)):
                archive.write(file, file.relative_to(folder))
        server.files[path] = packed.getvalue()
    for image in folder.glob("*2017/*"):
        server.files[str(image.relative_to(folder))] = image.read_bytes()

    def as_served(file: RemoteFile) -> RemoteFile:
        content = server.files[file.path]
        return RemoteFile(file.path, hashlib.md5(content).hexdigest(), len(content))

    monkeypatch.setattr(module, "FILES", {split: tuple(map(as_served, files)) for split, files in FILES.items()})


@pytest.fixture
def coco(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scenes in COCO's layout, which the server has."""
    folder = tmp_path / "scenes"
    render_pocket(folder, num_train=5, num_val=3, num_test=2, image_size=16, seed=0)
    serve_coco(server, folder, monkeypatch)
    return folder


def read_coco(folder: Path):
    name = "ydshieh/coco_dataset_script"
    return load_splits(splits=list(SPLIT_NAMES), dataset_name=name, data_dir=str(folder))


def test_the_command_puts_the_five_files_where_they_are_read(
    server: Server, coco: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "data"
    assert main(["data", "coco", "--data_dir", str(folder), "--base_url", server.url]) == 0
    names = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    assert names == {path.name for path in folder.iterdir()}
    assert len(names) == 5
    for split, rows in read_coco(folder).items():
        assert rows.dataset["caption"][:] == read_coco(coco)[split].dataset["caption"][:]


def test_asked_for_splits_alone_are_downloaded(server: Server, coco: Path, tmp_path: Path) -> None:
    download_coco(tmp_path / "data", splits=["validation"], base_urls=[server.url])
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"val2017.zip", "annotations_trainval2017.zip"}


def test_the_first_images_are_a_data_set_of_their_own(server: Server, coco: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for _ in range(2):  # the second run finds everything
        download_coco(folder, max_images=2, base_urls=[server.url])
    assert len(server.requests) == 2 + 3 * 2
    assert len(list(folder.glob("*2017/*"))) == 3 * 2
    few, all_of_them = read_coco(folder), read_coco(coco)
    for split in all_of_them:
        table = all_of_them[split].dataset
        first = sorted(set(table["image_id"]), key=int)[:2]
        expected = [row["caption"] for row in table if row["image_id"] in first]
        assert few[split].dataset["caption"][:] == expected
        assert all(Path(path).is_file() for path in few[split].dataset["image_path"])


def test_a_part_and_the_whole_do_not_share_a_folder(server: Server, coco: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    settings = {"splits": ["validation"], "base_urls": [server.url]}
    download_coco(folder, max_images=1, **settings)
    with pytest.raises(InputError, match="already holds val2017, and the annotations of only one of"):
        download_coco(folder, **settings)
    whole = tmp_path / "whole"
    download_coco(whole, **settings)
    with pytest.raises(InputError, match=r"already holds val2017\.zip"):
        download_coco(whole, max_images=1, **settings)


def test_an_image_name_that_leads_out_of_the_folder_is_refused(server, coco, tmp_path, monkeypatch) -> None:
    content = json.loads((coco / "annotations" / "captions_val2017.json").read_text())
    content["images"][0]["file_name"] = "../../evil.png"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("annotations/captions_val2017.json", json.dumps(content))
    file = RemoteFile("annotations/annotations_trainval2017.zip")
    server.files[file.path] = packed.getvalue()
    monkeypatch.setitem(module.FILES, "validation", (module.FILES["validation"][0], file))
    with pytest.raises(InputError, match=r"'\.\./\.\./evil\.png' leads out of val2017/"):
        download_coco(tmp_path / "data", splits=["validation"], max_images=1, base_urls=[server.url])
    assert not list(tmp_path.rglob("evil.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco", "--data_dir", "x", "--max_images", "0"], "--max_images 0: must be at least 1"),
        (["coco", "--data_dir", "x", "--splits", "valid"], "invalid choice: 'valid'"),
        (["coco"], "--data_dir"),
        (["coko"], "invalid choice: 'coko'"),
    ],
)
def test_wrong_arguments_name_the_value(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err
