#include "client/command/bench_report.h"
#include "client/command/format.h"
#include "client/command/progress.h"
#include "client/command/status.h"
#include "client/command/table.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace epserve::client {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

const Terminal kPlain{};
const Terminal kColored{.interactive = true, .colored = true};

TEST(FormatTest, NumbersHaveThreeDigitsAndAUnit) {
  EXPECT_EQ(FormatMicroseconds(0), "0.00 us");
  EXPECT_EQ(FormatMicroseconds(999.4), "999 us");
  EXPECT_EQ(FormatMicroseconds(999.6), "1.00 ms");
  EXPECT_EQ(FormatMicroseconds(12345), "12.3 ms");
  EXPECT_EQ(FormatMicroseconds(2.5e6), "2.50 s");
  EXPECT_EQ(FormatSeconds(1.25), "1.2 s");
  EXPECT_EQ(FormatSeconds(123), "2 min 03 s");
  EXPECT_EQ(FormatSeconds(14700), "4 h 05 min");
  EXPECT_EQ(FormatBytes(512), "512 B");
  EXPECT_EQ(FormatBytes(96 << 20), "96.0 MiB");
  EXPECT_EQ(FormatBytes(1023 << 10), "1.00 MiB");
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(1234567), "1,234,567");
}

TEST(TableTest, ColumnsAreAlignedWhateverTheirColors) {
  Table table({{"name"}, {"n", Align::kRight}});
  table.AddRow({Cell("a", Color::kRed), "1"});
  table.AddRow({"long — name", "100"});
  EXPECT_EQ(table.Render(kPlain),
            "name           n\n"
            "───────────  ───\n"
            "a              1\n"
            "long — name  100\n");
  const std::string colored = table.Render(kColored);
  EXPECT_THAT(colored, HasSubstr("\x1b[31ma\x1b[0m              1\n"));
}

TEST(ProgressTest, BarFillsSmoothlyAndKeepsItsWidth) {
  EXPECT_EQ(Bar(0, 4), "░░░░");
  EXPECT_EQ(Bar(1, 4), "████");
  EXPECT_EQ(Bar(0.5, 4), "██░░");
  EXPECT_EQ(Bar(7, 2), "██");
  for (int i = 0; i <= 100; ++i) EXPECT_EQ(DisplayWidth(Bar(i / 100.0, 28)), 28u) << i;
}

TEST(ProgressTest, PercentStaysWithinItsRange) {
  EXPECT_EQ(Percent(0.424), " 42 %");
  EXPECT_EQ(Percent(21.29), "100 %");
  EXPECT_EQ(Percent(-1), "  0 %");
}

TEST(FormatTest, PrintableKeepsTextAndEscapesWhatSteersATerminal) {
  EXPECT_EQ(Printable("worker-0 — größe 模型 \U0001F600"), "worker-0 — größe 模型 \U0001F600");
  EXPECT_EQ(Printable("a\x1b[2Jb\n\x7f"), "a\\x1b[2Jb\\x0a\\x7f");
  EXPECT_EQ(Printable("\xc2\x9b"
                      "1m"),
            "\\xc2\\x9b"
            "1m");
  EXPECT_EQ(Printable("\xff\xc0\xaf\xed\xa0\x80\xe2\x82"),
            "\\xff\\xc0\\xaf\\xed\\xa0\\x80\\xe2\\x82");
}

TEST(BenchReportTest, PercentilesAreOfTheNearestRank) {
  std::vector<double> values;
  for (int i = 100; i >= 1; --i) values.push_back(i);
  const Percentiles p = PercentilesOf(values);
  EXPECT_EQ(p.p50, 50);
  EXPECT_EQ(p.p90, 90);
  EXPECT_EQ(p.p99, 99);
  EXPECT_EQ(p.max, 100);
  EXPECT_EQ(p.mean, 50.5);
  EXPECT_EQ(PercentilesOf({3}).p50, 3);
  EXPECT_EQ(PercentilesOf({}).max, 0);
}

LoadResult TwoGoodOneBad() {
  LoadResult result;
  result.seconds = 2;
  const auto add = [&](absl::StatusCode code, double request_us, std::int64_t queue_us,
                       std::int64_t ffn_us) {
    Sample sample{.code = code, .request_us = request_us};
    sample.phases_us.front() = queue_us;
    sample.phases_us[kFfnPhase] = ffn_us;
    result.samples.push_back(std::move(sample));
  };
  add(absl::StatusCode::kOk, 1000, 5, 400);
  add(absl::StatusCode::kOk, 2000, 6, 500);
  add(absl::StatusCode::kUnavailable, 9e9, kNoTime, kNoTime);
  result.first_message["UNAVAILABLE"] = "no worker";
  return result;
}

