"""Eight CPU devices, strict ranks, a reproducible hypothesis: what makes silence impossible."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before JAX starts: the number of devices cannot be changed afterwards. Most of the tests' time is XLA's, and most of
# that goes into making small programs faster than they need to be; tox's other environments leave these flags out.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
if "AS_USERS_COMPILE" not in os.environ:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The workers, the processes that tests start and the runs that they repeat compile the same programs: once is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="repro-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest
import transformers
from hypothesis import settings

from repro.data import sources
from repro.data.rows import Rows
from repro.recipes import read_recipe
from repro.recipes.selftest import GOLDEN
from repro.run import build
from repro.training import steps

# A broadcast between ranks that nobody has written is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("repro", database=None, derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repro")

# Each has a tox environment in which its tests must run: `tests`, `torch`, `browser` and `tpu`.
collect_ignore = []
if not hasattr(transformers, "FlaxVisionEncoderDecoderModel"):
    collect_ignore.append("test_flax_class.py")
if importlib.util.find_spec("torch") is None:
    collect_ignore += ["test_torch.py", "test_walk.py"]
if importlib.util.find_spec("playwright") is None:
    collect_ignore.append("test_report_browser.py")
if importlib.util.find_spec("libtpu") is None:
    collect_ignore.append("test_topology.py")

ENCODER, DECODER = "google/vit-base-patch16-224-in21k", "gpt2"
"""Of the documented command."""


_kept = tempfile.TemporaryDirectory(prefix="repro-kept-")


def new_folder() -> Path:
    """A folder that nothing was put into, for a test that does not look at it."""
    return Path(tempfile.mkdtemp(dir=_kept.name))


def load_splits(**options: Any) -> dict[str, Rows]:
    """`repro.data.sources.load_splits`; without a `rows_dir` nothing that was read before is found again."""
    return sources.load_splits(**{"rows_dir": new_folder(), **options})


def tiny_pocket() -> dict[str, Any]:
    """The pocket recipe with a model of two narrow layers."""
    recipe = read_recipe("pocket")
    recipe["model"]["encoder"] |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    recipe["model"]["decoder"] |= {"n_embd": 32, "n_layer": 1, "n_inner": 64}
    return recipe


def pytest_collection_finish() -> None:
    """Have Python's collector leave alone what libraries made, which all stays: a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Undo what a command does to the log: pytest would attach itself to one that does not propagate."""
    yield
    logger = logging.getLogger("repro")
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """Let a test change what compiled functions call: those that were built before it, and in it, are not shared."""
    shared = (steps.make_train_step, build._eval_functions)
    for functions in shared:
        functions.cache_clear()
    yield
    for functions in shared:
        functions.cache_clear()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this call of pytest, the same for all its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="module")
def flax_classes_promote_ranks() -> Iterator[None]:
    """Let transformers' Flax classes broadcast between ranks, as they do in every embedding."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def golden_inputs() -> Path:
    """The folder of the goldens' images, rows and tiny model."""
    return GOLDEN / "inputs"


@pytest.fixture(scope="session")
def tokenizer(golden_inputs: Path):
    """The goldens' byte-level BPE, padding with its eos token like GPT-2."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(golden_inputs / "model")
    loaded.pad_token = loaded.eos_token
    return loaded


@pytest.fixture(scope="session")
def image_processor(golden_inputs: Path):
    """The goldens' ViTImageProcessor, 32 pixels a side."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor.from_pretrained(golden_inputs / "model")


@pytest.fixture
def halves(tmp_path: Path, golden_inputs: Path) -> dict[str, str]:
    """Folders with the weights of a tiny ViT and a tiny GPT-2, by the names that the command has for the real ones."""
    from transformers import AutoTokenizer, GPT2Config, ViTConfig, ViTImageProcessor

    from repro.models.pretrained import Options, Source, create_model
    from repro.models.weights import save_weights

    config = json.loads((golden_inputs / "model" / "config.json").read_text())
    encoder, decoder = tmp_path / "encoder", tmp_path / "decoder"
    ViTConfig(**config["encoder"]).save_pretrained(encoder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(encoder)
    settings = config["decoder"] | {"is_decoder": False, "add_cross_attention": False}
    GPT2Config(**settings).save_pretrained(decoder)
    AutoTokenizer.from_pretrained(golden_inputs / "model").save_pretrained(decoder)
    random = create_model(Source(None, str(encoder)), Source(None, str(decoder)), Options(seed=1)).params
    save_weights(random["encoder"], encoder)
    blocks = random["decoder"]["transformer"]["h"]
    for block in blocks.values():  # a GPT-2 as published has none
        del block["crossattention"], block["ln_cross_attn"]
    save_weights(random["decoder"], decoder)
    return {ENCODER: str(encoder), DECODER: str(decoder)}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs, captions and tokenizers; they may not be copied into the project."""
    folder = os.environ.get("REPRO_REAL_DATA")
    if not folder:
        pytest.skip("REPRO_REAL_DATA does not name the folder of real data")
    return Path(folder)
