"""Weights in files: Flax's msgpack and PyTorch's safetensors, for whole models and for their halves.

A parameter is named by its path in the tree, joined by dots. PyTorch's names differ in the last part (`weight` for
`kernel`, `scale` and `embedding`), and its layout in the order of a kernel's axes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import xxhash
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file
from transformers.utils import cached_file

from repro.data.atomic import check_plain_names
from repro.errors import InputError
from repro.json_files import keys, read_json
from repro.limits import SETTINGS_BYTES, WEIGHTS_BYTES, size_of

Params = Any
Weights = dict[str, np.ndarray]

FLAX_FILE = "flax_model.msgpack"
SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
FLAX_INDEX = "flax_model.msgpack.index.json"
INDEX = keys(weight_map=dict[str, str])
PICKLE_FILE = "pytorch_model.bin"
Format = Literal["msgpack", "safetensors", "pickle"]

# What a file holds, as the prefix of its parameters in the whole tree.
WHOLE, ENCODER, DECODER = "", "encoder.", "decoder."
# Constants that PyTorch's models keep among their weights.
BUFFERS = re.compile(r"(^|\.)((cross)?attn|crossattention)\.(masked_)?bias$|(^|\.)position_ids$")
# What other tasks put on a ViT or a GPT-2.
HEADS = re.compile(r"^(classifier|score|qa_outputs|multiple_choice_head|lm_head|decoder)\.|(^|\.)mask_token$")
# Weights that a half was trained without, and the pooler, whose output no captioner uses.
MAY_BE_MISSING = re.compile(r"crossattention\.|ln_cross_attn\.|enc_to_dec_proj\.|^encoder\.pooler\.")
LISTED = 20
TO_TORCH, FROM_TORCH = (3, 2, 0, 1), (2, 3, 1, 0)  # axes of a convolution: [h,w,in,out] and [out,in,h,w]


def load_weights(
    path: str, initial: Callable[[], Params], *, holds: str = WHOLE, form: Format | None = None, **hub: Any
) -> tuple[Params, list[str]]:
    """Load a model's weights, or those of one half, into the whole model's tree.

    Args:
        path: folder or Hub id. Of a folder's formats, the first of msgpack, safetensors, pickle is read, and msgpack
            and safetensors must hold the same.
        initial: makes the whole tree with random weights; cross-attention that the file lacks is taken from it.
        holds: `WHOLE`, `ENCODER` or `DECODER`.
        form: the only format to look for; None for any.
        **hub: cache_dir, token.

    Returns:
        (float32 parameters of what the file holds, names of the weights that were random instead).

    Raises:
        InputError: there is no weight file, two of them differ, or weights are missing, unexpected, misshapen or not
            finite.
    """
    shapes = {name: leaf for name, leaf in flatten(jax.eval_shape(initial)).items() if name.startswith(holds)}
    files = _read(path, hub, form, WEIGHTS_BYTES + sum(4 * leaf.size for leaf in shapes.values()))
    file, weights = next(files)
    found, unexpected = _as_named(weights, shapes, holds, is_flax=file.name == FLAX_FILE)
    for other, weights in files:
        again, _ = _as_named(weights, shapes, holds, is_flax=False)
        same = {name for name in found.keys() & again if np.array_equal(found[name], again[name], equal_nan=True)}
        if differ := sorted((found.keys() | again) - same):
            raise InputError(
                f"{file}: and {other.name} hold different weights ({len(differ)} of {len(found | again)}, such as"
                f" {differ[0]}), as after training on elsewhere; delete the one that is not meant, or give"
                " --weights_format msgpack or safetensors."
            )
    missing = sorted(set(shapes) - set(found))
    random = [name for name in missing if MAY_BE_MISSING.search(name)]
    read = sorted(found.items())
    misshapen = [(name, array.shape, shapes[name].shape) for name, array in read if array.shape != shapes[name].shape]
    problems = {
        "missing": [f"{name} {shapes[name].shape}" for name in missing if name not in random],
        "unexpected": [f"{name} {np.shape(array)}" for name, array in sorted(unexpected.items())],
        "of another shape": [f"{name} {shape} instead of {wanted}" for name, shape, wanted in misshapen],
        "not finite": [f"{name} {array.shape}" for name, array in read if not np.isfinite(array).all()],
    }
    parts = [f"{len(names)} {problem}: {_some(names)}" for problem, names in problems.items() if names]
    if parts:
        raise InputError(f"{file}: the weights do not fit the configuration (config.json). {'; '.join(parts)}.")
    if random:
        drawn = flatten(initial())
        found |= {name: np.asarray(drawn[name]) for name in random}
    return traverse_util.unflatten_dict(found, sep="."), random


def _as_named(weights: Weights, shapes: Mapping[str, Any], holds: str, *, is_flax: bool) -> tuple[Weights, Weights]:
    """Tell a file's weights, under the tree's names and in float32, from those that the tree does not have."""
    names = {(name if is_flax else torch_name(name)): name for name in shapes}
    found: Weights = {}
    unexpected: Weights = {}
    for name, array in _in_tree(weights, holds).items():
        if name in names:
            found[names[name]] = np.asarray(
                array if is_flax else other_layout(names[name], array, FROM_TORCH), np.float32
            )
        elif not BUFFERS.search(name) and not name.startswith("decoder.lm_head."):  # tied, the embedding again
            unexpected[name] = array
    return found, unexpected


def save_weights(params: Params, folder: Path) -> None:
    """Write a tree as `flax_model.msgpack` and, under PyTorch's names, as `model.safetensors`."""
    params = jax.tree.map(np.asarray, params)
    (folder / FLAX_FILE).write_bytes(serialization.msgpack_serialize(params))
    state = {torch_name(name): other_layout(name, array, TO_TORCH) for name, array in flatten(params).items()}
    save_file(
        {name: np.ascontiguousarray(array) for name, array in state.items()},
        folder / SAFETENSORS_FILE,
        metadata={"format": "pt"},
    )
    # safetensors makes a file that nobody else may read.
    (folder / SAFETENSORS_FILE).chmod((folder / FLAX_FILE).stat().st_mode)