TEST(BenchReportTest, CountsThroughputAndOverheadAreOfTheAnsweredAlone) {
  const BenchReport report = MakeBenchReport(TwoGoodOneBad(), 64);
  EXPECT_EQ(report.requests, 3);
  EXPECT_EQ(report.succeeded, 2);
  EXPECT_EQ(report.errors.at("UNAVAILABLE"), 1);
  EXPECT_EQ(report.requests_per_second, 1);
  EXPECT_EQ(report.tokens_per_second, 64);
  EXPECT_EQ(report.request.max, 2000);
  EXPECT_EQ(report.overhead.p50, 600);
  EXPECT_EQ(report.overhead.max, 1500);
  ASSERT_EQ(report.phases.size(), 2u);
  EXPECT_EQ(report.phases[0].first, "queue");
  EXPECT_EQ(report.phases[1].second.p50, 400);
}

TEST(BenchReportTest, TablesSayWhatFailedAndWhy) {
  const std::string text = RenderBenchReport(MakeBenchReport(TwoGoodOneBad(), 64), kPlain);
  EXPECT_THAT(text, HasSubstr("UNAVAILABLE"));
  EXPECT_THAT(text, HasSubstr("no worker"));
  EXPECT_THAT(text, HasSubstr("overhead (request - ffn)"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
}

TEST(BenchReportTest, JsonHasItsShape) {
  BenchOptions options;
  const auto json = BenchJson(options, /*busy_poll_us=*/20, MakeBenchReport(TwoGoodOneBad(), 64));
  EXPECT_EQ(json["busy_poll_us"], 20);
  EXPECT_EQ(json["loop"], "closed");
  EXPECT_EQ(json["layer"], nullptr);
  EXPECT_EQ(json["requests"], 3);
  EXPECT_EQ(json["errors"]["UNAVAILABLE"], 1);
  for (const char* group : {"request_us", "overhead_us"}) {
    for (const char* key : {"p50", "p90", "p99", "max", "mean"}) {
      EXPECT_TRUE(json[group][key].is_number()) << group << key;
    }
  }
  EXPECT_EQ(json["phases_us"]["ffn"]["max"], 500.0);
}

ClusterState Cluster() {
  ClusterState cluster;
  cluster.model = "tiny";
  cluster.state = "waiting";
  cluster.epoch = 7;
  cluster.expected_workers = 2;
  cluster.num_experts = 8;
  cluster.experts_without_worker = 4;
  cluster.waiting_for = "worker-0 to load its weights";
  cluster.last_epoch_end = "no room";
  WorkerState standby;
  standby.worker_id = "spare";
  standby.state = "standby";
  WorkerState loading;
  loading.worker_id = "worker-0";
  loading.state = "loading";
  loading.rank = 0;
  loading.num_experts = 4;
  loading.load_fraction = 0.25;
  loading.expert_rows = 30;
  cluster.workers = {standby, loading};
  return cluster;
}

TEST(StatusTest, TableShowsRanksFirstAndExpertsWithoutWorker) {
  const std::string text = RenderStatus(Cluster(), kPlain);
  EXPECT_THAT(text, HasSubstr("4 of 8 experts have no live worker"));
  EXPECT_THAT(text, HasSubstr("waiting for worker-0 to load its weights"));
  EXPECT_THAT(text, HasSubstr("last epoch ended: no room"));
  EXPECT_THAT(text, HasSubstr("loading 25 %"));
  EXPECT_THAT(text, HasSubstr("0-3"));
  EXPECT_THAT(text, HasSubstr("100 %"));
  EXPECT_LT(text.find("worker-0"), text.find("spare"));
}

TEST(StatusTest, ControlCharactersInNamesAreEscaped) {
  ClusterState cluster = Cluster();
  cluster.model = "model\x1b[2J";
  cluster.state = "state\x1b]0;";
  cluster.workers[0].worker_id = "spare\r";
  cluster.workers[0].state = "away\b";
  cluster.workers[1].node = "node\xc2\x9b";
  const std::string text = RenderStatus(cluster, kPlain);
  for (const char* shown :
       {"model\\x1b[2J", "state\\x1b]0;", "spare\\x0d", "away\\x08", "node\\xc2\\x9b"}) {
    EXPECT_THAT(text, HasSubstr(shown));
  }
  for (const char c : text) EXPECT_TRUE(c == '\n' || static_cast<unsigned char>(c) >= 0x20);
  EXPECT_THAT(text, Not(HasSubstr("\xc2\x9b")));
}

TEST(StatusTest, JsonHasItsShape) {
  const auto json = StatusJson(Cluster());
  EXPECT_EQ(json["epoch"], 7);
  EXPECT_EQ(json["state"], "waiting");
  ASSERT_EQ(json["workers"].size(), 2u);
  EXPECT_EQ(json["workers"][1]["worker_id"], "worker-0");
  EXPECT_EQ(json["workers"][1]["load_fraction"], 0.25);
  EXPECT_EQ(json["workers"][0]["rank"], -1);
  EXPECT_EQ(json["experts_without_worker"], 4);
  EXPECT_EQ(json["last_epoch_end"], "no room");
}

}  // namespace
}  // namespace epserve::client
