#include "step.h"

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Step::Step(const StepSpec& spec)
    : spec_(spec),
      body_(spec.body, spec.body + spec.num_body),
      head_(spec.head, spec.head + spec.num_head),
      rotation_specs_(spec.rotations, spec.rotations + spec.num_rotations),
      state_widths_(spec.state_widths, spec.state_widths + spec.num_states),
      cache_(spec.stored, spec.cache_form, spec.num_layers, spec.cache_dims, spec.cache_scales, spec.num_pages,
             spec.page_size),
      members_(spec.threads),
      team_(static_cast<int>(spec.threads)) {
  int64_t bytes = 0, widest = 0;
  for (int64_t i = 0; i < spec.num_buffers; ++i) {
    widest = std::max(widest, padded(spec.widths[i]));
    if (i != spec.logits && i != spec.stream) bytes += aligned(4 * padded(spec.widths[i]) * spec.max_rows);
  }
  for (const RotationSpec& rotation : rotation_specs_) bytes += 2 * aligned(4 * rotation.frequencies * spec.max_rows);
  memory_ = Memory(bytes);
  if (memory_.data() == nullptr) throw std::bad_alloc();
  uint8_t* at = memory_.data();
  const auto take = [&](int64_t width) {
    float* start = reinterpret_cast<float*>(at);
    at += aligned(4 * width * spec_.max_rows);
    return start;
  };
  for (int64_t i = 0; i < spec.num_buffers; ++i) {
    const int64_t width = padded(spec.widths[i]);
    buffers_.push_back({i == spec.logits || i == spec.stream ? nullptr : take(width), width});
  }
  buffers_[spec.logits].stride = spec.widths[spec.logits];
  for (const RotationSpec& rotation : rotation_specs_) {
    const float *cos = take(rotation.frequencies), *sin = take(rotation.frequencies);
    rotations_.push_back({rotation.frequencies, rotation.adjacent != 0, cos, sin});
  }
  for (Member& member : members_) member.row.assign(widest, 0.0f);
  for (int64_t width : state_widths_) states_.emplace_back(spec.num_slots * width);
  const auto need = [&](const Matrix& matrix) { inputs_for(matrix); };
  for (const std::vector<Operation>* list : {&body_, &head_})
    for (const Operation& op : *list) {
      if (op.kind == Kind::LINEAR) need(op.matrix);
      if (op.kind == Kind::HEADS) inputs_for(op.matrices[0], true);
      // Experts of a quantized checkpoint may have formats of their own.
      for (int64_t i = 0; op.kind == Kind::EXPERTS && i < op.experts->count; ++i)
        need(op.experts->gate_up[i]), need(op.experts->down[i]);
    }
}

std::vector<Inputs>& Step::inputs_for(const Matrix& matrix, bool each_all) {
  for (InputsOf& known : inputs_)
    if (known.format == matrix.format && known.columns == matrix.columns && known.each_all == each_all)
      return known.inputs;
  inputs_.push_back({matrix.format, matrix.columns, each_all, std::vector<Inputs>(spec_.threads)});
  return inputs_.back().inputs;
}

void Step::copy_states(int64_t source, int64_t target) {
  for (int64_t i = 0; i < spec_.num_states; ++i) {
    const int64_t width = state_widths_[i];
    std::memcpy(states_[i].data() + target * width, states_[i].data() + source * width, 4 * width);
  }
}

// The first has room for all rows; each member has one row of its own.
void Step::begin_inputs(int64_t rows) {
  for (InputsOf& known : inputs_)
    for (Inputs& inputs : known.inputs) {
      const bool all = known.each_all || &inputs == &known.inputs[0];
      inputs.begin(known.format, known.columns, all ? rows : 1);
    }
}

