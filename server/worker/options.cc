#include "server/worker/options.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "runtime/base/id.h"
#include "runtime/base/limits.h"
#include "runtime/base/status.h"
#include "server/common/command_line.h"

namespace epserve::worker {
namespace {

void AddClusterFlags(CLI::App& app, Options& options) {
  app.add_option("--coordinator", options.coordinator,
                 "Address of the coordinator's gRPC server, HOST:PORT or unix:PATH")
      ->envname("EPSERVE_COORDINATOR")
      ->capture_default_str();
  app.add_option("--checkpoint", options.checkpoint_dir,
                 "Checkpoint directory (config.json and safetensors), the coordinator's model")
      ->envname("EPSERVE_CHECKPOINT")
      ->required();
  app.add_option("--worker-id", options.worker_id,
                 "Name of this worker, [A-Za-z0-9_.-]{1,64}, unique in the cluster; keep it over "
                 "restarts (default: <host name>-<process id>)")
      ->envname("EPSERVE_WORKER_ID");
  app.add_option("--cluster-id", options.cluster_id,
                 "Name that coordinator and workers of one cluster share, [A-Za-z0-9_.-]{1,64}")
      ->envname("EPSERVE_CLUSTER_ID")
      ->capture_default_str();
  app.add_option("--health-listen", options.health_listen,
                 "Address that answers health checks alone, in plaintext, HOST:PORT or unix:PATH "
                 "(default: none)")
      ->envname("EPSERVE_HEALTH_LISTEN");
}

void AddEngineFlags(CLI::App& app, Options& options) {
  app.add_option("--max-batch-tokens", options.max_batch_tokens,
                 "Most tokens of one batch, over all workers; the same everywhere")
      ->envname("EPSERVE_MAX_BATCH_TOKENS")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 24))
      ->capture_default_str();
  app.add_option("--slots", options.num_slots, "Batches in flight; the same everywhere")
      ->envname("EPSERVE_SLOTS")
      ->check(CLI::Range(1, runtime::kMaxSlots))
      ->capture_default_str();
  app.add_option("--compute-threads", options.compute_threads, "Threads of the experts, per batch")
      ->envname("EPSERVE_COMPUTE_THREADS")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--peer-timeout-ms", options.peer_timeout_ms,
                 "Longest wait for a peer's rows or the coordinator's trigger, milliseconds")
      ->envname("EPSERVE_PEER_TIMEOUT_MS")
      ->check(CLI::Range(std::int64_t{10}, std::int64_t{86'400'000}))
      ->capture_default_str();
  app.add_option("--leave-timeout-ms", options.leave_timeout_ms,
                 "Longest that a worker which is told to go waits for the coordinator to let it, "
                 "and then again for its own batches, milliseconds")
      ->envname("EPSERVE_LEAVE_TIMEOUT_MS")
      ->check(CLI::Range(std::int64_t{0}, std::int64_t{86'400'000}))
      ->capture_default_str();
  app.add_option(
         "--busy-poll-us", options.busy_poll_us,
         "How long to look for the coordinator's next message, for a slot's next batch, and "
         "for peers' rows (host), before sleeping, microseconds; above 0 it keeps a core, "
         "and one a slot, busy")
      ->envname("EPSERVE_BUSY_POLL_US")
      ->check(CLI::Range(0, runtime::kMaxBusyPollUs))
      ->capture_default_str();
  app.add_option(
         "--backend", options.backend,
         "What computes and moves rows: host, cuda, nccl, or auto (cuda where a GPU is); the "
         "same everywhere")
      ->envname("EPSERVE_BACKEND")
      ->check(CLI::IsMember({"auto", "host", "cuda", "nccl"}))
      ->capture_default_str();
}

void AddCudaFlags(CLI::App& app, Options& options) {
  app.add_option(
         "--device", options.device,
         "GPU of the cuda and nccl backends, among those CUDA_VISIBLE_DEVICES leaves (default: "
         "--local-rank modulo their number)")
      ->envname("EPSERVE_DEVICE")
      ->check(CLI::Range(0, 1023));
  app.add_option("--local-rank", options.local_rank,
                 "Number of this worker among those of its machine")
      ->envname("EPSERVE_LOCAL_RANK")
      ->check(CLI::Range(0, 1023))
      ->capture_default_str();
  app.add_option("--comm-blocks", options.comm_blocks,
                 "GPU blocks that move rows, per batch; the same everywhere")
      ->envname("EPSERVE_COMM_BLOCKS")
      ->check(CLI::Range(1, 128))
      ->capture_default_str();
  app.add_option("--dispatch-dtype", options.dispatch_dtype,
                 "Form of rows on their way to the experts (cuda): bf16, fp8; the same everywhere")
      ->envname("EPSERVE_DISPATCH_DTYPE")
      ->check(CLI::IsMember({"bf16", "fp8"}))
      ->capture_default_str();
  app.add_option("--handle-dir", options.handle_dir,
                 "Directory of the sockets that hand GPU heaps to peers, for containers that share "
                 "a volume and no network namespace (default: abstract sockets)")
      ->envname("EPSERVE_HANDLE_DIR")
      ->check(CLI::ExistingDirectory);
  app.add_option("--handle-type", options.handle_type,
                 "How GPU heaps are handed to peers: fd, fabric, or auto (fd)")
      ->envname("EPSERVE_HANDLE_TYPE")
      ->check(CLI::IsMember({"auto", "fd", "fabric"}))
      ->capture_default_str();
}

