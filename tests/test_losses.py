"""Laws of the label-smoothed loss, against its formula in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.training.losses import row_losses, token_losses

ROWS, LENGTH, VOCABULARY = 4, 5, 11
SMOOTHINGS = (0.0, 0.1, 0.6)

seeds = st.integers(0, 2**32 - 1)
smoothings = st.floats(0.001, 0.9)
masks = st.lists(st.integers(0, 1), min_size=ROWS * LENGTH, max_size=ROWS * LENGTH).map(
    lambda bits: np.asarray(bits, np.int32).reshape(ROWS, LENGTH)
)


def draw(seed: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32[4,5,11] and labels int32[4,5]."""
    random = np.random.default_rng(seed)
    logits = scale * random.standard_normal((ROWS, LENGTH, VOCABULARY))
    return logits.astype(np.float32), random.integers(0, VOCABULARY, (ROWS, LENGTH), dtype=np.int32)


def smoothed_targets(labels: np.ndarray, smoothing: float) -> np.ndarray:
    """1 - e at the label, e / (V - 1) everywhere else."""
    targets = np.full((*labels.shape, VOCABULARY), smoothing / (VOCABULARY - 1))
    np.put_along_axis(targets, labels[..., None], 1 - smoothing, axis=-1)
    return targets


@given(seeds, smoothings)
def test_loss_is_the_soft_cross_entropy_minus_its_least_value(seed, smoothing):
    logits, labels = draw(seed)
    wide = logits.astype(np.float64)
    log_probs = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    cross_entropy = -(smoothed_targets(labels, smoothing) * log_probs).sum(axis=-1)
    confidence, low = 1 - smoothing, smoothing / (VOCABULARY - 1)
    least = -(confidence * np.log(confidence) + (VOCABULARY - 1) * low * np.log(low + 1e-20))

    losses = token_losses(logits, labels, label_smoothing=smoothing)

    np.testing.assert_allclose(losses, cross_entropy - least, rtol=1e-5, atol=1e-5)


@given(seeds)
def test_loss_without_smoothing_is_the_cross_entropy_of_integer_labels(seed):
    logits, labels = draw(seed)
    expected = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(token_losses(logits, labels), expected, rtol=1e-5, atol=1e-5)


@given(seeds, smoothings)
def test_a_prediction_that_equals_the_smoothed_target_costs_nothing(seed, smoothing):
    _, labels = draw(seed)
    logits = np.log(smoothed_targets(labels, smoothing)).astype(np.float32)
    np.testing.assert_allclose(token_losses(logits, labels, label_smoothing=smoothing), 0.0, atol=1e-5)


@given(seeds, smoothings)
def test_no_prediction_costs_less_than_nothing(seed, smoothing):
    logits, labels = draw(seed)
    assert float(token_losses(logits, labels, label_smoothing=smoothing).min()) > -1e-5


@given(seeds, masks, st.sampled_from(SMOOTHINGS))
def test_masked_tokens_do_not_change_the_loss(seed, mask, smoothing):
    logits, labels = draw(seed)
    others = draw(seed + 1)
    is_real = mask == 1
    other_logits = np.where(is_real[..., None], logits, 100 * others[0])
    other_labels = np.where(is_real, labels, others[1])

    loss = row_losses(logits, labels, mask, label_smoothing=smoothing)
    same = row_losses(other_logits, other_labels, mask, label_smoothing=smoothing)

    np.testing.assert_array_equal(loss, same)
    np.testing.assert_array_equal(loss[1], mask.sum(axis=1))


@given(seeds, masks, st.integers(0, ROWS), st.sampled_from(SMOOTHINGS))
def test_sums_and_counts_of_any_split_add_up_to_those_of_the_batch(seed, mask, cut, smoothing):
    logits, labels = draw(seed)
    whole = row_losses(logits, labels, mask, label_smoothing=smoothing)
    parts = [
        row_losses(logits[part], labels[part], mask[part], label_smoothing=smoothing)
        for part in (slice(None, cut), slice(cut, None))
    ]
    for total, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(total, np.concatenate([first, second]), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(total.sum(), first.sum() + second.sum(), rtol=1e-5, atol=1e-5)


@given(seeds, masks, st.sampled_from(SMOOTHINGS))
def test_loss_is_the_same_with_and_without_jit(seed, mask, smoothing):
    logits, labels = draw(seed)
    eager = row_losses(logits, labels, mask, label_smoothing=smoothing)
    compiled = compiled_row_losses(logits, labels, mask, label_smoothing=smoothing)
    for a, b in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@given(seeds, masks, st.sampled_from(SMOOTHINGS), st.sampled_from([0.0, 1.0, 1e4]))
def test_gradients_are_finite_and_zero_where_masked(seed, mask, smoothing, scale):
    logits, labels = draw(seed, scale)
    gradients = np.asarray(loss_gradient(logits, labels, mask, smoothing))
    assert np.isfinite(gradients).all()
    assert not gradients[mask == 0].any()


def test_half_precision_logits_are_summed_in_float32():
    logits, labels = draw(0)
    half = jnp.asarray(logits, jnp.bfloat16)
    losses = token_losses(half, labels, label_smoothing=0.1)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, token_losses(half.astype(jnp.float32), labels, label_smoothing=0.1))


@pytest.mark.parametrize(
    "labels",
    [np.zeros((ROWS, LENGTH + 1), np.int32), np.zeros(ROWS, np.int32), np.zeros((ROWS, LENGTH), np.int64)],
    ids=["length", "rank", "dtype"],
)
def test_labels_that_do_not_fit_the_logits_are_refused(labels):
    with pytest.raises(AssertionError):
        token_losses(draw(0)[0], labels)


compiled_row_losses = jax.jit(row_losses, static_argnames="label_smoothing")


@partial(jax.jit, static_argnums=3)
def loss_gradient(logits, labels, mask, smoothing):
    return jax.grad(lambda x: row_losses(x, labels, mask, label_smoothing=smoothing)[0].sum())(logits)
