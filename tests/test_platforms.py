"""Every program of a run can be lowered for the accelerators that this machine does not have."""

import jax
import pytest
from jax import export

from repro.config import ARGUMENTS, parse_arguments
from repro.recipes.selftest import command_line, read_case
from repro.run.build import build_evaluator, build_training
from repro.run.prepare import prepare
from repro.run.settings import Settings


class Exported:
    """A jitted function that is exported for other platforms before it is lowered for this one."""

    def __init__(self, jitted, texts):
        self.jitted, self.texts = jitted, texts

    def __call__(self, *args, **more):
        return self.jitted(*args, **more)

    def __getattr__(self, name):
        return getattr(self.jitted, name)

    def lower(self, *args):
        found = export.export(self.jitted, platforms=["cuda", "tpu"])(*args)
        self.texts[self.jitted.__name__] = found.mlir_module()
        return self.jitted.lower(*args)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_every_program_of_a_run_lowers_for_accelerators(dtype, tmp_path, monkeypatch):
    line = [*command_line(read_case("current_block0"), tmp_path / "run"), "--dtype", dtype]
    settings = Settings.of(*parse_arguments(ARGUMENTS, line, command="train"), num_devices=1)
    prepared = prepare(settings, jax.devices()[:1], progress=False)
    texts, jit = {}, jax.jit
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", lambda *args, **more: Exported(jit(*args, **more), texts))
        build_training(prepared)
        build_evaluator(prepared).programs()
    assert texts.keys() == {"train_step", "encode", "eval_step", "generate"}
    own = "bf16" if dtype == "bfloat16" else "f32"
    assert all(f"x{own}>" in text for text in texts.values())
