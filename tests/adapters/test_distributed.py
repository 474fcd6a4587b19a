"""Adapters that two processes train are those of one process on the whole batch."""

import copy
import gc
import math
import re
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tenzoo.adapters import TensorAdapterConfig, shard_frozen_
from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, RankWatch, Rebalance
from tenzoo.dynamics import is_distributed
from tenzoo.tasks import SAM, Task
from tests.processes import in_processes
from tests.tasks.toy import Shares, adam, trainer

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

KINDS: dict[str, dict[str, Any]] = {
    "loretta": {"factorization": "tt", "rank": 3, "modules_to_save": ["classifier"]},
    "flora": {"kind": "flora"},
}


def base() -> nn.Module:
    config = BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=36,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return BertForSequenceClassification(config)


def adapted(kind: str, *, adapters: int = 1) -> nn.Module:
    """A small model with a frozen base; of several adapters the last one is active."""
    settings = TensorAdapterConfig(
        r=3, target_modules=["query", "value"], init_weights=False, task_type="SEQ_CLS", **KINDS[kind]
    )
    model = get_peft_model(base(), settings)
    for number in range(1, adapters):
        model.add_adapter(f"other{number}", copy.deepcopy(settings))
        model.set_adapter(f"other{number}")
    return model.double()


class Tuned(Task):
    """Fine-tunes an adapted model, sharded where the strategy shards."""

    def __init__(self, kind: str, *, shard: str = "frozen", adapters: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = adapted(kind, adapters=adapters)
        self.shard = shard

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        mesh = self.device_mesh["data_parallel"]
        if self.shard == "frozen":
            shard_frozen_(self.network, mesh)
        else:
            for block in self.network.base_model.model.bert.encoder.layer:
                fully_shard(block, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, labels = batch
        return nn.functional.cross_entropy(self.network(input_ids=ids).logits, labels)


def shares(rank: int = 0, count: int = 1, batches: int = 3) -> Shares:
    """Each rank's part of the same batches."""
    generator = torch.Generator().manual_seed(0)
    draw = [(torch.randint(0, 40, (8, 7), generator=generator), torch.arange(8) % 3) for _ in range(batches)]
    return Shares(draw, rank, count)


METHODS: dict[str, tuple[dict[str, Any], list[Callback]]] = {
    "plain": ({}, []),
    "accumulated": ({"accumulate_grad_batches": 2}, []),
    "clipped": ({"gradient_clip_val": 0.01}, []),
    "das": ({}, [DeviationAwareScaling(0.3)]),
    "das_global": ({}, [DeviationAwareScaling(0.3, normalizer="global", gauge_fixed=True)]),
    "rebalanced": ({}, [Rebalance()]),
    "sam": ({"sam": SAM(rho=0.3)}, []),
    "sam_cores": ({"sam": SAM(rho=0.3, scope="cores")}, []),
    "sam_accumulated": ({"sam": SAM(rho=0.3), "accumulate_grad_batches": 2}, []),
    "asam": ({"sam": SAM(rho=0.3, adaptive=True)}, []),
}


def where(strategy: str) -> dict[str, Any]:
    """Arguments of a Trainer of two processes, or of one."""
    if strategy == "one":
        return {}
    if strategy == "ddp":
        return {"strategy": "ddp", "devices": 2}
    sharded = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint="files" in strategy
    )
    return {"strategy": sharded, "devices": 2}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if is_distributed(tensor) else tensor).detach().clone()


