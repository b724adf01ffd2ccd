"""Laws of the training and evaluation step, on one device and on eight, and of the loop that takes them."""

from __future__ import annotations

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from repro.data.batches import CaptionedImages, RowOrder, epoch_order
from repro.data.captions import pack_tokens
from repro.errors import InputError
from repro.models.pretrained import load_model
from repro.run.build import Training
from repro.training.memory import choices, compile_what_fits, device_bytes, step_bytes
from repro.training.sharding import (
    create_mesh,
    gather_on,
    put,
    replicated,
    rows_sharding,
    state_sharding,
    train_batch_sharding,
)
from repro.training.steps import (
    check_batch,
    create_learning_rate_fn,
    create_optimizer,
    create_train_state,
    make_eval_step,
    make_train_step,
    replica_weights,
)

VOCABULARY, LENGTH, SIDE = 13, 6, 4
REDUCTIONS = ("replica_means", "tokens")


def make_logits(dropout: float = 0.0):
    """A captioner of one layer: the token's embedding plus the image's mean color, dropped out, times a matrix."""

    def logits(params, pixels, decoder_input_ids, decoder_attention_mask, *, dropout_key=None):
        color = (pixels / 255.0).mean(axis=(1, 2)) @ params["color"]
        features = params["embedding"][decoder_input_ids] + color[:, None, :]
        if dropout_key is not None and dropout:
            kept = jax.random.bernoulli(dropout_key, 1 - dropout, features.shape)
            features = jnp.where(kept, features / (1 - dropout), 0.0)
        return features @ params["kernel"]

    return logits


def decode(params, memory, decoder_input_ids, decoder_attention_mask):
    """The same captioner where the image has been seen: the memory is its mean color's part of the features."""
    return (params["embedding"][decoder_input_ids] + memory[:, None, :]) @ params["kernel"]


def encode(params, pixels):
    return (pixels / 255.0).mean(axis=(1, 2)).astype(np.float32) @ params["color"]


def make_params():
    random = np.random.default_rng(0)
    shapes = {"color": (3, 8), "embedding": (VOCABULARY, 8), "kernel": (8, VOCABULARY)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_batch(seed: int, *leading: int, side: int = SIDE, vocabulary: int = VOCABULARY) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, LENGTH + 1, leading)
    return {
        "pixels": random.integers(0, 256, (*leading, side, side, 3), dtype=np.uint8),
        "labels": random.integers(0, vocabulary, (*leading, LENGTH), dtype=np.int32),
        "decoder_input_ids": random.integers(0, vocabulary, (*leading, LENGTH), dtype=np.int32),
        "decoder_attention_mask": (np.arange(LENGTH) < lengths[..., None]).astype(np.int32),
    }


def make_step(reduction="tokens", *, dropout=0.0, learning_rate=0.01, weight_decay=0.0, logits=None, smoothing=0.1):
    """The step and its optimizer, over ten steps."""
    schedule = create_learning_rate_fn(learning_rate, num_steps=10)
    optimizer = create_optimizer(schedule, rule="layer_norms", weight_decay=weight_decay)
    logits = logits or make_logits(dropout)
    step = make_train_step(logits, optimizer, schedule, reduction=reduction, label_smoothing=smoothing)
    return step, optimizer


