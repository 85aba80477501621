#include "server/coordinator/coordinator.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <mutex>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/base/unique_fd.h"
#include "runtime/symmetric/stale_heaps.h"
#include "server/common/small_batch.h"
#include "server/coordinator/access.h"
#include "server/coordinator/admin_service.h"
#include "server/coordinator/control_service.h"
#include "server/coordinator/front_door/infer_service.h"
#include "server/coordinator/front_door/server_limits.h"
#include "server/coordinator/grpc_log.h"
#include "server/coordinator/host.h"
#include "server/coordinator/metrics_endpoint.h"
#include "server/coordinator/refusals.h"
#include "server/coordinator/region_server.h"
#include "server/rpc/channelz_service.h"
#include "server/rpc/connections.h"
#include "server/rpc/health_service.h"
#include "server/rpc/reflection_service.h"
#include "server/rpc/rpc_server.h"

namespace epserve::coordinator {
namespace {

// Finds a machine that vanished without closing its connections. Dead processes are seen at once,
// and stalled ones by their heartbeats, so this need not be fast.
constexpr int kKeepaliveTimeMs = 10'000;
constexpr int kKeepaliveTimeoutMs = 5'000;

// A stream's tensors of ordinary size pass without waiting for the receiver to widen its window.
// The connection's window, 64 KiB at first, is widened by gRPC's own estimate alone, which
// therefore stays on: without it a request of 66 KB waited 50 us for a window update on its way.
constexpr int kStreamWindowBytes = 8 << 20;
constexpr int kMaxFrameBytes = 1 << 20;

// What is still being answered when the server stops gets so long to leave.
constexpr auto kStopGrace = std::chrono::seconds(1);

// One thread reads, parses and answers for every connection: with a second, gRPC passes the polling
// from one to the other at each event, which costs more than it gains until a core is full.
constexpr int kIoThreads = 1;

// Before gRPC ends calls of its own choice, and with time for the look that finds it so.
std::uint64_t MaxHalfMessageBytes(const Options& options) {
  const auto most = MaxBufferedBytes(static_cast<int>(options.max_message_bytes));
  return static_cast<std::uint64_t>(most / 4 * 3);
}

CountExchangeMode CountExchangeModeOf(std::string_view option) {
  if (option == "coordinator") return CountExchangeMode::kCoordinator;
  return option == "device" ? CountExchangeMode::kDevice : CountExchangeMode::kAuto;
}

// What one core sums in the time that a message takes or two, of fp32 rows; and what its heap holds
// of one rank's.
std::int64_t SingleSourceTokens(const Config& config, std::int64_t hidden) {
  constexpr std::int64_t kMostBytes = 128 << 10;
  const std::int64_t shard_tokens =
      runtime::MaxShardTokens(config.max_batch_tokens, config.num_workers);
  const std::int64_t tokens = kMostBytes / (hidden * std::int64_t{sizeof(float)});
  return std::max<std::int64_t>(
      std::min({tokens, std::int64_t{server::kSmallBatchRows}, shard_tokens}), 1);
}

Config MakeConfig(const Options& options, const runtime::ModelInfo& model,
                  const Coordinator::Pace& pace) {
  Config config;
  config.num_workers = options.num_workers;
  config.num_experts = model.num_experts;
  config.topk = model.topk;
  config.layers = model.layers;
  config.max_batch_tokens = options.max_batch_tokens;
  config.single_source_tokens = SingleSourceTokens(config, model.hidden);
  config.num_slots = options.num_slots;
  config.queue_capacity = options.queue_capacity;
  config.merge_queued = options.merge_queued;
  config.input_is_told = true;  // by the server, see StartServer
  config.batch_window_us = options.batch_window_us;
  config.trigger = options.separate_triggers ? TriggerMode::kSeparate : TriggerMode::kTogether;
  config.count_exchange = CountExchangeModeOf(options.count_exchange);
  config.lease_us = options.lease_ms * 1000;
  config.client_regions = options.allow_client_shm;
  config.initial_epoch = static_cast<EpochId>(std::time(nullptr));
  config.epoch_pace_us = pace.epoch_pace_us;
  config.probe_backoff_us = pace.probe_backoff_us;
  config.formation_timeout_us = options.formation_timeout_ms * 1000;
  config.batch_timeout_us = options.batch_timeout_ms * 1000;
  config.drain_timeout_us = options.drain_timeout_ms * 1000;
  return config;
}

FrontDoorOptions MakeFrontDoorOptions(const Options& options, const runtime::ModelInfo& model) {
  FrontDoorOptions out;
  out.model.name = options.model_name;
  out.model.hidden = model.hidden;
  out.model.intermediate = model.intermediate;
  out.model.num_experts = model.num_experts;
  out.model.topk = model.topk;
  out.model.layers = model.layers;
  out.model.has_router = model.has_router;
  out.model.max_batch_tokens = options.max_batch_tokens;
  out.model.max_message_bytes = static_cast<std::uint64_t>(options.max_message_bytes);
  out.max_held_bytes = options.max_held_bytes;
  return out;
}

absl::Status CannotBind(const std::string& address, const char* flag) {
  return absl::UnavailableError(absl::StrCat("listen: address ", address,
                                             " cannot be bound: another process has it, or it is "
                                             "none of this machine's that this user may have; free "
                                             "it or give another ",
                                             flag));
}

// Of what gRPC says no more than that it could not.
absl::Status CheckDirectoryOf(const std::string& path, const std::string& address,
                              const char* flag) {
  std::string directory = std::filesystem::path(path).parent_path();
  if (directory.empty()) directory = ".";
  if (::access(directory.c_str(), W_OK | X_OK) == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("listen: address ", address, " cannot be bound: its directory ", directory,
                   " cannot be written to (", std::strerror(errno), "); create it, let user ",
                   ::geteuid(), " write to it, or give another ", flag));
}

// gRPC puts its own socket in the place of one that is there, whoever serves it. A file that nobody
// answers at is what a killed server left, and may be replaced. Addresses that are no path: OK.
absl::Status CheckUnixSocket(std::string_view address, const char* flag) {
  constexpr std::string_view kScheme = "unix:";
  if (!address.starts_with(kScheme)) return absl::OkStatus();
  std::string_view path = address.substr(kScheme.size());
  if (path.starts_with("//")) path.remove_prefix(2);
  sockaddr_un peer{};
  peer.sun_family = AF_UNIX;
  if (path.size() >= sizeof(peer.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "listen: the path of ", flag, " ", std::string(address), " has ", path.size(),
        " bytes, a Unix socket's at most ", sizeof(peer.sun_path) - 1, "; give a shorter one"));
  }
  EPS_RETURN_IF_ERROR(CheckDirectoryOf(std::string(path), std::string(address), flag));
  std::copy(path.begin(), path.end(), peer.sun_path);
  const runtime::UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("listen: no file descriptor (", std::strerror(errno), ")"));
  }
  const int result = ::connect(fd.get(), reinterpret_cast<sockaddr*>(&peer), sizeof(peer));
  // EAGAIN: somebody listens, and more wait there than it has accepted.
  if (result != 0 && errno != EAGAIN) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("listen: address ", std::string(address),
                                             " is served by another process; stop it or give "
                                             "another ",
                                             flag));
}