void Step::run(const StepRows& rows, const int32_t* sets) {
  const int64_t stride = buffers_[spec_.stream].stride;
  if (rows.count > hidden_rows_) {
    hidden_ = Memory(4 * stride * rows.count);
    if (hidden_.data() == nullptr) throw std::bad_alloc();
    hidden_rows_ = rows.count;
  }
  std::vector<const int32_t*> own(spec_.num_rotations);
  for (int64_t first = 0; first < rows.count; first += spec_.max_rows) {
    const StepRows some = rows.part(first, std::min(spec_.max_rows, rows.count - first));
    for (int64_t i = 0; i < spec_.num_rotations; ++i) own[i] = sets + i * rows.count + first;
    buffers_[spec_.stream].data = reinterpret_cast<float*>(hidden_.data()) + first * stride;
    some_rows(some, own.data());
  }
  buffers_[spec_.stream].data = reinterpret_cast<float*>(hidden_.data());
}

void Step::some_rows(const StepRows& rows, const int32_t* const* sets) {
  rows_ = &rows;
  find_blocks(rows);
  begin_inputs(rows.count);
  team_.run([&](int member) {
    turn(rows, sets, member);
    team_.meet();
    operations(body_.data(), static_cast<int64_t>(body_.size()), rows.count, member);
  });
}

void Step::logits(int64_t count, const int64_t* places, float* out) {
  const Buffer stream = buffers_[spec_.stream], input = buffers_[spec_.head_input];
  const int64_t vocabulary = buffers_[spec_.logits].stride;
  for (int64_t first = 0; first < count; first += spec_.max_rows) {
    const int64_t some = std::min(spec_.max_rows, count - first);
    for (int64_t i = 0; i < some; ++i)
      std::memcpy(input.row(i), stream.row(places[first + i]), 4 * stream.stride);
    buffers_[spec_.logits].data = out + first * vocabulary;
    begin_inputs(some);
    team_.run([&](int member) { operations(head_.data(), static_cast<int64_t>(head_.size()), some, member); });
  }
}

void Step::sample(SampleRow* rows, int64_t count) {
  const int64_t vocabulary = buffers_[spec_.logits].stride;
  const auto choose = [&](int member) {
    for (int64_t i = team_.take(); i < count; i = team_.take()) members_[member].sampler.choose(rows[i], vocabulary);
  };
  if (count > 1) return team_.run(choose);
  for (int64_t i = 0; i < count; ++i) members_[0].sampler.choose(rows[i], vocabulary);
}

// Rows of a sequence, so many that their queries use what they load of the cache, and so few that all fits a core.
void Step::find_blocks(const StepRows& rows) {
  int64_t share = 1;
  for (const Operation& op : body_)
    if (op.kind == Kind::ATTEND) share = std::max(share, op.attention->heads / op.attention->kv_heads);
  const int64_t most = std::max<int64_t>(1, 48 / share);
  blocks_.clear();
  for (int64_t first = 0, stop; first < rows.count; first = stop) {
    stop = first + 1;
    while (stop < rows.count && stop - first < most && rows.sequences[stop] == rows.sequences[first]) ++stop;
    blocks_.push_back({first, stop, rows.pages[rows.sequences[first]]});
  }
}

void Step::operations(const Operation* list, int64_t count, int64_t rows, int member) {
  for (int64_t i = 0; i < count; ++i) {
    const Operation& op = list[i];
    switch (op.kind) {
      case Kind::EMBED: embed(op, rows, member); break;
      case Kind::NORM: norm(op, rows, member); break;
      case Kind::LINEAR: linear(op, rows, member); break;
      case Kind::ATTEND: attend(op, rows, member); break;
      case Kind::HEADS: heads(op, rows, member); break;
      case Kind::JOIN: join(op, rows, member); break;
      case Kind::EXPERTS: experts(op, rows, member); break;
    }
    team_.meet();
  }
}

void Step::turn(const StepRows& rows, const int32_t* const* sets, int member) {
  const Share share(rows.count, member, team_.size());
  for (size_t i = 0; i < rotations_.size(); ++i) {
    const RotationSpec& spec = rotation_specs_[i];
    float *cos = const_cast<float*>(rotations_[i].cos), *sin = const_cast<float*>(rotations_[i].sin);
    for (int64_t row = share.first; row < share.stop; ++row) {
      const float* frequencies = spec.sets + sets[i][row] * spec.frequencies;
      for (int64_t f = 0; f < spec.frequencies; ++f) {
        // The product is rounded to fp32, as the decoder's own tables have it.
        const float angle = static_cast<float>(rows.position(row, spec.of_blocks)) * frequencies[f];
        cos[row * spec.frequencies + f] = std::cos(angle) * spec.factor;
        sin[row * spec.frequencies + f] = std::sin(angle) * spec.factor;
      }
    }
  }
}

