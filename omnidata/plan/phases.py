"""Phases: weights of datasets that change over the run.

    data:
      - {path: data/captions, weights: [{until: 0.5, weight: 3}, {weight: 1}]}
      - {path: data/chat,     weights: [{until: 0.5, weight: 1}, {weight: 1}]}

``until`` counts epochs since the run began (0.5: the first half of the first epoch; 2: the first two epochs);
the last phase holds to the end. A window never reaches over a change, and what each dataset has given after
any time is one exact fraction, so a run resumes in any phase without those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from omnidata.schema import UserError


@dataclass(frozen=True, slots=True)
class Phase:
    """A weight and how long it holds."""

    until: Fraction | None  # epochs since the run began; None: to the end
    weight: Fraction


def parse_phases(values: Sequence[Mapping[str, object]], *, name: str) -> tuple[Phase, ...]:
    """Phases from what a recipe says.

    Raises:
        UserError: an unknown key, times that do not rise, a negative weight, or none above 0.
    """
    phases: list[Phase] = []
    if not values:
        return ()
    for value in values:
        if not isinstance(value, Mapping) or "weight" not in value or not {"until", "weight"} >= value.keys():
            raise UserError(f"{name}: `weights` has {value!r}; each is {{until: EPOCHS, weight: W}}")
        until = None if value.get("until") is None else _fraction(value["until"], name)
        phases.append(Phase(until, _fraction(value["weight"], name)))
    ends = [phase.until for phase in phases]
    times = [end for end in ends if end is not None]
    if None in ends[:-1] or sorted(set(times)) != times or any(time <= 0 for time in times):
        raise UserError(f"{name}: the `until` of `weights` must rise, and only the last may be without")
    if any(phase.weight < 0 for phase in phases) or not any(phase.weight for phase in phases):
        raise UserError(f"{name}: `weights` must be 0 or more, and one of them more")
    return tuple(phases)


def _fraction(value: object, name: str) -> Fraction:
    try:
        return Fraction(str(value))
    except ValueError:
        raise UserError(f"{name}: `weights` has {value!r}, which is no number") from None


class Schedule:
    """What each dataset of a blend has given after a time.

    Args:
        phases: of each dataset.
        total: samples of one epoch.
        names: of the datasets.

    Raises:
        UserError: at some time no dataset has a weight.
    """

    def __init__(self, phases: Sequence[tuple[Phase, ...]], *, total: int, names: Sequence[str]) -> None:
        ends = {phase.until for each in phases for phase in each[:-1] if phase.until is not None}
        self.times = [Fraction(0), *sorted(ends)]  # when something changes
        self._given = [[Fraction(0)] for _ in phases]  # of each dataset at each of the times
        self._rates: list[list[Fraction]] = [[] for _ in phases]  # samples per epoch, from each time on
        for number, time in enumerate(self.times):
            weights = [_weight_at(each, time) for each in phases]
            if not sum(weights):
                raise UserError(f"no dataset of {', '.join(names)} has a weight after {float(time):g} epochs")
            for given, rates, weight in zip(self._given, self._rates, weights, strict=True):
                rates.append(weight * total / sum(weights))
                if number + 1 < len(self.times):
                    given.append(given[-1] + rates[-1] * (self.times[number + 1] - time))

    def given(self, dataset: int, time: Fraction) -> int:
        """Samples that a dataset has given after ``time`` epochs."""
        at = sum(start <= time for start in self.times) - 1
        rate = self._rates[dataset][at]
        return int(self._given[dataset][at] + rate * (time - self.times[at]))


def _weight_at(phases: tuple[Phase, ...], time: Fraction) -> Fraction:
    return next((p.weight for p in phases if p.until is not None and time < p.until), phases[-1].weight)
