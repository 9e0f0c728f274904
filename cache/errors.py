"""The errors a user can mend, each with the exit code the command line ends with.

An `AlignError` is printed as one line: what happened (with values), where, what was expected, and
what to type. Every other exception is a bug and keeps its traceback (exit code 1).
"""


class AlignError(Exception):
    """Something the user can mend; `exit_code` is what the command returns to the shell."""

    exit_code = 1


class UsageError(AlignError):
    """A command line or configuration that cannot be carried out (exit code 2)."""

    exit_code = 2


class DataError(AlignError):
    """Input data that cannot be used: a missing file or column, an unreadable row (exit code 3)."""

    exit_code = 3


class StaleError(AlignError):
    """An artifact that is missing, incomplete, or was made from something else (exit code 4)."""

    exit_code = 4


class CorruptError(AlignError):
    """Stored bytes or values that are not what was written (exit code 5)."""

    exit_code = 5


class MachineError(AlignError):
    """The machine cannot do this: a missing extra, no device, no memory, no disk (exit code 6)."""

    exit_code = 6
