"""COCO's official files over HTTP: resumed after any interruption, under their names only when whole and checked."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests

from repro.data.coco import DOWNLOADS, SPLIT_NAMES
from repro.data.image_cache import in_parallel
from repro.errors import InputError, is_disk_full
from repro.json_files import write_json
from repro.progress import progress_bar, waiting

YEAR = "2017"
CHUNK = 1 << 20
CONNECT_SECONDS, READ_SECONDS = 10, 60
RETRIES = 5  # attempts in a row that bring not one byte more, before a server is given up
PAUSE = 1.0  # seconds, doubled with each of them
PARALLEL_IMAGES = 16


@dataclass(frozen=True)
class RemoteFile:
    """A file below a base URL, with what is known of its content: MD5 in hexadecimal, size in bytes."""

    path: str
    md5: str | None = None
    size: int | None = None


ANNOTATIONS = RemoteFile("annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", 252_907_541)
TEST_IMAGES = RemoteFile("annotations/image_info_test2017.zip", "85da7065e5e600ebfee8af1edb634eb5")
# Of each split: its images, and what is said of them. Source: sizes and checksums on which several public download
# scripts agree.
FILES = {
    "train": (RemoteFile("zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_336_861_798), ANNOTATIONS),
    "validation": (RemoteFile("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", 815_585_330), ANNOTATIONS),
    "test": (RemoteFile("zips/test2017.zip", "77ad2c53ac5d0aea611d422c0938fb35", 6_646_970_404), TEST_IMAGES),
}


def download_coco(
    data_dir: Path,
    *,
    splits: Sequence[str] = tuple(SPLIT_NAMES),
    max_images: int | None = None,
    base_urls: Sequence[str] = (DOWNLOADS,),
) -> list[Path]:
    """Put splits of COCO 2017 into a folder as `repro.data.coco` reads them.

    Args:
        splits: of `train`, `validation`, `test`.
        max_images: take only the first images of each split, one by one, with a cut annotation file; None for the zips.
        base_urls: tried one after another; each has `zips/`, `annotations/` and, for single images, `train2017/` etc.

    Returns:
        The files and folders that are now there.

    Raises:
        InputError: a file cannot be had, is not what was published, or does not fit on the disk. What has arrived stays
            and is resumed by the next call.
    """
    if max_images is not None and max_images < 1:
        raise InputError(f"--max_images {max_images}: must be at least 1.")
    data_dir.mkdir(parents=True, exist_ok=True)
    for split in splits:
        part = SPLIT_NAMES[split] + YEAR
        other = data_dir / (part if max_images is None else f"{part}.zip")
        if other.exists():
            raise InputError(
                f"--data_dir {data_dir}: already holds {other.name}, and the annotations of only one of the two"
                " would be read; name another folder, or remove it first."
            )
    fetch = partial(download, base_urls=base_urls)
    if max_images is None:
        files = dict.fromkeys(file for split in splits for file in FILES[split])
        return [fetch(file, data_dir) for file in files]
    return [_download_first(split, fetch(FILES[split][1], data_dir), max_images, base_urls) for split in splits]


def download(file: RemoteFile, folder: Path, *, base_urls: Sequence[str], progress: bool = True) -> Path:
    """Download one file, or find it there; see `download_coco` for what is raised."""
    target = folder / Path(file.path).name
    part = target.with_name(f"{target.name}.part")
    if target.exists():
        _check(target, file)
        return target
    problems = []
    for base in base_urls:
        url = f"{base.rstrip('/')}/{file.path}"
        try:
            _fetch_patiently(url, part, size=file.size, progress=progress)
            _check(part, file, source=url)
            part.replace(target)
            return target
        except InputError as error:
            problems.append(str(error))
        except requests.RequestException as error:  # an OSError too
            problems.append(f"{url}: cannot be asked for ({error}); check --base_url.")
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise InputError(f"{folder}: the disk is full; {part.name} is kept, make room and run again.") from error
    raise InputError(" ".join(problems))


def _fetch_patiently(url: str, part: Path, *, size: int | None, progress: bool) -> None:
    """Fetch again from where it broke off, as long as anything arrives."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _fetch(url, part, size=size, progress=progress)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            failures = 0 if _size(part) > before else failures + 1
            if failures > RETRIES:
                raise InputError(
                    f"{url}: gave up after {failures} attempts ({error}); the {_size(part):,} bytes that have arrived"
                    " are kept, and the next run goes on from there. Try again later, or another --base_url."
                ) from error
            time.sleep(PAUSE * 2.0**failures)


