"""Every flag of every command means what it says: dashes or underscores, one range, or a refusal."""

import dataclasses
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import repro.commands.caption
import repro.commands.data
import repro.commands.reproduce
import repro.recipes.reproduce
from repro.__main__ import main
from repro.config import ARGUMENTS, flags_of, given_flags, make_arguments, parse_arguments
from repro.errors import InputError
from repro.parser import Checked
from repro.recipes import read_recipe
from repro.record.record import Recorded
from repro.record.writer import locked
from repro.run.settings import Settings


def fields_of(kind, *types):
    """A class's flags of one of these types, or of one of them and None."""
    hints = get_type_hints(kind)
    return [each for each in dataclasses.fields(kind) if {*types} & {hints[each.name], *get_args(hints[each.name])}]


of_every_command = pytest.mark.parametrize("kind", Checked.__subclasses__(), ids=lambda kind: kind.__name__)


@of_every_command
def test_every_number_has_a_range_that_is_held_and_told(kind):
    for field in fields_of(kind, int, float):
        allowed = field.metadata["allowed"]
        for value in (math.nan, math.inf, -math.inf, allowed.least - 1, allowed.most + 1, *allowed.without):
            with pytest.raises(InputError, match=rf"--{field.name} .*must be {allowed}\."):
                kind(**{field.name: value})
        for value in (field.default, *({allowed.least, allowed.most} - {*allowed.without, math.inf})):
            assert getattr(kind(**{field.name: value}), field.name) == value


