#include "client/command/bench_report.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "client/command/format.h"
#include "client/command/table.h"
#include "nlohmann/json.hpp"

namespace epserve::client {

namespace {

nlohmann::ordered_json ToJson(const Percentiles& values) {
  return {{"p50", values.p50},
          {"p90", values.p90},
          {"p99", values.p99},
          {"max", values.max},
          {"mean", values.mean}};
}

std::vector<Cell> ToCells(const std::string& name, const Percentiles& values, Color color) {
  return {Cell(name, color), FormatMicroseconds(values.p50), FormatMicroseconds(values.p90),
          FormatMicroseconds(values.p99), FormatMicroseconds(values.max)};
}

}  // namespace

Percentiles PercentilesOf(std::vector<double> values_us) {
  Percentiles result;
  if (values_us.empty()) return result;
  std::sort(values_us.begin(), values_us.end());
  const auto at = [&](double share) {
    const auto rank =
        static_cast<std::size_t>(std::ceil(share * static_cast<double>(values_us.size())));
    return values_us[std::max<std::size_t>(rank, 1) - 1];
  };
  result.p50 = at(0.50);
  result.p90 = at(0.90);
  result.p99 = at(0.99);
  result.max = values_us.back();
  result.mean = std::accumulate(values_us.begin(), values_us.end(), 0.0) /
                static_cast<double>(values_us.size());
  return result;
}

BenchReport MakeBenchReport(const LoadResult& result, std::int64_t tokens_per_request) {
  BenchReport report;
  report.requests = static_cast<std::int64_t>(result.samples.size());
  report.seconds = result.seconds;
  report.first_message = result.first_message;
  std::vector<double> request;
  std::vector<double> overhead;
  std::array<std::vector<double>, kPhases.size()> phases;
  for (const Sample& sample : result.samples) {
    if (sample.code != absl::StatusCode::kOk) {
      ++report.errors[absl::StatusCodeToString(sample.code)];
      continue;
    }
    ++report.succeeded;
    request.push_back(sample.request_us);
    for (std::size_t i = 0; i < kPhases.size(); ++i) {
      if (sample.phases_us[i] == kNoTime) continue;
      const auto phase_us = static_cast<double>(sample.phases_us[i]);
      phases[i].push_back(phase_us);
      if (i == kFfnPhase) overhead.push_back(sample.request_us - phase_us);
    }
  }
  if (result.seconds > 0) {
    report.requests_per_second = static_cast<double>(report.succeeded) / result.seconds;
    report.tokens_per_second = report.requests_per_second * static_cast<double>(tokens_per_request);
  }
  report.request = PercentilesOf(std::move(request));
  report.overhead = PercentilesOf(std::move(overhead));
  for (std::size_t i = 0; i < kPhases.size(); ++i) {
    if (phases[i].empty()) continue;
    report.phases.emplace_back(kPhases[i], PercentilesOf(std::move(phases[i])));
  }
  return report;
}

std::string RenderBenchReport(const BenchReport& report, const Terminal& terminal) {
  Table counts({{"requests", Align::kRight},
                {"failed", Align::kRight},
                {"time", Align::kRight},
                {"requests/s", Align::kRight},
                {"tokens/s", Align::kRight}});
  const std::int64_t failed = report.requests - report.succeeded;
  counts.AddRow({FormatCount(static_cast<std::uint64_t>(report.requests)),
                 Cell(FormatCount(static_cast<std::uint64_t>(failed)),
                      failed > 0 ? Color::kRed : Color::kPlain),
                 FormatSeconds(report.seconds),
                 FormatCount(static_cast<std::uint64_t>(std::llround(report.requests_per_second))),
                 FormatCount(static_cast<std::uint64_t>(std::llround(report.tokens_per_second)))});
  std::string text = counts.Render(terminal);
  if (!report.errors.empty()) {
    Table errors({{"error"}, {"count", Align::kRight}, {"first message"}});
    for (const auto& [code, count] : report.errors) {
      const auto message = report.first_message.find(code);
      errors.AddRow(
          {Cell(code, Color::kRed), FormatCount(static_cast<std::uint64_t>(count)),
           message == report.first_message.end() ? std::string() : Printable(message->second)});
    }
    text += "\n" + errors.Render(terminal);
  }
  if (report.succeeded == 0) return text;
  Table times({{"time of a request"},
               {"p50", Align::kRight},
               {"p90", Align::kRight},
               {"p99", Align::kRight},
               {"max", Align::kRight}});
  times.AddRow(ToCells("request", report.request, Color::kBold));
  times.AddRow(ToCells("overhead (request - ffn)", report.overhead, Color::kBold));
  for (const auto& [phase, values] : report.phases) {
    times.AddRow(
        ToCells("  " + (phase == "server" ? "inside the service" : phase), values, Color::kPlain));
  }
  return text + "\n" + times.Render(terminal);
}

nlohmann::ordered_json BenchJson(const BenchOptions& options, std::int64_t busy_poll_us,
                                 const BenchReport& report) {
  nlohmann::ordered_json phases = nlohmann::ordered_json::object();
  for (const auto& [phase, values] : report.phases) phases[phase] = ToJson(values);
  nlohmann::ordered_json errors = nlohmann::ordered_json::object();
  for (const auto& [code, count] : report.errors) errors[code] = count;
  nlohmann::ordered_json layer = nullptr;
  if (options.layer) layer = *options.layer;
  return {{"tokens", options.tokens},
          {"dtype", options.dtype},
          {"layer", layer},
          {"routing", options.server_routes ? "server" : "given"},
          {"loop", options.rate > 0 ? "open" : "closed"},
          {"concurrency", options.concurrency},
          {"streaming", options.streaming},
          {"attempts", options.attempts},
          {"rate", options.rate},
          {"busy_poll_us", busy_poll_us},
          {"requests", report.requests},
          {"succeeded", report.succeeded},
          {"errors", errors},
          {"seconds", report.seconds},
          {"requests_per_second", report.requests_per_second},
          {"tokens_per_second", report.tokens_per_second},
          {"request_us", ToJson(report.request)},
          {"overhead_us", ToJson(report.overhead)},
          {"phases_us", phases}};
}

}  // namespace epserve::client
