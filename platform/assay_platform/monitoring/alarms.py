"""What a person is told of a window, and when it is worth waking somebody."""

from collections.abc import Sequence
from dataclasses import dataclass

from assay_platform.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a window has and training had not.

    column: its name, or 'events'. kind: of finding; see `drift_findings`, `drift_causes`, `skew`, `calibration`.
    statistic: G, or a count. log_p: natural logarithm of the p-value of one test. moved: effect, a share of rows.
    text: one line that begins with the column. value: the value, key or event it is about.
    """

    column: str
    kind: str
    statistic: float
    log_p: float
    moved: float
    text: str
    value: str | None = None


class Alarms:
    """Findings that are there again in the next window: bursts pass, drift stays.

    Windows of one stream are given in order. Not safe for use by several threads.
    """

    def __init__(self) -> None:
        self._last: frozenset[str] = frozenset()

    def after(self, findings: Sequence[Finding]) -> list[Finding]:
        """The alarms after one more window, of its findings: those whose column was found in the window before, too.

        The kind may be another: what moved a column far shows in several tests, and which is the surest is chance.
        """
        again = [one for one in findings if one.column in self._last]
        self._last = frozenset(one.column for one in findings)
        return again


def check_shares(**given: float) -> None:
    """Settings that are shares.

    Raises:
        ConfigError: one is not between 0 and 1.
    """
    for name, value in given.items():
        if not 0 < value < 1:
            raise ConfigError(f"{name} is {value}: need a number between 0 and 1")
