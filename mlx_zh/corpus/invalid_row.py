"""A row of a data file that cannot be used."""


class InvalidRow(Exception):
    """A row that cannot be used: a short `reason`, under which it is counted, and the details as its message.

    It is no MlxZhError, because the reader of the rows decides whether to skip it.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class LeftOut(InvalidRow):
    """A row without a fault that gives nothing for what is read, such as a pair; it is counted and is no error."""
