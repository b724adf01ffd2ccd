"""A stand-in for COCO 2017, and for a ViT-B/16 with a GPT-2, where neither the data nor the weights are at hand.

Like COCO: the layout, the number of images and captions (in proportion, where fewer images are asked for), captions
per image (5, of a few 6 or 7), words per caption, how often the n-th word occurs, the order of the annotations (an
image's captions lie within some 70 rows of each other), the pictures' sizes, 227 grayscale images of five captions each
among those that train, and of the JPEGs the bytes (mean 162 kB, standard deviation 63 kB), sampling (4:4:4) and quality
(96 or 90), and so the time that decoding one takes. Unlike COCO: the pictures are noise with a photograph's spectrum,
cut from a few large ones, and show nothing; the captions are drawn word by word, know nothing of the picture, and can
be learned only as frequencies; most words are made up. No two files have the same bytes.

Every picture depends on its number alone, so that a stand-in that was ended is gone on with, and a small one grows.
The tokenizer is a byte-level BPE of the captions, filled up to GPT-2's 50,257 entries with words that never occur. It
makes 13.3 tokens of a caption, GPT-2's of COCO's 14.0, the space and the end token after it included.

Figures without another source are those of val2017's captions file and, for the JPEGs, of 239 of COCO's photographs.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from functools import lru_cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

TRAIN_IMAGES, TRAIN_ROWS, VAL_IMAGES, VAL_ROWS = 118_287, 591_753, 5_000, 25_014
GRAYSCALE_EVERY = 521
"""227 of 118,287 images are grayscale, 1,135 captions: 590,618 rows are left of the published run's."""
SMALLEST_VAL = 64
"""Images, whose captions fill an evaluation batch of 256 rows."""
SPLITS = ("train", "val")
FIRST_ID = {"train": 1, "val": 1_000_001}
ORDER_ROWS = 72
"""Rows among which an image's captions lie: half of val2017's images have theirs within 48."""

SIZES = {
    **{(640, 480): 1061, (640, 427): 606, (480, 640): 336, (500, 375): 240, (640, 426): 215, (427, 640): 171},
    **{(640, 428): 161, (640, 425): 146, (612, 612): 106, (375, 500): 94, (500, 333): 80, (426, 640): 73},
    **{(640, 640): 54, (640, 360): 53, (640, 424): 51, (428, 640): 47, (425, 640): 41, (640, 478): 35},
    **{(478, 640): 31, (333, 500): 28, (320, 240): 11},
}
"""Width and height in pixels, and how many of val2017's 5,000 images have them; the other 1,360 are like these."""
QUALITIES, SHARE_OF_FIRST = (96, 90), 0.6
POOL, POOL_SIDE = 16, 1280
CHUNK = 64
"""Images that a process makes at a time."""

WORDS = {
    **{7: 211, 8: 4073, 9: 5573, 10: 5340, 11: 3816, 12: 2470, 13: 1448, 14: 831, 15: 457, 16: 265, 17: 175, 18: 110},
    **{19: 71, 20: 47, 21: 27, 22: 25, 23: 23, 24: 11, 25: 14, 26: 5, 27: 3, 28: 3, 29: 3, 30: 2, 31: 1, 32: 1, 33: 2},
    **{34: 1, 36: 2, 38: 2, 44: 1, 50: 1},
}
"""Captions by their number of words."""
FULL_STOPS = 0.75
"""Of captions that end with one."""
RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000, 7000, 20_000)
SHARES = (
    *(0.158, 0.0348, 0.033, 0.0293, 0.0112, 0.00544, 0.00261, 0.00143, 7.43e-4, 2.22e-4, 7.28e-5, 2.3e-5, 7.7e-6),
    *(3.8e-6, 5e-7),
)
"""Of all words, by rank; between these ranks the logarithms lie on lines. The last is made up."""
COMMON = (
    "a",
    "on",
    "of",
    "the",
    "in",
    "with",
    "and",
    "is",
    "to",
    "man",
    "sitting",
    "an",
    "two",
    "standing",
    "people",
    "at",
)

VOCABULARY = 50_257
END_OF_TEXT = "<|endoftext|>"
BPE_CAPTIONS = 100_000
"""From which the tokenizer is made."""


class Picture(NamedTuple):
    """What an image is cut from, and how it is written."""

    source: int
    left: float
    top: float
    mirrored: bool
    size: tuple[int, int]
    quality: int
    grayscale: bool


