"""Order, blocks and batches; joining rows with images; the background thread."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import new_folder
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from repro.data.batches import RowOrder, epoch_order, prefetch, prepare_split
from repro.data.captions import caption_lengths
from repro.data.image_cache import ImageStore
from repro.errors import InputError
from repro.run.build import Training
from repro.run.settings import Settings
from repro.training.sharding import create_mesh, train_batch_sharding

small = st.integers(1, 4)


@given(st.integers(1, 60), small, small, st.integers(0, 2), st.booleans())
def test_every_row_comes_once_an_epoch_but_for_the_incomplete_batch_however_replicas_share_them(
    num_rows, num_replicas, replica_batch, epoch, shuffle
):
    batch = num_replicas * replica_batch
    order = RowOrder(seed=3, num_epochs=3, shuffle=shuffle, num_replicas=num_replicas, replica_batch=replica_batch)
    cut = order.epoch_rows(epoch, num_rows)
    assert cut.shape == (num_rows // batch, num_replicas, replica_batch)
    assert order.steps_per_epoch(num_rows) == num_rows // batch
    every = epoch_order(3, epoch, num_rows) if shuffle else np.arange(num_rows)
    assert sorted(every.tolist()) == list(range(num_rows))
    assert cut.reshape(-1).tolist() == every[: cut.size].tolist()
    alone = dataclasses.replace(order, num_replicas=1, replica_batch=batch)
    np.testing.assert_array_equal(cut.reshape(-1, 1, batch), alone.epoch_rows(epoch, num_rows))


@pytest.mark.parametrize("partitionable", [True, False])
def test_the_order_follows_the_documented_chain_of_keys(partitionable):
    with jax.threefry_partitionable(partitionable):
        rng, _dropout = jax.random.split(jax.random.PRNGKey(42))
        orders = []
        for epoch in range(3):
            rng, input_rng = jax.random.split(rng)
            orders.append(epoch_order(42, epoch, 50).tolist())
            assert orders[-1] == jax.random.permutation(input_rng, 50).tolist()
    assert orders[0] != orders[1] != orders[2]


class Numbers(list):
    """Rows whose batches hold their numbers."""

    def batch(self, rows):
        return {"rows": rows}


@pytest.mark.parametrize("taken", [0, 3])
def test_the_loop_takes_every_whole_batch_of_every_epoch_in_order(taken):
    order = RowOrder(seed=5, num_epochs=3, shuffle=True, num_replicas=2, replica_batch=2)
    mesh = create_mesh(jax.devices()[:1], num_replicas=2, replica_batch=2)
    run = SimpleNamespace(splits={"train": Numbers(range(11))})
    training = Training(run, None, None, None, order, train_batch_sharding(mesh, num_replicas=2), {})
    steps, batches, _ = zip(*training.batches(taken), strict=True)
    # After steps that were taken already, the last of these comes first, without a batch.
    assert steps == tuple(range(max(taken, 1), 7))
    expected = np.concatenate([order.epoch_rows(epoch, 11) for epoch in range(3)])[taken:]
    np.testing.assert_array_equal([batch["rows"] for batch in batches if batch], expected)


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ({"train": 100}, {"block_size": 12}, "--block_size 12: must be 0 or a multiple of the global train batch of 8"),
        ({"train": 100}, {"block_size": 24}, "--block_size 24: must be 0 or a multiple of the global eval batch of 16"),
        ({"train": 100}, {"block_size": -8}, "--block_size -8: must be at least 0"),
        ({"train": 7}, {"block_size": 0}, "train batch of 8 rows is larger than the data: 7 rows"),
        ({"validation": 15}, {"protocol": "current"}, "validation: 15 rows .* batch of 16.*--per_device_eval_batch"),
        ({"validation": 15}, {"protocol": "published"}, "validation: 15 rows .* batch of 16.*--per_device_eval_batch"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(rows, flags, words):
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "num_replicas": 2, "block_size": 32}
    settings = Settings(model_name_or_path="unused", do_train=True, do_eval=True, **sizes)
    settings.with_rows({"train": 8, "validation": 15})  # whose incomplete batch is evaluated under `exact`
    dataclasses.replace(settings, protocol="published").with_rows({"train": 8, "validation": 16})
    with pytest.raises(InputError, match=words):
        dataclasses.replace(settings, **flags).with_rows(rows)


CAPTIONS = ["one", "two", "three", "four"]


def make_split(tokenizer, failures, max_length=6):
    """Four rows of three images, two of them of the first; the split and what was dropped, and the store."""
    paths = ["a.jpg", "b.jpg", "a.jpg", "c.jpg"]
    rows = {"row": [0, 1, 2, 5], "image_path": paths, "image_id": paths, "caption": CAPTIONS}
    store = ImageStore(np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3), failures, set())
    places = {"a.jpg": 0, "b.jpg": 1, "c.jpg": 2}
    settings = {"max_length": max_length, "decoder_start_token_id": 0, "split": "train", "tokens_dir": new_folder()}
    return prepare_split(Dataset.from_dict(rows), tokenizer, places, store, **settings), store


def test_rows_share_their_image_and_lose_it_together(tokenizer):
    (split, dropped), store = make_split(tokenizer, {"b.jpg": "no such file"})
    every = np.arange(3)
    assert split.read(every) == ["a.jpg", "a.jpg", "c.jpg"]
    labels = split.tokens(every)["labels"]
    texts = tokenizer.batch_decode(labels, skip_special_tokens=True)
    assert [text.strip() for text in texts] == ["one", "three", "four"]
    assert [(row["row"], row["image_path"], row["reason"]) for row in dropped] == [(1, "b.jpg", "no such file")]
    batch = split.batch(np.array([2, 0]))
    np.testing.assert_array_equal(batch["pixels"], store.images[[2, 0]])
    np.testing.assert_array_equal(batch["labels"], labels[[2, 0]])
    assert split.have_captions(every).all()


def test_captions_that_are_cut_are_counted_among_the_rows_that_are_kept(tokenizer):
    lengths = caption_lengths(CAPTIONS, tokenizer).tolist()
    for failures, kept in (({}, lengths), ({"b.jpg": "gone"}, [lengths[0], *lengths[2:]])):
        for max_length in range(2, max(lengths) + 2):
            (split, _), _ = make_split(tokenizer, failures, max_length)
            assert split.num_cut == sum(length > max_length for length in kept), max_length


def test_a_fingerprint_tells_tokens_shared_images_and_pixels_but_not_where_images_lie(tokenizer):
    (split, _), _ = make_split(tokenizer, {})
    pixels = split.images[np.arange(max(split.image_index) + 1)]
    shifted = np.concatenate([np.zeros_like(pixels), pixels])
    moved = dataclasses.replace(split, image_index=split.image_index + len(pixels), images=shifted)
    assert moved.fingerprint() == split.fingerprint()
    others = (
        {"images": pixels + np.uint8(1)},
        {"image_index": np.arange(4), "images": np.resize(pixels, (4, *pixels.shape[1:]))},
        {"kept": split.kept[:3], "image_index": split.image_index[:3]},
        {"kept": split.kept[::-1]},
    )
    found = {dataclasses.replace(split, **other).fingerprint() for other in ({}, *others)}
    assert len(found) == 5


def test_no_row_left_is_an_error(tokenizer):
    with pytest.raises(InputError, match=r"no row is left of 4.*a\.jpg: gone"):
        make_split(tokenizer, dict.fromkeys(["a.jpg", "b.jpg", "c.jpg"], "gone"))


@given(st.lists(st.none() | st.integers(), max_size=20))
def test_prefetch_keeps_every_item_in_order(items):
    assert list(prefetch(iter(items))) == items


def test_prefetch_raises_where_the_items_are_used():
    def produce():
        yield 1
        raise OSError("the disk is gone")

    items = prefetch(produce())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_prefetch_is_bounded_and_ends_with_its_consumer():
    made = []
    before = threading.active_count()
    items = prefetch(made.append(n) or n for n in range(1000))
    assert next(items) == 0
    time.sleep(0.2)
    assert len(made) <= 4  # one used, two waiting, one in the hand
    items.close()
    assert threading.active_count() == before
