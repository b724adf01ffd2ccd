"""Evaluation with a fake model in NumPy: what is counted, what is dropped, what is generated; and targets."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

import repro.evaluation.evaluator
import repro.run.build
from repro.data.batches import CaptionedImages
from repro.data.captions import pack_tokens
from repro.evaluation.evaluator import Evaluator, Programs, mean_of_batch_losses
from repro.evaluation.rouge import TYPES, rouge_scores
from repro.models.beam_search import Captions
from repro.protocol import CURRENT, EXACT, PROTOCOLS, PUBLISHED
from repro.run.build import build_evaluator
from repro.run.settings import Settings
from repro.training.memory import SHARE, device_bytes
from repro.training.sharding import create_mesh

LENGTH, SIDE = 5, 2
ROWS_PER_IMAGE = 3


class FakeModel:
    """Loss of a token: its label / 7, times its image's number. Caption: a token more than the byte modulo 4."""

    def __init__(self):
        self.generated, self.encoded, self.losses, self.batch_sizes = [], [], 0, set()

    def encode(self, params, pixels):
        self.batch_sizes.add(len(pixels))
        images = pixels[:, 0, 0, 0].astype(np.int32)
        self.encoded += images.tolist()
        return images

    def row_losses(self, params, images, captions):
        self.batch_sizes.add(len(captions["labels"]))
        self.losses += 1
        mask = captions["decoder_attention_mask"]
        sums = (captions["labels"] / 7 * mask).sum(axis=1) * (1 + images)
        return sums * params, mask.sum(axis=1).astype(np.float32)

    def generate(self, params, images):
        self.generated += images.tolist()
        is_token = np.arange(LENGTH) < (images % 4 + 1)[:, None]
        return np.where(is_token, 40 + images[:, None], 0).astype(np.int32)


def make_data(num_rows, *, captions=True, seed=0, images=None):
    """Rows of images 0 0 0 1 1 1 ..., or of others, whose bytes are their numbers; captions of 1 to 5 tokens."""
    random = np.random.default_rng(seed)
    labels = random.integers(40, 60, (num_rows, LENGTH), dtype=np.int32)
    mask = (np.arange(LENGTH) < random.integers(1, LENGTH + 1, num_rows)[:, None]).astype(np.int32)
    given = np.broadcast_to(captions, num_rows)
    mask *= given[:, None]
    images = np.arange(num_rows) // ROWS_PER_IMAGE if images is None else np.asarray(images)
    rows = {
        "image_path": [f"{image}.png" for image in images],
        "image_id": [str(image) for image in images],
        "caption": [f"caption {row}" if is_given else None for row, is_given in enumerate(given)],
    }
    numbers = np.arange(images.max() + 1, dtype=np.uint8)
    return CaptionedImages(
        dataset=Dataset.from_dict(rows),
        kept=np.arange(num_rows),
        records=pack_tokens(labels * mask, mask),
        decoder_start_token_id=0,
        image_index=images,
        images=np.broadcast_to(numbers[:, None, None, None], (len(numbers), SIDE, SIDE, 3)),
    )


def make_evaluator(model, tokenizer, protocol=EXACT, *, replicas=2, rows=2, at_once=None, generate=True):
    programs = Programs(
        num_rows=(at_once or replicas) * rows,
        place=lambda load, rows: load(rows),
        encode=model.encode,
        row_losses=model.row_losses,
        generate=model.generate if generate else None,
    )
    sizes = {"num_replicas": replicas, "replica_batch": rows}
    return Evaluator(programs=lambda: programs, tokenizer=tokenizer, protocol=protocol, progress=False, **sizes)


def tokens_of(data):
    """Labels and mask of all rows."""
    tokens = data.tokens(np.arange(len(data)))
    return tokens["labels"], tokens["decoder_attention_mask"]