def picture_of(split: str, number: int) -> Picture:
    """Draw the picture of an image of a split, counted from 0."""
    random = np.random.default_rng((SPLITS.index(split), number))
    sizes, weights = list(SIZES), np.cumsum(list(SIZES.values()))
    size = sizes[int(np.searchsorted(weights, random.random() * weights[-1], side="right"))]
    left, top, quality = random.random(3)
    return Picture(
        source=int(random.integers(POOL)),
        left=left,
        top=top,
        mirrored=bool(random.integers(2)),
        size=size,
        quality=QUALITIES[int(quality >= SHARE_OF_FIRST)],
        grayscale=is_grayscale(number),
    )


def is_grayscale(number: int) -> bool:
    return number % GRAYSCALE_EVERY == GRAYSCALE_EVERY - 1


@lru_cache(maxsize=POOL)
def source_picture(source: int) -> np.ndarray:
    """Make uint8[1280,1280,3]: noise whose power falls with frequency as a photograph's, with grain."""
    random, side = np.random.default_rng(source), POOL_SIDE
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1

    def noise(power: float) -> np.ndarray:
        waves = np.fft.rfft2(random.standard_normal((side, side), dtype=np.float32)) / frequency**power
        waves[0, 0] = 0
        values = np.fft.irfft2(waves, s=(side, side))
        return values / values.std()

    # These numbers give COCO's bytes and spread at its qualities; see the test.
    power = random.uniform(1.0, 1.5)
    grey = 128 + 55 * noise(power) + random.standard_normal((side, side)) * random.uniform(0, 4)
    red, blue = 18 * noise(power + 0.3), 18 * noise(power + 0.3)
    rgb = np.stack([grey + red, grey - 0.4 * (red + blue), grey + blue], axis=-1)
    return rgb.clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, split: str, numbers: range) -> None:
    """Write the images of some numbers that are not there yet; each appears whole or not at all."""
    for number in numbers:
        path = folder / file_name(split, number)
        if path.exists():
            continue
        picture = picture_of(split, number)
        width, height = picture.size
        left, top = int(picture.left * (POOL_SIDE - width)), int(picture.top * (POOL_SIDE - height))
        values = source_picture(picture.source)[top : top + height, left : left + width]
        if picture.mirrored:
            values = values[:, ::-1]
        image = Image.fromarray(np.ascontiguousarray(values[..., 0] if picture.grayscale else values))
        partial_file = path.with_suffix(".partial")
        # The comment makes the bytes of each file its own.
        image.save(partial_file, "JPEG", quality=picture.quality, subsampling=0, comment=path.name)
        partial_file.rename(path)


def file_name(split: str, number: int) -> str:
    return f"{FIRST_ID[split] + number:012d}.jpg"


@lru_cache(maxsize=1)
def vocabulary() -> list[str]:
    """Give 20,000 words by rank: some of COCO's most common ones, then made-up ones."""
    syllables = [a + b for a, b in product("bdfgklmnprstvz", ("a", "e", "i", "o", "u", "en", "or", "al"))]
    made_up = ("".join(parts) for length in (2, 3) for parts in product(syllables, repeat=length))
    tail = list(islice((word for word in made_up if word not in COMMON), RANKS[-1] - len(COMMON)))
    np.random.default_rng(1).shuffle(tail)
    return [*COMMON, *tail]


def draw_captions(count: int, seed: int) -> list[str]:
    """Draw captions with COCO's lengths and word frequencies."""
    random = np.random.default_rng(seed)
    lengths = random.choice(list(WORDS), size=count, p=np.array(list(WORDS.values())) / sum(WORDS.values()))
    ranks = np.arange(1, RANKS[-1] + 1)
    shares = np.exp(np.interp(np.log(ranks), np.log(RANKS), np.log(SHARES)))
    chosen = np.searchsorted(np.cumsum(shares) / shares.sum(), random.random(int(lengths.sum())), side="right")
    words, ends, stops = vocabulary(), np.cumsum(lengths).tolist(), random.random(count) < FULL_STOPS
    places = np.minimum(chosen, RANKS[-1] - 1).tolist()
    captions = []
    for start, end, stop in zip([0, *ends], ends, stops.tolist(), strict=False):
        text = " ".join([words[place] for place in places[start:end]])
        captions.append(text[0].upper() + text[1:] + "." * stop)
    return captions


def captions_per_image(num_images: int, num_rows: int) -> np.ndarray:
    """Give int64[M], which add up to the rows: 5 of each image, of some 6, of one in fourteen of these 7."""
    counts = np.full(num_images, 5)
    extra = num_rows - 5 * num_images
    sevens = extra // 14
    in_colour = np.flatnonzero([not is_grayscale(number) for number in range(num_images)])
    chosen = in_colour[np.linspace(0, len(in_colour) - 1, extra - sevens).astype(int)]
    counts[chosen] += 1
    counts[chosen[:sevens]] += 1
    return counts


