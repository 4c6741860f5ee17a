// Instruction-set levels. A kernel source is compiled once for each level, into a namespace of that name
// (the build passes -D RMSQ_ISA=<level> and the level's -m flags); the op calls the one in force.
//
// Kernel sources include no C++ standard library and no torch header: an inline function compiled there with
// AVX-512 flags could be the copy the linker keeps for everyone, and crash a machine that lacks them.
#pragma once

namespace rmsq {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

// The level in force: the best this machine has, or the one set by rmsq_set_isa.
Isa isa();

}  // namespace rmsq

// Declare a kernel in every level's namespace, and call it in the one in force.
// clang-format off: a line for each level
#if defined(__x86_64__)
#define RMSQ_DECLARE_KERNEL(signature)         \
    namespace rmsq {                           \
    namespace portable { signature; }          \
    namespace avx2 { signature; }              \
    namespace avx512 { signature; }            \
    namespace avx512_bf16 { signature; }       \
    }
#define RMSQ_KERNEL(name)                                             \
    (rmsq::isa() == rmsq::Isa::avx512_bf16 ? rmsq::avx512_bf16::name  \
     : rmsq::isa() == rmsq::Isa::avx512    ? rmsq::avx512::name       \
     : rmsq::isa() == rmsq::Isa::avx2      ? rmsq::avx2::name         \
                                           : rmsq::portable::name)
#else
#define RMSQ_DECLARE_KERNEL(signature) \
    namespace rmsq {                   \
    namespace portable { signature; }  \
    }
#define RMSQ_KERNEL(name) (rmsq::portable::name)
#endif
// clang-format on
