import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_randomness_each_time():
    torch.manual_seed(0)
