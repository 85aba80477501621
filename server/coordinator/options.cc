#include "server/coordinator/options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "runtime/base/limits.h"
#include "runtime/base/status.h"
#include "server/common/command_line.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {
namespace {

void AddModelFlags(CLI::App& app, Options& options) {
  app.add_option("--checkpoint", options.checkpoint_dir,
                 "Checkpoint directory (config.json and safetensors); its headers are read")
      ->envname("EPSERVE_CHECKPOINT")
      ->required();
  app.add_option("--model-name", options.model_name,
                 "Name the model is served under (default: the checkpoint directory's base name)")
      ->envname("EPSERVE_MODEL_NAME");
  app.add_option("--workers", options.num_workers, "Workers that the experts are spread over")
      ->envname("EPSERVE_WORKERS")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--cluster-id", options.cluster_id,
                 "Name that coordinator and workers of one cluster share, [A-Za-z0-9_.-]{1,64}")
      ->envname("EPSERVE_CLUSTER_ID")
      ->capture_default_str();
}

void AddListenFlags(CLI::App& app, Options& options) {
  app.add_option("--listen", options.listen,
                 "Address of the gRPC server, HOST:PORT or unix:PATH; may be repeated "
                 "(default: 127.0.0.1:8001; port 0: any free port)")
      ->envname("EPSERVE_LISTEN")
      ->allow_extra_args(false);
  app.add_option("--metrics-listen", options.metrics_listen,
                 "Address of the Prometheus endpoint, HOST:PORT; off: none")
      ->envname("EPSERVE_METRICS_LISTEN")
      ->capture_default_str();
  app.add_flag("--insecure", options.insecure,
               "Allow listening beyond this machine without TLS and secrets")
      ->envname("EPSERVE_INSECURE");
  app.add_flag("--plaintext-metrics", options.plaintext_metrics,
               "Serve --metrics-listen in plaintext and to everybody, whatever TLS and secrets are "
               "set, also beyond this machine")
      ->envname("EPSERVE_PLAINTEXT_METRICS");
  app.add_option("--health-listen", options.health_listen,
                 "Address that answers health checks alone, in plaintext, for probes; HOST:PORT "
                 "(default: none)")
      ->envname("EPSERVE_HEALTH_LISTEN");
  app.add_option("--port-file", options.port_file,
                 "File to write the port of the first TCP --listen to, once bound (default: none)")
      ->envname("EPSERVE_PORT_FILE");
  app.add_option("--metrics-port-file", options.metrics_port_file,
                 "File to write the port of --metrics-listen to, once bound (default: none)")
      ->envname("EPSERVE_METRICS_PORT_FILE");
  app.add_option("--max-message-bytes", options.max_message_bytes,
                 "Largest gRPC message taken or sent, bytes")
      ->envname("EPSERVE_MAX_MESSAGE_BYTES")
      ->check(CLI::Range(std::int64_t{1} << 16, std::int64_t{2147483647}))
      ->capture_default_str();
  app.add_option("--max-held-bytes", options.max_held_bytes,
                 "Requests, outputs and unread replies of all callers together, bytes (gRPC's own "
                 "buffers come on top); further requests are turned away until replies are taken")
      ->envname("EPSERVE_MAX_HELD_BYTES")
      ->check(CLI::Range(std::int64_t{1} << 16, std::int64_t{1} << 50))
      ->capture_default_str();
  app.add_option(
         "--max-connections", options.max_connections,
         "Connections that may have calls under way at once, beside health checks and workers' "
         "streams; all callers over "
         "one Unix socket count as one")
      ->envname("EPSERVE_MAX_CONNECTIONS")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--busy-poll-us", options.busy_poll_us,
                 "How long to look for the next message before sleeping, microseconds; above 0 it "
                 "keeps a core busy")
      ->envname("EPSERVE_BUSY_POLL_US")
      ->check(CLI::Range(0, runtime::kMaxBusyPollUs))
      ->capture_default_str();
  app.add_flag("--allow-client-shm", options.allow_client_shm,
               "Let clients pass tensors in system and CUDA shared memory")
      ->envname("EPSERVE_ALLOW_CLIENT_SHM");
  app.add_option("--shm-key-prefix", options.shm_key_prefixes,
                 "Prefix that a client's shared-memory key must have; may be repeated "
                 "(default: any key)")
      ->envname("EPSERVE_SHM_KEY_PREFIX")
      ->allow_extra_args(false);
}

