"""One thread: on two cores the small models of these tests run many times faster so."""

import torch

torch.set_num_threads(1)
