#include "simt/warp.h"

#include "simt/internal.h"

namespace mmk::simt {
namespace {

struct VoteFrame {
  int predicate;
  Votes votes;
};

void complete_vote(void* const (&frames)[kWarpSize], unsigned present) {
  Votes votes{0, present};
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (frames[lane] == nullptr) continue;
    votes.set |= static_cast<unsigned>(static_cast<VoteFrame*>(frames[lane])->predicate != 0) << lane;
  }
  for (void* frame : frames) {
    if (frame != nullptr) static_cast<VoteFrame*>(frame)->votes = votes;
  }
}

}  // namespace

void complete_shuffle(void* const (&frames)[kWarpSize], unsigned present) {
  uint64_t values[kWarpSize] = {};
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (frames[lane] != nullptr) values[lane] = static_cast<ShuffleFrame*>(frames[lane])->value;
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (frames[lane] == nullptr) continue;
    auto& frame = *static_cast<ShuffleFrame*>(frames[lane]);
    const unsigned source = static_cast<unsigned>(frame.source) % kWarpSize;
    if ((present >> source & 1u) == 0) {
      fail("shuffle: lane %u reads lane %u, which does not take part (present 0x%08x)", lane, source,
           present);
    }
    frame.value = values[source];
  }
}

void complete_reduce(void* const (&frames)[kWarpSize], unsigned) {
  ReduceFrame* first = nullptr;
  for (void* pointer : frames) {
    auto* frame = static_cast<ReduceFrame*>(pointer);
    if (frame == nullptr) continue;
    if (first == nullptr) {
      first = frame;
    } else {
      first->value = frame->combine(first->value, frame->value);
    }
  }
  for (void* frame : frames) {
    if (frame != nullptr) static_cast<ReduceFrame*>(frame)->value = first->value;
  }
}

void complete_match(void* const (&frames)[kWarpSize], unsigned) {
  for (void* pointer : frames) {
    if (pointer == nullptr) continue;
    auto& frame = *static_cast<MatchFrame*>(pointer);
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const auto* other = static_cast<const MatchFrame*>(frames[lane]);
      if (other != nullptr && other->value == frame.value) frame.lanes |= 1u << lane;
    }
  }
}

Votes vote(const char* name, unsigned mask, int predicate, const std::source_location& where) {
  VoteFrame frame{predicate, {}};
  warp_collective({name, complete_vote, false}, mask, &frame, where);
  return frame.votes;
}

void sync_warp(unsigned mask, const std::source_location& where) {
  char frame = 0;
  const auto nothing = [](void* const(&)[kWarpSize], unsigned) {};
  warp_collective({"__syncwarp", nothing, false, true}, mask, &frame, where);
}

}  // namespace mmk::simt
