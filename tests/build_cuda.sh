#!/usr/bin/env bash
# Builds `distill` with candle's CUDA support on a machine that may have no GPU,
# no driver and no CUDA toolkit. All files are written to target/cuda; the usual
# build folder is not used.
#
#   tests/build_cuda.sh [options for cargo, such as -j1 or --locked]
#
# Needs cargo, gcc and g++ (nvcc compiles the host code with them), and python3
# with venv if nvcc is not on PATH. target/cuda takes about 4 GB.
#
# CUDA_COMPUTE_CAP selects the GPU (80: A100, 86: RTX 30, 89: RTX 40 and L4, 90: H100
# and H200). The default is the GPU that nvidia-smi reports, or 80 without nvidia-smi.
# Kernels for 80 also run on newer GPUs. The kernels for quantized weights and for
# mixtures of experts are an exception on GPUs of 90 and newer: they contain machine
# code for one generation only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="$PWD/target/cuda"
if command -v nvcc >/dev/null; then
    # An installed toolkit: the parent of the folder that contains nvcc.
    CUDA_HOME="${CUDA_HOME:-$(dirname "$(dirname "$(realpath "$(command -v nvcc)")")")}"
else
    # NVIDIA publishes the toolkit as wheels; those of 13.x unpack into one folder with
    # the layout of a toolkit. The kernels are embedded as PTX, which the driver compiles
    # at run time. A driver reads PTX only from a toolkit that is not newer than itself,
    # so the version is 13.0: it works with every driver from release 580 on. (The wheels
    # of CUDA 12 do not contain nvcc.)
    wheels='cuda-toolkit[nvcc,cudart,cccl,cublas,curand,nvrtc]==13.0.*'
    if [ ! -e "$out/wheels-done" ]; then
        python3 -m venv --clear "$out/venv"
        "$out/venv/bin/pip" install --quiet --disable-pip-version-check "$wheels"
        touch "$out/wheels-done"
    fi
    "$out/venv/bin/pip" list --disable-pip-version-check | grep -E '^(cuda|nvidia)-'
    CUDA_HOME="$(echo "$out"/venv/lib/python3*/site-packages/nvidia/cu13)"

    # The wheels lack three parts of a toolkit: lib64, the library names without a version
    # that the linker needs, and a stub of the driver's libcuda.
    ln -sfn lib "$CUDA_HOME/lib64"
    for library in "$CUDA_HOME"/lib/lib{cudart,cublas,cublasLt,curand,nvrtc}.so.*; do
        ln -sf "$(basename "$library")" "${library%%.so.*}.so"
    done
    # The stub has every function that cuda.h declares, in its old and new versions. Each
    # returns CUDA_ERROR_STUB_LIBRARY (34), like the functions of NVIDIA's own stub.
    mkdir -p "$CUDA_HOME/lib64/stubs"
    echo '#include <cuda.h>' |
        gcc -E -P -D__CUDA_API_VERSION_INTERNAL -I"$CUDA_HOME/include" -x c - |
        grep -oE '\bcu[A-Z][A-Za-z0-9_]* *\(' | tr -d ' (' | sort -u |
        sed 's/.*/int &(void) { return 34; }/' |
        gcc -shared -fPIC -fno-builtin -Wl,-soname,libcuda.so.1 \
            -o "$CUDA_HOME/lib64/stubs/libcuda.so" -x c -
fi

# cudarc finds the libraries by CUDA_HOME and reads the version from the nvcc on PATH,
# which also compiles candle's kernels.
export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"
if ! command -v nvidia-smi >/dev/null; then
    export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"
fi
nvcc --version | grep release

# `cargo rustc` is `cargo build` with options for the last step only. The rpath is the
# folder of the CUDA libraries. It does not contain the stub, which therefore cannot
# replace the driver.
cargo rustc --release --features cuda --bin distill --target-dir "$out/build" "$@" -- \
    -C link-arg="-Wl,-rpath,$CUDA_HOME/lib64"

program="$out/build/release/distill"
echo "built: $program"
ldd "$program"
if ldd "$program" | grep -q 'libcuda.so.1 => not found'; then
    # libcuda.so.1 belongs to the driver, and the program does not start without it. The
    # stub replaces it for this check only: the CPU works, and every call to a GPU
    # returns an error.
    mkdir -p "$out/no-driver"
    ln -sf "$CUDA_HOME/lib64/stubs/libcuda.so" "$out/no-driver/libcuda.so.1"
    export LD_LIBRARY_PATH="$out/no-driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    echo "no driver is installed; started with LD_LIBRARY_PATH=$LD_LIBRARY_PATH:"
fi
"$program" --version
