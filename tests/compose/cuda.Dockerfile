# Stand-ins of the images that CUDA is built on and run on.
ARG BASE_IMAGE

FROM ${BASE_IMAGE} AS devel
COPY cuda /usr/local/cuda
ENV PATH=/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

FROM ${BASE_IMAGE} AS runtime
COPY libnccl.so.2 /usr/lib/x86_64-linux-gnu/
