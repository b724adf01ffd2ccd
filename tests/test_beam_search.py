"""Beam search against all sequences of a small vocabulary, and its three stop rules by hand."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from repro.errors import InputError
from repro.models import generation
from repro.models.beam_search import beam_search
from repro.models.pretrained import load_model

START, END, PAD = 1, 0, 3
ROWS = 4


@pytest.fixture(scope="module")
def model(golden_inputs):
    return load_model(str(golden_inputs / "model"))


def randomized(params, seed):
    """Parameters far enough from the tiny model's for captions that vary in words and length."""
    random = np.random.default_rng(seed)

    def shake(leaf):
        return 2.0 * np.asarray(leaf) + 0.25 * random.standard_normal(leaf.shape).astype(np.float32)

    params = jax.tree.map(shake, params)
    # The output layer is the embedding: scaling the end token's row makes ends likelier.
    embedding = params["decoder"]["transformer"]["wte"]["embedding"]
    embedding[END] *= 1.0 + seed % 3
    return params


def images(seed, rows=ROWS):
    return np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)


CHEAP = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
"""Compiler options: each search here runs but a few times."""


def compiled(model, num_beams, max_length, stop_rule, group_size, **settings):
    """`NativeCaptioner.generate` with these settings, from pixels."""
    settings |= {"num_beams": num_beams, "max_length": max_length, "stop_rule": stop_rule, "group_size": group_size}

    @partial(jax.jit, compiler_options=CHEAP)
    def captions(params, pixels):
        return model.captioner.generate(params, model.captioner.encode(params, pixels), **settings)

    return captions


@pytest.mark.parametrize(
    ("num_beams", "stop_rule", "size"), [(1, "exact", 1), (3, "exact", 1), (3, "2022", 2), (3, "current", 2)]
)
def test_a_group_under_exact_each_row_is_captioned_as_if_it_were_the_whole_batch(model, num_beams, stop_rule, size):
    group_size, alone = (ROWS, "current") if stop_rule == "exact" else (size, stop_rule)
    whole, part = compiled(model, num_beams, 16, stop_rule, group_size), compiled(model, num_beams, 16, alone, size)
    for seed in range(4):
        params, pixels = randomized(model.params, seed), images(seed)
        captions = whole(params, pixels)
        parts = [part(params, pixels[start : start + size]) for start in range(0, ROWS, size)]
        np.testing.assert_array_equal(captions.tokens, np.concatenate([found.tokens for found in parts]))
        scores = np.concatenate([found.scores for found in parts])
        np.testing.assert_allclose(captions.scores, scores, rtol=1e-4, atol=1e-4)


def search(decode_step, cache, *, rows, num_beams, positions, **settings):
    special = {"start_token_id": START, "end_token_ids": [END], "pad_token_id": PAD}
    sizes = {"batch_size": rows, "num_beams": num_beams, "max_length": positions + 1}
    return beam_search(decode_step, cache, **sizes, **special, **settings)


def history_search(log_probs, num_beams, **settings):
    """Search where a row's next token depends on all tokens so far: log_probs float32[B,L-1,V**(L-2),V].

    The history is kept in the cache, as a number in base V, so that a cache left unordered is seen.
    """
    rows, positions, _, vocabulary = log_probs.shape
    table = jnp.asarray(log_probs)

    def decode_step(tokens, parents, position, cache):
        history = jnp.take_along_axis(cache["history"], parents, axis=1)
        history = jnp.where(position == 0, 0, history * vocabulary + tokens)
        logits = table[cache["row"][:, None], position, history]
        return logits, {"history": history, "row": cache["row"]}

    cache = {"history": jnp.zeros((rows, num_beams), jnp.int32), "row": jnp.arange(rows)}
    return search(decode_step, cache, rows=rows, num_beams=num_beams, positions=positions, **settings)


def best_sequence(log_probs, length_penalty):
    """Try all: the best score of an ended sequence of one row, [L-1,V**(L-2),V], and the sequence."""
    positions, _, vocabulary = log_probs.shape
    scored = []
    for length in range(1, positions + 1):
        for words in itertools.product(range(1, vocabulary), repeat=length - 1):
            total, history = 0.0, 0
            for position, token in enumerate((*words, END)):
                total += float(log_probs[position, history, token])
                history = history * vocabulary + token
            padding = (PAD,) * (positions - length)
            scored.append((total / length**length_penalty, (START, *words, END, *padding)))
    return max(scored)


compiled_search = jax.jit(
    history_search, static_argnums=1, static_argnames=("length_penalty", "stop_rule", "group_size")
)