def _fetch(url: str, part: Path, *, size: int | None, progress: bool) -> None:
    start = _size(part)
    # A compressed transfer could not be resumed by counting bytes.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response:
        status, answer = response.status_code, f"the server answers {response.status_code} {response.reason}"
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all of it is there, or more than all of it: the check says which
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise requests.ConnectionError(answer)  # the server is busy, which may pass as well
        if not response.ok:
            raise InputError(f"{url}: {answer}; check --base_url.")
        resumes = status == HTTPStatus.PARTIAL_CONTENT
        sent = response.headers.get("Content-Range", "")
        if resumes and not sent.startswith(f"bytes {start}-"):
            raise InputError(
                f"{url}: asked for bytes from {start}, the server sends {sent!r}; remove {part} to start anew, or try"
                " another --base_url."
            )
        start = start if resumes else 0
        length = response.headers.get("Content-Length")
        total = size if length is None else start + int(length)
        free = shutil.disk_usage(part.parent).free
        if total and total - start > free:
            raise InputError(
                f"{url}: {total - start:,} bytes are to come and {part.parent} has room for {free:,}; make room first."
            )
        in_bytes = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
        bar = progress_bar(progress=progress, desc=part.stem, total=total, initial=start, **in_bytes)
        with part.open("ab" if resumes else "wb") as opened, bar:
            for chunk in response.iter_content(CHUNK):
                opened.write(chunk)
                bar.update(len(chunk))
        if total and _size(part) < total:
            raise requests.ConnectionError(f"{_size(part):,} of {total:,} bytes arrived")


def _check(path: Path, file: RemoteFile, *, source: str | None = None) -> None:
    """Hold a file against its published size and MD5; a partial one that fails is removed, for it cannot be mended."""
    if file.size is not None and _size(path) != file.size:
        problem = f"has {_size(path):,} bytes instead of {file.size:,}"
    elif file.md5 is not None and (found := _md5(path)) != file.md5:
        problem = f"has the MD5 {found} instead of {file.md5}"
    else:
        return
    if source is None:
        raise InputError(f"{path}: {problem}; remove it, and run again to get it anew.")
    path.unlink()
    raise InputError(
        f"{source}: {problem}, so it was damaged on its way or is another file; what arrived was removed. Run again, or"
        " try another --base_url."
    )


def _md5(path: Path) -> str:
    with path.open("rb") as opened, waiting(f"checking {path.name}"):
        return hashlib.file_digest(opened, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _download_first(split: str, archive: Path, max_images: int, base_urls: Sequence[str]) -> Path:
    """Make the first images of a split, and an annotation file that knows no others."""
    part, folder = SPLIT_NAMES[split] + YEAR, archive.parent
    member = f"annotations/{'image_info' if split == 'test' else 'captions'}_{part}.json"
    with zipfile.ZipFile(archive) as opened:
        content: dict[str, Any] = json.loads(opened.read(member))
    images = content["images"][:max_images]
    names = [image["file_name"] for image in images]
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{archive}: the image name {name!r} leads out of {part}/; get the file again.")
    target = folder / part
    target.mkdir(exist_ok=True)
    fetch = partial(download, folder=target, base_urls=base_urls, progress=False)
    missing = [RemoteFile(f"{part}/{name}") for name in names if not (target / name).exists()]
    with closing(in_parallel(fetch, missing, PARALLEL_IMAGES)) as fetched:
        list(progress_bar(fetched, progress=True, total=len(missing), desc=part, unit="image", leave=False))
    kept = {image["id"] for image in images}
    content["images"] = images
    if "annotations" in content:
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    cut = folder / member
    cut.parent.mkdir(exist_ok=True)
    write_json(cut, content, indent=None)
    return target


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