void AddSecurityFlags(CLI::App& app, Options& options) {
  app.add_option("--tls-cert", options.tls.cert,
                 "PEM certificate chain to show; with --tls-key, read again when it changes "
                 "(default: no TLS)")
      ->envname("EPSERVE_TLS_CERT");
  app.add_option("--tls-key", options.tls.key, "PEM private key of --tls-cert")
      ->envname("EPSERVE_TLS_KEY");
  app.add_option("--tls-ca", options.tls.ca,
                 "PEM authorities that callers' certificates must come from; with it every caller "
                 "must show one")
      ->envname("EPSERVE_TLS_CA");
  app.add_option("--secrets-file", options.secrets_file,
                 "File of lines '<frontend|worker|operator|metrics> <secret>'; callers without a "
                 "certificate show one of the secrets; read again when it changes (default: none)")
      ->envname("EPSERVE_SECRETS_FILE");
}

void AddBatchFlags(CLI::App& app, Options& options, std::string& trigger,
                   std::string& row_transport) {
  app.add_option("--max-batch-tokens", options.max_batch_tokens,
                 "Most tokens of one request and of one batch; the same on every worker")
      ->envname("EPSERVE_MAX_BATCH_TOKENS")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 24))
      ->capture_default_str();
  app.add_option_function<std::string>(
         "--merge",
         [&options](const std::string& when) { options.merge_queued = when == "queued"; },
         "When requests of one layer share a batch: never, or queued (those that wait in the queue "
         "when a batch starts, which is once all that has come is taken in)")
      ->envname("EPSERVE_MERGE")
      ->check(CLI::IsMember({"never", "queued"}))
      ->default_str("never");
  app.add_option("--batch-window-us", options.batch_window_us,
                 "How long a request waits for others of its layer to merge with, microseconds; "
                 "above 0 --merge is queued")
      ->envname("EPSERVE_BATCH_WINDOW_US")
      ->check(CLI::Range(std::int64_t{0}, std::int64_t{10'000'000}))
      ->capture_default_str();
  app.add_option("--queue-capacity", options.queue_capacity, "Most requests that wait in the queue")
      ->envname("EPSERVE_QUEUE_CAPACITY")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1'000'000}))
      ->capture_default_str();
  app.add_option("--slots", options.num_slots, "Batches in flight; the same everywhere")
      ->envname("EPSERVE_SLOTS")
      ->check(CLI::Range(1, runtime::kMaxSlots))
      ->capture_default_str();
  app.add_option("--trigger", trigger,
                 "Dispatch and combine are triggered together with the shard, or one by one: "
                 "together, separate")
      ->envname("EPSERVE_TRIGGER")
      ->check(CLI::IsMember({"together", "separate"}))
      ->capture_default_str();
  app.add_option("--count-exchange", options.count_exchange,
                 "How a batch's count matrix is made: coordinator (it computes it where it sees "
                 "the ids, else gathers it over the workers' streams), device (always by the "
                 "workers among themselves), or auto (coordinator where it sees the ids, else "
                 "device where the backend can, else over the streams)")
      ->envname("EPSERVE_COUNT_EXCHANGE")
      ->check(CLI::IsMember({"coordinator", "device", "auto"}))
      ->capture_default_str();
  app.add_option("--row-transport", row_transport,
                 "How rows reach the workers: shared (through memory that the workers of this "
                 "machine map; within messages to others) or messages (always within them)")
      ->envname("EPSERVE_ROW_TRANSPORT")
      ->check(CLI::IsMember({"shared", "messages"}))
      ->capture_default_str();
}

