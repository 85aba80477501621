// The backend that a program of engine tests is about: the host's, or, where it is compiled with
// EPSERVE_TEST_CUDA, CUDA's, with ranks on as many GPUs as there are (one is enough).
#ifndef EPSERVE_TESTS_RUNTIME_ENGINE_ENGINE_BACKEND_H_
#define EPSERVE_TESTS_RUNTIME_ENGINE_ENGINE_BACKEND_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "runtime/engine/engine.h"
#ifdef EPSERVE_TEST_CUDA
#include "runtime/engine/cuda_engine.h"
#endif

namespace epserve::testing {

#ifdef EPSERVE_TEST_CUDA

inline constexpr bool kCudaBackend = true;

// Two ranks a GPU at most: more of them in one process keep each other's kernels from starting for
// seconds. The product has one rank a process.
inline int NumTestRanks(int wanted) { return std::min(wanted, 2 * runtime::NumCudaDevices()); }

inline absl::StatusOr<std::unique_ptr<runtime::Engine>> CreateTestEngine(
    runtime::EngineOptions options, int rank) {
  options.cuda.device = rank % std::max(1, runtime::NumCudaDevices());
  options.cuda.comm_blocks = 8;  // So that two ranks' waiting blocks leave room on one GPU.
  return runtime::CreateCudaEngine(options);
}

// Rows and weights in bf16, fp32 sums; fp8 checkpoints are computed with rows in fp8.
inline double ErrorLimit(runtime::DataType /*rows*/, bool fp8_weights) {
  return fp8_weights ? 6e-2 : 1e-2;
}
// What another token's row may differ by where a batch differs elsewhere: nothing.
inline constexpr double kOtherRowsLimit = 0.0;
// The FFN's kernels take whole tiles of 16.
inline constexpr std::int64_t kOddIntermediate = 144;

#else

inline constexpr bool kCudaBackend = false;

inline int NumTestRanks(int wanted) { return wanted; }

inline absl::StatusOr<std::unique_ptr<runtime::Engine>> CreateTestEngine(
    const runtime::EngineOptions& options, int /*rank*/) {
  return runtime::CreateHostEngine(options);
}

inline double ErrorLimit(runtime::DataType rows, bool /*fp8_weights*/) {
  return rows == runtime::DataType::kFp32 ? 1e-5 : 1e-2;
}
// An expert's rows may have been cut into other tiles.
inline constexpr double kOtherRowsLimit = 1e-5;
inline constexpr std::int64_t kOddIntermediate = 136;

#endif

// A test of engines, skipped where the backend's device is missing.
class EngineBackendTest : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef EPSERVE_TEST_CUDA
    if (runtime::NumCudaDevices() == 0) {
      GTEST_SKIP() << "the cuda engine needs a GPU, and this machine has none";
    }
#endif
  }
};

}  // namespace epserve::testing

#endif  // EPSERVE_TESTS_RUNTIME_ENGINE_ENGINE_BACKEND_H_
