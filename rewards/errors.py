"""The one error that rewards raise: settings that make no reward."""


class RewardError(ValueError):
    """A user's mistake in the reward's settings; the message names the key and the fix."""

    exit_code = 2
