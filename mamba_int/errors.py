"""The one exception every layer raises for a fault the user can mend."""

from __future__ import annotations


class MambaintError(Exception):
    """Bad input, a corrupt file or a missing piece: a cause and what to do about it.

    The command line prints ``cause`` and ``remedy`` on one line and exits with code 2;
    library users catch it as they would any exception.

    Attributes:
        cause: what is wrong, naming the file, key or value.
        remedy: what the user can do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}; {remedy}")
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[MambaintError], tuple[str, str]]:
        """Pickle both parts, so that the error survives the way out of a worker process."""
        return type(self), (self.cause, self.remedy)
