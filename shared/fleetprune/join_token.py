"""How a one-time token looks: `<id>.<secret>.<device>`, in one line that can be copied.

The device learns from it what it is called; the rest means something to the coordinator only.
"""

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(r"([0-9a-f]{12})\.([A-Za-z0-9_-]{32})\.([A-Za-z0-9][A-Za-z0-9._-]{0,63})")
MAX_TOKEN = 256  # characters


@dataclass(frozen=True, slots=True)
class Token:
    """A token as its device's owner knows it."""

    id: str
    secret: str = field(repr=False)
    device: str

    @classmethod
    def parse(cls, text: str) -> "Token | None":
        """Unverified text as a token; None if it does not look like one."""
        found = _TOKEN.fullmatch(text.strip())
        return None if found is None else cls(*found.groups())

    def text(self) -> str:
        """What is given to the device."""
        return f"{self.id}.{self.secret}.{self.device}"
