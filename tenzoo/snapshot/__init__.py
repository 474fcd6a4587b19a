"""What modules hold besides weights and buffers: remembered, and put back in place."""

from tenzoo.snapshot.kinds import Kinds
from tenzoo.snapshot.snapshots import Row, Snapshot, put

__all__ = ["Kinds", "Row", "Snapshot", "put"]