void AddSecurityFlags(CLI::App& app, Options& options) {
  app.add_option("--tls-cert", options.tls.cert,
                 "PEM certificate chain to show, with the role worker; read again when it changes "
                 "(default: no TLS)")
      ->envname("EPSERVE_TLS_CERT");
  app.add_option("--tls-key", options.tls.key, "PEM private key of --tls-cert")
      ->envname("EPSERVE_TLS_KEY");
  app.add_option("--tls-ca", options.tls.ca,
                 "PEM authorities that the coordinator's certificate must come from")
      ->envname("EPSERVE_TLS_CA");
  app.add_option(
         "--tls-server-name", options.tls_server_name,
         "Name that the coordinator's certificate must have (default: --coordinator's host)")
      ->envname("EPSERVE_TLS_SERVER_NAME");
  app.add_option(
         "--secret-file", options.secret_file,
         "File whose first line is the secret to show to the coordinator; read again at each "
         "connection (default: none)")
      ->envname("EPSERVE_SECRET_FILE");
}

bool IsAddress(std::string_view address) {
  if (address.starts_with("unix:")) return address.size() > 5;
  const std::size_t colon = address.rfind(':');
  if (colon == address.npos || colon == 0) return false;
  const std::string_view port = address.substr(colon + 1);
  if (port.empty() || port.size() > 5) return false;
  int value = 0;
  for (const char c : port) {
    if (c < '0' || c > '9') return false;
    value = value * 10 + (c - '0');
  }
  return value >= 1 && value <= 65535;
}

absl::Status ValidateOptions(const Options& options) {
  EPS_RETURN_IF_ERROR(server::CheckTlsFiles(options.tls, /*ca_required=*/true));
  if (!IsAddress(options.coordinator)) {
    return absl::InvalidArgumentError(
        absl::StrCat("options: --coordinator \"", options.coordinator,
                     "\" is no address; give HOST:PORT or unix:PATH"));
  }
  if (!options.health_listen.empty() && !IsAddress(options.health_listen)) {
    return absl::InvalidArgumentError(
        absl::StrCat("options: --health-listen \"", options.health_listen,
                     "\" is no address; give HOST:PORT or unix:PATH"));
  }
  for (const auto& [flag, id] :
       {std::pair<std::string, std::string>{"--cluster-id", options.cluster_id},
        {"--worker-id", options.worker_id}}) {
    if (runtime::IsId(id)) continue;
    return absl::InvalidArgumentError(absl::StrCat("options: ", flag, " \"", absl::CHexEscape(id),
                                                   "\" is not of [A-Za-z0-9_.-]{1,64}"));
  }
  return absl::OkStatus();
}

std::string HostName() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0 || name[0] == '\0') return "worker";
  return name;
}

// The host's name may be longer than an id, and hold what an id may not.
std::string DefaultWorkerId(std::string_view node) {
  const std::string suffix = absl::StrCat("-", getpid());
  std::string id(node.substr(0, runtime::kMaxIdBytes - suffix.size()));
  std::replace_if(
      id.begin(), id.end(), [](char c) { return !runtime::IsIdChar(c); }, '_');
  return id + suffix;
}

}  // namespace

absl::StatusOr<ParsedOptions> ParseOptions(int argc, const char* const* argv) {
  Options options;
  CLI::App app(
      "epserve-worker: holds the weights of some of a model's experts and takes part in every "
      "batch. Every flag can also be given as the environment variable named.");
  AddClusterFlags(app, options);
  AddEngineFlags(app, options);
  AddSecurityFlags(app, options);
  AddCudaFlags(app, options);
  server::AddLogFlags(app, options.log_format, options.log_level);
  CLI::Option* const worker_id = app.get_option("--worker-id");
  EPS_ASSIGN_OR_RETURN(std::optional<std::string> text,
                       server::Parse(app, "epserve-worker", argc, argv));
  if (text.has_value()) return ParsedOptions{std::nullopt, *std::move(text)};
  options.node = HostName();
  if (worker_id->count() == 0) options.worker_id = DefaultWorkerId(options.node);
  EPS_RETURN_IF_ERROR(ValidateOptions(options));
  return ParsedOptions{std::move(options), ""};
}

}  // namespace epserve::worker
