"""Every flag of every command means what it says: dashes or underscores, one range, or a refusal."""

from __future__ import annotations

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
import repro.config
import repro.recipes.reproduce
from repro.__main__ import main
from repro.commands.reproduce import ReproduceArguments
from repro.config import ARGUMENTS, flags_of, given_flags, make_arguments, parse_arguments
from repro.errors import InputError
from repro.parser import Checked, Numbers
from repro.recipes import read_recipe
from repro.record.record import Recorded
from repro.record.writer import locked
from repro.run.settings import Settings

CLASSES = Checked.__subclasses__()
FIELDS = [(kind, field) for kind in CLASSES for field in dataclasses.fields(kind)]
NUMERIC = [
    (kind, field)
    for kind, field in FIELDS
    if {int, float} & {get_type_hints(kind)[field.name], *get_args(get_type_hints(kind)[field.name])}
]


def name_of(value: object) -> str:
    return getattr(value, "name", getattr(value, "__name__", ""))


@pytest.mark.parametrize(("kind", "field"), NUMERIC, ids=name_of)
def test_every_number_has_a_range_that_is_held_and_told(kind, field) -> None:
    allowed: Numbers = field.metadata["allowed"]
    wrong = [math.nan, math.inf, -math.inf, allowed.least - 1, allowed.most + 1, *allowed.without]
    for value in wrong:
        with pytest.raises(InputError, match=rf"--{field.name} .*must be {allowed}\."):
            kind(**{field.name: value})
    for value in (field.default, *({allowed.least, allowed.most} - {*allowed.without, math.inf})):
        assert getattr(kind(**{field.name: value}), field.name) == value


TEXTS = [(kind, field) for kind, field in FIELDS if str in get_args(get_type_hints(kind)[field.name])]