def numpy_losses(params, batch, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows' loss (sums, counts) of the captioner without dropout, in float64."""
    color = (batch["pixels"] / 255.0).mean(axis=(-3, -2)) @ params["color"].astype(np.float64)
    logits = (params["embedding"][batch["decoder_input_ids"]] + color[..., None, :]) @ params["kernel"]
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    low = smoothing / (VOCABULARY - 1)
    targets = np.where(np.arange(VOCABULARY) == batch["labels"][..., None], 1 - smoothing, low)
    tokens = (targets * (np.log(targets) - log_probs)).sum(axis=-1)
    mask = batch["decoder_attention_mask"]
    return (tokens * mask).sum(axis=-1), mask.sum(axis=-1)


def compile_fast(function):
    """Compile without costly optimizations: each step here runs but once or a few times."""
    return jax.jit(
        function, compiler_options={"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
    )


def run_on(devices, step, state, batch):
    """Take a compiled step where the mesh of these devices puts state and batch."""
    replicas, rows = batch["labels"].shape[:2]
    mesh = create_mesh(devices, num_replicas=replicas, replica_batch=rows)
    placed = put(batch, train_batch_sharding(mesh, num_replicas=replicas))
    return mesh, compile_fast(step)(put(state, replicated(mesh)), placed)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_step_is_the_same_with_and_without_jit(reduction):
    step, optimizer = make_step(reduction, dropout=0.2)
    state, batch = create_train_state(make_params(), optimizer, seed=3, num_replicas=2), make_batch(0, 2, 4)
    chex.assert_trees_all_close(compile_fast(step)(state, batch), step(state, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("replicas", "rows"), [(8, 2), (2, 8)], ids=["by-replica", "by-row"])
def test_step_is_the_same_on_one_and_on_eight_devices(reduction, replicas, rows):
    step, optimizer = make_step(reduction, dropout=0.2)
    state = create_train_state(make_params(), optimizer, seed=3, num_replicas=replicas)
    batch = make_batch(0, replicas, rows)
    _, one = run_on(jax.devices()[:1], step, state, batch)
    mesh, eight = run_on(jax.devices(), step, state, batch)
    assert mesh.size == 8
    chex.assert_trees_all_close(jax.device_get(one), jax.device_get(eight), rtol=1e-6, atol=1e-6)


def test_steps_are_compiled_once():
    step, optimizer = make_step(dropout=0.2)
    compiled = compile_fast(chex.assert_max_traces(step, n=1))
    state = create_train_state(make_params(), optimizer, seed=3, num_replicas=2)
    for seed in range(4):
        state, _ = compiled(state, make_batch(seed, 2, 4))
    assert int(state.step) == 4


def test_loss_learning_rate_and_step_are_those_of_the_batch_before_the_update():
    step, optimizer = make_step()
    state = create_train_state(make_params(), optimizer, seed=3, num_replicas=2)
    for taken in range(3):
        batch = make_batch(taken, 2, 4)
        sums, counts = numpy_losses(jax.device_get(state.params), batch, 0.1)
        assert int(state.step) == taken
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], sums.sum() / counts.sum(), rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"], 0.01 * (1 - taken / 10), rtol=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_replica_means_weigh_replicas_alike_and_tokens_weigh_tokens_alike(seed):
    random = np.random.default_rng(seed)
    counts = random.integers(1, 50, 8).astype(np.float32)
    sums = counts * random.random(8, np.float32)
    means, tokens = (sums @ replica_weights(counts, reduction) for reduction in ("replica_means", "tokens"))
    np.testing.assert_allclose(means, np.mean(sums / counts), rtol=1e-5)
    np.testing.assert_allclose(tokens, np.sum(sums) / np.sum(counts), rtol=1e-5)


def test_the_two_reductions_differ_where_replicas_have_different_numbers_of_tokens():
    batch, params = make_batch(0, 2, 4), make_params()
    batch["decoder_attention_mask"][0, :, 1:] = 0
    sums, counts = (values.sum(axis=1) for values in numpy_losses(params, batch, 0.1))
    assert counts[0] != counts[1]
    expected = {"replica_means": np.mean(sums / counts), "tokens": sums.sum() / counts.sum()}
    losses = {}
    for reduction in REDUCTIONS:
        step, optimizer = make_step(reduction)
        losses[reduction] = float(step(create_train_state(params, optimizer, seed=3, num_replicas=2), batch)[1]["loss"])
    assert losses == pytest.approx(expected, rel=1e-5)
    assert abs(losses["replica_means"] - losses["tokens"]) > 1e-3


def test_under_tokens_replicas_without_dropout_are_one_plain_batch():
    batch = make_batch(0, 4, 2)
    plain = {name: array.reshape(1, 8, *array.shape[2:]) for name, array in batch.items()}
    step, optimizer = make_step("tokens")
    step = compile_fast(step)
    states = [
        step(create_train_state(make_params(), optimizer, seed=3, num_replicas=len(b["labels"])), b)[0]
        for b in (batch, plain)
    ]
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=1e-5, atol=1e-6)


def test_one_replica_is_the_plain_batch_under_both_reductions():
    results = []
    for reduction in REDUCTIONS:
        step, optimizer = make_step(reduction, dropout=0.2)
        results.append(step(create_train_state(make_params(), optimizer, seed=3, num_replicas=1), make_batch(0, 1, 8)))
    chex.assert_trees_all_close(*results, rtol=1e-6, atol=1e-7)


def test_dropout_keys_differ_by_replica_and_advance():
    step, optimizer = make_step(dropout=0.5)
    state = create_train_state(make_params(), optimizer, seed=3, num_replicas=4)
    following, _ = step(state, make_batch(0, 4, 2))
    keys = np.concatenate([state.dropout_keys, following.dropout_keys])
    assert len(np.unique(keys, axis=0)) == 8


def test_dropout_keys_are_those_of_the_example():
    state = create_train_state({}, optax.identity(), seed=3, num_replicas=2)
    _, dropout_rng = jax.random.split(jax.random.PRNGKey(3))
    keys = jax.random.split(dropout_rng, 2)
    np.testing.assert_array_equal(state.dropout_keys, keys)

    used = []

    def logits(params, pixels, decoder_input_ids, decoder_attention_mask, *, dropout_key=None):
        jax.debug.callback(lambda key: used.append(tuple(key.tolist())), dropout_key)
        return make_logits()(params, pixels, decoder_input_ids, decoder_attention_mask)

    step, optimizer = make_step(logits=logits)
    state = create_train_state(make_params(), optimizer, seed=3, num_replicas=2)
    following, _ = jax.block_until_ready(step(state, make_batch(0, 2, 4)))
    jax.effects_barrier()
    assert set(used) == {tuple(jax.random.split(key)[0].tolist()) for key in keys}
    np.testing.assert_array_equal(following.dropout_keys, [jax.random.split(key)[1] for key in keys])


def test_the_same_rows_drop_out_differently_in_another_replica_and_in_the_next_step():
    step, optimizer = make_step("replica_means", dropout=0.5, learning_rate=0.0)
    step = compile_fast(step)
    row = make_batch(0, 1, 2)
    batch = {name: np.concatenate([array, array]) for name, array in row.items()}
    state = create_train_state(make_params(), optimizer, seed=3, num_replicas=2)
    swapped = state.replace(dropout_keys=jnp.tile(state.dropout_keys[:1], (2, 1)))
    following, metrics = step(state, batch)
    assert float(step(swapped, batch)[1]["loss"]) != float(metrics["loss"])
    assert float(step(following, batch)[1]["loss"]) != float(metrics["loss"])


def test_a_step_changes_none_of_its_arguments():
    step, optimizer = make_step(dropout=0.2)
    state, batch = create_train_state(make_params(), optimizer, seed=3, num_replicas=2), make_batch(0, 2, 4)
    before = jax.tree.map(np.array, (state, batch))
    step(state, batch)
    chex.assert_trees_all_equal(jax.device_get((state, batch)), before)


@pytest.mark.parametrize(
    ("learning_rate", "weight_decay", "moves"), [(0.0, 0.0, False), (0.0, 0.1, False), (0.01, 0.0, True)]
)
def test_parameters_move_only_by_the_learning_rate(learning_rate, weight_decay, moves):
    step, optimizer = make_step(learning_rate=learning_rate, weight_decay=weight_decay)
    state = create_train_state(make_params(), optimizer, seed=3, num_replicas=2)
    following, _ = step(state, make_batch(0, 2, 4))
    for name, array in state.params.items():
        assert np.array_equal(following.params[name], array) != moves


BAD_BATCHES = {
    "float-pixels": lambda batch: batch | {"pixels": batch["pixels"].astype(np.float32)},
    "channels-first": lambda batch: batch | {"pixels": np.moveaxis(batch["pixels"], -1, -3)},
    "no-replicas": lambda batch: {name: array[0] for name, array in batch.items()},
    "int64-labels": lambda batch: batch | {"labels": batch["labels"].astype(np.int64)},
    "bool-mask": lambda batch: batch | {"decoder_attention_mask": batch["decoder_attention_mask"].astype(bool)},
    "short-labels": lambda batch: batch | {"labels": batch["labels"][..., :-1]},
    "fewer-pixels": lambda batch: batch | {"pixels": batch["pixels"][:, :-1]},
}


@pytest.mark.parametrize("break_batch", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_batch_of_another_shape_or_type_is_refused_at_the_door(break_batch):
    step, optimizer = make_step()
    state, batch = create_train_state(make_params(), optimizer, seed=3, num_replicas=2), make_batch(0, 2, 4)
    check_batch(batch, leading_axes=2)
    with pytest.raises(AssertionError):
        step(state, break_batch(batch))


def test_a_batch_of_another_number_of_replicas_than_keys_is_refused():
    step, optimizer = make_step()
    with pytest.raises(AssertionError):
        step(create_train_state(make_params(), optimizer, seed=3, num_replicas=3), make_batch(0, 2, 4))


@pytest.mark.parametrize("smoothing", [1e-9, 0.1])
def test_eval_step_sums_each_row_and_counts_its_tokens(smoothing):
    params, batch = make_params(), make_batch(0, 8)
    expected_sums, expected_counts = numpy_losses(params, batch, smoothing)
    eval_step = make_eval_step(decode, label_smoothing=smoothing)
    for step in (eval_step, compile_fast(eval_step)):
        sums, counts = step(params, encode(params, batch["pixels"]), batch)
        np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(counts, expected_counts)


def test_eval_step_refuses_a_training_batch():
    with pytest.raises(AssertionError):
        make_eval_step(decode)(make_params(), np.zeros((2, 8), np.float32), make_batch(0, 2, 4))


@pytest.mark.parametrize("num_rows", [8, 12])
def test_eval_step_is_the_same_on_one_and_on_eight_devices(num_rows):
    params, batch = make_params(), make_batch(0, num_rows)
    mesh = create_mesh(jax.devices(), num_replicas=8, replica_batch=1)
    memory, step = encode(params, batch["pixels"]), compile_fast(make_eval_step(decode))
    spread = step(put(params, replicated(mesh)), *put((memory, batch), rows_sharding(mesh, num_rows=num_rows)))
    alone = step(params, memory, batch)
    chex.assert_trees_all_close(jax.device_get(spread), jax.device_get(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("replicas", "rows", "used", "axis"),
    [(8, 1, 8, 0), (16, 3, 8, 0), (1, 32, 8, 1), (2, 32, 8, 1), (3, 5, 5, 1), (6, 7, 7, 1), (6, 1, 6, 0), (1, 1, 1, 0)],
)
def test_mesh_has_as_many_devices_as_divide_the_replicas_or_their_rows(replicas, rows, used, axis):
    mesh = create_mesh(jax.devices(), num_replicas=replicas, replica_batch=rows)
    assert mesh.size == used
    shards = put(np.zeros((replicas, rows)), train_batch_sharding(mesh, num_replicas=replicas)).addressable_shards
    shape = [replicas, rows]
    shape[axis] //= used
    assert [shard.data.shape for shard in shards] == [tuple(shape)] * used


def test_gradients_of_gathered_parameters_are_cut_as_these_are():
    mesh = create_mesh(jax.devices(), num_replicas=8, replica_batch=1, shape={"data": 2, "fsdp": 4})
    params = {"kernel": np.ones((64, 32), np.float32), "bias": np.ones(3, np.float32)}
    places, gather = state_sharding(mesh, params), gather_on(mesh)
    squares = lambda params: sum((leaf**2).sum() for leaf in jax.tree.leaves(gather(params)))  # noqa: E731
    gradients = jax.jit(jax.grad(squares))(put(params, places))
    chex.assert_trees_all_close(gradients, {name: 2 * leaf for name, leaf in params.items()})
    assert all(gradients[name].sharding.is_equivalent_to(places[name], params[name].ndim) for name in params)
    assert gradients["kernel"].addressable_shards[0].data.shape == (16, 32)


@pytest.fixture(scope="module")
def golden_model(golden_inputs):
    return load_model(str(golden_inputs / "model"))


@pytest.mark.slow
def test_golden_model_trains_the_same_on_one_and_on_eight_devices(golden_model):
    step, optimizer = make_step(logits=golden_model.captioner.logits, learning_rate=1e-3)
    state = create_train_state(golden_model.params, optimizer, seed=3, num_replicas=8)
    batch = make_batch(0, 8, 1, side=32, vocabulary=340)
    _, one = run_on(jax.devices()[:1], step, state, batch)
    mesh, eight = run_on(jax.devices(), step, state, batch)
    assert mesh.size == 8
    np.testing.assert_allclose(one[1]["loss"], eight[1]["loss"], rtol=1e-6)
    # Adam's moments, because its update is a sign where gradients are next to nothing.
    chex.assert_trees_all_close(
        jax.device_get(one[0].opt_state), jax.device_get(eight[0].opt_state), rtol=1e-4, atol=1e-6
    )


def test_golden_models_logits_are_the_same_with_and_without_jit(golden_model):
    batch = make_batch(0, 2, side=32, vocabulary=340)
    eval_step = make_eval_step(golden_model.captioner.decode, label_smoothing=0.1)
    memory = golden_model.captioner.encode(golden_model.params, batch["pixels"])
    eager, compiled = (step(golden_model.params, memory, batch) for step in (eval_step, compile_fast(eval_step)))
    chex.assert_trees_all_close(eager, compiled, rtol=1e-5, atol=1e-5)


def captioned(num_rows: int) -> CaptionedImages:
    """Row n has the label n, and image n // 2 whose bytes are n // 2."""
    numbers = np.arange(num_rows)
    tokens = np.repeat(numbers[:, None], LENGTH, axis=1).astype(np.int32)
    num_images = (num_rows + 1) // 2
    pixels = np.arange(num_images, dtype=np.uint8)[:, None, None, None] * np.ones((SIDE, SIDE, 3), np.uint8)
    return CaptionedImages(
        dataset=Dataset.from_dict({"image_path": [f"{n // 2}.png" for n in numbers]}),
        kept=numbers,
        records=pack_tokens(tokens, np.ones_like(tokens)),
        decoder_start_token_id=0,
        image_index=numbers // 2,
        images=pixels,
    )


def order_of(**settings) -> RowOrder:
    defaults = {"seed": 5, "num_epochs": 1, "shuffle": True, "num_replicas": 2, "replica_batch": 2}
    return RowOrder(**defaults | settings)


def training_of(data: CaptionedImages, row_order: RowOrder, sharding: jax.sharding.NamedSharding) -> Training:
    return Training(SimpleNamespace(splits={"train": data}), None, None, None, row_order, sharding, {})


def test_loop_takes_every_whole_batch_of_every_epoch_in_order():
    data, row_order = captioned(11), order_of(num_epochs=3)
    mesh = create_mesh(jax.devices()[:1], num_replicas=2, replica_batch=2)
    batches = list(training_of(data, row_order, train_batch_sharding(mesh, num_replicas=2)).batches())
    assert [step for step, _, _ in batches] == [1, 2, 3, 4, 5, 6]
    seen = [{name: np.asarray(array) for name, array in batch.items()} for _, batch, _ in batches]
    expected = np.concatenate([epoch_order(5, epoch, 11)[:8].reshape(2, 2, 2) for epoch in range(3)])
    np.testing.assert_array_equal([batch["labels"][..., 0] for batch in seen], expected)
    np.testing.assert_array_equal([batch["pixels"][..., 0, 0, 0] for batch in seen], expected // 2)


def test_training_lowers_the_loss_of_what_it_sees():
    data = captioned(12)
    data.records["labels"] = np.arange(1, LENGTH + 1) % VOCABULARY  # each token follows the one before
    row_order = order_of(num_epochs=10)
    optimizer = create_optimizer(optax.constant_schedule(0.05), rule="layer_norms")
    step = make_train_step(make_logits(), optimizer, optax.constant_schedule(0.05), reduction="tokens")
    mesh = create_mesh(jax.devices(), num_replicas=2, replica_batch=2)
    state = put(create_train_state(make_params(), optimizer, seed=0, num_replicas=2), replicated(mesh))
    sharding = train_batch_sharding(mesh, num_replicas=2)
    step, losses = compile_fast(step), []
    for _, batch, _ in training_of(data, row_order, sharding).batches():
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(losses) == 30
    assert max(losses[-3:]) < 0.2 * min(losses[:3])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("at_once", [4, 2, 1])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_replicas_in_turns_give_the_loss_and_update_of_all_at_once(reduction, at_once, num_devices):
    schedule = create_learning_rate_fn(0.01, num_steps=10)
    optimizer = create_optimizer(schedule, rule="layer_norms")
    batch = make_batch(0, 4, 2)
    results = []
    for number in (None, at_once):
        step = make_train_step(make_logits(0.2), optimizer, schedule, reduction=reduction, replicas_at_once=number)
        state = create_train_state(make_params(), optimizer, seed=3, num_replicas=4)
        mesh = create_mesh(jax.devices()[:num_devices], num_replicas=4, replica_batch=2)
        sharding = train_batch_sharding(mesh, num_replicas=4, replicas_at_once=number)
        results.append(jax.device_get(compile_fast(step)(put(state, replicated(mesh)), put(batch, sharding))))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_the_gradient_s_norm_is_told_before_it_is_clipped():
    batch, norms, moved = make_batch(0, 1, 8), [], []
    for most in (None, 0.01):
        optimizer = create_optimizer(optax.constant_schedule(1.0), rule="layer_norms", max_grad_norm=most)
        step = make_train_step(make_logits(), optimizer, optax.constant_schedule(1.0), reduction="tokens")
        state = create_train_state(make_params(), optimizer, seed=3, num_replicas=1)
        following, metrics = step(state, batch)
        norms.append(float(metrics["grad_norm"]))
        first_moment = following.opt_state[-1][0].mu if most else following.opt_state[0].mu
        moved.append(float(optax.tree.norm(first_moment)) / (1 - 0.9))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert moved == pytest.approx([norms[0], 0.01], rel=1e-4)


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
        create_mesh(jax.devices(), num_replicas=8, replica_batch=4, shape=shape)


def test_as_many_replicas_are_computed_at_once_as_fit():
    class Compiled:
        def __init__(self, number):
            self.number = number

        def memory_analysis(self):
            sizes = {"argument": 10, "output": 10, "temp": 100 * self.number, "alias": 10}
            return SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})

    mesh = create_mesh(jax.devices()[:2], num_replicas=8, replica_batch=3)
    assert choices(mesh, num_replicas=8, replica_batch=3) == [8, 4, 2]
    assert choices(mesh, num_replicas=8, replica_batch=4) == [8, 4, 2, 1]
    fits = {1000: 8, 809: 4, 410: 4, 300: 2, 50: 1}
    assert {
        limit: compile_what_fits(Compiled, [8, 4, 2, 1], limit=limit, bytes_of=step_bytes)[0] for limit in fits
    } == fits
    assert step_bytes(Compiled(3)) == 310
    assert device_bytes(jax.devices()[0]) > 2**27


def test_what_a_compiler_refuses_for_want_of_memory_does_not_fit():
    refused = []

    def compile_program(number):
        refused.append(number)
        if number > 2:
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Used {number}G of 2G hbm.\nand more")
        return number

    assert compile_what_fits(compile_program, [8, 4, 2, 1], limit=10, bytes_of=lambda number: number) == (2, 2)
    assert refused == [8, 4, 2]
    with pytest.raises(
        InputError, match=r"^4 at once: .*--gradient_checkpointing or --mesh fsdp=N.*Used 4G of 2G hbm\.\)\.$"
    ):
        compile_what_fits(compile_program, [8, 4], limit=10, bytes_of=lambda number: number)
    with pytest.raises(ZeroDivisionError):
        compile_what_fits(lambda number: number / 0, [8, 4], limit=10, bytes_of=lambda number: number)
