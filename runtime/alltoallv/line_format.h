// How a row lies in the lines that carry it. A line is 128 bytes, which eight lanes store together:
// seven of them 16 bytes of the row each, a vector, and the last one, the tail, 8 bytes and the
// number of the use that the line belongs to. Beside vectors and halves of vectors, tails carry
// notes, 8 bytes each: what the receiver has to know of the row. Pure and constexpr.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_LINE_FORMAT_H_
#define EPSERVE_RUNTIME_ALLTOALLV_LINE_FORMAT_H_

#include "runtime/base/host_device.h"

namespace epserve::runtime {

inline constexpr int kLineBytes = 128;
inline constexpr int kLineLanes = 8;
inline constexpr int kTailLane = kLineLanes - 1;

// What a tail carries; -1: nothing of the kind.
struct LineTail {
  int note = -1;
  int vector = -1;  // one half of it
  int half = 0;
  int scale = -1;  // the first of num_scales
  int num_scales = 0;
};

constexpr EPS_HOST_DEVICE int CeilDivide(int a, int b) { return (a + b - 1) / b; }

// Vectors in the lanes' order, line after line; what has no lane of its own goes in halves into the
// tails behind those with notes.
class PlainLines {
 public:
  constexpr EPS_HOST_DEVICE PlainLines(int num_vectors, int num_notes)
      : num_vectors_(num_vectors), num_notes_(num_notes), count_(num_notes) {
    // A line has 7 1/2 vectors, but for a note's half.
    const int filled = CeilDivide(2 * num_vectors + num_notes, 2 * kTailLane + 1);
    if (filled > count_) count_ = filled;
    num_whole_ = count_ * kTailLane < num_vectors ? count_ * kTailLane : num_vectors;
  }

  constexpr EPS_HOST_DEVICE int count() const { return count_; }

  // The vector of a lane that is no tail; -1: none.
  constexpr EPS_HOST_DEVICE int VectorAt(int line, int lane) const {
    const int vector = line * kTailLane + lane;
    return vector < num_whole_ ? vector : -1;
  }

  constexpr EPS_HOST_DEVICE LineTail TailAt(int line) const {
    LineTail tail;
    if (line < num_notes_) {
      tail.note = line;
      return tail;
    }
    const int vector = num_whole_ + (line - num_notes_) / 2;
    if (vector >= num_vectors_) return tail;
    tail.vector = vector;
    tail.half = (line - num_notes_) % 2;
    return tail;
  }

 private:
  int num_vectors_;
  int num_notes_;
  int num_whole_;  // vectors with a lane of their own
  int count_;
};

// A row of fp8, whose groups of eight vectors have a scale each. Seven groups go into eight lines,
// one a lane, so that the lanes of a group are in one warp; tails carry the groups' scales and
// notes.
class Fp8Lines {
 public:
  static constexpr int kLinesPerUnit = 8;
  static constexpr int kScaleLines = 4;  // of a unit; the others' tails have notes

  constexpr EPS_HOST_DEVICE Fp8Lines(int num_groups, int num_notes)
      : num_groups_(num_groups), num_notes_(num_notes) {
    const int units = CeilDivide(num_groups, kTailLane);
    const int for_notes = CeilDivide(num_notes, kLinesPerUnit - kScaleLines);
    count_ = kLinesPerUnit * (units > for_notes ? units : for_notes);
  }

  constexpr EPS_HOST_DEVICE int count() const { return count_; }

  constexpr EPS_HOST_DEVICE int VectorAt(int line, int lane) const {
    const int group = line / kLinesPerUnit * kTailLane + lane;
    return group < num_groups_ ? group * kLinesPerUnit + line % kLinesPerUnit : -1;
  }

  constexpr EPS_HOST_DEVICE LineTail TailAt(int line) const {
    const int unit = line / kLinesPerUnit;
    const int i = line % kLinesPerUnit;
    LineTail tail;
    if (i < kScaleLines) {
      // Two a tail of a unit's seven.
      const int of_unit = i < kScaleLines - 1 ? 2 : 1;
      const int scale = unit * kTailLane + 2 * i;
      const int left = num_groups_ - scale;
      tail.num_scales = left < of_unit ? (left > 0 ? left : 0) : of_unit;
      tail.scale = tail.num_scales > 0 ? scale : -1;
      return tail;
    }
    const int note = unit * (kLinesPerUnit - kScaleLines) + i - kScaleLines;
    tail.note = note < num_notes_ ? note : -1;
    return tail;
  }

 private:
  int num_groups_;
  int num_notes_;
  int count_ = 0;
};

// A token's notes: an expert and its weight for each of its K, and the token's index.
constexpr EPS_HOST_DEVICE int NumNotes(int topk) { return topk + 1; }

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_LINE_FORMAT_H_
