#include "server/common/probe.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>

#include "absl/strings/str_cat.h"

namespace epserve::server {
namespace {

std::vector<int> OwningRanks(const runtime::Placement& placement) {
  std::vector<int> ranks;
  for (int rank = 0; rank < placement.num_ranks(); ++rank) {
    if (placement.num_local_experts(rank) > 0) ranks.push_back(rank);
  }
  return ranks;
}

}  // namespace

float ProbeValue(std::uint32_t index) {
  std::uint32_t z = index * 0x9e3779b9u + 0x7f4a7c15u;
  z = (z ^ (z >> 16)) * 0x85ebca6bu;
  z = (z ^ (z >> 13)) * 0xc2b2ae35u;
  z = z ^ (z >> 16);
  return static_cast<float>(z >> 8) * 0x1p-23f - 1.0f;
}

std::vector<float> ProbeRow(std::int64_t hidden) {
  std::vector<float> row(static_cast<std::size_t>(hidden));
  for (std::size_t h = 0; h < row.size(); ++h) row[h] = ProbeValue(static_cast<std::uint32_t>(h));
  return row;
}

std::int64_t ProbeExpert(const runtime::Placement& placement, int rank) {
  return placement.num_local_experts(rank) > 0 ? placement.first_expert[rank] : -1;
}

std::int64_t NumProbeTokens(int num_ranks) { return std::max(2 * num_ranks, 2); }

ProbeBatch MakeProbeBatch(const runtime::Placement& placement, std::int64_t hidden, int topk) {
  ProbeBatch batch;
  batch.num_tokens = NumProbeTokens(placement.num_ranks());
  const std::vector<float> row = ProbeRow(hidden);
  const std::vector<int> owners = OwningRanks(placement);
  const std::size_t used = std::min(static_cast<std::size_t>(topk), owners.size());
  const std::size_t num_places = static_cast<std::size_t>(batch.num_tokens * topk);
  batch.topk_ids.assign(num_places, -1);
  batch.topk_weights.assign(num_places, 0.0f);
  for (std::int64_t t = 0; t < batch.num_tokens; ++t) {
    batch.hidden.insert(batch.hidden.end(), row.begin(), row.end());
    for (std::size_t k = 0; k < used; ++k) {
      const int rank = owners[(static_cast<std::size_t>(t) + k) % owners.size()];
      const std::size_t place = static_cast<std::size_t>(t * topk) + k;
      batch.topk_ids[place] = static_cast<std::int32_t>(ProbeExpert(placement, rank));
      batch.topk_weights[place] = 1.0f / static_cast<float>(k + 2);
    }
  }
  return batch;
}

absl::Status VerifyProbe(const ProbeBatch& batch, const runtime::Placement& placement,
                         std::int64_t hidden, std::span<const std::vector<float>> probe_outputs,
                         std::span<const float> output, double tolerance) {
  const std::size_t row_size = static_cast<std::size_t>(hidden);
  if (probe_outputs.size() != static_cast<std::size_t>(placement.num_ranks())) {
    return absl::InternalError(absl::StrCat("probe: ", probe_outputs.size(),
                                            " reference rows differ from the number of ranks ",
                                            placement.num_ranks()));
  }
  for (int rank : OwningRanks(placement)) {
    if (probe_outputs[rank].size() != row_size) {
      return absl::InternalError(absl::StrCat("probe: reference row of rank ", rank, " has ",
                                              probe_outputs[rank].size(),
                                              " elements, which differs from hidden ", hidden));
    }
  }
  if (output.size() != batch.hidden.size()) {
    return absl::InternalError(absl::StrCat("probe: output of ", output.size(),
                                            " elements differs from the expected ",
                                            batch.hidden.size()));
  }
  const std::size_t topk = batch.topk_ids.size() / static_cast<std::size_t>(batch.num_tokens);
  for (std::size_t t = 0; t < static_cast<std::size_t>(batch.num_tokens); ++t) {
    std::vector<double> expected(row_size, 0.0);
    std::string ranks;
    for (std::size_t k = 0; k < topk; ++k) {
      const std::int32_t expert = batch.topk_ids[t * topk + k];
      if (expert < 0) continue;
      const int rank = placement.OwnerOf(expert);
      absl::StrAppend(&ranks, ranks.empty() ? "" : ", ", rank);
      const double weight = batch.topk_weights[t * topk + k];
      for (std::size_t h = 0; h < row_size; ++h) expected[h] += weight * probe_outputs[rank][h];
    }
    double error = 0.0;
    double norm = 0.0;
    for (std::size_t h = 0; h < row_size; ++h) {
      const double difference = output[t * row_size + h] - expected[h];
      error += difference * difference;
      norm += expected[h] * expected[h];
    }
    // Written so that NaN fails, and so that an all-zero expectation asks for exact zeros.
    const bool right = std::sqrt(error) <= tolerance * std::sqrt(norm);
    if (!right) {
      return absl::InternalError(
          absl::StrCat("probe: row ", t, " (ranks ", ranks, ") has L2 error ", std::sqrt(error),
                       " beyond ", tolerance, " of the expected norm ", std::sqrt(norm)));
    }
  }
  return absl::OkStatus();
}

}  // namespace epserve::server