@hypothesis_settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 2.0]), st.floats(0.3, 4.0))
def test_with_a_beam_for_every_sequence_the_best_of_all_is_found(seed, length_penalty, spread):
    # 3 tokens, of which one ends, and 3 positions: at most 7 sequences that end and 8 that go on.
    logits = spread * np.random.default_rng(seed).standard_normal((2, 3, 9, 3))
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float32)
    captions = compiled_search(log_probs, 8, length_penalty=length_penalty, stop_rule="exact")
    for row in range(2):
        score, sequence = best_sequence(log_probs[row], length_penalty)
        np.testing.assert_allclose(captions.scores[row, 0], score, rtol=1e-5, atol=1e-5)
        assert tuple(captions.tokens[row, 0].tolist()) == sequence


@hypothesis_settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["2022", "current", "exact"]))
def test_a_caption_starts_with_the_start_and_is_padded_after_its_end(seed, stop_rule):
    log_probs = 2 * np.random.default_rng(seed).standard_normal((2, 3, 9, 3)).astype(np.float32)
    captions = compiled_search(log_probs, 2, stop_rule=stop_rule, group_size=2)
    for caption in captions.tokens[:, 0].tolist():
        assert caption[0] == START
        after_end = caption[caption.index(END) + 1 :] if END in caption else []
        assert after_end == [PAD] * len(after_end)


A, B = 1, 2
VOCABULARY = 4


def log_table(*steps):
    """Log-probabilities [L-1,V] of a row whose tokens depend on the position alone; unnamed ones share the rest."""
    table = []
    for step in steps:
        rest = (1 - sum(step.values())) / (VOCABULARY - len(step))
        table.append([step.get(token, rest) for token in range(VOCABULARY)])
    return np.log(table).astype(np.float32)


def all_sequences(*rows, num_beams, **settings):
    """Search over tables [L-1,V], one a row."""

    def decode_step(tokens, parents, position, table):
        return jnp.repeat(table[:, None, position], num_beams, axis=1), table

    sizes = {"rows": len(rows), "num_beams": num_beams, "positions": len(rows[0])}
    return search(decode_step, jnp.asarray(rows), **sizes, **settings)


def table_search(*rows, **settings):
    """Each row's best tokens and score, as lists."""
    captions = all_sequences(*rows, **settings)
    return captions.tokens[:, 0].tolist(), captions.scores[:, 0].tolist()


# The end comes likeliest at once, at log 0.60 = -0.51; but A, end scores log(0.39 x 0.98) / 2 = -0.48, which is better.
HASTY = log_table({END: 0.60, A: 0.39}, *[{END: 0.98, A: 0.01}] * 3)
HASTY_BEST = ([START, A, END, PAD, PAD], np.log(0.39 * 0.98) / 2)
# Three times A, and only then the end: log(0.9 ** 4) / 4 = -0.11.
PATIENT = log_table(*[{A: 0.90, B: 0.08, END: 0.01}] * 3, {END: 0.90, A: 0.05})
PATIENT_BEST = ([START, A, A, A, END], np.log(0.9**4) / 4)
# The end at once, at log 0.97 = -0.03, and little hope for anything else.
DONE = log_table({END: 0.97, A: 0.02}, {END: 0.90, A: 0.05}, *[{END: 0.99}] * 2)
DONE_BEST = ([START, END, PAD, PAD, PAD], np.log(0.97))


def test_under_2022_a_group_stops_as_soon_as_one_of_its_rows_is_done():
    # After two tokens DONE holds two ends, log 0.97 and log(0.02 x 0.90) / 2 = -2.0, and its best running sum over
    # max_length, log(0.02 x 0.05) / 5 = -1.4, could still beat the worse one. After three tokens it cannot:
    # log(0.02 x 0.05 x 0.0033) / 5 = -2.5. PATIENT has by then seen the ends log 0.01 = -4.6 (end),
    # log(0.9 x 0.01) / 2 = -2.4 (A, end) and log(0.81 x 0.01) / 3 = -1.6 (A, A, end): it must take the last.
    tokens, scores = table_search(DONE, PATIENT, num_beams=2, stop_rule="2022", group_size=2)
    assert tokens == [DONE_BEST[0], [START, A, A, END, PAD]]
    np.testing.assert_allclose(scores, [DONE_BEST[1], np.log(0.81 * 0.01) / 3], rtol=1e-3)


