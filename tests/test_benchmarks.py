"""The benchmarks' work at a very small size, which each peer must do."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from failing_peers import make_failing

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
ablation = importlib.import_module("ablation")
generation = importlib.import_module("generation")
input_pipeline = importlib.import_module("input_pipeline")
peers = importlib.import_module("peers")
plots = importlib.import_module("plots")
roofline = importlib.import_module("roofline")
saving = importlib.import_module("saving")
suite = importlib.import_module("suite")
train_step = importlib.import_module("train_step")

SETTINGS = {"batch": 2, "beams": 2, "length": 4, "dtype": "float32", "smoke": True}
PEERS = ["native"]
if hasattr(transformers, "FlaxVisionEncoderDecoderModel"):
    PEERS.append("flax")
if importlib.util.find_spec("torch"):
    PEERS.append("torch")

pytestmark = pytest.mark.usefixtures("flax_classes_promote_ranks")


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_captions_a_batch(peer):
    captions = generation.make_generation(peer, SETTINGS)()
    tokens = np.asarray(captions.tokens[:, 0] if peer == "native" else captions)
    assert tokens.shape == (2, 4)


@pytest.mark.parametrize("peer", [*PEERS, *["flax_example"] * ("flax" in PEERS)])
def test_every_peer_trains(peer):
    run = train_step.make_step(peer, SETTINGS)
    assert run() > run() > 0, "the second step on the same batch must lower the loss"


@pytest.mark.parametrize("apart", [False, True])
def test_a_peer_that_runs_out_of_memory_is_reported_and_the_others_go_on(apart, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names = ["native", "early", "late", "killed", "torch"]
    found = peers.compare(make_failing, names, {"batch": 1}, turns=3, apart=apart)["peers"]
    assert list(found) == names
    assert found["early"] == {"failed": "MemoryError: RESOURCE_EXHAUSTED: 34 GiB"}
    assert found["late"] == {"failed": "MemoryError: RESOURCE_EXHAUSTED: 12 GiB"}
    assert found["killed"] == {"failed": "its process ended with status -9, as one that is out of memory may"}
    for name in ("native", "torch"):
        assert len(found[name]["seconds_of_turns"]) == 3
    assert found["torch"]["times_native"] > 0
    rated = train_step.with_rates({"settings": SETTINGS, "peers": found}, peak_teraflops=1.0)["peers"]
    assert rated["early"] == found["early"]
    assert rated["native"]["utilisation"] == pytest.approx(rated["native"]["teraflops"])


def test_products_are_counted_by_hand():
    product = roofline.Product(times=3, m=2, k=5, n=7)
    assert product.operations == 3 * 2 * (2 * 5 * 7)
    assert product.elements == 3 * (10 + 35 + 14)
    # ViT-B/16 with GPT-2: 86 M and 124 M parameters in products with 197 states and 32 tokens, 28 M with the states.
    settings = {"batch": 1, "length": 32, "smoke": False, "dtype": "float32"}
    parts = {name: roofline.operations({name: found}) for name, found in roofline.forward_products(settings).items()}
    attention = 12 * 2 * (2 * 197 * 197 * 768)
    assert parts["encoder"] == pytest.approx(2 * 197 * 85.8e6 + attention, rel=0.01)
    assert parts["cross-attention keys and values"] == 2 * 197 * 24 * 768 * 768
    assert parts["vocabulary"] == 2 * 32 * 768 * 50_257


def test_work_is_bound_by_the_longer_of_its_roofs():
    roofs = {"teraflops": {"float32": 2.0}, "gigabytes_a_second": 100.0, "peak": {"float32": 4.0}}
    busy = roofline.verdict({"operations": 4e12, "bytes": 1e9}, 4.0, roofs, "float32")
    assert (busy["bound_by"], busy["roof_seconds"], busy["share_of_roof"]) == ("arithmetic", 2.0, 0.5)
    assert (busy["utilisation"], busy["operations_a_byte"]) == (0.25, 4000.0)
    idle = roofline.verdict({"operations": 1e9, "bytes": 1e12}, 40.0, roofs | {"peak": {}}, "float32")
    assert (idle["bound_by"], idle["roof_seconds"], idle["share_of_roof"]) == ("memory", 10.0, 0.25)
    assert "utilisation" not in idle


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_every_part_is_given_flags_that_it_knows(platform):
    plan = suite.Plan(dtype="bfloat16", batch=256, peers=("native", "torch"), folder=Path("here"))
    asked = {}
    for name, command in suite.PARTS.items():
        if command:
            known = (suite.HERE / command[0]).read_text()
            asked[name] = plan.flags(name, platform=platform)
            flags = [flag for flag in (*command, *asked[name]) if flag.startswith("--")]
            passed_on = ("--dtype", "--replicas_at_once") if command[0] == "rehearsal.py" else ()
            assert all(f'"{flag}"' in known for flag in flags if flag not in passed_on)
    assert ("--apart" in asked["generation"]) == (platform == "gpu")
    assert asked["training step"][:2] == ["--dtype", "bfloat16"]
    assert asked["training step, float32"][:2] == ["--dtype", "float32"]
    assert asked["batch sizes"][-5:] == ["32", "64", "128", "256", "512"]
    assert not suite.Plan().includes("training step, float32"), "which the training step itself is"


def test_a_part_that_fails_is_named_and_the_page_is_written_all_the_same(monkeypatch, tmp_path):
    def part(command, folder):
        if command[0] == "roofline.py":
            roofs = {"platform": "cpu", "teraflops": {"float32": 1.0}, "gigabytes_a_second": 10.0}
            return {**roofs, "device": "cpu", "versions": {"jax": "0"}}
        if command[0] != "train_step.py":
            return {"failed": "status 1"}
        peer = {**suite_result(1.0)["training step"]["peers"]["native"], "first_run_seconds": 2.0}
        peer |= {"spread": [1.0, 1.1], "peak_memory_mb": 5.0}
        settings = SETTINGS | {"batch": 1}
        return {"settings": settings, "peers": {"native": peer, "torch": {"failed": "out of memory"}}}

    monkeypatch.setattr(suite, "run_part", part)
    result = suite.run_suite(suite.Plan(parts=("training step", "generation")))
    assert suite.failures(result) == ["generation: status 1"]
    assert result["training step"]["roofline"]["bound_by"] in ("memory", "arithmetic")
    text = suite.page({**result, "device": "cpu", "date": "2026-01-01", "versions": {"jax": "0"}})
    assert "| training step | torch | failed: out of memory |" in text
    assert "- failed: generation: status 1" in text


@pytest.mark.parametrize("file", sorted((suite.HERE / "results").glob("*/20*.json")), ids=lambda file: file.stem)
def test_the_page_of_a_result_has_every_part_that_was_measured(file):
    result = json.loads(file.read_text())
    assert suite.failures(result) == []
    page = file.with_suffix(".md").read_text()
    assert page == suite.page(result)
    for name in set(suite.PARTS) & set(result):
        others = {key: part for key, part in result.items() if key != name}
        assert suite.page(others) != page, f"{name} is not on the page"


def suite_result(seconds: float, *, device: str = "cpu") -> dict:
    part = {
        "device": device,
        "settings": {"batch": 8},
        "peers": {"native": {"seconds": seconds, "seconds_of_turns": [seconds + 0.01 * turn for turn in range(7)]}},
    }
    return dict.fromkeys(suite.TIMED, part)


def test_a_slower_result_is_a_regression_and_another_device_no_comparison():
    same = suite.compare(suite_result(1.0), suite_result(1.0))
    slower = suite.compare(suite_result(1.0), suite_result(1.2))
    faster = suite.compare(suite_result(1.0), suite_result(0.8))
    count = len(suite.TIMED)
    assert [row["regression"] for row in (*same, *slower, *faster)] == [False] * count + [True] * count + [
        False
    ] * count
    assert slower[0]["ratio"] == pytest.approx(1.2)
    with pytest.raises(SystemExit, match="device differ: cpu and gpu"):
        suite.compare(suite_result(1.0), suite_result(1.0, device="gpu"))


def test_an_effect_comes_with_its_interval():
    paired = ablation.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], paired=True)
    assert paired == {"difference": 1.0, "half_width": 0.0}
    apart = ablation.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], paired=False)
    # By hand: both variances 1, error sqrt(2 / 3), 4 degrees of freedom, t = 2.776.
    assert apart["half_width"] == pytest.approx(2.776 * (2 / 3) ** 0.5, abs=1e-3)


def test_the_table_of_what_moves_the_numbers_is_the_measured_one():
    result = json.loads((suite.HERE / "results" / "cpu-2-cores" / "ablation.json").read_text())
    assert ablation.table(result) in (suite.HERE.parent / "repro" / "recipes" / "README.md").read_text()


def test_the_picture_of_speed_shows_the_measured_ratios():
    drawn = (suite.HERE / "results" / "cpu-2-cores" / "speed.svg").read_text()
    shown = {f"{title}: {peer}": times for title, peers in plots.speeds() for peer, times in peers}
    assert len(shown) >= 8
    assert [text for name, times in shown.items() for text in (name, f"{times:.2f}") if f">{text}<" not in drawn] == []


@pytest.mark.parametrize(
    ("protocol", "seeds", "named"),
    [("exact", "8 and 7", False), ("current", "5 and 5", True), ("published", "16", False)],
)
def test_the_verdicts_on_native_and_class_are_those_of_the_result(protocol, seeds, named):
    result = json.loads((suite.HERE / "results" / "cpu-2-cores" / "ablation.json").read_text())
    (row,) = (row for row in result["variants"] if row["variant"] == f"{protocol}, transformers")
    found = {
        name: target if named else target["if_each_look_is_paid_for"] for name, target in row["equivalence"].items()
    }
    told = {name for name, target in found.items() if target["verdict"] != "PASS"}
    assert told == ({"eval_rouge2"} if protocol == "exact" else set())
    low, high = found["eval_rouge2"]["interval"]
    cell = f"| {row['equivalence']['eval_rouge2']['difference']:+.2f} ({low:+.2f} to {high:+.2f}) |"
    (line,) = (
        line
        for line in (suite.HERE.parent / "repro" / "recipes" / "README.md").read_text().splitlines()
        if line.startswith(f"| `{protocol}` | {seeds}")
    )
    assert cell in line
    assert ("CANNOT TELL: ROUGE-2" if told else "| PASS |") in line


ROUNDED = """
import jax, jax.numpy as jnp
from rounded_products import round_products
round_products(7)
more = jnp.float32(1 + 2**-9)  # 1 in bfloat16
row, ones = jnp.full((1, 4), more), jnp.ones((4, 1))
product = jax.jit(lambda a, b: (a @ b)[0, 0])
assert product(row, ones) == 4.0 and product(ones.T, row.T) == 4.0
assert jax.jit(lambda a: a.sum())(row) == 4 * more, "sums are not products"
assert jax.grad(lambda a: more * product(a, ones))(row)[0, 0] == 1.0, "the cotangent of a product"
assert jax.lax.scan(lambda c, _: (c, product(row, ones)), 0, length=2)[1].tolist() == [4.0, 4.0]
exact = 2**10 + 1
assert product(jnp.full((1, 1), exact), jnp.ones((1, 1), int)) == exact, "integers stay"
"""


def test_rounded_products_round_the_operands_of_all_products_and_nothing_else():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    where = Path(ablation.__file__).parent
    subprocess.run([sys.executable, "-c", ROUNDED], cwd=where, env=environment, check=True)
