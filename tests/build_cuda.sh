#!/usr/bin/env bash
# Builds `distill` with candle's CUDA support on a machine that may have no GPU,
# no driver and no CUDA toolkit. Everything lands under target/cuda; the usual
# target folder is left alone.
#
#   tests/build_cuda.sh [more options for cargo, e.g. -j1 or --locked]
#
# Needed: cargo, gcc and g++ (nvcc compiles the host side with them), and, where
# nvcc is not on PATH, python3 with venv. target/cuda grows to about 4 GB.
#
# CUDA_COMPUTE_CAP chooses the GPU (80 is A100, 86 RTX 30, 89 RTX 40 and L4,
# 90 H100 and H200). Unset, nvidia-smi is asked; without it, 80, whose kernels also
# run on newer GPUs; from 90 on, all but those for quantized weights and for
# mixtures of experts, which hold machine code for one generation only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="$PWD/target/cuda"
if command -v nvcc >/dev/null; then
    # An installed toolkit. Its folder is the one above nvcc's.
    CUDA_HOME="${CUDA_HOME:-$(dirname "$(dirname "$(realpath "$(command -v nvcc)")")")}"
else
    # NVIDIA publishes the toolkit as wheels; 13.x unpack into one folder that
    # already looks like a toolkit. 13.0 and no later: the kernels are embedded as
    # PTX, which the driver compiles at run time, and a driver reads PTX only from
    # a toolkit no newer than itself. 13.0 suits every driver from release 580 on.
    # (The wheels of CUDA 12 have no nvcc in them.)
    wheels='cuda-toolkit[nvcc,cudart,cccl,cublas,curand,nvrtc]==13.0.*'
    if [ ! -e "$out/wheels-done" ]; then
        python3 -m venv --clear "$out/venv"
        "$out/venv/bin/pip" install --quiet --disable-pip-version-check "$wheels"
        touch "$out/wheels-done"
    fi
    "$out/venv/bin/pip" list --disable-pip-version-check | grep -E '^(cuda|nvidia)-'
    CUDA_HOME="$(echo "$out"/venv/lib/python3*/site-packages/nvidia/cu13)"

    # What the wheels lack beside a real toolkit: lib64, the names without a version
    # that the linker looks for, and a stand-in for the driver's own libcuda.
    ln -sfn lib "$CUDA_HOME/lib64"
    for library in "$CUDA_HOME"/lib/lib{cudart,cublas,cublasLt,curand,nvrtc}.so.*; do
        ln -sf "$(basename "$library")" "${library%%.so.*}.so"
    done
    # Every function that cuda.h declares, in its old and new versions. Each returns
    # CUDA_ERROR_STUB_LIBRARY (34), as the functions of NVIDIA's own stub do.
    mkdir -p "$CUDA_HOME/lib64/stubs"
    echo '#include <cuda.h>' |
        gcc -E -P -D__CUDA_API_VERSION_INTERNAL -I"$CUDA_HOME/include" -x c - |
        grep -oE '\bcu[A-Z][A-Za-z0-9_]* *\(' | tr -d ' (' | sort -u |
        sed 's/.*/int &(void) { return 34; }/' |
        gcc -shared -fPIC -fno-builtin -Wl,-soname,libcuda.so.1 \
            -o "$CUDA_HOME/lib64/stubs/libcuda.so" -x c -
fi

# cudarc finds the libraries by CUDA_HOME and asks the nvcc on PATH for its version;
# candle's kernels are compiled by that nvcc too.
export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"
if ! command -v nvidia-smi >/dev/null; then
    export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"
fi
nvcc --version | grep release

# `cargo rustc` is `cargo build` with options for the last step alone: the program
# remembers where the CUDA libraries lie. The stubs are not in that folder, so they
# can never be taken for the driver.
cargo rustc --release --features cuda --bin distill --target-dir "$out/build" "$@" -- \
    -C link-arg="-Wl,-rpath,$CUDA_HOME/lib64"

program="$out/build/release/distill"
echo "built: $program"
ldd "$program"
if ldd "$program" | grep -q 'libcuda.so.1 => not found'; then
    # libcuda.so.1 belongs to the driver. Without one the program cannot even start,
    # so the stand-in takes its place for this one check. What runs on the CPU then
    # works; every call to a GPU returns an error.
    mkdir -p "$out/no-driver"
    ln -sf "$CUDA_HOME/lib64/stubs/libcuda.so" "$out/no-driver/libcuda.so.1"
    export LD_LIBRARY_PATH="$out/no-driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    echo "no driver here; started with LD_LIBRARY_PATH=$LD_LIBRARY_PATH:"
fi
"$program" --version
