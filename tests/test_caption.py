"""Captions for one's own pictures: the same in any batch, of any kind of picture, whatever lies beside them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_beam_search import END, randomized
from test_faults import animated, bomb, photo
from transformers import GenerationConfig

import repro
from repro import Captioner
from repro.__main__ import main
from repro.data.images import ImageError, decode_image, resize_of
from repro.errors import InputError
from repro.models.captioning import Caption
from repro.models.pretrained import load_model, save_model

LENGTH = 10
# The same wherever it does not matter: each other setting, and each other size of a batch, is compiled.
SETTINGS = {"num_beams": 3, "num_return_sequences": 2, "max_length": LENGTH, "batch_size": 2}
FLAGS = [f"--{name}={value}" for name, value in SETTINGS.items()]
SCORE = 1e-4
"""Scores of batches of other sizes differ by rounding."""


@pytest.fixture(scope="module")
def model(golden_inputs, tmp_path_factory) -> Path:
    """The golden model with weights that make captions of many kinds."""
    folder = tmp_path_factory.mktemp("caption") / "model"
    loaded = load_model(str(golden_inputs / "model"))
    save_model(loaded, randomized(loaded.params, 10), folder)
    return folder


@pytest.fixture(scope="module")
def captioner(model) -> Captioner:
    return Captioner.from_pretrained(model)


@pytest.fixture(scope="module")
def pictures(golden_inputs) -> list[str]:
    return [str(path) for path in sorted((golden_inputs / "images" / "val").iterdir())][:7]


def texts(captions: list[Caption]) -> list[str]:
    return [found.caption for found in captions]


def scores(captions: list[Caption]) -> list[float]:
    return [found.score for found in captions]


def test_the_package_has_a_captioner_and_starts_without_jax():
    code = "import sys, repro; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert repro.Captioner is Captioner
    with pytest.raises(AttributeError, match="Captionner"):
        repro.Captionner  # noqa: B018


def test_captions_do_not_depend_on_batch_size_order_or_neighbours(captioner, pictures):
    expected = captioner(pictures, **SETTINGS)
    assert len({found[0].caption for found in expected}) > 1
    for batch_size in (1, 2, 5):
        for images in (pictures, pictures[::-1], [pictures[0], pictures[0], *pictures[1:]]):
            found = captioner(images, **{**SETTINGS, "batch_size": batch_size})
            for image, captions in zip(images, found, strict=True):
                wanted = expected[pictures.index(image)]
                assert texts(captions) == texts(wanted)
                np.testing.assert_allclose(scores(captions), scores(wanted), atol=SCORE)


@pytest.mark.parametrize(("num_beams", "penalty"), [(1, 1.0), (3, 0.5)])
def test_a_score_is_the_sum_of_log_probabilities_over_a_power_of_their_number(captioner, pictures, num_beams, penalty):
    parts = captioner.pretrained
    config = GenerationConfig(length_penalty=penalty)
    parts = dataclasses.replace(parts, captioner=dataclasses.replace(parts.captioner, generation_config=config))
    captioner = Captioner(parts)
    resize = resize_of(parts.image_processor)
    pixels = np.stack([decode_image(path, resize, convert_to_rgb=True)[0] for path in pictures])
    settings = {"num_beams": num_beams, "max_length": LENGTH, "num_return_sequences": num_beams}
    tokens = np.asarray(captioner._generate(captioner._params, pixels, **settings).tokens)
    found = captioner(pictures, **settings, batch_size=len(pictures))
    logits, ended = jax.jit(parts.captioner.logits), 0
    for place in range(num_beams):
        inputs = tokens[:, place]
        log_probs = np.asarray(jax.nn.log_softmax(logits(parts.params, pixels, inputs, np.ones_like(inputs))))
        for row, sequence in enumerate(inputs):
            ends = np.flatnonzero(sequence[1:] == END)
            length = ends[0] + 1 if len(ends) else LENGTH - 1
            ended += len(ends) > 0
            total = sum(log_probs[row, position, sequence[position + 1]] for position in range(length))
            assert found[row][place].score == pytest.approx(total / length**penalty, abs=SCORE)
            words = parts.tokenizer.decode(sequence[1 : length + 1], skip_special_tokens=True).strip()
            assert found[row][place].caption == words
    assert 0 < ended < num_beams * len(pictures)


def test_every_kind_of_picture_is_taken(captioner, pictures):
    image = Image.open(pictures[0])
    array = np.asarray(image)
    kinds = [pictures[0], Path(pictures[0]), image, array, Image.open(pictures[0])]
    found = captioner(kinds, **SETTINGS)
    assert all(captions == found[0] for captions in found)
    assert captioner(np.stack([array, array]), **SETTINGS) == found[:2]
    alone = captioner(array, **SETTINGS)  # one picture, one list
    assert texts(alone) == texts(found[0])
    assert captioner([], **SETTINGS) == []


def test_other_modes_are_converted_as_under_exact(captioner, pictures, tmp_path):
    gray = Image.open(pictures[1]).convert("L")
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) * 256)
    gray.save(tmp_path / "gray.png")
    sixteen.save(tmp_path / "sixteen.png")
    images = [gray, gray.convert("RGB"), np.asarray(gray), tmp_path / "gray.png", tmp_path / "sixteen.png", sixteen]
    found = captioner([*images, gray.convert("RGBA"), np.asarray(gray.convert("RGBA"))], **SETTINGS)
    assert all(captions == found[0] for captions in found)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_photograph_is_turned_as_its_camera_was_held(captioner, pictures, tmp_path):
    upright = Image.open(pictures[2])
    exif = Image.Exif()
    exif[0x0112] = 6  # held so that a quarter turn clockwise is missing
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    broken = photo("PNG", upright, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    (tmp_path / "broken.png").write_bytes(broken)
    found = captioner([upright, tmp_path / "turned.png", tmp_path / "broken.png"], **SETTINGS)
    assert found[0] == found[1] == found[2]


def test_an_image_that_cannot_be_used_is_named_and_a_stream_goes_on_behind_it(captioner, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    images = [pictures[0], str(tmp_path / "broken.png"), np.zeros((4, 4, 3)), pictures[1], 17]
    with pytest.raises(ImageError, match=r"broken\.png: not in a format"):
        captioner(images, **SETTINGS)
    with pytest.raises(ImageError, match=r"image 0: float64\[4,4,3\] is not uint8"):
        captioner(images[2:], **SETTINGS)
    results = list(captioner.stream(images, **SETTINGS))
    assert all(image is given for (image, _), given in zip(results, images, strict=True))
    assert [isinstance(found, ImageError) for _, found in results] == [False, True, True, False, True]
    assert texts(results[3][1]) == texts(captioner(pictures[1], **SETTINGS))


def test_results_come_before_all_images_are_read(captioner, pictures):
    given = []

    def images():
        for turn in range(1000):
            given.append(turn)
            yield pictures[turn % 7]

    stream = captioner.stream(images(), **SETTINGS)
    next(stream)
    assert len(given) < 30
    stream.close()


def test_a_program_is_compiled_once_for_each_batch_and_setting(captioner, pictures):
    count = captioner._generate._cache_size
    captioner(pictures[:2], **SETTINGS)
    before = count()
    captioner(pictures, **SETTINGS)  # whose last batch is filled up
    captioner(pictures[:3] + pictures, **SETTINGS)
    assert count() == before
    captioner(pictures[:1], **SETTINGS)  # is a batch of its own
    one = count()
    captioner(pictures[0], **{**SETTINGS, "batch_size": 8})
    captioner(pictures[:2], **{**SETTINGS, "batch_size": 8})
    assert count() == one


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, 32),
        ({"max_length": 20}, 32),  # transformers 4 gives this number where there is none
        ({"max_length": 16}, 16),
        ({"max_new_tokens": 16}, 17),
        ({"max_length": 100}, 64),  # positions of the decoder
    ],
)
def test_captions_are_as_long_as_the_model_says(captioner, named, expected):
    parts = captioner.pretrained
    config = GenerationConfig(**named)
    changed = dataclasses.replace(parts.captioner, generation_config=config)
    assert Captioner(dataclasses.replace(parts, captioner=changed)).max_length == expected


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"num_beams": 0}, "--num_beams 0: must be between 1"),
        ({"num_return_sequences": 2}, "--num_return_sequences 2: must be between 1 and --num_beams 1"),
        ({"max_length": 65}, "--max_length 65: must be between 2 and the decoder's 64"),
        ({"max_length": 1}, "--max_length 1"),
        ({"batch_size": 0}, "--batch_size 0"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(captioner, settings, wanted):
    with pytest.raises(InputError, match=wanted):
        captioner.stream([], **settings)


# --- The command.


@pytest.fixture
def run(model, capfd):
    """Run `repro caption` and give its status, its lines on standard output and on standard error."""

    def run(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
        capfd.readouterr()
        status = main(["caption", *FLAGS, str(model), *map(str, arguments)])
        said = capfd.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run


def names(lines: list[str]) -> list[str]:
    return [json.loads(line)["image"] for line in lines]


HOSTILE = (
    *('it\'s "quoted".png', "line\nbreak.png", "\x1b[31mred\x1b]0;title\x07.png", "\u202egnp.exe", "-dash.png"),
    *("[glob]*?.png", "tab\tand\rreturn.png", os.fsdecode(b"latin-\xe9\xff.png"), "\u2028separator\x85.png", "猫.png"),
    *("zip:", "$(reboot).png", "\\n.png", " blank .png"),
)


def test_any_name_gets_into_json_and_back_and_leaves_a_terminal_as_it_is(run, pictures, tmp_path, monkeypatch):
    for name in HOSTILE:
        shutil.copy(pictures[0], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    status, lines, err = run("--json", "--", *HOSTILE)
    assert (status, err) == (0, [])
    assert names(lines) == list(HOSTILE)
    assert all(line.isascii() and line.isprintable() for line in lines)
    status, lines, err = run("--", *HOSTILE, "absent\x1b]2J")
    assert status == 1
    assert len(lines) == 2 * len(HOSTILE)
    assert all(line.isprintable() for line in lines + err)
    assert err[0] == "absent\\x1b]2J: No such file or directory"


def test_each_image_is_an_object_a_line_in_the_order_given_and_failures_are_told(run, captioner, pictures, tmp_path):
    files = {
        "animated.gif": animated(),
        "bomb.png": bomb(),
        "empty.png": b"",
        "noise.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "text.txt": b"hello",
        "whole.png": photo("PNG"),
        "cut.png": photo("PNG")[:60],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    given = [pictures[0], *(str(tmp_path / name) for name in files), pictures[1], str(tmp_path / "pipe.png")]
    given += [str(tmp_path / "dangling.png"), "/dev/zero", "a\0b", pictures[2]]
    status, lines, err = run(*given, "--json")
    assert status == 1
    assert names(lines) == given
    found = {name: json.loads(line) for name, line in zip(given, lines, strict=True)}
    good = [name for name in given if "captions" in found[name]]
    assert {Path(name).name for name in good} >= {"animated.gif", "whole.png"}
    bad = [name for name in given if name not in good]
    assert {Path(name).name for name in bad} >= {
        "bomb.png",
        "cut.png",
        "empty.png",
        "noise.png",
        "text.txt",
        "pipe.png",
    }
    assert len(bad) == 9
    for name in good:
        assert set(found[name]) == {"image", "captions"}
        assert [set(caption) for caption in found[name]["captions"]] == [{"caption", "score"}] * 2
    for name, line in zip(bad, err[:-1], strict=True):
        assert set(found[name]) == {"image", "error"}
        assert line == f"{name}: {found[name]['error']}".replace("\0", "\\x00")
    assert err[-1] == f"{len(bad)} of {len(given)} could not be captioned"
    wanted = captioner(pictures[0], **SETTINGS)[0]
    first = found[pictures[0]]["captions"][0]
    assert first == {"caption": wanted.caption, "score": pytest.approx(wanted.score, abs=SCORE)}


def test_a_caption_of_control_characters_is_escaped(run, captioner, pictures):
    captions = captioner(pictures, **SETTINGS)
    assert any(not found.caption.isprintable() for found in captions[6])
    status, lines, _ = run(pictures[6])
    assert status == 0
    assert all(line.isprintable() for line in lines)
    lines = run(pictures[6], "--json")[1]
    assert [found["caption"] for found in json.loads(lines[0])["captions"]] == texts(captions[6])


def test_people_get_a_line_each_in_columns(run, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "longer.jpg"):
        shutil.copy(pictures[0], name)
    status, lines, err = run("longer.jpg", "a.jpg")
    assert (status, err) == (0, [])
    assert len(lines) == 4
    assert [line.split("  ")[0] for line in lines] == ["longer.jpg", "", "a.jpg", ""]
    assert len({line.index(".", 12) for line in lines}) == 1  # where the scores have their points


def test_a_folder_stands_for_the_images_in_and_below_it(run, pictures, tmp_path):
    wanted = ["a.JPG", "b/c.png", "b/d/e.webp", "z.jpeg"]
    others = ["notes.txt", "b/movie.mp4", "Thumbs.db"]
    hidden = [".hidden.jpg", ".thumbnails/x.jpg", "b/._a.jpg"]
    for name in [*wanted, *others, *hidden]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[0], tmp_path / name)
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    status, lines, err = run(tmp_path, "--json")
    assert status == 0
    assert names(lines) == [str(tmp_path / name) for name in wanted]
    assert err == [f"{tmp_path}: 3 other files left out"]
    status, lines, err = run(tmp_path / "notes.txt", "--json")  # named, whatever it is called
    assert (status, names(lines)) == (0, [str(tmp_path / "notes.txt")])


def test_a_folder_without_images_is_told_and_no_model_is_loaded(capfd, tmp_path):
    (tmp_path / "readme.txt").write_text("nothing to see")
    assert main(["caption", str(tmp_path / "no model"), str(tmp_path), str(tmp_path / "*.jpg")]) == 1
    err = capfd.readouterr().err.splitlines()
    assert err[:2] == [
        f"{tmp_path}: 1 other file left out",
        f"{tmp_path}: holds no images (avif, bmp, gif, jfif, jpe, jpeg, jpg, pbm, pgm, png, pnm, ppm, tga, tif,"
        " tiff, webp)",
    ]
    assert err[2] == f"{tmp_path}/*.jpg: no file matches"


def test_a_pattern_is_expanded_unless_a_file_has_its_name(run, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.jpg", "below/c.jpg", "[ab].jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(pictures[0], name)
    assert names(run("[ab].jpg", "--json")[1]) == ["[ab].jpg"]
    assert names(run("?.jpg", "--json")[1]) == ["a.jpg", "b.jpg"]
    assert names(run("**/*.jpg", "--json")[1]) == ["[ab].jpg", "a.jpg", "b.jpg", "below/c.jpg"]


@pytest.mark.parametrize(("flags", "end"), [([], b"\n"), (["--null"], b"\0")])
def test_names_come_from_standard_input(run, pictures, tmp_path, monkeypatch, flags, end):
    odd = os.fsencode(tmp_path / ("line\nbreak.png" if flags else "b\xe9.png"))
    shutil.copy(pictures[0], odd)
    listed = end.join([os.fsencode(pictures[1]), odd, b"", b"absent", b"*"]) + end
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    status, lines, err = run(pictures[0], "-", pictures[2], "--json", *flags)
    assert status == 1
    assert names(lines) == [pictures[0], pictures[1], os.fsdecode(odd), "absent", "*", pictures[2]]
    assert len(err) == 3


def test_standard_input_that_names_nothing_is_an_error(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n\n")))
    status, lines, err = run("-")
    assert (status, lines) == (2, [])
    assert "standard input names no image" in err[0]


def test_an_address_is_named_and_the_others_are_captioned(run, pictures):
    status, lines, err = run("https://example.org/a.jpg", pictures[1], "--json")
    assert status == 1
    assert "https://example.org/a.jpg: is an address; save the image" in err[0]
    assert "captions" in json.loads(lines[1])


def no_folder(model: Path) -> None:
    shutil.rmtree(model)


def an_image(model: Path) -> None:
    shutil.rmtree(model)
    Image.new("RGB", (4, 4)).save(model, "PNG")


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def another_kind(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))


def broken_config(model: Path) -> None:
    (model / "config.json").write_bytes(b"\xff\x00{")


def no_weights(model: Path) -> None:
    for name in ("flax_model.msgpack", "model.safetensors"):
        (model / name).unlink()


def cut_weights(model: Path) -> None:
    for name in ("flax_model.msgpack", "model.safetensors"):
        (model / name).write_bytes((model / name).read_bytes()[:1000])


def no_tokenizer(model: Path) -> None:
    for path in [*model.glob("*token*"), *model.glob("vocab*"), *model.glob("merges*")]:
        path.unlink()


def no_processor(model: Path) -> None:
    (model / "preprocessor_config.json").unlink()


SPOILED = [no_folder, an_image, empty, another_kind, broken_config, no_weights, cut_weights, no_tokenizer]


@pytest.mark.parametrize("spoil", [*SPOILED, no_processor])
def test_a_folder_that_is_no_model_is_an_error_of_one_line(spoil, model, pictures, tmp_path, capfd):
    shutil.copytree(model, tmp_path / "model")
    spoil(tmp_path / "model")
    capfd.readouterr()
    assert main(["caption", str(tmp_path / "model"), pictures[0]]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("error: ")
    # transformers 5 has no class for another kind, wherever it lies.
    assert str(tmp_path / "model") in said.err or "has no Flax classes" in said.err


def test_the_name_of_a_model_leaves_a_terminal_as_it_is(pictures, capfd):
    assert main(["caption", "\x1b[2Jmodel", pictures[0]]) == 2
    assert capfd.readouterr().err.startswith("error: \\x1b[2Jmodel: ")


def test_help_comes_within_a_second_and_without_jax():
    code = (
        "import sys; from repro.__main__ import main\n"
        "try: main(['caption', '--help'])\n"
        "except SystemExit: sys.exit(bool({'jax', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    before = sum(os.times()[2:4])  # of processors, by processes that have ended: other tests run beside this one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--num_return_sequences" in done.stdout
    assert sum(os.times()[2:4]) - before < 1


def test_a_reader_that_has_enough_ends_the_command_quietly(model, pictures):
    command = [sys.executable, "-m", "repro", "caption", str(model), *pictures * 3, "--json", *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline())["image"] == pictures[0]
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
