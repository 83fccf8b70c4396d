"""The one error that settings raise."""


class ConfigError(ValueError):
    """A user's mistake in a settings file or override; the message names file, key and fix."""

    exit_code = 2
