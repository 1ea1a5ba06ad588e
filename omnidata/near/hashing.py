"""Hashes that stay nearly the same when a picture or a text is changed a little (extra: near).

A picture's is imagehash's phash of 16 × 16 low frequencies of its greys: another size, format, quality or
brightness flips a few of its 256 bits; unrelated photographs differ in about half. Beside it stand the mean
colours of its quarters (Cb and Cr, a byte each): a colour wheel is not the photograph of a retina. And the
mean greys of 8 × 8 cells, since drawings of few frequencies leave most bits to chance, or all of them 0: all
stripes have nearly one phash, and a checkerboard's changes with its size.

A text's is datasketch's MinHash over runs of five characters, of which 16 bits are kept: the share of equal
numbers of two texts estimates the share of runs that they have in common. Beside it stands a hash of what
must be equal all the same: all digits, and replies too short for runs to tell apart.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from omnidata.schema import RejectError, UserError

if TYPE_CHECKING:
    from PIL import Image

    from omnidata.schema import Conversation, EncodedImage, Message

NUM_NUMBERS = 64  # of a text's MinHash
NUM_BITS = 256
_BITS, _COLOURS, _GREYS = slice(0, 4), slice(4, 5), slice(5, 13)  # words of a picture's hash
CELLS = 8  # a side, of greys
IMAGE_WORDS = 13  # uint64 of a picture's hash: 256 bits, then eight bytes of colours and 64 of greys
HASH_DIGITS = 16 * IMAGE_WORDS
MAX_DISTANCE = 48  # bits in which near pictures differ
MAX_COLOUR = 24  # of 255: more between two quarters, and the pictures are not alike
MAX_GREY = 64  # the same of two cells; real pictures 1.1 times as bright: at most 23
# Cells whose greys agree so well are of one picture, whatever its bits: of scikit-image's photographs, copies
# scaled and compressed have 0.994 and more, two different ones at most 0.990. Flat greys say nothing.
MIN_CORRELATION, MIN_CONTRAST = 0.995, 16
SHINGLE = 5  # characters
SHORT_REPLY = 40  # characters; up to here replies must be equal
IMAGES, TEXT = "near.images", "near.text"  # columns of the index
COLUMNS = (IMAGES, TEXT)


def check_installed() -> None:
    """UserError if the libraries are not there."""
    for name in ("datasketch", "imagehash"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing: pip install 'omnilmm-toolkit[near]'")


def near_values(talk: Conversation, images: Sequence[EncodedImage]) -> dict[str, str]:
    """The columns of a sample: the hash of each picture, and of its text."""
    return {IMAGES: " ".join(image_hash(image.data) for image in images), TEXT: text_hash(talk)}


def image_hash(data: bytes) -> str:
    """HASH_DIGITS hex digits of an encoded picture.

    Raises:
        RejectError: it does not decode.
    """
    import imagehash
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is the build's
            picture.draft("RGB", (256, 256))  # a JPEG decodes at a fraction of its size
            shown = _on_white(picture)
            grey = shown.convert("L")
            bits = str(imagehash.phash(grey, hash_size=16))
            quarters = shown.resize((2, 2), Image.Resampling.BOX).convert("YCbCr")
            cells = grey.resize((CELLS, CELLS), Image.Resampling.BOX)
            return bits + np.asarray(quarters)[..., 1:].tobytes().hex() + cells.tobytes().hex()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RejectError("image_corrupt", f"the picture does not decode: {error}") from error


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB, with what is transparent white."""
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def parse_image_hashes(texts: Sequence[str]) -> np.ndarray:
    """uint64 ``[N, IMAGE_WORDS]``."""
    raw = bytes.fromhex("".join(texts))
    return np.frombuffer(raw, ">u8").astype(np.uint64).reshape(-1, IMAGE_WORDS)


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Bits in which hashes differ; broadcasts over all but the last axis.

    NUM_BITS where colours or greys are apart, MAX_DISTANCE at most where the greys of cells agree.
    """
    first, second = np.broadcast_arrays(first, second)
    found = np.full(first.shape[:-1], NUM_BITS, np.int64)
    alike = same_colours(first, second)
    found[alike] = _distances(first[alike], second[alike])
    return found


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64 ``[N]`` of uint64 ``[N, IMAGE_WORDS]`` with the same colours."""
    bits = np.bitwise_count(first[:, _BITS] ^ second[:, _BITS]).sum(axis=1, dtype=np.int64)
    one, other = (_bytes_of(each, _GREYS).astype(np.float32) for each in (first, second))
    is_far = np.abs(one - other).max(axis=1, initial=0) > MAX_GREY
    one, other = (greys - greys.mean(axis=1, keepdims=True) for greys in (one, other))
    deviations = [np.sqrt((greys**2).mean(axis=1)) for greys in (one, other)]
    covariance = (one * other).mean(axis=1)
    agree = (covariance >= MIN_CORRELATION * deviations[0] * deviations[1]) & (
        np.minimum(*deviations) >= MIN_CONTRAST
    )
    return np.where(is_far, NUM_BITS, np.where(agree, np.minimum(bits, MAX_DISTANCE), bits))


