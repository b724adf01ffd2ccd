"""Captions for one's own pictures: the same in any batch, of any kind of picture, whatever lies beside them."""

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
SCORE = 1e-4  # scores of batches of other sizes differ by rounding


@pytest.fixture(scope="module")
def model(golden_inputs, tmp_path_factory):
    """The golden model with weights that make captions of many kinds."""
    folder = tmp_path_factory.mktemp("caption") / "model"
    loaded = load_model(str(golden_inputs / "model"))
    save_model(loaded, randomized(loaded.params, 10), folder)
    return folder


@pytest.fixture(scope="module")
def captioner(model):
    return Captioner.from_pretrained(model)


@pytest.fixture(scope="module")
def pictures(golden_inputs):
    return [str(path) for path in sorted((golden_inputs / "images" / "val").iterdir())][:7]


@pytest.fixture(scope="module")
def expected(captioner, pictures):
    """Captions of each picture."""
    return dict(zip(pictures, captioner(pictures, **SETTINGS), strict=True))


def texts(captions):
    return [found.caption for found in captions]


def assert_alike(captions, wanted):
    assert texts(captions) == texts(wanted)
    np.testing.assert_allclose([found.score for found in captions], [found.score for found in wanted], atol=SCORE)


def with_generation_config(captioner, **named):
    """The captioner of a model that asks for something else."""
    parts = captioner.pretrained
    changed = dataclasses.replace(parts.captioner, generation_config=GenerationConfig(**named))
    return Captioner(dataclasses.replace(parts, captioner=changed))


def test_captions_do_not_depend_on_batch_size_order_or_neighbours(captioner, pictures, expected):
    assert len({captions[0].caption for captions in expected.values()}) > 1
    for batch_size in (1, 2, 5):
        for images in (pictures, pictures[::-1], [pictures[0], pictures[0], *pictures[1:]]):
            found = captioner(images, **{**SETTINGS, "batch_size": batch_size})
            for image, captions in zip(images, found, strict=True):
                assert_alike(captions, expected[image])


@pytest.mark.parametrize(("num_beams", "penalty"), [(1, 1.0), (3, 0.5)])
def test_a_score_is_the_sum_of_log_probabilities_over_a_power_of_their_number(captioner, pictures, num_beams, penalty):
    captioner = with_generation_config(captioner, length_penalty=penalty)
    parts = captioner.pretrained
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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_every_kind_of_picture_is_taken_as_under_exact(captioner, pictures, tmp_path):
    plain, other, upright = (Image.open(path) for path in pictures[:3])
    array, gray = np.asarray(plain), other.convert("L")
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) * 256)
    exif = Image.Exif()
    exif[0x0112] = 6  # held so that a quarter turn clockwise is missing
    gray.save(tmp_path / "gray.png")
    sixteen.save(tmp_path / "sixteen.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    broken = photo("PNG", upright, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    (tmp_path / "broken.png").write_bytes(broken)
    for alike in (
        [plain, pictures[0], Path(pictures[0]), array, Image.open(pictures[0])],
        [gray, gray.convert("RGB"), gray.convert("RGBA"), np.asarray(gray), np.asarray(gray.convert("RGBA"))],
        [gray, sixteen, tmp_path / "gray.png", tmp_path / "sixteen.png"],
        [upright, tmp_path / "turned.png", tmp_path / "broken.png"],
    ):
        first, *others = captioner(alike, **SETTINGS)
        assert others == [first] * len(others)
    two = captioner([array, array], **SETTINGS)
    assert captioner(np.stack([array, array]), **SETTINGS) == two
    assert_alike(captioner(array, **SETTINGS), two[0])
    assert captioner([], **SETTINGS) == []


def test_an_image_that_cannot_be_used_is_named_and_a_stream_goes_on_behind_it(captioner, pictures, expected, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    images = [pictures[0], str(tmp_path / "broken.png"), np.zeros((4, 4, 3)), pictures[1], 17]
    with pytest.raises(ImageError, match=r"broken\.png: damaged, or not in a format"):
        captioner(images, **SETTINGS)
    with pytest.raises(ImageError, match=r"image 0: float64\[4,4,3\] is not uint8"):
        captioner(images[2:], **SETTINGS)
    results = list(captioner.stream(images, **SETTINGS))
    assert all(image is given for (image, _), given in zip(results, images, strict=True))
    assert [isinstance(found, ImageError) for _, found in results] == [False, True, True, False, True]
    assert_alike(results[3][1], expected[pictures[1]])


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


def test_captions_are_as_long_as_the_model_says(captioner):
    for length, named in (
        (32, {}),
        (32, {"max_length": 20}),  # transformers 4 gives this number where there is none
        (16, {"max_length": 16}),
        (17, {"max_new_tokens": 16}),
        (64, {"max_length": 100}),  # positions of the decoder
    ):
        assert with_generation_config(captioner, **named).max_length == length


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_beams", 0), ("num_return_sequences", 2), ("max_length", 65), ("max_length", 1), ("batch_size", 0)],
)
def test_settings_out_of_range_are_refused_at_once(captioner, name, value):
    with pytest.raises(InputError, match=f"--{name} {value}: must be"):
        captioner.stream([], **{name: value})


# The command.


@pytest.fixture
def run(model, capfd):
    """Run `repro caption` and give its status, its lines on standard output and on standard error."""

    def run(*arguments):
        capfd.readouterr()
        status = main(["caption", *FLAGS, str(model), *map(str, arguments)])
        said = capfd.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run


@pytest.fixture
def copies(pictures, tmp_path, monkeypatch):
    """Put a picture under some names into the working directory."""
    monkeypatch.chdir(tmp_path)

    def copies(*names):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures[0], name)

    return copies


