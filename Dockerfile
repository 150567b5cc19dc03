# An image whose entry point is `manyheads`. For CPUs:
#
#   docker build --tag manyheads .
#
# For NVIDIA GPUs (the driver is the host's) and for TPUs:
#
#   docker build --build-arg EXTRAS=[cuda13] --tag manyheads .
#   docker build --build-arg EXTRAS=[tpu] --tag manyheads .
FROM python:3.12-slim

ARG EXTRAS=""

WORKDIR /source
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY manyheads manyheads
COPY transformer transformer
COPY train train
COPY benchmarks benchmarks
RUN pip install --no-cache-dir ".${EXTRAS}"

# Paths such as configs/tiny.yaml and runs/tiny are relative to this folder.
WORKDIR /work
COPY configs configs
ENV MANYHEADS_CACHE=/cache
VOLUME ["/work/runs", "/cache"]
ENTRYPOINT ["manyheads"]
CMD ["--help"]
