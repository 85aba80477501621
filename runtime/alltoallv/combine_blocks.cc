#include "runtime/alltoallv/combine_blocks.h"

#include <algorithm>
#include <cmath>

namespace epserve::runtime {
namespace {

// What a row costs a reducing block, a pushed one being 1: an expert's here, and a partial one,
// which comes in as its peer sends it. Measured on H200s, 4096 rows of 7168 bf16, us with 18, 20,
// 22, 24 and 26 of 48 blocks to push: two ranks 196, 188, 191, 200 (24); top-4 174, 177, 182, 186
// (24); four ranks from 20 on 472, 474, 477, 480; top-4 364, 366, 368, 372; top-8 of 2048 there
// 169, 156, 148, 150.
constexpr double kLocalRowCost = 1.04;
constexpr double kPartialRowCost = 1.45;

}  // namespace

CombineBlocks DivideCombineBlocks(int total, int num_ranks, int topk) {
  // A token's: experts elsewhere, each an expert's row that somebody reads to push; experts here;
  // other ranks with any of its experts, each a partial row that comes back.
  const double ranks = num_ranks;
  const double elsewhere = topk * (ranks - 1) / ranks;
  const double here = topk / ranks;
  const double partials = (ranks - 1) * (1 - std::pow(1 - 1 / ranks, topk));
  const double reduced = kLocalRowCost * here + kPartialRowCost * partials;
  const auto push = static_cast<int>(std::lround(total * elsewhere / (elsewhere + reduced)));
  const int bounded = std::clamp(push, 1, total - 1);
  return {bounded, total - bounded};
}

}  // namespace epserve::runtime
