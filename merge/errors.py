"""The exception that a user's mistake raises in this package."""


class MergeError(ValueError):
    """A checkpoint, a setting or an output folder that cannot be used.

    The message names the file or tensor, the reason and the fix. The command line prints it as one
    line and exits with `exit_code`.
    """

    exit_code = 2


class OtherDataError(MergeError):
    """A calibration that was broken off was begun with other data than it would go on with."""