def trained(strategy: str, kind: str, method: str, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All weights after two epochs, and the history of the norms."""
    torch.manual_seed(1)
    arguments, callbacks = METHODS[method]
    monitor = NormDynamicsMonitor()
    task = Tuned(kind, optimizer=adam(0.01), **arguments, **settings)
    fit = trainer(max_epochs=2, callbacks=[*callbacks, RankWatch(), monitor], **where(strategy))
    fit.fit(task, shares(fit.global_rank, fit.world_size))
    return {name: whole(p) for name, p in task.named_parameters()}, monitor.state_dict()


def trained_all(strategy: str, kind: str, methods: list[str], settings: dict[str, Any]) -> list[Any]:
    return [trained(strategy, kind, method, **settings) for method in methods]


def assert_as_in_one_process(strategy: str, kind: str, methods: list[str], **settings: Any) -> None:
    first, second = in_processes(trained_all, strategy, kind, methods, settings)
    for method, (weights, history), (other, other_history) in zip(methods, first, second, strict=True):
        expected, expected_history = trained("one", kind, method, **settings)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-8, atol=1e-10, msg=f"{method}: {name}")
            assert other[name].equal(weights[name]), name
        assert history == other_history
        for name, rows in expected_history["history"].items():
            found = [value for row in history["history"][name] for value in row]
            assert found == pytest.approx([value for row in rows for value in row], rel=1e-6)


def sharded_by_hand(folder: str) -> dict[str, Any]:
    """What a model without a Trainer holds, and gives, in this process."""
    mesh = processes()
    rank = mesh.get_local_rank()
    torch.manual_seed(rank)  # the processes start with weights of their own
    model = adapted("loretta", adapters=2)
    shard_frozen_(model, mesh)
    ids = torch.arange(rank, 7 + rank)[None]
    model(input_ids=ids, labels=torch.tensor([0])).loss.backward()
    parts = [(p.numel(), p.to_local().numel()) for p in model.parameters() if is_distributed(p)]
    model.save_pretrained(f"{folder}/{rank}", selected_adapters=["other1"])
    with pytest.raises(
        TypeError, match="expected a Linear with a whole weight to merge into, got one that FSDP2 shard"
    ):
        model.merge_adapter()
    return {
        "whole": {name for name, p in model.named_parameters() if not is_distributed(p)},
        "trained": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "parts": [sum(column) for column in zip(*parts, strict=True)],
    }


def processes(*sizes: int) -> Any:
    """A mesh of the processes of a test."""
    torch.distributed.init_process_group("gloo")
    return init_device_mesh(
        "cpu", sizes or (torch.distributed.get_world_size(),), mesh_dim_names=("a", "b")[: len(sizes) or 1]
    )


@pytest.mark.slow
def test_the_base_is_sharded_and_adapters_are_whole_and_saved(tmp_path):
    first, second = in_processes(sharded_by_hand, str(tmp_path))
    kept = ("tensor_adapter_update", "classifier")
    assert all(any(part in name for part in kept) for name in first["whole"])
    assert len([name for name in first["whole"] if "tensor_adapter_update.default" in name]) > 8
    total, own = first["parts"]
    assert own + second["parts"][1] == total
    assert abs(own - total / 2) < 0.01 * total
    assert first["gradients"].keys() == second["gradients"].keys() == first["trained"].keys()
    for name, value in first["trained"].items():
        assert second["trained"][name].equal(value)
        assert second["gradients"][name].equal(first["gradients"][name])
    for rank in (0, 1):
        loaded = PeftModel.from_pretrained(base().double(), tmp_path / str(rank) / "other1")
        state = get_peft_model_state_dict(loaded)
        expected = {re.sub(r"(\.modules_to_save)?\.other1", "", name): p for name, p in first["trained"].items()}
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert state[name].equal(value.to(state[name])), name


@pytest.mark.slow
def test_das_and_sam_with_a_sharded_base_equal_one_process():
    assert_as_in_one_process("frozen", "loretta", ["das", "sam"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["ddp", "frozen"])
def test_two_processes_equal_one(strategy, kind):
    assert_as_in_one_process(strategy, kind, list(METHODS))


def trained_in_half_precision() -> list[dict[str, Tensor]]:
    """The trained weights under DDP and with a sharded base, whose precision is half."""
    results = []
    for strategy in ("ddp", "frozen"):
        torch.manual_seed(1)
        task = Tuned("loretta", optimizer=adam(0.01), sam=SAM(rho=0.3)).float()
        for tensor in [*task.parameters(), *task.buffers()]:
            if tensor.is_floating_point() and not tensor.requires_grad:
                tensor.data = tensor.data.bfloat16()
        fit = trainer(max_epochs=2, callbacks=[DeviationAwareScaling(0.3)], precision="bf16-mixed", **where(strategy))
        fit.fit(task, shares(fit.global_rank, fit.world_size))
        results.append({name: p.detach() for name, p in task.named_parameters() if p.requires_grad})
    return results


@pytest.mark.slow
def test_a_base_in_half_precision_trains_as_under_ddp():
    for expected, found in in_processes(trained_in_half_precision):
        for name, value in expected.items():
            assert value.dtype == torch.float32
            assert found[name].equal(value), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "frozen"])
def test_of_several_adapters_only_the_active_one_is_trained(strategy):
    assert_as_in_one_process(strategy, "loretta", ["das", "sam"], adapters=3)


@pytest.mark.slow
def test_sharded_cores_have_the_norms_of_whole_ones():
    assert_as_in_one_process("all", "loretta", [each for each in METHODS if each != "clipped"], shard="all")


def train_in_turn(strategy: str) -> dict[str, Tensor]:
    """Train the second adapter, then the first one, then a new one."""
    torch.manual_seed(1)
    task = Tuned("loretta", optimizer=adam(0.01), adapters=2)
    for name in ("other1", "default", "new"):
        if name not in task.network.peft_config:
            torch.manual_seed(2)
            task.network.add_adapter(name, TensorAdapterConfig(kind="flora", r=2, target_modules=["value"]))
            task.double()
        task.network.set_adapter(name)
        fit = trainer(max_epochs=1, callbacks=[DeviationAwareScaling(0.3), RankWatch()], **where(strategy))
        fit.fit(task, shares(fit.global_rank, fit.world_size))
    return {name: whole(p) for name, p in task.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "frozen"])
def test_adapters_take_turns(strategy):
    expected = train_in_turn("one")
    for weights in in_processes(train_in_turn, strategy):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-8, atol=1e-10, msg=name)


class Branches(nn.Module):
    """Two trained layers after a frozen one; which of them a process takes is up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 4, bias=False).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.first, self.second, self.unused = (nn.Linear(4, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor, second: bool) -> Tensor:
        hidden = self.frozen(x) * self.scale
        output: Tensor = self.second(hidden) if second else self.first(hidden)
        return output


def gradients_of_branches(*sizes: int) -> dict[str, Tensor | None]:
    """Those after two passes, of which process 0 takes the second branch in the last one."""
    mesh = processes(*sizes)
    torch.manual_seed(0)
    model = Branches().double()
    shard_frozen_(model, mesh)
    rank = torch.distributed.get_rank()
    for step in range(2):
        model(
            torch.full((1, 3), 1.0 + rank + step, dtype=torch.float64), second=rank == 0 and step == 1
        ).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    parameter = weakref.ref(model.first.weight)
    del model
    gc.collect()
    assert parameter() is None  # no hook holds it
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2,), (2, 2)], ids=["sharded", "sharded and replicated"])
def test_gradients_are_means_also_where_a_process_has_none(sizes):
    count = math.prod(sizes)
    torch.manual_seed(0)
    model = Branches().double()
    for rank in range(count):
        for step in range(2):
            x = torch.full((1, 3), 1.0 + rank + step, dtype=torch.float64)
            (model(x, second=rank == 0 and step == 1).sum() / count).backward()
    for found in in_processes(gradients_of_branches, *sizes, count=count):
        assert found["unused.weight"] is None
        for name in ("first.weight", "second.weight"):
            torch.testing.assert_close(found[name], model.get_parameter(name).grad, rtol=1e-12, atol=0)