void Step::embed(const Operation& op, int64_t rows, int member) {
  const Share share(rows, member, team_.size());
  const Buffer target = buffers_[op.target];
  for (int64_t row = share.first; row < share.stop; ++row) {
    float* y = target.row(row);
    float* own = members_[member].row.data();
    if (op.keep == 0.0f) std::memset(y, 0, 4 * target.stride);
    if (op.matrix.blocks != nullptr) {
      unpack_row(op.matrix, rows_->tokens[row], own);
      for (int64_t i = 0; i < op.matrix.columns; ++i) y[i] += own[i] * op.scale;
    }
    if (op.positions == nullptr) continue;
    const float* learned = op.positions + (rows_->position(row) + op.position_offset) * op.matrix.columns;
    for (int64_t i = 0; i < op.matrix.columns; ++i) y[i] += learned[i];
  }
}

void Step::norm(const Operation& op, int64_t rows, int member) {
  const Share share(rows, member, team_.size());
  const Buffer source = buffers_[op.source], target = buffers_[op.target];
  float* normed = members_[member].row.data();
  for (int64_t row = share.first; row < share.stop; ++row) {
    const float* x = source.row(row);
    int64_t width = source.stride;
    if (op.norm.size != 0) {
      width = op.norm.size;
      apply(op.norm, width, x, normed);
      x = normed;
    }
    float* y = target.row(row);
    for (int64_t i = 0; i < width; ++i) y[i] = op.keep == 0.0f ? x[i] : op.keep * y[i] + x[i];
  }
}

void Step::linear(const Operation& op, int64_t rows, int member) {
  const Buffer source = buffers_[op.source], target = buffers_[op.target];
  const Inputs& inputs =
      prepare(op.matrix, op.norm, rows, member, [&](int64_t row) -> const float* { return source.row(row); });
  const Share share(op.matrix.pairs(), member, team_.size());
  const Activation activation = static_cast<Activation>(op.activation);
  const auto with_bias = [&](int64_t pair, vec16& low, vec16& high) {
    if (op.bias == nullptr) return;
    low += load16(op.bias + 32 * pair);
    high += load16(op.bias + 32 * pair + 16);
  };
  const auto all = [&](auto&& out) { multiply(op.matrix, inputs, rows, share.first, share.stop, out); };
  switch (op.into) {
    case Into::STORE:
      return all([&](int64_t pair, int64_t row, vec16 low, vec16 high) {
        with_bias(pair, low, high);
        if (op.scale != 1.0f) low *= op.scale, high *= op.scale;
        if (activation != Activation::NONE)
          low = activate(activation, low, op.limit), high = activate(activation, high, op.limit);
        const int64_t column = op.target_offset + 32 * pair;
        float* y = target.row(row) + column;
        if (column + 32 <= target.stride) {
          store16(y, low), store16(y + 16, high);
        } else {
          float some[32];
          store16(some, low), store16(some + 16, high);
          std::memcpy(y, some, 4 * (target.stride - column));
        }
      });
    case Into::ADD: {
      const float* scales = op.scores < 0 ? nullptr : buffers_[op.scores].data;
      const int64_t stride = op.scores < 0 ? 0 : buffers_[op.scores].stride;
      return all([&](int64_t pair, int64_t row, vec16 low, vec16 high) {
        with_bias(pair, low, high);
        const float scale = scales == nullptr ? op.scale : op.scale * scales[row * stride];
        float* y = target.row(row) + 32 * pair;
        // What is not kept is not read: it may be a NaN.
        store16(y, fma16(low, scale, op.keep == 0.0f ? zero16() : load16(y) * op.keep));
        store16(y + 16, fma16(high, scale, op.keep == 0.0f ? zero16() : load16(y + 16) * op.keep));
      });
    }
    case Into::GATED:
      return all([&](int64_t pair, int64_t row, vec16 gate, vec16 up) {
        with_bias(pair, gate, up);
        const vec16 y = activation == Activation::CLAMPED_SWIGLU ? clamped_swiglu(gate, up, op.alpha, op.limit)
                                                                 : activate(activation, gate) * up;
        store16(target.row(row) + 16 * pair, y);
      });
  }
}

