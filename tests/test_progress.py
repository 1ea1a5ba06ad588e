"""Progress: what a line says, and how often it is said."""

import io

from omnidata.builder import progress
from omnidata.builder.progress import Progress
from omnidata.printable import clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_counts_what_is_running_but_not_what_was_there_towards_the_rate(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    running = Progress(total_records=10_000, total_shards=10, stream=io.StringIO())
    running.resume(1000, 4)
    now += 2
    running.finish("a", 1000, 5)
    running.update("b", 500, 1)
    assert running.line() == "2,500 of 10,000 records · 750/s · 0:10 left · 10 rejected · 2 of 10 shards"
    running.update("b", 800, 1)
    running.finish("b", 1000, 1)
    assert running.num_records == 3000 and running.num_rejects == 10, "a finished shard counts once"


def test_plain_lines_are_rare_and_a_terminal_is_redrawn_in_place(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    outputs = {}
    for stream in (io.StringIO(), Terminal()):
        now = 0.0
        running = Progress(total_records=100, total_shards=1, stream=stream)
        for step in range(100):
            now += 0.25
            running.update("a", step, 0)
        running.close()
        outputs[type(stream)] = stream.getvalue()
    assert outputs[io.StringIO].count("\n") == 2 and "\r" not in outputs[io.StringIO]
    assert outputs[Terminal].count("\r") == 100 and "\n" not in outputs[Terminal]


def test_quiet_says_nothing(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    stream = io.StringIO()
    Progress(total_records=1, total_shards=1, quiet=True, stream=stream).update("a", 1, 0)
    assert stream.getvalue() == ""


def test_clock():
    assert [clock(seconds) for seconds in (0, 71, 3723)] == ["0:00", "1:11", "1:02:03"]