def write_annotations(folder: Path, split: str, num_images: int, num_rows: int) -> list[str]:
    """Write a split's captions file; returns the captions."""
    pictures = [picture_of(split, number) for number in range(num_images)]
    images = [
        {
            "license": 1,
            "file_name": file_name(split, number),
            "height": picture.size[1],
            "width": picture.size[0],
            "id": FIRST_ID[split] + number,
        }
        for number, picture in enumerate(pictures)
    ]
    image_of_row = np.repeat(np.arange(num_images), captions_per_image(num_images, num_rows))
    random = np.random.default_rng((len(SPLITS), SPLITS.index(split)))
    order = np.argsort(np.arange(num_rows) + random.uniform(0, ORDER_ROWS, num_rows), kind="stable")
    captions = draw_captions(num_rows, SPLITS.index(split))
    content = {
        "info": {"description": "A stand-in for COCO 2017 that shows nothing", "year": 2017},
        "licenses": [{"id": 1, "name": "Public domain", "url": ""}],
        "images": images,
        "annotations": [
            {"image_id": FIRST_ID[split] + image, "id": row, "caption": caption}
            for row, (image, caption) in enumerate(zip(image_of_row[order].tolist(), captions, strict=True), 1)
        ],
    }
    path = folder / "annotations" / f"captions_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return captions


def counts_of(num_images: int) -> dict[str, tuple[int, int]]:
    """Give images and rows of each split for so many training images, in COCO's proportions."""
    val = max(round(num_images * VAL_IMAGES / TRAIN_IMAGES), SMALLEST_VAL)
    return {
        "train": (num_images, round(num_images * TRAIN_ROWS / TRAIN_IMAGES)),
        "val": (val, round(val * VAL_ROWS / VAL_IMAGES)),
    }


def write_data(folder: Path, num_images: int, num_processes: int) -> dict[str, Any]:
    """Write the data in COCO's layout, unless they are there; returns their counts."""
    marker, counts = folder / "stand_in.json", counts_of(num_images)
    settings = {"images": num_images, "counts": {split: list(pair) for split, pair in counts.items()}}
    if marker.is_file() and json.loads(marker.read_text()) == settings:
        return settings["counts"]
    marker.unlink(missing_ok=True)
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        for split, (images, _) in counts.items():
            part = folder / f"{split}2017"
            part.mkdir(parents=True, exist_ok=True)
            chunks = [range(start, min(start + CHUNK, images)) for start in range(0, images, CHUNK)]
            for done, _ in enumerate(pool.imap_unordered(partial(write_pictures, part, split), chunks), 1):
                if done % 100 == 0:
                    print(f"{split}: {done * CHUNK} of {images} images", flush=True)
    for split, (images, rows) in counts.items():
        write_annotations(folder, split, images, rows)
    marker.write_text(json.dumps(settings))
    return settings["counts"]


def write_tokenizer(folder: Path, captions: list[str], size: int) -> None:
    """Write a tokenizer of `size` entries, of which the last is the end token."""
    from tokenizers import Tokenizer
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = (f"{caption.lower()} " for caption in captions)
    bpe.train_from_iterator(texts, vocab_size=size - 1, special_tokens=[], show_progress=False)
    content = json.loads(bpe._tokenizer.to_str())
    entries = content["model"]["vocab"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    unused = ("Ġ" + "".join(parts) for length in (3, 4) for parts in product(letters, repeat=length))
    while len(entries) < size - 1:
        entries.setdefault(next(unused), len(entries))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert tokenizer.get_vocab_size() == size
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)


def write_halves(folder: Path, *, smoke: bool) -> None:
    """Write configurations of ViT-B/16 and GPT-2, or of two very small halves, with image processor and tokenizer."""
    from transformers import GPT2Config, ViTConfig, ViTImageProcessor

    encoder, size, decoder_sizes = ViTConfig(), VOCABULARY, {}
    if smoke:
        encoder = ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32
        )
        size, decoder_sizes = 1000, {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    shutil.rmtree(folder, ignore_errors=True)
    encoder.save_pretrained(folder / "encoder")
    side = encoder.image_size
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder / "encoder")
    write_tokenizer(folder / "decoder", draw_captions(1000 if smoke else BPE_CAPTIONS, seed=2), size)
    GPT2Config(vocab_size=size, bos_token_id=size - 1, eos_token_id=size - 1, **decoder_sizes).save_pretrained(
        folder / "decoder"
    )
