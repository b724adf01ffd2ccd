"""The schedule's corners, the published run's learning rates, and which parameters decay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, traverse_util
from hypothesis import given
from hypothesis import strategies as st

from repro.training.steps import create_learning_rate_fn, create_optimizer, decay_mask

PEAK = 3e-5


@pytest.fixture(scope="module")
def params(golden_inputs):
    """The golden model's own parameter tree."""
    return serialization.msgpack_restore((golden_inputs / "model" / "flax_model.msgpack").read_bytes())


def flat(tree):
    return {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}


def test_learning_rates_are_those_of_the_published_run():
    schedule = create_learning_rate_fn(PEAK, num_steps=2307)
    assert float(schedule(0)) == pytest.approx(3e-5, rel=1e-6)
    assert float(schedule(1999)) == pytest.approx(3e-5 * (1 - 1999 / 2307), rel=1e-5)
    # The rate at the evaluation after step 2000 is that of the state: the one step 2001 would use.
    assert f"{float(schedule(2000)):.2e}" == "3.99e-06"


@given(st.integers(1, 5000), st.data())
def test_without_warm_up_step_s_has_the_peak_times_one_minus_s_minus_1_over_the_steps(num_steps, data):
    step = data.draw(st.integers(1, num_steps))
    schedule = create_learning_rate_fn(PEAK, num_steps=num_steps)
    assert float(schedule(step - 1)) == pytest.approx(PEAK * (1 - (step - 1) / num_steps), rel=1e-3, abs=1e-11)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0.0), (1, PEAK / 4), (3, PEAK * 3 / 4), (4, PEAK), (5, PEAK * 5 / 6), (9, PEAK / 6), (10, 0.0), (99, 0.0)],
    ids=["first", "second", "before-peak", "peak", "after-peak", "last", "end", "beyond"],
)
def test_warm_up_rises_to_the_peak_and_then_the_rate_falls_to_zero(count, expected):
    schedule = create_learning_rate_fn(PEAK, num_steps=10, warmup_steps=4)
    assert float(schedule(count)) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_no_rate_is_negative_beyond_the_last_step():
    schedule = create_learning_rate_fn(PEAK, num_steps=3)
    assert [float(schedule(count)) for count in (3, 4, 1000)] == [0.0, 0.0, 0.0]


def test_schedule_is_the_same_with_and_without_jit():
    schedule = create_learning_rate_fn(PEAK, num_steps=10, warmup_steps=4)
    counts = jnp.arange(12)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(schedule))(counts), [schedule(c) for c in counts], rtol=1e-6, atol=1e-6 * PEAK
    )


@pytest.mark.parametrize("rule", ["2022", "layer_norms"])
def test_no_bias_decays_and_all_kernels_and_embeddings_do(params, rule):
    mask = flat(decay_mask(params, rule))
    assert mask.keys() == flat(params).keys()
    assert not any(decays for path, decays in mask.items() if path.endswith("/bias"))
    weights = [path for path in mask if path.endswith(("/kernel", "/embedding", "embeddings", "cls_token"))]
    assert weights
    assert all(mask[path] for path in weights)


def test_layer_norm_scales_of_vit_and_gpt2_decay_under_2022(params):
    mask = flat(decay_mask(params, "2022"))
    assert mask["decoder/transformer/h/0/ln_1/scale"]
    assert mask["decoder/transformer/ln_f/scale"]
    assert mask["encoder/encoder/layer/0/layernorm_before/scale"]
    assert {path.rsplit("/", 1)[1] for path, decays in mask.items() if not decays} == {"bias"}


def test_no_layer_norm_scale_decays_under_layer_norms(params):
    mask = flat(decay_mask(params, "layer_norms"))
    scales = [path for path in mask if path.endswith("/scale")]
    assert "decoder/transformer/h/0/ln_1/scale" in scales
    assert "encoder/encoder/layer/0/layernorm_before/scale" in scales
    assert not any(mask[path] for path in scales)
    assert {path.rsplit("/", 1)[1] for path, decays in mask.items() if not decays} == {"bias", "scale"}


@pytest.mark.parametrize("rule", ["2022", "layer_norms"])
@pytest.mark.parametrize("name", ["self_attn_layer_norm", "layernorm_embedding", "final_layer_norm"])
def test_scales_of_barts_layer_norms_never_decay(rule, name):
    assert decay_mask({name: {"scale": np.ones(1)}}, rule) == {name: {"scale": False}}


@pytest.mark.parametrize("rule", ["2022", "layer_norms"])
def test_without_gradients_exactly_the_decaying_parameters_shrink(params, rule):
    optimizer = create_optimizer(optax.constant_schedule(0.5), rule=rule, weight_decay=0.1)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    mask = flat(decay_mask(params, rule))
    for path, update in flat(updates).items():
        np.testing.assert_allclose(update, -0.5 * 0.1 * mask[path] * flat(params)[path], rtol=1e-6, err_msg=path)


def test_first_step_moves_by_the_rate_against_the_gradients_sign():
    # Adam's first step: m / (1 - b1) = g and v / (1 - b2) = g^2, so g / (|g| + epsilon).
    optimizer = create_optimizer(optax.constant_schedule(0.01), rule="2022", epsilon=0.5)
    weights, gradients = {"kernel": np.ones(3, np.float32)}, {"kernel": np.asarray([2.0, -0.5, 0.0], np.float32)}
    updates, _ = optimizer.update(gradients, optimizer.init(weights), weights)
    np.testing.assert_allclose(updates["kernel"], [-0.01 * 2 / 2.5, 0.01 * 0.5 / 1.0, 0.0], rtol=1e-5)
