#include "server/coordinator/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace epserve::coordinator {
namespace {

using ::testing::HasSubstr;

TEST(MetricsTest, EveryNameIsThereFromTheStart) {
  const Metrics metrics(4);
  const std::string text = metrics.Render();
  for (const char* line : {"epserve_requests_total{outcome=\"ok\"} 0",
                           "epserve_requests_total{outcome=\"resource_exhausted\"} 0",
                           "epserve_queue_depth 0",
                           "epserve_tokens_total 0",
                           "epserve_batches_total{count_exchange=\"coordinator\"} 0",
                           "epserve_batches_total{count_exchange=\"streams\"} 0",
                           "epserve_batches_total{count_exchange=\"device\"} 0",
                           "epserve_phase_seconds_count{phase=\"queue\"} 0",
                           "epserve_phase_seconds_count{phase=\"assign\"} 0",
                           "epserve_phase_seconds_count{phase=\"counts\"} 0",
                           "epserve_phase_seconds_count{phase=\"dispatch\"} 0",
                           "epserve_phase_seconds_count{phase=\"ffn\"} 0",
                           "epserve_phase_seconds_count{phase=\"combine\"} 0",
                           "epserve_phase_seconds_count{phase=\"reply\"} 0",
                           "epserve_expert_rows_total{expert=\"3\"} 0",
                           "epserve_epoch 0",
                           "epserve_serving 0",
                           "epserve_refused_total{reason=\"max_connections\"} 0",
                           "epserve_refused_total{reason=\"access\"} 0",
                           "epserve_refused_total{reason=\"handshake\"} 0",
                           "epserve_refused_total{reason=\"half_messages\"} 0",
                           "epserve_refused_total{reason=\"worker\"} 0",
                           "epserve_workers{state=\"serving\"} 0",
                           "epserve_batches_in_flight 0",
                           "epserve_output_bytes_total{way=\"lent\"} 0",
                           "epserve_output_bytes_total{way=\"copied\"} 0",
                           "epserve_heaps{handle_type=\"shm\"} 0",
                           "epserve_heaps{handle_type=\"fd\"} 0",
                           "epserve_heaps{handle_type=\"fabric\"} 0",
                           "epserve_heaps{handle_type=\"nccl\"} 0",
                           "epserve_heaps{handle_type=\"other\"} 0",
                           "epserve_request_seconds_count 0"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(MetricsTest, NumbersFollowWhatIsCounted) {
  Metrics metrics(4);
  metrics.AddRequest(absl::StatusCode::kOk, 0.003);
  metrics.AddRequest(absl::StatusCode::kResourceExhausted, 0.001);
  metrics.AddTokens(64);
  metrics.AddBatch(CountExchange::kDevice);
  metrics.AddBatch(CountExchange::kDevice);
  metrics.AddBatch(CountExchange::kStreams);
  metrics.AddExpertRows(2, 5);
  metrics.AddExpertRows(4, 5);   // Beyond the experts: counts nowhere.
  metrics.AddExpertRows(-1, 5);  // The same.
  metrics.SetEpoch(1760000001);
  metrics.SetWorkers({{"serving", 1}, {"serving", 1}, {"loading", 1}});
  metrics.SetServing(true);
  metrics.AddRefusal(RefusalReason::kHandshake);
  metrics.AddRefusal(RefusalReason::kMaxConnections);
  metrics.AddRefusal(RefusalReason::kMaxConnections);
  metrics.ObservePhase(PhaseMetric::kFfn, 0.002);
  std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr("epserve_requests_total{outcome=\"ok\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_requests_total{outcome=\"resource_exhausted\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_request_seconds_count 2\n"));
  EXPECT_THAT(text, HasSubstr("epserve_tokens_total 64\n"));
  EXPECT_THAT(text, HasSubstr("epserve_batches_total{count_exchange=\"coordinator\"} 0\n"));
  EXPECT_THAT(text, HasSubstr("epserve_batches_total{count_exchange=\"streams\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_batches_total{count_exchange=\"device\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("epserve_expert_rows_total{expert=\"2\"} 5\n"));
  EXPECT_THAT(text, HasSubstr("epserve_epoch 1760000001\n"));
  EXPECT_THAT(text, HasSubstr("epserve_workers{state=\"serving\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("epserve_workers{state=\"loading\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_phase_seconds_count{phase=\"ffn\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_serving 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_refused_total{reason=\"max_connections\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("epserve_refused_total{reason=\"access\"} 0\n"));
  EXPECT_THAT(text, HasSubstr("epserve_refused_total{reason=\"handshake\"} 1\n"));
  metrics.SetWorkers({});
  metrics.SetServing(false);
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_workers{state=\"serving\"} 0\n"));
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_serving 0\n"));
}

TEST(MetricsTest, OutputBytesAreCountedByTheWayTheyTook) {
  Metrics metrics(4);
  metrics.AddOutputBytes(OutputWay::kLent, 5 << 20);
  metrics.AddOutputBytes(OutputWay::kCopied, 100);
  metrics.AddOutputBytes(OutputWay::kCopied, 11);
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_output_bytes_total{way=\"lent\"} 5242880\n"));
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_output_bytes_total{way=\"copied\"} 111\n"));
}

TEST(MetricsTest, HeapsAreCountedByHandleTypeWhateverAWorkerCallsIts) {
  Metrics metrics(4);
  metrics.SetHeaps({"fd", "nccl", "fd", "fd\"} 7", ""});
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_heaps{handle_type=\"fd\"} 2\n"));
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_heaps{handle_type=\"nccl\"} 1\n"));
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_heaps{handle_type=\"other\"} 2\n"));
  metrics.SetHeaps({"fabric"});
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_heaps{handle_type=\"fd\"} 0\n"));
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_heaps{handle_type=\"fabric\"} 1\n"));
}

}  // namespace
}  // namespace epserve::coordinator
