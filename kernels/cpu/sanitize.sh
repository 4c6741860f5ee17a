#!/bin/sh
# Build the kernels with sanitizers and run their tests on every instruction-set level this machine has:
#     kernels/cpu/sanitize.sh address [python]   AddressSanitizer and UndefinedBehaviorSanitizer, all kernel tests
#     kernels/cpu/sanitize.sh thread [python]    ThreadSanitizer, the tests that call from several threads
# From the repository's root; the python's path is absolute. The library is built aside; the one installed stays as
# it is.
set -eu
kind=${1:?address or thread}
python=${2:-python3}
case $kind in
    address) flags="address,undefined -fno-sanitize-recover=all" libraries="libasan libubsan" mark=__asan_report tests=tests/kernels/cpu ;;
    thread) flags=thread libraries=libtsan mark=__tsan_write tests="tests/kernels/cpu/test_threads.py" ;;
    *) echo "error: expected address or thread, got $kind" >&2; exit 2 ;;
esac
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

cp -R setup.py pyproject.toml kernels vllm_neuron_rmsq tests "$build"
cd "$build"
CXXFLAGS="-fsanitize=$flags -fno-omit-frame-pointer -O1" LDFLAGS="-fsanitize=$flags" \
    "$python" setup.py --quiet build_ext --inplace
test -f vllm_neuron_rmsq/_cpu_kernels.so || { cat vllm_neuron_rmsq/_cpu_kernels.txt; exit 1; }
# Which variable holds the flags depends on setuptools: a library without the checks would pass all tests.
grep -q $mark vllm_neuron_rmsq/_cpu_kernels.so || { echo "error: built without sanitizers"; exit 1; }

preload=
for library in $libraries; do preload="$preload $(${CXX:-g++} -print-file-name=$library.so)"; done
# Python itself was built without sanitizers: theirs must be loaded first, and what it never frees is not ours.
# ThreadSanitizer cannot do with addresses as random as newer kernels make them, and sees nothing of the
# synchronization in libraries that were built without it: what those do to memory it is told to pass over.
run=
[ $kind = thread ] && run="setarch --addr-no-randomize"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS="ignore_noninstrumented_modules=1 report_signal_unsafe=0 exitcode=66 halt_on_error=1" \
    PYTHONPATH="$build" $run "$python" -m pytest $tests -p no:cacheprovider --capture=no  # or reports are lost
