"""For all tests: like the program itself, they load quickly and tell nobody what they run; property
tests have the same examples in every run.
"""

from hypothesis import HealthCheck, settings

from train.libraries import keep_to_ourselves, load_quickly

load_quickly()
keep_to_ourselves()
settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("steady")
