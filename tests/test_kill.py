"""The short form of benchmarks/kill.py: a run that is killed three times ends as one that is not."""

import importlib
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
kill = importlib.import_module("kill")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return kill.make_case(tmp_path_factory.mktemp("kill"), num_train=120)


@pytest.fixture(scope="module")
def undisturbed(case):
    out = case.folder / "undisturbed"
    assert kill.finish(kill.start(case, out)) == [0], case.log(out).read_text()[-2000:]
    return out


def test_a_run_that_is_killed_ends_with_the_same_bytes(case, undisturbed, tmp_path):
    out, draw = tmp_path / "run", random.Random(5)
    for phase in ("steps", "saving", "model and evaluation"):
        death = kill.kill_once(case, out, phase, draw, signal.SIGKILL)
        assert death is not None
        assert death.statuses == [-signal.SIGKILL]
    assert kill.finish(kill.start(case, out)) == [0], case.log(out).read_text()[-2000:]
    assert kill.differences(out, undisturbed) == []


def test_the_comparison_sees_what_differs(undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for name, spoil, said in (
        ("metrics.jsonl", lambda content: content.replace(b'"loss": ', b'"loss": 1', 1), "1 rows differ"),
        ("ckpt_epoch_1_step_75/model.safetensors", lambda content: content[:-1] + b"~", "model.safetensors differs"),
        ("ckpt_epoch_1_step_75/eval_generation.json", lambda content: content[:-3], "cannot be read"),
        ("state/150/checksums.json", lambda content: content[:-3], "state/150 cannot be read"),
    ):
        content = (out / name).read_bytes()
        assert spoil(content) != content
        (out / name).write_bytes(spoil(content))
        assert any(said in difference for difference in kill.differences(out, undisturbed)), name
        (out / name).write_bytes(content)
    assert kill.differences(out, undisturbed) == []