HelloPolicy MakeHelloPolicy(const Options& options, const runtime::ModelInfo& model,
                            const Coordinator::Pace& pace) {
  HelloPolicy policy;
  policy.version = EPSERVE_VERSION;
  policy.fingerprint = model.fingerprint;
  policy.max_batch_tokens = options.max_batch_tokens;
  policy.num_slots = options.num_slots;
  policy.cluster_id = options.cluster_id;
  policy.hello_timeout_ms = pace.hello_timeout_ms;
  return policy;
}

}  // namespace

// In the order of making; each outlives what stands below it.
struct Coordinator::Parts {
  std::unique_ptr<Metrics> metrics;
  std::unique_ptr<Refusals> refusals;
  std::unique_ptr<ShmRegistry> regions;
  std::unique_ptr<RegionServer> region_server;  // null: the workers get no descriptors
  std::unique_ptr<Host> host;
  std::unique_ptr<InferService> infer;
  std::unique_ptr<server::HttpServer> scrapes;  // null: off
  server::Health health;
  server::RpcServer server;
  std::vector<int> ports;
  std::once_flag stopped;

  // Empty where that is not to be had: rows in clients' regions are then copied here.
  RegionAccess ServeRegions(const std::string& cluster_id) {
    auto started = RegionServer::Start(cluster_id, regions.get());
    if (!started.ok()) {
      runtime::LogWarning(
          "regions_not_handed_out",
          {{"error", started.status()},
           {"effect", "rows in clients' shared memory are copied, which is slower"}});
      return {};
    }
    region_server = *std::move(started);
    return region_server->access();
  }