def flatten(params: Params) -> dict[str, Any]:
    """A tree's leaves by their dotted paths."""
    return traverse_util.flatten_dict(params, sep=".")


def digest_of_weights(params: Params) -> str:
    """Hash a tree's values."""
    digests = (xxhash.xxh3_64_digest(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(params))
    return xxhash.xxh3_64_hexdigest(b"".join(digests))


def torch_name(name: str) -> str:
    """PyTorch's name of a parameter."""
    return re.sub(r"(?<=\.)(kernel|scale|embedding)$", "weight", name)


def other_layout(name: str, array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Turn a kernel around, dense [in,out] to [out,in], GPT-2's [out,in] to [in,out], a convolution's as `axes` say."""
    return array if not name.endswith(".kernel") else array.transpose(axes) if array.ndim == 4 else array.T


def _in_tree(weights: Weights, holds: str) -> Weights:
    """Name a half's weights as in the whole tree, whether or not the file says `vit` or `transformer`; drop heads."""
    if not holds:
        return weights
    base = {ENCODER: "vit.", DECODER: "transformer."}[holds]
    prefixed = any(name.startswith(base) for name in weights)
    named = {}
    for name, array in weights.items():
        inner = name.removeprefix(base)
        if holds == DECODER and name.startswith("lm_head."):
            named[holds + name] = array
        elif not HEADS.search(name) and not (prefixed and inner == name):
            named[holds + (inner if holds == ENCODER else base + inner)] = array
    return named


def _read(path: str, hub: Mapping[str, Any], form: Format | None, largest: int) -> Iterator[tuple[Path, Weights]]:
    def find(name: str) -> Path | None:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
        return None if found is None else Path(found)

    readers: dict[str, tuple[Format, Callable[[Path], Weights]]] = {
        FLAX_FILE: ("msgpack", lambda file: flatten(serialization.msgpack_restore(file.read_bytes()))),
        SAFETENSORS_FILE: ("safetensors", load_file),
        SAFETENSORS_INDEX: ("safetensors", partial(_read_shards, find=find, largest=largest)),
        PICKLE_FILE: ("pickle", _read_pickle),
    }
    first: Path | None = None
    for name, (kind, read) in readers.items():
        if form in (None, kind) and (first is None or kind == "safetensors") and (file := find(name)):
            first = first or file
            yield file, _checked(file, read, largest)
            if name != FLAX_FILE or not Path(path).is_dir():  # of a Hub's formats, one is enough to fetch
                return
    if first is None:
        wanted = [name for name, (kind, _) in readers.items() if form in (None, kind)]
        raise InputError(f"{path}: holds no weights; one of {', '.join(wanted)} is needed.")


def shards_of(index: Path) -> list[str]:
    """List the files that hold a model's weights together; an InputError if one could lie outside of its folder."""
    names = set(read_json(index, INDEX, largest=SETTINGS_BYTES)["weight_map"].values())
    check_plain_names(index, names)
    return sorted(names)


def _read_shards(index: Path, *, find: Callable[[str], Path | None], largest: int) -> Weights:
    weights: Weights = {}
    for name in shards_of(index):
        shard = find(name)
        if shard is None:
            raise InputError(f"{index}: names {name}, which is not there; copy all parts, or save the model again.")
        weights |= _checked(shard, load_file, largest)
        largest -= shard.stat().st_size
    return weights


def _checked(file: Path, read: Callable[[Path], Weights], largest: int) -> Weights:
    try:
        size_of(file, largest)
        return read(file)
    except InputError:
        raise
    except Exception as error:  # each format has errors of its own for a damaged file
        raise InputError(f"{file}: is damaged, or not what its name says: {error}") from error


def _read_pickle(file: Path) -> Weights:
    """Read a pickle with PyTorch's loader, which runs none of the code that a pickle may hold."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{file}: a pickle can run code when it is read, and the loader that prevents this is PyTorch's: "
            f"install torch, or save the model as {SAFETENSORS_FILE}."
        ) from error
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + f" and {len(names) - LISTED} more" * (len(names) > LISTED)
