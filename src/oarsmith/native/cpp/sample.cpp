#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "vec.h"

static constexpr float NEVER = -std::numeric_limits<float>::infinity();

static float largest_value(const float* x, int64_t size, bool* number) {
  vec16 most = all16(NEVER), odd = zero16();
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const vec16 v = load16(x + i);
    most = max16(most, v);
    odd += v - v;  // NaN where v is infinite or a NaN
  }
  float found = max_of16(most);
  bool fine = true;
  for (; i < size; ++i) {
    found = std::max(found, x[i]);
    fine = fine && !std::isnan(x[i]);
  }
  if (number != nullptr) {
    // Few rows have an infinity in them: then one by one.
    if (std::isnan(sum16(odd)))
      for (int64_t j = 0; j < size; ++j) fine = fine && !std::isnan(x[j]);
    *number = fine && std::isfinite(found);
  }
  return found;
}

int64_t largest(const float* x, int64_t size, bool* finite) {
  const float most = largest_value(x, size, finite);
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const ivec16 same = load16(x + i) == all16(most);
    if (sum16(same) != 0) break;
  }
  for (; i < size; ++i)
    if (x[i] == most) return i;
  return 0;
}

// sum of exp((x - most) / temperature)
static double sum_of_powers(const float* x, int64_t size, float most, float factor) {
  double total = 0.0;
  int64_t i = 0;
  for (; i + 1024 <= size; i += 1024) {
    vec16 part = zero16();
    for (int64_t j = i; j < i + 1024; j += 16) part += exp16((load16(x + j) - most) * factor);
    total += sum16(part);
  }
  for (; i < size; ++i) total += std::exp((x[i] - most) * factor);
  return total;
}

// Constraint, bans, biases and penalties, in this order; the logits themselves where there is nothing to do.
const float* Sampler::edit(const SampleRow& row, int64_t size) {
  if (row.allowed == nullptr && row.num_banned + row.num_bias + row.num_seen == 0) return row.logits;
  edited_.assign(row.logits, row.logits + size);
  float* x = edited_.data();
  if (row.allowed != nullptr)
    for (int64_t i = 0; i < size; ++i) x[i] = row.allowed[i] ? x[i] : NEVER;
  if (row.num_banned != 0) {
    std::vector<float> before(row.num_banned);
    for (int64_t i = 0; i < row.num_banned; ++i) before[i] = x[row.banned[i]];
    for (int64_t i = 0; i < row.num_banned; ++i) x[row.banned[i]] = NEVER;
    // Unless they are all that there is. In reverse: a token may stand twice.
    if (largest_value(x, size, nullptr) == NEVER)
      for (int64_t i = row.num_banned - 1; i >= 0; --i)
        if (before[i] != NEVER) x[row.banned[i]] = before[i];
  }
  for (int64_t i = 0; i < row.num_bias; ++i) x[row.bias_ids[i]] += row.bias[i];
  const float repetition = static_cast<float>(row.repetition);
  for (int64_t i = 0; i < row.num_seen; ++i) {
    float& own = x[row.seen[i]];
    own = own < 0 ? own * repetition : own / repetition;
    own -= static_cast<float>(row.frequency) * row.seen_counts[i];
    if (row.seen_counts[i] > 0) own -= static_cast<float>(row.presence);
  }
  return x;
}

// No filter: the whole vocabulary in its order.
int64_t Sampler::draw_any(const SampleRow& row, const float* x, int64_t size) {
  const float most = largest_value(x, size, nullptr), factor = 1.0f / static_cast<float>(row.temperature);
  weights_.resize(size);
  double total = 0.0;
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const vec16 p = exp16((load16(x + i) - most) * factor);
    store16(weights_.data() + i, p);
  }
  for (; i < size; ++i) weights_[i] = std::exp((x[i] - most) * factor);
  for (float weight : weights_) total += weight;
  const double target = row.uniform * total;
  double through = 0.0;
  int64_t last = 0;
  for (i = 0; i < size; ++i) {
    if (weights_[i] == 0.0f) continue;
    through += weights_[i];
    last = i;
    if (through > target) return i;
  }
  return last;
}

// Tokens with a scaled logit of at least `least`, likeliest first, those of equal size in the vocabulary's order.
void Sampler::gather(const SampleRow& row, const float* x, int64_t size, double least) {
  const float most = largest_value(x, size, nullptr);
  const double bound = least * row.temperature;
  candidates_.clear();
  for (int64_t i = 0; i < size; ++i) {
    const double below = static_cast<double>(x[i]) - most;
    if (below >= bound && x[i] != NEVER) candidates_.push_back({static_cast<int32_t>(i), below / row.temperature, 0.0});
  }
}

static bool likelier(double a, int32_t a_id, double b, int32_t b_id) { return a > b || (a == b && a_id < b_id); }

