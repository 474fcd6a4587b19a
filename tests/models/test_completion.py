import numpy as np
import pytest
import torch

from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.models import TensorCompletion
from tests.conformance import CoreProviderConformance

INDEX = torch.tensor([[0, 0, 0, 0], [3, 2, 1, 1], [1, 0, 1, 0], [3, 2, 1, 1]])


@pytest.mark.parametrize("name", FACTORIZATIONS)
def test_rebuilding_and_gathering_agree(name, monkeypatch):
    torch.manual_seed(0)
    model = TensorCompletion((4, 3, 2, 2), name, 2).double()
    model.location.fill_(3.0)
    model.scale.fill_(0.5)
    expected = 3 + 0.5 * model.tensor.reconstruct()[INDEX.unbind(1)]
    for reconstructs in (True, False):
        monkeypatch.setattr(TensorCompletion, "reconstructs", lambda self, n, chosen=reconstructs: chosen)
        torch.testing.assert_close(model(INDEX), expected)


def test_what_is_cheaper_is_chosen():
    covid = TensorCompletion((438, 6, 11), "tucker", [8, 6, 8])
    assert covid.reconstructs(8672)
    assert covid.reconstructs(1)  # it is small
    pines = TensorCompletion((145, 145, 200), "tt", [40, 16])
    assert pines.reconstructs(262_144)
    assert not pines.reconstructs(1000)
    large = TensorCompletion((10_000, 10_000, 10), "cp", 4)
    assert not large.reconstructs(65_536)
    assert not large.reconstructs(10**9)  # beyond what memory should hold


def test_an_index_that_changed_in_place_is_read_anew():
    model = TensorCompletion((4, 3), "cp", 2)
    index = torch.randint(0, 3, (500, 2))
    assert model.reconstructs(len(index))
    first = model(index)
    index.zero_()
    assert model(index).equal(model.tensor.reconstruct()[0, 0].expand(500))
    assert not model(index).equal(first)


@pytest.mark.parametrize("index", [[0, 3], [-1, 0], [4, 0]])
def test_an_index_out_of_range_reads_no_other_cell(index):
    model = TensorCompletion((4, 3), "cp", 2)
    assert model.reconstructs(1)
    with pytest.raises(IndexError, match="of `index`"):
        model(torch.tensor([index]))


def test_uniform_cores_are_those_of_the_paper():
    torch.manual_seed(0)
    model = TensorCompletion((50, 60, 70), "tucker", 8, init="uniform")
    for core in model.tensor.cores:
        assert 0 <= core.min() < 0.05
        assert 0.95 < core.max() <= 1


class TestConformance(CoreProviderConformance):
    def make(self):
        torch.manual_seed(0)
        model = TensorCompletion((4, 3, 2, 2), "tr", 2).double()
        model.scale.fill_(0.5)
        return model

    def output(self, provider):
        return provider(INDEX)

    def oracle(self, provider, parameters):
        tensor = torch.einsum("aib,bjc,ckd,dla->ijkl", *(parameters[f"tensor.cores.{k}"] for k in range(4)))
        return 0.5 * tensor[INDEX.unbind(1)]


def test_an_index_that_is_written_to_behind_torchs_back_is_read_anew():
    """Memory shared with NumPy, and writes to ``.data``, leave a tensor's version as it is."""
    torch.manual_seed(0)
    model = TensorCompletion((5, 4, 3), "cp", 2)
    whole = model.tensor.reconstruct()
    buffer = np.zeros((2, 3), dtype=np.int64)
    index = torch.from_numpy(buffer)
    for rows in ([[0, 0, 0], [0, 0, 0]], [[1, 2, 0], [4, 3, 2]]):
        buffer[:] = rows
        assert model(index).equal(whole[index.unbind(1)])
    index.data[:] = torch.tensor([3, 3, 1])
    assert model(index).equal(whole[index.unbind(1)])


def test_no_buffer_of_it_is_an_integer():
    """Averages of a model average its buffers."""
    assert all(buffer.is_floating_point() for buffer in TensorCompletion((5, 4, 3), "cp", 2).buffers())