@of_every_command
def test_no_flag_takes_an_address_and_each_takes_home(kind, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for field in fields_of(kind, str):
        for address in ("gs://bucket/run", "s3://b/x.jsonl", "HTTPS://host/model"):
            with pytest.raises(InputError, match=f"--{field.name} {address}: is an address"):
                kind(**{field.name: address})
        for written, path in (("~/x", "/home/me/x"), ("file:///a%20b/x", "/a b/x"), ("a/b:c", "a/b:c"), ("~x", "~x")):
            assert getattr(kind(**{field.name: written}), field.name) == path


@of_every_command
def test_each_flag_is_the_same_with_dashes_and_with_underscores(kind):
    values = {field.name: (field.metadata.get("choices") or ["16"])[0] for field in dataclasses.fields(kind)}
    values |= {field.name: "true" for field in fields_of(kind, bool)}
    spaced = [word for name, value in values.items() for word in (f"--{name}", value)]
    joined = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    read = given_flags((kind,), spaced, command="x")
    assert read.keys() == values.keys()
    for again in ([word.replace("_", "-") for word in spaced], joined):
        assert given_flags((kind,), again, command="x") == read


def test_flags_and_their_defaults_survive_being_written_as_a_command_line():
    made = make_arguments(ARGUMENTS, {"seed": 3})
    assert parse_arguments(ARGUMENTS, [word for part in made for word in flags_of(vars(part))], command="train") == made


# What is refused.


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Give what a command says that ends at once and leaves its folder as it was."""
    monkeypatch.chdir(tmp_path)

    def refuse(command):
        before = sorted(tmp_path.rglob("*"))
        assert main(command.split()) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return refuse


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian", "unknown command 'trian'. Did you mean train?"),
        ("reproduce poket --output_dir new", "pocket"),
        ("train --learning_rte=1", "unknown argument '--learning_rte'. Did you mean --learning_rate?"),
        ("train --learning_rate fast", "argument --learning_rate: invalid float value: 'fast'. `repro train --help`"),
        ("train --learning_rate", "argument --learning_rate: expected one argument"),
        ("train --num_beams 2.5", "argument --num_beams: invalid int value: '2.5'"),
        ("train --do_train perhaps", "argument --do_train: 'perhaps' is neither true nor false"),
        ("train --lr 1", "unknown argument '--lr'. Here it is --learning_rate."),
        ("train --bf16", "unknown argument '--bf16'. Here it is --dtype bfloat16."),
        ("train --report_to wandb", "unknown argument '--report_to'. TensorBoard's files and metrics.jsonl are"),
        ("train stray", "unknown argument 'stray'"),
        ("train absent.json", "absent.json: cannot be read as flags and their values: [Errno 2] No such file"),
        ("create-model --num_beams 8", "unknown argument '--num_beams'."),
        ("caption model --num-beam=3", "unknown argument '--num_beam'. Did you mean --num_beams?"),
        ("caption model a.jpg --colour", "unknown argument '--colour'. `repro caption --help` lists the flags."),
        ("caption model a.jpg --dtype float23", "argument --dtype: invalid choice: 'float23'"),
        ("caption model a.jpg --batch_size many", "argument --batch_size: invalid int value: 'many'"),
        ("caption model", "the following arguments are required: IMAGE"),
        ("verify --recpie pocket run", "unknown argument '--recpie'. Did you mean --recipe?"),
        ("reproduce --hub_tokn=secret", "unknown argument '--hub_tokn'. Did you mean --hub_token?"),
        ("reproduce --dry_rnu", "unknown argument '--dry_rnu'. Did you mean --dry_run?"),
        ("data coco --data_dri here", "unknown argument '--data_dri'. Did you mean --data_dir?"),
        ("data pocket --num_trian 3", "unknown argument '--num_trian'. Did you mean --num_train?"),
        ("data coco --num_train 3", "unknown argument '--num_train'. `repro data coco --help` lists the flags."),
        ("export --model_name model", "unknown argument '--model_name'. Did you mean --model_name_or_path?"),
        ("train --label_smoothing_factor 1", "--label_smoothing_factor 1.0: must be at least 0 and below 1."),
        ("train --num-train-epochs=1.5", "--num_train_epochs 1.5: must be a whole number, at least 1"),
        ("train --learning_rate inf", "--learning_rate inf: must be at least 0 and finite."),
        ("train --max_grad_norm 0", "--max_grad_norm 0.0: must be above 0 and finite."),
        ("reproduce --max-eval-samples 0", "--max_eval_samples 0: must be at least 1"),
        ("data check --seed -1", "--seed -1: must be at least 0"),
        ("data pocket scenes --image-size 15", "--image_size 15: must be at least 16"),
        ("data coco --data-dir coco --max-images 0", "--max_images 0: must be at least 1"),
        ("caption model absent.jpg --batch-size 0", "--batch_size 0: must be at least 1"),
        ("create-model --seed -1 --output-dir model", "--seed -1: must be at least 0"),
        ("data coco --data_dir gs://b/x", "gs://b/x: is an address"),
        ("report runs --output gs://b/x", "gs://b/x: is an address"),
    ],
)
def test_a_wrong_word_is_answered_at_once_with_what_would_do(command, words, refuse):
    assert words in refuse(command)


READ = ["caption {} a.png", "data check --model_name_or_path {} --train_file {}", "report {}", "train {}.json"]
READ += ["verify --recipe pocket {}"]
WRITTEN = ["train --output_dir {} --model_name_or_path m --do_train", "reproduce --output_dir {}", "data pocket {}"]
WRITTEN += ["reproduce --output_dir {} --dry_run", "data coco --data_dir {}", "report run --output {}/report.html"]
WRITTEN += ["verify run --recipe pocket --json {}/verdict.json", "export --output_dir {} --model_name_or_path m"]
WRITTEN += ["create-model --output_dir {} --encoder_config_name e --decoder_config_name d"]


@pytest.mark.parametrize("command", [*READ, *WRITTEN])
def test_a_place_that_cannot_be_is_refused_in_words(command, refuse):
    Path("file").write_text("mine")
    Path("run").mkdir()
    Path("loop").symlink_to("loop")
    for place in ("a" * 300, "loop"):
        assert place in refuse(command.replace("{}", place))
    for place in ("file/below", "/proc/below") if command in WRITTEN else ():
        assert f"{place}: no file can be written there" in refuse(command.format(place))


# `repro reproduce`.


def test_what_a_recipe_decides_itself_is_refused_among_its_flags(tmp_path):
    with (
        pytest.raises(InputError, match="--output_dir: a recipe's run is in its own folder"),
        repro.recipes.reproduce.started(read_recipe("pocket"), tmp_path / "here", {"output_dir": "there"}, tmp_path),
    ):
        pass
    assert not (tmp_path / "here").exists()


class Ran(Exception):
    """What would have been run."""


@pytest.fixture
def ran(monkeypatch):
    """Call `repro reproduce`, and give the flags of its run, and whether XLA was made deterministic."""
    made = []

    def stop(*arguments, **settings):
        raise Ran(*arguments)

    monkeypatch.setattr(repro.recipes.reproduce, "run", stop)
    monkeypatch.setattr(repro.recipes.reproduce, "render_pocket", lambda *_, **__: None)
    monkeypatch.setattr(repro.recipes.reproduce, "make_halves", lambda *_: None)
    monkeypatch.setattr(repro.commands.reproduce, "make_deterministic", lambda: made.append("made"))

    def call(*argv):
        with pytest.raises(Ran) as caught:
            main(["reproduce", *argv])
        return {name: value for part in caught.value.args for name, value in vars(part).items()}, bool(made)

    return call


MINE = {"learning_rate": 1e-3, "seed": 7, "eval_steps": 500, "model_name_or_path": "mine"}
MINE |= {"encoder_model_name_or_path": None, "decoder_model_name_or_path": None}


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("--do_eval --keep_going false", {"resume": "auto", "do_eval": True, "data_dir": "x/data"}),
        ("pocket --resume other/run", {"resume": "other/run", "deterministic": False}),
        ("pocket --overwrite-output-dir", {"resume": "never"}),
        ("--deterministic", {"deterministic": True}),
        ("--deterministic false", {"deterministic": False}),
        ("coco2017 --learning-rate 1e-3 --model_name_or_path mine --seed=7", MINE),
    ],
)
def test_a_flag_that_is_given_wins_over_the_recipes_and_its_folder_holds_all(ran, argv, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, made = ran(*argv.split(), "--output-dir", "x")
    assert {name: flags[name] for name in wanted} == wanted
    assert made == flags["deterministic"]
    assert (flags["output_dir"], Path("x/recipe.json").is_file()) == ("x/run", True)


def test_a_second_reproduction_and_a_dry_run_leave_a_started_one_alone(tmp_path, capsys):
    folder = tmp_path / "pocket"
    with repro.recipes.reproduce.started(read_recipe("coco2017"), folder, {}, folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for more in ([], ["--dry_run"]):
            assert main(["reproduce", "coco2017", "--output_dir", str(folder), *more]) == 2
            assert "another run is at work in it" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with locked(folder):
        pass


# How long a run is, and which step is its best.


@given(
    rows=st.integers(4, 60),
    epochs=st.integers(1, 4),
    every=st.none() | st.integers(1, 40),
    saves=st.none() | st.integers(0, 9),
    protocol=st.sampled_from(["published", "exact"]),
)
def test_as_many_evaluations_are_planned_as_there_are_steps_that_evaluate_and_each_has_a_state(
    rows, epochs, every, saves, protocol
):
    flags = {"eval_steps": every, "save_steps": saves, "num_train_epochs": epochs, "protocol": protocol}
    settings = Settings(
        model_name_or_path="m", do_train=True, do_eval=True, per_device_train_batch_size=2, num_devices=2, **flags
    ).with_rows({"train": rows})
    steps = range(1, settings.num_steps + 1)
    assert settings.num_steps == rows // 4 * epochs
    assert [settings.epoch_of(step) for step in steps] == [1 + (step - 1) // (rows // 4) for step in steps]
    evaluated = [step for step in steps if settings.evaluates_at(step)]
    assert settings.num_evaluations == len(evaluated)
    assert settings.num_models == max(len(evaluated), 1)
    saved = [step for step in steps if settings.saves_at(step)]
    assert saved == [] if saves == 0 else {*evaluated, settings.num_steps} <= {*saved}


@pytest.mark.parametrize(("metric", "best"), [("loss", 2), ("rouge2", 3), ("cider", 3)])
def test_the_best_step_is_that_of_the_least_loss_and_of_the_most_of_a_score(metric, best):
    rows = [{"step": step, "eval": {metric: value}} for step, value in enumerate((0.3, 0.1, 0.9, 0.9, 0.1), start=1)]
    assert Recorded(rows).best_step(metric) == best
    rows[0]["eval"][metric] = math.nan
    assert Recorded(rows).best_step(metric) == best
