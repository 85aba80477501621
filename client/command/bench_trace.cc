#include "client/command/bench_trace.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace epserve::client {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kClientProcess = 1;
constexpr int kServiceProcess = 2;
constexpr std::pair<const char*, const char*> kTracedPhases[] = {{"assign", "assign_ns"},
                                                                 {"counts", "counts_ns"},
                                                                 {"dispatch", "dispatch_ns"},
                                                                 {"experts", "ffn_ns"},
                                                                 {"combine", "combine_ns"}};

Json Name(const char* what, int process, std::int64_t thread, const std::string& name) {
  return {
      {"ph", "M"}, {"name", what}, {"pid", process}, {"tid", thread}, {"args", {{"name", name}}}};
}

Json Slice(const std::string& name, int process, std::int64_t thread, double at_us,
           double duration_us) {
  return {{"ph", "X"},     {"name", name}, {"pid", process},
          {"tid", thread}, {"ts", at_us},  {"dur", duration_us}};
}

// The first row that is free at `at_us`; takes it until `end_us`.
std::size_t TakeRow(std::vector<double>* busy_until, double at_us, double end_us) {
  const auto free = std::find_if(busy_until->begin(), busy_until->end(),
                                 [&](double until) { return until <= at_us; });
  const auto row = static_cast<std::size_t>(free - busy_until->begin());
  if (free == busy_until->end()) busy_until->push_back(0);
  (*busy_until)[row] = end_us;
  return row;
}

void AddWorkers(const Json& trace, std::int64_t origin_us, const std::string& request,
                Json* events) {
  for (const Json& worker : trace.at("workers")) {
    const std::int64_t rank = worker.at("rank");
    double at_us = worker.at("start_ns").get<double>() / 1e3 - static_cast<double>(origin_us);
    for (const auto& [name, key] : kTracedPhases) {
      const double duration_us = worker.at(key).get<double>() / 1e3;
      if (duration_us > 0) {
        Json slice = Slice(name, kServiceProcess, rank, at_us, duration_us);
        slice["args"] = {{"request", request}};
        events->push_back(std::move(slice));
      }
      at_us += duration_us;
    }
  }
}

}  // namespace

std::string BenchTrace(const std::vector<Sample>& samples) {
  std::vector<const Sample*> traced;
  for (const Sample& sample : samples) {
    if (sample.trace != nullptr) traced.push_back(&sample);
  }
  std::sort(traced.begin(), traced.end(),
            [](const Sample* a, const Sample* b) { return a->began_us < b->began_us; });
  const std::int64_t origin_us = traced.empty() ? 0 : traced.front()->began_us;
  Json events = Json::array({Name("process_name", kClientProcess, 0, "client: requests"),
                             Name("process_name", kServiceProcess, 0, "service: workers")});
  std::vector<double> busy_until;
  std::int64_t most_ranks = 0;
  for (std::size_t i = 0; i < traced.size(); ++i) {
    const Sample& sample = *traced[i];
    const Json trace = Json::parse(sample.trace->workers, nullptr, /*allow_exceptions=*/false);
    if (trace.is_discarded() || !trace.contains("workers") || !trace.contains("started_us") ||
        !trace.at("started_us").is_number_integer()) {
      continue;
    }
    const std::string name = absl::StrCat("request ", i);
    const double at_us = static_cast<double>(sample.began_us - origin_us);
    const std::size_t row = TakeRow(&busy_until, at_us, at_us + sample.request_us);
    Json slice =
        Slice(name, kClientProcess, static_cast<std::int64_t>(row), at_us, sample.request_us);
    slice["args"] = {{"count_exchange", trace.value("count_exchange", "")},
                     {"started_ts", trace.at("started_us").get<std::int64_t>() - origin_us}};
    for (const auto& [key, value] : sample.trace->parameters) slice["args"][key] = value;
    events.push_back(std::move(slice));
    AddWorkers(trace, origin_us, name, &events);
    most_ranks = std::max(most_ranks, static_cast<std::int64_t>(trace.at("workers").size()));
  }
  for (std::int64_t rank = 0; rank < most_ranks; ++rank) {
    events.push_back(Name("thread_name", kServiceProcess, rank, absl::StrCat("rank ", rank)));
  }
  return Json{{"displayTimeUnit", "ns"}, {"traceEvents", std::move(events)}}.dump();
}

absl::Status CheckBenchTrace(const std::string& path) {
  const bool was_there = std::filesystem::exists(path);
  const std::ofstream file(path, std::ios::app);
  if (!file) {
    return absl::InvalidArgumentError(
        absl::StrCat("--trace '", path, "': ", strerror(errno),
                     "; name a file in a directory that exists and can be written"));
  }
  if (!was_there) std::filesystem::remove(path);
  return absl::OkStatus();
}

absl::Status WriteBenchTrace(const std::string& path, const std::vector<Sample>& samples) {
  std::ofstream file(path, std::ios::trunc);
  file << BenchTrace(samples) << "\n";
  file.close();
  if (!file) return absl::InternalError(absl::StrCat("bench: ", path, " cannot be written"));
  return absl::OkStatus();
}

}  // namespace epserve::client