void AddTimeFlags(CLI::App& app, Options& options) {
  const auto add = [&app](const char* flag, std::int64_t& value, std::int64_t least,
                          const char* env, const char* text) {
    app.add_option(flag, value, text)
        ->envname(env)
        ->check(CLI::Range(least, std::int64_t{86'400'000}))
        ->capture_default_str();
  };
  add("--lease-ms", options.lease_ms, 50, "EPSERVE_LEASE_MS",
      "A worker that is not heard of for so long is lost, milliseconds");
  add("--formation-timeout-ms", options.formation_timeout_ms, 100, "EPSERVE_FORMATION_TIMEOUT_MS",
      "Longest that an epoch may take to form, milliseconds");
  add("--batch-timeout-ms", options.batch_timeout_ms, 100, "EPSERVE_BATCH_TIMEOUT_MS",
      "Longest that a batch may take, milliseconds; its epoch ends then");
  add("--message-timeout-ms", options.message_timeout_ms, 10, "EPSERVE_MESSAGE_TIMEOUT_MS",
      "Longest that the message of a call may take to come whole, milliseconds");
  add("--stream-idle-timeout-ms", options.stream_idle_timeout_ms, 10,
      "EPSERVE_STREAM_IDLE_TIMEOUT_MS",
      "Longest that a caller's stream may bring no message while none is answered, milliseconds");
  add("--reply-timeout-ms", options.reply_timeout_ms, 10, "EPSERVE_REPLY_TIMEOUT_MS",
      "Longest that a caller may take to read a reply that is there, milliseconds");
  add("--drain-timeout-ms", options.drain_timeout_ms, 0, "EPSERVE_DRAIN_TIMEOUT_MS",
      "Longest that SIGTERM waits for queued and running requests, milliseconds");
}

absl::Status ValidateSecurity(const Options& options) {
  EPS_RETURN_IF_ERROR(server::CheckTlsFiles(options.tls, /*ca_required=*/false));
  if (options.tls.enabled() && options.tls.ca.empty() && options.secrets_file.empty()) {
    return absl::InvalidArgumentError(
        "options: --tls-cert without --tls-ca and --secrets-file would serve everybody; give "
        "--tls-ca, so that callers show certificates, or --secrets-file");
  }
  const bool guarded = options.tls.enabled() || !options.secrets_file.empty();
  for (const std::string& address : options.listen) {
    if (guarded || options.insecure || IsLocalAddress(address)) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "options: address ", address,
        " can be reached from other machines, and neither TLS nor secrets are set; listen on "
        "127.0.0.1, [::1] or unix:PATH, give --tls-cert, --tls-key and --tls-ca or "
        "--secrets-file, or allow it with --insecure"));
  }
  if (!options.health_listen.empty() && !options.tls.enabled()) {
    return absl::InvalidArgumentError(
        "options: --health-listen is for a server with TLS; without TLS, --listen itself answers "
        "health checks of anybody");
  }
  if (!options.health_listen.empty()) {
    EPS_RETURN_IF_ERROR(ValidateAddress("--health-listen", options.health_listen));
  }
  if (options.metrics_listen != "off" && !guarded && !options.insecure &&
      !options.plaintext_metrics && !IsLocalAddress(options.metrics_listen)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "options: --metrics-listen ", options.metrics_listen,
        " can be reached from other machines, and neither TLS nor secrets are set; listen on "
        "127.0.0.1 or [::1], give --tls-cert, --tls-key and --tls-ca or --secrets-file, or allow "
        "it with --plaintext-metrics"));
  }
  return absl::OkStatus();
}

