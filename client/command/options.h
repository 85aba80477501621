// The command line of `epserve`: one struct a subcommand. Flags and environment variables are read
// here alone; each flag of a subcommand may also be given as EPSERVE_<FLAG_NAME>.
#ifndef EPSERVE_CLIENT_COMMAND_OPTIONS_H_
#define EPSERVE_CLIENT_COMMAND_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/channel_security.h"

namespace epserve::client {

struct UpOptions {
  ChannelSecurity security;  // of its own calls
  std::string checkpoint_dir;
  int num_workers = 4;
  std::string listen = "127.0.0.1:8001";
  std::string metrics_listen = "127.0.0.1:8002";
  bool metrics_tls = false;    // that it is served with
  std::string program_dir;     // Empty: where this program lies.
  std::string log_dir;         // Empty: the children's logs go to stderr.
  std::string ready_file;      // Empty: none.
  double ready_timeout_s = 0;  // 0: none
  bool restart = true;
  bool json_logs = false;
  std::int64_t drain_timeout_ms = 10000;
  // As "--flag=value", handed on to the children.
  std::vector<std::string> coordinator_args;
  std::vector<std::string> worker_args;
};

struct InferOptions {
  std::string server;
  ChannelSecurity security;
  std::string model;  // Empty: the only one.
  std::string input_path;
  std::string output_path;
  std::optional<std::int64_t> layer;
  double timeout_s = 60;
  int attempts = 1;
};

struct VerifyOptions {
  std::string server;
  ChannelSecurity security;
  std::string model;
  std::string checkpoint_dir;
  std::int64_t batches = 2;
  std::int64_t tokens = 64;
  std::vector<std::string> dtypes;   // of "fp32", "bf16", "fp16"
  std::vector<std::int64_t> layers;  // Empty: all.
  std::uint64_t seed = 1;
  double max_error = 0;  // relative L2 of a batch; 0: ErrorLimit of the rows' type
  double timeout_s = 60;
  bool json = false;
};

enum class BenchMemory { kMessages, kSystem, kCuda };

struct BenchOptions {
  std::string server;
  ChannelSecurity security;
  std::string model;
  std::int64_t tokens = 64;
  std::string dtype = "bf16";
  std::optional<std::int64_t> layer;
  bool server_routes = false;
  int concurrency = 1;
  bool streaming = false;
  int attempts = 1;
  double rate = 0;  // Requests a second, open loop; 0: closed loop.
  std::int64_t requests = 1000;
  double duration_s = 0;  // 0: `requests` decides.
  std::int64_t warmup = 20;
  std::optional<std::int64_t> busy_poll_us;  // absent: as the machine's cores allow
  double timeout_s = 30;
  std::uint64_t seed = 1;
  bool allow_errors = false;
  bool json = false;
  std::string trace_path;  // empty: none
  BenchMemory memory = BenchMemory::kMessages;
  int cuda_device = 0;
  std::string shm_key_prefix = "client-";
};

struct StatusOptions {
  std::string server;
  ChannelSecurity security;
  bool watch = false;
  double watch_interval_s = 1;
  bool json = false;
  double timeout_s = 5;
};

struct HealthOptions {
  std::string server;
  ChannelSecurity security;
  std::string service = "readiness";  // "liveness", "readiness"
  double timeout_s = 5;
};

struct DrainOptions {
  std::string server;
  ChannelSecurity security;
  std::string worker_id;
  double timeout_s = 60;
};

struct MakeCheckpointOptions {
  std::string output_dir;
  std::string architecture = "mixtral";
  std::int64_t num_layers = 2;
  std::int64_t hidden = 512;
  std::int64_t intermediate = 1024;
  std::int64_t num_experts = 8;
  std::int64_t topk = 2;
  std::string dtype = "bf16";
  std::int64_t num_shards = 1;
  std::uint64_t seed = 1;
  bool router = true;
  bool force = false;
};

using Command = std::variant<UpOptions, InferOptions, VerifyOptions, BenchOptions, StatusOptions,
                             HealthOptions, DrainOptions, MakeCheckpointOptions>;

// Either `command`, or, after --help or --version, the text to print before exiting with 0.
struct ParsedCommand {
  std::optional<Command> command;
  std::string name;  // The subcommand's.
  std::string text;
};

// INVALID_ARGUMENT names the flag and what it accepts. `cores`, as of AvailableCores(), decide what
// `up` chooses where --busy-poll-us is not given.
absl::StatusOr<ParsedCommand> ParseCommand(int argc, const char* const* argv, int cores);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_OPTIONS_H_
