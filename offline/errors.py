"""The one exception that means: the user's input is at fault."""


class InputError(Exception):
    """One line that says what is wrong and how to mend it; the command prints it and exits with 2."""


class UnreachableError(InputError):
    """A ratio that a method cannot reach; most: the highest stored ratio that it can."""

    def __init__(self, message: str, most: float) -> None:
        super().__init__(message)
        self.most = most


class PeerError(RuntimeError):
    """Another process of this run has ended, so this one cannot go on; the message is one line."""
