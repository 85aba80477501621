// What epserve-coordinator is told at start: flags, and for each flag the environment variable
// EPSERVE_<FLAG_NAME>. Read here alone, parsed strictly. Pure but for reading the environment.
#ifndef EPSERVE_SERVER_COORDINATOR_OPTIONS_H_
#define EPSERVE_SERVER_COORDINATOR_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/common/tls.h"

namespace epserve::coordinator {

struct Options {
  std::string checkpoint_dir;
  std::string model_name;  // never empty after parsing
  int num_workers = 4;     // R
  std::vector<std::string> listen;
  std::string metrics_listen = "127.0.0.1:8002";  // "off": none
  std::string cluster_id = "epserve";
  std::int64_t max_batch_tokens = 4096;
  bool merge_queued = false;
  std::int64_t batch_window_us = 0;
  std::int64_t queue_capacity = 1024;
  int num_slots = 2;
  bool separate_triggers = false;
  bool shared_rows = true;
  std::string count_exchange = "auto";  // "coordinator", "device", "auto"
  std::int64_t lease_ms = 1000;
  std::int64_t formation_timeout_ms = 30000;
  std::int64_t batch_timeout_ms = 60000;
  int max_connections = 1024;
  int busy_poll_us = 0;
  std::int64_t message_timeout_ms = 60'000;
  std::int64_t stream_idle_timeout_ms = 3'600'000;
  std::int64_t reply_timeout_ms = 60'000;
  std::int64_t max_message_bytes = 256 << 20;
  std::int64_t max_held_bytes = std::int64_t{4} << 30;
  bool allow_client_shm = false;
  std::vector<std::string> shm_key_prefixes;
  std::int64_t drain_timeout_ms = 10000;
  std::string log_format = "text";
  std::string log_level = "info";
  std::string port_file;          // empty: none
  std::string metrics_port_file;  // empty: none
  bool insecure = false;
  bool plaintext_metrics = false;
  std::string health_listen;  // empty: none
  server::TlsFiles tls;
  std::string secrets_file;  // empty: none
};

// Either `options`, or, after --help or --version, the text to print before exiting with 0.
struct ParsedOptions {
  std::optional<Options> options;
  std::string text;
};

// INVALID_ARGUMENT names the flag and what it accepts.
absl::StatusOr<ParsedOptions> ParseOptions(int argc, const char* const* argv);

// Whether nobody outside this machine can reach `address`: 127.x.y.z, [::1], localhost, unix:PATH.
bool IsLocalAddress(std::string_view address);

// INVALID_ARGUMENT unless `address` is HOST:PORT, [IPV6]:PORT or unix:PATH.
absl::Status ValidateAddress(std::string_view flag, std::string_view address);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_OPTIONS_H_
