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
    """One column of the table; where a choice is not given, that of `published`."""

    name: str
    # `replica_means` averages sum(loss x mask) / sum(mask) over the replicas; `tokens` divides the sum over all of them
    # by the number of all unmasked tokens.
    loss_reduction: LossReduction = "replica_means"
    # `2022` decays all but biases and BART's LayerNorm names; the other spares every LayerNorm.
    decay_mask: DecayMask = "2022"
    threefry_partitionable: bool = False  # which of JAX's two random streams (`jax_threefry_partitionable`)
    shuffle_without_blocks: bool = False  # whether `--block_size 0` shuffles; the example then trains in file order
    convert_to_rgb: bool = False  # training images of other modes, instead of dropping their rows
    convert_evaluated_to_rgb: bool = False  # likewise those that are evaluated and predicted
    turn_upright: bool = False  # photographs as their EXIF says, instead of looking at them as they are stored
    keep_incomplete_batch: bool = False  # pad and mask the last evaluation batch, instead of dropping it
    token_eval_loss: bool = False  # the evaluation loss per token, instead of the plain mean of the batches' losses
    stop_rule: StopRule = "2022"  # when beam search ends (`repro.models.beam_search`)
    generate_per_image: bool = False  # generate once for each distinct image, instead of once for each row
    always_evaluate_at_end: bool = False  # evaluate and save at the end of training whatever `--eval_steps` says


PUBLISHED = Protocol("published")
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
    turn_upright=True,
    keep_incomplete_batch=True,
    token_eval_loss=True,
    stop_rule="exact",
    generate_per_image=True,
    always_evaluate_at_end=True,
)
PROTOCOLS = {protocol.name: protocol for protocol in (PUBLISHED, CURRENT, EXACT)}
# The values that a switch can be given, by how they are written.
SWITCHES: dict[str, dict[str, Any]] = {
    name: {str(value).lower(): value for value in get_args(kind) or (False, True)}
    for name, kind in get_type_hints(Protocol).items()
    if name != "name"
}


def protocol_named(text: str) -> Protocol:
    """Look a protocol up by the value of `--protocol`: a name, then switches that differ, `published,stop_rule=exact`.

    Raises:
        InputError: there is no such name, switch or value.
    """
    name, *changes = text.split(",")
    if name not in PROTOCOLS:
        raise InputError(f"--protocol {name!r}: choose one of {', '.join(PROTOCOLS)}.")
    changed = {}
    for switch, _, value in (change.partition("=") for change in changes):
        if switch not in SWITCHES:
            raise InputError(f"--protocol: unknown switch {switch!r}; there are {', '.join(SWITCHES)}.")
        if value not in SWITCHES[switch]:
            raise InputError(f"--protocol: {switch}={value}: choose one of {', '.join(SWITCHES[switch])}.")
        changed[switch] = SWITCHES[switch][value]
    return replace(PROTOCOLS[name], **changed, name=text) if changes else PROTOCOLS[name]
