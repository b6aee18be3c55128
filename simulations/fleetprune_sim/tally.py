"""What became of the tasks of a round, for people."""

from dataclasses import dataclass

NOT_FINITE = "where numbers are not finite, lower training.learning_rate"


@dataclass(frozen=True)
class Tally:
    """How many of a round's tasks ended how."""

    number: int
    """of the round"""
    answers: int
    """that came in time"""
    failed: int
    """that the device could not do"""
    late: int
    silent: int
    reason: str = ""
    """of the first that failed"""

    @property
    def tasks(self) -> int:
        """All of them."""
        return self.answers + self.failed + self.late + self.silent

    def why_nobody_trained(self) -> str:
        """What happened instead, and what to do about it."""
        ended = {
            f"{self.failed} failed ({self.reason})": (self.failed, NOT_FINITE),
            f"{self.late} came late": (self.late, "raise training.round_timeout_s"),
            f"{self.silent} fell silent": (self.silent, "lower simulation.classes.NAME.drop_out"),
            f"{self.answers} were refused": (self.answers, "look at the warnings above"),
        }
        what = [words for words, (count, _) in ended.items() if count]
        advice = [words for count, words in ended.values() if count]
        return (
            f"of the {self.tasks} tasks of the last one, {', '.join(what)}: {', or '.join(advice)}"
        )
