import pytest
import torch

from tests.layers.makers import LAYERS


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    make, data = LAYERS[request.param]
    return make(dtype=torch.float64), data(torch.float64)
