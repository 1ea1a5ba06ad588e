"""A sentencepiece BPE ``.model`` -> the same tokenizer in the ``tokenizers`` library.

transformers' own conversion orders merges by id and so disagrees with sentencepiece on runs of blanks (whose
scores are equal), needs protobuf and adds no BOS. Here the merges are ordered as sentencepiece chooses them:
by the score of the piece they make, then by that piece's id; and the result is compared with sentencepiece
on a probe text before anybody gets to use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnidata.schema import UserError
from omnidata.text.tokenizer import PROBE
from omnidata.text.words import BLANK

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenizer_from_model(file: Path) -> object:
    """A transformers tokenizer that gives the ids of the sentencepiece model, with BOS in front."""
    from transformers import TokenizersBackend

    model = _load(file)
    backend = _backend(model)
    _check_against_model(backend, model, file)
    bos, eos, unk = (model.id_to_piece(i) for i in (model.bos_id(), model.eos_id(), model.unk_id()))
    return TokenizersBackend(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        pad_token=unk,  # never predicted, and not </s>, which has to stay visible to attention
        clean_up_tokenization_spaces=False,
    )


def _load(file: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(f"{file}: reading a sentencepiece model needs: pip install sentencepiece") from error
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is not a sentencepiece model ({error})") from error
    if min(model.bos_id(), model.eos_id(), model.unk_id()) < 0:
        raise UserError(f"{file}: the model has no BOS, EOS or UNK piece, which a chat model needs")
    return model


def _backend(model: Any) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    unk, bos = model.id_to_piece(model.unk_id()), model.id_to_piece(model.bos_id())
    bpe = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=_merges(model, pieces),
        unk_token=unk,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, model.bos_id())]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [pieces[i] for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return backend


def _merges(model: Any, pieces: list[str]) -> list[tuple[str, str]]:
    """Every split of every piece in two pieces, best first.

    Example: pieces ``a b ab`` give ``[("a", "b")]``.
    """
    ids = {
        piece: i
        for i, piece in enumerate(pieces)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
    }
    merges = []
    for piece in sorted(ids, key=lambda piece: (-model.get_score(ids[piece]), ids[piece])):
        splits = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda split: (ids[split[0]], ids[split[1]]))
    return merges


def _check_against_model(backend: Tokenizer, model: Any, file: Path) -> None:
    """Only BPE models without text normalisation can be expressed; every other one fails here."""
    backend.encode_special_tokens = True  # to sentencepiece "[INST]" is text, whatever the model's pieces
    blanks = "x".join(" " * n for n in range(40))
    for text in (PROBE, blanks, "\n".join(PROBE.split(" "))):
        if backend.encode(text, add_special_tokens=False).ids != model.encode(text):
            raise UserError(
                f"{file}: not a plain sentencepiece BPE model (ids of a probe text differ after conversion); "
                "convert it with the tools of its authors and give the folder with tokenizer.json"
            )
    backend.encode_special_tokens = False
