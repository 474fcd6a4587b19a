"""Plans keep their budget, and say what will come of it."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenzoo.compression import Plan, apply_, fold_, plan, restore_
from tenzoo.compression.candidates import Candidate, allocate
from tenzoo.factorizations import als, factorization_class
from tenzoo.layers import TensorizedLayer, TensorizedLinear
from tests.factorizations.formats import NAMES


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def network(dtype=torch.float64):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, (3, 1), stride=2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(12 * 3 * 4, 10),
    ).to(dtype)


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@st.composite
def networks(draw):
    """Convolutions with groups and strides, then linear layers; with batch norm, and a layer that is used twice."""
    torch.manual_seed(draw(st.integers(0, 100)))
    channels, layers = 3, []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        wide = groups * draw(st.integers(1, 6))
        kernel = draw(st.sampled_from([1, 3, (3, 1)]))
        layers += [
            nn.Conv2d(channels, wide, kernel, draw(st.integers(1, 2)), 1, groups=groups, bias=draw(st.booleans()))
        ]
        layers += draw(st.sampled_from([[nn.BatchNorm2d(wide)], [nn.ReLU()], []]))
        channels = wide
    hidden = draw(st.integers(1, 20))
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, hidden)]
    if draw(st.booleans()):
        square = nn.Linear(hidden, hidden)
        layers += [square, nn.Tanh(), square]
    return nn.Sequential(*layers).double().eval()


@settings(max_examples=25, deadline=None)
@given(networks(), st.sampled_from(NAMES), st.floats(0.3, 1), st.sampled_from(["parameters", "multiplications"]))
def test_a_plan_never_exceeds_its_budget_and_is_what_apply_makes(model, factorization, budget, count):
    try:
        made = plan(model, factorization=factorization, budget=budget, count=count, example_input=IMAGES)
    except ValueError as error:
        assert "`budget`" in str(error)  # noqa: PT017
        return
    spent, whole = getattr(made, count), getattr(made, f"dense_{count}")
    assert spent <= budget * whole
    assert made.dense_parameters == parameters(model)
    small = apply_(copy.deepcopy(model), made)
    assert parameters(small) == made.parameters
    assert {name for name, module in small.named_modules() if isinstance(module, TensorizedLayer)} == {
        layer.name for layer in made.layers if layer.rank is not None
    }
    expected = small(IMAGES)
    folded = fold_(copy.deepcopy(small))
    assert not any(isinstance(module, TensorizedLayer) for module in folded.modules())
    assert [type(module) for module in folded.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(folded(IMAGES), expected)
    for layer in made.layers:
        dense, after = (net.get_submodule(layer.name).weight.detach() for net in (model, folded))
        norm = float(torch.linalg.vector_norm(dense))
        assert float(torch.linalg.vector_norm(after - dense)) == pytest.approx(layer.error * norm, abs=1e-9 * norm)


@pytest.mark.parametrize("factorization", NAMES)
def test_full_rank_is_lossless(factorization):
    # Of CP and Tucker the full rank takes more parameters than the dense weight, so a plan would leave it alone.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    layers = plan(model, factorization=factorization, ranks={}).layers
    full = [with_full_rank(model, layer, factorization) for layer in layers]
    small = apply_(copy.deepcopy(model), Plan(tuple(full), 0))
    assert all(isinstance(small[k], TensorizedLayer) for k in (0, 2))
    torch.testing.assert_close(small(IMAGES), model(IMAGES))


def copy_of(layer, **changes):
    return type(layer)(**{**layer.__dict__, **changes})


def with_full_rank(model, layer, factorization):
    from tenzoo.compression.reasons import TENSORIZED

    dense = model.get_submodule(layer.name)
    made = TENSORIZED[type(dense)].empty_like(dense, factorization=factorization, rank=1)
    kind = type(made.factorization)
    rank = kind.clipped_rank(made.factorization.shape, 1000)
    full = TENSORIZED[type(dense)].empty_like(
        dense, factorization=factorization, rank=rank, tensorization=layer.tensorization
    )
    number = sum(parameter.numel() for parameter in full.parameters())
    return copy_of(layer, factorization=factorization, rank=rank, reason=None, parameters=number)


# --- what stays dense ----------------------------------------------------------------------------------------------


def reasons(model, **kwargs):
    made = plan(model, **{"factorization": "tt", "ranks": 1, **kwargs})
    return {layer.name: layer.reason for layer in made.layers}


def test_what_stays_dense_and_why():
    class Own(nn.Linear):
        pass

    tied = nn.Linear(8, 8)
    tied.weight = (embedding := nn.Embedding(8, 8)).weight
    hooked, parametrized = nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "embedding": embedding,
            "tied": tied,
            "own": Own(8, 8),
            "hooked": hooked,
            "parametrized": parametrized,
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "excluded": nn.Linear(8, 8),
            "tiny": nn.Linear(1, 1),
            "limited": nn.Embedding(8, 8, max_norm=1.0),
            "plain": nn.Linear(8, 8),
        }
    )
    found = reasons(model, exclude=["excluded"])
    assert found.pop("plain") is None
    expected = {
        "embedding": "shares its weight with tied.weight",
        "tied": "shares its weight with embedding.weight",
        "own": f"is a {__name__}.test_what_stays_dense_and_why.<locals>.Own, a class of its own",
        "hooked": "has hooks",
        "parametrized": "is parametrized",
        "depthwise": "has one input channel per group",
        "excluded": "was excluded",
        "tiny": "is not worth its cores",
        "limited": "has max_norm, scale_grad_by_freq or sparse gradients, which need a row of its own",
    }
    assert found == expected
    assert plan(model, factorization="tt", ranks=1).dense_parameters == parameters(model)


def test_two_parameters_of_one_tensor_stay_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    whole = torch.randn(16, 8)  # parts of one tensor are no copies
    model[2].weight = nn.Parameter(whole[:8])
    model.append(nn.Linear(8, 8)).append(nn.Flatten())
    model[3].weight = nn.Parameter(whole[8:])
    shares = {"0": "shares its weight with 1.weight", "1": "shares its weight with 0.weight"}
    assert reasons(model) == {**shares, "2": None, "3": None}


@pytest.mark.parametrize("arguments", [{"budget": 0.5}, {"ranks": 2}, {"ranks": {}}])
def test_a_model_without_any_layer_to_plan_is_refused(arguments):
    model = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU())
    with pytest.raises(ValueError, match=r"^expected convolutions, linear, .* in `model`, got Sequential without any"):
        plan(model, factorization="tt", **arguments)


# --- plans on disk and on screen -----------------------------------------------------------------------------------


def test_a_plan_comes_back_from_disk(tmp_path):
    made = plan(network(), factorization="tucker", budget=0.6, example_input=IMAGES)
    made.save(path := tmp_path / "plan.json")
    assert Plan.load(path) == made
    with pytest.raises(FileExistsError):
        made.save(path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"layers": [{}], "other_parameters": 0}', '{"layers": 3}', "\xff"]
)
def test_what_is_no_plan_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"expected a plan.*plan\.json"):
        Plan.load(path)


def test_a_plan_prints_its_layers_and_its_totals():
    made = plan(network(), factorization="tt", budget=0.6, example_input=IMAGES)
    text = str(made)
    for number in (made.parameters, made.dense_parameters, made.multiplications, made.dense_multiplications):
        assert f"{number:,}" in text
    assert all(layer.name in text for layer in made.layers)
    assert max(map(len, text.splitlines())) <= 140
    json.dumps(text)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.5, "ranks": 3}, "expected one of `budget` and `ranks`"),
        ({}, "expected one of `budget` and `ranks`"),
        ({"budget": 0.0}, r"\(0, 1\].*`budget`, got 0.0"),
        ({"budget": float("nan")}, r"`budget`, got nan"),
        ({"budget": 0}, r"`budget`, got 0"),
        ({"budget": 0.01}, r"expected at least \d+ parameters in `budget`.*got \d+ of \d"),
        ({"budget": 0.5, "factorization": "svd"}, "`factorization`, got 'svd'"),
        ({"budget": 0.5, "count": "flops"}, "`count`, got 'flops'"),
        ({"budget": 0.5, "count": "multiplications"}, "`example_input`"),
        ({"budget": 0.5, "exclude": ["7"]}, r"`exclude`, such as \['0', '3', '5'\], got '7'"),
        ({"ranks": {"head": 3}}, "`ranks`, such as .* got 'head'"),
        ({"ranks": 0}, r"`ranks`, got 0 for '0'"),
        ({"ranks": {"5": [1, 2, 3]}}, r"`ranks` for this shape, got 3.* for '5'"),
        ({"ranks": {"5": 3}, "exclude": ["5"]}, "`ranks`, got '5', which was excluded"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(network(), **{"factorization": "tt", **arguments})


@pytest.mark.parametrize(
    "arguments", [{"budget": True}, {"budget": "half"}, {"budget": 0.5, "exclude": "5"}, {"ranks": "all"}]
)
def test_arguments_of_a_wrong_type(arguments):
    with pytest.raises(TypeError, match="expected"):
        plan(network(), factorization="tt", **arguments)


def test_a_plan_for_another_model_is_refused_before_anything_changes():
    made = plan(network(), factorization="tt", ranks=2)
    other = network()
    other[5] = nn.Linear(7, 7)
    with pytest.raises(
        ValueError, match=r"expected a Linear with a weight of shape \(10, 144\) as '5', got .*\(7, 7\)"
    ):
        apply_(other, made)
    assert isinstance(other[0], nn.Conv2d)
    with pytest.raises(ValueError, match="expected the planned layer '0' in `model`"):
        apply_(nn.Sequential(nn.ReLU()), made)


def test_a_model_that_is_a_single_layer_cannot_be_replaced():
    layer = nn.Linear(8, 8)
    assert plan(layer, factorization="tt", ranks=2).layers[0].reason.startswith("is the model itself")
    with pytest.raises(ValueError, match="to_dense"):
        fold_(TensorizedLinear(8, 8, factorization="cp", rank=1))


def test_frozen_layers_stay_frozen_and_the_model_keeps_its_modes():
    model = network().eval()
    model[5].weight.requires_grad_(False)
    model[1].train()
    modes = [module.training for module in model.modules()]
    made = plan(model, factorization="tt", ranks=2, example_input=IMAGES)
    assert [module.training for module in model.modules()] == modes
    apply_(model, made)
    assert not any(core.requires_grad for core in model[5].factorization.cores)
    assert model[5].bias.requires_grad
    fold_(model)
    assert not model[5].weight.requires_grad
    assert model[5].bias.requires_grad
    assert [module.training for module in model.modules()] == modes


# --- choosing ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 40),
)
def test_allocation_keeps_the_budget_and_leaves_no_candidate_that_would_still_fit(rows, budget):
    candidates = [[Candidate((k,), cost, loss) for k, (cost, loss) in enumerate(row)] for row in rows]
    least = sum(min(candidate.cost for candidate in row) for row in candidates)
    if least > budget:
        with pytest.raises(ValueError, match="budget"):
            allocate(candidates, budget)
        return
    chosen = allocate(candidates, budget)
    spent = sum(choice.cost for choice in chosen)
    assert spent <= budget
    for choice, row in zip(chosen, candidates, strict=True):
        assert choice in row
        assert not any(other.loss < choice.loss and other.cost - choice.cost <= budget - spent for other in row)


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_growing_ranks_bound_those_of_decompositions(name):
    torch.manual_seed(0)
    kind = factorization_class(name)
    shape = (6, 3, 4, 5) if name == "btt" else (6, 9, 5)
    tensor = kind(shape, 3, dtype=torch.float64).reconstruct().detach()
    tensor = tensor + 0.1 * tensor.std() * torch.randn(shape, dtype=torch.float64)
    errors = kind.errors_by_rank(tensor)
    sizes = [kind.num_parameters(shape, rank) for rank in errors]
    assert sizes == sorted(sizes)
    assert sizes[-1] < tensor.numel()
    for rank, error in list(errors.items())[:: max(len(errors) // 5, 1)]:
        made = kind.decompose(tensor, rank).reconstruct().detach()
        actual = float(((made - tensor).norm() / tensor.norm()) ** 2)
        if name in ("cp", "btd") or (name == "tr" and rank[0] > 1):
            assert actual - 1e-3 <= error <= 1.25 * actual + 0.02  # of least squares that are cut short
        else:  # at least the largest of the parts that the ranks cut off, and at most their sum
            assert actual <= -math.log(1 - error) + 1e-9
            assert error <= 1 - (1 - actual) ** len(rank) + 1e-9


@pytest.mark.parametrize("name", ["tt", "tucker", "tr"])
def test_the_errors_of_a_matrix_are_those_of_its_singular_values(name):
    torch.manual_seed(0)
    matrix = torch.randn(20, 30, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix).square()
    errors = factorization_class(name).errors_by_rank(matrix)
    found = {math.prod(rank) if name == "tr" else rank[0]: error for rank, error in errors.items()}
    kind = factorization_class(name)
    fitting = [r for r in range(1, 21) if kind.num_parameters((20, 30), [1, r] if name == "tr" else r) < 600]
    assert set(fitting) <= set(found)
    for r in fitting:
        assert found[r] == pytest.approx(float(values[r:].sum() / values.sum()))


def test_a_ring_is_planned_at_least_as_well_as_a_train():
    torch.manual_seed(0)
    tensor = torch.randn(8, 9, 8)
    rings, trains = (factorization_class(name).errors_by_rank(tensor) for name in ("tr", "tt"))
    assert {(1, *rank): error for rank, error in trains.items()}.items() <= rings.items()
    for rank, error in rings.items():
        if rank[0] > 1:
            made = factorization_class("tr").decompose(tensor, rank)
            with torch.no_grad():
                actual = (made.reconstruct() - tensor).square().sum() / tensor.square().sum()
            assert float(actual) - 1e-3 <= error <= 1.25 * float(actual) + 0.02  # of least squares that are cut short
    assert any(rank[0] > 1 for rank in rings)


def test_weights_that_are_not_finite_are_named():
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite weights in `model`, got NaN or infinity in '3\.weight'"):
        plan(model, factorization="tt", budget=0.7)


def test_weights_that_do_not_fit_leave_the_model_as_it_was():
    model, other = network(), network()
    made = plan(model, factorization="tt", budget=0.7)
    weights = apply_(model, made).state_dict()
    missing = dict(list(weights.items())[:-1])
    before = copy.deepcopy(other)
    integers = {name: value.long() for name, value in weights.items()}
    lists = {name: value.tolist() for name, value in weights.items()}
    for wrong, kind in ((missing, ValueError), (integers, ValueError), (lists, TypeError), ("weights.pt", TypeError)):
        with pytest.raises(kind, match="`weights`"):
            restore_(other, made, wrong)
    torch.testing.assert_close(other.eval()(IMAGES), before.eval()(IMAGES))
    assert not any(isinstance(module, TensorizedLayer) for module in other.modules())


def test_another_thing_than_a_plan_is_named():
    for wrong, kind in (("plan.json", "str"), (None, "NoneType"), ({}, "dict")):
        for function in (lambda plan: apply_(network(), plan), lambda plan: restore_(network(), plan, {})):
            with pytest.raises(TypeError, match=f"expected a Plan in `plan`, got a {kind}; Plan.load reads one"):
                function(wrong)


def test_layers_without_a_counterpart_are_listed():
    class Widening(nn.ConvTranspose2d):
        pass

    model = nn.Sequential(Widening(4, 8, 3), nn.ConvTranspose2d(4, 8, 3), nn.Linear(30, 30))
    assert reasons(model) == {"0": f"is a {__name__}.{Widening.__qualname__}, a class of its own", "1": None, "2": None}


def test_a_rank_that_was_edited_by_hand_is_refused(tmp_path):
    model = network()
    made = plan(model, factorization="tt", ranks=2)
    made.save(path := tmp_path / "plan.json")
    content = json.loads(path.read_text())
    layer = next(layer for layer in content["layers"] if layer["rank"])
    layer["rank"] = [rank + 1 for rank in layer["rank"]]
    path.write_text(json.dumps(content))
    before, weights = copy.deepcopy(model.state_dict()), apply_(copy.deepcopy(model), made).state_dict()
    for use in (lambda edited: apply_(model, edited), lambda edited: restore_(model, edited, weights)):
        with pytest.raises(ValueError, match=rf"`plan`, got {layer['parameters']} parameters of '{layer['name']}'"):
            use(Plan.load(path))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("rank", "abc"),
        ("rank", [2.5, 2]),
        ("rank", [-1, 2]),
        ("rank", [10**30, 2]),
        ("tensorization", [[3]]),
        ("tensorization", [[10**30], [3]]),
        ("layers", "twice"),
        ("parameters", "x"),
        ("shape", [0]),
        ("other_parameters", "many"),
        ("data_aware", "no"),
    ],
)
def test_an_altered_file_is_no_plan(tmp_path, change, value):
    plan(network(), factorization="tt", ranks=2).save(path := tmp_path / "plan.json")
    content = json.loads(path.read_text())
    layer = next(layer for layer in content["layers"] if layer["rank"])
    if change == "layers":
        content["layers"].append(layer)
    else:
        (layer if change in layer else content)[change] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected a plan, as Plan.save writes it, in '.*plan\.json'"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan("model", factorization="tt", budget=0.5), "an nn.Module in `model`, got a str"),
        (lambda: fold_("model"), "an nn.Module in `model`, got a str"),
        (
            lambda: plan(network(), factorization="tt", budget=0.5, exclude=None),
            "names of layers in `exclude`, got None",
        ),
        (lambda: plan(network(), factorization="tt", ranks=0), r"in `ranks`, got 0 for '0'"),
        (lambda: plan(network().to("meta"), factorization="tt", budget=0.5), "'0.weight' on the meta device"),
    ],
)
def test_arguments_that_are_none(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("factorization", ["cp", "tr"])
def test_a_matrix_gets_the_rank_that_a_train_gives_it(factorization):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 48), nn.Linear(48, 96), nn.Linear(96, 20))
    for budget in (0.3, 0.6):
        train, other = (plan(model, factorization=name, budget=budget) for name in ("tt", factorization))
        expected = [layer.rank and layer.rank[0] for layer in train.layers]
        assert [layer.rank and math.prod(layer.rank) for layer in other.layers] == expected
        assert [layer.error for layer in other.layers] == pytest.approx([layer.error for layer in train.layers])


@pytest.mark.parametrize("factorization", ["cp", "tr"])
def test_planning_takes_few_sweeps(factorization, monkeypatch):
    swept = []
    solved = als.solved
    monkeypatch.setattr(als, "solved", lambda *tensors: swept.append(1) or solved(*tensors))
    torch.manual_seed(0)
    plan(nn.Sequential(nn.Conv2d(16, 16, 3)), factorization=factorization, budget=0.5)
    assert len(swept) / 3 < 200  # to convergence at each rank it would be over 700 from one start


@pytest.mark.parametrize("scale", [1e18, 1e-30])
@pytest.mark.parametrize("factorization", NAMES)
def test_the_scale_of_the_weights_does_not_matter(factorization, scale):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10, bias=False)) for _ in range(2)]
    models[1].load_state_dict({name: scale * value for name, value in models[0].state_dict().items()})
    usual, other = (plan(model, factorization=factorization, budget=0.5) for model in models)
    assert [layer.rank for layer in other.layers] == [layer.rank for layer in usual.layers]
    assert [layer.error for layer in other.layers] == pytest.approx([layer.error for layer in usual.layers], abs=0.01)


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.5])
def test_a_budget_goes_where_the_noise_of_all_layers_is_least(budget):
    """Against every choice of ranks: an embedding whose singular values hardly fall, and two layers whose do."""
    generator = torch.Generator().manual_seed(0)
    embedding, *layers = nn.Embedding(240, 32), nn.Linear(32, 48, bias=False), nn.Linear(48, 30, bias=False)
    falls = (0.01, 0.15, 0.25)
    model = nn.Sequential(embedding, *layers).double()
    ratios, costs = [], []
    for parameter, fall in zip(model.parameters(), falls, strict=True):
        rows, columns = parameter.shape
        left, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64, generator=generator))
        right, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator))
        rank = min(rows, columns)
        values = torch.exp(-fall * torch.arange(rank, dtype=torch.float64))
        parameter.data = left[:, :rank] @ torch.diag(values) @ right[:rank]
        energy = values.square().flip(0).cumsum(0).flip(0) / values.square().sum()  # from each value on
        ranks = [rank for rank in range(1, rank) if rank * (rows + columns) < rows * columns]
        ratios.append(torch.tensor([float(energy[r] / (1 - energy[r])) for r in ranks] + [0.0]))
        costs.append(torch.tensor([r * (rows + columns) for r in ranks] + [rows * columns]))
    total, cost = (each[0][:, None, None] + each[1][None, :, None] + each[2][None, None] for each in (ratios, costs))
    best = float(total[cost <= budget * parameters(model)].min())
    made = plan(model, factorization="tt", budget=budget)
    reached = sum(layer.error**2 / (1 - layer.error**2) for layer in made.layers)
    assert best - 1e-6 <= reached <= 1.02 * best
    assert made.parameters <= budget * parameters(model)
