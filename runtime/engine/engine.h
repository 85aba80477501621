// What a worker daemon drives: one GPU (or one slice of the CPU) with its experts' weights, its
// symmetric heap and its part in dispatch, experts and combine. One implementation a backend
// (host, cuda, nccl); all give the same results and pass the same tests.
//
// Life: Create ─► LoadExperts ─► [ CreateHeap ─► OpenPeers ─► SealHeap ─► batches ─► CloseEpoch ]*
// A batch on a slot: Stage [─► ExchangeCounts] ─► Dispatch ─► RunExperts ─► Combine ─► Finish; or
// Stage ─► DispatchUncounted ─► RunExperts ─► Combine ─► Finish, on every rank.
// A slot's next batch starts, on any rank, only after its last one has ended on all of them.
// A device backend enqueues in all but Stage and ExchangeCounts (which must return counts) and
// Finish.
//
// Thread safety: LoadExperts and the epoch calls come from one thread, with no batch running but
// for Abort(), which may be called from any thread at any time. Each slot's calls come from one
// thread at a time; different slots run at once.
#ifndef EPSERVE_RUNTIME_ENGINE_ENGINE_H_
#define EPSERVE_RUNTIME_ENGINE_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "runtime/alltoallv/shared_batch.h"
#include "runtime/base/dtype.h"
#include "runtime/checkpoint/model_info.h"
#include "runtime/engine/device_regions.h"
#include "runtime/routing/count_matrix.h"

namespace epserve::runtime {

// How a rank's GPU heap is handed to its peers.
enum class HandleChoice {
  kAuto,    // as kFd: what peers of one host can always open
  kFd,      // a file descriptor over a Unix socket
  kFabric,  // a fabric handle, for peers of one NVLink domain; refused where the driver grants none
};

// Of the device backends alone.
struct CudaOptions {
  bool use_nccl = false;      // rows are carried by NCCL: the nccl backend
  int device = 0;             // ordinal among the visible ones
  int comm_blocks = 24;       // blocks of dispatch, and half of those of combine, a slot
  bool fp8_dispatch = false;  // rows are cast to fp8 on their way to the experts
  std::string handle_dir;     // of the handle sockets; empty: abstract names
  HandleChoice handle_type = HandleChoice::kAuto;
};

struct EngineOptions {
  std::string checkpoint_dir;
  std::string cluster_id;
  std::int64_t max_batch_tokens = 4096;  // over all ranks
  int num_slots = 2;                     // batches in flight
  int compute_threads = 1;               // per slot, host backend
  absl::Duration peer_timeout = absl::Seconds(30);
  absl::Duration busy_poll = absl::ZeroDuration();  // before a wait for a peer sleeps, host backend
  CudaOptions cuda;
};

struct MemoryPlan {
  std::uint64_t weight_bytes = 0;  // in the type they are held in
  std::uint64_t heap_bytes = 0;
  std::uint64_t workspace_bytes = 0;
  std::string held_type;  // "fp32", "bf16", ...
};

// The memory that a device backend's plan is for.
struct DeviceMemory {
  std::uint64_t available_bytes = 0;  // free, or held by this engine already
  std::string name;                   // "GPU 0 (NVIDIA H200)"
};

struct ShardInput {
  int slot = 0;
  std::uint64_t sequence = 0;        // batch number in the epoch
  std::int64_t layer = 0;            // model layer number
  DataType dtype = DataType::kFp32;  // kFp32, kFp16, kBf16
  std::int64_t num_tokens = 0;       // T
  int topk = 0;                      // K
  // [T, H] dtype, memory of the host; stays valid until Finish. Null: all rows are of device_rows.
  const void* hidden = nullptr;
  // Stay valid until Finish, too. Only for an engine that has device_regions(); rows whose hidden
  // states lie there must have ids. Ids that lie there, too, are for batches that will be
  // dispatched uncounted.
  std::span<const ShardDeviceRows> device_rows;
  // [T, K], null: the router decides, or they are of device_rows.
  const std::int32_t* topk_ids = nullptr;
  const float* topk_weights = nullptr;  // [T, K], null where topk_ids is
  // The whole batch, where all ranks see it and every engine takes_shared_batches(): given to all
  // or to none. This rank's shard, which must have ids, is its part of it. Stays as it is until
  // every rank has finished, but for rows that follow and rows that their own rank's output
  // replaces.
  SharedBatch shared;
  // Where Finish will be told to leave the output, for an engine that can bring it there at once,
  // in Combine; may be the place of the input's rows. Null: not known yet.
  void* output = nullptr;
};

struct BatchTimes {
  std::int64_t dispatch_ns = 0;
  std::int64_t ffn_ns = 0;
  std::int64_t combine_ns = 0;
};

class Engine {
 public:
  virtual ~Engine() = default;

  virtual std::string_view backend() const = 0;
  virtual const ModelInfo& model() const = 0;
  // Whether a slot's batches may be run by one thread now and another then.
  virtual bool runs_on_any_thread() const { return false; }

  // What `rank` of `placement` will hold; computed from the headers alone.
  virtual absl::StatusOr<MemoryPlan> PlanMemory(const Placement& placement, int rank) const = 0;

  // Nothing where the plan is for the host's memory.
  virtual absl::StatusOr<std::optional<DeviceMemory>> ReadDeviceMemory() const {
    return std::nullopt;
  }

  // Of the host's memory, what LoadExperts would keep, or give back before it takes more. Not while
  // it runs.
  virtual std::uint64_t held_host_bytes() const { return 0; }

