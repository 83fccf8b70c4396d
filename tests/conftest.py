"""For all tests: like the program itself, they load quickly and tell nobody what they run."""

from train.libraries import keep_to_ourselves, load_quickly

load_quickly()
keep_to_ourselves()
