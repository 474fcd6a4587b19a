"""Foreign tensors: they train under tenzoo's methods as if they were its own, and become its own and back."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tenzoo.cores import CoreGroup, register_core_groups
from tenzoo.factorizations import CP, BlockTT, Factorization, TensorTrain, Tucker
from tenzoo.factorizations.decomposition import multiply_modes


def register_tltorch() -> None:
    """Teach :func:`~tenzoo.cores.find_core_groups` the factorized tensors and the contraction layer of tltorch.

    From then on every layer that holds such a tensor (``FactorizedLinear``, ``FactorizedConv``,
    ``FactorizedEmbedding``, ``TRL``, and models made of them) trains under SAM, DAS and the other methods. Known are
    CP, Tucker, tensor train and block tensor train, tensorized and complex ones included, and ``TCL``. Dense tensors
    have no cores.

    The cores are the ``nn.Parameter`` objects that the tensor is reconstructed from: the factors, Tucker's core, and
    CP's ``weights`` where they are a parameter, since CP is linear in them too. Where they are a buffer they are a
    constant of the tensor and no core. Parameters that a hook adds, such as the weights of tltorch's lasso, are in no
    group.

    It can be called any number of times, before or after the layers are made, but before training. With the command
    line, call it in the module that defines the model, which is imported as soon as its ``class_path`` is read::

        # my_models.py, for `python -m tenzoo fit --model my_models.Classifier ...`
        from tenzoo.guests import register_tltorch

        register_tltorch()

    tltorch sets TensorLy's backend to PyTorch when it is imported, and needs it there.

    Raises:
        ImportError: If tltorch is not installed, or opt_einsum, where tltorch asks for it.

    Example:
        >>> import tensorly
        >>> backend = tensorly.get_backend()
        >>> register_tltorch()
        >>> from tltorch import FactorizedLinear
        >>> from tenzoo import find_core_groups
        >>> layer = FactorizedLinear((2, 3), (3, 4), factorization="cp", rank=2)
        >>> [(group.name, len(group.cores)) for group in find_core_groups(layer)]  # four factors, and CP's weights
        [('weight', 5)]
        >>> tensorly.set_backend(backend)
    """
    tltorch = _import_tltorch()
    # Their tensorized and complex forms are subclasses. FactorizedTensor itself would take in the dense ones.
    register_core_groups(tltorch.CPTensor, lambda tensor: _group(_parameters(tensor, "weights"), tensor.factors))
    register_core_groups(tltorch.TuckerTensor, lambda tensor: _group(_parameters(tensor, "core"), tensor.factors))
    register_core_groups(tltorch.TTTensor, lambda tensor: _group([], tensor.factors))
    register_core_groups(tltorch.BlockTT, lambda tensor: _group([], tensor.factors))
    register_core_groups(
        tltorch.TCL, lambda layer: _as_group(_parameters(layer, *(f"factor_{mode}" for mode in range(layer.order))))
    )


_multilinear: set[type[nn.Module]] = set()


def register_multilinear_parametrization(parametrization_type: type[nn.Module]) -> None:
    """Teach :func:`~tenzoo.cores.find_core_groups` the weights that a parametrization of torch reconstructs.

    ``torch.nn.utils.parametrize`` keeps the tensors that a weight is computed from as its *originals*, several if
    ``right_inverse`` returns a tuple. A class whose ``forward`` is linear in each of its originals is registered once,
    before or after it is used; each weight that it alone parametrizes is then one group, of those originals that are
    parameters. Parameters of the parametrization itself are no cores, and neither are the originals of a weight that
    has further parametrizations on top, or one of another class.

    Args:
        parametrization_type: The class of the parametrization; its subclasses are recognized too.

    Raises:
        TypeError: If it is not a subclass of ``nn.Module``.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> from tenzoo import find_core_groups
        >>> class LowRank(nn.Module):
        ...     def forward(self, a, b):
        ...         return a @ b
        ...     def right_inverse(self, weight):
        ...         u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        ...         return u[:, :2] * s[:2], vh[:2]
        >>> register_multilinear_parametrization(LowRank)
        >>> layer = parametrize.register_parametrization(nn.Linear(4, 3), "weight", LowRank())
        >>> [(group.name, len(group.cores)) for group in find_core_groups(layer)]
        [('parametrizations.weight', 2)]
    """
    if not (isinstance(parametrization_type, type) and issubclass(parametrization_type, nn.Module)):
        raise TypeError(f"expected a subclass of nn.Module in `parametrization_type`, got {parametrization_type!r}")
    _multilinear.add(parametrization_type)
    register_core_groups(ParametrizationList, _parametrization_group)


@torch.no_grad()
def from_tltorch(tensor: Any) -> Factorization:
    """A factorization with the values of a factorized tensor of tltorch.

    ``CPTensor`` becomes a CP, ``TuckerTensor`` a Tucker, ``TTTensor`` a TensorTrain and ``BlockTT``, if it is that of a
    matrix, a BlockTT; ``CPTensorized`` and ``TuckerTensorized`` become a CP and a Tucker over all modes. The cores are
    copies of the factors, in their order, with two exceptions:

    - CP's ``weights`` w are spread evenly: each of the K factors is multiplied by ``|w|^{1/K}``, and the first by the
      sign as well. A weight of 0 goes into the first factor only, so that the component can still be trained.
    - A rank above what :class:`~tenzoo.factorizations.Tucker` admits is brought down to it, at no loss.

    A core is trainable where its factor is, whatever holds for CP's ``weights``. Hooks, such as tltorch's dropout, are
    left behind.

    Args:
        tensor: A real tensor of tltorch; of a layer, its ``weight``.

    Returns:
        A factorization that reconstructs ``tensor.to_tensor()``, of the same dtype, on the same device.

    Raises:
        ImportError: As :func:`register_tltorch` does.
        TypeError: If ``tensor`` is complex, or not one of these.
        ValueError: If its order is 1, its factors do not fit together, or it is a BlockTT of anything but a matrix.

    Example:
        >>> import tensorly
        >>> backend = tensorly.get_backend()
        >>> import tltorch
        >>> tensor = tltorch.FactorizedTensor.new((4, 5, 6), rank=(1, 2, 3, 1), factorization="TT").normal_()
        >>> weight = from_tltorch(tensor)
        >>> weight.name, weight.rank, [torch.equal(*pair) for pair in zip(weight.cores, tensor.factors)]
        ('tt', (2, 3), [True, True, True])
        >>> tensorly.set_backend(backend)
    """
    tltorch = _import_tltorch()
    known = isinstance(tensor, tltorch.CPTensor | tltorch.TuckerTensor | tltorch.TTTensor | tltorch.BlockTT)
    factors: list[Tensor] = list(tensor.factors) if known else []
    if not factors or factors[0].is_complex():
        kind = f"{type(tensor).__name__} of {factors[0].dtype}" if factors else type(tensor).__name__
        raise TypeError(
            f"expected a real CPTensor, TuckerTensor, TTTensor or BlockTT of tltorch in `tensor`, got {kind}"
        )
    if isinstance(tensor, tltorch.CPTensor):
        shape = [len(factor) for factor in factors]
        return _filled(CP, shape, [factors[0].shape[1]], _weighted(tensor.weights, factors), factors)
    if isinstance(tensor, tltorch.TuckerTensor):
        shape, cores = [len(factor) for factor in factors], _admitted(tensor.core, factors)
        return _filled(Tucker, shape, list(cores[0].shape), cores, [tensor.core, *factors])
    ranks = [factor.shape[0] for factor in factors[1:]]
    if isinstance(tensor, tltorch.TTTensor):
        return _filled(TensorTrain, [factor.shape[1] for factor in factors], ranks, factors, factors)
    sides = tensor.tensorized_shape
    if len(sides) != 2 or any(isinstance(side, int) for side in sides):
        raise ValueError(f"expected a matrix, tensorized_shape ((m_1, ...), (n_1, ...)), in `tensor`, got {sides}")
    return _filled(BlockTT, [factor.shape[side] for side in (1, 2) for factor in factors], ranks, factors, factors)


def to_tltorch(factorization: Factorization) -> Any:
    """A factorized tensor of tltorch with the cores of a factorization: the inverse of :func:`from_tltorch`.

    Its factors are copies, trainable where the cores are. CP's ``weights`` are ones, and a buffer: a constant that is
    not trained, so that the tensor has the parameters of the factorization and no more.

    Args:
        factorization: CP, Tucker, TensorTrain or BlockTT; tltorch has no tensor ring.

    Returns:
        A ``CPTensor``, ``TuckerTensor``, ``TTTensor`` or, of ``tensorized_shape ((m_1, …, m_d), (n_1, …, n_d))``,
        ``BlockTT``.

    Raises:
        ImportError: As :func:`register_tltorch` does.
        TypeError: If ``factorization`` is of another class.

    Example:
        >>> import tensorly
        >>> backend = tensorly.get_backend()
        >>> to_tltorch(TensorTrain((4, 5, 6), rank=[2, 3]))
        TTTensor(shape=(4, 5, 6), rank=(1, 2, 3, 1))
        >>> tensorly.set_backend(backend)
    """
    tltorch = _import_tltorch()
    if not isinstance(factorization, CP | Tucker | TensorTrain | BlockTT):
        raise TypeError(
            f"expected CP, Tucker, TensorTrain or BlockTT in `factorization`, got {type(factorization).__name__}, "
            "for which tltorch has no counterpart"
        )
    shape, rank = factorization.shape, factorization.rank
    cores = [nn.Parameter(core.detach().clone(), core.requires_grad) for core in factorization.cores]
    match factorization:
        case CP():
            return tltorch.CPTensor(cores[0].detach().new_ones(rank), cores, shape, rank[0])
        case Tucker():
            return tltorch.TuckerTensor(cores[0], cores[1:], shape, rank)
        case TensorTrain():
            return tltorch.TTTensor(cores, shape, (1, *rank, 1))
        case BlockTT():
            half = len(shape) // 2
            return tltorch.BlockTT(cores, (shape[:half], shape[half:]), (1, *rank, 1))


def _import_tltorch() -> Any:
    try:
        import tltorch
    except ModuleNotFoundError as error:
        if error.name not in ("tltorch", "opt_einsum"):
            raise
        raise ImportError(
            f"expected tltorch and opt_einsum to be installed, got no {error.name}; run pip install 'tenzoo[tltorch]'"
        ) from error
    return tltorch


def _filled(
    kind: type[Factorization], shape: list[int], rank: list[int], cores: Sequence[Tensor], parts: Sequence[Tensor]
) -> Factorization:
    """A factorization with copies of the cores, each of them trainable where the part that it stands for is."""
    made = kind(shape, rank, device="meta", dtype=cores[0].dtype).to_empty(device=cores[0].device)
    expected, got = [tuple(core.shape) for core in made.cores], [tuple(core.shape) for core in cores]
    if got != expected:
        raise ValueError(f"expected factors of shapes {expected} in `tensor` for {kind.__name__}, got {got}")
    for parameter, core, part in zip(made.cores, cores, parts, strict=True):
        parameter.copy_(core).requires_grad_(part.requires_grad)
    return made


def _weighted(weights: Tensor | None, factors: list[Tensor]) -> list[Tensor]:
    """The factors of CP with its weights in them."""
    if weights is None:
        return factors
    size = torch.where(weights == 0, 1, weights.abs() ** (1 / len(factors)))
    return [factors[0] * (size * weights.sign()), *(factor * size for factor in factors[1:])]


def _admitted(core: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """The cores of the same Tucker tensor, with no rank above the size of its mode, or of all others together."""
    factors = list(factors)
    for k, factor in enumerate(factors):
        size, rank = factor.shape
        if rank > size:
            core, factors[k] = multiply_modes(core, {k: factor}), torch.eye(size).to(factor)
    shape = tuple(len(factor) for factor in factors)
    bounds = Tucker.admitted_rank(shape, tuple(core.shape))
    for k, bound in enumerate(bounds):
        if core.shape[k] > bound:  # of one mode at most, for it is larger than all others together
            unfolding = core.movedim(k, 0)
            others = unfolding.shape[1:]
            factors[k] = factors[k] @ unfolding.flatten(1)
            core = torch.eye(others.numel()).to(core).view(-1, *others).movedim(0, k)
    return [core, *factors]


def _parametrization_group(originals: ParametrizationList) -> list[CoreGroup]:
    if len(originals) != 1 or not isinstance(originals[0], tuple(_multilinear)):
        return []
    names = ["original"] if originals.is_tensor else [f"original{number}" for number in range(originals.ntensors)]
    return _as_group(_parameters(originals, *names))


def _parameters(module: nn.Module, *names: str) -> list[nn.Parameter]:
    """Those of the names that are parameters, in the order of the names.

    Attribute access would not do: complex tensors answer it with a view. A parameter under two names comes twice, so
    that its group is refused: the tensor is not linear in it.
    """
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return [own[name] for name in names if name in own]


def _group(own: list[nn.Parameter], factors: Any) -> list[CoreGroup]:
    return _as_group([*own, *_parameters(factors, *factors.keys)])


def _as_group(cores: Iterable[nn.Parameter]) -> list[CoreGroup]:
    cores = tuple(cores)
    return [CoreGroup("", cores)] if cores else []
