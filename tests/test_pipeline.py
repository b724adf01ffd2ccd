"""Order, blocks and batches; joining rows with images; the background thread."""

from __future__ import annotations

import dataclasses
import threading
import time

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
from repro.run.settings import Settings


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_every_row_comes_once_an_epoch_but_for_the_incomplete_batch(
    num_rows: int, num_replicas: int, replica_batch: int, epoch: int, shuffle: bool
) -> None:
    row_order = RowOrder(seed=3, num_epochs=3, shuffle=shuffle, num_replicas=num_replicas, replica_batch=replica_batch)
    cut = row_order.epoch_rows(epoch, num_rows)
    rows = cut.reshape(-1).tolist()
    assert cut.shape == (row_order.steps_per_epoch(num_rows), num_replicas, replica_batch)
    assert len(rows) == num_rows // row_order.global_batch * row_order.global_batch
    if shuffle:
        assert rows == epoch_order(3, epoch, num_rows)[: len(rows)].tolist()
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(num_rows))
    if not shuffle:
        assert rows == sorted(rows)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.sampled_from([1, 24, 50]), st.booleans())
def test_a_steps_rows_do_not_depend_on_how_replicas_share_them(
    num_replicas: int, replica_batch: int, epoch: int, num_rows: int, shuffle: bool
) -> None:
    batch = num_replicas * replica_batch
    shared = RowOrder(seed=5, num_epochs=3, shuffle=shuffle, num_replicas=num_replicas, replica_batch=replica_batch)
    alone = RowOrder(seed=5, num_epochs=3, shuffle=shuffle, num_replicas=1, replica_batch=batch)
    rows = shared.epoch_rows(epoch, num_rows).reshape(-1, 1, batch)
    np.testing.assert_array_equal(rows, alone.epoch_rows(epoch, num_rows))


@pytest.mark.parametrize("partitionable", [True, False])
def test_the_order_follows_the_documented_chain_of_keys(partitionable: bool) -> None:
    with jax.threefry_partitionable(partitionable):
        rng, _dropout = jax.random.split(jax.random.PRNGKey(42))
        for epoch in range(3):
            rng, input_rng = jax.random.split(rng)
            expected = jax.random.permutation(input_rng, 50)
            assert epoch_order(42, epoch, 50).tolist() == expected.tolist()


def test_epochs_and_streams_have_orders_of_their_own() -> None:
    orders = [epoch_order(42, epoch, 50).tolist() for epoch in (0, 1)]
    with jax.threefry_partitionable(False):
        orders.append(epoch_order(42, 0, 50).tolist())
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize(
    ("num_rows", "block_size", "words"),
    [
        (100, 12, "--block_size 12: must be 0 or a multiple of the global train batch of 8"),
        (100, 24, "--block_size 24: must be 0 or a multiple of the global eval batch of 16"),
        (100, -8, "--block_size -8: must be at least 0"),
        (7, 0, "train batch of 8 rows is larger than the data: 7 rows"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(num_rows: int, block_size: int, words: str) -> None:
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "num_replicas": 2}
    settings = Settings(model_name_or_path="unused", do_train=True, block_size=32, **sizes).with_rows({"train": 8})
    with pytest.raises(InputError, match=words):
        dataclasses.replace(settings, block_size=block_size).with_rows({"train": num_rows})


def make_split(tokenizer, failures: dict[str, str], max_length: int = 6):
    paths = ["a.jpg", "b.jpg", "a.jpg", "c.jpg"]
    dataset = Dataset.from_dict(
        {"row": [0, 1, 2, 5], "image_path": paths, "image_id": paths, "caption": ["one", "two", "three", "four"]}
    )
    store = ImageStore(np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3), failures, set())
    places = {"a.jpg": 0, "b.jpg": 1, "c.jpg": 2}
    settings = {"max_length": max_length, "decoder_start_token_id": 0, "split": "train", "tokens_dir": new_folder()}
    return prepare_split(dataset, tokenizer, places, store, **settings), store


def test_rows_share_their_image_and_lose_it_together(tokenizer) -> None:
    (split, dropped), store = make_split(tokenizer, {"b.jpg": "no such file"})
    every = np.arange(3)
    assert split.read(every) == ["a.jpg", "a.jpg", "c.jpg"]
    labels = split.tokens(every)["labels"]
    assert [text.strip() for text in tokenizer.batch_decode(labels, skip_special_tokens=True)] == [
        "one",
        "three",
        "four",
    ]
    assert [(row["row"], row["image_path"], row["reason"]) for row in dropped] == [(1, "b.jpg", "no such file")]
    batch = split.batch(np.array([2, 0]))
    np.testing.assert_array_equal(batch["pixels"], store.images[[2, 0]])
    np.testing.assert_array_equal(batch["labels"], labels[[2, 0]])
    assert split.have_captions(every).all()


def test_captions_that_are_cut_are_counted_among_the_rows_that_are_kept(tokenizer) -> None:
    lengths = caption_lengths(["one", "two", "three", "four"], tokenizer).tolist()
    for failures, kept in (({}, lengths), ({"b.jpg": "gone"}, [lengths[0], *lengths[2:]])):
        for max_length in range(2, max(lengths) + 2):
            split = make_split(tokenizer, failures, max_length)[0][0]
            assert split.num_cut == sum(length > max_length for length in kept), max_length


def test_a_fingerprint_tells_tokens_shared_images_and_pixels_but_not_where_images_lie(tokenizer) -> None:
    split = make_split(tokenizer, {})[0][0]
    pixels = split.images[np.arange(max(split.image_index) + 1)]
    shifted = np.concatenate([np.zeros_like(pixels), pixels])
    moved = dataclasses.replace(split, image_index=split.image_index + len(pixels), images=shifted)
    assert moved.fingerprint() == split.fingerprint()
    other = dataclasses.replace(split, images=pixels + np.uint8(1))
    assert other.fingerprint() != split.fingerprint()
    alone = dataclasses.replace(split, image_index=np.arange(4), images=np.resize(pixels, (4, *pixels.shape[1:])))
    fewer = dataclasses.replace(split, kept=split.kept[:3], image_index=split.image_index[:3])
    start = dataclasses.replace(split, kept=split.kept[::-1])
    assert len({each.fingerprint() for each in (split, alone, fewer, start)}) == 4


def test_no_row_left_is_an_error(tokenizer) -> None:
    with pytest.raises(InputError, match=r"no row is left of 4.*a\.jpg: gone"):
        make_split(tokenizer, dict.fromkeys(["a.jpg", "b.jpg", "c.jpg"], "gone"))


@given(st.lists(st.none() | st.integers(), max_size=20))
def test_prefetch_keeps_every_item_in_order(items: list[int | None]) -> None:
    assert list(prefetch(iter(items))) == items


def test_prefetch_raises_where_the_items_are_used() -> None:
    def produce():
        yield 1
        raise OSError("the disk is gone")

    items = prefetch(produce())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_prefetch_is_bounded_and_ends_with_its_consumer() -> None:
    made: list[int] = []
    before = threading.active_count()
    items = prefetch(made.append(n) or n for n in range(1000))
    assert next(items) == 0
    time.sleep(0.2)
    assert len(made) <= 4  # one used, two waiting, one in the hand
    items.close()
    assert threading.active_count() == before
