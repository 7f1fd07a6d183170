// Mixtures of experts: rows are sorted by the experts they chose, and the team works through one expert after another.
#include <numeric>

#include "step.h"

// Probabilities of all experts, or a sigmoid of each score.
static void to_weights(const Experts& spec, float* x) {
  if (spec.sigmoid) {
    for (int64_t i = 0; i < spec.count; ++i) x[i] = 1.0f / (1.0f + std::exp(-x[i]));
    return;
  }
  const float largest = *std::max_element(x, x + spec.count);
  float total = 0.0f;
  for (int64_t i = 0; i < spec.count; ++i) total += x[i] = std::exp(x[i] - largest);
  for (int64_t i = 0; i < spec.count; ++i) x[i] /= total;
}

// The indices of the `count` largest of x[size], the first of equal ones first.
static void largest_of(const float* x, int64_t size, int64_t count, std::vector<int32_t>& found) {
  found.resize(size);
  std::iota(found.begin(), found.end(), 0);
  std::partial_sort(found.begin(), found.begin() + count, found.end(),
                    [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  found.resize(count);
}

// Experts outside the best groups get -inf.
static void close_groups(const Experts& spec, std::vector<float>& x) {
  const int64_t size = spec.count / spec.groups;
  std::vector<float> best(spec.groups);
  std::vector<int32_t> found;
  for (int64_t group = 0; group < spec.groups; ++group) {
    largest_of(x.data() + group * size, size, spec.best_of_group, found);
    for (int32_t i : found) best[group] += x[group * size + i];
  }
  largest_of(best.data(), spec.groups, spec.kept_groups, found);
  for (int64_t group = 0; group < spec.groups; ++group)
    if (std::find(found.begin(), found.end(), group) == found.end())
      std::fill_n(x.begin() + group * size, size, -INFINITY);
}

void Step::choose(const Operation& op, int64_t row) {
  const Experts& spec = *op.experts;
  float* weights = buffers_[op.scores].row(row);
  to_weights(spec, weights);
  std::vector<float> scores(weights, weights + spec.count);
  if (spec.correction != nullptr)
    for (int64_t i = 0; i < spec.count; ++i) scores[i] += spec.correction[i];
  if (spec.groups != 0) close_groups(spec, scores);
  std::vector<int32_t> found;
  largest_of(scores.data(), spec.count, spec.top_k, found);
  float total = 0.0f;
  for (int32_t i : found) total += weights[i];
  const float factor = spec.normalize ? spec.scale / (total + 1e-20f) : spec.scale;
  for (int64_t k = 0; k < spec.top_k; ++k) {
    chosen_[row * spec.top_k + k] = found[k];
    shares_[row * spec.top_k + k] = weights[found[k]] * factor;
  }
}

// order_: places in chosen_, those of the first expert first. starts_: where each expert's begin.
void Step::sort_by_expert(const Experts& spec, int64_t rows) {
  starts_.assign(spec.count + 1, 0);
  for (int64_t i = 0; i < rows * spec.top_k; ++i) ++starts_[chosen_[i] + 1];
  std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
  std::vector<int32_t> next(starts_.begin(), starts_.end() - 1);
  for (int64_t i = 0; i < rows * spec.top_k; ++i) order_[next[chosen_[i]]++] = static_cast<int32_t>(i);
}

void Step::experts(const Operation& op, int64_t rows, int member) {
  const Experts& spec = *op.experts;
  const Buffer source = buffers_[op.source], target = buffers_[op.target], hidden = buffers_[spec.hidden];
  if (member == 0) {
    chosen_.resize(rows * spec.top_k), shares_.resize(rows * spec.top_k), order_.resize(rows * spec.top_k);
  }
  team_.meet();
  const Share share(rows, member, team_.size());
  for (int64_t row = share.first; row < share.stop; ++row) {
    choose(op, row);
    float* y = target.row(row);
    for (int64_t i = 0; i < target.stride; ++i) y[i] = op.keep == 0.0f ? 0.0f : op.keep * y[i];
  }
  team_.meet();
  if (member == 0) sort_by_expert(spec, rows);
  team_.meet();
  const Activation activation = static_cast<Activation>(spec.activation);
  for (int64_t expert = 0; expert < spec.count; ++expert) {
    const int32_t* own = order_.data() + starts_[expert];
    const int64_t count = starts_[expert + 1] - starts_[expert];
    if (count == 0) continue;
    const auto row_of = [&](int64_t i) { return own[i] / spec.top_k; };
    const Matrix &up = spec.gate_up[expert], &down = spec.down[expert];
    const float* up_bias =
        spec.gate_up_bias == nullptr ? nullptr : spec.gate_up_bias + expert * padded(up.rows);
    const float* down_bias =
        spec.down_bias == nullptr ? nullptr : spec.down_bias + expert * padded(down.rows);
    const Inputs& outer = prepare(up, Norm{}, count, member, [&](int64_t i) { return source.row(row_of(i)); });
    Share pairs(up.pairs(), member, team_.size());
    multiply(up, outer, count, pairs.first, pairs.stop, [&](int64_t pair, int64_t i, vec16 gate, vec16 value) {
      if (up_bias != nullptr) gate += load16(up_bias + 32 * pair), value += load16(up_bias + 32 * pair + 16);
      const vec16 y = activation == Activation::CLAMPED_SWIGLU ? clamped_swiglu(gate, value, spec.alpha, spec.limit)
                                                               : activate(activation, gate) * value;
      store16(hidden.row(i) + 16 * pair, y);
    });
    team_.meet();
    const Inputs& inner = prepare(down, Norm{}, count, member, [&](int64_t i) { return hidden.row(i); });
    pairs = Share(down.pairs(), member, team_.size());
    multiply(down, inner, count, pairs.first, pairs.stop, [&](int64_t pair, int64_t i, vec16 low, vec16 high) {
      if (down_bias != nullptr) low += load16(down_bias + 32 * pair), high += load16(down_bias + 32 * pair + 16);
      const float weight = op.scale * shares_[own[i]];
      float* y = target.row(row_of(i)) + 32 * pair;
      store16(y, fma16(low, weight, load16(y)));
      store16(y + 16, fma16(high, weight, load16(y + 16)));
    });
    team_.meet();
  }
}
