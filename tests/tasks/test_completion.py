import pytest
import torch

from tenzoo import find_core_groups
from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.data import CompletionBatch, CompletionDataModule
from tenzoo.tasks import CompletionTask
from tests.tasks.toy import adam, assert_same_weights, sgd, trainer


def sparse_data(**kwargs):
    """More cells than it pays to rebuild for 40 entries; every batch touches some rows only."""
    shape, entries = [30, 80, 50], 400
    return CompletionDataModule(
        "synthetic", shape=shape, num_entries=entries, observed_fraction=0.9, batch_size=40, **kwargs
    )


def fitted(data=None, *, dense=False, callbacks=(), epochs=2, **kwargs):
    class Dense(CompletionTask):
        def configure_optimizers(self):
            configured = super().configure_optimizers()
            self.model.sparse_grad = False
            return configured

    torch.manual_seed(2)
    kwargs.setdefault("optimizer", sgd(lr=0.1))
    task = (Dense if dense else CompletionTask)(**{"factorization": "cp", "rank": 2, **kwargs})
    trainer(max_epochs=epochs, callbacks=list(callbacks)).fit(task, data or sparse_data())
    return task


@pytest.fixture(autouse=True)
def opted_out():
    """Torch warns once of sparse tensors whose invariants nobody chose to check."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        yield


@pytest.mark.sampled(4)
@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt", "tr"])
@pytest.mark.parametrize("method", ["plain", "sam", "asam", "das", "accumulating"])
def test_row_sparse_gradients_train_as_dense_ones(factorization, method):
    def arguments():
        settings = {
            "sam": {"sam": {"rho": 0.1}},
            "asam": {"sam": {"rho": 0.1, "adaptive": True}},
            "das": {"callbacks": [DeviationAwareScaling(0.3)]},
            "accumulating": {"accumulate_grad_batches": 3},
        }
        return {"factorization": factorization, **settings.get(method, {})}

    sparse, dense = fitted(**arguments()), fitted(dense=True, **arguments())
    assert sparse.model.sparse_grad
    for one, two in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_sparse_gradients_only_where_optimizer_and_size_allow():
    assert fitted(optimizer=torch.optim.SparseAdam, factorization="tucker").model.sparse_grad
    assert not fitted(optimizer=adam()).model.sparse_grad
    assert not fitted(optimizer=sgd(momentum=0.9)).model.sparse_grad
    assert not fitted(optimizer=sgd(weight_decay=0.1)).model.sparse_grad
    assert not fitted(gradient_clip_val=1.0).model.sparse_grad
    assert not fitted(CompletionDataModule("il2")).model.sparse_grad
    with pytest.raises(ValueError, match="no `gradient_clip_val` with SparseAdam, got 1"):
        fitted(optimizer=torch.optim.SparseAdam, gradient_clip_val=1.0)


def test_metrics_are_in_the_units_of_the_data():
    data = CompletionDataModule("il2", observed_fraction=0.5, standardize=True)
    torch.manual_seed(2)
    task = CompletionTask("tucker", 3, optimizer=adam())
    fit = trainer(max_epochs=2)
    fit.fit(task, data)
    assert data.scale != 1
    for split in ("train", "val", "held_out"):
        entries = data.splits[split]
        error = task(entries.index).detach().double() - entries.value.double()
        spread = entries.value.double() - entries.value.double().mean()
        r2 = 1 - error.square().sum() / spread.square().sum()
        assert fit.callback_metrics[f"{split}/r2"].item() == pytest.approx(r2.item(), abs=1e-6)
        assert fit.callback_metrics[f"{split}/rmse"].item() == pytest.approx(error.square().mean().sqrt().item())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_in_standardized_units(reduction):
    data = CompletionDataModule("il2", observed_fraction=0.5, standardize=True)
    task = fitted(data, reduction=reduction, epochs=1, optimizer=adam())
    entries = data.splits["train"]
    target = (entries.value - data.location) / data.scale
    squares = (task.model.tensor.entries(entries.index) - target).square()
    loss = task.loss(CompletionBatch(entries.index, entries.value), 0)
    torch.testing.assert_close(loss, squares.mean() if reduction == "mean" else squares.sum())


def test_a_task_delegates_to_its_model():
    task = CompletionTask("tt", 2, shape=[4, 3, 2])
    assert [group.name for group in find_core_groups(task)] == ["model.tensor"]
    assert find_core_groups(task)[0].cores == tuple(task.model.tensor.cores)


def test_a_checkpoint_knows_the_shape_of_its_data(tmp_path):
    task = CompletionTask("tucker", 2, optimizer=adam())
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(task, CompletionDataModule("il2", standardize=True, observed_fraction=0.5))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = CompletionTask.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert_same_weights(task, again)
    index = torch.tensor([[0, 1, 2, 3]])
    assert task(index).equal(again(index))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"factorization": "cpp"}, r"one of .*'tucker'\] or an einsum .* in `factorization`, got 'cpp'"),
        ({"reduction": "max"}, "'mean' or 'sum' in `reduction`, got 'max'"),
        ({"shape": [3, 4], "init": "ones"}, "'normal' or 'uniform' in `init`, got 'ones'"),
        ({"shape": [3, 4], "rank": 0}, "`rank`, got 0"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        CompletionTask(**kwargs)


def test_a_shape_other_than_the_datas():
    with pytest.raises(ValueError, match=r"the data's shape \[13, 4, 12, 8\] in `shape`, got \[13, 4, 12\]"):
        fitted(CompletionDataModule("il2"), shape=[13, 4, 12])


def test_other_data_is_refused():
    with pytest.raises(TypeError, match="CompletionDataModule as `datamodule`, got NoneType"):
        trainer().fit(CompletionTask("cp", 2), [1], [1])
