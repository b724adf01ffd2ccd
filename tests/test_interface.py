"""The Python interface: a notebook that uses it runs, and what it exports is named, documented and quick to import."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from test_reproduce import small_recipe  # noqa: F401, a fixture

import repro
from repro.errors import InputError

NOTEBOOK = Path(__file__).with_name("first_steps.ipynb")


def run_cells(path):
    """Run a notebook's cells one after another; returns what each one's last line shows."""
    names, shown = {}, []
    for cell in json.loads(path.read_text())["cells"]:
        *lines, last = ast.parse("".join(cell["source"])).body
        if not isinstance(last, ast.Expr):
            lines, last = [*lines, last], ast.parse("None").body[0]
        exec(compile(ast.Module(lines, []), str(path), "exec"), names)
        shown.append(eval(compile(ast.Expression(last.value), str(path), "eval"), names))
    return shown


@pytest.mark.usefixtures("small_recipe")
def test_the_notebook_runs_and_shows_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, result, told, captioner, captions, page, judgement = run_cells(NOTEBOOK)
    shown = result._repr_html_()
    assert shown.count("data:image/jpeg;base64,") == 4
    assert "validation loss" in shown
    verdict, loss, step = told
    assert (verdict, step) == ("PASS", 7)
    assert loss == result.metrics["eval_loss"] == pytest.approx(result.history[-1]["eval_loss"])
    assert repr(captioner).startswith("Captioner(vit with gpt2, 62,400 parameters")
    assert len(repr(captioner)) < 100
    assert isinstance(captions[0].caption, str)
    assert page.read_text().startswith("<!")
    assert judgement.verdict == "PASS"
    assert "<pre>PASS" in judgement._repr_html_()


@pytest.mark.parametrize("function", [repro.train, repro.reproduce])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": 1e-3}, "--learning_rate"),
        ({"num_train_epoch": 1}, "--num_train_epochs"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 0}, "coordinator: is for `repro .*`, started"),
    ],
)
def test_a_wrong_keyword_is_refused_with_the_right_one(function, keywords, message):
    with pytest.raises(InputError, match=message):
        function(**keywords)


def test_what_is_exported_is_documented_typed_and_shows_its_flags():
    for name in repro.__all__:
        found = getattr(repro, name)
        assert found.__doc__, name
        if inspect.isfunction(found):
            assert Any not in get_type_hints(found).values()
    assert set(repro.__all__) <= set(dir(repro))
    assert {"learning_rate", "output_dir"} <= set(inspect.signature(repro.train).parameters)
    with pytest.raises(AttributeError, match="Captionner"):
        repro.Captionner  # noqa: B018


def test_importing_the_package_imports_nothing_large():
    code = "import sys, repro; sys.exit(bool({'jax', 'transformers', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
