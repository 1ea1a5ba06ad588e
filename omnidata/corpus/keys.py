"""What a key that nobody reads may hold: nothing, a picture, or something to name in the report.

A record's keys are somebody else's choice. Those that no reader took are looked at once more, so that no
picture, video or sound is lost and no word against learning a text is overheard::

    {"bbox": [1, 2, 3, 4]}            an annotation: counted, and named once in the build's report
    {"image_path": "7.jpg"}           media by its name and value: the record is refused (unread_media)
    {"extra": {"shot": "7.png"}}      media by its value, wherever it is nested
    {"rejected": "…"}                 says that not all of the text is to be learned: refused (unread_content)

``--image-key NAME`` makes a key one of those that hold pictures.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from omnidata.schema import RejectError

# Words of a key's name that speak of media; ``image`` and ``image_id`` are told apart by their last word.
_MEDIA_WORDS = frozenset(
    (
        *("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos"),
        *("pixel", "pixels", "screenshot", "screenshots", "thumbnail", "thumbnails", "frame", "frames"),
        *("figure", "figures", "diagram", "chart", "scan", "scans", "page", "pages", "media", "medias"),
        *("video", "videos", "movie", "gif", "jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp"),
        *("clip", "clips"),
        *("audio", "audios", "sound", "sounds", "speech", "voice", "wav", "mp3", "mp4", "flac"),
        *("ogg", "webm", "pdf"),
        *("attachment", "attachments", "depth", "mask", "masks", "visual", "visuals"),
    )
)
# Words that also count or measure: a number under them is a number.
_WEAK_WORDS = frozenset(("page", "pages", "frame", "frames", "clip", "clips", "figure", "figures", "chart"))
# A name that ends in one of these tells something about media and does not hold any.
_ABOUT_WORDS = frozenset(
    (
        *("id", "ids", "idx", "index", "indices", "size", "sizes", "width", "height", "resolution", "shape"),
        *(
            "count",
            "counts",
            "num",
            "number",
            "caption",
            "captions",
            "description",
            "text",
            "title",
            "license",
        ),
        *(
            "source",
            "author",
            "type",
            "format",
            "mode",
            "hash",
            "md5",
            "sha",
            "sha1",
            "sha256",
            "phash",
            "score",
        ),
        *("scores", "similarity", "label", "labels", "category", "categories", "class", "tag", "tags", "key"),
        *("dataset", "split", "quality", "aesthetic", "nsfw", "aspect", "ratio", "duration", "fps", "date"),
        *("question", "answer", "prompt", "language", "lang", "relevance", "min", "max", "mean", "status"),
        *("dependency", "correspondence", "ratings", "rating", "exif", "meta", "metadata", "info", "seconds"),
    )
)
_ADDRESS_WORDS = frozenset(("url", "uri", "link", "path", "file", "filename", "name", "href"))
# A key of only these words may say where the record's own pictures came from.
_ORIGIN_WORDS = _ADDRESS_WORDS | frozenset(
    (
        *("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "file", "files"),
        *(
            "source",
            "src",
            "original",
            "origin",
            "local",
            "full",
            "coco",
            "flickr",
            "web",
            "page",
            "filenames",
        ),
    )
)
_MOVES = re.compile(r"\.(?:mp4|mkv|avi|mov|webm|wav|mp3|flac|ogg|opus|m4a|aac|pdf)\b", re.IGNORECASE)
MAX_WORDS_OF_A_NAME = 6
_MEDIA_FILE = re.compile(
    r"\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|heif|jp2|jxl|ppm|pgm|svg|ico|dcm|"
    r"pdf|mp4|mkv|avi|mov|webm|mpe?g|m4v|flv|wmv|wav|mp3|flac|ogg|opus|m4a|aac)(?:[?#]\S*)?\s*$",
    re.IGNORECASE,
)
_MEDIA_URI = re.compile(r"data:(?:image|video|audio)/", re.IGNORECASE)
_MEDIA_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD|SUkqA|TU0AK|Qk)[A-Za-z0-9+/]{16,}")

# Keys that say which texts are good, or that there is more to the conversation than its turns.
_VERDICTS = frozenset(
    (
        *(
            "chosen",
            "rejected",
            "rejected_response",
            "rejected_messages",
            "rejected_images",
            "rejected_answer",
        ),
        *("chosen_response", "prefer", "preference", "preferred", "better", "winner", "history", "functions"),
        *("margin", "completion", "completions", "responses", "candidates", "loss_weight", "loss_scale"),
        *("loss_mask", "loss_masks", "negative", "negative_response", "bad_response", "worse", "loser"),
    )
)


# Of a whole record (KTO's label, and the switches of turns): off means that it is not to be learned.
_SWITCHES = frozenset(
    (
        *(
            "label",
            "weight",
            "loss",
            "train",
            "is_train",
            "use",
            "keep",
            "desirable",
            "is_desirable",
            "is_good",
        ),
        *("accepted", "is_accepted", "correct", "is_correct", "valid", "is_valid"),
    )
)
# Of a turn or a part of its content; those of turns that are obeyed are read before (turns.py).
_TURN_SWITCHES = frozenset(
    (
        *(
            "supervise",
            "do_supervise",
            "mask",
            "masked",
            "is_masked",
            "supervised",
            "is_supervised",
            "trainable",
            "train_on",
            "learn",
        ),
        *("is_train", "do_train", "no_train", "skip", "ignore", "train_detail", "loss_on", "label"),
        *("weight", "loss", "train", "training", "train_on_turn", "learnable", "no_loss", "is_loss"),
        *("has_loss", "use_loss", "compute_loss", "in_loss", "include_in_loss", "loss_enabled"),
    )
)


class KeyCheck:
    """Looks at what no reader took; ``counted`` afterwards holds the names to report, each once.

    ``known_paths`` are those of the record's own pictures: a key that repeats one hides nothing. Nor does the
    address of pictures that came as bytes (``num_bytes`` of them), which is where they were found.
    """

    def __init__(self, known_paths: Iterable[str] = (), *, num_bytes: int = 0) -> None:
        self._known = [_parts(path) for path in known_paths]
        self._num_bytes = num_bytes
        self.counted: dict[str, None] = {}

    def check(self, rest: Mapping[str, object], where: str = "") -> None:
        """Refuse media and verdicts among the keys of ``rest``; remember every other that holds something.

        ``where`` is put before the names: ``"messages."`` for keys of turns.
        """
        for key, value in rest.items():
            if is_empty(value):
                continue
            name = f"{where}{key}"
            is_switch = bool(where) and _is_switch(str(key), value)
            if _holds_verdict(str(key), value) or is_switch or (not where and _is_off(str(key), value)):
                column = f", or keep it as a column to choose by: --keep-column {shlex.quote(name)}"
                raise RejectError(
                    "unread_content",
                    f"the key {name!r} ({shown(value)}) says that not all of the text is to be learned; "
                    f"leave such records out, take the key away if it says nothing{'' if where else column}",
                )
            if self._is_media(str(key), value):
                raise RejectError(
                    "unread_media",
                    f"the key {name!r} ({shown(value)}) may hold a picture, video or sound and is not read; "
                    f"give --image-key {shlex.quote(str(key))} if it holds pictures, or take the key away",
                )
            self.counted[name] = None

    def _is_media(self, key: str, value: object) -> bool:
        if self._is_origin(key, value):
            return False
        if any(self._is_media_value(leaf) for leaf in _leaves(value)):
            return True
        words = _words(key)
        if not _MEDIA_WORDS.intersection(words) or (words and words[-1] in _ABOUT_WORDS):
            return False
        is_clear = bool(_MEDIA_WORDS.difference(_WEAK_WORDS).intersection(words))
        return any(self._could_be_media(leaf, is_clear) for leaf in _leaves(value))

    def _is_origin(self, key: str, value: object) -> bool:
        """Is it where the record's own bytes came from, say ``url`` beside a picture in a tar?"""
        words = _words(key)
        if not words or not _ORIGIN_WORDS.issuperset(words) or re.search(r"\d", key):
            return False
        leaves = [leaf for leaf in _leaves(value) if not is_empty(leaf)]
        if not all(isinstance(leaf, str) and len(leaf) < 4096 and not _MOVES.search(leaf) for leaf in leaves):
            return False
        if words[-1] in _ADDRESS_WORDS and len(leaves) <= self._num_bytes:
            return True
        return bool(leaves) and all(self._is_known(leaf, words) for leaf in leaves)

    def _is_known(self, path: str, words: list[str]) -> bool:
        """Is it one of the record's pictures: more or less of its path, or its name at an address?

        The same name in another folder (``depth/0.png`` beside ``images/0.png``) is another picture.
        """
        mine = _parts(path)
        for known in self._known:
            length = min(len(mine), len(known))
            if length and mine[-length:] == known[-length:]:
                return True
            if length and words[-1] in ("url", "uri", "link", "href") and mine[-1] == known[-1]:
                return True
        return False

    def _could_be_media(self, value: object, is_clear: bool) -> bool:
        """Under a name of media: any text or bytes."""
        is_text = isinstance(value, str) and (is_clear or not re.fullmatch(r"[\d\s.,:+-]*", value))
        return is_text or isinstance(value, bytes)

    def _is_media_value(self, value: object) -> bool:
        if isinstance(value, bytes | bytearray | memoryview):
            return len(value) > 0
        if not isinstance(value, str):
            return False
        if _MEDIA_FILE.search(value) and "\n" not in value.strip() and len(value) < 4096:
            return len(value.split()) <= MAX_WORDS_OF_A_NAME  # else a sentence that ends in a file's name
        return bool(_MEDIA_URI.match(value) or _MEDIA_BASE64.match(value))