absl::Status ValidateOptions(const Options& options) {
  for (const std::string& address : options.listen) {
    EPS_RETURN_IF_ERROR(ValidateAddress("--listen", address));
  }
  if (options.metrics_listen != "off") {
    EPS_RETURN_IF_ERROR(ValidateAddress("--metrics-listen", options.metrics_listen));
    if (options.metrics_listen.starts_with("unix:")) {
      return absl::InvalidArgumentError(absl::StrCat("options: --metrics-listen ",
                                                     options.metrics_listen,
                                                     " is no TCP address; give HOST:PORT or off"));
    }
  }
  EPS_RETURN_IF_ERROR(ValidateSecurity(options));
  for (const std::string& prefix : options.shm_key_prefixes) {
    if (IsKeyPrefix(prefix)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("options: --shm-key-prefix \"", prefix,
                     "\" begins no key that a client may have: keys are [A-Za-z0-9_.-]{1,255}, "
                     "without their leading slashes, and neither epserve-* nor sem.*"));
  }
  // It becomes part of names of shared memory and sockets on the workers.
  const bool safe_id =
      !options.cluster_id.empty() && options.cluster_id.size() <= 64 &&
      options.cluster_id.find_first_not_of(
          "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == std::string::npos;
  if (!safe_id) {
    return absl::InvalidArgumentError(absl::StrCat("options: --cluster-id \"", options.cluster_id,
                                                   "\" does not match [A-Za-z0-9_.-]{1,64}"));
  }
  const std::int64_t probe_tokens = std::max<std::int64_t>(2 * options.num_workers, 2);
  if (options.max_batch_tokens < probe_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "options: --max-batch-tokens ", options.max_batch_tokens, " is below ", probe_tokens,
        ", which the readiness probe of ", options.num_workers, " workers needs"));
  }
  return absl::OkStatus();
}

std::string BaseName(const std::string& dir) {
  // As it was given: a link's name is the model's, not what it leads to.
  std::filesystem::path path = std::filesystem::path(dir).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  if (path == "." || path.filename() == "..") {
    std::error_code error;
    path = std::filesystem::weakly_canonical(path, error);
  }
  const std::string name = path.filename().string();
  return name.empty() ? "model" : name;
}

}  // namespace

bool IsLocalAddress(std::string_view address) {
  if (address.starts_with("unix:")) return true;
  const std::string_view host = address.substr(0, address.rfind(':'));
  if (host == "localhost" || host == "[::1]") return true;
  // 127.x.y.z by digits, so that a name such as 127.evil.example does not pass.
  return host.starts_with("127.") && host.find_first_not_of("0123456789.") == host.npos;
}

absl::Status ValidateAddress(std::string_view flag, std::string_view address) {
  const auto refuse = [&](std::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat("options: ", std::string(flag), " \"",
                                                   std::string(address), "\" ", std::string(why),
                                                   "; give HOST:PORT, [IPV6]:PORT or unix:PATH"));
  };
  if (address.starts_with("unix:")) {
    return address.size() > 5 ? absl::OkStatus() : refuse("has no path");
  }
  const std::size_t colon = address.rfind(':');
  if (colon == address.npos || colon == 0) return refuse("has no host or no port");
  const std::string_view host = address.substr(0, colon);
  if (host.find(':') != host.npos && !(host.front() == '[' && host.back() == ']')) {
    return refuse("is no address");
  }
  const std::string_view digits = address.substr(colon + 1);
  int port = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), port);
  if (error != std::errc() || end != digits.data() + digits.size() || port < 0 || port > 65535) {
    return refuse("has no port in [0, 65535]");
  }
  return absl::OkStatus();
}

absl::StatusOr<ParsedOptions> ParseOptions(int argc, const char* const* argv) {
  Options options;
  std::string trigger = "together";
  std::string row_transport = "shared";
  CLI::App app(
      "epserve-coordinator: queues and batches requests, keeps the membership of the workers, and "
      "serves the front door. Every flag can also be given as the environment variable named.");
  AddModelFlags(app, options);
  AddListenFlags(app, options);
  AddSecurityFlags(app, options);
  AddBatchFlags(app, options, trigger, row_transport);
  AddTimeFlags(app, options);
  server::AddLogFlags(app, options.log_format, options.log_level);
  EPS_ASSIGN_OR_RETURN(std::optional<std::string> text,
                       server::Parse(app, "epserve-coordinator", argc, argv));
  if (text.has_value()) return ParsedOptions{std::nullopt, *std::move(text)};
  if (options.listen.empty()) options.listen = {"127.0.0.1:8001"};
  if (options.model_name.empty()) options.model_name = BaseName(options.checkpoint_dir);
  options.separate_triggers = trigger == "separate";
  options.shared_rows = row_transport == "shared";
  EPS_RETURN_IF_ERROR(ValidateOptions(options));
  return ParsedOptions{std::move(options), ""};
}

}  // namespace epserve::coordinator
