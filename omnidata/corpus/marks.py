"""Marks in text that stand for media in other projects' data, and what they mean here.

``<image>`` and ``<image_00>`` are this project's own placeholders (images/placeholders.py). Other marks are
taken for placeholders if that is unambiguous: the record has pictures, none of them has a place yet, and the
marks are as many. Otherwise the record is refused; a foreign mark never stays as text that a model would
learn.

    Picture 1: <img>a.jpg</img>                        Qwen-VL: the path stands in the text
    <|vision_start|><|image_pad|><|vision_end|>        Qwen2-VL and later
    <|image_1|>  <image 1>  <image-1>  [IMG]  …        a mark per picture, numbered from 1 or not
    <im_start><image><im_end>                          LLaVA: goes around our own placeholder
    <video> <|audio_1|> …                              cannot be read: refused
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from omnidata.schema import RejectError

_PATH_IN_TEXT = re.compile(r"<img>(?P<path>[^<>\n]{1,4096}?)</img>")
# One match is one picture: start, any number of stand-ins, end; or the bare stand-ins, one each.
_PICTURE = re.compile(
    r"""
      <im_start>\s*(?:<im_patch>\s*)*(?:<image>)?\s*<im_end>     # LLaVA, OmniLMM
    | <\|vision_start\|>\s*(?:<\|image_pad\|>\s*)+<\|vision_end\|>   # Qwen2-VL and later
    | <img>\s*(?:<IMG_CONTEXT>\s*)*</img>                        # InternVL
    | \(?<image>\./</image>\)?                                   # MiniCPM-V 2.5, 2.6
    | <start_of_image>(?:\s*(?:<image_soft_token>\s*)+<end_of_image>)?   # Gemma 3
    | <\|(?:image|img|IMG|IMAGE|image_pad|image_soft_token|begin_of_image|imgpad)\|>
    | <\|(?:image|img)_(?P<bar>\d{1,9})\|>                       # Phi-3-vision
    | <(?:image|img|Image|IMG|IMAGE|picture)[ -](?P<number>\d{1,9})>   # MMMU, mPLUG
    | <(?:Image|IMAGE|ImageHere|image_placeholder|IMG_CONTEXT|image_token|image_soft_token|image_pad)>
    | <(?:image|img|picture)\s*/>                                # as an empty element
    | \[IMG\](?:(?:\[IMG\]|\[IMG_BREAK\])*\[IMG_END\])?          # Pixtral
    """,
    re.VERBOSE,
)
_PART_OF_PICTURE = re.compile(
    r"<im_start>|<im_end>|<im_patch>|<\|vision_(?:start|end|pad)\|>|<IMG_CONTEXT>|<image_soft_token>|"
    r"<start_of_image>|<end_of_image>|\[IMG_(?:BREAK|END)\]|<\|image_pad\|>|<fake_token_around_image>|"
    r"<\|(?:\w*_|(?:start|begin|end)of)?(?:image|img|picture|vision)(?:_\w*|s|pad)?\|>|<global-img>|<row_\d+_col_\d+>|<image_\d{10,}>|\\<\s*(?:image|img|picture|photo)\s*\d*\s*\\?>"
)
_OTHER_MEDIA = re.compile(
    r"<\|?(?P<kind>video|audio|speech|sound)(?:[_ -]?\d{1,9})?"
    r"(?:_pad|_bos|_eos|_soft_token|_token)?\|?>"
    r"|<vid>.{1,4096}?</vid>|<\|(?:\w*_)?(?:vid|video|audio|speech|sound)(?:_\w*|\d*)\|>",
    re.IGNORECASE,
)


def foreign_pictures(texts: Iterable[str]) -> list[re.Match[str]]:
    """The marks that stand for a picture each, in order, without our own ``<image>``."""
    return [match for text in texts for match in _PICTURE.finditer(text)]


def paths_in_text(text: str) -> Iterator[re.Match[str]]:
    """Qwen-VL's ``<img>path</img>``; group ``path``."""
    return _PATH_IN_TEXT.finditer(text)


def number_of(match: re.Match[str]) -> int | None:
    """The number that a mark carries: ``<|image_2|>`` -> 2, ``[IMG]`` -> None."""
    text = match.groupdict().get("bar") or match.groupdict().get("number")
    return int(text) if text else None


def refuse_other_media(texts: Iterable[str]) -> None:
    """RejectError for marks of videos and sounds; an HTML element with its end tag is text."""
    for text in texts:
        for match in _OTHER_MEDIA.finditer(text):
            if match["kind"] and f"</{match['kind']}>" in text:
                continue
            raise RejectError(
                "unread_media",
                f"{match[0][:80]!r} in the text stands for a video or sound, which cannot be read",
            )


def refuse_leftovers(texts: Iterable[str]) -> None:
    """RejectError for a mark of a picture that was not taken for one."""
    for text in texts:
        match = _PICTURE.search(text) or _PART_OF_PICTURE.search(text)
        if match or (match := _PATH_IN_TEXT.search(text)):
            raise RejectError(
                "placeholder_mismatch",
                f"{match[0][:80]!r} in the text is another project's mark of a picture and it is not certain "
                "which picture it stands for; write <image> at the place of each",
            )
