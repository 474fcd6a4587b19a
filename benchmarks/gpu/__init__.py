"""Is everything right on a GPU, and how fast is it? ``python -m benchmarks gpu``; see :mod:`benchmarks.gpu.run`."""
