# tenzoo for cluster jobs: one image for any launcher, since Lightning reads the ranks that the launcher sets.
#   torchrun    docker run --gpus all --ipc=host --entrypoint torchrun IMAGE --nproc-per-node 8 -m tenzoo fit --config …
#   PyTorchJob  a GPU per pod, no command:, args: [fit, --config, …, --trainer.devices, "1", --trainer.num_nodes, "8"]
#   Slurm       srun --ntasks-per-node=8 apptainer exec --nv --pwd /workspace --bind $PWD/runs:/workspace/runs tenzoo.sif
#               python -m tenzoo fit --config … --trainer.devices 8 --trainer.num_nodes 4
#
# Without build arguments torch is PyPI's, with its CUDA runtime. For another CUDA, ROCm or CPU build, name the index
# that PyTorch's installation page gives for it:  docker build --build-arg TORCH_INDEX_URL=… -t tenzoo .
# Any uid may run the image (docker run --user 12345). Results go to /workspace/runs: mount a volume there to keep them,
# writable by that uid.

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
RUN useradd --uid 1000 --no-create-home --home-dir /home/tenzoo tenzoo \
    && install --directory --mode 1777 /home/tenzoo /workspace /workspace/runs
ENV HOME=/home/tenzoo USER=tenzoo MPLBACKEND=Agg PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

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
