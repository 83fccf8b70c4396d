"""How libraries are loaded: the garbage collector waits for them, and no longer."""

import gc

from train.libraries import USUAL_THRESHOLD, load_quickly
from train.policy import load_policy


def test_the_collector_looks_less_often_until_the_model_is_there(tiny_checkpoints):
    load_quickly()
    assert gc.get_threshold()[0] > USUAL_THRESHOLD[0]
    load_policy(tiny_checkpoints["agent"])
    assert gc.get_threshold() == USUAL_THRESHOLD
