"""One thread: on two cores the small models of these tests run many times faster so. The user's cache is left alone."""

import os
import tempfile

import torch

from selfdraft.models import embedded

torch.set_num_threads(1)
if (folder := embedded.installed("smollm2")) is not None:  # in the user's cache; tests only read it
    os.environ.setdefault("SELFDRAFT_SMOLLM2", str(folder))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="selfdraft-tests-")
os.environ["PIP_NO_INDEX"] = "1"  # nothing is downloaded by a test
