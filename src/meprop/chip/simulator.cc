// Runs a core that yosys has written as C++ (CXXRTL), with a host that never waits.
//
// Standard input has for each command: how many words the core gives, how many it takes, and those. Standard output has a
// line for each command: the cycles, and the words that the core gave.

#include "core.h"

#include <cstdint>
#include <iostream>
#include <vector>

namespace {

cxxrtl_design::p_meprop__core core;

template <size_t Bits> int64_t as_signed(const cxxrtl::value<Bits> &word) {
  const auto bits = word.template get<uint64_t>();
  return static_cast<int64_t>(bits << (64 - Bits)) >> (64 - Bits);
}

void tick() {
  core.p_clk.set<bool>(true);
  core.step();
  core.p_clk.set<bool>(false);
  core.step();
}

} // namespace

int main() {
  core.p_rst.set<bool>(true);
  tick();
  core.p_rst.set<bool>(false);
  core.p_given__ready.set<bool>(true);
  core.p_patience.set<unsigned>(20);
  size_t expected, count;
  while (std::cin >> expected >> count) {
    std::vector<int64_t> words(count), given;
    for (auto &word : words)
      std::cin >> word;
    uint64_t cycles = 0;
    for (size_t place = 0; place < count || given.size() < expected; ++cycles) {
      core.p_taken__valid.set<bool>(place < count);
      if (place < count)
        core.p_taken.set<uint64_t>(static_cast<uint64_t>(words[place]) & ((uint64_t{1} << core.p_taken.bits) - 1));
      core.step();
      if (core.p_given__valid.get<bool>())
        given.push_back(as_signed(core.p_given));
      place += place < count && core.p_taken__ready.get<bool>();
      tick();
    }
    core.p_taken__valid.set<bool>(false);
    std::cout << cycles;
    for (auto word : given)
      std::cout << ' ' << word;
    std::cout << '\n';
  }
}
