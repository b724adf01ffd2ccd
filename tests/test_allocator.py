"""The commands have mimalloc where a CPU computes, and what the user or another device wants comes first."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their own")


@pytest.mark.parametrize(
    ("plugin", "given", "wanted"),
    [
        (None, {}, "mimalloc"),
        (None, {"REPRO_ALLOCATOR": "system"}, "malloc"),
        (None, {"LD_PRELOAD": "libc.so.6"}, "malloc"),
        ("jax_plugins", {"JAX_PLATFORMS": "cpu"}, "mimalloc"),
        ("jax_plugins", {}, "malloc"),
        ("libtpu", {}, "malloc"),
        ("cmeel_mimalloc-3.4.3.dist-info", {}, "malloc"),  # whose library is not beside it
    ],
)
def test_commands_on_a_cpu_have_mimalloc(tmp_path, plugin, given, wanted):
    if plugin:
        (tmp_path / plugin).mkdir()
        (tmp_path / plugin / "__init__.py").touch()
        (tmp_path / plugin / "METADATA").write_text("Name: cmeel-mimalloc\nVersion: 3.4.3\n")
    inherited = {name: os.environ[name] for name in os.environ if name not in ("JAX_PLATFORMS", "LD_PRELOAD")}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), **given}
    show = (
        "import sys, repro.__main__ as command; from repro.allocator import allocator\n"
        "command.main = lambda: print(sys.argv[1:], allocator()) or 0\n"
        "command.program()"
    )
    command = [sys.executable, "-c", show, "caption", "a b.jpg"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"['caption', 'a b.jpg'] {wanted}\n", "")