  absl::Status StartServer(const Options& options) {
    for (const std::string& address : options.listen) {
      EPS_RETURN_IF_ERROR(CheckUnixSocket(address, "--listen"));
    }
    EPS_RETURN_IF_ERROR(CheckUnixSocket(options.health_listen, "--health-listen"));
    grpc::ServerBuilder builder;
    ApplyServerLimits(static_cast<int>(options.max_message_bytes), builder);
    // Without this a second coordinator would share the port silently.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kStreamWindowBytes);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kMaxFrameBytes);
    ports.assign(options.listen.size(), -1);
    const auto credentials = options.tls.enabled() ? server::MakeServerCredentials(options.tls)
                                                   : grpc::InsecureServerCredentials();
    for (std::size_t i = 0; i < options.listen.size(); ++i) {
      server.Listen(options.listen[i], credentials, &builder, &ports[i]);
    }
    int health_port = -1;
    if (!options.health_listen.empty()) {
      server.Listen(options.health_listen, grpc::InsecureServerCredentials(), &builder,
                    &health_port);
    }
    server.SetMaxConnections(static_cast<std::size_t>(options.max_connections));
    server.SetBufferLimit(
        {MaxHalfMessageBytes(options), [this](const std::string& peer, std::uint64_t num_bytes) {
           refusals->OnHalfMessages(peer, num_bytes);
         }});
    server.SetOnNoPlace([this](const std::string& peer) { refusals->OnMaxConnections(peer); });
    server.SetCallLimits({std::chrono::milliseconds(options.message_timeout_ms),
                          std::chrono::milliseconds(options.stream_idle_timeout_ms),
                          std::chrono::milliseconds(options.reply_timeout_ms)});
    server.SetOnInputTaken(&host->wants_input_taken(), [this] { host->TellInputTaken(); });
    server.SetBusyPoll(std::chrono::microseconds(options.busy_poll_us));
    const bool started = server.Start(&builder, kIoThreads);
    for (std::size_t i = 0; i < options.listen.size(); ++i) {
      // gRPC binds in this order and stops at the first that it cannot, whose port stays below 0
      // (or becomes 0). It gives 1 for a Unix socket.
      if (ports[i] <= 0) return CannotBind(options.listen[i], "--listen");
      if (options.listen[i].starts_with("unix:")) ports[i] = 0;
    }
    if (health_port == 0 || (!started && !options.health_listen.empty())) {
      return CannotBind(options.health_listen, "--health-listen");
    }
    if (!started) return absl::InternalError("listen: gRPC could not start its server");
    return absl::OkStatus();
  }

  absl::Status StartScrapes(const Options& options, std::shared_ptr<Access> access) {
    if (options.metrics_listen == "off") return absl::OkStatus();
    const bool open = options.plaintext_metrics;
    EPS_ASSIGN_OR_RETURN(
        scrapes, ServeMetrics(options.metrics_listen, open ? server::TlsFiles() : options.tls,
                              open ? nullptr : std::move(access), metrics.get()));
    return absl::OkStatus();
  }

  // Once it listens: the ports are not known before.
  void TellOfHandshakes() {
    SetOnHandshakeRefused([this](const std::string& cause) {
      refusals->OnHandshake(cause, [this] {
        std::vector<std::string> peers;
        for (const int port : ports) {
          if (port == 0) continue;  // a Unix socket
          const std::vector<std::string> more = server::PeersInHandshake(port);
          peers.insert(peers.end(), more.begin(), more.end());
        }
        return peers;
      });
    });
  }

