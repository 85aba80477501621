// How the blocks of a combine of many rows are divided between its two roles, pushing and reducing
// (see cuda_combine.cu), which work at the same time and should end at the same time.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_COMBINE_BLOCKS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_COMBINE_BLOCKS_H_

namespace epserve::runtime {

struct CombineBlocks {
  int push;
  int reduce;
};

// Divides `total` blocks, at least 2, by the rows that each role reads where T tokens a rank are
// routed evenly: each role gets one at least.
CombineBlocks DivideCombineBlocks(int total, int num_ranks, int topk);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_COMBINE_BLOCKS_H_
