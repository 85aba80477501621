// y = x . w^T in fp32 by oneDNN, on the calling thread alone.
//
// oneDNN rather than OpenBLAS, both on one thread of a 2-core AVX-512 EPYC (libdnnl 2.6.3 and
// serial libopenblas 0.3.21, N = 2 K, weights streamed from memory):
//
//   K      rows    oneDNN          OpenBLAS
//   512    1       170 us          76 us
//   1024   1       0.5 ms          1.7 ms
//   2048   1, 16   1.9, 8.5 ms     7.5, 9.7 ms
//   2048   64, 512 16, 90 ms       17.5, 91 ms
//
// An even match where it is bound by arithmetic, and oneDNN reads weights two to four times as fast
// at the few rows an expert gets in decoding. The table is of one call each; in blocks of columns,
// as here, oneDNN takes up to a quarter less time at 4 to 16 rows, and up to 4 % more at 256.
// Thread-safe. The result of a row depends on x's row, on w and on the sizes alone, so the same
// call gives the same bits.
#ifndef EPSERVE_RUNTIME_EXPERTS_SGEMM_H_
#define EPSERVE_RUNTIME_EXPERTS_SGEMM_H_

#include <cstdint>

namespace epserve::runtime {

struct SgemmArgs {
  std::int64_t m = 0, n = 0, k = 0;
  const float* x = nullptr;  // [m, k], rows ldx apart
  std::int64_t ldx = 0;
  const float* w = nullptr;  // [n, k], rows k apart
  float* y = nullptr;        // [m, n], rows ldy apart, out, overwritten
  std::int64_t ldy = 0;
};

// REQUIRES: sizes > 0, ldx >= k, ldy >= n.
void Sgemm(const SgemmArgs& args);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_SGEMM_H_
