// A worker's memory: what the plan says, and no more than a tenth on top, at its peak.
#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "tests/runtime/engine/engine_cluster.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

// "VmHWM" of this process: the most memory that was ever resident.
std::uint64_t PeakResidentBytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    std::uint64_t kib = 0;
    if (word == "VmHWM:" && status >> kib) return kib * 1024;
  }
  return 0;
}

// A process of its own (one test a program), because the peak never comes down.
TEST(EngineMemoryTest, PeakStaysWithinATenthOfThePlan) {
#ifdef EPSERVE_SANITIZED
  GTEST_SKIP() << "sanitizers keep memory of their own";
#endif
  testing::TempDirectory directory;
  testing::CheckpointSpec spec{.dtype = DataType::kBf16, .hidden = 1024, .intermediate = 1024};
  spec.experts = 9;
  const auto path = directory.path() / "model";
  testing::WriteCheckpoint(path, spec);
  testing::EngineCluster cluster(path.string(), 1, /*max_batch_tokens=*/1024);
  cluster.StartEpoch(1);
  for (int slot = 0; slot < 2; ++slot) {
    testing::Batch batch;
    batch.slot = slot;
    batch.sequence = static_cast<std::uint64_t>(slot) + 1;
    batch.num_tokens = 1024;
    batch.topk = 2;
    batch.hidden.resize(1024 * 1024 * sizeof(float));
    for (int i = 0; i < 2048; ++i) batch.ids.push_back(i % 9);
    batch.weights.assign(2048, 0.5f);
    ASSERT_TRUE(cluster.Run(batch).ok());
  }
  const auto plan = cluster.engine(0).PlanMemory(cluster.placement(), 0);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_GE(plan->weight_bytes, 200u << 20);
  // What another rank's weights may take, as these go first: all but the routers.
  EXPECT_LE(cluster.engine(0).held_host_bytes(), plan->weight_bytes);
  EXPECT_GE(cluster.engine(0).held_host_bytes(), 200u << 20);
  const std::uint64_t planned = plan->weight_bytes + plan->heap_bytes + plan->workspace_bytes;
  const std::uint64_t peak = PeakResidentBytes();
  RecordProperty("planned_bytes", std::to_string(planned));
  RecordProperty("peak_bytes", std::to_string(peak));
  EXPECT_GT(peak, plan->weight_bytes);
  EXPECT_LE(static_cast<double>(peak), 1.1 * static_cast<double>(planned))
      << "weights " << plan->weight_bytes << ", heap " << plan->heap_bytes << ", workspace "
      << plan->workspace_bytes;
}

}  // namespace
}  // namespace epserve::runtime
