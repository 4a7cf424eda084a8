// SPDX-License-Identifier: Apache-2.0
// What the library exports: the functions of the best instruction set that the CPU
// has, or of one chosen by name. Compiled for the baseline of the platform.
#include <cstring>

#include "abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace portable {
extern const LowbitFunctions functions;
}
#if defined(__x86_64__)
namespace avx2 {
extern const LowbitFunctions functions;
}
namespace avx512 {
extern const LowbitFunctions functions;
}
#endif

namespace {

struct Isa {
  const char* name;
  const LowbitFunctions* functions;
  bool (*runs)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

// Best first.
const Isa ISAS[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::functions, has_avx512},
    {"avx2", &avx2::functions, has_avx2},
#endif
    {"portable", &portable::functions, always},
};

}  // namespace

// Name of the i-th instruction set, best first; null beyond the last.
EXPORT const char* lowbit_isa_name(int i) {
  return i >= 0 && i < int(sizeof ISAS / sizeof *ISAS) ? ISAS[i].name : nullptr;
}

// Whether this CPU runs it.
EXPORT int lowbit_isa_runs(int i) { return ISAS[i].runs(); }

// Its functions; the order is that of abi.h.
EXPORT const LowbitFunctions* lowbit_isa_functions(int i) { return ISAS[i].functions; }