  // Loads the experts that `rank` owns in every layer, reading no other expert's bytes. Keeps what
  // it holds if the placement and rank are those already loaded. `progress(loaded, total)` in
  // bytes.
  virtual absl::Status LoadExperts(
      const Placement& placement, int rank,
      const std::function<void(std::uint64_t, std::uint64_t)>& progress) = 0;

  // Creates this rank's heap for `epoch`; returns the handle that the peers open it by.
  virtual absl::StatusOr<std::string> CreateHeap(std::uint64_t epoch) = 0;
  // What kind of handle the open epoch's is: "shm", "fd", "fabric" or "nccl"; empty: none is open.
  virtual std::string handle_type() const = 0;
  virtual absl::Status OpenPeers(std::span<const std::string> handles) = 0;  // [R], by rank
  // Memory of the host that rows and outputs of this epoch's shards may lie in; it stays until
  // CloseEpoch. A device backend pins it, and then copies straight from and to it. A failure says
  // why that is not to be had; batches are served all the same.
  virtual absl::Status UseHostRows(std::span<std::byte> /*memory*/) { return absl::OkStatus(); }
  // Opens what shards' device_rows lie in; null: this backend reaches no other process's memory.
  virtual DeviceRegions* device_regions() { return nullptr; }
  // Copies small parts of device regions to the host, and waits: no more than a shard's tensors.
  // Before the slot's Stage. UNIMPLEMENTED: without device_regions().
  virtual absl::Status ReadDevice(int /*slot*/, std::span<const DeviceRead> /*reads*/) {
    return absl::UnimplementedError(absl::StrCat("read device: the ", std::string(backend()),
                                                 " backend has no device regions"));
  }
  // Every peer has opened this heap: takes its name out of the system, so that a crash leaves
  // nothing behind.
  virtual void SealHeap() = 0;
  // Ends every wait of every slot with ABORTED; stays in force until the next CreateHeap.
  virtual void Abort() = 0;
  // Unmaps the peers and drops the heap. REQUIRES: no batch running.
  virtual void CloseEpoch() = 0;

  // FFN(x) of one local expert by plain loops, apart from the batch path: what a probe is held
  // against. x and result are [H]. REQUIRES: experts loaded, `expert` (global) owned by this rank.
  virtual absl::StatusOr<std::vector<float>> ReferenceExpert(std::int64_t layer,
                                                             std::int64_t expert,
                                                             std::span<const float> x) const = 0;

  // Whether Dispatch can take rows of a shared batch where they stand.
  virtual bool takes_shared_batches() const { return false; }
  // Takes a shard in, routes it where ids are absent, and counts it: no counts, of no ranks, where
  // the ids are of device_rows.
  virtual absl::StatusOr<ShardCounts> Stage(const ShardInput& input) = 0;
  // Whether ExchangeCounts is to be had.
  virtual bool exchanges_counts() const { return false; }
  // The count matrix of the slot's staged batch, which the ranks gather among themselves through
  // each other's heaps; the same on all. Every rank calls it, also with an empty shard.
  // DEADLINE_EXCEEDED: a peer's counts did not come within peer_timeout, naming the peer. ABORTED:
  // Abort() was called. UNIMPLEMENTED: not exchanges_counts().
  virtual absl::StatusOr<CountMatrix> ExchangeCounts(int /*slot*/) {
    return absl::UnimplementedError(
        absl::StrCat("exchange counts: ranks of the ", std::string(backend()),
                     " backend cannot; give the coordinator --count-exchange=coordinator or auto"));
  }
  virtual absl::Status Dispatch(int slot, const CountMatrix& counts) = 0;
  // Whether DispatchUncounted is to be had for batches of `topk` experts a token; the same on all
  // ranks. Shards of such batches may have their ids in device_rows.
  virtual bool dispatches_uncounted(int /*topk*/) const { return false; }
  // In place of ExchangeCounts and Dispatch: every row has a place of its own in the receiver's
  // heap, whoever sends how many, and the counts go there with the rows. No host waits for them.
  // The result is the same to the bit. UNIMPLEMENTED: not dispatches_uncounted().
  virtual absl::Status DispatchUncounted(int /*slot*/) {
    return absl::UnimplementedError(absl::StrCat("dispatch: ranks of the ", std::string(backend()),
                                                 " backend cannot without a count matrix"));
  }
  virtual absl::Status RunExperts(int slot) = 0;
  virtual absl::Status Combine(int slot) = 0;
  // Where the output stands after Combine, [T, H] in the input's type, for whoever would only copy
  // it on from Finish; it stays until Finish. Null: not where the host can read it.
  virtual const std::byte* CombinedRows(int /*slot*/) const { return nullptr; }
  // Waits until the slot's work is done. `output` is [T, H] in the input's type, overwritten; it
  // may be the place of the input's rows, and null after CombinedRows was taken instead, or where
  // all rows go to device memory;
  // `local_expert_rows` [E_local] receives the rows each local expert took. Frees the slot.
  virtual absl::Status Finish(int slot, void* output, BatchTimes* times,
                              std::vector<std::int64_t>* local_expert_rows) = 0;
  // What was wrong with ids and weights of device_rows, in the pieces' order: of the batch that
  // was finished last. Valid until the slot's next Stage.
  virtual std::span<const RoutingFault> routing_faults(int /*slot*/) const { return {}; }
  // Drops a staged or failed batch and frees the slot; safe in any state of it.
  virtual void Discard(int slot) = 0;
};

// INVALID_ARGUMENT, NOT_FOUND, DATA_LOSS for a checkpoint that is not there, not supported or
// damaged, naming file and tensor.
absl::StatusOr<std::unique_ptr<Engine>> CreateHostEngine(const EngineOptions& options);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_ENGINE_H_
