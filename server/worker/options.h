// What epserve-worker is told at start: flags, and for each flag the environment variable
// EPSERVE_<FLAG_NAME>. Read here alone, parsed strictly. Pure but for reading the environment, the
// host's name and the process id.
#ifndef EPSERVE_SERVER_WORKER_OPTIONS_H_
#define EPSERVE_SERVER_WORKER_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "server/common/tls.h"

namespace epserve::worker {

struct Options {
  std::string coordinator = "127.0.0.1:8001";
  std::string checkpoint_dir;
  std::string worker_id;  // never empty after parsing
  std::string cluster_id = "epserve";
  std::string node;  // the host's name
  std::int64_t max_batch_tokens = 4096;
  int num_slots = 2;
  int compute_threads = 1;
  std::int64_t peer_timeout_ms = 30000;
  std::int64_t leave_timeout_ms = 15000;
  int busy_poll_us = 0;
  std::string health_listen;  // empty: none
  server::TlsFiles tls;
  std::string tls_server_name;   // empty: the host of `coordinator`
  std::string secret_file;       // empty: none
  std::string backend = "host";  // auto, host, cuda, nccl
  // Of the cuda and nccl backends.
  int device = -1;  // -1: local_rank modulo the number of visible GPUs
  int local_rank = 0;
  int comm_blocks = 24;
  std::string dispatch_dtype = "bf16";  // bf16, fp8
  std::string handle_dir;
  std::string handle_type = "auto";  // auto, fd, fabric
  std::string log_format = "text";
  std::string log_level = "info";
};

// Either `options`, or, after --help or --version, the text to print before exiting with 0.
struct ParsedOptions {
  std::optional<Options> options;
  std::string text;
};

// INVALID_ARGUMENT names the flag and what it accepts.
absl::StatusOr<ParsedOptions> ParseOptions(int argc, const char* const* argv);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_OPTIONS_H_
