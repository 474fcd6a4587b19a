"""What layers owe to torch beside their numbers: copies, compilation, precision, layouts."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tenzoo.layers.cost import Positions
from tests.factorizations.formats import NAMES, dense_oracle
from tests.layers.makers import LAYERS, conv, embedding, linear

# --- to and from torch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "dense",
    [
        nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dtype=torch.float64),
        nn.Conv2d(4, 6, (2, 3), padding="same", groups=2, bias=False, padding_mode="reflect", dtype=torch.float64),
        nn.Conv2d(5, 7, 1, dtype=torch.float64),
        nn.Linear(12, 7, dtype=torch.float64),
        nn.Linear(7, 12, bias=False, dtype=torch.float64),
        nn.Embedding(13, 6, padding_idx=-2, dtype=torch.float64),
    ],
    ids=["conv", "grouped", "pixel", "linear", "no bias", "embedding"],
)
def test_a_full_rank_is_an_exact_round_trip(name, dense):
    torch.manual_seed(0)
    kind = {nn.Conv2d: TensorizedConv2d, nn.Linear: TensorizedLinear, nn.Embedding: TensorizedEmbedding}[type(dense)]
    layer = kind.from_dense(dense.eval(), factorization=name, rank=10_000)
    back = layer.to_dense()
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    assert not layer.training
    assert not back.training
    torch.testing.assert_close(back.weight, dense.weight, rtol=1e-9, atol=1e-9)
    x = {
        nn.Conv2d: lambda: torch.randn(2, dense.in_channels, 6, 7, dtype=torch.float64),
        nn.Linear: lambda: torch.randn(3, dense.in_features, dtype=torch.float64),
        nn.Embedding: lambda: torch.arange(13),
    }[type(dense)]()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)
    back.weight.data.zero_()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)


def test_state_dicts_load_strictly_and_hold_cores_alone(layer_and_input):
    layer, x = layer_and_input
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.5)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert other(x).equal(layer(x))
    assert all(name == "bias" or name.startswith("factorization.cores.") for name in layer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype_arrive(name):
    for layer in (conv(name, device="meta", dtype=torch.float64), linear(name, device="meta", dtype=torch.float64)):
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    assert conv(name).bfloat16()(torch.randn(1, 6, 4, 4).bfloat16()).dtype == torch.bfloat16


# --- precision, layouts, transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reconstruct", "contract"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_rebuilds_in_the_precision_of_the_cores(name, dtype, implementation):
    torch.manual_seed(0)
    layer, x = conv(name, implementation=implementation), torch.randn(2, 6, 8, 8)
    expected = layer.to_dense()(x)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert layer.dense_weight().dtype == torch.float32
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    y.float().square().sum().backward()
    assert all(core.grad.dtype == torch.float32 for core in layer.factorization.cores)


@pytest.mark.parametrize("implementation", ["reconstruct", "contract"])
@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_the_output_is_that_of_the_input(name, implementation):
    layer, x = conv(name, implementation=implementation), torch.randn(2, 6, 5, 7)
    assert layer(x).is_contiguous()
    if implementation == "reconstruct":
        assert layer(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(x.contiguous(memory_format=torch.channels_last)), layer(x))


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("phase", ["training", "inference", "cached"])
def test_the_choice_is_the_shorter_estimate(phase, device):
    costs = [
        make().costs for make in (conv, linear, embedding, lambda: TensorizedLinear(64, 64, factorization="tt", rank=2))
    ]
    chosen = set()
    for cost in costs:
        for number in (1, 10, 100, 1_000, 100_000):
            positions = Positions(number, 2 * number)
            seconds = cost.seconds(positions, phase, device)
            choice = cost.cheaper(positions, phase, device)
            assert seconds[choice] <= min(seconds.values()) * (1 + 1e-9)
            chosen.add(choice)
    assert phase == "cached" or len(chosen) == 2


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Named(nn.Linear):
    pass


def test_a_layer_with_a_forward_pass_of_its_own_is_refused():
    bound = nn.Linear(4, 4)
    bound.forward = lambda x: x
    for kind, dense, name in (
        (TensorizedLinear, Tripled(4, 4), "forward"),
        (TensorizedLinear, bound, "forward"),
        (TensorizedConv2d, Scaled(4, 4, 3), "_conv_forward"),
    ):
        with pytest.raises(TypeError, match=f"got a {type(dense).__name__} with a `{name}` of its own"):
            kind.from_dense(dense, factorization="tt", rank=2)
    dense, x = Named(4, 4), torch.randn(3, 4)
    torch.testing.assert_close(TensorizedLinear.from_dense(dense, factorization="tt", rank=4)(x), dense(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "fraction"), [(23, 0.5), (131, 0.25), (1009, 0.1)])
def test_a_fraction_is_one_of_the_table_and_not_of_what_covers_it(name, rows, fraction):
    layer = TensorizedEmbedding(rows, 64, factorization=name, rank=fraction)
    assert sum(core.numel() for core in layer.factorization.cores) <= fraction * rows * 64
    made = TensorizedEmbedding.from_dense(layer.to_dense(), factorization=name, rank=fraction)
    assert made.factorization.rank == type(made.factorization).usable_rank(
        layer.factorization.shape, layer.factorization.rank
    )
    with pytest.raises(ValueError, match="expected a fraction in `rank` that leaves room"):
        TensorizedEmbedding(rows, 64, factorization=name, rank=1e-4)


def test_a_parametrized_core_is_still_a_core():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = conv(dtype=torch.float64)
    dense = layer.dense_weight().detach()
    nn.utils.parametrize.register_parametrization(layer.factorization.cores, "0", Doubled())
    assert len(list(layer.factorization.cores)) == len(layer.factorization.cores)
    assert layer.dense_weight().allclose(2 * dense)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", ["auto", "reconstruct", "contract"])
def test_compiles_without_graph_breaks(layer_and_input, implementation):
    layer, x = layer_and_input
    layer.implementation = implementation
    torch.compiler.reset()  # layers share their code, of which torch compiles a limited number of forms
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(grads, [parameter.grad for parameter in layer.parameters()])
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("implementation", ["reconstruct", "contract"])
def test_a_layer_is_mapped_over_a_dimension(layer_and_input, implementation):
    layer, x = layer_and_input
    layer.implementation = implementation
    x = torch.stack([x, x.flip(0), x.roll(1, 0)])
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))


@pytest.mark.parametrize("implementation", ["reconstruct", "contract"])
def test_functional_transforms(layer_and_input, implementation):
    layer, x = layer_and_input
    layer.implementation = implementation
    layer.eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values, sample):
        return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

    with torch.no_grad():
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name, grads in per_sample.items():
        for sample, grad in zip(x, grads, strict=True):
            layer.zero_grad()
            layer(sample[None]).square().sum().backward()
            torch.testing.assert_close(grad, layer.get_parameter(name).grad)
    assert layer._cached is None


@pytest.mark.parametrize("mode", ["strict", "free"])
def test_exports(layer_and_input, mode):
    layer, x = layer_and_input
    program = torch.export.export(layer.eval(), (x,), strict=mode == "strict")
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("implementation", ["auto", "reconstruct", "contract"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LAYERS)
def test_exports_for_any_batch(kind, name, implementation):
    torch.manual_seed(0)
    make, data = LAYERS[kind]
    layer, x = make(name, implementation=implementation), data(torch.float32)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=512)},))
    many = torch.cat([x] * 50)
    torch.testing.assert_close(program.module()(many), layer(many))


# --- initialization -----------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("make", "variance"),
    [
        (lambda name: TensorizedConv2d(8, 16, 3, groups=2, factorization=name, rank=3), 2 / 36),
        (lambda name: TensorizedLinear(24, 16, factorization=name, rank=3), 2 / 24),
        (lambda name: TensorizedEmbedding(30, 16, factorization=name, rank=3), 1.0),
    ],
    ids=["conv", "linear", "embedding"],
)
def test_the_rebuilt_weight_has_kaiming_variance(name, make, variance):
    torch.manual_seed(0)
    means = torch.stack([make(name).dense_weight().detach().double().square().mean() for _ in range(400)])
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - variance) < 4 * error
    assert error < 0.2 * variance


# --- shapes and mistakes ------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(NAMES),
    implementation=st.sampled_from(["auto", "reconstruct", "contract"]),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.integers(1, 3),
    rank=st.integers(1, 4),
)
@settings(max_examples=120, deadline=None)
def test_any_convolution_is_that_of_its_dense_layer(
    name, implementation, sizes, kernel, stride, dilation, padding, groups, rank
):
    settings_ = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "dtype": torch.float64}
    layer = TensorizedConv2d(
        groups * sizes[0],
        groups * sizes[1],
        kernel,
        **settings_,
        factorization=name,
        rank=rank,
        implementation=implementation,
    )
    x = torch.randn(2, groups * sizes[0], 6, 5, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, layer.to_dense()(x))
    torch.testing.assert_close(layer(x[0]), layer.to_dense()(x[0]))
    kernel = dense_oracle(name, list(layer.factorization.cores)).reshape(layer.out_channels, *kernel, -1).movedim(3, 1)
    dense = nn.Conv2d(groups * sizes[0], groups * sizes[1], layer.kernel_size, **{**settings_, "device": "meta"})
    expected = torch.func.functional_call(dense, {"weight": kernel, "bias": layer.bias}, x)
    cotangent = torch.randn_like(y)
    grads, oracle = (torch.autograd.grad(out, list(layer.parameters()), cotangent) for out in (y, expected))
    torch.testing.assert_close(grads, oracle)


@given(
    name=st.sampled_from(NAMES),
    implementation=st.sampled_from(["auto", "reconstruct", "contract"]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.lists(st.integers(0, 3), max_size=2),
    rank=st.integers(1, 4),
)
@settings(max_examples=120, deadline=None)
def test_any_linear_layer_and_embedding_is_its_dense_layer(name, implementation, sizes, batch, rank):
    kind = {"factorization": name, "rank": rank, "implementation": implementation, "dtype": torch.float64}
    layer = TensorizedLinear(*sizes, **kind)
    x = torch.randn(*batch, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    table = TensorizedEmbedding(*sizes, **kind)
    index = torch.randint(0, sizes[0], batch)
    torch.testing.assert_close(table(index), table.to_dense()(index))
    weight = dense_oracle(name, list(layer.factorization.cores)).reshape(sizes[1], sizes[0])
    rows = dense_oracle(name, list(table.factorization.cores)).reshape(-1, sizes[1])
    pairs = ((layer, layer(x), x @ weight.t() + layer.bias), (table, table(index), rows[index]))
    for module, y, expected in pairs:
        cotangent = torch.randn_like(y)
        grads, oracle = (torch.autograd.grad(out, list(module.parameters()), cotangent) for out in (y, expected))
        torch.testing.assert_close(grads, oracle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factorization": "cpd"}, r"one of .*'tucker'.* in `factorization`, got 'cpd'"),
        ({"implementation": "fast"}, r"in `implementation`, got 'fast'"),
        ({"rank": 0}, "`rank`, got 0"),
        ({"rank": [2, 2]}, "7 ints in `rank`"),
        ({"tensorization": [[4, 2], [5]]}, r"out_channels \(8\) and of in_channels .*got \[\[4, 2\], \[5\]\]"),
        ({"tensorization": [[4, 2]]}, "`tensorization`"),
        ({"tensorization": [[-4, -2], [6]]}, "`tensorization`"),
        ({"groups": 4}, r"divisor of in_channels \(6\) and out_channels \(8\) in `groups`, got 4"),
        ({"tensorization": [[2, 2, 2], []]}, "`tensorization`"),
        ({"stride": 0}, "`stride`, got 0"),
        ({"stride": (1, 1, 1)}, r"two of them, in `stride`, got \(1, 1, 1\)"),
        ({"dilation": (1, 0)}, "`dilation`, got 0"),
        ({"padding_mode": "nearest"}, "padding_mode"),
    ],
)
def test_mistakes_are_named(arguments, message):
    defaults = {"factorization": "tr", "rank": 2, "tensorization": [[2, 2, 2], [3, 1, 2]]}
    with pytest.raises(ValueError, match=message):
        TensorizedConv2d(6, 8, 3, **{**defaults, **arguments})


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        (TensorizedLinear, (0, 4), "`in_features`, got 0"),
        (TensorizedLinear, (4, -1), "`out_features`, got -1"),
        (TensorizedLinear, (4.0, 4), "`in_features`, got 4.0"),
        (TensorizedEmbedding, (0, 4), "`num_embeddings`, got 0"),
        (TensorizedEmbedding, (4, "4"), "`embedding_dim`, got '4'"),
        (TensorizedConv2d, (0, 4, 3), "`in_channels`, got 0"),
        (TensorizedConv2d, (4, 4, 0), "`kernel_size`, got 0"),
        (TensorizedConv2d, (4, 4, (3, 3, 3)), r"two of them, in `kernel_size`, got \(3, 3, 3\)"),
        (TensorizedConv2d, (4, 4, 3.0), "`kernel_size`, got 3.0"),
    ],
)
def test_sizes_that_are_none_are_named(kind, sizes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kind(*sizes, factorization="tt", rank=2)


def test_an_index_beyond_the_covered_rows_is_noticed_in_transforms_too():
    table = embedding(implementation="contract")  # 20 rows as 5 · 2 · 2
    with pytest.raises((IndexError, RuntimeError)):
        torch.func.vmap(table)(torch.tensor([[3], [20]]))


def test_mistakes_in_other_layers():
    with pytest.raises(TypeError, match="`tensorization`, got 'split'"):
        linear(tensorization="split")
    with pytest.raises(ValueError, match="`padding_idx`, got 20"):
        embedding(padding_idx=20)
    with pytest.raises(IndexError, match="0 to 19 in `index`"):
        embedding()(torch.tensor([3, 20]))
    with pytest.raises(ValueError, match="without `max_norm`"):
        TensorizedEmbedding.from_dense(nn.Embedding(4, 4, max_norm=1.0), factorization="tt", rank=2)


# --- from torch's layers, and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        (TensorizedConv2d, nn.ConvTranspose2d(4, 4, 3), "torch.nn.Conv2d in `layer`, got a ConvTranspose2d"),
        (TensorizedConv2d, nn.Linear(4, 4), "torch.nn.Conv2d in `layer`, got a Linear"),
        (TensorizedLinear, linear(), "torch.nn.Linear in `layer`, got a TensorizedLinear"),
        (TensorizedEmbedding, nn.Linear(4, 4), "torch.nn.Embedding in `layer`, got a Linear"),
    ],
)
def test_another_class_of_layer_is_refused(kind, layer, message):
    with pytest.raises(TypeError, match=message):
        kind.from_dense(layer, factorization="tt", rank=2)


def test_a_layer_without_numbers_is_refused():
    with pytest.raises(ValueError, match="on the meta device"):
        TensorizedLinear.from_dense(nn.Linear(4, 4, device="meta"), factorization="tt", rank=2)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_stays_frozen(frozen):
    dense = nn.Linear(6, 4)
    getattr(dense, frozen).requires_grad_(False)
    layer = TensorizedLinear.from_dense(dense, factorization="tt", rank=2)
    assert {core.requires_grad for core in layer.factorization.cores} == {frozen == "bias"}
    assert layer.bias.requires_grad == (frozen == "weight")
    back = layer.to_dense()
    assert (back.weight.requires_grad, back.bias.requires_grad) == (frozen == "bias", frozen == "weight")


@pytest.mark.parametrize("name", NAMES)
def test_contracting_keeps_the_layout_and_takes_an_empty_batch(name):
    layer = conv(name, implementation="contract")
    x = torch.randn(2, 6, 5, 5)
    assert layer(x).is_contiguous()
    assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert layer(x[:0]).shape == (0, 8, 5, 5)


@pytest.mark.parametrize("implementation", ["reconstruct", "contract"])
@pytest.mark.parametrize("name", NAMES)
def test_an_embedding_keeps_its_precision_under_autocast(name, implementation):
    layer = embedding(name, implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.tensor([3])).dtype == torch.float32
