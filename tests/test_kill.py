"""The short form of benchmarks/kill.py: a run that is killed three times ends as one that is not."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metrics.jsonl", "metrics.jsonl: 1 rows differ"),
        ("ckpt_epoch_1_step_75/model.safetensors", "model.safetensors differs"),
        ("ckpt_epoch_1_step_75/eval_generation.json", "cannot be read"),
        ("state/150/checksums.json", "state/150 cannot be read"),
    ],
)
def test_the_comparison_sees_what_differs(undisturbed, tmp_path, name, said):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    assert kill.differences(out, undisturbed) == []
    path = out / name
    if name == "metrics.jsonl":
        path.write_text(path.read_text().replace('"loss": ', '"loss": 1', 1))
    elif name.endswith("safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    else:
        path.write_bytes(path.read_bytes()[:-3])
    assert any(said in difference for difference in kill.differences(out, undisturbed))