// Queries and keys get their norms, rotations and scale; keys and values go into the cache.
void Step::place(const Operation& op, int64_t rows, int member) {
  const Attention& spec = *op.attention;
  const Buffer qkv = buffers_[op.source];
  const int64_t dim = spec.key_dim;
  const bool whole = spec.q_norm.count > dim || spec.k_norm.count > dim;
  if (whole) {
    const Share share(rows, member, team_.size());
    for (int64_t row = share.first; row < share.stop; ++row) {
      float* x = qkv.row(row);
      apply(spec.q_norm, spec.heads * dim, x, x);
      apply(spec.k_norm, spec.kv_heads * dim, x + spec.keys_at, x + spec.keys_at);
    }
    team_.meet();
  }
  const int64_t heads = spec.heads + spec.kv_heads;
  const Share share(rows * heads, member, team_.size());
  for (int64_t unit = share.first; unit < share.stop; ++unit)
    place_head(spec, qkv.row(unit / heads), unit / heads, unit % heads, !whole);
}

// One query head or, after those, one kv head of a row.
void Step::place_head(const Attention& spec, float* qkv, int64_t row, int64_t head, bool with_norm) {
  const bool query = head < spec.heads;
  const int64_t own = query ? head : head - spec.heads, place = rows_->places[row];
  float* x = qkv + (query ? 0 : spec.keys_at) + own * spec.key_dim;
  const Norm& norm = query ? spec.q_norm : spec.k_norm;
  if (norm.size != 0 && with_norm) {
    const int64_t first = norm.weights > 1 ? own * norm.size : 0;
    apply_one(norm, norm.weight + first, norm.bias == nullptr ? nullptr : norm.bias + first, x, x);
  }
  const float* value = qkv + spec.values_at + own * spec.value_dim;
  for (const Turn& turn : spec.turns)
    if (turn.rotation >= 0) rotate(rotations_[turn.rotation], row, x + turn.offset);
  if (query) {
    float scale = spec.scale;
    if (spec.log_n != 0.0f)
      scale *= std::max(1.0f, std::log(static_cast<float>(rows_->position(row) + 1)) / std::log(spec.log_n));
    for (int64_t i = 0; i < spec.key_dim; ++i) x[i] *= scale;
  } else {
    const int64_t page = rows_->pages[rows_->sequences[row]][place / cache_.page_size];
    const bool last = row + 1 == rows_->count || rows_->sequences[row + 1] != rows_->sequences[row];
    cache_.put(cache_.layer(spec.layer), page, own, place % cache_.page_size, x, value, last);
  }
}

void Step::attend(const Operation& op, int64_t rows, int member) {
  place(op, rows, member);
  team_.meet();
  if (cache_.stored == Stored::F32)
    attend_blocks<Stored::F32>(op, member);
  else
    attend_blocks<Stored::BF16>(op, member);
}

template <Stored S>
void Step::attend_blocks(const Operation& op, int member) {
  const Attention& spec = *op.attention;
  AttentionBlock<S> work(spec, cache_, *rows_, members_[member].attention);
  const int64_t share = spec.heads / spec.kv_heads, pieces = static_cast<int64_t>(blocks_.size()) * spec.kv_heads;
  // With few sequences the heads of a kv head are divided too.
  const int64_t splits = std::clamp<int64_t>((2 * team_.size() + pieces - 1) / pieces, 1, share);
  for (int64_t item = team_.take(); item < pieces * splits; item = team_.take()) {
    const int64_t split = item % splits, kv = item / splits % spec.kv_heads;
    const Share heads(share, split, splits);
    work.run(blocks_[item / splits / spec.kv_heads], kv, kv * share + heads.first, heads.stop - heads.first,
             buffers_[op.source], buffers_[op.target]);
  }
}
