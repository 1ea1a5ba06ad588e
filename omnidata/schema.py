"""THE CONTRACT: what a built dataset holds, as code.

The writer, the reader, ``inspect``, ``verify``, the planner and the loader all take the names below from
here and from nowhere else. A dataset is a directory (or an fsspec URL)::

    shards/train-00000.tar        plain USTAR WebDataset shard
    shards/train-00000.tar.idx    Energon index: n+1 little-endian uint64
    index.parquet                 one row per sample (INDEX_COLUMNS), one row group per shard
    rejects.parquet               one row a refused record (REJECT_COLUMNS)
    near_duplicates.parquet       of --dedup near: the pairs (omnidata.builder.near)
    tokenizer/                    the exact tokenizer that was used
    processor/                    the model's processor and configuration, if the profile is a processor's
    base.json                     of a view (omnidata render): where the dataset is that has its images
    .nv-meta/                     .info.json, split.yaml, dataset.yaml (Megatron-Energon)
    README.md                     dataset card
    manifest.json                 written last: its existence means that the dataset is complete

One sample is a run of consecutive tar members that share a key::

    KEY.input_ids.npy   int32 [L]   each image is its run of tokens, by the manifest's profile; OmniLMM's:
                                    <im_start> + <im_patch> x num_query + <im_end>
    KEY.labels.npy      int32 [L]   UNSHIFTED: the token id where supervised, else IGNORE_INDEX
    KEY.json            UTF-8       the conversation as it was understood (omnidata.dialogue), unless
                                    --no-conversation left it out
    KEY.jpg, KEY.1.png  the images, in placeholder order

A build with ``--max-slices`` also cuts large pictures into tiles. Overview and tiles are images like any
other, each with its block, so images = image blocks holds as ever; ``slices`` in the index says which belong
together. A picture of 3 columns × 2 rows stands in the ids as::

    overview <slice> tile tile tile \\n tile tile tile </slice>

Nothing here imports more than the standard library: ``omnidata --help`` stays instant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 2
IGNORE_INDEX = -100

# --- files of a dataset, relative to its root -------------------------------------------------------------
MANIFEST = "manifest.json"
INDEX = "index.parquet"
REJECTS = "rejects.parquet"
NEAR = "near_duplicates.parquet"
TOKENIZER_DIR = "tokenizer"
PROCESSOR_DIR = "processor"
SHARDS_DIR = "shards"
BASE = "base.json"  # of a view: {"path": where its base is}; relative to the view's own folder
CARD = "README.md"
NV_META = ".nv-meta"

# --- members of a sample ----------------------------------------------------------------------------------
INPUT_IDS = "input_ids.npy"
LABELS = "labels.npy"
DIALOGUE = "json"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
MAX_MEMBER_NAME = 100  # bytes; one more and tar needs a PAX header

# --- special tokens ---------------------------------------------------------------------------------------
IM_PATCH, IM_START, IM_END = "<im_patch>", "<im_start>", "<im_end>"
IMAGE_TOKENS = (IM_PATCH, IM_START, IM_END)
SLICE_TOKENS = ("<slice>", "</slice>")  # around a picture's tiles; other names: --slice-tokens
CONTENT_TOKENS = ("<box>", "</box>", "<ref>", "</ref>", "<quad>", "</quad>")  # may be written in content

Role = Literal["system", "user", "assistant", "tool", "function"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool", "function")
TOOL_ROLES: tuple[Role, ...] = ("tool", "function")  # what a tool answered; once: function

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # of an assistant's turn; templates read one


def shard_name(split: str, number: int) -> str:
    """A shard's path relative to the dataset root: "train", 7 -> ``shards/train-00007.tar``."""
    return f"{SHARDS_DIR}/{split}-{number:05d}.tar"


def image_member(position: int, extension: str) -> str:
    """Member suffix of a sample's image: 0, "jpg" -> ``jpg``; 2, "png" -> ``2.png``."""
    return extension if position == 0 else f"{position}.{extension}"


