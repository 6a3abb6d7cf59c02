"""One thread: on two cores the small models of these tests run many times faster so. The user's cache is left alone."""

import os
import tempfile

import torch

torch.set_num_threads(1)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="selfdraft-tests-")
