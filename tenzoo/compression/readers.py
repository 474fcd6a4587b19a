"""Modules that read the weight of another layer: such a weight has to stay a tensor under its name."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Path: TypeAlias = tuple[str, ...]
"""Names of attributes from ``self`` on; ``"*"`` is any child."""

_PASSING = ("enumerate", "zip", "reversed", "list", "tuple", "values", "items", "children", "modules")
"""Functions and methods that pass on the children of a container."""


def readers_in_code(model: nn.Module) -> dict[int, str]:
    """Parameters of layers that a module's forward pass names in its code, such as ``self.qkv.weight``.

    The source of each class is read, from ``forward`` on through the methods and properties that it names. Not found
    are weights that are reached through a function outside of the class, through ``getattr`` with a computed name, or
    by code without a source file; :class:`Uses` finds these in a forward pass.

    Returns:
        By the id of the parameter, the class that reads it, and its name in the model.

    Example:
        >>> from torchvision.models.swin_transformer import ShiftedWindowAttention
        >>> attention = ShiftedWindowAttention(8, [2, 2], [0, 0], 2)
        >>> readers_in_code(attention)[id(attention.qkv.weight)]
        'ShiftedWindowAttention'
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if not module._modules or type(module).__module__.startswith("torch.nn."):
            continue
        for path in _paths_read(cast(Hashable, type(module))):
            for owner in _reached(module, path[:-1]):
                parameter = owner._parameters.get(path[-1])
                if parameter is not None:
                    found.setdefault(id(parameter), described(name, module))
    return found


def described(name: str, module: nn.Module) -> str:
    """A module for an error message."""
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _reached(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """The modules at the end of a path from one."""
    if not path:
        yield module
        return
    children = module._modules if path[0] == "*" else {path[0]: module._modules.get(path[0])}
    for child in children.values():
        if child is not None:
            yield from _reached(child, path[1:])


# --- code ----------------------------------------------------------------------------------------------------------


@cache
def _paths_read(kind: Hashable) -> frozenset[Path]:
    """Paths of two names and more that a class reads on its way through ``forward``."""
    assert isinstance(kind, type)
    classes = [cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and not cls.__module__.startswith("torch.nn.")]
    found: set[Path] = set()
    seen: set[str] = set()
    names = ["forward", "__call__"]
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for cls in classes:
            reads = _Reads.of(vars(cls).get(name))
            found |= {path for path in reads if len(path) > 1}
            names += [path[0] for path in reads]
    return frozenset(found)


class _Reads(ast.NodeVisitor):
    """Collects the paths from ``self`` that a function reads."""

    def __init__(self) -> None:
        self.paths: set[Path] = set()
        self.locals: dict[str, Path] = {}

    @classmethod
    def of(cls, function: object) -> set[Path]:
        """The paths of a function, of a property or of a wrapper; none without source."""
        function = function.fget if isinstance(function, property) else getattr(function, "__func__", function)
        if not callable(function):
            return set()
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError, ValueError):
            return set()
        reads = cls()
        defined = tree.body[0]
        if isinstance(defined, ast.FunctionDef) and defined.args.args:
            reads.locals[defined.args.args[0].arg] = ()
            reads.visit(tree)
        return reads.paths

    def path(self, node: ast.AST) -> Path | None:
        """The path of an expression from ``self``; None if it does not start there."""
        if isinstance(node, ast.Name):
            return self.locals.get(node.id)
        if isinstance(node, ast.Attribute):
            inner = self.path(node.value)
            return None if inner is None else (*inner, node.attr)
        if isinstance(node, ast.Subscript):
            inner = self.path(node.value)
            return None if inner is None else (*inner, "*")
        if isinstance(node, ast.Call):
            passing = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if passing in _PASSING:
                inner_node = node.func.value if isinstance(node.func, ast.Attribute) else next(iter(node.args), None)
                return None if inner_node is None else self.path(inner_node)
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if (path := self.path(node)) is not None:
            self.paths |= {path[:length] for length in range(1, len(path) + 1)}
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._bind(node.targets[0], self.path(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind_children(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind_children(node.target, node.iter)
        self.generic_visit(node)

    def _bind_children(self, target: ast.AST, container: ast.AST) -> None:
        path = self.path(container)
        self._bind(target, None if path is None else (*path, "*"))

    def _bind(self, target: ast.AST, path: Path | None) -> None:
        for name in ast.walk(target):
            if path and isinstance(name, ast.Name):
                self.locals[name.id] = path


# --- runs ----------------------------------------------------------------------------------------------------------

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_MULTIPLYING = ("linear", *_RECURRENT, *(f"{name}_cell" for name in _RECURRENT))
"""Torch's functions whose first argument holds the vectors that the matrices in the others are multiplied by."""


def _rows(function: str, parameter: str, inputs: Sequence[Any]) -> float | None:
    """Number of vectors that a function multiplies a matrix by; None if unknown."""
    if function == "multi_head_attention_forward":
        query, key, value = (_vectors(x) for x in inputs[:3])
        own = {"in_proj_weight": (query + key + value) / 3, "k_proj_weight": key, "v_proj_weight": value}
        return own.get(parameter.rpartition(".")[2], query)
    if function in _MULTIPLYING:
        return _vectors(inputs[0])
    return None


def _vectors(x: Tensor) -> float:
    return x.numel() / x.shape[-1]


class Uses(TorchFunctionMode):
    """Notes which parameters take part in forward passes, and who uses them outside of their own layer.

    Args:
        model: The model whose modules are followed.
        parameters: By their ids, the names of parameters and the modules that may use them.

    Attributes:
        used: Names of the parameters that any tensor was computed from.
        rows: By name, the number of vectors that a matrix was multiplied by, in linear, attention and recurrent layers.
        readers: By name of a parameter, the module that used it while it ran, if it is not the parameter's own module.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[int, tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.readers: dict[str, str] = {}
        self.rows: dict[str, float] = {}
        self._model = model
        self._parameters = parameters
        self._running: list[tuple[str, nn.Module]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Who asks for a device or a dtype is content with the first parameter, whichever that is.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._parameters:
                    name, owner = self._parameters[id(leaf)]
                    self._note(name, owner)
                    rows = _rows(getattr(func, "__name__", ""), name, [*args, *(kwargs or {}).values()])
                    if rows is not None:
                        self.rows[name] = self.rows.get(name, 0) + rows
        return result

    def _note(self, name: str, owner: nn.Module) -> None:
        self.used.add(name)
        if self._running and self._running[-1][1] is not owner:
            self.readers.setdefault(name, described(*self._running[-1]))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Note the parameters that are used in this context."""
        handles = []
        for name, module in self._model.named_modules():

            def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
                self._running.append((name, module))

            def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
                self._running.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
