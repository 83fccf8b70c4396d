"""The mistakes a user can make when comparing runs."""


class CompareError(ValueError):
    """Runs that cannot be read or must not be compared; the message says in what and how to mend
    it."""

    exit_code = 2


class OtherEvaluationError(CompareError):
    """A folder holds part of an evaluation that was begun with something else."""
