# nodepint_mpi with Open MPI and a parallel HDF5, as tools/setup.sh installs them on Debian.
#   docker build -t nodepint .
#   docker run --rm -v "$PWD:/work" nodepint nodepint --help
#   docker run --rm -v "$PWD:/work" nodepint mpirun -n 2 nodepint train configs/quickstart.toml
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /opt/nodepint_mpi
RUN /opt/nodepint_mpi/tools/setup.sh && rm -rf /var/lib/apt/lists/* /root/.cache
# mpirun refuses root unless it is told that a container is meant.
ENV PATH=/opt/nodepint_mpi/.venv/bin:$PATH \
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
WORKDIR /work
CMD ["nodepint", "--help"]
