"""COCO's files from a server on this machine that drops, delays, lies, corrupts and refuses."""

import hashlib
import http.server
import io
import json
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import load_splits

import repro.commands.data as data_command
from repro.__main__ import main
from repro.data import download as module
from repro.data.coco import DOWNLOADS, SPLIT_NAMES
from repro.data.download import FILES, RemoteFile, download, download_coco
from repro.errors import InputError
from repro.pocket.halves import render_pocket

CONTENT = bytes(range(256)) * 40_000
FILE = RemoteFile("zips/some.zip", hashlib.md5(CONTENT).hexdigest(), len(CONTENT))
ZIPS = {
    "zips/train2017.zip": "train2017/*",
    "zips/val2017.zip": "val2017/*",
    "zips/test2017.zip": "test2017/*",
    "annotations/annotations_trainval2017.zip": "annotations/captions_*",
    "annotations/image_info_test2017.zip": "annotations/image_info_*",
}


def send(handler, status, body, *, length=None, **headers):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def ranged(handler, content, *, at_most=None):
    """Answer as a good server does; with `at_most`, break off after so many bytes."""
    start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
    if start >= len(content):
        return send(handler, 416, b"")
    status, where = 206 if "Range" in handler.headers else 200, f"bytes {start}-{len(content) - 1}/{len(content)}"
    send(handler, status, content[start:][:at_most], length=len(content) - start, Content_Range=where)


def always(*answer, **headers):
    """An answer that is the same whatever was asked for."""
    return lambda handler, content: send(handler, *answer, **headers)


class Server:
    """Serves `files` by path; `answers` are used up first, one a request."""

    def __init__(self):
        self.files, self.answers, self.requests = {FILE.path: CONTENT}, [], []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.lstrip("/")
                server.requests.append((path, self.headers.get("Range")))
                answer = server.answers.pop(0) if server.answers else ranged
                if path in server.files:
                    answer(self, server.files[path])
                else:
                    send(self, 404, b"no such file")

        Handler.log_message = lambda *_: None
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # a client that hangs up is nothing to report
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    running = Server()
    yield running
    running.close()


def get(server, folder, file=FILE, *more_urls):
    return download(file, folder, base_urls=[server.url, *more_urls], progress=False)


def test_a_file_arrives_whole_and_is_not_fetched_again(server, tmp_path):
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert get(server, tmp_path) == tmp_path / "some.zip"
    assert server.requests == [(FILE.path, None)]
    assert [path.name for path in tmp_path.iterdir()] == ["some.zip"]


def test_a_dropped_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.answers = [lambda handler, content: ranged(handler, content, at_most=3_000_000)] * 3
    assert get(server, tmp_path).read_bytes() == CONTENT
    starts = [asked for _, asked in server.requests]
    assert starts[0] is None
    assert len(set(starts)) == 4, "each request must go on from where the last one broke"


@pytest.mark.parametrize(
    ("part", "answers"),
    [(CONTENT[:1_000_000], []), (CONTENT, []), (b"x" * 1000, [always(200, CONTENT)])],
    ids=["begun", "whole", "a server that knows no ranges"],
)
def test_the_next_run_goes_on_where_an_interrupted_one_ended(server, tmp_path, part, answers):
    (tmp_path / "some.zip.part").write_bytes(part)
    server.answers = answers
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [(FILE.path, f"bytes={len(part)}-")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("some.zip", b"mine", r"some\.zip: has 4 bytes instead of .*; remove it"),
        ("some.zip.part", CONTENT[:1000], r"asked for bytes from 1000, the server sends 'bytes 0-9/10'.*\.part"),
    ],
    ids=["a file of the user's", "a range that was not asked for"],
)
def test_what_is_there_is_left_alone_where_it_cannot_be_used(server, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    server.answers = [always(206, CONTENT, Content_Range="bytes 0-9/10")]
    with pytest.raises(InputError, match=words):
        get(server, tmp_path)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_server_is_asked_again(server, tmp_path, status):
    server.answers = [always(status, b"busy")] * module.RETRIES
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_stays_busy_is_given_up_and_nothing_is_lost(server, tmp_path):
    server.answers = [lambda handler, content: ranged(handler, content, at_most=2_000_000)]
    server.answers += [always(503, b"busy")] * (module.RETRIES + 1)
    with pytest.raises(InputError, match=r"gave up after 6 attempts \(the server answers 503.*bytes that have arrived"):
        get(server, tmp_path)
    assert not (tmp_path / "some.zip").exists()
    arrived = (tmp_path / "some.zip.part").read_bytes()
    assert arrived
    assert arrived == CONTENT[: len(arrived)]
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("http://127.0.0.1:1", "gave up after 6 attempts"),
        ("not a url", "cannot be asked for .*; check --base_url"),
        ("ftp://example.org", "cannot be asked for .*; check --base_url"),
    ],
)
def test_what_is_no_server_is_an_error_that_names_it(tmp_path, monkeypatch, base, words):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    with pytest.raises(InputError, match=f"{base}/zips/some.zip: {words}"):
        download(FILE, tmp_path, base_urls=[base], progress=False)


def test_the_command_line_knows_the_splits_and_the_server():
    # Written twice, so that help needs no import of what reads data.
    assert data_command.SPLITS == tuple(SPLIT_NAMES) == tuple(FILES)
    assert f"default: {DOWNLOADS})" in Path(data_command.__file__).read_text()


