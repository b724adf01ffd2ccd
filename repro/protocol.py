"""Every numeric choice in which the example's two versions and this project differ, in one table.

`published` is the example as of January 2022, whose numbers are the ones in its documentation; `current` is its last
version (2025); `exact` is what this project computes by default: nothing dropped, nothing dependent on batch
neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from repro.errors import InputError

LossReduction = Literal["replica_means", "tokens"]
DecayMask = Literal["2022", "layer_norms"]
StopRule = Literal["2022", "current", "exact"]


@dataclass(frozen=True)
class Protocol:
    """One column of the table.

    Attributes:
        loss_reduction: `replica_means` averages sum(loss x mask) / sum(mask) over the replicas; `tokens` divides the
            sum over all replicas by the number of all unmasked tokens.
        decay_mask: `2022` decays all but biases and BART's LayerNorm names; `layer_norms` spares every LayerNorm.
        threefry_partitionable: which of JAX's two random streams (`jax_threefry_partitionable`).
        shuffle_without_blocks: whether `--block_size 0` shuffles; the example then trains in file order.
        convert_to_rgb: convert training images of other modes, instead of dropping their rows.
        convert_evaluated_to_rgb: likewise those that are evaluated and predicted.
        keep_incomplete_batch: pad and mask the last evaluation batch, instead of dropping it.
        token_eval_loss: the evaluation loss per token, instead of the unweighted mean of the batches' losses.
        stop_rule: when beam search ends (`repro.models.beam_search`).
        generate_per_image: generate once for each distinct image, instead of once for each row.
        always_evaluate_at_end: evaluate and save at the end of training whatever `--eval_steps` says.
    """

    name: str
    loss_reduction: LossReduction
    decay_mask: DecayMask
    threefry_partitionable: bool
    shuffle_without_blocks: bool
    convert_to_rgb: bool
    convert_evaluated_to_rgb: bool
    keep_incomplete_batch: bool
    token_eval_loss: bool
    stop_rule: StopRule
    generate_per_image: bool
    always_evaluate_at_end: bool


PUBLISHED = Protocol(
    name="published",
    loss_reduction="replica_means",
    decay_mask="2022",
    threefry_partitionable=False,
    shuffle_without_blocks=False,
    convert_to_rgb=False,
    convert_evaluated_to_rgb=False,
    keep_incomplete_batch=False,
    token_eval_loss=False,
    stop_rule="2022",
    generate_per_image=False,
    always_evaluate_at_end=False,
)
CURRENT = replace(
    PUBLISHED,
    name="current",
    loss_reduction="tokens",
    decay_mask="layer_norms",
    threefry_partitionable=True,
    stop_rule="current",
)
EXACT = replace(
    CURRENT,
    name="exact",
    shuffle_without_blocks=True,
    convert_to_rgb=True,
    convert_evaluated_to_rgb=True,
    keep_incomplete_batch=True,
    token_eval_loss=True,
    stop_rule="exact",
    generate_per_image=True,
    always_evaluate_at_end=True,
)
PROTOCOLS = {protocol.name: protocol for protocol in (PUBLISHED, CURRENT, EXACT)}


def protocol_named(text: str) -> Protocol:
    """Look a protocol up by the value of `--protocol`: a name, then switches that differ, `published,stop_rule=exact`.

    Raises:
        InputError: there is no such name, switch or value.
    """
    name, *changes = text.split(",")
    if name not in PROTOCOLS:
        raise InputError(f"--protocol {name!r}: choose one of {', '.join(PROTOCOLS)}.")
    changed = dict(_switch(change) for change in changes)
    return replace(PROTOCOLS[name], **changed, name=text) if changed else PROTOCOLS[name]


def _switch(change: str) -> tuple[str, Any]:
    name, _, text = change.partition("=")
    kinds = {field: kind for field, kind in get_type_hints(Protocol).items() if field != "name"}
    if name not in kinds:
        raise InputError(f"--protocol: unknown switch {name!r}; there are {', '.join(kinds)}.")
    values = {str(value).lower(): value for value in get_args(kinds[name]) or (False, True)}
    if text not in values:
        raise InputError(f"--protocol: {name}={text}: choose one of {', '.join(values)}.")
    return name, values[text]
