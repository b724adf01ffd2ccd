"""The pages: every command in them is run or parsed, every snippet runs, every link, flag, file and message is one.

A command is a line of a fenced block without a language. Each has exactly one test that names it, by `runs`; where a
line cannot be run here, what it installs or measures is held against what CI runs.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import test_documented_command
import test_reproduce
from conftest import ENCODER, tiny_pocket
from PIL import Image
from test_download import Server, serve_coco

import repro.commands
import repro.data.download
import repro.recipes
import repro.recipes.reproduce
import repro.recipes.verify
import repro.reports.write
from repro.__main__ import main
from repro.config import DataArguments, ModelArguments, TrainingArguments, given_flags, parse_arguments
from repro.data.atomic import sha256_of
from repro.models.pretrained import load_model, save_model
from repro.pocket.halves import render_pocket
from repro.recipes import read_recipe
from repro.record.record import digest_of

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.glob("README.md"))
    + sorted(ROOT.glob("[rtb]*/README.md"))
    + sorted(ROOT.glob("repro/*/README.md"))
}
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
TRAIN = (ModelArguments, DataArguments, TrainingArguments)
LANGUAGES = {"", "python", "json", "text"}


def blocks(language: str) -> list[str]:
    """Contents of the fenced blocks of a language, on all pages."""
    found = [block for page in PAGES.values() for block in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)]
    assert {name for name, _ in found} <= LANGUAGES
    return [content for name, content in found if name == language]


def lines_of(block: str) -> Iterator[str]:
    """Commands of a block: continued lines joined, comments and repeated spaces gone."""
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        yield re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", line)).strip()


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)


COMMANDS = [line for block in blocks("") for line in lines_of(block)]
ENTRIES: dict[str, str] = {}
"""Which test each command has."""


def runs(*commands: str) -> Callable[[Any], Any]:
    """Say which commands a test runs; it gets them, in this order, as `commands`."""

    def register(test: Any) -> Any:
        for command in commands:
            assert command not in ENTRIES, f"{command} has two tests"
            ENTRIES[command] = test.__name__
        test.commands = commands
        return test

    return register


@pytest.fixture
def commands(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.function.commands


@pytest.fixture(scope="session")
def in_both_formats(golden_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a checkpoint has it, for PyTorch too."""
    folder = tmp_path_factory.mktemp("both-formats") / "model"
    loaded = load_model(str(golden_inputs / "model"))
    save_model(loaded, loaded.params, folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, golden_inputs: Path, in_both_formats: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
        rows = [json.loads(line) for line in (golden_inputs / f"{split}.jsonl").read_text().splitlines()[:count]]
        lines = [json.dumps({"image": row["image_path"], "caption": row["caption"]}) + "\n" for row in rows]
        Path(f"pictures/{split}.jsonl").write_text(examples + "".join(lines))
    return folder


@pytest.fixture
def named_halves(place: Path, halves: dict[str, str]) -> Path:
    """Folders of the names that the documented command has for its halves."""
    for name, folder in halves.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(folder)
    return place


def words_of(command: str) -> list[str]:
    """Split a command into words, as a shell does in this directory."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def run(command: str) -> int:
    program, *arguments = words_of(command)
    assert program == "repro"
    return main(arguments)


# What installs and tests.


def tox() -> ConfigParser:
    found = ConfigParser(interpolation=None)
    found.read(ROOT / "tox.ini")
    return found


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@runs("python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/repro reproduce")
def test_the_first_command_installs_and_reproduces(commands: tuple[str, ...]) -> None:
    venv, install, reproduce = commands[0].split(" && ")
    assert (venv, install) == ("python3 -m venv .venv", ".venv/bin/pip install .")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Path(reproduce.split()[0]).name in project["scripts"]
    assert reproduce.split()[1:] == ["reproduce"]
    assert hasattr(test_reproduce, "test_reproduce_passes_or_fails_by_its_targets")  # which runs that, made small


@runs(".venv/bin/pip install tox-uv && .venv/bin/tox")
def test_the_second_command_is_the_one_that_ci_runs(commands: tuple[str, ...]) -> None:
    reads = re.search(r"command=\$\((sed .* README\.md)\)", (ROOT / ".ci" / "run").read_text())
    assert reads
    read = subprocess.run(["bash", "-c", reads.group(1)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert read.stdout.strip() == commands[0]
    assert [name.strip() for name in tox()["tox"]["env_list"].split(",")] == ["lint", "types", "tests"]


@runs("pip install '.[cuda12]'", "pip install '.[tpu]'")
def test_what_accelerators_need_is_declared(commands: tuple[str, ...]) -> None:
    for command in commands:
        (extra,) = re.findall(r"\[(\w+)\]", words_of(command)[-1])
        assert extras()[extra] == [f"jax[{extra}]"]


@runs("pip install '.[flax-class]'", "pip install . torch==2.13.0")
def test_other_versions_are_those_that_ci_installs(commands: tuple[str, ...]) -> None:
    flax_class, torch = commands
    (extra,) = re.findall(r"\[([\w-]+)\]", words_of(flax_class)[-1])
    assert "transformers<5" in extras()[extra]
    assert "flax-class: flax-class" in tox()["testenv:{tests,oldest,newest,flax-class,accelerator,next}"]["extras"]
    assert tox()["testenv:torch"]["deps"] == torch.split()[-1]


@runs("repro selftest")
def test_the_selftest_says_what_computes_and_whether_it_computes_right(
    commands: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("repro.recipes.selftest.CASES", ("current_block0",))
    assert main([*words_of(commands[0])[1:], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    ((case,),) = said["results"].values()
    assert (case["name"], case["passed"], said["passed"]) == ("current_block0", True, True)
    assert {"repro", "python", "jax", "flax", "transformers"} <= set(said["versions"])


# The documented run.


@pytest.fixture
def small_coco2017(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe with batches of 4 rows a replica, and without targets that a small stand-in cannot meet."""
    recipe = read_recipe("coco2017")
    recipe["flags"] |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    recipe["targets"] = [{"metric": "eval_loss", "low": 1.0, "high": 50.0, "source": "any loss"}]
    for module in (repro.recipes, repro.reports.write, repro.recipes.reproduce, repro.recipes.verify):
        monkeypatch.setattr(module, "read_recipe", lambda name: {"coco2017": recipe}[name])


@runs(
    "repro data coco --data_dir data --splits train validation",
    "repro reproduce coco2017 --data_dir data --dry_run",
    "repro reproduce coco2017 --data_dir data",
    "repro verify repro-coco2017",
    "repro report repro-coco2017",
)
def test_the_documented_run_goes_from_download_to_report(
    commands: tuple[str, ...],
    named_halves: Path,
    small_coco2017: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    download, dry_run, reproduce, verify, report = commands
    server = Server()
    render_pocket(tmp_path / "coco", num_train=8, num_val=8, image_size=32, seed=1)
    serve_coco(server, tmp_path / "coco", monkeypatch)
    monkeypatch.setattr(repro.data.download, "DOWNLOADS", server.url)
    assert run(download) == 0
    server.close()
    names = {"train2017.zip", "val2017.zip", "annotations_trainval2017.zip"}
    assert {path.name for path in Path("data").iterdir()} == names
    assert run(dry_run) == 0
    assert "for 1 steps and 1 evaluations" in capsys.readouterr().out
    assert not Path("repro-coco2017/run").exists()
    assert run(reproduce) == 0
    assert run(verify) == 0
    assert "PASS: 1 run of coco2017" in capsys.readouterr().out
    facts = json.loads(Path("repro-coco2017/run/run.json").read_text())
    assert (facts["num_replicas"], facts["flags"]["num_beams"], facts["num_steps"]) == (8, 8, 1)
    assert facts["data"]["validation"]["kept"] == 40
    Path("repro-coco2017/report.html").unlink()
    assert run(report) == 0
    assert ">PASS</strong> against the targets of coco2017" in Path("repro-coco2017/report.html").read_text()


@pytest.mark.slow
@runs("repro reproduce coco2017 --data_dir data --dtype bfloat16 --dry_run")
def test_a_dry_run_computes_in_the_type_that_is_asked_for(
    commands: tuple[str, ...], named_halves: Path, small_coco2017: None, capsys: pytest.CaptureFixture[str]
) -> None:
    render_pocket(Path("data"), num_train=8, num_val=8, image_size=32, seed=1)
    assert run(commands[0]) == 0
    assert "validation: 40 rows of 8 images" in capsys.readouterr().out


@runs(next(command for command in COMMANDS if command.startswith("repro train --output_dir ./image-captioning")))
def test_the_documented_command_has_a_test_that_runs_it(commands: tuple[str, ...], place: Path) -> None:
    documented = [word.replace("$PWD", str(place)) for word in test_documented_command.documented_command()]
    assert words_of(commands[0])[1:] == documented
    assert hasattr(test_documented_command, "test_the_documented_command_runs_with_all_its_flags")


# Own data, models, captions.


@runs(
    "repro data check --model_name_or_path MODEL --train_file pictures/train.jsonl"
    " --validation_file pictures/val.jsonl --max_target_length 32",
    "repro train --model_name_or_path MODEL --output_dir my-run --do_train --do_eval --predict_with_generate"
    " --train_file pictures/train.jsonl --validation_file pictures/val.jsonl --max_target_length 32 --num_beams 4",
    "repro caption my-run pictures/dog.jpg",
    "repro export --model_name_or_path my-run/ckpt_epoch_3_* --output_dir my-model",
)
def test_five_lines_train_on_own_pictures(
    commands: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check, train, caption, export = commands
    assert run(check) == 0
    assert "train: 75 rows, 75 can be used" in capsys.readouterr().out
    assert run(train) == 0
    assert len(list(Path("my-run").glob("ckpt_epoch_*"))) == 3
    assert Path("my-run/report.html").is_file()
    capsys.readouterr()
    assert run(caption) == 0
    assert re.match(r"pictures/dog\.jpg +-\d", capsys.readouterr().out)
    assert run(export) == 0
    assert {"flax_model.msgpack", "model.safetensors"} <= {path.name for path in Path("my-model").iterdir()}


@runs(
    "repro caption MODEL photos/ 'more/**/*.jpg' one.png --num_beams 8",
    "find photos -name '*.jpg' -print0 | repro caption MODEL - --null --json > captions.jsonl",
)
def test_pictures_are_captioned_from_anywhere(
    commands: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(commands[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["photos/1.jpg", "photos/2.jpg", "more/deep/3.jpg", "one.png"]
    find, caption = commands[1].removesuffix(" > captions.jsonl").split(" | ")
    found = subprocess.run(["bash", "-c", find], capture_output=True, check=True).stdout
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(found)))
    assert run(caption) == 0
    captioned = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(line["image"] for line in captioned) == ["photos/1.jpg", "photos/2.jpg"]
    assert all(line["captions"] for line in captioned)


@runs(f"repro create-model --output_dir model --encoder_model_name_or_path {ENCODER} --decoder_model_name_or_path gpt2")
def test_a_model_is_made_of_the_documented_halves(commands: tuple[str, ...], named_halves: Path) -> None:
    assert run(commands[0]) == 0
    assert json.loads(Path("model/config.json").read_text())["decoder"]["add_cross_attention"]


@runs(
    "repro train run.json",
    "repro reproduce coco2017 --data_dir data --distributed",
    "repro train --distributed --output_dir pod --model_name_or_path MODEL --train_file pictures/train.jsonl"
    " --do_train",
    "repro train --coordinator host-0:1234 --num_processes 2 --process_id 0 --output_dir two"
    " --model_name_or_path MODEL --train_file pictures/train.jsonl --do_train",
)
def test_several_processes_take_the_same_flags_as_one(commands: tuple[str, ...], place: Path) -> None:
    """That they compute the same is shown in test_processes.py."""
    (flags,) = (block for block in blocks("json") if "num_train_epochs" in block)
    Path("run.json").write_text(flags)
    recipe = commands[1]
    assert given_flags(TRAIN, words_of(recipe)[3:], command="reproduce") == {"data_dir": "data", "distributed": True}
    read = [parse_arguments(TRAIN, words_of(line)[2:], command="train") for line in commands if line != recipe]
    assert [model.model_name_or_path for model, _, _ in read] == ["MODEL"] * 3
    assert [args.distributed for _, _, args in read] == [False, True, False]
    assert (read[2][2].coordinator, read[2][2].num_processes, read[2][2].process_id) == ("host-0:1234", 2, 0)


# Changing something.


@pytest.fixture
def small_pocket(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pocket recipe with little data, few flags changed, and a target of several seeds."""
    recipe = tiny_pocket()
    recipe["data"] |= {"num_train": 16, "num_val": 4}
    recipe["flags"] |= {"num_train_epochs": 1, "block_size": 0, "predict_with_generate": False, "save_steps": 0}
    recipe["flags"] |= {"num_replicas": 2, "per_device_eval_batch_size": 10}
    recipe["recompute"] = False
    recipe["targets"] = [
        {"metric": "eval_loss", "value": 6.0, "standard_deviation": 1.0, "runs": 5, "margin": 0.5, "source": "any"}
    ]
    for module in (repro.recipes, repro.reports.write, repro.recipes.reproduce, repro.recipes.verify):
        monkeypatch.setattr(module, "read_recipe", lambda name: {"pocket": recipe}[name])


def copy_with_seed(run_folder: Path, seed: int) -> None:
    """Make of a reproduction what one with another seed would be: a little different."""
    copy = Path(shutil.copytree(run_folder, run_folder.with_name(f"{run_folder.name[:-1]}{seed}"))) / "run"
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    rows[0]["loss"] += 1e-3 * seed
    rows[-1]["eval"]["loss"] += 1e-3 * seed
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (results,) = copy.glob("ckpt_*/eval_results.json")
    results.write_text(json.dumps({**json.loads(results.read_text()), "eval_loss": rows[-1]["eval"]["loss"]}))
    facts = json.loads((copy / "run.json").read_text())
    facts["flags"]["seed"] = seed
    facts["checksums"] = {name: sha256_of(copy / name) for name in facts["checksums"] if name != "run.json"}
    facts["checksums"]["run.json"] = digest_of(facts)
    (copy / "run.json").write_text(json.dumps(facts))


@runs(
    "repro reproduce pocket --seed 1 --output_dir old-1",
    "repro reproduce pocket --seed 1 --output_dir new-1",
    "repro verify new-{1..12} --against old-{1..12} --seeds 12",
)
def test_results_before_and_after_a_change_are_held_against_each_other(
    commands: tuple[str, ...], place: Path, small_pocket: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, verify = commands
    for command in (before, after):
        run(command)  # one seed of so little data may well fail
        for seed in range(2, 13):
            copy_with_seed(Path(words_of(command)[-1]), seed)
    capsys.readouterr()
    assert run(verify) == 0
    assert "PASS: 12 runs of pocket, equivalent to 12 reference runs" in capsys.readouterr().out


# Benchmarks, whose flags are read; test_benchmarks.py and `tox -e bench` run them very small.


class Parsed(Exception):
    """What a benchmark was told, in the place of its work."""


BENCHMARKS = [command for command in COMMANDS if command.startswith("python benchmarks/")]


@pytest.mark.parametrize("command", sorted(set(BENCHMARKS)))
@runs(*sorted(set(BENCHMARKS)))
def test_a_benchmark_knows_its_flags(
    command: str, flags_of_commands: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program, *arguments = words_of(command)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(Path(program).stem)
    assert Path(module.__file__ or "").samefile(ROOT / program)
    parse = argparse.ArgumentParser.parse_known_args

    def parse_all(parser: argparse.ArgumentParser, *_: Any) -> Any:
        known, others = parse(parser, arguments)
        raise Parsed(known, others)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_all)
    with pytest.raises(Parsed) as parsed:
        module.main()
    known, others = parsed.value.args
    assert [name for name in flags_in(command) if not hasattr(known, name)] == [word[2:] for word in others[::2]]
    passes_on = Path(program).stem == "rehearsal"  # further flags to the run
    assert {word[2:] for word in others[::2]} <= (flags_of_commands["train"] if passes_on else set())


def flags_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--([a-z]\w*)", text)


@runs(
    "repro reproduce coco2017 --data_dir data --dry_run --topology v3:2x2",
    "repro data check --topology v5e:2x4 --model_name_or_path MODEL --train_file train.jsonl --validation_file v.jsonl",
)
def test_what_compiles_for_tpus_says_how_the_compiler_is_installed(
    commands: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("repro.recipes.topology.find_spec", lambda _: None)  # `tox -e tpu` has it
    for command, module in zip(commands, ("reproduce", "data"), strict=True):
        monkeypatch.setattr(f"repro.commands.{module}.leave_tpus_alone", lambda: None)  # the environment is this test's
        assert run(command) == 2
        assert "is not installed; pip install '.[tpu]' installs it" in capsys.readouterr().err
    assert run(commands[0].replace(" --dry_run", "")) == 2
    assert "--topology: trains nothing; add --dry_run" in capsys.readouterr().err


# Nothing is left out.


def test_every_command_has_a_test_and_every_test_a_command() -> None:
    assert {command for command in COMMANDS if command not in ENTRIES} == set(), "say in a test how these are run"
    assert {entry for entry in ENTRIES if entry not in COMMANDS} == set(), "no page has these any more"


SNIPPETS = blocks("python")


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_snippet_runs(number: int, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "VisionEncoderDecoderModel" in SNIPPETS[number]:
        pytest.importorskip("torch", reason="tox -e torch runs this snippet")
    exec(compile(SNIPPETS[number], f"snippet {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_json_example_is_json() -> None:
    for block in blocks("json"):
        assert all(isinstance(json.loads(line), dict) for line in block.splitlines())


# Links, names, flags.


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.M)}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[name])):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def help_of(*words: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return shown.getvalue()


@pytest.fixture(scope="module")
def flags_of_commands() -> dict[str, set[str]]:
    found = {name: set(flags_in(help_of(name))) for name in repro.commands.COMMANDS}
    found["data"] |= {flag for kind in ("check", "coco", "pocket") for flag in flags_in(help_of("data", kind))}
    found["reproduce"] |= found["train"]
    return found


def test_every_flag_exists(flags_of_commands: dict[str, set[str]]) -> None:
    ours = set().union(*flags_of_commands.values())
    programs = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    theirs = set(re.findall(r'add_argument\(\s*"--(\w+)"', programs))
    for name, page in PAGES.items():
        known = ours | theirs if name in ("benchmarks/README.md", "repro/recipes/README.md") else ours
        assert {flag for flag in flags_in(prose(page)) if flag not in known} == set(), name


def spans(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def test_commands_within_the_text_are_commands(flags_of_commands: dict[str, set[str]]) -> None:
    sections = [name.removeprefix("testenv:") for name in tox().sections()]
    environments = {name for section in sections for name in section.strip("{}").split(",")}
    for span in [span for page in PAGES.values() for span in spans(page)]:
        program, *words = span.split()
        if program == "repro" and words and words[0] != "COMMAND":
            known = flags_of_commands.get(words[0], {"help"} if words[0] == "--help" else None)
            assert known is not None, span
            assert set(flags_in(span)) <= known, span
        if program == "tox" and words:
            assert words[0] == "-e", span
            assert set(words[1].split(",")) <= environments, span
        if program == "pip" and (named := re.findall(r"\.\[(\w+)\]", span)):
            assert set(named) <= set(extras()), span
        if program == "python":
            assert (ROOT / words[0]).is_file(), span


@pytest.mark.parametrize("name", PAGES)
def test_every_file_of_the_project_is_there(name: str) -> None:
    folders = [ROOT, ROOT / "tests", ROOT / "benchmarks", (ROOT / name).parent]
    for span in spans(PAGES[name]):
        if re.fullmatch(r"[\w./-]+\.py|(repro|tests|benchmarks)/[\w./-]+", span):
            assert any((folder / span).exists() for folder in folders), span
        if name.startswith("benchmarks") and re.fullmatch(r"[\w-]+\.json", span):
            assert (RESULTS / span).is_file(), span


def map_of(page: str) -> set[str]:
    """Files and folders of the map, which indents what is in a folder."""
    (drawing,) = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    found: set[str] = set()
    stack: list[tuple[int, str]] = []
    for line in drawing.splitlines():
        indent = len(line) - len(line.lstrip())
        while stack and stack[-1][0] >= indent:
            stack.pop()
        parent = stack[-1][1] if stack else ""
        for word in line.split():
            if not re.fullmatch(r"[\w-]+(/|\.py|\.json|\.md)", word):
                break
            found.add(parent + word)
        if line.split()[0].endswith("/"):
            stack.append((indent, parent + line.split()[0]))
    return found


def test_the_map_shows_every_module_and_nothing_else() -> None:
    shown = map_of(PAGES["repro/README.md"])
    assert {path for path in shown if not (ROOT / path).exists()} == set()
    modules = {path for path in (ROOT / "repro").rglob("*.py") if path.name != "__init__.py"} | set(
        (ROOT / "repro" / "recipes").glob("*.json")
    )
    assert {str(path.relative_to(ROOT)) for path in modules} - shown == set()


# Messages.


def texts_of(source: str) -> Iterator[str]:
    """Texts that a module can print, NUL where a value goes; its docstrings are none."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def test_every_message_is_one_that_is_printed() -> None:
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
