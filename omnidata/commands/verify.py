"""``omnidata verify``, once its options are parsed."""

from __future__ import annotations

from omnidata.printable import to_json


def verify(
    path: str, *, deep: bool, repair: bool, workers: int | None, quiet: bool, as_json: bool
) -> tuple[str, int]:
    """Verify (after a repair, if asked); return what to print and the exit code."""
    from omnidata.inspect import terminal
    from omnidata.verify.repair import repair as rebuild
    from omnidata.verify.run import verify as check

    with terminal.shard_progress(quiet=quiet or as_json) as on_shard:
        repaired = rebuild(path, num_workers=workers, on_shard=on_shard) if repair else None
        report = check(path, deep=deep, num_workers=workers, on_shard=on_shard)
    exit_code = 0 if report.ok and not (repaired and repaired.lost) else 1
    if as_json:
        parts = report.as_dict() | ({"repair": repaired.as_dict()} if repaired else {})
        return to_json(parts), exit_code
    lines = terminal.repair_lines(repaired) if repaired else []
    return "\n".join([*lines, *terminal.finding_lines(report)]), exit_code