@pytest.mark.parametrize(("kind", "field"), TEXTS, ids=name_of)
def test_no_flag_takes_an_address_and_each_takes_home(kind, field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for address in ("gs://bucket/run", "s3://b/x.jsonl", "HTTPS://host/model"):
        with pytest.raises(InputError, match=f"--{field.name} {address}: is an address"):
            kind(**{field.name: address})
    for written, path in (("~/x", "/home/me/x"), ("file:///a%20b/x", "/a b/x"), ("a/b:c", "a/b:c"), ("~x", "~x")):
        assert getattr(kind(**{field.name: written}), field.name) == path


@pytest.mark.parametrize(
    "command",
    ["data coco --data_dir gs://b/x", "data pocket gs://b/x", "verify gs://b/x", "report runs --output gs://b/x"],
)
def test_no_argument_takes_an_address(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert "gs://b/x: is an address" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --label_smoothing_factor 1", "--label_smoothing_factor 1.0: must be at least 0 and below 1."),
        ("train --num_train_epochs nan", "--num_train_epochs nan: must be a whole number, at least 1"),
        ("train --num-train-epochs=1.5", "--num_train_epochs 1.5: must be a whole number, at least 1"),
        ("train --learning_rate inf", "--learning_rate inf: must be at least 0 and finite."),
        ("train --max_grad_norm 0", "--max_grad_norm 0.0: must be above 0 and finite."),
        ("train --do_eval --max_eval_samples 0", "--max_eval_samples 0: must be at least 1"),
        ("reproduce --max-eval-samples 0", "--max_eval_samples 0: must be at least 1"),
        ("data check --seed -1", "--seed -1: must be at least 0"),
        ("data pocket scenes --image-size 15", "--image_size 15: must be at least 16"),
        ("data coco --data-dir coco --max-images 0", "--max_images 0: must be at least 1"),
        ("caption model absent.jpg --batch-size 0", "--batch_size 0: must be at least 1"),
        ("create-model --seed -1 --output-dir model", "--seed -1: must be at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_at_once(
    command: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "caption MODEL x.jpg --num-return-sequences 1 --model-implementation native --max-length=4",
        *("verify run --against run --json v.json", "report absent --out-put x"),
        *("data coco --data-dir coco --max-images 1 --base-url ftp://x", "data pocket coco --num-train=1 --num-val 1"),
    ],
)
def test_commands_take_dashes_for_underscores(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(command.split())
    err = capsys.readouterr().err
    assert ("unknown argument" in err) == ("--out-put" in command)


@pytest.mark.parametrize("kind", CLASSES, ids=name_of)
def test_each_flag_is_the_same_with_dashes_and_with_underscores(kind) -> None:
    for field in dataclasses.fields(kind):
        others = [f"--{of.name}=x" for of in dataclasses.fields(kind) if of != field and of.metadata.get("required")]
        value = next(iter(field.metadata.get("choices") or ["true" if isinstance(field.default, bool) else "16"]))
        read = [
            given_flags((kind,), [*others, *name], command="x")
            for name in (
                (f"--{field.name}", value),
                (f"--{field.name.replace('_', '-')}", value),
                (f"--{field.name.replace('_', '-')}={value}",),
            )
        ]
        assert read[0] == read[1] == read[2]
        assert len(read[0]) == len(others) + 1
        assert field.name in read[0]


# `repro reproduce`.


def started(tmp_path: Path, *argv: str) -> tuple:
    """The arguments of a run of the documented recipe with further flags."""
    given = given_flags((ReproduceArguments, *ARGUMENTS), argv, command="reproduce")
    with repro.recipes.reproduce.started(read_recipe("coco2017"), tmp_path / "here", given, tmp_path) as arguments:
        return arguments


def test_a_flag_that_is_given_wins_over_the_recipes(tmp_path: Path) -> None:
    model, _, args = started(tmp_path, "--learning-rate", "1e-3", "--model_name_or_path", "mine", "--seed=7")
    assert (args.learning_rate, args.seed, args.eval_steps) == (1e-3, 7, 500)
    assert (model.model_name_or_path, model.encoder_model_name_or_path, model.decoder_model_name_or_path) == (
        *("mine", None),
        None,
    )
    assert args.output_dir == str(tmp_path / "here" / "run")


def test_what_a_recipe_decides_itself_is_refused_among_its_flags(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="--output_dir: a recipe's run is in its own folder"),
        repro.recipes.reproduce.started(read_recipe("pocket"), tmp_path / "here", {"output_dir": "there"}, tmp_path),
    ):
        pass
    assert not (tmp_path / "here").exists()


class Ran(Exception):
    """What would have been run."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch):
    """Call `repro reproduce`, and give the folder, the flags, and whether XLA was made deterministic."""
    made: list[str] = []

    def stop(*arguments, **settings):
        raise Ran(arguments, settings)

    monkeypatch.setattr(repro.recipes.reproduce, "run", stop)
    monkeypatch.setattr(repro.recipes.reproduce, "render_pocket", lambda *_, **__: None)
    monkeypatch.setattr(repro.recipes.reproduce, "make_halves", lambda *_: None)
    monkeypatch.setattr("repro.commands.reproduce.make_deterministic", lambda: made.append("made"))

    def call(*argv: str):
        made.clear()
        with pytest.raises(Ran) as caught:
            main(["reproduce", *argv])
        (model, data, args), _ = caught.value.args
        return Path(args.output_dir), {**vars(model), **vars(data), **vars(args)}, bool(made)

    return call


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir"])
def test_all_that_a_recipe_makes_is_in_the_folder_that_is_named(ran, flag: str, tmp_path: Path) -> None:
    folder, flags, _ = ran("pocket", flag, str(tmp_path / "x"))
    assert folder == tmp_path / "x" / "run"
    assert flags["data_dir"] == str(tmp_path / "x" / "data")
    assert (tmp_path / "x" / "recipe.json").is_file()


@pytest.mark.parametrize(
    ("argv", "resume", "deterministic"),
    [
        ([], "auto", False),
        (["--resume", "other/run"], "other/run", False),
        (["--resume=never"], "never", False),
        (["--overwrite-output-dir"], "never", False),
        (["--deterministic"], "auto", True),
        (["--deterministic=true"], "auto", True),
        (["--deterministic", "yes"], "auto", True),
        (["--deterministic", "false"], "auto", False),
        (["--do_eval", "--keep_going", "false"], "auto", False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_flags_of_a_recipe_mean_what_they_say(ran, argv, resume, deterministic, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, flags, made = ran(*argv)
    assert (flags["resume"], flags["deterministic"], made) == (resume, deterministic, deterministic)
    assert flags["do_eval"]


def test_a_second_reproduction_and_a_dry_run_leave_a_started_one_alone(tmp_path, capsys) -> None:
    folder = tmp_path / "pocket"
    with repro.recipes.reproduce.started(read_recipe("coco2017"), folder, {}, folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for more in ([], ["--dry_run"]):
            assert main(["reproduce", "coco2017", "--output_dir", str(folder), *more]) == 2
            assert "another run is at work in it" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with locked(folder):
        pass


# How long a run is.


@given(
    rows=st.integers(4, 60),
    epochs=st.integers(1, 4),
    every=st.none() | st.integers(1, 40),
    saves=st.none() | st.integers(0, 9),
    protocol=st.sampled_from(["published", "exact"]),
)
def test_as_many_evaluations_are_planned_as_there_are_steps_that_evaluate_and_each_has_a_state(
    rows: int, epochs: int, every: int | None, saves: int | None, protocol: str
) -> None:
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


# Folders that cannot be written.


@pytest.mark.parametrize(
    "command",
    [
        "train --output_dir {} --model_name_or_path m --do_train",
        "reproduce --output_dir {}",
        "reproduce --output_dir {} --dry_run",
        "create-model --output_dir {} --encoder_config_name e --decoder_config_name d",
        "export --output_dir {} --model_name_or_path m",
        "data pocket {}",
        "data coco --data_dir {}",
        "report run --output {}/report.html",
        "verify run --recipe pocket --json {}/verdict.json",
    ],
)
@pytest.mark.parametrize("place", ["file/below", "/proc/below"])
def test_a_place_that_cannot_be_written_is_refused_at_once(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("run").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(command.format(place).split()) == 2
    assert f"{place}: no file can be written there" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "caption {} a.png",
        "data check --model_name_or_path {} --train_file {}",
        "data pocket {}",
        "report {}",
        "reproduce --output_dir {}",
        "train --output_dir {} --model_name_or_path m --do_train",
        "train {}.json",
        "verify --recipe pocket {}",
    ],
)
@pytest.mark.parametrize("place", ["a" * 300, "loop"])
def test_a_name_that_no_file_can_have_is_refused_in_words(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert main(command.format(place, place).split()) == 2
    assert place in capsys.readouterr().err


def test_a_null_character_in_a_file_of_flags_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "flags.json"
    file.write_text('{"output_dir": "a\\u0000b", "do_train": true}')
    with pytest.raises(InputError, match="null character"):
        make_arguments(ARGUMENTS, {"output_dir": "a\0b"})
    assert main(["train", str(file)]) == 2
    assert "--output_dir 'a\\x00b': holds a null character" in capsys.readouterr().err


# Metrics.


@pytest.mark.parametrize(("metric", "best"), [("loss", 2), ("rouge2", 3), ("cider", 3)])
def test_the_best_step_is_that_of_the_least_loss_and_of_the_most_of_a_score(metric: str, best: int) -> None:
    rows = [
        {"step": step, "eval": {metric: value}} for step, value in ((1, 0.3), (2, 0.1), (3, 0.9), (4, 0.9), (5, 0.1))
    ]
    assert Recorded(rows).best_step(metric) == best
    rows[0]["eval"][metric] = math.nan
    assert Recorded(rows).best_step(metric) == best


def test_flags_and_their_defaults_survive_being_written_as_a_command_line() -> None:
    made = make_arguments(ARGUMENTS, {"seed": 3})
    again = parse_arguments(ARGUMENTS, [flag for part in made for flag in flags_of(vars(part))], command="train")
    assert again == made