def checkpointed(reentrant: bool) -> list[Tensor]:
    """Gradients after two passes without activations, which are computed anew in the backward pass."""
    mesh = processes()
    torch.manual_seed(0)
    model = adapted("loretta").train()
    shard_frozen_(model, mesh)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    rank = torch.distributed.get_rank()
    for ids, labels in shares(rank, 2, batches=2):
        nn.functional.cross_entropy(model(input_ids=ids).logits, labels).backward()
    return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_can_be_checkpointed(reentrant):
    torch.manual_seed(0)
    model = adapted("loretta").train()
    for ids, labels in shares(batches=2):
        nn.functional.cross_entropy(model(input_ids=ids).logits, labels).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for found in in_processes(checkpointed, reentrant):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def generated() -> tuple[Tensor, Tensor]:
    """What a model that was just sharded writes, and a whole one."""
    mesh = processes()
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, num_key_value_heads=2, bos_token_id=1, eos_token_id=39, **sizes)
    settings = TensorAdapterConfig(target_modules=["q_proj", "embed_tokens"], init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), settings).eval()
    written = [copy.deepcopy(model).generate(input_ids=torch.arange(5)[None], max_new_tokens=6)]
    shard_frozen_(model, mesh)
    assert not any(map(is_distributed, get_peft_model_state_dict(model, save_embedding_layers=True).values()))
    return written[0], model.generate(input_ids=torch.arange(5)[None], max_new_tokens=6)


