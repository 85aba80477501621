// One worker's control stream as the host sees it, in plain structs: the generated types stay
// behind control_service and control_proto_convert.
#ifndef EPSERVE_SERVER_COORDINATOR_WORKER_STREAM_H_
#define EPSERVE_SERVER_COORDINATOR_WORKER_STREAM_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "runtime/routing/count_matrix.h"
#include "server/common/process_identity.h"
#include "server/common/region_rows.h"
#include "server/coordinator/state_machine/commands.h"
#include "server/coordinator/state_machine/events.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

// ---- to a worker, beside the state machine's own commands

// Where the workers of this machine get the descriptors of clients' regions; empty: nowhere.
struct RegionAccess {
  std::string socket;
  std::string secret;
};

struct CreateHeapMessage {
  EpochId epoch = 0;
  std::string row_arena;  // handle; empty: none
  RegionAccess regions;
  std::vector<server::DeviceRegionInfo> device_regions;
};

using server::DeviceRegionInfo;
using server::DeviceRegionState;
using server::DeviceRows;
using server::RegionFault;
using server::RegionRows;

struct ShardMessage {
  EpochId epoch = 0;
  BatchId batch = 0;
  int slot = 0;
  std::int64_t layer = 0;
  RowType row_type = RowType::kFp32;
  std::int64_t num_tokens = 0;  // T of this shard
  int topk = 0;                 // K
  std::string hidden;           // [T, H] row_type
  bool routed = true;
  std::string topk_ids;      // [T, K] int32 little-endian, empty unless routed
  std::string topk_weights;  // [T, K] fp32 little-endian, empty unless routed
  // These three are empty where the rows are in the epoch's arena, from row_block on.
  bool in_arena = false;
  int row_block = 0;
  std::int64_t first_row = 0;
  std::vector<std::int64_t> shard_begin;  // [R + 1] where all ranks see all rows there, else empty
  bool rows_follow = false;               // with it: a rank is still to read rows of its own there
  std::vector<RegionRows> sources;        // rows to read into the arena first
  std::vector<RegionRows> targets;        // rows to write from there, and not to leave there
  std::vector<DeviceRows> device_rows;
  TriggerMode trigger = TriggerMode::kTogether;
  std::shared_ptr<const runtime::CountMatrix> counts;  // for CountExchange::kCoordinator
  bool device_counts = false;                          // CountExchange::kDevice
};

struct CountMatrixMessage {
  EpochId epoch = 0;
  BatchId batch = 0;
  std::shared_ptr<const runtime::CountMatrix> counts;
};

struct DispatchTriggerMessage {
  EpochId epoch = 0;
  BatchId batch = 0;
};

struct CombineTriggerMessage {
  EpochId epoch = 0;
  BatchId batch = 0;
};

struct ForgetRegionsMessage {
  std::vector<std::uint64_t> regions;
};

struct OpenDeviceRegionMessage {
  DeviceRegionInfo region;
};

struct CloseDeviceRegionsMessage {
  std::vector<std::uint64_t> regions;
};

using StreamMessage =
    std::variant<AssignRank, SendStandby, CreateHeapMessage, SendOpenPeers, SendEpochStarted,
                 SendEpochEnded, GrantLease, SendShutdown, RejectWorker, ShardMessage,
                 CountMatrixMessage, DispatchTriggerMessage, CombineTriggerMessage,
                 ForgetRegionsMessage, OpenDeviceRegionMessage, CloseDeviceRegionsMessage>;

// Thread-safe. No call blocks.
class WorkerStream {
 public:
  virtual ~WorkerStream() = default;

  // Sent in the order of the calls. A stream whose worker does not read is closed once too much
  // waits. Dropped where the stream has ended.
  virtual void Send(StreamMessage message) = 0;

  // Ends the stream; the first call counts. What was sent before still goes out if `flush`.
  virtual void Close(absl::Status reason, bool flush) = 0;
};

// ---- from a worker

// What a worker says of itself when it joins.
struct HelloInfo {
  std::string worker_id;
  std::string incarnation;
  std::string version;
  std::string backend;
  std::string fingerprint;  // of its checkpoint
  EpochId last_epoch = 0;
  int held_rank = -1;
  int held_num_ranks = 0;
  std::string node;
  server::ProcessIdentity process;
  std::int64_t max_batch_tokens = 0;
  std::string cluster_id;
  int num_slots = 0;
  bool device_counts = false;
  std::string peer;  // of its connection, as gRPC names it
};

struct WorkerTimes {
  std::int64_t start_ns = 0;  // monotonic clock of the worker's machine: the shard had come
  std::int64_t assign_ns = 0;
  std::int64_t counts_ns = 0;
  std::int64_t dispatch_ns = 0;
  std::int64_t ffn_ns = 0;
  std::int64_t combine_ns = 0;
};

// What a worker says of device regions, which the state machine does not know.
struct DeviceRegionAnswer {
  StreamId stream = 0;
  std::optional<DeviceRegionState> opened;
  std::vector<std::uint64_t> closed;
};

// One message of a worker: what the state machine is told, and the payload that it is not.
struct WorkerReport {
  Event event;                                  // never WorkerHello
  std::optional<DeviceRegionAnswer> answer;     // in place of `event`
  std::vector<DeviceRegionState> refused;       // HeapCreated: device regions that are not open
  bool row_arena_mapped = false;                // HeapCreated
  bool regions_reachable = false;               // HeapCreated
  bool takes_shared_batches = false;            // HeapCreated
  std::string handle_type;                      // HeapCreated
  std::vector<float> probe_output;              // PeersOpened: [H]
  std::string output;                           // BatchDone: [T, H] of the shard, or in the arena
  WorkerTimes times;                            // BatchDone
  std::vector<std::int64_t> local_expert_rows;  // BatchDone: [E_local]
  std::vector<RegionFault> region_faults;       // BatchDone
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_WORKER_STREAM_H_