def same_colours(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """bool: are the colours of two pictures' quarters near? Broadcasts as ``distances``."""
    colours = [_bytes_of(each, _COLOURS) for each in (first, second)]
    apart = np.maximum(*colours) - np.minimum(*colours)
    return apart.max(axis=-1) <= MAX_COLOUR


def a_colour(images: np.ndarray) -> np.int16:
    """One colour of the first of some pictures; 0 of none."""
    return np.int16(_bytes_of(images[0], _COLOURS)[0] if len(images) else 0)


def _bytes_of(hashes: np.ndarray, words: slice) -> np.ndarray:
    return np.ascontiguousarray(hashes[..., words]).view(np.uint8)


# --- texts ------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Letters and digits in lower case, one blank between words."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+", text))


def text_hash(talk: Conversation) -> str:
    """The MinHash of a conversation's texts, and what must be equal, as base64."""
    turns = [(message.role, normalise(_said(message))) for message in talk.messages]
    tools = [normalise(_json(tool)) for tool in talk.tools]
    whole = "\n".join([*(text for role, text in turns if role != "system"), *tools])
    digits = re.findall(r"\d+", whole)
    short = [text for role, text in turns if role == "assistant" and len(text) <= SHORT_REPLY]
    equal = xxhash.xxh3_64_digest(repr((digits, short)).encode())
    return base64.b64encode(equal + minhash(whole).astype("<u2").tobytes()).decode()


def _said(message: Message) -> str:
    """A turn's text with its reasoning and its calls: what differs there is another turn."""
    return " ".join([message.text, *(_json(value) for _, value in sorted(message.more.items()))])


def _json(value: object) -> str:
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    )


def minhash(text: str) -> np.ndarray:
    """uint16 ``[NUM_NUMBERS]`` of a normalised text."""
    from datasketch import MinHash

    runs = {text[at : at + SHINGLE] for at in range(max(1, len(text) - SHINGLE + 1))}
    found = MinHash(num_perm=NUM_NUMBERS, seed=1, hashfunc=_hash32)
    found.update_batch([run.encode("utf-8", "surrogatepass") for run in sorted(runs)])
    return (found.hashvalues & np.uint64(0xFFFF)).astype(np.uint16)


def _hash32(data: bytes) -> int:
    return xxhash.xxh32_intdigest(data)


def parse_text_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What must be equal, uint64 ``[N]``, and the MinHashes, uint16 ``[N, NUM_NUMBERS]``."""
    raw = np.frombuffer(b"".join(map(base64.b64decode, texts)), np.uint8)
    rows = raw.reshape(-1, 8 + 2 * NUM_NUMBERS)
    return rows[:, :8].copy().view(np.uint64).ravel(), rows[:, 8:].copy().view("<u2")
