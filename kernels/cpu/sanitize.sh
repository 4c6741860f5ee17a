#!/bin/sh
# Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run the CPU kernel tests on them, on
# every instruction-set level this machine has. From the repository's root: kernels/cpu/sanitize.sh [absolute path of a python]
# The library is built aside; the one installed stays as it is.
set -eu
python=${1:-python3}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

cp -R setup.py pyproject.toml kernels vllm_neuron_rmsq tests "$build"
cd "$build"
CXXFLAGS="$sanitizers -O1" LDFLAGS="$sanitizers" "$python" setup.py --quiet build_ext --inplace
test -f vllm_neuron_rmsq/_cpu_kernels.so || { cat vllm_neuron_rmsq/_cpu_kernels.txt; exit 1; }
# Which variable holds the flags depends on setuptools: a library without the checks would pass all tests.
grep -q __asan_report vllm_neuron_rmsq/_cpu_kernels.so || { echo "error: built without sanitizers"; exit 1; }

# Python itself was built without sanitizers: theirs must be loaded first, and what it never frees is not ours.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$build" \
    "$python" -m pytest tests/kernels/cpu -p no:cacheprovider
