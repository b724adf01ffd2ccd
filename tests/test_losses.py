"""Laws of the label-smoothed loss, against its formula in float64."""

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

seeds = st.integers(0, 2**32 - 1)
smoothings = st.sampled_from((0.0, 0.1, 0.6))
masks = st.lists(st.integers(0, 1), min_size=ROWS * LENGTH, max_size=ROWS * LENGTH).map(
    lambda bits: np.asarray(bits, np.int32).reshape(ROWS, LENGTH)
)


def draw(seed, scale=3.0):
    """Logits float32[4,5,11] and labels int32[4,5]."""
    random = np.random.default_rng(seed)
    logits = scale * random.standard_normal((ROWS, LENGTH, VOCABULARY))
    return logits.astype(np.float32), random.integers(0, VOCABULARY, (ROWS, LENGTH), dtype=np.int32)


@given(seeds, st.floats(0.001, 0.9))
def test_loss_is_the_soft_cross_entropy_minus_its_least_value_which_costs_nothing(seed, smoothing):
    logits, labels = draw(seed)
    # 1 - e at the label, e / (V - 1) everywhere else.
    targets = np.full((*labels.shape, VOCABULARY), smoothing / (VOCABULARY - 1))
    np.put_along_axis(targets, labels[..., None], 1 - smoothing, axis=-1)
    wide = logits.astype(np.float64)
    log_probs = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    divergence = (targets * (np.log(targets) - log_probs)).sum(axis=-1)
    losses = token_losses(logits, labels, label_smoothing=smoothing)
    np.testing.assert_allclose(losses, divergence, rtol=1e-5, atol=1e-5)
    best = np.log(targets).astype(np.float32)
    np.testing.assert_allclose(token_losses(best, labels, label_smoothing=smoothing), 0.0, atol=1e-5)


@given(seeds)
def test_loss_without_smoothing_is_the_cross_entropy_of_integer_labels(seed):
    logits, labels = draw(seed)
    expected = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(token_losses(logits, labels), expected, rtol=1e-5, atol=1e-5)


@given(seeds, masks, smoothings)
def test_rows_sum_their_tokens_and_masked_ones_do_not_change_the_loss(seed, mask, smoothing):
    (logits, labels), (other_logits, other_labels) = draw(seed), draw(seed + 1)
    others = np.where(mask[..., None], logits, 100 * other_logits), np.where(mask, labels, other_labels)
    (sums, counts), same = (row_losses(*pair, mask, label_smoothing=smoothing) for pair in ((logits, labels), others))
    tokens = token_losses(logits, labels, label_smoothing=smoothing)
    np.testing.assert_allclose(sums, (np.asarray(tokens) * mask).sum(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(counts, mask.sum(axis=1))
    np.testing.assert_array_equal((sums, counts), same)


compiled_row_losses = jax.jit(row_losses, static_argnames="label_smoothing")


@given(seeds, masks, smoothings)
def test_loss_is_the_same_with_and_without_jit(seed, mask, smoothing):
    eager, compiled = (
        function(*draw(seed), mask, label_smoothing=smoothing) for function in (row_losses, compiled_row_losses)
    )
    np.testing.assert_allclose(eager, compiled, rtol=1e-6, atol=1e-6)


@partial(jax.jit, static_argnums=3)
def loss_gradient(logits, labels, mask, smoothing):
    return jax.grad(lambda x: row_losses(x, labels, mask, label_smoothing=smoothing)[0].sum())(logits)


@given(seeds, masks, smoothings, st.sampled_from([0.0, 1.0, 1e4]))
def test_gradients_are_finite_and_zero_where_masked(seed, mask, smoothing, scale):
    gradients = np.asarray(loss_gradient(*draw(seed, scale), mask, smoothing))
    assert np.isfinite(gradients).all()
    assert not gradients[mask == 0].any()


def test_half_precision_logits_are_summed_in_float32():
    logits, labels = draw(0)
    half = jnp.asarray(logits, jnp.bfloat16)
    losses = token_losses(half, labels, label_smoothing=0.1)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, token_losses(half.astype(jnp.float32), labels, label_smoothing=0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_keeps_one_array_as_large_as_the_logits(smoothing):
    shape = (2, 8, 200_000)
    labels = np.ones(shape[:2], np.int32)

    def loss(logits):
        sums, counts = row_losses(logits, labels, np.ones_like(labels), label_smoothing=smoothing)
        return sums.sum() / counts.sum()

    _, backward = jax.vjp(loss, jnp.ones(shape))
    assert [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.size >= shape[-1]] == [shape]
    # From features to the gradient of a kernel: the logits and, for a moment, their gradient; no target, no softmax.
    features = np.ones((*shape[:2], 4), np.float32)
    gradient = jax.jit(jax.grad(lambda kernel: loss(features @ kernel)))
    memory = gradient.lower(np.ones((4, shape[-1]), np.float32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.1 * 4 * np.prod(shape)


@pytest.mark.parametrize(
    "labels",
    [np.zeros((ROWS, LENGTH + 1), np.int32), np.zeros(ROWS, np.int32), np.zeros((ROWS, LENGTH), np.int64)],
    ids=["length", "rank", "dtype"],
)
def test_labels_that_do_not_fit_the_logits_are_refused(labels):
    with pytest.raises(AssertionError):
        token_losses(draw(0)[0], labels)
