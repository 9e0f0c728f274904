"""The errors that a user can fix, each with the exit code of the command.

An `AlignError` is printed as one line: what happened (with values), where, what was expected, and
what to type. Every other exception is a bug and keeps its traceback (exit code 1).
"""


class AlignError(Exception):
    """A problem that the user can fix; `exit_code` is what the command returns to the shell."""

    exit_code = 1


class UsageError(AlignError):
    """A command line or configuration that cannot be carried out (exit code 2)."""

    exit_code = 2


class DataError(AlignError):
    """Input data that cannot be used: a missing file or column, an unreadable row (exit code 3)."""

    exit_code = 3


class StaleError(AlignError):
    """An artifact that is missing, incomplete, or made from other inputs (exit code 4)."""

    exit_code = 4


class CorruptError(AlignError):
    """Stored bytes or values that differ from those that were written (exit code 5)."""

    exit_code = 5


class MachineError(AlignError):
    """A limit of the machine: a missing extra, no device, no memory, no disk (exit code 6)."""

    exit_code = 6


class BusyError(AlignError):
    """What another process is writing at this time (exit code 7)."""

    exit_code = 7