@pytest.mark.parametrize(("stop_rule", "group_size"), [("2022", 1), ("current", 1), ("current", 3), ("exact", 3)])
def test_under_other_rules_or_in_another_group_the_row_goes_on_to_its_best_end(stop_rule, group_size):
    tokens, scores = table_search(DONE, PATIENT, HASTY, num_beams=2, stop_rule=stop_rule, group_size=group_size)
    best_tokens, best_scores = zip(DONE_BEST, PATIENT_BEST, HASTY_BEST, strict=True)
    assert tokens == list(best_tokens)
    np.testing.assert_allclose(scores, best_scores, rtol=1e-3)


@pytest.mark.parametrize("stop_rule", ["2022", "current", "exact"])
def test_with_one_beam_each_row_takes_the_likeliest_token_until_it_is_the_end(stop_rule):
    # Greedy search: PATIENT's less likely ends are not looked at, HASTY's better one is never reached.
    tokens, _ = table_search(DONE, PATIENT, HASTY, num_beams=1, stop_rule=stop_rule, group_size=3)
    assert tokens == [DONE_BEST[0], PATIENT_BEST[0], DONE_BEST[0]]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_caption_without_an_end_is_the_best_of_full_length(num_beams):
    endless = log_table(*[{A: 0.3, B: 0.6}] * 3)
    endless[:, END] = -1e9
    tokens, scores = table_search(endless, num_beams=num_beams, stop_rule="exact")
    assert tokens == [[START, B, B, B]]
    assert np.isfinite(scores).all()


def test_early_stopping_takes_the_first_ends_of_all_beams():
    # Two beams hold two ends after two tokens: log 0.60 and log(0.39 x 0.30) / 2 = -1.07. Then A, A, end would come:
    # log(0.39 x 0.69 x 0.97) / 3 = -0.45, better than both.
    row = log_table({END: 0.60, A: 0.39}, {END: 0.30, A: 0.69}, {END: 0.97})
    hasty, patient = (
        table_search(row, num_beams=2, stop_rule="exact", early_stopping=early)[0] for early in (True, False)
    )
    assert (hasty, patient) == ([[START, END, PAD, PAD]], [[START, A, A, END]])


def test_a_batch_that_its_groups_do_not_divide_is_refused():
    with pytest.raises(AssertionError):
        table_search(DONE, PATIENT, DONE, num_beams=2, stop_rule="current", group_size=2)


@pytest.mark.parametrize(("num_beams", "returned"), [(4, 2), (1, 1)])
def test_several_sequences_come_best_first_and_the_first_is_the_only_one(num_beams, returned):
    rows = (HASTY, PATIENT, DONE)
    best = table_search(*rows, num_beams=num_beams, stop_rule="exact")
    many = all_sequences(*rows, num_beams=num_beams, stop_rule="exact", num_return_sequences=returned)
    assert many.tokens.shape == (3, returned, 5)
    assert (many.tokens[:, 0].tolist(), many.scores[:, 0].tolist()) == best
    assert (np.diff(many.scores, axis=1) <= 0).all()
    for table, sequences, scores in zip(rows, many.tokens.tolist(), many.scores.tolist(), strict=True):
        assert len({tuple(tokens) for tokens in sequences}) == returned
        for tokens, score in zip(sequences, scores, strict=True):
            length = tokens.index(END, 1) if END in tokens[1:] else 4
            total = sum(table[position, tokens[position + 1]] for position in range(length))
            np.testing.assert_allclose(score, total / length, rtol=1e-5)


def test_where_too_few_have_ended_the_best_that_have_not_follow():
    # The end is impossible but after A, so that of three sequences one ends.
    row = log_table({A: 0.6, B: 0.3}, {END: 0.5, A: 0.3, B: 0.1})
    row[0, END] = -1e9
    found = all_sequences(row, num_beams=3, stop_rule="exact", num_return_sequences=3)
    ended = [END in tokens[1:] for tokens in found.tokens[0].tolist()]
    assert ended == sorted(ended, reverse=True)
    assert (found.scores > -100).all()


@pytest.mark.parametrize(
    ("num_beams", "returned", "message"),
    [
        (0, 1, "--num_beams 0: must be between 1 and the vocabulary's 340 tokens"),
        (341, 1, "--num_beams 341"),
        (3, 4, "--num_return_sequences 4: must be between 1 and --num_beams 3"),
    ],
)
def test_numbers_of_beams_that_cannot_be_are_refused(model, num_beams, returned, message):
    with pytest.raises(InputError, match=message):
        generation.search(model.captioner, None, None, num_beams=num_beams, num_return_sequences=returned)