def names(lines):
    return [json.loads(line)["image"] for line in lines]


HOSTILE = (
    *('it\'s "quoted".png', "line\nbreak.png", "\x1b[31mred\x1b]0;title\x07.png", "\u202egnp.exe", "-dash.png"),
    *("[glob]*?.png", "tab\tand\rreturn.png", os.fsdecode(b"latin-\xe9\xff.png"), "\u2028separator\x85.png", "猫.png"),
    *("zip:", "$(reboot).png", "\\n.png", " blank .png"),
)


def test_any_name_gets_into_json_and_back_and_leaves_a_terminal_as_it_is(run, copies):
    copies(*HOSTILE)
    status, lines, err = run("--json", "--", *HOSTILE)
    assert (status, names(lines), err) == (0, list(HOSTILE), [])
    assert all(line.isascii() and line.isprintable() for line in lines)
    status, lines, err = run("--", *HOSTILE, "absent\x1b]2J")
    assert (status, len(lines)) == (1, 2 * len(HOSTILE))
    assert all(line.isprintable() for line in lines + err)
    assert err[0] == "absent\\x1b]2J: No such file or directory"


def test_each_image_is_an_object_a_line_in_the_order_given_and_failures_are_told(run, expected, pictures, tmp_path):
    files = {
        "animated.gif": animated(),
        "whole.png": photo("PNG"),
        "bomb.png": bomb(),
        "empty.png": b"",
        "noise.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "text.txt": b"hello",
        "cut.png": photo("PNG")[:60],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    made = [str(tmp_path / name) for name in (*files, "pipe.png", "dangling.png")]
    elsewhere = ["/dev/zero", "a\0b", "https://example.org/a.jpg"]
    good, bad = [pictures[0], *made[:2], pictures[1]], [*made[2:], *elsewhere]
    given = [pictures[0], *made, *elsewhere, pictures[1]]
    status, lines, err = run(*given, "--json")
    assert (status, names(lines)) == (1, given)
    found = {name: json.loads(line) for name, line in zip(given, lines, strict=True)}
    assert [name for name in given if "captions" in found[name]] == good
    for name in good:
        assert set(found[name]) == {"image", "captions"}
        assert len([Caption(**caption) for caption in found[name]["captions"]]) == 2
    for name, line in zip(bad, err[:-1], strict=True):
        assert set(found[name]) == {"image", "error"}
        assert line == f"{name}: {found[name]['error']}".replace("\0", "\\x00")
    assert "is an address; save the image" in err[-2]
    assert err[-1] == f"{len(bad)} of {len(given)} could not be captioned"
    assert_alike([Caption(**caption) for caption in found[pictures[0]]["captions"]], expected[pictures[0]])


def test_a_caption_of_control_characters_is_escaped(run, expected, pictures):
    captions = texts(expected[pictures[6]])
    assert not all(map(str.isprintable, captions))
    status, lines, _ = run(pictures[6])
    assert status == 0
    assert all(line.isprintable() for line in lines)
    lines = run(pictures[6], "--json")[1]
    assert [found["caption"] for found in json.loads(lines[0])["captions"]] == captions


def test_people_get_a_line_each_in_columns(run, copies):
    copies("a.jpg", "longer.jpg")
    status, lines, err = run("longer.jpg", "a.jpg")
    assert (status, err) == (0, [])
    assert [line.split("  ")[0] for line in lines] == ["longer.jpg", "", "a.jpg", ""]
    assert len({line.index(".", 12) for line in lines}) == 1, "where the scores have their points"


def test_a_folder_stands_for_the_images_in_and_below_it(run, copies, tmp_path):
    wanted = ["a.JPG", "b/c.png", "b/d/e.webp", "z.jpeg"]
    copies(*wanted, "notes.txt", "b/movie.mp4", "Thumbs.db", ".hidden.jpg", ".thumbnails/x.jpg", "b/._a.jpg")
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    status, lines, err = run(tmp_path, "--json")
    assert (status, err) == (0, [f"{tmp_path}: 3 other files left out"])
    assert names(lines) == [str(tmp_path / name) for name in wanted]
    assert names(run("notes.txt", "--json")[1]) == ["notes.txt"], "named, whatever it is called"


def test_a_folder_without_images_is_told_and_no_model_is_loaded(capfd, tmp_path):
    (tmp_path / "readme.txt").write_text("nothing to see")
    assert main(["caption", str(tmp_path / "no model"), str(tmp_path), str(tmp_path / "*.jpg")]) == 1
    others, holds, pattern, _ = capfd.readouterr().err.splitlines()
    assert others == f"{tmp_path}: 1 other file left out"
    assert holds.startswith(f"{tmp_path}: holds no images (avif, bmp, gif, jfif, jpe, ")
    assert pattern == f"{tmp_path}/*.jpg: no file matches"


def test_a_pattern_is_expanded_unless_a_file_has_its_name(run, copies):
    copies("b.jpg", "a.jpg", "below/c.jpg", "[ab].jpg")
    assert names(run("[ab].jpg", "--json")[1]) == ["[ab].jpg"]
    assert names(run("?.jpg", "--json")[1]) == ["a.jpg", "b.jpg"]
    assert names(run("**/*.jpg", "--json")[1]) == ["[ab].jpg", "a.jpg", "b.jpg", "below/c.jpg"]


@pytest.mark.parametrize(("flags", "end"), [([], b"\n"), (["--null"], b"\0")])
def test_names_come_from_standard_input_which_has_to_name_some(run, pictures, copies, monkeypatch, flags, end):
    odd = "line\nbreak.png" if flags else os.fsdecode(b"b\xe9.png")
    copies(odd)
    listed = end.join([os.fsencode(pictures[1]), os.fsencode(odd), b"", b"absent", b"*"]) + end
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    status, lines, err = run(pictures[0], "-", pictures[2], "--json", *flags)
    assert (status, len(err)) == (1, 3)
    assert names(lines) == [pictures[0], pictures[1], odd, "absent", "*", pictures[2]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(end * 2)))
    status, lines, err = run("-", *flags)
    assert (status, lines) == (2, [])
    assert "standard input names no image" in err[0]


