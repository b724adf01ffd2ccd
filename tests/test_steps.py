"""Laws of the training and evaluation step, on one device and on eight, of the schedule and the optimizer."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, traverse_util
from hypothesis import given
from hypothesis import strategies as st
from optax import tree_utils
from test_beam_search import CHEAP

from repro.errors import InputError
from repro.training import sharding, steps
from repro.training.losses import row_losses

VOCABULARY, LENGTH, SIDE = 13, 6, 4
REDUCTIONS = ("replica_means", "tokens")
compile_fast = partial(jax.jit, compiler_options=CHEAP)


def encode(params, pixels):
    """A captioner of one layer: an image is its mean color's part of the features."""
    return (jnp.asarray(pixels) / 255.0).mean(axis=(1, 2)) @ params["color"]


def decode(params, memory, decoder_input_ids, decoder_attention_mask, drop=lambda features: features):
    """The token's embedding plus the image, dropped out, times a matrix."""
    return drop(params["embedding"][decoder_input_ids] + memory[:, None, :]) @ params["kernel"]


def make_logits(dropout, told):
    """The captioner in training; `told` is told each dropout key."""

    def logits(params, pixels, *captions, dropout_key):
        def drop(features):
            kept = jax.random.bernoulli(dropout_key, 1 - dropout, features.shape)
            return jnp.where(kept, features / (1 - dropout), 0.0)

        if told:
            jax.debug.callback(told, dropout_key)
        return decode(params, encode(params, pixels), *captions, drop)

    return logits


def make_params():
    random = np.random.default_rng(0)
    shapes = {"color": (3, 8), "embedding": (VOCABULARY, 8), "kernel": (8, VOCABULARY)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_batch(seed, *leading):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, LENGTH + 1, leading)
    return {
        "pixels": random.integers(0, 256, (*leading, SIDE, SIDE, 3), dtype=np.uint8),
        "labels": random.integers(0, VOCABULARY, (*leading, LENGTH), dtype=np.int32),
        "decoder_input_ids": random.integers(0, VOCABULARY, (*leading, LENGTH), dtype=np.int32),
        "decoder_attention_mask": (np.arange(LENGTH) < lengths[..., None]).astype(np.int32),
    }


def make_step(reduction="tokens", *, replicas=2, dropout=0.0, told=None, at_once=None, **adamw):
    """The step, and the state before the first."""
    schedule = steps.create_learning_rate_fn(0.01, num_steps=10)
    optimizer = steps.create_optimizer(schedule, rule="layer_norms", **adamw)
    how = {"reduction": reduction, "label_smoothing": 0.1, "replicas_at_once": at_once}
    step = steps.make_train_step(make_logits(dropout, told), optimizer, schedule, **how)
    return step, steps.create_train_state(make_params(), optimizer, seed=3, num_replicas=replicas)


def losses_of(params, batch, smoothing=0.1):
    """The rows' loss (sums, counts) of the captioner without dropout, [2,4] each."""
    rows = {name: array.reshape(8, *array.shape[2:]) for name, array in batch.items()}
    labels, inputs, mask = (rows[name] for name in ("labels", "decoder_input_ids", "decoder_attention_mask"))
    logits = decode(params, encode(params, rows["pixels"]), inputs, mask)
    return np.reshape(row_losses(logits, labels, mask, label_smoothing=smoothing), (2, 2, 4))


