"""Programs compiled for TPUs that are not at hand; `tox -e tpu` has the compiler."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repro.config import ARGUMENTS, parse_arguments
from repro.errors import InputError
from repro.models.captioner import normalize
from repro.recipes.preflight import DryRun
from repro.recipes.selftest import command_line, read_case
from repro.recipes.topology import collectives, compile_for, devices_of
from repro.training import memory
from repro.training.memory import SHARE, Chip

LOOP = """
%body.1 (arg: (f32[8])) -> (f32[8]) {
  %all-reduce.3 = f32[1024,512]{1,0} all-reduce(%x), replica_groups={}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (f32[8]) while(%t), condition=%cond.1, body=%body.1
  %all-reduce.1 = (f32[768]{0}, /*index=1*/bf16[3,4]{1,0}) all-reduce(%a, %b), to_apply=%add
  %all-gather-start.1 = f32[16]{0} all-gather-start(%a), dimensions={0}
  %use = f32[8] get-tuple-element(%all-reduce.1), index=0
}
"""


def compiled(tmp_path: Path, machine: str, *flags: str) -> DryRun:
    line = [*command_line(read_case("published_8dev"), tmp_path / "run"), *flags]
    return compile_for(*parse_arguments(ARGUMENTS, line, command="train"), devices=devices_of(machine))


def test_collectives_are_counted_with_the_bytes_of_their_results() -> None:
    assert collectives(LOOP) == {"all-reduce": (2, 4 * 1024 * 512 + 4 * 768 + 2 * 12), "all-gather": (1, 64)}


def test_a_run_fits_the_published_machine_and_its_gradients_are_reduced_once(tmp_path: Path) -> None:
    found = compiled(tmp_path, "v3:2x2")
    assert not found.problems
    assert "machine: 8 x TPU v3 with 16.0 GiB, not at hand" in found.text
    assert found.facts["mesh"] == {"data": 8, "fsdp": 1}
    assert found.facts["programs"].keys() == {"step", "encoding", "losses", "search"}
    assert 0 < found.facts["programs"]["step"]["bytes"] < 2**30
    parameters = found.facts["state_bytes"] / 12  # float32, with two moments
    assert found.facts["programs"]["step"]["collectives"]["all-reduce"][1] == pytest.approx(4 * parameters, rel=0.35)
    assert found.facts["programs"]["encoding"]["collectives"] == {}


def test_where_a_run_does_not_fit_the_layout_that_would_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = compiled(tmp_path, "v3:2x2", "--mesh", "data=1,fsdp=8").facts
    limit = max(roomy["step_bytes"], roomy["evaluation_bytes"]) / SHARE + 1
    monkeypatch.setitem(memory.CHIPS, "TPU v3", Chip(limit / 2**30, 1.0))
    found = compiled(tmp_path, "v3:2x2")
    assert found.problems[0].startswith("with these flags: takes ")
    assert "\nit fits with --mesh=data=1,fsdp=8:\n" in found.text
    assert found.facts["mesh"] == {"data": 1, "fsdp": 8}


def test_a_machine_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"v3:3: must be like v3:2x2, v4:2x2x1, v5e:1x1"):
        devices_of("v3:3")
    with pytest.raises(InputError, match=r"v2:2x2: a TPU v2 is none of TPU v3, "):
        devices_of("v2:2x2")
    assert [len(devices_of(name)) for name in ("v5e:1x1", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4")] == [1, 4, 4, 8]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pixels_are_looked_up_in_a_thousandth_of_the_time_of_scalar_gathers(dtype: jnp.dtype) -> None:
    device = jax.sharding.SingleDeviceSharding(devices_of("v3:2x2")[0])
    pixels = jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.uint8, sharding=device)
    table = np.random.default_rng(0).random((256, 3), np.float32)
    by_index = lambda pixels: jnp.asarray(table, dtype)[pixels.astype(jnp.int32), jnp.arange(3)]  # noqa: E731
    ours, theirs = (
        jax.jit(function).lower(pixels).compile()
        for function in (lambda pixels: normalize(pixels, table, dtype), by_index)
    )
    assert " gather(" not in ours.as_text()
    expected = [compiled.cost_analysis()["optimal_seconds"] for compiled in (ours, theirs)]
    assert expected[0] < 0.0005
    assert expected[1] > 0.5
