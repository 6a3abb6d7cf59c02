"""One thread: on two cores the small models of these tests run many times faster so. The user's cache is left alone."""

import os
import shutil
import tempfile

import torch

from selfdraft.models.checkpoint import embedded
from selfdraft.models.reference import quiet

torch.set_num_threads(1)
quiet()  # no bars of transformers in what tests read from the error output, whichever test comes first
SMOLLM2 = embedded.installed("smollm2")
"""In the user's cache, where `make test` has put it; tests only read it."""
CACHE = tempfile.mkdtemp(prefix="selfdraft-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE
os.environ["PIP_NO_INDEX"] = "1"  # nothing is downloaded by a test
if SMOLLM2 is not None:
    os.environ.setdefault("SELFDRAFT_SMOLLM2", str(SMOLLM2))
    folder = embedded.folder_of("smollm2")
    folder.parent.mkdir(parents=True)
    folder.symlink_to(SMOLLM2)


def pytest_unconfigure() -> None:
    """A hundred megabytes a run would be left behind."""
    shutil.rmtree(CACHE, ignore_errors=True)
