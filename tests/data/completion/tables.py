"""A list of entries, and how it is written as a csv."""

import numpy as np

RNG = np.random.default_rng(0)
FULL = np.stack(np.meshgrid(np.arange(6), np.arange(5), np.arange(4), indexing="ij"), -1).reshape(-1, 3)
KNOWN = FULL[np.sort(RNG.permutation(len(FULL))[:90])]
VALUES = RNG.normal(size=90).round(2)


def csv(path, index=KNOWN, values=VALUES, header=None):
    lines = [",".join(map(str, (*row, value))) for row, value in zip(index.tolist(), values.tolist(), strict=True)]
    path.write_text("\n".join([*([header] if header is not None else []), *lines]) + "\n")
