"""A network, with random weights in place of yours, is compressed to 40 % of its parameters.

python examples/compress_your_network.py
"""

import copy
import tempfile
from pathlib import Path

import torch

from tenzoo.compression import apply_, export, plan, refine_
from tenzoo.models import CIFARResNet

if __name__ == "__main__":
    torch.manual_seed(0)
    model = CIFARResNet(20)  # any network of torch
    images = torch.randn(8, 3, 32, 32)  # inputs of the kind it will see; labels are not needed

    made = plan(model, factorization="auto", budget=0.4, calibration=images)
    print(made)
    small = apply_(copy.deepcopy(model), made, calibration=images)
    refine_(small, model, calibration=images)  # its outputs come closer; train it further as it was trained before

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet20.onnx"
        export(small, file, images[:1], factors=True)  # checked against the model before it is given out
        print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")
