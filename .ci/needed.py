"""Print what an installed package needs here, as a requirements file."""

import importlib.metadata
import sys

from pip._vendor.packaging.requirements import Requirement

for line in importlib.metadata.requires(sys.argv[1]) or ():
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
