"""How a command of the bench ends early: each with one line for the user and an exit status."""

EXIT_WRONG_RESULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class BenchError(Exception):
    """The bench stops; the message is the line that the user sees."""

    exit_code = EXIT_BAD_INPUT


class BadInput(BenchError):
    """An argument, a file or this machine is not what the command needs."""


class WrongResult(BenchError):
    """A strategy does not compute what serial computes: its time would mean nothing."""

    exit_code = EXIT_WRONG_RESULT
