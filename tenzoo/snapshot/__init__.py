"""Snapshots of the attributes of modules, and of the objects in them, which restore these objects in place."""

from tenzoo.snapshot.kinds import Kinds
from tenzoo.snapshot.snapshots import Row, Snapshot, put

__all__ = ["Kinds", "Row", "Snapshot", "put"]
