# tenzoo for cluster jobs: one image for any launcher, since Lightning reads the ranks that the launcher sets.
# examples/cluster has it under torchrun, Slurm and as a Kubernetes PyTorchJob, each going on after it was preempted.
#   docker run --gpus all --ipc=host tenzoo fit --config configs/tr_resnet20_cifar10.yaml
#
# Without build arguments torch is PyPI's, with its CUDA runtime. For another CUDA, ROCm or CPU build, name the index
# that PyTorch's installation page gives for it:  docker build --build-arg TORCH_INDEX_URL=… -t tenzoo .
#
# Any uid may run the image (docker run --user 12345), also on a read-only root file system: all that is written goes to
# /workspace/runs and, if CIFAR-10 is to be downloaded, /workspace/data (mount volumes that the uid may write to), and to
# /tmp:  docker run --read-only --tmpfs /tmp:exec -v $PWD/runs:/workspace/runs tenzoo
#
# There is no C compiler. tenzoo compiles nothing: it neither calls torch.compile nor computes what torch on CUDA sends to
# Triton. A program of your own that does needs one:  FROM tenzoo / USER root / RUN apt-get update && apt-get install -y gcc
# (Triton loads what it compiled from TRITON_CACHE_DIR, so /tmp must not be mounted noexec.)

# ---- what changes with the project -----------------------------------------------------------------------------------
FROM python:3.11-slim AS source
WORKDIR /source
COPY pyproject.toml ./
# The next stage copies these two lists by content: an edit of pyproject.toml that leaves the dependencies alone, or any
# edit of the source, leaves the installed dependencies cached.
RUN python -c 'import pathlib, tomllib; \
    lines = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["dependencies"]; \
    pathlib.Path("/requirements.txt").write_text("\n".join(lines) + "\n")' \
    && grep -E '^torch *([<>=~!;]|$)' /requirements.txt > /torch.txt
COPY README.md LICENSE ./
COPY tenzoo tenzoo
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .
COPY configs /workspace/configs
COPY examples /workspace/examples
# A checkout made under a strict umask must be readable by any uid all the same.
RUN chmod -R a+rX /workspace

# ---- the image -------------------------------------------------------------------------------------------------------
FROM python:3.11-slim
ARG TORCH_INDEX_URL=

COPY --from=source /torch.txt /opt/tenzoo/
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r /opt/tenzoo/torch.txt
COPY --from=source /requirements.txt /opt/tenzoo/
RUN pip install --no-cache-dir -r /opt/tenzoo/requirements.txt

# World-writable like /tmp, since the uid may be any; USER because a uid without a passwd entry has no name to look up.
# Caches of all kinds go to /tmp, the one place that is there to write to in any case.
RUN useradd --uid 1000 --no-create-home --home-dir /tmp tenzoo \
    && install --directory --mode 1777 /workspace /workspace/data /workspace/runs
ENV HOME=/tmp USER=tenzoo XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/cache/matplotlib MPLBACKEND=Agg \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor TRITON_CACHE_DIR=/tmp/cache/triton CUDA_CACHE_PATH=/tmp/cache/cuda \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

COPY --from=source /wheel /opt/tenzoo/wheel
RUN pip install --no-cache-dir --no-deps /opt/tenzoo/wheel/*.whl
WORKDIR /workspace
COPY --from=source /workspace ./

ARG REVISION=unknown
LABEL org.opencontainers.image.title="tenzoo" \
      org.opencontainers.image.description="PyTorch Lightning model zoo of tensorized networks" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="The tenzoo developers" \
      org.opencontainers.image.revision="${REVISION}"

USER 1000
ENTRYPOINT ["python", "-m", "tenzoo"]
# Without arguments the image proves itself: a few optimizer steps on data that comes with it, also without a GPU.
CMD ["fit", "--config", "configs/covid_tucker.yaml", "--trainer.max_steps", "20"]
