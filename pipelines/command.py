"""The command line of train.py, understood without torch: mistakes are told before seconds of imports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from omnidata.schema import UserError

from .config import Recipe, load_recipe


def recipe_of(arguments: Sequence[str], description: str | None) -> Recipe:
    """The recipe of ``RECIPE.yaml [dotted.key=value ...] [--profile]``.

    Raises:
        UserError: there is no such recipe, or it is no valid one.
        SystemExit: help was asked for (0), or the arguments are none of these (2).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--profile", action="store_true", help="trace a few steps: log.profile_steps=3")
    options = parser.parse_intermixed_args(arguments)
    return load_recipe(options.recipe, options.overrides + ["log.profile_steps=3"] * options.profile)


def check(arguments: Sequence[str], description: str | None) -> None:
    """End the process, with what is wrong, if these arguments cannot be trained with."""
    try:
        recipe_of(arguments, description)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
