"""The benchmarks' work at a very small size, which each peer must do."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from failing_peers import make_failing
from jax.interpreters import mlir

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import ablation
import generation
import input_pipeline  # noqa: F401, to see that it can be; `tox -e bench` runs it
import peers
import plots
import roofline
import rounded_products
import saving  # noqa: F401
import suite
import train_step

SETTINGS = {"batch": 2, "beams": 2, "length": 4, "dtype": "float32", "smoke": True}
RESULTS = suite.HERE / "results" / "cpu-2-cores"
PAGE = suite.HERE.parent / "repro" / "recipes" / "README.md"
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


def test_a_peer_that_runs_out_of_memory_is_reported_and_the_others_go_on(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names = ["native", "early", "late", "killed", "torch"]
    found = peers.compare(make_failing, names, {"batch": 1}, turns=3)["peers"]
    assert list(found) == names
    assert found["early"] == {"failed": "MemoryError: RESOURCE_EXHAUSTED: 34 GiB"}
    assert found["late"] == {"failed": "MemoryError: RESOURCE_EXHAUSTED: 12 GiB"}
    assert found["killed"] == {"failed": "its process ended with status -9, as one that is out of memory may"}
    assert [len(found[name]["seconds_of_turns"]) for name in ("native", "torch")] == [3, 3]
    rated = train_step.with_rates({"settings": SETTINGS, "peers": found}, peak_teraflops=1.0)["peers"]
    assert rated["early"] == found["early"]
    assert rated["native"]["utilisation"] == pytest.approx(rated["native"]["teraflops"])


@pytest.mark.parametrize(("apart", "ratio"), [(False, 5.0), (True, 8 / 3)])
def test_peers_in_turns_are_compared_turn_by_turn_and_those_apart_by_their_medians(apart, ratio, monkeypatch):
    times = {"native": [1.0, 3.0, 10.0], "torch": [8.0, 15.0, 1.0]}
    found = {name: {"seconds": statistics.median(each), "seconds_of_turns": each} for name, each in times.items()}
    monkeypatch.setattr(peers, "_take_turns", lambda make, names, *_: {name: dict(found[name]) for name in names})
    result = peers.compare(make_failing, list(times), {}, turns=3, apart=apart)
    assert result["peers"]["torch"]["times_native"] == pytest.approx(ratio)


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


def timed(seconds, *, device="cpu"):
    native = {"seconds": seconds, "seconds_of_turns": [seconds + 0.01 * turn for turn in range(7)]}
    part = {"device": device, "settings": {"batch": 8}, "peers": {"native": native}}
    return dict.fromkeys(suite.TIMED, part)


def test_a_part_that_fails_is_named_and_the_page_is_written_all_the_same(monkeypatch):
    native = timed(1.0)["training step"]["peers"]["native"]
    native |= {"first_run_seconds": 2.0, "spread": [1.0, 1.1], "peak_memory_mb": 5.0}
    roofs = {"platform": "cpu", "teraflops": {"float32": 1.0}, "gigabytes_a_second": 10.0, "device": "cpu"}
    parts = {
        "roofline.py": {**roofs, "versions": {"jax": "0"}},
        "train_step.py": {"settings": SETTINGS, "peers": {"native": native, "torch": {"failed": "out of memory"}}},
    }
    monkeypatch.setattr(suite, "run_part", lambda command, folder: parts.get(command[0], {"failed": "status 1"}))
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


@pytest.mark.parametrize(("seconds", "is_slower"), [(1.0, False), (1.2, True), (0.8, False)])
def test_a_slower_result_is_a_regression_and_another_device_no_comparison(seconds, is_slower):
    rows = suite.compare(timed(1.0), timed(seconds))
    assert [row["regression"] for row in rows] == [is_slower] * len(suite.TIMED)
    assert rows[0]["ratio"] == pytest.approx(seconds)
    with pytest.raises(SystemExit, match="device differ: cpu and gpu"):
        suite.compare(timed(1.0), timed(seconds, device="gpu"))


def test_an_effect_comes_with_its_interval():
    paired = ablation.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], paired=True)
    assert paired == {"difference": 1.0, "half_width": 0.0}
    apart = ablation.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], paired=False)
    # By hand: both variances 1, error sqrt(2 / 3), 4 degrees of freedom, t = 2.776.
    assert apart["half_width"] == pytest.approx(2.776 * (2 / 3) ** 0.5, abs=1e-3)


def test_the_picture_of_speed_shows_the_measured_ratios():
    drawn = (RESULTS / "speed.svg").read_text()
    shown = {f"{title}: {peer}": times for title, peers in plots.speeds() for peer, times in peers}
    assert len(shown) >= 8
    assert [text for name, times in shown.items() for text in (name, f"{times:.2f}") if f">{text}<" not in drawn] == []


def test_the_table_of_what_moves_the_numbers_is_the_measured_one():
    assert ablation.table(json.loads((RESULTS / "ablation.json").read_text())) in PAGE.read_text()


VARIANTS = [("exact", "8 and 7", False), ("current", "5 and 5", True), ("published", "16", False)]


@pytest.mark.parametrize(("protocol", "seeds", "named"), VARIANTS)
def test_the_verdicts_on_native_and_class_are_those_of_the_result(protocol, seeds, named):
    variants = json.loads((RESULTS / "ablation.json").read_text())["variants"]
    (found,) = (row["equivalence"] for row in variants if row["variant"] == f"{protocol}, transformers")
    difference = found["eval_rouge2"]["difference"]
    if not named:
        found = {name: target["if_each_look_is_paid_for"] for name, target in found.items()}
    told = {name for name, target in found.items() if target["verdict"] != "PASS"}
    assert told == ({"eval_rouge2"} if protocol == "exact" else set())
    low, high = found["eval_rouge2"]["interval"]
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{protocol}` | {seeds}"))
    assert f"| {difference:+.2f} ({low:+.2f} to {high:+.2f}) |" in line
    assert ("CANNOT TELL: ROUGE-2" if told else "| PASS |") in line


def test_rounded_products_round_the_operands_of_all_products_and_nothing_else():
    product = jax.jit(lambda a, b: (a @ b)[0, 0])
    more = jnp.float32(1 + 2**-9)  # 1 in bfloat16
    row, ones = jnp.full((1, 4), more), jnp.ones((4, 1))
    with mock.patch.dict(mlir._platform_specific_lowerings["cpu"]):
        rounded_products.round_products(7)
        assert product(row, ones) == product(ones.T, row.T) == 4.0
        assert jax.jit(lambda a: a.sum())(row) == 4 * more, "sums are not products"
        assert jax.grad(lambda a: more * product(a, ones))(row)[0, 0] == 1.0, "the cotangent of a product"
        assert jax.lax.scan(lambda c, _: (c, product(row, ones)), 0, length=2)[1].tolist() == [4.0, 4.0]
        exact = 2**10 + 1
        assert product(jnp.full((1, 1), exact), jnp.ones((1, 1), int)) == exact, "integers stay"