def loss_by_hand(data, protocol):
    """Over all tokens, or of batches of two replicas of two rows."""
    labels, mask = tokens_of(data)
    sums, counts = (labels / 7 * mask * (1 + data.image_index[:, None])).sum(axis=1), mask.sum(axis=1)
    if protocol.token_eval_loss:
        return sums.sum() / counts.sum()
    batches = (values[: len(data) // 4 * 4].reshape(-1, 4) for values in (sums, counts))
    return mean_of_batch_losses(*batches, protocol.loss_reduction, num_replicas=2)


def loss_of(data, protocol=EXACT, params=1.0, **sizes):
    evaluator = make_evaluator(FakeModel(), None, protocol, generate=False, **sizes)
    return evaluator.evaluate(params, data).metrics["loss"]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_batches_count_alike_and_in_them_tokens_or_replicas_that_have_a_row(seed, replicas):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 3, (3, 4)).astype(float)
    counts[0, 0] = 1
    sums = random.random((3, 4)) * counts
    for reduction, parts in (("tokens", 1), ("replica_means", replicas)):
        batches = [zip(np.split(sums[batch], parts), np.split(counts[batch], parts), strict=True) for batch in range(3)]
        means = [[total.sum() / count.sum() for total, count in batch if count.any()] for batch in batches]
        expected = np.mean([np.mean(of_batch) for of_batch in means if of_batch])
        assert mean_of_batch_losses(sums, counts, reduction, num_replicas=replicas) == pytest.approx(expected)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=24),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from([EXACT, CURRENT]),
)
def test_a_loss_of_tokens_has_every_row_once_however_many_captions_an_image_has(images, rows, seed, protocol):
    protocol = replace(protocol, keep_incomplete_batch=True, token_eval_loss=True)
    data = make_data(len(images), images=images, seed=seed)
    loss = loss_of(data, protocol, params=2.0, replicas=1, rows=rows)
    assert loss == pytest.approx(2 * loss_by_hand(data, protocol), rel=1e-12)


@pytest.mark.parametrize(("protocol", "times"), [(EXACT, 1), (CURRENT, 3), (PUBLISHED, 3)])
def test_exact_captions_each_image_once_and_the_examples_protocols_each_row(tokenizer, protocol, times):
    model, images = FakeModel(), [0, 1, 2, 3]
    # 12 rows of 4 images: one full batch, without padding.
    make_evaluator(model, tokenizer, protocol).evaluate(1.0, make_data(12))
    assert model.generated == np.repeat(images, times).tolist()
    assert model.encoded == images + (model.generated if times > 1 else [])
    assert model.losses == ROWS_PER_IMAGE


def test_images_with_one_caption_more_than_others_cost_one_batch_more():
    model = FakeModel()
    images = [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7]  # 0, 2 and 5 have two captions, the other five have one
    make_evaluator(model, None, generate=False).evaluate(1.0, make_data(len(images), images=images))
    assert (len(model.encoded), model.losses) == (8, 3)


@pytest.mark.parametrize(("protocol", "num_rows"), [(EXACT, 11), (CURRENT, 8), (PUBLISHED, 8)])
def test_each_row_has_its_label_and_its_images_caption_but_for_incomplete_batches(tokenizer, protocol, num_rows):
    data, model = make_data(11), FakeModel()
    found = make_evaluator(model, tokenizer, protocol).evaluate(1.0, data)
    images = np.arange(num_rows) // ROWS_PER_IMAGE  # with captions of 1, 2, 3 and 4 tokens
    assert found.details["rows"] == num_rows
    assert found.image_paths == [f"{image}.png" for image in images]
    assert found.metrics["gen_len"] == pytest.approx(np.mean(images + 1))
    assert found.metrics["loss"] == pytest.approx(loss_by_hand(data, protocol), rel=1e-12)
    for generation, image, labels in zip(found.generations, images, tokens_of(data)[0][:num_rows], strict=True):
        assert generation["pred"] == tokenizer.decode([40 + image] * (image + 1)).strip()
        assert generation["label"] == tokenizer.decode(labels, skip_special_tokens=True).strip()
    assert model.batch_sizes == {4}, "the last batch must have the shape of all others"


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_turns_change_no_number_nor_under_exact_the_batch(tokenizer, protocol):
    data = make_data(43)
    sizes = [{"replicas": 8, "at_once": at_once} for at_once in (8, 4, 2, 1)]
    if protocol is EXACT:
        sizes += [{"replicas": replicas, "rows": rows} for replicas, rows in ((1, 1), (1, 11), (8, 8))]
    found = [make_evaluator(FakeModel(), tokenizer, protocol, **size).evaluate(1.0, data) for size in sizes]
    assert found[0].details["rows"] == (43 if protocol is EXACT else 32)
    for other in found[1:]:
        assert replace(other, metrics={}) == replace(found[0], metrics={})
        assert other.metrics == pytest.approx(found[0].metrics, rel=1e-12)


