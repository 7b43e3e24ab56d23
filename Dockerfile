# Not built where it was written, which had no Docker. The torch on PyPI brings CUDA's libraries with
# it, so the host gives the driver alone:
#   docker build --tag phi3v . && docker run --gpus all --ipc=host -it phi3v
FROM python:3.11-slim

# A C++ compiler for --torch_compile; make for the Makefile.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /phi3v
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
CMD ["bash"]