@pytest.mark.parametrize(
    ("files", "free", "words"),
    [
        ({}, 10**9, r"zips/some\.zip: the server answers 404 Not Found; check --base_url"),
        ({FILE.path: CONTENT}, 1000, f"{len(CONTENT):,} bytes are to come and .* has room for 1,000; make room"),
        ({FILE.path: CONTENT[:-1] + b"?"}, 10**9, f"has the MD5 .* instead of {FILE.md5}.*was removed"),
        ({FILE.path: CONTENT[:-5]}, 10**9, f"has {len(CONTENT) - 5:,} bytes instead of {len(CONTENT):,}"),
        ({FILE.path: CONTENT + b"more"}, 10**9, f"has {len(CONTENT) + 4:,} bytes instead of {len(CONTENT):,}"),
    ],
    ids=["absent", "too large", "corrupt", "short", "long"],
)
def test_what_does_not_fit_or_is_not_the_published_file_is_refused(server, tmp_path, monkeypatch, files, free, words):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    server.files = files
    with pytest.raises(InputError, match=words):
        get(server, tmp_path)
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_next_server_is_tried_where_one_has_a_damaged_file(server, tmp_path):
    good = Server()
    server.files[FILE.path] = CONTENT[::-1]
    assert get(server, tmp_path, FILE, good.url).read_bytes() == CONTENT
    good.close()


def zip_of(folder, pattern):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(folder.glob(pattern)):
            archive.write(file, file.relative_to(folder))
    return packed.getvalue()


def serve_coco(server, folder, monkeypatch):
    """Serve a folder in COCO's layout as the official zips, and image by image."""
    server.files |= {path: zip_of(folder, pattern) for path, pattern in ZIPS.items()}
    server.files |= {str(image.relative_to(folder)): image.read_bytes() for image in folder.glob("*2017/*")}

    def as_served(file):
        content = server.files[file.path]
        return RemoteFile(file.path, hashlib.md5(content).hexdigest(), len(content))

    monkeypatch.setattr(module, "FILES", {split: tuple(map(as_served, files)) for split, files in FILES.items()})


@pytest.fixture
def coco(server, tmp_path, monkeypatch):
    """Scenes in COCO's layout, which the server has."""
    folder = tmp_path / "scenes"
    render_pocket(folder, num_train=5, num_val=3, num_test=2, image_size=16, seed=0)
    serve_coco(server, folder, monkeypatch)
    return folder


def read_coco(folder):
    name = "ydshieh/coco_dataset_script"
    return load_splits(splits=list(SPLIT_NAMES), dataset_name=name, data_dir=str(folder))


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_the_command_puts_the_five_files_where_they_are_read(server, coco, tmp_path, capsys):
    folder = tmp_path / "data"
    assert main(["data", "coco", "--data_dir", str(folder), "--base_url", server.url]) == 0
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == names_in(folder)
    assert len(names_in(folder)) == 5
    expected = read_coco(coco)
    for split, rows in read_coco(folder).items():
        assert rows.dataset["caption"][:] == expected[split].dataset["caption"][:]


def test_the_first_images_are_a_data_set_of_their_own(server, coco, tmp_path):
    folder = tmp_path / "data"
    for _ in range(2):  # the second run finds everything
        download_coco(folder, max_images=2, base_urls=[server.url])
    assert len(server.requests) == 2 + 3 * 2
    assert len(list(folder.glob("*2017/*"))) == 3 * 2
    few, whole = read_coco(folder), read_coco(coco)
    for split, rows in whole.items():
        first = sorted(set(rows.dataset["image_id"]), key=int)[:2]
        expected = [row["caption"] for row in rows.dataset if row["image_id"] in first]
        assert few[split].dataset["caption"][:] == expected
        assert all(Path(path).is_file() for path in few[split].dataset["image_path"])


def test_a_split_alone_is_downloaded_and_a_part_of_it_does_not_share_its_folder(server, coco, tmp_path):
    settings = {"splits": ["validation"], "base_urls": [server.url]}
    download_coco(tmp_path / "part", max_images=1, **settings)
    with pytest.raises(InputError, match="already holds val2017, and the annotations of only one of"):
        download_coco(tmp_path / "part", **settings)
    download_coco(tmp_path / "whole", **settings)
    assert names_in(tmp_path / "whole") == {"val2017.zip", "annotations_trainval2017.zip"}
    with pytest.raises(InputError, match=r"already holds val2017\.zip"):
        download_coco(tmp_path / "whole", max_images=1, **settings)


def test_an_image_name_that_leads_out_of_the_folder_is_refused(server, coco, tmp_path, monkeypatch):
    annotations = coco / "annotations" / "captions_val2017.json"
    content = json.loads(annotations.read_text())
    content["images"][0]["file_name"] = "../../evil.png"
    annotations.write_text(json.dumps(content))
    serve_coco(server, coco, monkeypatch)
    with pytest.raises(InputError, match=r"'\.\./\.\./evil\.png' leads out of val2017/"):
        download_coco(tmp_path / "data", splits=["validation"], max_images=1, base_urls=[server.url])
    assert not list(tmp_path.rglob("evil.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("coco --data_dir x --max_images 0", "--max_images 0: must be at least 1"),
        ("coco --data_dir x --splits valid", "invalid choice: 'valid'"),
        ("coco", "--data_dir"),
        ("coko", "invalid choice: 'coko'"),
    ],
)
def test_wrong_arguments_name_the_value(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