@pytest.mark.slow
def test_a_sharded_model_generates_and_its_adapted_embedding_is_saved():
    for expected, written in in_processes(generated):
        assert written.equal(expected)


def ended(strategy: str, epochs: int, *, seed: int, save: str | None = None, resume: str | None = None) -> Any:
    """The weights after so many epochs."""
    torch.manual_seed(seed)
    task = Tuned("loretta", optimizer=adam(0.01), sam=SAM(rho=0.3))
    fit = trainer(max_epochs=epochs, callbacks=[DeviationAwareScaling(0.3)], **where(strategy))
    fit.fit(task, shares(fit.global_rank, fit.world_size), ckpt_path=resume, weights_only=True)
    if save is not None:
        fit.save_checkpoint(save)
    return {name: whole(p) for name, p in task.named_parameters()}


def resumed(strategies: list[str], folder: str) -> list[Any]:
    results = []
    for strategy in strategies:
        path = f"{folder}/{strategy}.ckpt"
        ended(strategy, 1, seed=1, save=path)
        results.append((ended(strategy, 2, seed=1), ended(strategy, 2, seed=2, resume=path)))
    return results


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    strategies = ["ddp", "frozen", "frozen in files"]
    for results in in_processes(resumed, strategies, str(tmp_path)):
        for strategy, (straight, continued) in zip(strategies, results, strict=True):
            for name, value in straight.items():
                assert continued[name].equal(value), f"{strategy}: {name}"


class WithHead(Tuned):
    """Has a parameter that is not in the model that is sharded."""

    def __init__(self) -> None:
        super().__init__("flora")
        self.head = nn.Linear(3, 3)


def refused() -> list[str]:
    """The answers to models that cannot be sharded."""
    with pytest.raises(ValueError, match=r"expected every trained parameter in .* got 'head.weight' in neither"):
        trainer(**where("frozen")).fit(WithHead(), shares())
    mesh = init_device_mesh("cpu", (2,))

    def merged() -> nn.Module:
        model = adapted("flora")
        model.merge_adapter()
        return model

    def sharded() -> nn.Module:
        model = adapted("flora")
        fully_shard(model, mesh=mesh)
        return model

    def part() -> nn.Module:
        model = adapted("flora")
        fully_shard(model.get_base_model().bert.embeddings, mesh=mesh)
        return model

    def with_sparse_gradients() -> nn.Module:
        return nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 3).requires_grad_(False))

    def without_values() -> nn.Module:
        return adapted("flora").to("meta")

    def trained() -> nn.Module:
        return nn.Linear(3, 3)

    answers = []
    for make in (merged, sharded, part, with_sparse_gradients, without_values, trained):
        with pytest.raises(ValueError, match="expected") as caught:
            shard_frozen_(make(), mesh)
        answers.append(str(caught.value))
    with pytest.raises(TypeError, match="expected a DeviceMesh in `mesh`, got a str"):
        shard_frozen_(trained(), "cpu")
    return answers


@pytest.mark.slow
def test_models_that_cannot_be_sharded_are_refused_in_one_line():
    for answers in in_processes(refused):
        assert not any("\n" in answer for answer in answers)
        for answer, valid in zip(
            answers,
            (
                "expected no merged adapters in `model`, got one in 'base_model.model.bert.encoder.layer.0",
                "expected whole parameters to train in `model`, got 'base_model.model.bert.encoder.layer.0",
                "expected whole parameters in `model`, got 'base_model.model.bert.embeddings.word_embeddings.weight'",
                "expected dense gradients in `model`, got the sparse ones of '0'",
                "expected parameters with values to train in `model`, got 'base_model.model.bert.encoder.layer.0",
                "expected frozen parameters in `model`, got none",
            ),
            strict=True,
        ):
            assert answer.startswith(valid)
