"""The benchmarks' work at a very small size, which each peer must do."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
generation = importlib.import_module("generation")
input_pipeline = importlib.import_module("input_pipeline")
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
