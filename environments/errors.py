"""The one error that environments raise at set-up; a running episode never raises."""


class EnvironmentSetupError(ValueError):
    """A user's mistake in choosing or building an environment; the message names the fix."""

    exit_code = 2
