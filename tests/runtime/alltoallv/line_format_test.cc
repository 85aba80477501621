#include "runtime/alltoallv/line_format.h"

#include <gtest/gtest.h>

#include <vector>

namespace epserve::runtime {
namespace {

// How often a row's lines carry each half of a vector, each note and each scale.
struct Carried {
  std::vector<int> halves;
  std::vector<int> notes;
  std::vector<int> scales;
};

template <typename Lines>
Carried Count(const Lines& lines, int num_vectors, int num_notes, int num_scales) {
  Carried carried{std::vector<int>(2 * num_vectors), std::vector<int>(num_notes),
                  std::vector<int>(num_scales)};
  // A warp looks at a few lines past the end.
  for (int line = 0; line < lines.count() + kLineBytes; ++line) {
    for (int lane = 0; lane < kTailLane; ++lane) {
      const int vector = lines.VectorAt(line, lane);
      if (vector < 0) continue;
      EXPECT_LT(line, lines.count());
      ++carried.halves.at(2 * vector);
      ++carried.halves.at(2 * vector + 1);
    }
    if (line >= lines.count()) continue;
    const LineTail tail = lines.TailAt(line);
    EXPECT_LE((tail.note >= 0) + (tail.vector >= 0) + (tail.num_scales > 0), 1);
    if (tail.note >= 0) ++carried.notes.at(tail.note);
    if (tail.vector >= 0) ++carried.halves.at(2 * tail.vector + tail.half);
    for (int i = 0; i < tail.num_scales; ++i) ++carried.scales.at(tail.scale + i);
  }
  return carried;
}

void ExpectOnce(const std::vector<int>& times) {
  EXPECT_EQ(times, std::vector<int>(times.size(), 1));
}

TEST(PlainLinesTest, EveryHalfVectorAndNoteIsCarriedOnce) {
  for (int vectors = 1; vectors < 300; ++vectors) {
    for (const int notes : {0, 2, 9, 17}) {
      SCOPED_TRACE(testing::Message() << vectors << " vectors, " << notes << " notes");
      const Carried carried = Count(PlainLines(vectors, notes), vectors, notes, 0);
      ExpectOnce(carried.halves);
      ExpectOnce(carried.notes);
    }
  }
}

TEST(PlainLinesTest, LinesAreFullButForTheLast) {
  for (int vectors = 100; vectors < 2000; vectors += 7) {
    const int halves = 2 * vectors + 9;
    EXPECT_EQ(PlainLines(vectors, 9).count(), (halves + 14) / 15) << vectors;
  }
}

TEST(PlainLinesTest, TailsAnEvenNumberOfLinesApartCarryTheSameHalf) {
  const PlainLines lines(896, 0);
  for (int line = 0; line + 4 < lines.count(); ++line) {
    if (lines.TailAt(line + 4).vector < 0) continue;
    EXPECT_EQ(lines.TailAt(line).half, lines.TailAt(line + 4).half) << line;
  }
}

TEST(Fp8LinesTest, EveryHalfVectorNoteAndScaleIsCarriedOnce) {
  for (int groups = 1; groups < 200; ++groups) {
    for (const int notes : {2, 9, 17}) {
      SCOPED_TRACE(testing::Message() << groups << " groups, " << notes << " notes");
      const Carried carried = Count(Fp8Lines(groups, notes), 8 * groups, notes, groups);
      ExpectOnce(carried.halves);
      ExpectOnce(carried.notes);
      ExpectOnce(carried.scales);
    }
  }
}

TEST(Fp8LinesTest, LanesOfAGroupHaveTheSamePlaceInTheirLines) {
  const Fp8Lines lines(56, 9);
  for (int line = 0; line < lines.count(); ++line) {
    for (int lane = 0; lane < kTailLane; ++lane) {
      const int unit = line / Fp8Lines::kLinesPerUnit;
      const int group = unit * kTailLane + lane;
      EXPECT_EQ(lines.VectorAt(line, lane) / 8, group < 56 ? group : 0);
    }
  }
}

}  // namespace
}  // namespace epserve::runtime