@pytest.mark.parametrize(
    ("captions", "generate", "metrics"),
    [(True, True, {"loss", "gen_len", *TYPES}), (False, True, {"gen_len"}), (True, False, {"loss"})],
)
def test_metrics_are_of_what_there_is(tokenizer, captions, generate, metrics):
    evaluator = make_evaluator(FakeModel(), tokenizer, generate=generate)
    evaluation = evaluator.evaluate(1.0, make_data(5, captions=captions))
    assert set(evaluation.metrics) == metrics
    assert len(evaluation.generations) == 5 * generate


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_rows_without_a_caption_take_the_scores_of_no_other(tokenizer, protocol):
    # Row 1 is of an image that has others; rows 3 to 5 are all of theirs, rows 8 to 11 a whole batch.
    given = ~np.isin(np.arange(16), [1, 3, 4, 5, 8, 9, 10, 11])
    data, whole = make_data(16, captions=given), make_data(16)
    evaluate = make_evaluator(FakeModel(), tokenizer, protocol).evaluate
    found, all_given = evaluate(1.0, data), evaluate(1.0, whole)
    assert [row["pred"] for row in found.generations] == [row["pred"] for row in all_given.generations]
    assert [bool(row["label"]) for row in found.generations] == given.tolist()
    assert (found.details["rows"], found.details["rows_scored"]) == (16, given.sum())
    assert "rows_scored" not in all_given.details
    assert found.metrics["gen_len"] == all_given.metrics["gen_len"]
    scored = [(row["pred"], row["label"]) for row in found.generations if row["label"]]
    assert {kind: found.metrics[kind] for kind in TYPES} == rouge_scores(*zip(*scored, strict=True)).means
    assert found.metrics["loss"] == pytest.approx(loss_by_hand(data, protocol), rel=1e-12)


def test_bleu_is_of_the_images_that_have_a_caption(tokenizer, monkeypatch):
    given = np.isin(np.arange(9), [0, 2, 6, 7, 8])
    seen = []

    def score(*pair):
        seen.extend(pair)
        return {"bleu4": 0.5}, "by words"

    monkeypatch.setattr(repro.evaluation.evaluator, "caption_scores", score)
    evaluator = replace(make_evaluator(FakeModel(), tokenizer), caption_metrics=True)
    evaluation = evaluator.evaluate(1.0, make_data(9, captions=given))
    assert (evaluation.metrics["bleu4"], evaluation.details["caption_tokenizer"]) == (0.5, "by words")
    captions, references = seen
    assert references == {"0.png": ["caption 0", "caption 2"], "2.png": ["caption 6", "caption 7", "caption 8"]}
    assert captions == {f"{image}.png": evaluation.generations[3 * image]["pred"] for image in (0, 2)}


class TracedModel:
    """A captioner that can be compiled: images are their first byte, and so are the tokens of their captions."""

    config = SimpleNamespace(decoder_start_token_id=0, eos_token_id=0, pad_token_id=0)
    generation_config = GenerationConfig(num_beams=3)

    def __init__(self):
        self.asked = []

    def encode(self, params, pixels):
        return pixels[:, 0, 0, 0].astype(jnp.int32)

    def decode(self, params, images, inputs, mask):
        return jax.nn.one_hot(inputs + images[:, None], 64) * params["scale"]

    def generate(self, params, images, **settings):
        self.asked.append(settings)
        return Captions(jnp.tile(images[:, None, None], (1, 1, settings["max_length"])), images[:, None])


def build(data, *, devices=1, rows=2, asked=None, **more):
    """An evaluator of eight replicas, and its model."""
    search = {"predict_with_generate": True, "max_target_length": LENGTH}
    model, sizes = TracedModel(), {"per_device_eval_batch_size": rows, "replicas_at_once": asked, "num_replicas": 8}
    prepared = SimpleNamespace(
        settings=Settings(model_name_or_path="unused", do_eval=True, **search, **sizes),
        pretrained=SimpleNamespace(captioner=model, tokenizer=None, params={"scale": np.float32(2)}),
        mesh=create_mesh(jax.devices()[:devices], num_replicas=8, replica_batch=rows),
        progress=False,
        splits={"validation": data},
    )
    return build_evaluator(prepared, **more), model


def test_as_many_device_batches_are_evaluated_at_once_as_fit_beside_the_state(monkeypatch):
    data = make_data(48)
    assert build(data)[1].asked == [], "nothing is compiled for an evaluation that does not come"
    needs = [build(data, asked=number)[0].programs().num_bytes for number in (8, 4, 2, 1)]
    assert needs == sorted(set(needs), reverse=True), "fewer rows take less"
    for limit, rows in ((needs[0], 16), (needs[0] - 1, 8), (1, 2)):
        monkeypatch.setattr(repro.run.build, "device_bytes", lambda _, limit=limit: (limit + 0.5) / SHARE)
        evaluator, model = build(data)
        assert evaluator.programs().num_rows == rows
        assert {settings["group_size"] for settings in model.asked} == {2}
    # Devices share each turn evenly: two of them never take the batch of one.
    assert build(data, devices=2, rows=3)[0].programs().num_rows == 6
    # What else is on the device counts.
    monkeypatch.undo()
    everything = int(SHARE * device_bytes(jax.devices()[0]))
    assert build(data, held_bytes=everything - needs[2])[0].programs().num_rows == 4
