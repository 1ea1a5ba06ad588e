"""OmniLMM's profile: every picture is a square of ``image_size`` pixels and ``num_query`` tokens.

``<im_start>`` + ``num_query`` × ``<im_patch>`` + ``<im_end>``. Its answers are constants, so the renderer and
the loader have them at hand; here is what the manifest says of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from omnidata.profiles import OMNILMM


@dataclass(frozen=True)
class OmniLMMProfile:
    """The settings that OmniLMM's answers follow from."""

    num_query: int  # <im_patch> tokens per image
    image_size: int  # pixels; the shorter side under "shrink"

    @property
    def image_tokens(self) -> int:
        """Tokens of one image's run."""
        return self.num_query + 2

    @property
    def image_pixels(self) -> int:
        """Values of one image's pixel tensor, ``[3, S, S]``."""
        return 3 * self.image_size**2

    def to_json(self) -> dict[str, object]:
        """The manifest's ``profile``."""
        return {"name": OMNILMM, **asdict(self)}