def is_member(name: str) -> bool:
    """Whether a tar member of this name can be part of a sample: ``0007.labels.npy``, ``0007.1.jpg``."""
    return _MEMBER.fullmatch(name) is not None


_MEMBER = re.compile(
    r"[A-Za-z0-9_-]+\.(?:input_ids\.npy|labels\.npy|json|(?:[1-9][0-9]*\.)?(?:jpg|png|webp))"
)


# --- records, in the order in which they flow -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an image's bytes are: one of the two is set, or none if a stored sample has them (dialogue)."""

    path: str | None = None  # path relative to --image-root, absolute path, or URL (also ``data:``)
    data: bytes | None = None  # encoded image bytes that travelled inside the record


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row of a source, before anything is validated."""

    source: str  # the file's name as the user gave it
    locator: str  # where in it: "line 41", "item 7", "row 3", "member 0001.json"
    id: str  # the record's own id, or one made from its source and position
    payload: dict[str, Any]  # the row as the corpus module parsed it; see omnidata.conversation for its keys


@dataclass(frozen=True, slots=True)
class TextPart:
    """Ordinary text: control tokens typed inside it never become control ids."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """The place of one image; ``image`` counts into ``Conversation.images``."""

    image: int
    grid: tuple[int, int] | None = None  # (columns, rows) of the tiles that follow it; None: it is whole

    @property
    def num_blocks(self) -> int:
        """Image blocks in the ids: the overview and the tiles."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = True  # of an assistant's turn: is it to be learned?
    # Keys that the chat template is given besides: reasoning_content, tool_calls, name, … as the record has
    # them; "content": None if the record says so.
    more: dict[str, Any] = field(default_factory=dict)
    switched_off: bool = False  # the record itself says that this assistant's turn is not to be learned

    @property
    def text(self) -> str:
        """The text parts joined, images left out."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Conversation:
    """A validated dialogue with an assistant's turn; the order of turns: conversation.py."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()  # image parts refer to them by position, each exactly once, in order
    unread_keys: tuple[str, ...] = ()  # keys of the record that hold something and that nothing reads
    image_sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of each, once they are read
    columns: dict[str, Any] | None = None  # what --keep-column takes into the index; None: it is not on
    tools: tuple[dict[str, Any], ...] = ()  # that the assistant may call, as apply_chat_template takes them

    @property
    def is_plain(self) -> bool:
        """Nothing but texts and pictures of system, user and assistant: no tools, calls or reasoning."""
        return not self.tools and not any(
            message.more or message.role in TOOL_ROLES for message in self.messages
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """Token ids and labels of one sample; both int32 ``[L]``, labels unshifted (IGNORE_INDEX or the id)."""

    input_ids: Any
    labels: Any
    num_truncated_messages: int = 0  # turns cut from the end to fit max_length
    num_images: int = 0  # image blocks: of the conversation's first pictures; those of cut turns are gone
    image_starts: tuple[int, ...] = ()  # position in the ids of each image's first token
    image_tokens: tuple[int, ...] = ()  # tokens of each image's run
    image_pixels: tuple[int, ...] = ()  # values of each image's pixel tensors; empty: the profile's constant
    notes: tuple[str, ...] = ()  # what the report should tell besides

    @property
    def num_supervised(self) -> int:
        """Supervised tokens in this sample."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as it is stored."""

    data: bytes
    extension: str  # one of IMAGE_EXTENSIONS
    width: int  # pixels, upright (EXIF orientation already applied)
    height: int


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """The model-ready unit, as written to and read from a shard."""

    key: str  # KEY_PATTERN, unique over the dataset
    input_ids: Any  # int32 [L]
    labels: Any  # int32 [L], unshifted
    images: tuple[bytes, ...] = ()  # encoded, in placeholder order
    image_extensions: tuple[str, ...] = ()  # parallel to images
    dialogue: bytes = b""  # content of KEY.json; empty: the sample has none


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that was refused, and why."""

    source: str
    locator: str
    id: str
    reason: str  # a key of REASONS
    detail: str  # for people: what, where, what to do
    raw: str = ""  # the start of the raw record as JSON, binary left out, at most 2,000 characters


class RejectError(ValueError):
    """Raised by any stage to refuse one record. The build counts it and goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


REASONS: dict[str, str] = {
    # corpus
    "bad_json": "the line or item is not valid JSON, or not an object",
    "bad_record": "the record lacks a key that its format requires, or a value has the wrong type",
    "duplicate_id": "another record of the build has the same id",
    "duplicate_sample": "the same images and text were already built (--dedup exact)",
    "near_duplicate": "nearly the same images and text were already built (--dedup near)",
    # conversation
    "empty_conversation": "no messages",
    "bad_role": "a role that is not system, user, assistant, tool or function, by any of their names",
    "role_order": "turns do not alternate, or a system turn is not the first (--turn-order template)",
    "no_assistant": "no assistant turn, so nothing to learn",
    "bad_dialogue": "the stored conversation (KEY.json) is missing or damaged (omnidata render)",
    "bad_content": "content is neither a string nor a list of known parts, or is empty where it may not be",
    "empty_reply": "an assistant turn says nothing (--allow-empty-replies builds it)",
    "placeholder_mismatch": "placeholders and images differ in number, or it is not certain which is which",
    "unread_media": "a key, mark or member may hold a picture, video or sound that is not read (--image-key)",
    "unread_content": "a key says that not all is to be learned, or holds more of the conversation",
    # images
    "image_missing": "the image file does not exist or cannot be read",
    "image_format": "not a JPEG, PNG, WebP, GIF, BMP or TIFF, by its first bytes",
    "image_corrupt": "the image does not decode",
    "image_too_large": "over the limit of bytes or pixels",
    "image_shape": "the model's processor refuses pictures of these sizes",
    "image_unsuited": "what is stored of an image does not do for this model (omnidata render --refetch)",
    "image_forbidden": "a URL that --allow-http does not permit, or a path that leads out of the image root",
    # rendering
    "template_refused": "the chat template raises an error on the conversation (say, on a system turn)",
    "not_printed": "the chat template does not print the tools, calls, reasoning or tool turns of the record",
    "mask_unproven": "the chat template's rendering does not show where the assistant's turns are",
    "too_long": "longer than --max-length with no supervised token left after cutting at a turn boundary",
    "no_supervision": "no supervised token",
    # of `omnidata subset`
    "left_out": "a sample of the dataset that this one was taken from, not chosen",
    # any
    "unexpected": "an error that nobody foresaw; please report it with the record",
}

# --- index.parquet and rejects.parquet --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A Parquet column; ``type`` is an Arrow type as omnidata.index spells it."""

    name: str
    type: str
    doc: str
    default: Any = None  # the value of every row where a dataset was written before the column was


INDEX_COLUMNS: tuple[Column, ...] = (
    Column("key", "string", "member name without its suffix; unique"),
    Column("split", "string", "train, val, …"),
    Column("shard", "string", "path of the tar relative to the dataset root"),
    Column("offset", "int64", "first byte of the sample's first tar header"),
    Column("nbytes", "int64", "length of the sample's byte range, last member padded to 512"),
    Column("n_tokens", "int32", "L, image blocks included"),
    Column("n_supervised", "int32", "labels that are not IGNORE_INDEX"),
    Column("n_images", "int32", "images = image blocks"),
    Column("image_sizes", "list<list<int32>>", "[width, height] of each stored image, pixels"),
    Column("image_starts", "list<int32>", "position in the ids of each image's first token"),
    Column("image_tokens", "list<int32>", "tokens of each image's run"),
    Column("image_pixels", "list<int64>", "values of each image's pixel tensors: what the tower is given"),
    Column("slices", "list<list<int32>>", "[columns, rows] of each picture's tiles, or [0, 0]", default=()),
    Column("id", "string", "the record's id"),
    Column("source", "string", "the file's name as given to build-shards"),
    Column("locator", "string", "where in it"),
    Column("content_hash", "string", "hex, xxh3-128 of ids, labels and image bytes in the byte range"),
    Column("dialogue_bytes", "int32", "bytes of KEY.json; 0: the sample has none", default=0),
    Column("dialogue_hash", "string", "hex, xxh3-64 of KEY.json", default=""),
    # Of a view: the base's sample of the same key, whose first n_images images are this one's.
    Column("base_shard", "string", "shard there; empty: the images are in the own byte range", default=""),
    Column("base_offset", "int64", "offset there", default=0),
    Column("base_nbytes", "int64", "nbytes there", default=0),
    Column("base_hash", "string", "content_hash there", default=""),
)
# After these come the columns of --keep-column: bool, int64, float64 or string, null where a record has none.

REJECT_COLUMNS: tuple[Column, ...] = (
    Column("source", "string", "the file's name as given"),
    Column("locator", "string", "line / item / row / member"),
    Column("id", "string", "the record's id where it could be read"),
    Column("reason", "string", "a key of REASONS"),
    Column("detail", "string", "what, where, what to do"),
    Column("raw", "string", "the start of the raw record"),
)

# --- manifest.json ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard's line in the manifest."""

    path: str  # relative to the dataset root
    split: str
    num_samples: int
    num_tokens: int
    num_bytes: int  # of the tar file
    sha256: str  # of the tar file


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json. Unknown keys are an error; a newer ``schema_version`` is refused."""

    schema_version: int
    versions: dict[str, str]  # package -> version that shaped the bytes
    settings: dict[str, Any]  # the resolved build settings
    tokenizer_fingerprint: str  # omnidata.text.tokenizer.fingerprint: behaviour on a fixed probe text
    chat_template_fingerprint: str  # sha256 of the template text
    special_tokens: dict[str, int]  # "<im_patch>", … "bos", "eos", "pad" -> id
    end_of_turn: list[int]  # ids that end an assistant's turn: generation stops at them
    content_tokens: dict[str, int]  # added tokens that content may spell -> samples whose replies do
    vocab_size: int  # len(tokenizer)
    profile: dict[str, Any]  # what the model makes of pictures: omnidata.profiles
    image_policy: str  # keep | shrink
    resize_backend: str  # what decoded and resized, with version
    inputs: list[dict[str, Any]]  # one an input file: source, format, num_bytes, digest, num_records
    num_records: int  # samples + rejects = records
    num_samples: int
    num_rejects: int
    # This one and the counts of names below are the build's: a copy has the sums of its inputs, so a subset
    # those of all samples of the dataset that it was taken from.
    num_truncated: int  # samples that lost turns to max_length
    num_tokens: int
    num_supervised: int
    num_images: int
    splits: dict[str, int]  # split -> samples
    rejects: dict[str, int]  # reason -> count
    unread_keys: dict[str, int]  # key that nothing reads -> samples that have it
    spelled_tokens: dict[str, int]  # control token that replies spell as text -> samples
    notes: dict[str, int]  # what else there is to tell, in words -> samples
    shards: list[ShardInfo] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)  # what it was copied from; see omnidata.origin
    num_dialogue_bytes: int = 0  # of all KEY.json; headers and padding not counted
    base: dict[str, Any] = field(default_factory=dict)  # of a view: view_base.py; its samples are records

    @property
    def is_omnilmm(self) -> bool:
        """Whether pictures are OmniLMM's squares; else a processor's (its name is in ``profile``)."""
        return self.profile["name"] == "omnilmm"

    @property
    def num_query(self) -> int:
        """OmniLMM's <im_patch> tokens per image."""
        return self.profile["num_query"]

    @property
    def image_size(self) -> int:
        """Pixels of OmniLMM's square, and of the shorter side under "shrink"."""
        return self.profile["image_size"]


class UserError(Exception):
    """Bad input or settings: the command line prints the message (what, where, what to do) and exits 1."""