def _holds_verdict(key: str, value: object) -> bool:
    """Is the key, or one inside its value, a word on which texts are good?"""
    left = [(key, value)]
    while left:
        name, inner = left.pop()
        if _spelt(name) in _VERDICTS and not is_empty(inner):
            return True
        if isinstance(inner, Mapping):
            left += [(str(other), more) for other, more in inner.items()]
        elif isinstance(inner, list | tuple):
            left += [("", more) for more in inner]
    return False


def _is_off(key: str, value: object) -> bool:
    """Does a record's own switch say no? A number does so only as a weight: ``label: 0`` may be a class."""
    key = _spelt(key)
    if key in ("weight", "loss") and isinstance(value, int | float):
        return value == 0
    return key in _SWITCHES and (value is False or _says(value, "false", "no"))


def _is_switch(key: str, value: object) -> bool:
    """Does a key of a turn or part say whether that is to be learned?"""
    return _spelt(key) in _TURN_SWITCHES and (
        isinstance(value, bool | int | float) or _says(value, "false", "no", "true", "yes")
    )


def _says(value: object, *words: str) -> bool:
    return isinstance(value, str) and value.strip().lower() in words


@lru_cache(maxsize=4096)
def _spelt(key: str) -> str:
    """``isMasked``, ``Is-Masked`` -> ``is_masked``."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower().replace("-", "_")


def is_empty(value: object) -> bool:
    """Holds nothing: null, "", [], {}, or a container of nothing but those."""
    if value is None or isinstance(value, str | bytes):
        return not value
    if isinstance(value, Mapping):
        return all(is_empty(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(inner) for inner in value)
    return False


def shown(value: object) -> str:
    """A value for a message, short."""
    text = f"<{len(value)} bytes>" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _leaves(value: object) -> Iterator[Any]:
    """Every value that is no container, however deep, without recursion."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        else:
            yield value


def _words(key: str) -> list[str]:
    """``imagePath_0`` -> ["image", "path"]: words in lower case, numbers left out."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", key)
    return [word.lower() for word in re.findall(r"mp[34]|sha\d+|md5|[A-Za-z]+", spaced)]


def _parts(path: str) -> list[str]:
    """The names of a path or URL: ``./coco/7.jpg?x`` -> ["coco", "7.jpg"]."""
    return [part for part in re.split(r"[/\\]+", path.partition("?")[0]) if part not in ("", ".")]
