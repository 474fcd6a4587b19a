"""The names of formats, for type checkers and editors."""

from typing import Literal, TypeAlias

FactorizationName: TypeAlias = Literal["btd", "btt", "cp", "ht", "tr", "tt", "tucker"] | str
"""A format: its name, an einsum such as ``"ar,br,cr->abc"``, or one's own format by its name or the path of its class.

Editors complete the names. A type checker takes any string, since an einsum is one too. An unknown name is refused when
the layer or the model is made.
"""
