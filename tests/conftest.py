import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test waits for a network

import pytest
import torch

torch.set_num_threads(1)  # tiny models: threads would wait for each other longer than they work


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy model that has read just enough to write sentences and scores."""
    from toy.pretrain import Recipe, make

    return make(Recipe(tokens=1.5e5), tmp_path_factory.mktemp("toy"))
