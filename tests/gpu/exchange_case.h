// One batch of the device exchanges' tests: its shape, its inputs, the experts that it meets and
// how its result is judged.
#ifndef EPSERVE_TESTS_GPU_EXCHANGE_CASE_H_
#define EPSERVE_TESTS_GPU_EXCHANGE_CASE_H_

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "runtime/alltoallv/device_exchange.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/base/dtype.h"
#include "runtime/base/limits.h"

namespace epserve::runtime {

struct Case {
  int num_ranks = 4;
  std::vector<std::int64_t> tokens = {37, 64, 0, 129};  // a rank
  std::vector<std::int64_t> later_tokens;               // in rounds 2, 3, 6, 7, ...; none: the same
  std::int64_t hidden = 512;
  int topk = 8;
  std::int64_t experts = 30;  // not divisible by the ranks
  DataType dtype = DataType::kBf16;
  RowPayload payload = RowPayload::kCopy;
  DeviceExchange::Path path = DeviceExchange::Path::kPrefill;
  int comm_blocks = 6;
  int push_blocks = 0;
  int reduce_blocks = 4;
  std::int64_t line_tokens = 128;
  std::int64_t decode_tokens = 256;  // most of a rank
  // The last rank comes so late to the first round's dispatch, and to the second one's combine.
  absl::Duration late;
  double limit = 1e-2;
  // Of a slot's batches, the first and every other one is dispatched without a count matrix.
  bool uncounted = false;
  bool one_expert = false;  // all tokens on one expert
  // The first groups of 128 of every token are hard to cast: zeros, zeros around one value whose
  // scale's reciprocal would overflow, and one large among small.
  bool odd_groups = false;

  // Rounds take turns with two areas or slots: each meets both numbers of tokens.
  std::int64_t TokensIn(int round, int rank) const {
    const bool later = !later_tokens.empty() && round / 2 % 2 == 1;
    return later ? later_tokens[rank] : tokens[rank];
  }
};

// As many experts a token and in all as there may be: each source's rows go to nearly all ranks.
inline Case WideCase(DeviceExchange::Path path) {
  Case c;
  c.path = path;
  c.topk = kMaxTopk;
  c.experts = 512;
  return c;
}

// What expert e makes of a row: a factor that tells experts apart.
inline float FactorOf(std::int64_t expert) { return 1.0f + 0.25f * static_cast<float>(expert % 7); }

struct HostTokens {
  std::vector<float> x;  // rounded to the dtype
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  std::vector<std::byte> packed;
};

inline HostTokens MakeTokens(const Case& c, std::int64_t num_tokens, std::mt19937* rng) {
  HostTokens h;
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> expert(-1, static_cast<int>(c.experts) - 1);
  std::vector<float> raw(num_tokens * c.hidden);
  for (float& v : raw) v = normal(*rng);
  if (c.odd_groups) {
    constexpr std::int64_t kGroup = kFp8GroupElements;
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      float* const row = raw.data() + t * c.hidden;
      std::fill_n(row, 2 * kGroup, 0.0f);
      row[kGroup + 3] = 1e-37f;
      row[2 * kGroup] = 3e4f;
    }
  }
  h.packed.resize(raw.size() * DataTypeBytes(c.dtype));
  h.x.resize(raw.size());
  ConvertFromFloat(c.dtype, raw.data(), h.packed.data(), raw.size());
  ConvertToFloat(c.dtype, h.packed.data(), h.x.data(), raw.size());
  for (std::int64_t i = 0; i < num_tokens * c.topk; ++i) {
    h.ids.push_back(c.one_expert ? static_cast<int>(c.experts) - 1 : expert(*rng));
    h.weights.push_back(std::abs(normal(*rng)));
  }
  return h;
}

template <typename T>
T* Upload(const std::vector<T>& host, DeviceBuffer* buffer) {
  auto created = DeviceBuffer::Create(host.size() * sizeof(T));
  EXPECT_TRUE(created.ok()) << created.status();
  *buffer = std::move(created).value();
  if (!host.empty()) {
    EXPECT_EQ(
        cudaMemcpy(buffer->as<T>(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
        cudaSuccess);
  }
  return buffer->as<T>();
}

// One batch's inputs, and its output poisoned.
struct RoundBuffers {
  DeviceBuffer x, ids, weights, out;
  CudaTokens tokens;

  void Fill(const Case& c, const HostTokens& host, std::int64_t num_tokens) {
    tokens.x = Upload(host.packed, &x);
    tokens.topk_ids = Upload(host.ids, &ids);
    tokens.topk_weights = Upload(host.weights, &weights);
    tokens.num_tokens = num_tokens;
    tokens.topk = c.topk;
    tokens.dtype = c.dtype;
    tokens.payload = c.payload;
    Upload(std::vector<std::byte>(host.packed.size(), std::byte{0xff}), &out);
  }
};

// Multiplies each expert's rows by its factor, on the host: the test's experts. Everything goes
// through the rank's own stream: the default stream is not ordered with it, and would be shared.
// `pinned` holds all rows: copies from pageable memory share staging buffers between the ranks.
inline void RunTestExperts(const Case& c, std::int64_t first_expert, std::int64_t num_local,
                           const std::int32_t* device_offsets, void* device_rows, std::byte* pinned,
                           cudaStream_t stream) {
  const auto copy = [stream](void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    ASSERT_EQ(cudaMemcpyAsync(to, from, bytes, kind, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  };
  std::vector<std::int32_t> offsets(num_local + 1);
  copy(pinned, device_offsets, offsets.size() * 4, cudaMemcpyDeviceToHost);
  std::memcpy(offsets.data(), pinned, offsets.size() * 4);
  const std::size_t count = static_cast<std::size_t>(offsets[num_local]) * c.hidden;
  if (count == 0) return;
  const std::size_t bytes = count * DataTypeBytes(c.dtype);
  std::vector<float> values(count);
  copy(pinned, device_rows, bytes, cudaMemcpyDeviceToHost);
  ConvertToFloat(c.dtype, pinned, values.data(), count);
  for (std::int64_t e = 0; e < num_local; ++e) {
    for (std::int64_t i = offsets[e] * c.hidden; i < offsets[e + 1] * c.hidden; ++i) {
      values[i] *= FactorOf(first_expert + e);
    }
  }
  ConvertFromFloat(c.dtype, values.data(), pinned, count);
  copy(device_rows, pinned, bytes, cudaMemcpyHostToDevice);
}

inline double RelativeError(const std::vector<float>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (std::isnan(got[i])) return INFINITY;
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

inline void CheckAgainstReference(const Case& c, const HostTokens& tokens, std::int64_t num_tokens,
                                  const std::vector<std::byte>& result) {
  std::vector<float> got(num_tokens * c.hidden);
  ConvertToFloat(c.dtype, result.data(), got.data(), got.size());
  std::vector<double> want(got.size(), 0.0);
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    double factor = 0;
    for (int k = 0; k < c.topk; ++k) {
      const std::int32_t id = tokens.ids[t * c.topk + k];
      if (id >= 0) factor += static_cast<double>(tokens.weights[t * c.topk + k]) * FactorOf(id);
    }
    for (std::int64_t h = 0; h < c.hidden; ++h)
      want[t * c.hidden + h] = factor * tokens.x[t * c.hidden + h];
  }
  EXPECT_LE(RelativeError(got, want), c.limit);
}

}  // namespace epserve::runtime

#endif  // EPSERVE_TESTS_GPU_EXCHANGE_CASE_H_
