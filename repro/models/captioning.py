"""Captions for one's own pictures: `Captioner.from_pretrained(path)(images)`."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, overload

import jax
import numpy as np
from PIL import Image

from repro.data.batches import prefetch
from repro.data.image_cache import cores, in_parallel
from repro.data.images import ImageError, Resize, in_sixteen_bits, open_image, resize_image, resize_of, upright
from repro.errors import InputError
from repro.limits import URL_SCHEMES
from repro.models.beam_search import check_beams
from repro.models.pretrained import Implementation, Options, Pretrained, load_model
from repro.models.weights import Format
from repro.parser import LARGEST

# A path, a PIL image, or an array uint8[H,W,3], [H,W,4] or [H,W].
Picture = str | os.PathLike[str] | Image.Image | np.ndarray
_Decoded = np.ndarray | ImageError

BATCH_SIZE = 8
MAX_LENGTH = 32  # tokens of a caption where the model names none: the documented run's `--max_target_length`
UNNAMED_LENGTHS = (None, 20)  # what transformers 5 and 4 give for the `max_length` of a model that names none
log = logging.getLogger("repro")


@dataclass(frozen=True)
class Caption:
    """A caption and how probable the model finds it.

    Attributes:
        caption: text without special tokens and outer blanks.
        score: sum of the generated tokens' natural log-probabilities, the end token's included, divided by their
            number ** length_penalty (1 unless the model's generation configuration says otherwise). At most 0, higher
            is better; transformers calls it `sequences_scores`. Scores of different models do not compare.
    """

    caption: str
    score: float


@dataclass(frozen=True, eq=False)
class Captioner:
    """A model that captions pictures, those of other modes converted to RGB, turned as their EXIF orientation says.

    Captions do not depend on the batch that an image is in, nor on its size: beam search stops for each image by
    itself, as under `--protocol exact`. (Scores of batches of another size differ by rounding.)

    Example:
        from repro import Captioner
        captioner = Captioner.from_pretrained("model")
        for captions in captioner(["a.jpg", "b.jpg"]):
            print(captions[0].caption, captions[0].score)
    """

    pretrained: Pretrained

    def __repr__(self) -> str:
        found, config = self.pretrained, self.pretrained.captioner.config
        names = f"{config.encoder.model_type} with {config.decoder.model_type}"
        return f"Captioner({names}, {found.num_parameters:,} parameters, up to {self.max_length} tokens)"

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        model_implementation: Implementation | None = None,
        weights_format: Format | None = None,
        cache_dir: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
    ) -> Captioner:
        """Load a model in the Hugging Face layout, such as a checkpoint of `repro train`.

        Args:
            path: folder or Hub id.
            dtype: type of the computation: float32, bfloat16 or float16.
            model_implementation: None for `native` where it knows the pair, else `transformers`.
            weights_format: of its weights, those in this format; None for any, where all hold the same.
            cache_dir, token, trust_remote_code: for models from the Hub.

        Raises:
            InputError: it is not there or not whole, or no such model.
        """
        hub = {"cache_dir": cache_dir, "token": token, "trust_remote_code": trust_remote_code}
        options = Options(implementation=model_implementation, dtype=dtype, weights_format=weights_format, hub=hub)
        pretrained = load_model(os.fspath(path), options)
        for note in pretrained.notes:
            log.warning("%s: %s", path, note)
        return cls(pretrained)

    @property
    def max_length(self) -> int:
        """Tokens of a caption where nothing else is asked, start token included.

        That is what the model's generation configuration names (`max_new_tokens`, or a `max_length` other than 20,
        which is transformers' own default), else 32; never more than the decoder has positions.
        """
        named = self.pretrained.captioner.generation_config
        length = named.max_length if named.max_length not in UNNAMED_LENGTHS else MAX_LENGTH
        if named.max_new_tokens is not None:
            length = named.max_new_tokens + 1
        return min(length, self._positions)

    @overload
    def __call__(self, images: Picture, **settings: Any) -> list[Caption]: ...
    @overload
    def __call__(self, images: Iterable[Picture], **settings: Any) -> list[list[Caption]]: ...
    def __call__(self, images: Picture | Iterable[Picture], **settings: Any) -> list[Caption] | list[list[Caption]]:
        """Caption one picture, or each of several (uint8[B,H,W,3] too).

        Args:
            settings: see `stream`.

        Returns:
            The captions of a picture, best first: a list, or a list of lists for several.

        Raises:
            ImageError: a picture cannot be used; it is named. `stream` goes on behind it.
            InputError: a setting cannot be used.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            return self([images], **settings)[0]
        found = []
        for place, (image, captions) in enumerate(self.stream(images, **settings)):
            if isinstance(captions, ImageError):
                name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {place}"
                raise ImageError(f"{name}: {captions}", passing=captions.passing) from captions
            found.append(captions)
        return found

    def stream(
        self,
        images: Iterable[Picture],
        *,
        num_beams: int | None = None,
        num_return_sequences: int = 1,
        max_length: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[tuple[Picture, list[Caption] | ImageError]]:
        """Caption pictures in their order while others are read; one that cannot be used is no end.

        Compiled once for each number of beams, sequences and tokens, and batch: fewer images than `batch_size` are one
        batch of the next power of two, and the rest of more images is filled up to a whole batch.

        Args:
            num_beams: None for the model's configuration, else 1: a greedy search.
            num_return_sequences: captions of each image, at most as many as beams.
            max_length: tokens of a caption, start token included; longer ones are cut. None for `max_length` above.

        Yields:
            Each picture with its captions, best first, or with the reason why it has none.

        Raises:
            InputError: a setting cannot be used.
        """
        config, defaults = self.pretrained.captioner.config, self.pretrained.captioner.generation_config
        num_beams = defaults.num_beams or 1 if num_beams is None else num_beams
        beams = {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
        check_beams(vocab_size=config.decoder.vocab_size, **beams)
        max_length, positions = self.max_length if max_length is None else max_length, self._positions
        if not 2 <= max_length <= positions:
            raise InputError(f"--max_length {max_length}: must be between 2 and the decoder's {positions} positions.")
        if batch_size < 1:
            raise InputError(f"--batch_size {batch_size}: must be at least 1.")
        generate = partial(self._generate, max_length=max_length, **beams)
        resize = resize_of(self.pretrained.image_processor)
        decode = partial(_decode, resize=resize, lock=threading.Lock())
        return self._batches(images, decode, generate, batch_size)

    def _batches(
        self, images: Iterable[Picture], decode: Any, generate: Any, batch_size: int
    ) -> Iterator[tuple[Picture, list[Caption] | ImageError]]:
        decoded = in_parallel(decode, images, min(cores(), batch_size))
        size = 0
        for group in prefetch(_grouped(decoded, batch_size)):
            pixels = [result for _, result in group if isinstance(result, np.ndarray)]
            captions: Iterator[list[Caption] | ImageError] = iter(())
            if pixels:
                # After a whole batch its program is there; a smaller one would have to be compiled.
                size = size or min(batch_size, 1 << (len(pixels) - 1).bit_length())
                found = generate(self._params, np.resize(np.stack(pixels), (size, *pixels[0].shape)))
                captions = self._texts(*(np.asarray(values)[: len(pixels)] for values in found))
            for image, result in group:
                yield image, result if isinstance(result, ImageError) else next(captions)

    def _texts(self, tokens: np.ndarray, scores: np.ndarray) -> Iterator[list[Caption] | ImageError]:
        """int32[B,R,L] and float32[B,R] to the captions of each image."""
        for row_tokens, row_scores in zip(tokens, scores.tolist(), strict=True):
            texts = self.pretrained.tokenizer.batch_decode(row_tokens, skip_special_tokens=True)
            if np.isfinite(row_scores).all():
                yield [Caption(text.strip(), score) for text, score in zip(texts, row_scores, strict=True)]
            else:
                yield ImageError("the model's numbers are not finite here; use dtype float32 (--dtype)")

    @property
    def _positions(self) -> int:
        return getattr(self.pretrained.captioner.config.decoder, "max_position_embeddings", None) or LARGEST

    @cached_property
    def _params(self) -> Any:
        """On the device, once."""
        return jax.device_put(self.pretrained.params)

    @cached_property
    def _generate(self) -> Any:
        captioner = self.pretrained.captioner

        def generate(params: Any, pixels: jax.Array, **settings: int) -> Any:
            memory = captioner.encode(params, pixels)
            return captioner.generate(params, memory, stop_rule="exact", group_size=1, **settings)

        return jax.jit(generate, static_argnames=("max_length", "num_beams", "num_return_sequences"))


def _grouped(decoded: Iterable[tuple[Picture, _Decoded]], batch_size: int) -> Iterator[list[tuple[Picture, _Decoded]]]:
    """Cut a stream where it has given `batch_size` images; what is not one waits for no image before it comes."""
    group: list[tuple[Picture, _Decoded]] = []
    images = 0
    for image, result in decoded:
        group.append((image, result))
        images += isinstance(result, np.ndarray)
        if images in (0, batch_size):
            yield group
            group, images = [], 0
    if group:
        yield group


def _decode(image: Picture, *, resize: Resize, lock: threading.Lock) -> _Decoded:
    """Make uint8[S,S,3] of a picture, or say why not."""
    try:
        if isinstance(image, np.ndarray):
            read = _from_array(image)
        elif isinstance(image, Image.Image):
            with lock:  # it may be given twice, and several threads decode
                image.load()
            read = in_sixteen_bits(image)
        else:
            with open_image(_file(image)) as read:
                return resize_image(upright(read), resize, convert_to_rgb=True)
        return resize_image(upright(read), resize, convert_to_rgb=True)
    except ImageError as error:
        return error
    except Exception as error:  # Pillow's readers of rare formats raise whatever comes when the content is broken
        return ImageError(f"{type(error).__name__}: {error}")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not array.size or (array.ndim != 2 and array.shape[2:] not in ((3,), (4,))):
        shape = ",".join(map(str, array.shape))
        raise ImageError(f"{array.dtype}[{shape}] is not uint8[H,W,3], [H,W,4] or [H,W]")
    return Image.fromarray(array)


def _file(image: str | os.PathLike[str]) -> str:
    if isinstance(image, str) and image.startswith(URL_SCHEMES):
        raise ImageError("is an address; save the image, and name its file")
    try:
        # Absolute, so that no name is taken for a place in an archive.
        return os.path.abspath(os.fsdecode(image))
    except (TypeError, ValueError) as error:
        raise ImageError(str(error), passing=True) from error
