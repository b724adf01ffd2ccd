"""The pages: every command in them is run or parsed, every snippet runs, every link, flag, file and message is one.

A command is a line of a fenced block without a language. Each has exactly one test, which names it by `runs`; where a
line cannot be run here, what it installs or measures is held against what CI runs.
"""

import argparse
import ast
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from itertools import takewhile
from pathlib import Path

import datasets.config
import pytest
import test_documented_command
import test_reproduce
from conftest import DECODER, ENCODER
from flax import serialization
from PIL import Image
from test_download import Server, serve_coco

import repro.commands
import repro.data.download
import repro.recipes
import repro.recipes.reproduce
import repro.recipes.verify
import repro.reports.write
from repro.__main__ import main
from repro.config import ARGUMENTS, given_flags, parse_arguments
from repro.models.pretrained import load_model, save_model
from repro.models.weights import flatten
from repro.pocket.halves import render_pocket
from repro.recipes import read_recipe

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for pattern in ("README.md", "[rtb]*/README.md", "repro/*/README.md")
    for path in sorted(ROOT.glob(pattern))
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TOX = ConfigParser(interpolation=None)
TOX.read(ROOT / "tox.ini")
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
LANGUAGES = {"", "python", "json", "text"}


def blocks(language):
    """Contents of the fenced blocks of a language, on all pages."""
    found = [block for page in PAGES.values() for block in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)]
    assert {name for name, _ in found} <= LANGUAGES
    return [content for name, content in found if name == language]


def lines_of(block):
    """Commands of a block: continued lines joined, comments and repeated spaces gone."""
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        yield re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", line)).strip()


def prose(page):
    return re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)


def flags_in(text):
    return re.findall(r"(?<![\w-])--([a-z]\w*)", text)


COMMANDS = [line for block in blocks("") for line in lines_of(block)]
TESTED = []


def runs(*others, **commands):
    """Give a test the commands that it runs, by these names; and say which others it stands for."""
    TESTED.extend([*others, *commands.values()])
    return pytest.mark.parametrize(tuple(commands), [tuple(commands.values())], ids=["as written"])


@pytest.fixture(scope="session")
def in_both_formats(golden_inputs, tmp_path_factory):
    """The golden model as a checkpoint has it, for PyTorch too."""
    folder = tmp_path_factory.mktemp("both-formats") / "model"
    loaded = load_model(str(golden_inputs / "model"))
    save_model(loaded, loaded.params, folder)
    return folder


