"""What the machine is, or NEURON_PLATFORM_TARGET_OVERRIDE says it is."""

import os


def get_platform_target() -> str:
    return os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
