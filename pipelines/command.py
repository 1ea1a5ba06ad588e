"""Command lines of a recipe: overrides stand anywhere; train.py's is understood without torch, in no time."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from omnidata.schema import UserError

from .config import Recipe, load_recipe

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe and overrides of it, for ``parse``."""
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """As ``parse_args``, but an option that takes several values leaves the overrides behind it alone."""
    overrides = [word for word in arguments if OVERRIDE.match(word)]
    options = parser.parse_intermixed_args([word for word in arguments if not OVERRIDE.match(word)])
    options.overrides += overrides
    return options


def recipe_of(arguments: Sequence[str], description: str | None) -> Recipe:
    """The recipe of ``RECIPE.yaml [dotted.key=value ...] [--profile]``.

    Raises:
        UserError: there is no such recipe, or it is no valid one.
        SystemExit: help was asked for (0), or the arguments are none of these (2).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe(parser)
    parser.add_argument("--profile", action="store_true", help="trace a few steps: log.profile_steps=3")
    options = parse(parser, arguments)
    return load_recipe(options.recipe, options.overrides + ["log.profile_steps=3"] * options.profile)


def check(arguments: Sequence[str], description: str | None) -> None:
    """End the process, with what is wrong, if these arguments cannot be trained with."""
    try:
        recipe_of(arguments, description)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