def remove(*patterns):
    return lambda model: [path.unlink() for pattern in patterns for path in model.glob(pattern)]


def put_an_image_in_its_place(model):
    shutil.rmtree(model)
    Image.new("RGB", (4, 4)).save(model, "PNG")


SPOILED = {
    "no folder": shutil.rmtree,
    "an image": put_an_image_in_its_place,
    "empty": remove("*"),
    "another kind": lambda model: (model / "config.json").write_text('{"model_type": "bert"}'),
    "broken config": lambda model: (model / "config.json").write_bytes(b"\xff\x00{"),
    "no tokenizer": remove("*token*", "vocab*", "merges*"),
    "no processor": remove("preprocessor_config.json"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_folder_that_is_no_model_is_an_error_of_one_line(spoil, model, pictures, tmp_path, capfd):
    shutil.copytree(model, tmp_path / "model")
    spoil(tmp_path / "model")
    capfd.readouterr()
    assert main(["caption", str(tmp_path / "model"), pictures[0]]) == 2
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert (said.out, line[:7]) == ("", "error: ")
    # transformers 5 has no class for another kind, wherever it lies.
    assert str(tmp_path / "model") in line or "has no Flax classes" in line


def test_the_name_of_a_model_leaves_a_terminal_as_it_is(pictures, capfd):
    assert main(["caption", "\x1b[2Jmodel", pictures[0]]) == 2
    assert capfd.readouterr().err.startswith("error: \\x1b[2Jmodel: ")


def test_a_reader_that_has_enough_ends_the_command_quietly(model, pictures):
    command = [sys.executable, "-m", "repro", "caption", str(model), *pictures * 3, "--json", *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["image"] == pictures[0]
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
