#include "runtime/microbench/workload.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace epserve::runtime {
namespace {

// Streams of one seed that must not coincide.
enum class RandomStream : std::uint32_t { kIds, kRows };

std::mt19937 MakeRandom(const BenchParams& params, int rank, RandomStream stream) {
  std::seed_seq seed{params.seed, static_cast<std::uint32_t>(rank),
                     static_cast<std::uint32_t>(stream)};
  return std::mt19937(seed);
}

double ExpertFactor(const BenchParams& params, std::int64_t expert) {
  return 1.0 + static_cast<double>(expert) / static_cast<double>(params.num_experts);
}

}  // namespace

std::vector<std::int32_t> RandomIds(const BenchParams& params, int rank) {
  std::mt19937 random = MakeRandom(params, rank, RandomStream::kIds);
  std::uniform_int_distribution<std::int32_t> expert(
      0, static_cast<std::int32_t>(params.num_experts) - 1);
  std::vector<std::int32_t> ids;
  ids.reserve(params.tokens_per_rank * params.topk);
  for (std::int64_t t = 0; t < params.tokens_per_rank; ++t) {
    const auto begin = static_cast<std::ptrdiff_t>(ids.size());
    while (static_cast<std::ptrdiff_t>(ids.size()) < begin + params.topk) {
      const std::int32_t id = expert(random);
      if (std::find(ids.begin() + begin, ids.end(), id) == ids.end()) ids.push_back(id);
    }
  }
  return ids;
}

CountMatrix CountAll(const BenchParams& params, const Placement& placement) {
  std::vector<std::int32_t> all;
  for (int rank = 0; rank < params.num_ranks; ++rank) {
    const std::vector<std::int32_t> ids = RandomIds(params, rank);
    all.insert(all.end(), ids.begin(), ids.end());
  }
  return ComputeCountMatrix(all, params.tokens_per_rank * params.num_ranks, params.topk, placement);
}

Workload MakeWorkload(const BenchParams& params, int rank) {
  Workload workload;
  workload.topk_ids = RandomIds(params, rank);
  std::mt19937 random = MakeRandom(params, rank, RandomStream::kRows);
  std::uniform_real_distribution<float> weight(0.1f, 1.0f);
  for (std::int64_t t = 0; t < params.tokens_per_rank; ++t) {
    float sum = 0.0f;
    for (int k = 0; k < params.topk; ++k) {
      workload.topk_weights.push_back(weight(random));
      sum += workload.topk_weights.back();
    }
    for (int k = 0; k < params.topk; ++k) *(workload.topk_weights.end() - 1 - k) /= sum;
  }
  std::uniform_real_distribution<float> value(-1.0f, 1.0f);
  const std::uint64_t row_bytes = params.hidden * DataTypeBytes(params.dtype);
  workload.x.resize(params.tokens_per_rank * row_bytes);
  std::vector<float> row(params.hidden);
  for (std::int64_t t = 0; t < params.tokens_per_rank; ++t) {
    for (float& element : row) element = value(random);
    ConvertFromFloat(params.dtype, row.data(), workload.x.data() + t * row_bytes, params.hidden);
  }
  return workload;
}

void RunStandInExperts(const BenchParams& params, std::int64_t first_expert,
                       const ReceivedRows& received) {
  const std::uint64_t row_bytes = params.hidden * DataTypeBytes(received.dtype);
  std::vector<float> row(params.hidden);
  for (std::int64_t n = 0; n < received.num_rows; ++n) {
    double factor = 0.0;
    for (int k = 0; k < received.topk; ++k) {
      const std::int32_t local = received.local_experts[n * received.topk + k];
      if (local < 0) continue;
      factor +=
          received.weights[n * received.topk + k] * ExpertFactor(params, first_expert + local);
    }
    ConvertToFloat(received.dtype, received.rows[n], row.data(), params.hidden);
    for (float& element : row) element *= static_cast<float>(factor);
    ConvertFromFloat(received.dtype, row.data(), received.partial_rows + n * row_bytes,
                     params.hidden);
  }
}

double MaxRelativeError(const BenchParams& params, const Workload& workload,
                        const std::vector<std::byte>& out) {
  const std::uint64_t row_bytes = params.hidden * DataTypeBytes(params.dtype);
  std::vector<float> x(params.hidden);
  std::vector<float> y(params.hidden);
  double worst = 0.0;
  for (std::int64_t t = 0; t < params.tokens_per_rank; ++t) {
    double factor = 0.0;
    for (int k = 0; k < params.topk; ++k) {
      const std::int64_t i = t * params.topk + k;
      factor += workload.topk_weights[i] * ExpertFactor(params, workload.topk_ids[i]);
    }
    ConvertToFloat(params.dtype, workload.x.data() + t * row_bytes, x.data(), params.hidden);
    ConvertToFloat(params.dtype, out.data() + t * row_bytes, y.data(), params.hidden);
    double error = 0.0;
    double norm = 0.0;
    for (std::int64_t h = 0; h < params.hidden; ++h) {
      const double expected = factor * x[h];
      error += (y[h] - expected) * (y[h] - expected);
      norm += expected * expected;
    }
    const double relative = std::sqrt(error / std::max(norm, 1e-30));
    worst = std::isfinite(relative) ? std::max(worst, relative)
                                    : std::numeric_limits<double>::infinity();
  }
  return worst;
}

double ErrorLimit(DataType dtype) {
  switch (dtype) {
    case DataType::kFp32:
      return 1e-5;
    case DataType::kFp16:
      return 2e-3;
    default:
      return 1e-2;
  }
}

}  // namespace epserve::runtime