def run_on(devices, step, state, batch, at_once=None):
    """Take a compiled step where the mesh of these devices puts state and batch."""
    replicas, rows = batch["labels"].shape[:2]
    mesh = sharding.create_mesh(devices, num_replicas=replicas, replica_batch=rows)
    assert mesh.size == len(devices)
    placed = sharding.train_batch_sharding(mesh, num_replicas=replicas, replicas_at_once=at_once)
    state, batch = sharding.put(state, sharding.replicated(mesh)), sharding.put(batch, placed)
    return jax.device_get(compile_fast(step)(state, batch))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_step_is_the_same_with_and_without_jit(reduction):
    step, state = make_step(reduction, dropout=0.2)
    batch = make_batch(0, 2, 4)
    chex.assert_trees_all_close(compile_fast(step)(state, batch), step(state, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("replicas", "rows"), [(8, 2), (2, 8)], ids=["by-replica", "by-row"])
def test_step_is_the_same_on_one_and_on_eight_devices(reduction, replicas, rows):
    step, state = make_step(reduction, replicas=replicas, dropout=0.2)
    one, eight = (run_on(jax.devices()[:n], step, state, make_batch(0, replicas, rows)) for n in (1, 8))
    chex.assert_trees_all_close(one, eight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("num_devices", [1, 2])
def test_replicas_in_turns_give_the_loss_and_update_of_all_at_once(reduction, num_devices):
    found = []
    for at_once in (None, 2, 1):
        step, state = make_step(reduction, replicas=4, dropout=0.2, at_once=at_once)
        found.append(run_on(jax.devices()[:num_devices], step, state, make_batch(0, 4, 2), at_once))
    for turns in found[1:]:
        chex.assert_trees_all_close(turns, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_rate_and_step_are_those_of_the_batch_before_the_update_and_steps_are_compiled_once(reduction):
    step, state = make_step(reduction)
    chex.clear_trace_counter()
    step = compile_fast(chex.assert_max_traces(step, n=1))
    for taken in range(3):
        batch = make_batch(taken, 2, 4)
        sums, counts = losses_of(jax.device_get(state.params), batch).sum(axis=2)
        assert counts[0] != counts[1], "the reductions differ"
        assert int(state.step) == taken
        state, metrics = step(state, batch)
        expected = {"replica_means": np.mean(sums / counts), "tokens": sums.sum() / counts.sum()}
        np.testing.assert_allclose(metrics["loss"], expected[reduction], rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"], 0.01 * (1 - taken / 10), rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 8]))
def test_replica_means_weigh_replicas_alike_and_tokens_weigh_tokens_alike(seed, replicas):
    random = np.random.default_rng(seed)
    counts = random.integers(1, 50, replicas).astype(np.float32)
    sums = counts * random.random(replicas, np.float32)
    means, tokens = (sums @ steps.replica_weights(counts, reduction) for reduction in REDUCTIONS)
    np.testing.assert_allclose(means, np.mean(sums / counts), rtol=1e-5)
    np.testing.assert_allclose(tokens, np.sum(sums) / np.sum(counts), rtol=1e-5)


def test_under_tokens_replicas_without_dropout_are_one_plain_batch():
    batch = make_batch(0, 4, 2)
    plain = {name: array.reshape(1, 8, *array.shape[2:]) for name, array in batch.items()}
    results = []
    for shared in (batch, plain):
        step, state = make_step(replicas=len(shared["labels"]))
        results.append(compile_fast(step)(state, shared)[0].params)
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_dropout_keys_are_those_of_the_example_and_differ_by_replica_and_step():
    used = []
    step, state = make_step(told=lambda key: used.append(tuple(key.tolist())))
    _, dropout_rng = jax.random.split(jax.random.PRNGKey(3))
    keys = jax.random.split(dropout_rng, 2)
    for taken in range(2):
        np.testing.assert_array_equal(state.dropout_keys, keys)
        state, _ = jax.block_until_ready(step(state, make_batch(taken, 2, 4)))
        jax.effects_barrier()
        assert set(used[2 * taken :]) == {tuple(jax.random.split(key)[0].tolist()) for key in keys}
        keys = [jax.random.split(key)[1] for key in keys]
    assert len(set(used)) == len(used) == 4


def test_a_step_changes_none_of_its_arguments():
    step, state = make_step(dropout=0.2)
    batch = make_batch(0, 2, 4)
    before = jax.tree.map(np.array, (state, batch))
    step(state, batch)
    chex.assert_trees_all_equal(jax.device_get((state, batch)), before)


def test_the_gradient_s_norm_is_told_before_it_is_clipped():
    norms, moved = [], []
    for most in (None, 0.01):
        step, state = make_step(max_grad_norm=most)
        following, metrics = step(state, make_batch(0, 2, 4))
        norms.append(float(metrics["grad_norm"]))
        moved.append(float(optax.tree.norm(tree_utils.tree_get(following.opt_state, "mu"))) / (1 - 0.9))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert moved == pytest.approx([norms[0], 0.01], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("pixels", lambda pixels: pixels.astype(np.float32), id="float"),
        pytest.param("pixels", lambda pixels: np.moveaxis(pixels, -1, -3), id="channels-first"),
        pytest.param("pixels", lambda pixels: pixels[:, :-1], id="fewer"),
        pytest.param("labels", lambda labels: labels.astype(np.int64), id="int64"),
        pytest.param("labels", lambda labels: labels[..., :-1], id="short"),
        pytest.param("decoder_attention_mask", lambda mask: mask.astype(bool), id="bool"),
    ],
)
def test_a_batch_of_another_shape_or_type_is_refused_at_the_door(name, change):
    step, state = make_step()
    batch = make_batch(0, 2, 4)
    with pytest.raises(AssertionError):
        step(state, batch | {name: change(batch[name])})


def test_a_batch_of_other_leading_axes_is_refused_at_the_door():
    step, state = make_step()
    for leading in ((4,), (3, 4)):  # no replicas, and another number than there are keys
        with pytest.raises(AssertionError):
            step(state, make_batch(0, *leading))
    with pytest.raises(AssertionError):
        steps.make_eval_step(decode)(make_params(), np.zeros((2, 8), np.float32), make_batch(0, 2, 4))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_eval_step_sums_each_row_and_counts_its_tokens(smoothing):
    params, batch = make_params(), make_batch(0, 2, 4)
    rows = {name: array.reshape(8, *array.shape[2:]) for name, array in batch.items()}
    eval_step = steps.make_eval_step(decode, label_smoothing=smoothing)
    for step in (eval_step, compile_fast(eval_step)):
        found = step(params, encode(params, rows["pixels"]), rows)
        np.testing.assert_allclose(found, losses_of(params, batch, smoothing).reshape(2, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [8, 12])
def test_eval_step_is_the_same_on_one_and_on_eight_devices(num_rows):
    params, batch = make_params(), make_batch(0, num_rows)
    mesh = sharding.create_mesh(jax.devices(), num_replicas=8, replica_batch=1)
    memory, step = encode(params, batch["pixels"]), compile_fast(steps.make_eval_step(decode))
    seen = sharding.put(jax.device_get((memory, batch)), sharding.rows_sharding(mesh, num_rows=num_rows))
    spread, alone = step(sharding.put(params, sharding.replicated(mesh)), *seen), step(params, memory, batch)
    chex.assert_trees_all_close(jax.device_get(spread), jax.device_get(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("replicas", "rows", "used", "axis"),
    [(8, 1, 8, 0), (16, 3, 8, 0), (1, 32, 8, 1), (2, 32, 8, 1), (3, 5, 5, 1), (6, 7, 7, 1), (6, 1, 6, 0), (1, 1, 1, 0)],
)
def test_mesh_has_as_many_devices_as_divide_the_replicas_or_their_rows(replicas, rows, used, axis):
    mesh = sharding.create_mesh(jax.devices(), num_replicas=replicas, replica_batch=rows)
    assert mesh.size == used
    shape = [replicas, rows]
    shape[axis] //= used
    placed = sharding.train_batch_sharding(mesh, num_replicas=replicas)
    assert placed.shard_shape((replicas, rows)) == tuple(shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 16}, "needs 16 devices; there are 8"),
        ({"data": 3}, "its 3 devices divide neither the 8 replicas nor the 4 rows of each"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(InputError, match=message):
        sharding.create_mesh(jax.devices(), num_replicas=8, replica_batch=4, shape=shape)


def test_gradients_of_gathered_parameters_are_cut_as_these_are():
    mesh = sharding.create_mesh(jax.devices(), num_replicas=8, replica_batch=1, shape={"data": 2, "fsdp": 4})
    params = {"kernel": np.ones((64, 32), np.float32), "bias": np.ones(3, np.float32)}
    places, gather = sharding.state_sharding(mesh, params), sharding.gather_on(mesh)
    squares = lambda params: sum((leaf**2).sum() for leaf in jax.tree.leaves(gather(params)))  # noqa: E731
    gradients = jax.jit(jax.grad(squares))(sharding.put(params, places))
    chex.assert_trees_all_close(gradients, {name: 2 * leaf for name, leaf in params.items()})
    assert all(gradients[name].sharding.is_equivalent_to(places[name], params[name].ndim) for name in params)
    assert gradients["kernel"].addressable_shards[0].data.shape == (16, 32)


PEAK = 3e-5
# By rule, what is spared.
RULES = {"2022": ("bias",), "layer_norms": ("bias", "scale")}


@pytest.fixture(scope="module")
def params(golden_inputs):
    """The golden model's own parameter tree."""
    return serialization.msgpack_restore((golden_inputs / "model" / "flax_model.msgpack").read_bytes())


def test_learning_rates_are_those_of_the_published_run():
    schedule = steps.create_learning_rate_fn(PEAK, num_steps=2307)
    assert float(schedule(0)) == pytest.approx(3e-5, rel=1e-6)
    assert float(schedule(1999)) == pytest.approx(3e-5 * (1 - 1999 / 2307), rel=1e-5)
    # The rate at the evaluation after step 2000 is that of the state: the one step 2001 would use.
    assert f"{float(schedule(2000)):.2e}" == "3.99e-06"


@given(st.integers(1, 5000), st.data())
def test_without_warm_up_step_s_has_the_peak_times_one_minus_s_minus_1_over_the_steps_and_then_nothing(num_steps, data):
    step = data.draw(st.integers(1, num_steps + 1000))
    schedule = steps.create_learning_rate_fn(PEAK, num_steps=num_steps)
    expected = PEAK * max(0, 1 - (step - 1) / num_steps)
    assert float(schedule(step - 1)) == pytest.approx(expected, rel=1e-3, abs=1e-11)


def test_warm_up_rises_to_the_peak_and_then_the_rate_falls_to_zero_with_and_without_jit():
    schedule, counts = steps.create_learning_rate_fn(PEAK, num_steps=10, warmup_steps=4), np.array([*range(12), 99])
    expected = PEAK * np.minimum(counts / 4, np.maximum(10 - counts, 0) / 6)
    for found in ([schedule(count) for count in counts], jax.jit(jax.vmap(schedule))(counts)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * PEAK)


@pytest.mark.parametrize("rule", RULES)
def test_all_decay_but_biases_and_under_layer_norms_their_scales(params, rule):
    mask = traverse_util.flatten_dict(steps.decay_mask(params, rule))
    names = {path[-1] for path in mask}
    assert names == {"bias", "cls_token", "embedding", "kernel", "position_embeddings", "scale"}
    assert mask == {path: path[-1] not in RULES[rule] for path in traverse_util.flatten_dict(params)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["self_attn_layer_norm", "layernorm_embedding", "final_layer_norm"])
def test_scales_of_barts_layer_norms_never_decay(rule, name):
    assert steps.decay_mask({name: {"scale": np.ones(1)}}, rule) == {name: {"scale": False}}


@pytest.mark.parametrize("rule", RULES)
def test_without_gradients_exactly_the_decaying_parameters_shrink(params, rule):
    optimizer = steps.create_optimizer(optax.constant_schedule(0.5), rule=rule, weight_decay=0.1)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    expected = jax.tree.map(lambda decays, leaf: -0.5 * 0.1 * decays * leaf, steps.decay_mask(params, rule), params)
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-6), updates, expected)


def test_first_step_moves_by_the_rate_against_the_gradients_sign():
    # Adam's first step: m / (1 - b1) = g and v / (1 - b2) = g^2, so g / (|g| + epsilon).
    optimizer = steps.create_optimizer(optax.constant_schedule(0.01), rule="2022", epsilon=0.5)
    weights, gradients = {"kernel": np.ones(3, np.float32)}, {"kernel": np.asarray([2.0, -0.5, 0.0], np.float32)}
    updates, _ = optimizer.update(gradients, optimizer.init(weights), weights)
    np.testing.assert_allclose(updates["kernel"], [-0.01 * 2 / 2.5, 0.01 * 0.5 / 1.0, 0.0], rtol=1e-5)
