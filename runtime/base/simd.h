// EPS_MULTIVERSION compiles a function once for each vector width and picks one at load time, so
// that one portable binary uses what the machine has. Plain loops under the marker vectorise.
#ifndef EPSERVE_RUNTIME_BASE_SIMD_H_
#define EPSERVE_RUNTIME_BASE_SIMD_H_

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(EPSERVE_SANITIZED)
// -O2 of GCC 12 vectorises only what is cheap; these loops want all of it. Sanitizers are left out
// because the resolver of a multiversioned function runs before their runtime is up.
#define EPS_MULTIVERSION                                                        \
  __attribute__((optimize("O3"), target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EPS_MULTIVERSION
#endif

#endif  // EPSERVE_RUNTIME_BASE_SIMD_H_