  void SetReady(bool ready) {
    metrics->SetServing(ready);
    health.Set("", ready);
    health.Set("readiness", ready);
  }
};

Coordinator::Coordinator(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

Coordinator::~Coordinator() { Stop(); }

absl::StatusOr<std::unique_ptr<Coordinator>> Coordinator::Create(const Options& options,
                                                                 const runtime::ModelInfo& model,
                                                                 std::function<void()> on_drained,
                                                                 Pace pace) {
  TakeGrpcLog();
  auto parts = std::make_unique<Parts>();
  parts->metrics = std::make_unique<Metrics>(model.num_experts);
  parts->refusals = std::make_unique<Refusals>(parts->metrics.get());
  ShmOptions shm;
  shm.allowed = options.allow_client_shm;
  shm.key_prefixes = options.shm_key_prefixes;
  parts->regions = std::make_unique<ShmRegistry>(std::move(shm));

  HostHooks hooks;
  hooks.on_drained = std::move(on_drained);
  hooks.on_serving = [raw = parts.get()](bool serving) { raw->SetReady(serving); };
  hooks.on_worker_refused = [raw = parts->refusals.get()](const HelloInfo& hello,
                                                          const absl::Status& status,
                                                          bool comes_back) {
    raw->OnWorker(comes_back ? Refusals::Worker::kTurnedAway : Refusals::Worker::kRejected, hello,
                  status);
  };
  EPS_ASSIGN_OR_RETURN(const int reclaimed, runtime::ReclaimStaleHeaps(options.cluster_id));
  if (reclaimed > 0) {
    runtime::LogInfo("stale_segments_reclaimed",
                     {{"cluster_id", options.cluster_id}, {"count", reclaimed}});
  }
  RowTransport rows{options.shared_rows, options.cluster_id, {}};
  if (options.allow_client_shm && options.shared_rows) {
    rows.regions = parts->ServeRegions(options.cluster_id);
  }
  parts->host = std::make_unique<Host>(MakeConfig(options, model, pace), model.hidden,
                                       std::move(rows), parts->metrics.get(), std::move(hooks));
  parts->infer =
      std::make_unique<InferService>(MakeFrontDoorOptions(options, model), parts->regions.get(),
                                     parts->host.get(), parts->host.get());
  parts->infer->AddTo(&parts->server);
  AddControlService(parts->host.get(), MakeHelloPolicy(options, model, pace), parts->refusals.get(),
                    &parts->server);
  AddAdminService(parts->host.get(), {options.cluster_id, EPSERVE_VERSION, options.model_name},
                  &parts->server);
  parts->health.AddTo(&parts->server);
  parts->health.Set("liveness", true);
  parts->SetReady(false);
  std::shared_ptr<Access> access;  // null: everybody may call everything
  if (options.tls.enabled() || !options.secrets_file.empty()) {
    EPS_ASSIGN_OR_RETURN(access,
                         Access::Create(options.tls, options.secrets_file, parts->refusals.get()));
    SetAccess(access, &parts->server);
  }
  EPS_RETURN_IF_ERROR(parts->StartScrapes(options, std::move(access)));
  server::AddChannelz(&parts->server);
  server::AddReflection(&parts->server);
  EPS_RETURN_IF_ERROR(parts->StartServer(options));
  if (options.tls.enabled()) parts->TellOfHandshakes();
  parts->host->Start();  // What came in between has waited in the inbox.
  return std::unique_ptr<Coordinator>(new Coordinator(std::move(parts)));
}

void Coordinator::Drain() { parts_->host->DrainCluster(); }

void Coordinator::Stop() {
  std::call_once(parts_->stopped, [this] {
    parts_->health.ShutDown();
    parts_->host->Stop();
    parts_->metrics->SetServing(false);
    parts_->server.Stop(kStopGrace);
    SetOnHandshakeRefused(nullptr);
  });
}

const std::vector<int>& Coordinator::ports() const { return parts_->ports; }

int Coordinator::metrics_port() const {
  return parts_->scrapes == nullptr ? 0 : parts_->scrapes->port();
}

const Metrics& Coordinator::metrics() const { return *parts_->metrics; }

}  // namespace epserve::coordinator
