// What travels on the control stream, in plain structs: the worker's own code knows no protobuf.
// The fields mean what proto/epserve/v1/control.proto says of them. Values without identity; move
// them, they carry the rows of a shard.
#ifndef EPSERVE_SERVER_WORKER_CONTROL_MESSAGES_H_
#define EPSERVE_SERVER_WORKER_CONTROL_MESSAGES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "runtime/base/dtype.h"
#include "runtime/engine/engine.h"
#include "runtime/routing/count_matrix.h"
#include "server/common/process_identity.h"
#include "server/common/region_rows.h"

namespace epserve::worker {

// ---- coordinator to worker

struct Assignment {
  int rank = -1;
  runtime::Placement placement;
};

struct Standby {
  std::string reason;
};

using server::DeviceRegionInfo;
using server::DeviceRegionState;
using server::DeviceRows;
using server::RegionFault;
using server::RegionRows;

struct CreateHeap {
  std::uint64_t epoch = 0;
  std::string row_arena;  // handle; empty: none
  std::string region_socket;
  std::string region_secret;
  std::vector<DeviceRegionInfo> device_regions;
};

struct OpenPeers {
  std::uint64_t epoch = 0;
  std::vector<std::string> handles;  // [R]
};

struct EpochStarted {
  std::uint64_t epoch = 0;
};

struct EpochEnded {
  std::uint64_t epoch = 0;
  std::string reason;
};

struct LeaseGrant {
  std::uint64_t epoch = 0;
  std::int64_t echo_us = 0;
  std::int64_t duration_us = 0;
};

struct Shard {
  std::uint64_t epoch = 0;
  std::uint64_t batch = 0;
  int slot = 0;
  std::int64_t layer = 0;
  runtime::DataType dtype = runtime::DataType::kFp32;
  std::int64_t num_tokens = 0;  // T
  int topk = 0;                 // K
  std::string hidden;           // [T, H] dtype
  bool routed = false;
  std::string topk_ids;      // [T, K] i32, where routed
  std::string topk_weights;  // [T, K] fp32, where routed
  // These three are empty where the rows are in the epoch's arena, from row_block on.
  bool in_arena = false;
  int row_block = 0;
  std::int64_t first_row = 0;
  std::vector<std::int64_t> shard_begin;  // [R + 1] where all ranks see all rows, else empty
  bool rows_follow = false;               // with it: a rank is still to read rows of its own there
  std::vector<RegionRows> sources;        // to read into the arena first
  std::vector<RegionRows> targets;        // to write from there in the end
  std::vector<DeviceRows> device_rows;
  bool separate_triggers = false;
  bool device_counts = false;  // the ranks exchange the counts among themselves
  std::optional<runtime::CountMatrix> counts;
  std::int64_t received_ns = 0;  // steady clock, set on arrival
};

struct CountsKnown {
  std::uint64_t epoch = 0;
  std::uint64_t batch = 0;
  runtime::CountMatrix counts;
};

struct DispatchTrigger {
  std::uint64_t epoch = 0;
  std::uint64_t batch = 0;
};

struct CombineTrigger {
  std::uint64_t epoch = 0;
  std::uint64_t batch = 0;
};

struct Rejected {
  absl::Status status;
};

struct Shutdown {
  std::string reason;
};

struct ForgetRegions {
  std::vector<std::uint64_t> regions;
};

struct OpenDeviceRegion {
  DeviceRegionInfo region;
};

struct CloseDeviceRegions {
  std::vector<std::uint64_t> regions;
};

using CoordinatorMessage =
    std::variant<Assignment, Standby, CreateHeap, OpenPeers, EpochStarted, EpochEnded, LeaseGrant,
                 Shard, CountsKnown, DispatchTrigger, CombineTrigger, Rejected, Shutdown,
                 ForgetRegions, OpenDeviceRegion, CloseDeviceRegions>;

// ---- worker to coordinator

struct Hello {
  std::string worker_id;
  std::string incarnation;
  std::string version;
  std::string backend;
  runtime::ModelInfo model;
  std::uint64_t last_epoch = 0;
  int held_rank = -1;
  int held_num_ranks = 0;
  std::string node;
  server::ProcessIdentity process;
  std::int64_t max_batch_tokens = 0;
  std::string cluster_id;
  int num_slots = 0;
  bool device_counts = false;
};

struct Heartbeat {
  std::uint64_t epoch = 0;
  std::int64_t sent_monotonic_us = 0;
  std::uint64_t resident_bytes = 0;
};

struct LoadProgress {
  std::uint64_t loaded_bytes = 0;
  std::uint64_t total_bytes = 0;
};

struct Loaded {
  int rank = -1;
  int num_ranks = 0;
  std::uint64_t weight_bytes = 0;
  std::uint64_t heap_bytes = 0;
};

struct HeapCreated {
  std::uint64_t epoch = 0;
  std::string handle;
  bool row_arena_mapped = false;
  bool regions_reachable = false;
  bool takes_shared_batches = false;
  std::vector<DeviceRegionState> refused_regions;
  std::string handle_type;  // as of Engine::handle_type()
};

struct PeersOpened {
  std::uint64_t epoch = 0;
  std::vector<float> probe_output;
};

struct CountsReport {
  std::uint64_t epoch = 0;
  std::uint64_t batch = 0;
  runtime::ShardCounts counts;
};

// Sent where phases are triggered one by one: dispatch and experts are done here.
struct DispatchDone {
  std::uint64_t epoch = 0;
  std::uint64_t batch = 0;
};

struct PhaseTimes {
  std::int64_t assign_ns = 0;
  std::int64_t counts_ns = 0;
  std::int64_t start_monotonic_ns = 0;
  runtime::BatchTimes engine;
};

struct BatchDone {
  std::uint64_t epoch = 0;
  std::uint64_t batch = 0;
  absl::Status status;
  std::string output;  // [T, H] dtype, where status is OK and the shard is not in the arena
  PhaseTimes times;
  std::vector<std::int64_t> local_expert_rows;  // [E_local]
  std::vector<RegionFault> region_faults;
};

struct DeviceRegionOpened {
  DeviceRegionState state;
};

struct DeviceRegionsClosed {
  std::vector<std::uint64_t> regions;
};

struct EpochQuiesced {
  std::uint64_t epoch = 0;
};

struct Leaving {
  std::string reason;
};

struct WorkerFailure {
  absl::Status status;
};

using WorkerMessage = std::variant<Hello, Heartbeat, LoadProgress, Loaded, HeapCreated, PeersOpened,
                                   CountsReport, DispatchDone, BatchDone, EpochQuiesced, Leaving,
                                   WorkerFailure, DeviceRegionOpened, DeviceRegionsClosed>;

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_CONTROL_MESSAGES_H_