int64_t Sampler::draw_filtered(const SampleRow& row, const float* x, int64_t size) {
  const auto before = [](const Candidate& a, const Candidate& b) { return likelier(a.scaled, a.id, b.scaled, b.id); };
  // Beyond e^-20 there is hardly anything; only a flat distribution needs more.
  const double everything = -std::numeric_limits<double>::infinity();
  double mass = 0.0;
  if (row.top_k > 0) {
    gather(row, x, size, everything);
    if (row.top_k < static_cast<int64_t>(candidates_.size())) {
      const auto kth = candidates_.begin() + row.top_k - 1;
      std::nth_element(candidates_.begin(), kth, candidates_.end(), before);
      const double last = kth->scaled;  // those as likely as it stay too
      candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(),
                                       [last](const Candidate& c) { return c.scaled < last; }),
                        candidates_.end());
    }
    for (const Candidate& c : candidates_) mass += std::exp(c.scaled);
  } else {
    const float most = largest_value(x, size, nullptr);
    mass = sum_of_powers(x, size, most, 1.0f / static_cast<float>(row.temperature));
    gather(row, x, size, -20.0);
    double inside = 0.0;
    for (const Candidate& c : candidates_) inside += std::exp(c.scaled);
    const bool enough = (row.top_p < 1 && inside >= row.top_p * mass) || (row.min_p > 0 && std::log(row.min_p) >= -20.0);
    if (!enough) gather(row, x, size, everything);
  }
  std::sort(candidates_.begin(), candidates_.end(), before);
  const double least = row.min_p > 0 ? std::log(row.min_p) : everything;
  double through = 0.0;
  size_t kept = 0;
  for (Candidate& c : candidates_) {
    c.prob = std::exp(c.scaled) / mass;
    const bool first = kept == 0;
    if (!first && (c.scaled < least || c.prob == 0.0 || (row.top_p < 1 && through >= row.top_p))) break;
    through += c.prob;
    ++kept;
  }
  candidates_.resize(kept);
  if (row.typical_p < 1) keep_typical(row.typical_p);
  double total = 0.0;
  for (const Candidate& c : candidates_) total += c.prob;
  const double target = row.uniform * total;
  through = 0.0;
  int64_t last = candidates_[0].id;
  for (const Candidate& c : candidates_) {
    if (c.prob == 0.0) continue;
    through += c.prob;
    last = c.id;
    if (through > target) break;
  }
  return last;
}

// Locally typical sampling (Meister et al. 2022): what is as surprising as the distribution is on average.
void Sampler::keep_typical(double typical_p) {
  double mass = 0.0, entropy = 0.0;
  for (const Candidate& c : candidates_) mass += std::exp(c.scaled);
  const double log_mass = std::log(mass);
  std::vector<double> distance(candidates_.size());
  for (const Candidate& c : candidates_) entropy -= (c.scaled - log_mass) * std::exp(c.scaled - log_mass);
  for (size_t i = 0; i < candidates_.size(); ++i)
    distance[i] = std::abs(log_mass - candidates_[i].scaled - entropy);
  order_.resize(candidates_.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) { return distance[a] < distance[b]; });
  double through = 0.0, farthest = distance[order_.back()];
  for (int32_t i : order_) {
    through += std::exp(candidates_[i].scaled - log_mass);
    if (through >= typical_p) {
      farthest = distance[i];
      break;
    }
  }
  for (size_t i = 0; i < candidates_.size(); ++i)
    if (distance[i] > farthest) candidates_[i].prob = 0.0;
}

// What the model itself thinks of the token, and of the likeliest ones.
void Sampler::describe(SampleRow& row, int64_t size) {
  const float* x = row.logits;
  const float most = largest_value(x, size, nullptr);
  const double log_mass = std::log(sum_of_powers(x, size, most, 1.0f)) + most;
  row.logprob = x[row.token] - log_mass;
  const int64_t count = std::min(row.num_top, size);
  if (count <= 0) return;
  order_.resize(size);
  std::iota(order_.begin(), order_.end(), 0);
  std::partial_sort(order_.begin(), order_.begin() + count, order_.end(),
                    [x](int32_t a, int32_t b) { return likelier(x[a], a, x[b], b); });
  for (int64_t i = 0; i < count; ++i) {
    row.top_ids[i] = order_[i];
    row.top_logprobs[i] = x[order_[i]] - log_mass;
  }
}

void Sampler::choose(SampleRow& row, int64_t size) {
  bool finite = true;
  row.token = largest(row.logits, size, &finite);
  if (!finite) {
    row.token = -1;
    return;
  }
  const float* x = edit(row, size);
  if (row.temperature == 0.0)
    row.token = x == row.logits ? row.token : largest(x, size, nullptr);
  else if (row.top_k > 0 || row.top_p < 1 || row.min_p > 0 || row.typical_p < 1)
    row.token = draw_filtered(row, x, size);
  else
    row.token = draw_any(row, x, size);
  if (row.num_top >= 0) describe(row, size);
}
