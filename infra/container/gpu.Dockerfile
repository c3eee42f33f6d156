# Assay for NVIDIA GPUs: the image of infra/container/Dockerfile, which has PyTorch for CUDA from the lock already, with
# the compiler that Triton builds its launchers with.
#
#     docker build --file infra/container/Dockerfile --tag assay .
#     docker build --file infra/container/gpu.Dockerfile --build-arg ASSAY_IMAGE=assay --tag assay-gpu infra/container
#     docker run --rm --gpus all --volume assay:/var/lib/assay assay-gpu run fraud --data ieee-cis
ARG ASSAY_IMAGE=assay
# hadolint ignore=DL3006
FROM ${ASSAY_IMAGE}
# hadolint ignore=DL3002
USER 0
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc=4:12.* libc6-dev=2.36-* \
 && rm -rf /var/lib/apt/lists/*
USER 10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