@pytest.fixture
def place(tmp_path, golden_inputs, in_both_formats, monkeypatch):
    """A working directory in which what the pages name is there: MODEL, pictures, photos."""
    folder = tmp_path / "place"
    shutil.copytree(in_both_formats, folder / "MODEL")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    photos = sorted((golden_inputs / "images" / "val").iterdir())
    for name in ("a.jpg", "b.jpg", "one.png", "photos/1.jpg", "photos/2.jpg", "more/deep/3.jpg", "pictures/dog.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photos[len(name)]).convert("RGB").save(name)
    shutil.copy("a.jpg", "pictures/cat.jpg")
    shutil.copytree(golden_inputs / "images", "pictures/images")
    examples = next(block for block in blocks("json") if "dog.jpg" in block)
    for split, count in (("train", 72), ("val", 12)):
        rows = (golden_inputs / f"{split}.jsonl").read_text().replace('"image_path"', '"image"').splitlines()
        Path(f"pictures/{split}.jsonl").write_text(examples + "\n".join(rows[:count]))
    return folder


@pytest.fixture
def named_halves(place, halves):
    """Folders of the names that the documented command has for its halves."""
    for name, folder in halves.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(folder)


def words_of(command):
    """Split a command into words, as a shell does in this directory."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def run(command):
    program, *arguments = words_of(command)
    assert program == "repro"
    return main(arguments)


# What installs and tests.


@runs(command=".venv/bin/pip install tox-uv && .venv/bin/tox")
def test_the_second_command_is_the_one_that_ci_runs(command):
    reads = re.search(r"command=\$\((sed .* README\.md)\)", (ROOT / ".ci" / "run").read_text())
    read = subprocess.run(["bash", "-c", reads[1]], capture_output=True, text=True, check=True, cwd=ROOT)
    assert read.stdout.strip() == command
    assert [name.strip() for name in TOX["tox"]["env_list"].split(",")] == ["lint", "types", "tests"]


@runs(
    "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/repro reproduce",
    *(f"pip install {what}" for what in ("'.[cuda12]'", "'.[tpu]'", "'.[flax-class]'", ". torch==2.13.0")),
)
def test_what_is_installed_is_declared_and_what_ci_installs():
    assert "repro" in PROJECT["scripts"]
    assert hasattr(test_reproduce, "test_reproduce_passes_or_fails_by_its_targets")  # which runs that, made small
    assert (EXTRAS["cuda12"], EXTRAS["tpu"]) == (["jax[cuda12]"], ["jax[tpu]"])
    assert "transformers<5" in EXTRAS["flax-class"]
    assert "flax-class: flax-class" in TOX["testenv:{tests,oldest,newest,flax-class,accelerator,next}"]["extras"]
    assert TOX["testenv:torch"]["deps"] == "torch==2.13.0"


@runs(command="repro selftest")
def test_the_selftest_says_what_computes_and_whether_it_computes_right(command, monkeypatch, capsys):
    monkeypatch.setattr("repro.recipes.selftest.CASES", ("current_block0",))
    assert run(f"{command} --json") == 0
    said = json.loads(capsys.readouterr().out)
    ((case,),) = said["results"].values()
    assert (case["name"], case["passed"], said["passed"]) == ("current_block0", True, True)
    assert {"repro", "python", "jax", "flax", "transformers"} <= set(said["versions"])


# The documented run.


@pytest.fixture
def small_coco2017(monkeypatch):
    """The recipe with batches of 4 rows a replica, and without targets that a small stand-in cannot meet."""
    recipe = read_recipe("coco2017")
    recipe["flags"] |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    recipe["targets"] = [{"metric": "eval_loss", "low": 1.0, "high": 50.0, "source": "any loss"}]
    for module in (repro.recipes, repro.reports.write, repro.recipes.reproduce, repro.recipes.verify):
        monkeypatch.setattr(module, "read_recipe", lambda name: {"coco2017": recipe}[name])


@runs(
    download="repro data coco --data_dir data --splits train validation",
    dry_run="repro reproduce coco2017 --data_dir data --dry_run",
    reproduce="repro reproduce coco2017 --data_dir data",
    verify="repro verify repro-coco2017",
    report="repro report repro-coco2017",
)
@pytest.mark.usefixtures("named_halves", "small_coco2017")
def test_the_documented_run_goes_from_download_to_report(
    download, dry_run, reproduce, verify, report, tmp_path, monkeypatch, capsys
):
    folder, server = Path("repro-coco2017"), Server()
    render_pocket(tmp_path / "coco", num_train=8, num_val=8, image_size=32, seed=1)
    serve_coco(server, tmp_path / "coco", monkeypatch)
    monkeypatch.setattr(repro.data.download, "DOWNLOADS", server.url)
    assert run(download) == 0
    server.close()
    assert sorted(os.listdir("data")) == ["annotations_trainval2017.zip", "train2017.zip", "val2017.zip"]
    assert run(dry_run) == 0
    assert "for 1 steps and 1 evaluations" in capsys.readouterr().out
    assert not folder.exists()
    assert run(reproduce) == 0
    assert run(verify) == 0
    assert "PASS: 1 run of coco2017" in capsys.readouterr().out
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert (facts["num_replicas"], facts["flags"]["num_beams"], facts["num_steps"]) == (8, 8, 1)
    assert facts["data"]["validation"]["kept"] == 40
    (folder / "report.html").unlink()
    assert run(report) == 0
    assert ">PASS</strong> against the targets of coco2017" in (folder / "report.html").read_text()


@runs(command=next(line for line in COMMANDS if line.startswith("repro train --output_dir ./image-captioning")))
def test_the_documented_command_has_a_test_that_runs_it(command, place):
    documented = [word.replace("$PWD", str(place)) for word in test_documented_command.documented_command()]
    assert words_of(command)[1:] == documented
    assert hasattr(test_documented_command, "test_the_documented_command_runs_with_all_its_flags")


# Own data, models, captions.


@runs(
    check="repro data check --model_name_or_path MODEL --train_file pictures/train.jsonl"
    " --validation_file pictures/val.jsonl --max_target_length 32",
    train="repro train --model_name_or_path MODEL --output_dir my-run --do_train --do_eval --predict_with_generate"
    " --train_file pictures/train.jsonl --validation_file pictures/val.jsonl --max_target_length 32 --num_beams 4",
    caption="repro caption my-run pictures/dog.jpg",
    export="repro export --model_name_or_path my-run/ckpt_epoch_3_* --output_dir my-model",
)
@pytest.mark.usefixtures("place")
def test_five_lines_train_on_own_pictures(check, train, caption, export, capsys):
    assert run(check) == 0
    assert "train: 75 rows, 75 can be used" in capsys.readouterr().out
    assert run(train) == 0
    assert len(list(Path("my-run").glob("ckpt_epoch_*"))) == 3
    assert Path("my-run/report.html").is_file()
    capsys.readouterr()
    assert run(caption) == 0
    assert re.match(r"pictures/dog\.jpg +-\d", capsys.readouterr().out)
    assert run(export) == 0
    assert {"flax_model.msgpack", "model.safetensors"} <= {*os.listdir("my-model")}


@runs(
    named="repro caption MODEL photos/ 'more/**/*.jpg' one.png --num_beams 8",
    found="find photos -name '*.jpg' -print0 | repro caption MODEL - --null --json > captions.jsonl",
)
@pytest.mark.usefixtures("place")
def test_pictures_are_captioned_from_anywhere(named, found, monkeypatch, capsys):
    assert run(named) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["photos/1.jpg", "photos/2.jpg", "more/deep/3.jpg", "one.png"]
    find, caption = found.removesuffix(" > captions.jsonl").split(" | ")
    listed = subprocess.run(["bash", "-c", find], capture_output=True, check=True).stdout
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    assert run(caption) == 0
    captioned = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(line["image"] for line in captioned) == ["photos/1.jpg", "photos/2.jpg"]
    assert all(line["captions"] for line in captioned)


@runs(
    command=f"repro create-model --output_dir model --encoder_model_name_or_path {ENCODER}"
    f" --decoder_model_name_or_path {DECODER}"
)
@pytest.mark.usefixtures("named_halves")
def test_a_model_of_the_documented_halves_keeps_them_and_says_what_is_random(command, capsys):
    assert run(command) == 0
    assert "cross-attention, enc_to_dec_proj: random weights, seed 42" in capsys.readouterr().out
    created = load_model("model")
    for half, folder in (("encoder", ENCODER), ("decoder", DECODER)):
        ours = flatten(created.params[half])
        theirs = flatten(serialization.msgpack_restore(Path(folder, "flax_model.msgpack").read_bytes()))
        assert all((ours[name] == array).all() for name, array in theirs.items())
        assert all("cross" in name for name in ours.keys() - theirs.keys())
    assert created.tokenizer.pad_token == created.tokenizer.eos_token == "<|endoftext|>"
    assert run(command) == 2, "nothing is overwritten"


@runs(
    recipe="repro reproduce coco2017 --data_dir data --distributed",
    of_file="repro train run.json",
    pod="repro train --distributed --output_dir pod --model_name_or_path MODEL --train_file pictures/train.jsonl"
    " --do_train",
    two="repro train --coordinator host-0:1234 --num_processes 2 --process_id 0 --output_dir two"
    " --model_name_or_path MODEL --train_file pictures/train.jsonl --do_train",
)
@pytest.mark.usefixtures("place")
def test_several_processes_take_the_same_flags_as_one(recipe, of_file, pod, two):  # test_processes.py runs them
    (flags,) = (block for block in blocks("json") if "num_train_epochs" in block)
    Path("run.json").write_text(flags)
    given = given_flags(ARGUMENTS, words_of(recipe)[3:], command="reproduce")
    assert given == {"data_dir": "data", "distributed": True}
    read = [parse_arguments(ARGUMENTS, words_of(line)[2:], command="train") for line in (of_file, pod, two)]
    assert [model.model_name_or_path for model, _, _ in read] == ["MODEL"] * 3
    assert [args.distributed for _, _, args in read] == [False, True, False]
    assert (read[2][2].coordinator, read[2][2].num_processes, read[2][2].process_id) == ("host-0:1234", 2, 0)


# Changing something; test_verify.py holds such runs against each other.


class Told(Exception):
    """What a program was told, in the place of its work."""


@runs(
    before="repro reproduce pocket --seed 1 --output_dir old-1",
    after="repro reproduce pocket --seed 1 --output_dir new-1",
    verify="repro verify new-{1..12} --against old-{1..12} --seeds 12",
    dry_run="repro reproduce coco2017 --data_dir data --dtype bfloat16 --dry_run",
)
def test_what_a_command_is_told_reaches_what_works(before, after, verify, dry_run, tmp_path, monkeypatch):
    def stop(*arguments, **more):
        raise Told(arguments, more)

    def told(command):
        with pytest.raises(Told) as caught:
            run(command)
        return caught.value.args

    monkeypatch.chdir(tmp_path)
    for module, name in (("reproduce", "reproduce"), ("verify", "verify"), ("preflight", "dry_run")):
        monkeypatch.setattr(f"repro.recipes.{module}.{name}", stop)
    assert told(before)[0] == ("pocket", Path("old-1"), {"seed": 1})
    assert told(after)[0] == ("pocket", Path("new-1"), {"seed": 1})
    (folders,), more = told(verify)
    assert (folders, more["reference"]) == tuple([Path(f"{kind}-{n}") for n in range(1, 13)] for kind in ("new", "old"))
    assert more["seeds"] == 12
    (model, data, _), _ = told(dry_run)
    assert (model.dtype, data.data_dir) == ("bfloat16", "data")


# Benchmarks, whose flags are read; test_benchmarks.py and `tox -e bench` run them very small.


BENCHMARKS = sorted({command for command in COMMANDS if command.startswith("python benchmarks/")})
TESTED.extend(BENCHMARKS)


@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_benchmark_knows_its_flags(command, flags_of_commands, monkeypatch):
    _, program, *arguments = words_of(command)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(Path(program).stem)
    assert Path(module.__file__).samefile(ROOT / program)
    parse = argparse.ArgumentParser.parse_known_args

    def parse_all(parser, *_):
        raise Told(*parse(parser, arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_all)
    with pytest.raises(Told) as told:
        module.main()
    known, others = told.value.args
    unknown = [name for name in flags_in(command) if not hasattr(known, name)]
    assert unknown == [word[2:] for word in others[::2]]
    passes_on = Path(program).stem == "rehearsal"  # further flags to the run
    assert {*unknown} <= (flags_of_commands["train"] if passes_on else set())


@runs(
    recipe="repro reproduce coco2017 --data_dir data --dry_run --topology v3:2x2",
    check="repro data check --topology v5e:2x4 --model_name_or_path MODEL --train_file train.jsonl"
    " --validation_file v.jsonl",
)
def test_what_compiles_for_tpus_says_how_the_compiler_is_installed(recipe, check, monkeypatch, capsys):
    monkeypatch.setattr("repro.recipes.topology.find_spec", lambda _: None)  # `tox -e tpu` has it
    for command, module in ((recipe, "reproduce"), (check, "data")):
        monkeypatch.setattr(f"repro.commands.{module}.leave_tpus_alone", lambda: None)  # the environment is this test's
        assert run(command) == 2
        assert "is not installed; pip install '.[tpu]' installs it" in capsys.readouterr().err
    assert run(recipe.replace(" --dry_run", "")) == 2
    assert "--topology: trains nothing; add --dry_run" in capsys.readouterr().err


# Nothing is left out.


def test_every_command_has_one_test_and_every_test_a_command():
    assert {command for command in COMMANDS if command not in TESTED} == set(), "say in a test how these are run"
    assert {command for command in TESTED if command not in COMMANDS} == set(), "no page has these any more"
    assert len({*TESTED}) == len(TESTED)


SNIPPETS = blocks("python")


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
@pytest.mark.usefixtures("place")
def test_every_snippet_runs(number, capsys):
    if "VisionEncoderDecoderModel" in SNIPPETS[number]:
        pytest.importorskip("torch", reason="tox -e torch runs this snippet")
    exec(compile(SNIPPETS[number], f"snippet {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_json_example_is_json():
    for block in blocks("json"):
        assert all(isinstance(json.loads(line), dict) for line in block.splitlines())


# Links, names, flags.


def anchors(page):
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[name])):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.fixture(scope="module")
def flags_of_commands():
    def flags_of(*words):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            main([*words, "--help"])
        return set(flags_in(shown.getvalue()))

    found = {name: flags_of(name) for name in repro.commands.COMMANDS}
    found["data"] |= flags_of("data", "check") | flags_of("data", "coco") | flags_of("data", "pocket")
    found["reproduce"] |= found["train"]
    return found


def test_every_flag_exists(flags_of_commands):
    ours = set().union(*flags_of_commands.values())
    programs = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    theirs = set(re.findall(r'add_argument\(\s*"--(\w+)"', programs))
    for name, page in PAGES.items():
        known = ours | theirs if name in ("benchmarks/README.md", "repro/recipes/README.md") else ours
        assert {flag for flag in flags_in(prose(page)) if flag not in known} == set(), name


def spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def test_commands_within_the_text_are_commands(flags_of_commands):
    sections = [name.removeprefix("testenv:") for name in TOX.sections()]
    environments = {name for section in sections for name in section.strip("{}").split(",")}
    for span in [span for page in PAGES.values() for span in spans(page)]:
        program, *words = span.split()
        if program == "repro" and words and words[0] != "COMMAND":
            known = {"--help": {"help"}, **flags_of_commands}.get(words[0])
            assert known is not None, span
            assert set(flags_in(span)) <= known, span
        if program == "tox" and words:
            assert words[0] == "-e", span
            assert set(words[1].split(",")) <= environments, span
        if program == "pip":
            assert set(re.findall(r"\.\[(\w+)\]", span)) <= EXTRAS.keys(), span
        if program == "python":
            assert (ROOT / words[0]).is_file(), span


@pytest.mark.parametrize("name", PAGES)
def test_every_file_of_the_project_is_there(name):
    folders = [ROOT, ROOT / "tests", ROOT / "benchmarks", (ROOT / name).parent]
    for span in spans(PAGES[name]):
        if re.fullmatch(r"[\w./-]+\.py|(repro|tests|benchmarks)/[\w./-]+", span):
            assert any((folder / span).exists() for folder in folders), span
        if name.startswith("benchmarks") and re.fullmatch(r"[\w-]+\.json", span):
            assert (RESULTS / span).is_file(), span


def map_of(page):
    """Files and folders of the map, which indents what is in a folder."""
    (drawing,) = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    found, folders = set(), {-1: ""}
    for line in drawing.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = {place: folder for place, folder in folders.items() if place < indent}
        parent = folders[max(folders)]
        names = list(takewhile(re.compile(r"[\w-]+(/|\.py|\.json|\.md)").fullmatch, line.split()))
        found |= {parent + name for name in names}
        folders[indent] = parent + names[0]
    return found


def test_the_map_shows_every_module_and_nothing_else():
    shown = map_of(PAGES["repro/README.md"])
    assert {path for path in shown if not (ROOT / path).exists()} == set()
    modules = [path for path in (ROOT / "repro").rglob("*.py") if path.name != "__init__.py"]
    modules += (ROOT / "repro" / "recipes").glob("*.json")
    assert {str(path.relative_to(ROOT)) for path in modules} - shown == set()


# Messages.


def texts_of(source):
    """Texts that a module can print, NUL where a value goes; its docstrings are none."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def test_every_message_is_one_that_is_printed():
    table = PAGES["repro/commands/README.md"]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(messages) == len(rows) - 1 >= 12, "each row but the header begins with a message"
    texts = [text for path in (ROOT / "repro").rglob("*.py") for text in texts_of(path.read_text(encoding="utf-8"))]
    for message in messages:
        parts = [part.strip() for part in message.split("…")]
        assert max(map(len, parts)) > 8, message
        pattern = re.compile(".*?".join(map(re.escape, parts)), re.S)
        assert any(pattern.search(text) for text in texts), message
