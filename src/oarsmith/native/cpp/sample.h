// Logits to a token by a request's settings: what engine/sampler.py and engine/filters.py do, a row at a time.
#pragma once
#include <cstdint>
#include <vector>

// A row of logits and what decides about its token. Written by Python (structs.py), which also reads the results.
struct SampleRow {
  const float* logits;  // [size]
  double temperature;   // 0: the likeliest
  int64_t top_k;        // 0: all
  double top_p, min_p, typical_p;
  double uniform;          // in [0, 1)
  const uint8_t* allowed;  // [size]: what a constraint allows; null: everything
  const int64_t* banned;   // [num_banned]
  const int64_t* bias_ids;
  const float* bias;          // [num_bias]
  const int64_t* seen;        // [num_seen] tokens with how often each occurs in the answer
  const float* seen_counts;
  int64_t num_banned, num_bias, num_seen;
  double repetition, frequency, presence;
  int64_t num_top;  // how many of the likeliest are wanted; -1: not even the token's own probability
  int64_t token;  // -1: the logits are not numbers
  double logprob;
  int64_t* top_ids;  // [num_top]
  double* top_logprobs;
};

// What a thread needs again and again.
class Sampler {
 public:
  void choose(SampleRow& row, int64_t size);

 private:
  struct Candidate {
    int32_t id;
    double scaled, prob;
  };

  const float* edit(const SampleRow& row, int64_t size);
  int64_t draw_any(const SampleRow& row, const float* x, int64_t size);
  int64_t draw_filtered(const SampleRow& row, const float* x, int64_t size);
  void gather(const SampleRow& row, const float* x, int64_t size, double least);
  void keep_typical(double typical_p);
  void describe(SampleRow& row, int64_t size);

  std::vector<float> edited_, weights_;
  std::vector<Candidate> candidates_;
  std::vector<int32_t> order_;
};

// The first of the largest numbers; whether all that could be chosen are numbers: no NaN, and the largest is finite.
int64_t largest(const float* x, int64_t size, bool* finite);
