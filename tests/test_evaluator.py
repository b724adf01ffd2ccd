"""Evaluation with a fake model in NumPy: what is counted, what is dropped, what is generated; and targets."""

from __future__ import annotations

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
from repro.errors import InputError
from repro.evaluation.evaluator import Evaluator, Programs, mean_of_batch_losses
from repro.evaluation.rouge import TYPES, rouge_scores
from repro.models.beam_search import Captions
from repro.protocol import CURRENT, EXACT, PROTOCOLS, PUBLISHED, Protocol
from repro.run.build import build_evaluator
from repro.run.settings import Settings
from repro.training.memory import SHARE, device_bytes
from repro.training.sharding import create_mesh

LENGTH, SIDE = 5, 2
ROWS_PER_IMAGE = 3


class FakeModel:
    """Loss of a token: its label / 7, times its image's number. Caption: a token more than the byte modulo 4."""

    def __init__(self) -> None:
        self.generated: list[int] = []
        self.encoded: list[int] = []
        self.losses = 0
        self.batch_sizes: set[int] = set()

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


def make_data(num_rows: int, *, captions=True, seed: int = 0, images=None) -> CaptionedImages:
    """Rows of images 0 0 0 1 1 1 ..., or of others, whose bytes are their numbers; captions of 1 to 5 tokens."""
    random = np.random.default_rng(seed)
    labels = random.integers(40, 60, (num_rows, LENGTH), dtype=np.int32)
    mask = (np.arange(LENGTH) < random.integers(1, LENGTH + 1, num_rows)[:, None]).astype(np.int32)
    given = np.broadcast_to(captions, num_rows)
    mask *= given[:, None]
    texts = [f"caption {row}" if is_given else None for row, is_given in enumerate(given)]
    images = np.arange(num_rows) // ROWS_PER_IMAGE if images is None else np.asarray(images)
    numbers = np.arange(images.max() + 1, dtype=np.uint8)
    return CaptionedImages(
        dataset=Dataset.from_dict(
            {"image_path": [f"{i}.png" for i in images], "image_id": [str(i) for i in images], "caption": texts}
        ),
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
    return Evaluator(
        programs=lambda: programs,
        tokenizer=tokenizer,
        protocol=protocol,
        num_replicas=replicas,
        replica_batch=rows,
        progress=False,
    )


def labels_of(data) -> np.ndarray:
    return data.tokens(np.arange(len(data)))["labels"]


def mask_of(data) -> np.ndarray:
    return data.tokens(np.arange(len(data)))["decoder_attention_mask"]


def token_losses(data) -> np.ndarray:
    return labels_of(data) / 7 * mask_of(data) * (1 + data.image_index[:, None])


def loss_of(data, protocol=EXACT, **sizes) -> float:
    evaluator = make_evaluator(FakeModel(), None, protocol, generate=False, **sizes)
    return evaluator.evaluate(1.0, data).metrics["loss"]


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_exact_loss_is_per_token_over_every_row_whatever_the_batch(num_rows, batch_size, seed):
    data = make_data(num_rows, seed=seed)
    expected = token_losses(data).sum() / mask_of(data).sum()
    assert loss_of(data, replicas=1, rows=batch_size) == pytest.approx(expected, rel=1e-12)


def test_current_loss_is_the_unweighted_mean_of_the_batches_token_losses():
    data = make_data(11)
    batches = [slice(0, 4), slice(4, 8)]
    expected = np.mean([token_losses(data)[b].sum() / mask_of(data)[b].sum() for b in batches])
    assert loss_of(data, CURRENT) == pytest.approx(expected, rel=1e-12)
    assert loss_of(data, replace(CURRENT, token_eval_loss=True)) != pytest.approx(expected, rel=1e-6)


def test_published_loss_is_the_mean_over_replicas_too():
    data = make_data(11)
    replicas = [slice(start, start + 2) for start in range(0, 8, 2)]
    expected = np.mean([token_losses(data)[r].sum() / mask_of(data)[r].sum() for r in replicas])
    assert loss_of(data, PUBLISHED) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_means_of_batch_losses_follow_the_reduction(seed, replicas):
    random = np.random.default_rng(seed)
    sums, counts = random.random((3, 4)), random.integers(1, 9, (3, 4)).astype(float)
    by_replica = [np.split(values, replicas * 3) for values in (sums.ravel(), counts.ravel())]
    means = [s.sum() / c.sum() for s, c in zip(*by_replica, strict=True)]
    assert mean_of_batch_losses(sums, counts, "replica_means", num_replicas=replicas) == pytest.approx(np.mean(means))
    tokens = (sums.sum(axis=1) / counts.sum(axis=1)).mean()
    assert mean_of_batch_losses(sums, counts, "tokens", num_replicas=replicas) == pytest.approx(tokens)


@pytest.mark.parametrize(("protocol", "evaluated"), [(EXACT, 11), (CURRENT, 8), (PUBLISHED, 8)])
def test_only_exact_evaluates_the_rows_of_the_incomplete_batch(tokenizer, protocol, evaluated):
    data, model = make_data(11), FakeModel()
    evaluation = make_evaluator(model, tokenizer, protocol).evaluate(1.0, data)
    assert evaluation.details["rows"] == evaluated
    assert len(evaluation.generations) == evaluated
    assert evaluation.image_paths == data.read(np.arange(evaluated))
    assert model.batch_sizes == {4}, "the last batch must have the shape of all others"


def settings_of(protocol: Protocol, **flags) -> Settings:
    return Settings(model_name_or_path="unused", do_eval=True, protocol=protocol.name, **flags)


@pytest.mark.parametrize("protocol", [CURRENT, PUBLISHED], ids=["current", "published"])
def test_fewer_rows_than_a_batch_are_refused_where_they_would_all_be_dropped(protocol):
    settings = settings_of(protocol, per_device_eval_batch_size=4)
    with pytest.raises(InputError, match=r"validation: 3 rows .* batch of 4.*--per_device_eval_batch_size"):
        settings.with_rows({"validation": 3})
    settings.with_rows({"validation": 4})
    replace(settings, protocol="exact").with_rows({"validation": 3})


def test_exact_evaluates_fewer_rows_than_a_batch():
    data = make_data(3)
    assert loss_of(data) == pytest.approx(token_losses(data).sum() / mask_of(data).sum())


def test_exact_encodes_and_captions_each_image_once(tokenizer):
    model = FakeModel()
    # 12 rows of 4 images: one full batch, without padding.
    make_evaluator(model, tokenizer).evaluate(1.0, make_data(12))
    assert model.encoded == model.generated == [0, 1, 2, 3]
    assert model.losses == ROWS_PER_IMAGE


@given(st.lists(st.integers(0, 6), min_size=1, max_size=24), st.integers(1, 5), st.sampled_from([EXACT, CURRENT]))
def test_every_row_is_scored_once_however_many_captions_an_image_has(images, batch_size, protocol):
    protocol = replace(protocol, keep_incomplete_batch=True, token_eval_loss=True)
    data = make_data(len(images), images=images)
    expected = token_losses(data).sum() / mask_of(data).sum()
    assert loss_of(data, protocol, replicas=1, rows=batch_size) == pytest.approx(expected, rel=1e-12)


def test_images_with_one_caption_more_than_others_cost_one_batch_more():
    model = FakeModel()
    images = [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7]  # 0, 2 and 5 have two captions, the other five have one
    make_evaluator(model, None, generate=False).evaluate(1.0, make_data(len(images), images=images))
    assert (len(model.encoded), model.losses) == (8, 3)


@pytest.mark.parametrize("protocol", [CURRENT, PUBLISHED])
def test_the_examples_protocols_generate_once_for_each_row(tokenizer, protocol):
    model = FakeModel()
    make_evaluator(model, tokenizer, protocol).evaluate(1.0, make_data(12))
    assert model.generated == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_each_row_has_the_caption_of_its_image_and_its_own_label(tokenizer, protocol):
    data = make_data(12)
    generations = make_evaluator(FakeModel(), tokenizer, protocol).evaluate(1.0, data).generations
    for row, generation in enumerate(generations):
        image = row // ROWS_PER_IMAGE
        assert generation["pred"] == tokenizer.decode([40 + image] * (image % 4 + 1)).strip()
        assert generation["label"] == tokenizer.decode(labels_of(data)[row], skip_special_tokens=True).strip()


@pytest.mark.parametrize("protocol", [EXACT, CURRENT], ids=["exact", "current"])
def test_gen_len_is_the_mean_number_of_tokens_over_rows_not_images(tokenizer, protocol):
    data = make_data(8)  # images 0 0 0 1 1 1 2 2, with captions of 1, 2 and 3 tokens
    evaluation = make_evaluator(FakeModel(), tokenizer, protocol).evaluate(1.0, data)
    assert evaluation.metrics["gen_len"] == pytest.approx((3 * 1 + 3 * 2 + 2 * 3) / 8)


def test_exact_evaluation_does_not_depend_on_the_batch(tokenizer):
    data = make_data(11)
    first, *others = (
        make_evaluator(FakeModel(), tokenizer, replicas=replicas, rows=rows).evaluate(1.0, data)
        for replicas, rows in ((1, 1), (2, 2), (1, 11), (8, 4))
    )
    for other in others:
        assert other.metrics == pytest.approx(first.metrics, rel=1e-12)
        assert other.generations == first.generations


def test_without_captions_there_is_neither_loss_nor_rouge(tokenizer):
    evaluation = make_evaluator(FakeModel(), tokenizer).evaluate(1.0, make_data(5, captions=False))
    assert set(evaluation.metrics) == {"gen_len"}
    assert len(evaluation.generations) == 5


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_rows_without_a_caption_take_the_scores_of_no_other(tokenizer, protocol):
    # Row 1 is of an image that has others; rows 3 to 5 are all of theirs, rows 8 to 11 a whole batch.
    missing = {1, 3, 4, 5, 8, 9, 10, 11}
    given = np.array([row not in missing for row in range(16)])
    data, whole = make_data(16, captions=given), make_data(16)
    evaluate = make_evaluator(FakeModel(), tokenizer, protocol).evaluate
    found, all_given = evaluate(1.0, data), evaluate(1.0, whole)
    assert [row["pred"] for row in found.generations] == [row["pred"] for row in all_given.generations]
    assert [bool(row["label"]) for row in found.generations] == given.tolist()
    assert found.details["rows"] == 16
    assert found.details["rows_scored"] == given.sum()
    assert "rows_scored" not in all_given.details
    assert found.metrics["gen_len"] == all_given.metrics["gen_len"]
    pairs = zip(
        *((row["pred"], row["label"]) for row in all_given.generations if row in found.generations), strict=True
    )
    assert {kind: found.metrics[kind] for kind in TYPES} == rouge_scores(*pairs).means
    sums, counts = (token_losses(whole) * given[:, None]).sum(axis=1), mask_of(whole).sum(axis=1) * given
    groups = [range(16)] if protocol is EXACT else [range(start, start + 4) for start in range(0, 16, 4)]
    if protocol is PUBLISHED:  # the mean over a batch's replicas that have a caption, then over batches that have one
        by_batch = [[range(start, start + 2), range(start + 2, start + 4)] for start in range(0, 16, 4)]
        means = [[sums[r].sum() / counts[r].sum() for r in map(list, b) if counts[r].sum()] for b in by_batch]
        expected = np.mean([np.mean(of_batch) for of_batch in means if of_batch])
    else:
        expected = np.mean([sums[g].sum() / counts[g].sum() for g in map(list, groups) if counts[g].sum()])
    assert found.metrics["loss"] == pytest.approx(expected, rel=1e-12)


def test_bleu_is_of_the_images_that_have_a_caption(tokenizer):
    given = np.array([True, False, True, False, False, False, True, True, True])
    seen = {}

    def score(captions, references):
        seen.update(captions=captions, references=references)
        return {"bleu4": 0.5}, "split_words"

    evaluator = replace(make_evaluator(FakeModel(), tokenizer), caption_metrics=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repro.evaluation.evaluator, "caption_scores", score)
        evaluation = evaluator.evaluate(1.0, make_data(9, captions=given))
    assert evaluation.metrics["bleu4"] == 0.5
    assert seen["references"] == {
        "0.png": ["caption 0", "caption 2"],
        "2.png": ["caption 6", "caption 7", "caption 8"],
    }
    assert seen["captions"].keys() == seen["references"].keys()
    assert seen["captions"]["2.png"] == evaluation.generations[6]["pred"]


def test_without_generation_there_is_the_loss_alone():
    evaluation = make_evaluator(FakeModel(), None, generate=False).evaluate(1.0, make_data(5))
    assert set(evaluation.metrics) == {"loss"}
    assert evaluation.generations == []


def test_metrics_are_those_of_the_examples_results(tokenizer):
    evaluation = make_evaluator(FakeModel(), tokenizer).evaluate(1.0, make_data(5))
    assert set(evaluation.metrics) == {"loss", "gen_len", "rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_the_given_parameters_are_evaluated():
    data, evaluator = make_data(5), make_evaluator(FakeModel(), None, generate=False)
    once, twice = (evaluator.evaluate(params, data).metrics["loss"] for params in (1.0, 2.0))
    assert twice == pytest.approx(2 * once)


class TracedModel:
    """A captioner that can be compiled: images are their first byte, and so are the tokens of their captions."""

    config = SimpleNamespace(decoder_start_token_id=0, eos_token_id=0, pad_token_id=0)
    generation_config = GenerationConfig(num_beams=3)

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def encode(self, params, pixels):
        return pixels[:, 0, 0, 0].astype(jnp.int32)

    def decode(self, params, images, inputs, mask):
        return jax.nn.one_hot(inputs + images[:, None], 64) * params["scale"]

    def generate(self, params, images, **settings):
        self.asked.append({"rows": len(images), **settings})
        return Captions(jnp.tile(images[:, None, None], (1, 1, settings["max_length"])), images[:, None])


def build(data, *, devices=1, replicas=1, rows=2, protocol=EXACT, asked=None, tokenizer=None, **more):
    model = TracedModel()
    evaluator = build_evaluator(
        SimpleNamespace(
            settings=settings_of(
                protocol,
                per_device_eval_batch_size=rows,
                replicas_at_once=asked,
                num_replicas=replicas,
                predict_with_generate=True,
                max_target_length=LENGTH,
            ),
            pretrained=SimpleNamespace(captioner=model, tokenizer=tokenizer, params={"scale": np.float32(2)}),
            mesh=create_mesh(jax.devices()[:devices], num_replicas=replicas, replica_batch=rows),
            progress=False,
            splits={"validation": data},
        ),
        **more,
    )
    return evaluator, model


def test_nothing_is_compiled_for_an_evaluation_that_does_not_come():
    assert build(make_data(3))[1].asked == []


def test_as_many_device_batches_are_evaluated_at_once_as_fit_beside_the_state(monkeypatch):
    data = make_data(48)
    needs = [build(data, replicas=8, asked=number)[0].programs().num_bytes for number in (8, 4, 2, 1)]
    assert needs == sorted(set(needs), reverse=True), "fewer rows take less"
    for limit, rows in ((needs[0], 16), (needs[0] - 1, 8), (needs[2], 4), (needs[3], 2), (1, 2)):
        monkeypatch.setattr(repro.run.build, "device_bytes", lambda _, limit=limit: (limit + 0.5) / SHARE)
        evaluator, model = build(data, replicas=8)
        assert evaluator.programs().num_rows == rows
        assert {settings["group_size"] for settings in model.asked} == {2}
    # Devices share each turn evenly: two of them never take the batch of one.
    evaluator, _ = build(data, devices=2, replicas=8, rows=3)
    assert evaluator.programs().num_rows == 6
    # What else is on the device counts.
    monkeypatch.undo()
    everything = int(SHARE * device_bytes(jax.devices()[0]))
    assert build(data, replicas=8, held_bytes=everything - needs[2])[0].programs().num_rows == 4


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_turns_change_no_number(tokenizer, protocol):
    data = make_data(43)
    found = [
        make_evaluator(FakeModel(), tokenizer, protocol, replicas=8, at_once=at_once).evaluate(1.0, data)
        for at_once in (8, 4, 2, 1)
    ]
    assert found[0].details["rows"] == (43 if protocol is EXACT else 32)
    assert all(other == found[0] for other in found[1:])


def test_an_incomplete_batch_counts_as_a_batch_of_the_rows_that_it_has():
    sums, counts = np.array([[4.0, 2.0], [6.0, 0.0]]), np.array([[2.0, 2.0], [2.0, 0.0]])
    assert mean_of_batch_losses(sums, counts, "tokens", num_replicas=2) == pytest.approx((6 / 4 + 6 / 2) / 2)
    assert mean_of_batch_losses(sums, counts, "replica_means", num_replicas=2) == pytest.approx(((2 + 1) / 2 + 3) / 2)
