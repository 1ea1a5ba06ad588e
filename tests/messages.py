"""What a command says to its user, apart from what libraries print beside it."""

from __future__ import annotations


def error_line(stderr: str) -> str:
    """The one line of ``stderr`` that begins with ``error: ``; libraries may say other things around it."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, f"one error line was expected in:\n{stderr}"
    return errors[0]
