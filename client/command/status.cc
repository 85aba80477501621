#include "client/command/status.h"

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/command/format.h"
#include "client/command/progress.h"
#include "client/command/table.h"
#include "client/cpp/status.h"
#include "nlohmann/json.hpp"

namespace epserve::client {

namespace {

Color ColorOf(const std::string& state) {
  if (state == "serving") return Color::kGreen;
  return state == "standby" ? Color::kDim : Color::kYellow;
}

std::string ExpertRange(const WorkerState& worker) {
  if (worker.rank < 0 || worker.num_experts == 0) return "-";
  return absl::StrCat(worker.first_expert, "-", worker.first_expert + worker.num_experts - 1);
}

// This worker's share of all rows, as a short bar and a number.
std::string Load(const WorkerState& worker, std::uint64_t all_rows) {
  if (all_rows == 0) return Bar(0, 10) + "   -";
  const double share = static_cast<double>(worker.expert_rows) / static_cast<double>(all_rows);
  return absl::StrFormat("%s %3.0f %%", Bar(share, 10), 100 * share);
}

std::string Heading(const ClusterState& cluster, const Terminal& terminal) {
  std::string text = absl::StrCat(
      terminal.Paint(Color::kBold, Printable(cluster.model)), "  ",
      terminal.Paint(ColorOf(cluster.state), Printable(cluster.state)), "  epoch ", cluster.epoch,
      "  up ", FormatSeconds(static_cast<double>(cluster.uptime_ms) / 1e3), "\n");
  const auto standbys = std::count_if(cluster.workers.begin(), cluster.workers.end(),
                                      [](const WorkerState& worker) { return worker.rank < 0; });
  const auto size = static_cast<std::int64_t>(cluster.workers.size());
  absl::StrAppend(&text, "workers ", size - standbys, " of ", cluster.expected_workers);
  if (standbys > 0) absl::StrAppend(&text, " and ", standbys, " standing by");
  absl::StrAppend(&text, "   queue ", cluster.queued_requests, " of ", cluster.queue_capacity,
                  "   batches in flight ", cluster.batches_in_flight, "   requests ",
                  FormatCount(cluster.requests_ok), " ok, ", FormatCount(cluster.requests_failed),
                  " failed\n");
  if (cluster.experts_without_worker > 0) {
    absl::StrAppend(&text,
                    terminal.Paint(Color::kRed, absl::StrCat(cluster.experts_without_worker, " of ",
                                                             cluster.num_experts,
                                                             " experts have no live worker")),
                    "\n");
  }
  if (!cluster.waiting_for.empty()) {
    absl::StrAppend(&text, "waiting for ", Printable(cluster.waiting_for), "\n");
  }
  if (!cluster.last_epoch_end.empty()) {
    absl::StrAppend(
        &text,
        terminal.Paint(Color::kYellow, "last epoch ended: " + Printable(cluster.last_epoch_end)),
        "\n");
  }
  return text + "\n";
}

// One line, in which even a control character of two bytes is escaped.
std::string StatusText(const ClusterState& cluster) {
  return StatusJson(cluster).dump(/*indent=*/-1, ' ', /*ensure_ascii=*/true);
}

absl::Status ShowOnce(AdminClient& admin, const StatusOptions& options, const Terminal& terminal) {
  EPC_ASSIGN_OR_RETURN(const ClusterState cluster,
                       admin.GetClusterStatus(absl::Seconds(options.timeout_s)));
  const std::string text =
      options.json ? StatusText(cluster) + "\n" : RenderStatus(cluster, terminal);
  // Home, the new text over the old, and what is left of the old cleared: no flicker.
  const bool redraw = options.watch && terminal.interactive && !options.json;
  std::printf("%s%s%s", redraw ? "\x1b[H\x1b[2J" : "", text.c_str(),
              options.watch && !redraw && !options.json ? "\n" : "");
  std::fflush(stdout);
  return absl::OkStatus();
}

}  // namespace

std::string RenderStatus(const ClusterState& cluster, const Terminal& terminal) {
  Table table({{"worker"},
               {"rank", Align::kRight},
               {"state"},
               {"experts", Align::kRight},
               {"weights", Align::kRight},
               {"heap", Align::kRight},
               {"resident", Align::kRight},
               {"batches", Align::kRight},
               {"rows", Align::kRight},
               {"load"},
               {"heard", Align::kRight},
               {"node"},
               {"pid", Align::kRight}});
  std::vector<WorkerState> workers = cluster.workers;
  // By rank, those on standby last.
  std::sort(workers.begin(), workers.end(), [](const WorkerState& a, const WorkerState& b) {
    return std::make_pair(static_cast<unsigned>(a.rank), a.worker_id) <
           std::make_pair(static_cast<unsigned>(b.rank), b.worker_id);
  });
  std::uint64_t all_rows = 0;
  for (const WorkerState& worker : workers) all_rows += worker.expert_rows;
  for (const WorkerState& worker : workers) {
    const std::string state = worker.state == "loading"
                                  ? absl::StrFormat("loading %.0f %%", 100 * worker.load_fraction)
                                  : Printable(worker.state);
    table.AddRow({Cell(Printable(worker.worker_id), Color::kBold),
                  worker.rank < 0 ? std::string("-") : absl::StrCat(worker.rank),
                  Cell(state, ColorOf(worker.state)), ExpertRange(worker),
                  FormatBytes(worker.weight_bytes), FormatBytes(worker.heap_bytes),
                  FormatBytes(worker.resident_bytes), FormatCount(worker.batches),
                  FormatCount(worker.expert_rows), Load(worker, all_rows),
                  absl::StrCat(worker.ms_since_heartbeat, " ms"), Printable(worker.node),
                  absl::StrCat(worker.pid)});
  }
  return Heading(cluster, terminal) + table.Render(terminal);
}

nlohmann::ordered_json StatusJson(const ClusterState& cluster) {
  nlohmann::ordered_json workers = nlohmann::ordered_json::array();
  for (const WorkerState& worker : cluster.workers) {
    workers.push_back({{"worker_id", worker.worker_id},
                       {"node", worker.node},
                       {"pid", worker.pid},
                       {"rank", worker.rank},
                       {"state", worker.state},
                       {"first_expert", worker.first_expert},
                       {"num_experts", worker.num_experts},
                       {"weight_bytes", worker.weight_bytes},
                       {"heap_bytes", worker.heap_bytes},
                       {"resident_bytes", worker.resident_bytes},
                       {"load_fraction", worker.load_fraction},
                       {"batches", worker.batches},
                       {"expert_rows", worker.expert_rows},
                       {"ms_since_heartbeat", worker.ms_since_heartbeat},
                       {"backend", worker.backend}});
  }
  return {{"cluster_id", cluster.cluster_id},
          {"version", cluster.version},
          {"model", cluster.model},
          {"state", cluster.state},
          {"epoch", cluster.epoch},
          {"expected_workers", cluster.expected_workers},
          {"workers", workers},
          {"queued_requests", cluster.queued_requests},
          {"queue_capacity", cluster.queue_capacity},
          {"batches_in_flight", cluster.batches_in_flight},
          {"requests_ok", cluster.requests_ok},
          {"requests_failed", cluster.requests_failed},
          {"uptime_ms", cluster.uptime_ms},
          {"experts_without_worker", cluster.experts_without_worker},
          {"num_experts", cluster.num_experts},
          {"waiting_for", cluster.waiting_for},
          {"last_epoch_end", cluster.last_epoch_end}};
}

absl::Status RunStatus(const StatusOptions& options) {
  AdminClient admin(options.server, options.security);
  const Terminal terminal = Terminal::Of(stdout);
  EPC_RETURN_IF_ERROR(ShowOnce(admin, options, terminal));
  while (options.watch) {
    absl::SleepFor(absl::Seconds(options.watch_interval_s));
    // The service may restart under a watcher, who wants to see it come back.
    const absl::Status status = ShowOnce(admin, options, terminal);
    if (!status.ok()) std::fprintf(stderr, "%s\n", Printable(status.ToString()).c_str());
  }
  return absl::OkStatus();
}

}  // namespace epserve::client
