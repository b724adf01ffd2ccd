"""The benchmarks' work at a very small size, which each peer must do."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import transformers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
ablation = importlib.import_module("ablation")
generation = importlib.import_module("generation")
input_pipeline = importlib.import_module("input_pipeline")
saving = importlib.import_module("saving")
scaling = importlib.import_module("scaling")
suite = importlib.import_module("suite")
train_step = importlib.import_module("train_step")

SETTINGS = {"batch": 2, "beams": 2, "length": 4, "dtype": "float32", "smoke": True}
PEERS = ["native"]
if hasattr(transformers, "FlaxVisionEncoderDecoderModel"):
    PEERS.append("flax")
if importlib.util.find_spec("torch"):
    PEERS.append("torch")


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_captions_a_batch(peer):
    captions = generation.make_generation(peer, SETTINGS)()
    tokens = np.asarray(captions.tokens[:, 0] if peer == "native" else captions)
    assert tokens.shape == (2, 4)


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != "torch"])
def test_every_peer_evaluates_a_batch(peer):
    generation.make_evaluation(peer, SETTINGS)()


@pytest.mark.parametrize("peer", [*PEERS, *["flax_example"] * ("flax" in PEERS)])
def test_every_peer_trains(peer):
    run = train_step.make_step(peer, SETTINGS)
    assert run() > run() > 0, "the second step on the same batch must lower the loss"


def test_both_ways_of_input_bring_the_same_rows(tmp_path):
    folder = tmp_path / "data"
    input_pipeline.write_data(folder, 6, 30, (32, 24))
    for name, epoch in input_pipeline.PEERS.items():
        assert epoch(folder, tmp_path / name) == 30
    sizes = {name: input_pipeline.on_disk(tmp_path / name) for name in input_pipeline.PEERS}
    assert sizes["example"] > 19 * sizes["ours"] > 19 * 6 * 224 * 224 * 3


def test_collectives_are_counted_with_their_bytes_and_apart_in_loops():
    hlo = """
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
    assert scaling.count_collectives(hlo) == {
        "all-reduce in a loop": {"count": 1, "larger": 1, "bytes": 4 * 1024 * 512},
        "all-reduce": {"count": 1, "larger": 0, "bytes": 4 * 768 + 2 * 12},
        "all-gather": {"count": 1, "larger": 0, "bytes": 64},
    }


def test_saving_is_timed_beside_the_same_steps_without(tmp_path):
    settings = {"batch": 2, "length": 4, "smoke": True}
    saving.STEPS = 3
    result = saving.measure_saving(settings, tmp_path / "state", pairs=1)
    assert result["state_megabytes"] > 10
    assert len(result["seconds_until_on_disk_with_checksums"]) == 1
    parts = saving.restart(settings, tmp_path / "state", time.time())
    assert parts["total"] == pytest.approx(sum(parts.values()) - parts["total"])


def test_estimates_grow_with_the_machine():
    small, large = (scaling.estimate(scaling.MACHINES[index], 2048) for index in (0, 2))
    assert small["minutes_of_training"] > large["minutes_of_training"] > 0
    assert small["efficiency_without_overlap"] > large["efficiency_without_overlap"] > 0


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
    assert [row["regression"] for row in (*same, *slower, *faster)] == [False] * 3 + [True] * 3 + [False] * 3
    assert slower[0]["ratio"] == pytest.approx(1.2)
    with pytest.raises(SystemExit, match="device differ: cpu and gpu"):
        suite.compare(suite_result(1.0), suite_result(1.0, device="gpu"))


def test_an_effect_comes_with_its_interval():
    paired = ablation.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], paired=True)
    assert paired == {"difference": 1.0, "half_width": 0.0}
    apart = ablation.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], paired=False)
    # By hand: both variances 1, error sqrt(2 / 3), 4 degrees of freedom, t = 2.776.
    assert apart["half_width"] == pytest.approx(2.776 * (2 / 3) ** 0.5, abs=1e-3)


def test_runs_of_an_earlier_result_of_the_ablation_count_as_done(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation.subprocess, "run", None)
    known = {"runs": {variant.name: {"1": {"eval_loss": 0.5}} for variant in ablation.VARIANTS[:2]}}
    ablation.take_over(tmp_path, known)
    ablation.run_all(tmp_path, ablation.VARIANTS[:2], [1], workers=1)
    found = ablation.folder_of(tmp_path, ablation.VARIANTS[1], 1) / "metrics.json"
    assert found.read_text() == '{"eval_loss": 0.5}'
