import torch

from tenzoo.dynamics import by_device_and_dtype


def test_tensors_stay_with_those_at_their_position():
    first = [torch.zeros(1), torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(4, dtype=torch.float64)]
    second = [torch.ones(1), torch.ones(2), torch.ones(3), torch.ones(4, dtype=torch.float64)]
    groups = [[list(map(len, tensors)) for tensors in group] for group in by_device_and_dtype(first, second)]
    assert groups == [[[1, 3], [1, 3]], [[2], [2]], [[4], [4]]]
    assert by_device_and_dtype([], []) == []


def test_sparse_tensors_stand_alone():
    dense, grads = [torch.zeros(2, 2) for _ in range(3)], [torch.ones(2, 2).to_sparse(), torch.ones(2, 2)]
    groups = by_device_and_dtype(dense, [*grads, grads[0]])
    assert [
        [tensor is expected for tensor, expected in zip(group[0], dense[k:], strict=False)]
        for k, group in enumerate(groups)
    ] == [[True]] * 3
    meta = by_device_and_dtype([torch.zeros(1), torch.zeros(1, device="meta"), torch.zeros(1)])
    assert [len(tensors) for (tensors,) in meta] == [2, 1]
