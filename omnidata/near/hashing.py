"""Hashes that stay nearly the same when a picture or a text is changed a little (extra: near).

A picture's is imagehash's phash of 16 × 16 low frequencies of its greys: another size, format, quality or
brightness flips a few of its 256 bits; unrelated photographs differ in about half. Beside it stand the mean
colours of its quarters (Cb and Cr, a byte each): a colour wheel is not the photograph of a retina.

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
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from omnidata.schema import RejectError, UserError

if TYPE_CHECKING:
    from omnidata.schema import Conversation, EncodedImage, Message

NUM_NUMBERS = 64  # of a text's MinHash
IMAGE_WORDS = 5  # uint64 of a picture's hash: 256 bits of greys, then eight bytes of colours
NUM_BITS = 256
MAX_COLOUR = 24  # of 255: more between two quarters, and the pictures are not alike
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
    """80 hex digits of an encoded picture.

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
            greys = str(imagehash.phash(shown.convert("L"), hash_size=16))
            quarters = shown.resize((2, 2), Image.Resampling.BOX).convert("YCbCr")
            return greys + np.asarray(quarters)[..., 1:].tobytes().hex()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RejectError("image_corrupt", f"the picture does not decode: {error}") from error


def _on_white(picture: object) -> object:
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
    """Bits in which hashes differ, NUM_BITS where colours do; broadcasts over all but the last axis."""
    bits = np.bitwise_count(first[..., :-1] ^ second[..., :-1]).sum(axis=-1, dtype=np.int64)
    return np.where(same_colours(first, second), bits, NUM_BITS)


def same_colours(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """bool: are the colours of two pictures' quarters near? Broadcasts as ``distances``."""
    colours = [np.ascontiguousarray(each[..., -1:]).view(np.uint8) for each in (first, second)]
    apart = np.maximum(*colours) - np.minimum(*colours)
    return apart.max(axis=-1) <= MAX_COLOUR


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


def _json(value: Any) -> str:
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
