"""What can go wrong at the door."""


class LaunchError(ValueError):
    """A command that cannot be carried out; the message names the reason and the fix."""

    exit_code = 2


class JobFailedError(RuntimeError):
    """A child process that failed; its log has the traceback, so ours would only distract."""

    exit_code = 1
