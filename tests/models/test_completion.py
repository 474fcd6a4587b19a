import numpy as np
import pytest
import torch

from tenzoo import find_core_groups
from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.models import CompletionEnsemble, TensorCompletion
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


@pytest.mark.parametrize("reconstructs", [True, False])
def test_biases_are_added_to_the_entries_and_are_no_cores(reconstructs, monkeypatch):
    torch.manual_seed(0)
    model = TensorCompletion((4, 3, 2, 2), "tt", 2, biases=True).double()
    monkeypatch.setattr(TensorCompletion, "reconstructs", lambda self, n: reconstructs)
    assert [tuple(bias.shape) for bias in model.biases] == [(4, 1), (3, 1), (2, 1), (2, 1)]
    without = model.tensor.reconstruct()
    torch.testing.assert_close(model(INDEX), without[INDEX.unbind(1)])
    for bias in model.biases:
        torch.nn.init.normal_(bias)
    a, b, c, d = (bias.squeeze(1) for bias in model.biases)
    model.scale.fill_(0.5)
    everywhere = without + a[:, None, None, None] + b[:, None, None] + c[:, None] + d
    torch.testing.assert_close(model(INDEX), 0.5 * everywhere[INDEX.unbind(1)])
    (group,) = find_core_groups(model)
    assert len(group.cores) == 4


def test_interactions_are_a_sum_of_tensors_of_groups_of_modes():
    torch.manual_seed(0)
    model = TensorCompletion((4, 3, 2, 2), "cp", 2, interactions=[[0, 1], [3, 0, 2]], biases=True).double()
    first, second = (tensor.reconstruct() for tensor in model.tensors)
    expected = first[:, :, None, None] + torch.einsum("dac->acd", second)[:, None]
    torch.testing.assert_close(model(INDEX), expected[INDEX.unbind(1)])
    assert len(find_core_groups(model)) == 2
    assert sum(p.numel() for p in model.parameters()) == 2 * (4 + 3) + 2 * (2 + 4 + 2) + 11
    torch.manual_seed(0)
    wide = TensorCompletion((60, 50, 40), "cp", 30, interactions=[[0, 1], [0, 2], [1, 2]])
    index = torch.cartesian_prod(*(torch.arange(size) for size in wide.shape))
    assert wide(index).std().item() == pytest.approx(1, rel=0.1)  # init_std is that of the sum


@pytest.mark.parametrize(
    ("groups", "error", "said"),
    [
        ([], TypeError, "list of lists"),
        ("ab", TypeError, "list of lists"),
        ([0, 1], TypeError, "lists of modes"),
        ([[True, 1]], TypeError, "lists of modes"),
        ([[0]], ValueError, "two or more different modes"),
        ([[0, 0]], ValueError, "two or more different modes"),
        ([[-1, 0]], ValueError, "two or more different modes"),
        ([[0, 3]], ValueError, "modes from 0 to 2"),
        ([[0, 1], [1, 0]], ValueError, "different groups"),
        ([[0, 1, 2], [0, 1]], ValueError, "smaller groups than all 3 modes"),
    ],
)
def test_interactions_that_are_refused(groups, error, said):
    with pytest.raises(error, match=f"{said}.* `interactions`"):
        TensorCompletion((4, 3, 2), "cp", 2, interactions=groups)


def test_predictions_are_clipped_in_evaluation_mode_alone():
    model = TensorCompletion((4, 3), "cp", 2, clips=True)
    model.location.fill_(3.0)
    index = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    free = model(index)
    assert model.eval()(index).equal(free)  # there is no range yet
    model.low.fill_(2.9)
    model.high.fill_(3.1)
    assert model(index).equal(free.clamp(2.9, 3.1))
    assert not model(index).equal(free)
    assert model.train()(index).equal(free)


def test_an_ensemble_predicts_its_mean_and_how_far_its_members_are_apart():
    torch.manual_seed(0)
    model = CompletionEnsemble(3, (4, 3), "cp", 2)
    index = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    members = torch.stack([member.tensor.reconstruct().flatten() for member in model.members])
    torch.testing.assert_close(model(index), members.mean(0))
    model.noise.fill_(0.5)
    torch.testing.assert_close(model.deviation(index), (members.std(0) ** 2 + 0.25).sqrt())
    assert len(find_core_groups(model)) == 3
